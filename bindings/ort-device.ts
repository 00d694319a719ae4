/**
 * The WebGPU device that onnxruntime computes on: which one it is, and whether it is still there. Loaded where somebody asks.
 */
/// <reference types="@webgpu/types" />
import type { DeviceHandle } from "../src/backends/backend.ts";
import { BackendError } from "../src/errors.ts";
import { FLOAT } from "../src/onnx/linear.ts";
import {
  create,
  GraphProtoSchema,
  ModelProtoSchema,
  NodeProtoSchema,
  toBinary,
  ValueInfoProtoSchema,
} from "../src/onnx/protobuf.ts";
import type { Engine } from "../src/session/engine.ts";
import type { Ort, OrtSession } from "./ort.ts";

/**
 * Some builds ignore the device that they are given without a word, others do not tell that they use it, and may name that of
 * another session; buffers of the wrong one would be read as zeros.
 * @param provider as the session has it
 * @param engineOf makes an engine of the same module with other options
 * @throws BackendError when onnxruntime does not tell its device
 */
export async function findDevice(
  ort: Ort,
  provider: unknown,
  engineOf: (options: object) => Engine<OrtSession>,
): Promise<{ device: DeviceHandle; ignored: boolean }> {
  const given = (provider as { device?: DeviceHandle }).device;
  if (given && (await computesOn(engineOf, given as GPUDevice, provider))) return { device: given, ignored: false };
  const device = (await (ort.env.webgpu as { device?: unknown } | undefined)?.device) as DeviceHandle | undefined;
  if (device) return { device, ignored: given !== undefined };
  throw new BackendError('onnxruntime does not tell its WebGPU device; use mode "core" or "factors"', {
    backend: "onnxruntime",
  });
}

/** Whether what onnxruntime computes with this provider lies on the device: asked of a session on a model of one addition. */
async function computesOn(
  engineOf: (options: object) => Engine<OrtSession>,
  device: GPUDevice,
  provider: unknown,
): Promise<boolean> {
  const engine = engineOf({ executionProviders: [provider], preferredOutputLocation: "gpu-buffer" });
  const session = await engine.load({ bytes: oneAddition(), files: [] });
  try {
    const { y } = await engine.run(session, { x: engine.tensor(new Float32Array(4), [4]) }, ["y"]);
    device.pushErrorScope("validation");
    device.queue.writeBuffer((y as unknown as { gpuBuffer: GPUBuffer }).gpuBuffer, 0, new Uint32Array(1));
    const refused = await device.popErrorScope();
    y!.dispose?.();
    return refused === null;
  } finally {
    await engine.release(session);
  }
}

/** y = x + x of four numbers. */
function oneAddition(): Uint8Array {
  const shape = { dim: [{ value: { case: "dimValue" as const, value: 4n } }] };
  const type = { value: { case: "tensorType" as const, value: { elemType: FLOAT, shape } } };
  const [x, y] = ["x", "y"].map((name) => create(ValueInfoProtoSchema, { name, type }));
  const node = create(NodeProtoSchema, { opType: "Add", input: ["x", "x"], output: ["y"] });
  const graph = create(GraphProtoSchema, { name: "device", node: [node], input: [x!], output: [y!] });
  const model = { irVersion: 8n, graph, opsetImport: [{ domain: "", version: 13n }] };
  return toBinary(ModelProtoSchema, create(ModelProtoSchema, model));
}

/**
 * Lets nothing begin on a device that is gone, nor anybody wait for it: onnxruntime would block the page, or never answer.
 * @returns runs work; what it returns throws BackendError once the device is lost
 */
export function whileAlive(device: DeviceHandle): <T>(work: () => Promise<T>) => Promise<T> {
  let loss: BackendError | undefined;
  // A race with the device's own promise would keep the results of all runs as long as the device.
  const waiting = new Set<(loss: BackendError) => void>();
  void (device as GPUDevice).lost.then(({ reason, message }) => {
    const what = `onnxruntime's WebGPU device was lost (${reason}): ${message.replace(/\.+$/, "")}. Close this session and make a new one`;
    loss = new BackendError(what, { backend: "onnxruntime" });
    for (const reject of waiting) reject(loss);
  });
  return async (work) => {
    if (loss) throw loss;
    let end!: (loss: BackendError) => void;
    const lost = new Promise<never>((_, reject) => (end = reject));
    waiting.add(end);
    try {
      return await Promise.race([work(), lost]);
    } finally {
      waiting.delete(end);
    }
  };
}
