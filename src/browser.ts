/**
 * `eigenlora/browser`: what a page needs, in one file that imports nothing, for pages without a bundler. It holds
 * `eigenlora` and its subpaths `onnxruntime`, `transformers`, `session`, `onnx`, `cache` and `webgpu`, and the trainer
 * of `eigenlora/train`. Import all of it from here: what other subpaths export are other classes.
 */
export * from "../bindings/onnxruntime.ts";
export * from "../bindings/transformers.ts";
export * from "./cache/index.ts";
export * from "./index.ts";
export * from "./onnx/index.ts";
export { createSession, createSessions, type GroupOptions, type SessionGroup } from "./session/index.ts";
export {
  type CreateTrainerOptions,
  createTrainer,
  type Example,
  type FitOptions,
  type LearnedTaskOptions,
  type Message,
  type ObjectiveOptions,
  type OptimizerOptions,
  type Score,
  type SequenceOptions,
  type Start,
  type TaskDtypes,
  type TaskFileOptions,
  Trainer,
  type TrainingStep,
  type Unlabelled,
} from "./train/index.ts";
export { type WebgpuOptions, webgpu } from "./webgpu.ts";
