/**
 * `eigenlora/session`: sessions on an engine of one's own. `eigenlora/onnxruntime` has the engine for onnxruntime.
 */

export type { ModuleFilter } from "../core/part.ts";
export type { MemoryReport, Selection, SwitchOptions, SwitchReport } from "../core/selection.ts";
export type { Feed } from "../onnx/feeds.ts";
export type { DataFile, DetachedModel } from "../onnx/write.ts";
export type { ReadOptions } from "../source.ts";
export type { ProbeReport } from "./delivery.ts";
export type { Engine, EngineGpu, EngineTensor, LoadedModel, LoadOptions, Tensors } from "./engine.ts";
export { createSessions, type GroupOptions, type SessionGroup } from "./group.ts";
export type { Mode, SessionOptions, SessionSwitchOptions } from "./options.ts";
export {
  createSession,
  type Session,
  type SessionRunOptions,
  type SessionSwitchReport,
  type SessionTypes,
  type ValidColumns,
} from "./session.ts";
export type { BatchFeeds, Encode, EncodeHow, EncodeOptions, PlainTokenizer, Tokenizer } from "./tokens.ts";
