/**
 * `eigenlora/train`: new tasks by training coefficients on the model of a session; distilling, so that tasks answer as
 * their adapters do; packs judged by their answers.
 */

export type { BatchFeeds, Encode, EncodeHow, PlainTokenizer, Tokenizer } from "../session/tokens.ts";
export type { TaskDtypes } from "../tensor/dtypes.ts";
export { type Distilled, type DistillOptions, distill, type FinishedOutcomes } from "./distill.ts";
export type { ObjectiveOptions } from "./objective.ts";
export {
  type AnsweringTask,
  type ByAnswersOptions,
  type ByAnswersReport,
  packByAnswers,
  tasksByAnswers,
} from "./pack-by-answers.ts";
export type { Questions, TeachOptions } from "./questions.ts";
export type { OptimizerOptions } from "./state.ts";
export type { LearnedTaskOptions, TaskFileOptions } from "./stored-task.ts";
export type { Example, Message, Score, SequenceOptions, Unlabelled } from "./supervision.ts";
export {
  type CreateTrainerOptions,
  createTrainer,
  type FitOptions,
  type Start,
  Trainer,
  type TrainingStep,
} from "./trainer.ts";
