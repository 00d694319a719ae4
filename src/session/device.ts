/**
 * Mode "folded", and task inputs on a device. On WebGPU the weights that tasks change are inputs of the model, and each
 * is a buffer of the device that the engine computes on: a switch folds into those buffers with one submit, no copy,
 * the same model. Without a device an engine takes weights only when it loads a model, so each switch loads one.
 */
/// <reference types="@webgpu/types" />

import type { DeviceHandle } from "../backends/backend.ts";
import { byteLengthOf, type CpuView, type DeviceTensor, sameShape, type View, viewValues } from "../core/base.ts";
import type { LoadedTasks, Selection } from "../core/selection.ts";
import type { TaskInput } from "../onnx/inject.ts";
import { outputAxis, partsOf } from "../onnx/modules.ts";
import type { ModelFile } from "../onnx/read.ts";
import type { WeightFile, WeightInput } from "../onnx/replaceable.ts";
import { onnxHost } from "../onnx/weights.ts";
import type { DataFile } from "../onnx/write.ts";
import { elementsOf, sum } from "../tensor/dtypes.ts";
import { webgpu } from "../webgpu.ts";
import {
  type Active,
  compareOutputs,
  type Delivery,
  type Placer,
  type ProbeReport,
  type SessionParts,
  withFeeds,
} from "./delivery.ts";
import type { Engine, EngineGpu, EngineTensor, LoadedModel, Tensors } from "./engine.ts";
import { foldingEvaluator, type InputValues, misfit, stackValues, type TaskEvaluator, toFeeds } from "./values.ts";

type Placed = DeviceTensor & { buffer: GPUBuffer };

/**
 * Mode "folded" on a device. Closes the file: nothing of it stays in the CPU's memory.
 * @throws BackendError when the engine refuses the model, does not tell its device, or does not read the buffers
 */
export async function deviceDelivery(
  parts: SessionParts,
  file: ModelFile,
  fed: readonly WeightInput[],
  gpu: EngineGpu,
): Promise<Delivery> {
  const { engine } = parts;
  const { inputs } = parts.prepared;
  const model = await engine.load(parts.detached, parts.load);
  const tensors = new Map<string, Placed>();
  const free = (): void => tensors.forEach(({ buffer }) => buffer.destroy());
  let opened: TaskEvaluator | undefined;
  try {
    const { device, ignored } = await gpu.device();
    await place(file, fed, device as GPUDevice, tensors);
    await file.close();
    const own = new Map([...tensors].map(([name, { buffer }]) => [name, buffer]));
    const weights = weightsIn(gpu, fed, (name) => own.get(name)!);
    const evaluator = await foldingEvaluator(parts.prepared, { base: tensors, backend: webgpu({ device }) });
    opened = evaluator;
    const active = (task: Selection, values: InputValues): Active => {
      const { feeds, bytes } = toFeeds(engine, inputs, [values]);
      return { model, task, feeds: { ...weights, ...feeds }, bytes };
    };
    const none = (await evaluator.read(null)).inputs;
    let before = await evaluator.load(null);
    const probe = await probeBuffers(parts, model, fed, weights, none, device as GPUDevice);
    const bytes = sum(own.values(), ({ size }) => size);
    return {
      ...{ evaluator, probe, first: active(null, none), bytesWritten: bytes },
      ...(ignored && { note: `${engine.name} does not use the device it was given; the weights are on its own` }),
      async make(tasks, signal) {
        const { inputs } = await evaluator.evaluate(tasks, signal);
        // Runs that were asked for before are through by then, and none begins meanwhile.
        await gpu.exclusive(async () => {
          await evaluator.fold(tasks, signal);
          // A parameter of another shape has a buffer of its own, which no input can take.
          const other = fed.find(({ name }) => tensors.get(name)?.buffer !== own.get(name));
          if (!other) return;
          const { name, shape } = other;
          const found = tensors.get(name)?.shape ?? [];
          await evaluator.fold(before);
          throw misfit(name, found, shape);
        });
        before = tasks;
        return active(tasks.selection, inputs);
      },
      check: () => evaluator.check(),
      memory: () => ({ ...evaluator.memory(), active: bytes }),
      async close() {
        await evaluator.close();
        free();
      },
    };
  } catch (error) {
    await opened?.close();
    free();
    await engine.release(model);
    throw error;
  }
}

