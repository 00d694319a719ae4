/**
 * Mode "folded" on WebGPU: the weights that tasks change are inputs of the session, and each is a buffer of the device that
 * onnxruntime computes on. A switch folds into those buffers: one submit, no copy, the same session. Loaded where it is used.
 */
/// <reference types="@webgpu/types" />

import { byteLengthOf, type CpuView, type DeviceTensor, viewValues } from "../src/base/host.ts";
import { BackendError, BaseMismatchError } from "../src/errors.ts";
import { onnxHost } from "../src/onnx/host.ts";
import type { ModelFile } from "../src/onnx/read.ts";
import { createRuntime } from "../src/runtime/create.ts";
import { copySelection, type Selection } from "../src/runtime/selection.ts";
import type { FoldedInput } from "../src/session/fold.ts";
import type { ProbeReport } from "../src/session/probe.ts";
import type { InputValue } from "../src/session/values.ts";
import { bufferTensor, inTurn, type Ort, type OrtTensor, type Session } from "./ort.ts";
import { type Carrier, createSession, type Parts, probeRun, providersOf, toFeeds } from "./ort-carrier.ts";
import { deviceOf, whileAlive } from "./ort-device.ts";
import { headEvaluator, headParameters, switchOptions } from "./ort-folded.ts";

/** STORAGE, COPY_SRC and COPY_DST of GPUBufferUsage, which is a global in browsers only. */
const USAGE = 128 | 4 | 8;

/** A parameter on the device. */
type Placed = DeviceTensor & { buffer: GPUBuffer };

/**
 * @param file is closed: nothing of it stays in the CPU's memory
 * @throws BackendError when onnxruntime refuses the model, does not tell its device, or does not read the buffers
 */
export async function gpuCarrier<O extends Ort>(
  parts: Parts<O>,
  file: ModelFile,
  fed: readonly FoldedInput[],
): Promise<Carrier<O>> {
  const { ort, pack, plan } = parts;
  const { inputs } = parts.grafted;
  const evaluator = await headEvaluator(parts);
  const session = await createSession(parts, parts.detached);
  const tensors = new Map<string, Placed>();
  const free = (): void => {
    for (const { buffer } of tensors.values()) buffer.destroy();
  };
  try {
    const { device: used, ignored } = await deviceOf(ort, parts.options.session);
    const device = used as GPUDevice;
    await place(file, fed, device, tensors);
    await file.close();
    const own = new Map([...tensors].map(([name, { buffer }]) => [name, buffer]));
    const runtime = await createRuntime(pack, {
      ...{ base: tensors, backend: "webgpu", webgpu: { device }, anyBase: true },
      ...{ names: plan.names, ignore: headParameters(parts) },
    });
    const weights: Record<string, OrtTensor> = {};
    for (const { name, input, dtype, shape } of fed) {
      weights[input] = bufferTensor(ort, own.get(name)!, dtype === "f32" ? "float32" : "float16", shape);
    }
    const none = await evaluator.evaluate(null, {});
    const probe = await probeBuffers(parts, session, fed, weights, none.inputs, device);
    const bytes = [...tensors.values()].reduce((sum, { buffer }) => sum + buffer.size, 0);
    let active: Selection = null;
    const alive = whileAlive(device);
    return {
      evaluator,
      first: { session, task: null, ...withHeads(ort, inputs, none, weights) },
      probe,
      ...(ignored && { note: "onnxruntime does not use the device it was given; the weights are on its own" }),
      alive,
      bytesWritten: bytes,
      async make(selection, how) {
        const values = await evaluator.evaluate(selection, how);
        // Runs that were asked for before are through by then, and none begins meanwhile.
        await inTurn(ort, async () => {
          await alive(() => runtime.switchTask(selection, switchOptions(how)));
          const misfit = fed.find(({ name }) => tensors.get(name)?.buffer !== own.get(name));
          if (misfit) {
            const { name, shape } = misfit;
            const found = tensors.get(name)?.shape ?? [];
            await runtime.switchTask(active);
            const message = `a task brings "${name}" of [${found.join(", ")}], the model's needs [${shape.join(", ")}]`;
            throw new BaseMismatchError(message, { module: name, expected: shape, found });
          }
          active = copySelection(selection);
        });
        return { session, task: copySelection(selection), ...withHeads(ort, inputs, values, weights) };
      },
      memory() {
        const { total, coefficients, pristine } = runtime.memory();
        return { expansion: total - coefficients - pristine, pristine, folded: bytes };
      },
      async dispose() {
        await runtime.close();
        free();
      },
    };
  } catch (error) {
    free();
    await inTurn(ort, () => session.release());
    throw error;
  }
}

