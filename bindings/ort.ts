/**
 * onnxruntime as it is seen from here: structural types of the caller's own module, and what is to be minded in calling it.
 */
import type { DeviceBuffer } from "../src/backends/backend.ts";
import { BackendError } from "../src/errors.ts";
import type { Feed } from "../src/onnx/feeds.ts";

/** A tensor of onnxruntime, as far as it is needed here. */
export interface OrtTensor {
  readonly type: string;
  readonly dims: readonly number[];
  readonly data: unknown;
  getData?(): Promise<unknown>;
  dispose?(): void;
}

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
  readonly env: { readonly versions?: { readonly web?: string | undefined }; readonly webgpu?: object };
}

export type Session<O extends Ort> = Awaited<ReturnType<O["InferenceSession"]["create"]>>;
export type Feeds<O extends Ort> = Parameters<Session<O>["run"]>[0];
export type Fetches<O extends Ort> = Parameters<Session<O>["run"]>[1];
export type SessionOptions<O extends Ort> = O["InferenceSession"]["create"] extends (
  model: Uint8Array,
  options?: infer Options,
) => unknown
  ? Options
  : never;

const queues = new WeakMap<object, Promise<unknown>>();

/**
 * onnxruntime-web overlaps nothing: in browsers a second run, creation or release fails with "Session already started", or
 * hangs the page, even of another session. All that goes through here waits for its turn.
 */
export function inTurn<T>(ort: Ort, work: () => Promise<T>): Promise<T> {
  if (ort.env.versions?.web === undefined) return work();
  const done = (queues.get(ort.InferenceSession) ?? Promise.resolve()).then(work);
  queues.set(
    ort.InferenceSession,
    done.catch(() => undefined),
  );
  return done;
}

/** Whether a session's options put the model on WebGPU. */
export function onWebgpu(session: unknown): boolean {
  const [first] = (session as { executionProviders?: readonly unknown[] } | undefined)?.executionProviders ?? [];
  return (typeof first === "string" ? first : (first as { name?: unknown } | undefined)?.name) === "webgpu";
}

/** A tensor that is a buffer of onnxruntime's device. */
export function bufferTensor(
  ort: Ort,
  buffer: DeviceBuffer,
  dataType: "float32" | "float16",
  dims: readonly number[],
): OrtTensor {
  const { fromGpuBuffer } = ort.Tensor as unknown as {
    fromGpuBuffer?: (buffer: unknown, options: object) => OrtTensor;
  };
  if (!fromGpuBuffer)
    throw new BackendError("this build of onnxruntime takes no buffers of a device", { backend: "onnxruntime" });
  return fromGpuBuffer.call(ort.Tensor, buffer, { dataType, dims });
}

/** Runs a session. */
export function call(session: OrtSession, feeds: object, fetches: unknown, options: object): Promise<object> {
  return session.run(feeds as never, fetches as never, options as never) as Promise<object>;
}

const TYPES = new Map<unknown, string>([
  [Float32Array, "float32"],
  [BigInt64Array, "int64"],
  [Int32Array, "int32"],
  [Uint16Array, "float16"],
  [Uint8Array, "bool"],
]);

export function makeTensor(ort: Ort, data: Feed["data"], dims: readonly number[]): OrtTensor {
  const Tensor = ort.Tensor as unknown as new (type: string, data: unknown, dims: readonly number[]) => OrtTensor;
  return new Tensor(TYPES.get(data.constructor)!, data, dims);
}