/** Puts the parameters on the device, as their inputs take them. */
async function place(
  file: ModelFile,
  fed: readonly WeightInput[],
  device: GPUDevice,
  tensors: Map<string, Placed>,
): Promise<void> {
  const host = onnxHost(
    file,
    fed.flatMap(({ piece }) => piece ?? []),
  );
  const layouts = new Map([...host.list()].map(({ name, layout }) => [name, layout]));
  for (const { name, dtype, shape } of fed) {
    const view = (await host.read(name)) as CpuView;
    const count = elementsOf(shape);
    const bytes = new Uint8Array(roundUp16(count * (dtype === "f32" ? 4 : 2)));
    if (dtype === view.dtype) bytes.set(view.data.subarray(view.byteOffset, view.byteOffset + byteLengthOf(view)));
    else viewValues(view, new Float32Array(bytes.buffer));
    const buffer = device.createBuffer({ label: `eigenlora ${name}`, size: bytes.length, usage: USAGE });
    const layout = layouts.get(name);
    tensors.set(name, { dtype, shape, buffer, ...(layout ? { layout } : {}) });
    device.queue.writeBuffer(buffer, 0, bytes);
  }
}

function weightsIn(gpu: EngineGpu, fed: readonly WeightInput[], bufferOf: (name: string) => GPUBuffer): Tensors {
  return Object.fromEntries(
    fed.map(({ name, input, dtype, shape }) => [input, gpu.tensor(bufferOf(name), dtype, shape)]),
  );
}

/**
 * A tiny run on the base's weights and one on zeros: a provider that does not read the buffers gives the same twice.
 */
async function probeBuffers(
  parts: SessionParts,
  model: LoadedModel,
  fed: readonly WeightInput[],
  weights: Tensors,
  base: InputValues,
  device: GPUDevice,
): Promise<ProbeReport> {
  const largest = Math.max(...Object.values(weights).map(({ dims }) => 4 * elementsOf(dims)));
  const zeros = device.createBuffer({ label: "eigenlora zeros", size: roundUp16(largest), usage: USAGE });
  const nothing = weightsIn(parts.engine.gpu!, fed, () => zeros);
  try {
    return await withFeeds(parts, model, (run) =>
      compareOutputs(parts, run, "whatever the weights", [base, weights], [base, nothing]),
    );
  } finally {
    zeros.destroy();
  }
}

/** STORAGE, COPY_SRC and COPY_DST of GPUBufferUsage, which is a global in browsers only. */
const USAGE: number = 128 | 4 | 8;

/** Bytes of a buffer: whole vectors of four words, which kernels of runtimes read. */
function roundUp16(bytes: number): number {
  return Math.max(16, Math.ceil(bytes / 16) * 16);
}

