/**
 * `eigenlora/train`: new tasks by training coefficients on the model of a session; distilling, so that tasks answer as their adapters do;
 * packs judged by their answers.
 */

export type { BatchFeeds, Encode, EncodeHow, PlainTokenizer, Tokenizer } from "../session/tokens.ts";
export type { TaskDtypes } from "../tensor/dtypes.ts";
export type { AnsweringTask, ByAnswersOptions, FinishedOutcomes } from "./answering.ts";
export { type Distilled, type DistillOptions, distill } from "./distill.ts";
export type { ObjectiveOptions } from "./objective.ts";
export { type ByAnswersReport, packByAnswers, tasksByAnswers } from "./pack-by-answers.ts";
export type { Questions } from "./questions.ts";
export type { OptimizerOptions } from "./state.ts";
export type { LearnedTaskOptions, TaskFileOptions } from "./stored-task.ts";
export type { Example, Message, Score, Unlabelled } from "./supervision.ts";
export type { TeachOptions } from "./teacher.ts";
export type { SequenceOptions } from "./token-supervision.ts";
export type { Start } from "./trainer.ts";
export {
  type CreateTrainerOptions,
  createTrainer,
  type FitOptions,
  Trainer,
  type TrainerOptions,
  type TrainingStep,
} from "./trainer.ts";
