/**
 * `eigenlora/train`: new tasks on the model of a session, by training coefficients; tasks that answer as their adapters do
 * (distilling); packs judged by their answers.
 */

export type { TaskDtypes } from "../tensor/dtypes.ts";
export type { Questions } from "./answers.ts";
export type { BatchFeeds } from "./batch.ts";
export { type Distilled, type DistillOptions, distill } from "./distill.ts";
export type { Example, Message, Unlabelled } from "./examples.ts";
export type { Encode } from "./inputs.ts";
export { createJudge, type DivergenceByTask, type JudgeOptions, type PackJudge } from "./judge.ts";
export { type CreateTrainerOptions, createTrainer } from "./learn.ts";
export type { Score } from "./lessons.ts";
export { inputMoments, type MomentsOptions } from "./moments.ts";
export type { ObjectiveOptions } from "./objective.ts";
export type { TaskFileOptions } from "./result.ts";
export type { SequenceOptions } from "./sequences.ts";
export type { Start } from "./start.ts";
export type { OptimizerOptions } from "./state.ts";
export { type FitOptions, Trainer, type TrainerOptions, type TrainingStep } from "./trainer.ts";
export { type ZeroShotOptions, zeroShotTask } from "./zero-shot.ts";
