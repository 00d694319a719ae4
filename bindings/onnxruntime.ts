/**
 * `eigenlora/onnxruntime`: a pack on a model that onnxruntime-web or onnxruntime-node runs.
 */

import type { Pack } from "../src/core/pack.ts";
import { checkOptions, checkPack } from "../src/errors.ts";
import { createSessions, type GroupOptions, type SessionGroup } from "../src/session/group.ts";
import { type SessionOptions as CommonOptions, SESSION_OPTIONS } from "../src/session/options.ts";
import { createSession, type Session } from "../src/session/session.ts";
import type { SourceInput } from "../src/source.ts";
import { createEngine, type Ort, type SessionOptions } from "./ort-engine.ts";

export type { ModuleFilter } from "../src/core/part.ts";
export type { MemoryReport, SwitchOptions } from "../src/core/selection.ts";
export type { ProbeReport } from "../src/session/delivery.ts";
export type { Engine } from "../src/session/engine.ts";
export type { Mode, SessionSwitchOptions } from "../src/session/options.ts";
export type {
  Session,
  SessionRunOptions,
  SessionSwitchReport,
  ValidColumns,
} from "../src/session/session.ts";
export { createEngine, type Ort, type OrtSession, type SessionOptions } from "./ort-engine.ts";

/** A session of this module. */
export type NativeSession<O extends Ort> = Awaited<ReturnType<O["InferenceSession"]["create"]>>;

/** Arguments and results of this module's own sessions. */
export interface OrtTypes<O extends Ort> {
  readonly feeds: Parameters<NativeSession<O>["run"]>[0];
  readonly fetches: Parameters<NativeSession<O>["run"]>[1];
  readonly results: Awaited<ReturnType<NativeSession<O>["run"]>>;
}

/** A session of onnxruntime that switches tasks; has the shape of its `InferenceSession`. */
export type EigenSession<O extends Ort = Ort> = Session<OrtTypes<O>>;

/** Options of `createEigenSession`. */
export interface EigenSessionOptions<O extends Ort = Ort> extends CommonOptions {
  /** Passed to `InferenceSession.create`: `executionProviders`, `graphOptimizationLevel`, … */
  readonly session?: SessionOptions<O> | undefined;
  readonly probe?: boolean | OrtTypes<O>["feeds"] | undefined;
}

/**
 * Prepares a model for all tasks of a pack and loads it once. Close the session when it is no longer needed, and then
 * the pack: it stays the caller's, since other sessions may use it.
 *
 * @param ort the module that is to run the model
 * @param model bytes, path, URL or Blob of the ONNX file; files next to it are found by path or URL, or given by
 *   `external`
 * @throws BaseMismatchError when modules are missing, ambiguous, of another shape or of another model; or when the mode
 *   asked for cannot do what the tasks bring: the message names one that can
 * @throws FormatError when the model is truncated, no ONNX model or of an opset before 11
 * @throws BackendError when onnxruntime refuses the model or the provider, or the probe finds the provider wrong
 * @example
 * const pack = await openPack("tasks.eigen");
 * const session = await createEigenSession(ort, "model.onnx", pack);
 * await session.switchTask("debtags-role");
 * const { logits } = await session.run(feeds);
 * await session.close();
 * await pack.close();
 */
export async function createEigenSession<O extends Ort>(
  ort: O,
  model: SourceInput,
  pack: Pack,
  given: EigenSessionOptions<O> = {},
): Promise<EigenSession<O>> {
  checkPack("createEigenSession", pack);
  checkOptions("createEigenSession", given, [...SESSION_OPTIONS, "session"]);
  const { session, ...options } = given;
  return createSession(createEngine(ort, session), model, pack, options as CommonOptions);
}

/** Sessions of onnxruntime that switch tasks together. */
export type EigenSessions<O extends Ort = Ort, Name extends string = string> = SessionGroup<OrtTypes<O>, Name>;

/** Options of `createEigenSessions`. */
export interface EigenSessionsOptions<O extends Ort = Ort> extends GroupOptions {
  /** Passed to `InferenceSession.create` for every file. */
  readonly session?: SessionOptions<O> | undefined;
}

/**
 * Prepares several files of one model, an encoder and a decoder, a UNet and its text encoders, for all tasks of a pack.
 * Each module of the pack goes to the files that it lives in, and one switch changes all of them or none.
 *
 * @param models bytes, paths, URLs or Blobs of the ONNX files, by names of your own
 * @throws BaseMismatchError when a module lives in none of the files, or a file has nothing of the pack; otherwise as
 *   `createEigenSession`
 * @example
 * const models = await createEigenSessions(ort, { encoder: "encoder.onnx", decoder: "decoder.onnx" }, skills);
 * await models.switchTask("titles");
 * const { last_hidden_state } = await models.call(({ encoder }) => encoder.run({ input_ids, attention_mask }));
 */
export async function createEigenSessions<O extends Ort, Name extends string>(
  ort: O,
  models: Readonly<Record<Name, SourceInput>>,
  pack: Pack,
  given: EigenSessionsOptions<O> = {},
): Promise<EigenSessions<O, Name>> {
  const { session, ...options } = given ?? {};
  return createSessions<OrtTypes<O>, Name>(createEngine(ort, session), models, pack, options);
}
