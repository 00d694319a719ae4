/**
 * onnxruntime-web, onnxruntime-node, or another module with their interface, as the engine of sessions and trainers;
 * and the WebGPU device that it computes on.
 */
/// <reference types="@webgpu/types" />
import type { DeviceBuffer, DeviceHandle } from "../src/backends/backend.ts";
import { BackendError, described } from "../src/errors.ts";
import type { Feed } from "../src/onnx/feeds.ts";
import { FLOAT } from "../src/onnx/linear.ts";
import { makeNode, makeValue } from "../src/onnx/nodes.ts";
import { create, toBinary } from "../src/onnx/protobuf.ts";
import {
  type Engine,
  type EngineGpu,
  type EngineTensor,
  type LoadOptions,
  Queue,
  type Tensors,
} from "../src/session/engine.ts";

// The part of onnxruntime that is used. The module is the caller's own import; types are structural, so that neither
// onnxruntime-web nor onnxruntime-node is needed to compile against this package.

/** A session of onnxruntime, as far as it is needed here. */
export interface OrtSession {
  readonly inputNames: readonly string[];
  readonly outputNames: readonly string[];
  readonly inputMetadata?: readonly unknown[];
  readonly outputMetadata?: readonly unknown[];
  run(feeds: never, fetches: never, options?: never): Promise<unknown>;
  release(): Promise<void>;
}

/** The module `onnxruntime-web`, `onnxruntime-web/webgpu`, `onnxruntime-node` or another with the same interface. */
export interface Ort {
  readonly InferenceSession: { create(model: Uint8Array, options?: never): Promise<OrtSession> };
  readonly Tensor: abstract new (...args: never) => unknown;
  readonly env: {
    readonly versions?: { readonly web?: string | undefined; readonly node?: string | undefined };
    readonly webgpu?: object;
    readonly wasm?: { readonly proxy?: boolean | undefined };
  };
}

/** The options of `InferenceSession.create` of this module. */
export type SessionOptions<O extends Ort> = O["InferenceSession"]["create"] extends (
  model: Uint8Array,
  options?: infer Options,
) => unknown
  ? Options
  : never;

interface KnownOptions {
  readonly executionProviders?: readonly (string | { readonly name: string; readonly forceCpuNodeNames?: string[] })[];
}

const TYPES = new Map<unknown, string>([
  [Float32Array, "float32"],
  [BigInt64Array, "int64"],
  [Int32Array, "int32"],
  [Uint16Array, "float16"],
  [Uint8Array, "bool"],
]);

/** Bytes that an address of WebAssembly reaches. */
const WASM_BYTES = 2 ** 32;

const queues = new WeakMap<object, Queue>();

/**
 * Makes an engine of onnxruntime, for functions that take one: `createSession`, and `packByAnswers` of
 * `eigenlora/train`.
 * @param ort the module that is to run models
 * @param session passed to `InferenceSession.create`: `executionProviders`, `graphOptimizationLevel`, …
 * @throws TypeError when `ort` is not such a module
 * @example
 * const engine = createEngine(ort, { executionProviders: ["wasm"] });
 */
export function createEngine<O extends Ort>(ort: O, session?: SessionOptions<O>): Engine<OrtSession> {
  if (typeof ort?.InferenceSession?.create !== "function" || typeof ort.Tensor !== "function") {
    throw new TypeError(`expected the module onnxruntime-web or onnxruntime-node, got ${described(ort)}`);
  }
  const options: KnownOptions = session ?? {};
  const { InferenceSession, env } = ort;
  const Tensor = ort.Tensor as unknown as new (...of: unknown[]) => EngineTensor;
  const name = "onnxruntime";
  const provider = JSON.stringify(options.executionProviders ?? "default");
  const isWeb = env.versions?.web !== undefined;
  /** Wraps all work on the device, once that is known. */
  let guarded = <T>(work: () => Promise<T>): Promise<T> => work();
  /**
   * onnxruntime-web overlaps nothing: in browsers a second run, creation or release fails with "Session already
   * started", or hangs the page, even of another session. All that goes through here waits for its turn.
   */
  const inTurn = <T>(work: () => Promise<T>): Promise<T> => {
    if (!isWeb) return work();
    const queue = queues.get(InferenceSession) ?? new Queue();
    queues.set(InferenceSession, queue);
    return queue.change(work);
  };
  /**
   * True if models run in a worker of onnxruntime-web's own (`env.wasm.proxy`). Memory that goes there is handed over:
   * the array that holds it is empty from then on, with all else that lies in the same memory.
   */
  const handsOver = (): boolean => env.wasm?.proxy === true;
  const tensor: Engine["tensor"] = (data, dims, type = TYPES.get(data.constructor)) => new Tensor(type, data, dims);
  const copy = ({ type, data, dims }: EngineTensor): EngineTensor => tensor((data as Feed["data"]).slice(), dims, type);
  const gpu: EngineGpu = {
    async device() {
      const found = await findDevice(ort, options.executionProviders![0]!);
      guarded = whileAlive(found.device);
      return found;
    },
    tensor: (buffer, dtype, dims) => bufferTensor(ort, buffer, dtype, dims),
    exclusive: (work) => inTurn(() => guarded(work)),
  };
  const isGpu = onWebgpu(options);
  return {
    ...{ name, provider, tensor },
    gpu: isGpu ? gpu : undefined,
    readsFiles: env.versions?.node !== undefined,
    // onnxruntime-web's older WebGPU provider (jsep) computes something else with DequantizeLinear. WebAssembly would
    // unpack all blocks of 4 bits in each run, which takes longer than bytes do.
    integers: isGpu ? ["MatMulNBits"] : isWeb ? ["DequantizeLinear"] : ["MatMulNBits", "DequantizeLinear"],
    room: isGpu || !isWeb ? undefined : WASM_BYTES,
    async load({ bytes, files, folder }, purpose = {}) {
      const given = optionsFor(options, purpose);
      const whole =
        folder === undefined
          ? { ...given, externalData: [...files] }
          : configured(given, { model_external_initializers_file_folder_path: folder });
      try {
        const model = handsOver() ? bytes.slice() : bytes;
        return await inTurn(() => InferenceSession.create(model, whole as never));
      } catch (cause) {
        const { message } = cause as Error;
        // The main entry of onnxruntime-web alone has a build for Node.
        const hint = message.includes("Dynamic require")
          ? "; in Node use onnxruntime-node, or import plain onnxruntime-web"
          : "";
        throw new BackendError(`onnxruntime cannot load the model (providers: ${provider}): ${message}${hint}`, {
          backend: name,
          cause,
        });
      }
    },
    run(session, feeds, fetches, runOptions = {}) {
      const run = () => {
        const given = handsOver()
          ? Object.fromEntries(Object.entries(feeds).map(([input, value]) => [input, copy(value)]))
          : feeds;
        return session.run(given as never, fetches as never, runOptions as never) as Promise<Tensors>;
      };
      return inTurn(() => guarded(run));
    },
    release: (session) => inTurn(() => session.release()),
  };
}

