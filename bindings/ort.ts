/**
 * The part of onnxruntime that is used. The module is the caller's own import; types are structural, so that neither onnxruntime-web nor
 * onnxruntime-node is needed to compile against this package.
 */

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