/** Task inputs as buffers of the device that the engine computes on. @param engine one with `gpu` */
export function devicePlacer(engine: Engine, handle: DeviceHandle, inputs: readonly TaskInput[]): Placer {
  const device = handle as unknown as GPUDevice;
  /** Buffers of tasks that were active before, by input. */
  const spare = new Map<string, GPUBuffer[]>();
  const all = new Set<GPUBuffer>();
  const free = (buffer: GPUBuffer): void => {
    all.delete(buffer);
    buffer.destroy();
  };
  /** A buffer that nothing reads: tasks differ in rank, and so in size. */
  const bufferFor = (name: string, size: number): GPUBuffer => {
    const old = spare.get(name)?.pop();
    if (old?.size === size) return old;
    if (old) free(old);
    const buffer = device.createBuffer({ label: `eigenlora ${name}`, size, usage: USAGE });
    all.add(buffer);
    return buffer;
  };
  return {
    place(values) {
      const feeds: Record<string, EngineTensor> = {};
      const used: (readonly [name: string, buffer: GPUBuffer])[] = [];
      let bytes = 0;
      let written = 0;
      for (const input of inputs) {
        const { name } = input;
        const { dims, data } = stackValues(input, [values.get(name)!]);
        if (data instanceof BigInt64Array) {
          // A run carries indices from the CPU's memory all the same: they are 64-bit integers.
          feeds[name] = engine.tensor(data, dims);
          bytes += data.byteLength;
          continue;
        }
        const buffer = bufferFor(name, roundUp16(data.byteLength));
        device.queue.writeBuffer(buffer, 0, data as Float32Array<ArrayBuffer>);
        feeds[name] = engine.gpu!.tensor(buffer, "f32", dims);
        used.push([name, buffer]);
        written += data.byteLength;
      }
      // Called once no run reads them any more: their buffers are used again.
      const retire = (): void => {
        for (const [name, buffer] of used) spare.set(name, [...(spare.get(name) ?? []), buffer]);
      };
      return { feeds, bytes, written, retire };
    },
    get byteLength() {
      return sum(all, ({ size }) => size);
    },
    close() {
      for (const buffer of all) free(buffer);
    },
  };
}

/** Mode "folded" without a device. Keeps the file open: weights are folded from it. */
export async function foldedDelivery(
  { engine, prepared, detached, load }: SessionParts,
  file: ModelFile,
  weights: WeightFile,
): Promise<Delivery> {
  const { inputs } = prepared;
  const host = onnxHost(file, weights.pieces);
  // The file is in memory anyway: no second copy of its weights.
  const evaluator = await foldingEvaluator(prepared, { base: host, policy: "reload" });
  const pristine = detached.bytes.length + sum(detached.files, ({ data }) => data.byteLength);
  const make = async (tasks: LoadedTasks, signal?: AbortSignal): Promise<Active> => {
    const values = await evaluator.evaluate(tasks, signal);
    const changed = await evaluator.fold(tasks, signal);
    const content = await contentOf(weights, (name): View | Promise<View> => changed.get(name) ?? host.read(name));
    // Tasks that bring heads alone change no weight.
    const files = content.data.byteLength > 0 ? [...detached.files, content] : detached.files;
    const model = await engine.load({ ...detached, files }, load);
    return { model, task: tasks.selection, ...toFeeds(engine, inputs, [values.inputs]) };
  };
  const close = async (): Promise<void> => {
    await evaluator.close();
    await file.close();
  };
  try {
    return {
      evaluator,
      first: await make(await evaluator.load(null)),
      probe: { result: "not needed: the weights themselves change" },
      bytesWritten: weights.byteLength,
      make,
      memory() {
        const held = evaluator.memory();
        return { scratch: held.scratch + held.pristine, pristine, active: 0 };
      },
      close,
    };
  } catch (error) {
    await close();
    throw error;
  }
}

/**
 * Makes the content of the file of `value` for each parameter.
 * @throws BaseMismatchError when one has another shape than the model's
 */
async function contentOf(
  { path, byteLength, places, pieces }: WeightFile,
  value: (name: string) => View | Promise<View>,
): Promise<DataFile> {
  const data = new Uint8Array(byteLength);
  for (const [name, place] of places) {
    const view = await value(name);
    if (!sameShape(view.shape, place.shape)) throw misfit(name, view.shape, place.shape);
    data.set((view.data as Uint8Array).subarray(view.byteOffset, view.byteOffset + place.byteLength), place.offset);
  }
  const { copyPart } = pieces.length > 0 ? await import("../onnx/packed.ts") : {};
  for (const piece of pieces) {
    const view = await value(piece.name);
    const own = { ...view, data: (view.data as Uint8Array).subarray(view.byteOffset) };
    for (const { name, at, from, count } of partsOf(piece)) {
      const { offset, shape, width } = places.get(name)!;
      const target = { data: data.subarray(offset), shape, start: at };
      copyPart!({ ...own, start: from }, target, outputAxis(piece), count, width);
    }
  }
  return { path, data };
}