/** Options with more entries of onnxruntime's own configuration; the user's come first. */
function configured(options: object, entries: Readonly<Record<string, string>>): object {
  const { extra } = options as { readonly extra?: { readonly session?: object } };
  return { ...options, extra: { ...extra, session: { ...entries, ...extra?.session } } };
}

function onWebgpu({ executionProviders = [] }: KnownOptions): boolean {
  const [first] = executionProviders;
  return (typeof first === "string" ? first : first?.name) === "webgpu";
}

/**
 * Products read weights as they are. onnxruntime makes a copy of each, in the order in which a product takes them;
 * gradients take them in another one. Products of many rows with floats are hardly slower without.
 */
const UNPACKED = { disable_prepacking: "1" };

/** The user's options, for what a model is loaded for. */
export function optionsFor(given: KnownOptions, { purpose, exactNodes = [] }: LoadOptions): object {
  if (purpose === "inspect") {
    const { executionProviders, preferredOutputLocation, ...rest } = given as Record<string, unknown>;
    // An arena grows by doubling, and gives nothing back while anything of it is there.
    return configured({ ...rest, graphOptimizationLevel: "disabled", enableCpuMemArena: false }, UNPACKED);
  }
  // Patterns of memory are worth little to lengths that change, and each is memory of its own, on top of the rest.
  const options = purpose === "train" ? configured({ enableMemPattern: false, ...given }, UNPACKED) : given;
  if (!onWebgpu(given) || exactNodes.length === 0) return options;
  // Only onnxruntime-web's newer provider knows of these; the older one (jsep) reads past them.
  const executionProviders = given.executionProviders!.map((one) => {
    const provider = typeof one === "string" ? { name: one } : one;
    if (provider.name !== "webgpu") return one;
    return { ...provider, forceCpuNodeNames: [...(provider.forceCpuNodeNames ?? []), ...exactNodes] };
  });
  return { ...options, executionProviders };
}

function bufferTensor(ort: Ort, buffer: DeviceBuffer, dtype: "f32" | "f16", dims: readonly number[]): EngineTensor {
  const { fromGpuBuffer } = ort.Tensor as unknown as {
    fromGpuBuffer?: (buffer: unknown, options: object) => EngineTensor;
  };
  if (!fromGpuBuffer) {
    throw new BackendError("this build of onnxruntime takes no buffers of a device", { backend: "onnxruntime" });
  }
  return fromGpuBuffer.call(ort.Tensor, buffer, { dataType: dtype === "f32" ? "float32" : "float16", dims });
}

// The WebGPU device: which one it is, and whether it is still there.

/**
 * Some builds ignore the device that they are given without a word, others do not tell that they use it, and may name
 * that of another session; buffers of the wrong one would be read as zeros.
 * @param provider as the session has it
 * @throws BackendError when onnxruntime does not tell its device
 */
async function findDevice(
  ort: Ort,
  provider: string | { readonly name: string },
): Promise<{ device: DeviceHandle; ignored: boolean }> {
  const given = (provider as { device?: DeviceHandle }).device;
  if (given && (await computesOn(ort, given as GPUDevice, provider))) return { device: given, ignored: false };
  const device = (await (ort.env.webgpu as { device?: unknown } | undefined)?.device) as DeviceHandle | undefined;
  if (device) return { device, ignored: given !== undefined };
  throw new BackendError('onnxruntime does not tell its WebGPU device; use mode "core" or "factors"', {
    backend: "onnxruntime",
  });
}

/**
 * True if what onnxruntime computes with this provider lies on the device: asked of a session on a model of one
 * addition.
 */
async function computesOn(ort: Ort, device: GPUDevice, provider: string | { readonly name: string }): Promise<boolean> {
  const options = { executionProviders: [provider], preferredOutputLocation: "gpu-buffer" };
  const engine = createEngine(ort, options as never);
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

function oneAddition(): Uint8Array {
  const x = makeValue("x", FLOAT, [4]);
  const y = makeValue("y", FLOAT, [4]);
  const graph = create("GraphProto", {
    ...{ name: "device", input: [x], output: [y] },
    node: [makeNode("Add", "", ["x", "x"], "y")],
  });
  const model = { irVersion: 8n, graph, opsetImport: [{ domain: "", version: 13n }] };
  return toBinary("ModelProto", create("ModelProto", model));
}

/**
 * Lets nothing begin on a device that is gone, nor anybody wait for it: onnxruntime would block the page, or never
 * answer.
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
