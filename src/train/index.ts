/**
 * `eigenlora/train`: new tasks by training coefficients on the model of a session; distilling, so that tasks answer as their adapters do;
 * packs judged by their answers.
 */

export type { BatchFeeds, Encode, EncodeHow, PlainTokenizer, Tokenizer } from "../session/tokens.ts";
export type { TaskDtypes } from "../tensor/dtypes.ts";
export type { AnsweringTask, ByAnswersOptions, FinishedOutcomes } from "./answering.ts";
export type { Questions } from "./answers.ts";
export { type CreateTrainerOptions, createTrainer } from "./create-trainer.ts";
export { type Distilled, type DistillOptions, distill } from "./distill.ts";
export type { Example, Message, Unlabelled } from "./examples.ts";
export { createJudge, type DivergenceByTask, type JudgeOptions, type PackJudge } from "./judge.ts";
export type { ObjectiveOptions } from "./objective.ts";
export { type ByAnswersReport, packByAnswers, tasksByAnswers } from "./pack-by-answers.ts";
export type { Start } from "./start.ts";
export type { OptimizerOptions } from "./state.ts";
export type { LearnedTaskOptions, TaskFileOptions } from "./stored-task.ts";
export type { Score } from "./supervision.ts";
export type { TeachOptions } from "./taught.ts";
export type { SequenceOptions } from "./token-supervision.ts";
export { type FitOptions, Trainer, type TrainerOptions, type TrainingStep } from "./trainer.ts";
