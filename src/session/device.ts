/**
 * Mode "folded" on WebGPU: the weights that tasks change are inputs of the model, and each is a buffer of the device that the
 * engine computes on. A switch folds into those buffers: one submit, no copy, the same model.
 */
/// <reference types="@webgpu/types" />

import { byteLengthOf, type CpuView, type DeviceTensor, viewValues } from "../core/base.ts";
import type { LoadedTasks, Selection } from "../core/selection.ts";
import { createFolding, type SessionRuntime } from "../core/session-runtime.ts";
import { BackendError, BaseMismatchError } from "../errors.ts";
import { onnxHost } from "../onnx/host.ts";
import type { ModelFile } from "../onnx/read.ts";
import type { WeightInput } from "../onnx/replaceable.ts";
import type { Active, Carrier, CarrierParts } from "./carrier.ts";
import type { EngineGpu, LoadedModel, Tensors } from "./engine.ts";
import { roundUp16, USAGE } from "./placed.ts";
import { withFeeds } from "./probe.ts";
import type { ProbeReport } from "./probe-term.ts";
import { type InputValues, inputNamesOf, TaskEvaluator, toFeeds } from "./values.ts";

/** A parameter on the device. */
type Placed = DeviceTensor & { buffer: GPUBuffer };

/**
 * @param file is closed: nothing of it stays in the CPU's memory
 * @throws BackendError when the engine refuses the model, does not tell its device, or does not read the buffers
 */
export async function deviceCarrier(
  parts: CarrierParts,
  file: ModelFile,
  fed: readonly WeightInput[],
  gpu: EngineGpu,
): Promise<Carrier> {
  const { engine } = parts;
  const { pack, view, inputs, names, keep, base } = parts.prepared;
  const model = await engine.load(parts.detached, parts.load);
  const tensors = new Map<string, Placed>();
  const free = (): void => tensors.forEach(({ buffer }) => buffer.destroy());
  let runtime: SessionRuntime | undefined;
  try {
    const { device, ignored } = await gpu.device();
    await place(file, fed, device as GPUDevice, tensors);
    await file.close();
    const own = new Map([...tensors].map(([name, { buffer }]) => [name, buffer]));
    const weights = Object.fromEntries(
      fed.map(({ name, input, dtype, shape }) => [input, gpu.tensor(own.get(name)!, dtype, shape)]),
    );
    const folding = await createFolding(pack, view, base.ignored, inputNamesOf(base), {
      ...{ base: tensors, backend: "webgpu", webgpu: { device }, names, ...(keep && { modules: keep }) },
    });
    runtime = folding;
    const evaluator = new TaskEvaluator(parts.prepared, folding);
    const active = (task: Selection, values: InputValues): Active => {
      const { feeds, bytes } = toFeeds(engine, inputs, [values]);
      return { model, task, feeds: { ...weights, ...feeds }, bytes };
    };
    const none = (await evaluator.read(null)).inputs;
    let before = await folding.load(null);
    const probe = await probeBuffers(parts, model, fed, weights, none, device as GPUDevice, gpu);
    const bytes = [...own.values()].reduce((sum, { size }) => sum + size, 0);
    return {
      ...{ evaluator, probe, first: active(null, none), bytesWritten: bytes },
      ...(ignored && { note: `${engine.name} does not use the device it was given; the weights are on its own` }),
      async make(tasks, signal) {
        const { inputs } = await evaluator.evaluate(tasks, signal);
        // Runs that were asked for before are through by then, and none begins meanwhile.
        await gpu.exclusive(() => foldInPlace(folding, tasks, before, signal, fed, tensors, own));
        before = tasks;
        return active(tasks.selection, inputs);
      },
      check: () => folding.check(),
      memory: () => ({ ...folding.memory(), active: bytes }),
      async close() {
        await folding.close();
        free();
      },
    };
  } catch (error) {
    await runtime?.close();
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
    const count = shape.reduce((a, b) => a * b, 1);
    const bytes = new Uint8Array(roundUp16(count * (dtype === "f32" ? 4 : 2)));
    if (dtype === view.dtype) bytes.set(view.data.subarray(view.byteOffset, view.byteOffset + byteLengthOf(view)));
    else viewValues(view, new Float32Array(bytes.buffer));
    const buffer = device.createBuffer({ label: `eigenlora ${name}`, size: bytes.length, usage: USAGE });
    const layout = layouts.get(name);
    tensors.set(name, { dtype, shape, buffer, ...(layout ? { layout } : {}) });
    device.queue.writeBuffer(buffer, 0, bytes);
  }
}

/**
 * @param before what is active, which comes back where it fails
 * @throws BaseMismatchError when the task brings a parameter of another shape, which no input can take
 */
async function foldInPlace(
  runtime: SessionRuntime,
  tasks: LoadedTasks,
  before: LoadedTasks,
  signal: AbortSignal | undefined,
  fed: readonly WeightInput[],
  tensors: ReadonlyMap<string, Placed>,
  own: ReadonlyMap<string, GPUBuffer>,
): Promise<void> {
  await runtime.fold(tasks, signal);
  const misfit = fed.find(({ name }) => tensors.get(name)?.buffer !== own.get(name));
  if (!misfit) return;
  const { name, shape } = misfit;
  const found = tensors.get(name)?.shape ?? [];
  await runtime.fold(before);
  const message = `a task brings "${name}" of [${found.join(", ")}], the model's needs [${shape.join(", ")}]`;
  throw new BaseMismatchError(message, { module: name, expected: shape, found });
}

/** A tiny run on the base's weights and one on zeros: a provider that does not read the buffers gives the same twice. */
async function probeBuffers(
  parts: CarrierParts,
  model: LoadedModel,
  fed: readonly WeightInput[],
  weights: Tensors,
  base: InputValues,
  device: GPUDevice,
  gpu: EngineGpu,
): Promise<ProbeReport> {
  const [output] = parts.prepared.outputNames as [string];
  const largest = Math.max(...Object.values(weights).map(({ dims }) => dims.reduce((a, b) => a * b, 4)));
  const zeros = device.createBuffer({ label: "eigenlora zeros", size: roundUp16(largest), usage: USAGE });
  const nothing = Object.fromEntries(fed.map(({ input, dtype, shape }) => [input, gpu.tensor(zeros, dtype, shape)]));
  try {
    return await withFeeds(parts, model, async (run) => {
      const [[before], [after]] = [await run([base], [output], weights), await run([base], [output], nothing)];
      if (before!.data.some((value, i) => value !== after!.data[i])) return { result: "passed" };
      throw new BackendError(
        `the provider ${parts.engine.provider} gives the same "${output}" whatever the weights: results would be silently ` +
          'wrong. Use the module "onnxruntime-web/webgpu", or mode "core"',
        { backend: parts.engine.name },
      );
    });
  } finally {
    zeros.destroy();
  }
}