/** Puts the parameters on the device, as their inputs take them. */
async function place(
  file: ModelFile,
  fed: readonly FoldedInput[],
  device: GPUDevice,
  tensors: Map<string, Placed>,
): Promise<void> {
  const host = onnxHost(file);
  const layouts = new Map([...host.list()].map(({ name, layout }) => [name, layout]));
  for (const { name, dtype, shape } of fed) {
    const view = (await host.read(name)) as CpuView;
    const count = shape.reduce((a, b) => a * b, 1);
    // Whole vectors of four words, which kernels of onnxruntime read.
    const bytes = new Uint8Array(Math.max(16, Math.ceil((count * (dtype === "f32" ? 4 : 2)) / 16) * 16));
    if (dtype === view.dtype) bytes.set(view.data.subarray(view.byteOffset, view.byteOffset + byteLengthOf(view)));
    else viewValues(view, new Float32Array(bytes.buffer));
    const buffer = device.createBuffer({ label: `eigenlora ${name}`, size: bytes.length, usage: USAGE });
    const layout = layouts.get(name);
    tensors.set(name, { dtype, shape, buffer, ...(layout ? { layout } : {}) });
    device.queue.writeBuffer(buffer, 0, bytes);
  }
}

function withHeads<O extends Ort>(
  ort: O,
  inputs: Parts<O>["grafted"]["inputs"],
  values: { inputs: ReadonlyMap<string, InputValue> },
  weights: Readonly<Record<string, OrtTensor>>,
): { feeds: Record<string, OrtTensor>; bytes: number } {
  const { feeds, bytes } = toFeeds(ort, inputs, [values]);
  return { feeds: { ...weights, ...feeds }, bytes };
}

/** A tiny run on the base's weights and one on zeros: a provider that does not read the buffers gives the same twice. */
async function probeBuffers<O extends Ort>(
  parts: Parts<O>,
  session: Session<O>,
  fed: readonly FoldedInput[],
  weights: Readonly<Record<string, OrtTensor>>,
  base: ReadonlyMap<string, InputValue>,
  device: GPUDevice,
): Promise<ProbeReport> {
  const { ort, options, outputs, feeds } = parts;
  if (options.probe === false) return { result: "skipped: asked not to" };
  const given = typeof options.probe === "object" ? options.probe : undefined;
  const made = given ? new Map<string, never>() : feeds;
  if (!made) return { result: "skipped: the model's inputs are of kinds that cannot be made up; pass `probe: feeds`" };
  const largest = Math.max(...Object.values(weights).map(({ dims }) => dims.reduce((a, b) => a * b, 4)));
  const zeros = device.createBuffer({
    label: "eigenlora zeros",
    size: Math.max(16, Math.ceil(largest / 16) * 16),
    usage: USAGE,
  });
  const nothing: Record<string, OrtTensor> = {};
  for (const { input, dtype, shape } of fed)
    nothing[input] = bufferTensor(ort, zeros, dtype === "f32" ? "float32" : "float16", shape);
  try {
    const results = [];
    for (const taken of [weights, nothing]) {
      const [output] = await probeRun(parts, session, { ...taken, ...(given as object | undefined) })(
        made,
        [base],
        [outputs[0]!],
      );
      results.push(output!);
    }
    const [before, after] = results;
    if (Array.prototype.some.call(before, (v: number, i: number) => v !== after![i])) return { result: "passed" };
  } catch (cause) {
    return {
      result: `skipped: the model does not run on the inputs of the probe (${(cause as Error).message.trim()}); pass \`probe: feeds\``,
    };
  } finally {
    zeros.destroy();
  }
  throw new BackendError(
    `the provider ${providersOf(options)} gives the same "${outputs[0]}" whatever the weights: results would be silently wrong. ` +
      'Use the module "onnxruntime-web/webgpu", or mode "core"',
    { backend: "onnxruntime" },
  );
}
