/**
 * Teacher outputs: answers of an adapter to questions of the user, or to those that the program makes, one part to learn from and one to
 * judge by.
 */

import type { Adapter } from "../adapters/adapter.ts";
import type { TaskInfo } from "../core/pack.ts";
import { TaskError } from "../errors.ts";
import type { TaskBlob } from "../format/format.ts";
import type { Session } from "../session/session.ts";
import { checkTokenizer, type Tokenizer } from "../session/tokens.ts";
import { shuffle, uniform } from "../tensor/random.ts";
import {
  type AdapterAnswer,
  answersOf,
  madeUpQuestions,
  type Questions,
  questionsOf,
  templateOf,
  wordsOf,
} from "./questions.ts";
import type { Row, Supervision } from "./supervision.ts";
import type { SequenceOptions } from "./token-supervision.ts";
import { headInputs } from "./trainable-model.ts";
import { supervisionOf } from "./trainer.ts";

/** A task of the pack that can be distilled, with the layers of its head. */
export interface Distillable {
  readonly id: string;
  readonly entry: TaskInfo;
  readonly blob: TaskBlob;
  readonly head: readonly string[];
}

/** Options of the questions that an adapter answers as the teacher. */
export interface TeachOptions extends Questions, SequenceOptions {
  /**
   * Turns texts into the model's inputs, one row each: a tokenizer of transformers.js or @huggingface/tokenizers as it is, which tells its
   * words too, or a function.
   */
  readonly encode?: Tokenizer | undefined;
  /** Texts per step. Default: 8. Many small steps gain more than few large ones. */
  readonly batch?: number | undefined;
  /** Most steps; they end earlier where questions held back gain no more. Default: 240. 0: coefficients are solved once, nothing is trained. */
  readonly steps?: number | undefined;
  /** Share of the texts held back to judge by. Default: an eighth. */
  readonly holdout?: number | undefined;
  /** Default: 0. */
  readonly seed?: number | undefined;
  readonly signal?: AbortSignal | undefined;
}

/** Answers of an adapter. */
export interface Taught {
  readonly supervision: Supervision;
  /** Numbers of the labels; none for language models. */
  readonly labels: string[];
  readonly train: readonly Row[];
  readonly judges: readonly Row[];
  /** True for questions that were made, not given. */
  readonly made: boolean;
  /** Questions ask for labels, the tokens of answers, or all tokens of texts. */
  readonly asked: "labels" | "answers" | "texts";
}

type Asked = Map<Row, AdapterAnswer>;

const LEAST_TEXTS = 8;
/** Questions of a step. */
export const BATCH = 8;
/** Batches that show how answers depend on coefficients, before any step. */
export const BATCHES_TO_SOLVE = 24;
/** Most questions that are made to learn from: more of them taught no more. */
const MOST_MADE = 1024;
/** Questions that are made to judge by. */
const MADE_TO_JUDGE = 128;

/**
 * Asks the adapter and turns its answers into targets.
 * @throws TaskError when the task has other labels than the adapter, or fewer than two
 */
export async function taughtBy(
  session: Session,
  adapter: Adapter,
  { id, blob, head }: Distillable,
  options: TeachOptions,
): Promise<Taught> {
  const asking = supervisionOf(session, options);
  const ask = { where: "distill", supervision: asking, signal: options.signal };
  const { steps = 240, batch = BATCH, holdout = 0.125, seed = 0 } = options;
  // Texts that no step would use are not asked.
  const most = Math.max(steps, BATCHES_TO_SOLVE) * batch;
  let [train, judges]: Asked[] = [];
  if (isGiven(options)) {
    const count = Math.max(LEAST_TEXTS, Math.ceil(most / (1 - holdout)));
    const some = shuffle([...questionsOf("distill", options)], uniform(seed)).slice(0, count);
    const rows = await asking.ask(some, "distill");
    const answers = await answersOf(session, adapter, head, rows, { ...ask, features: true });
    const held = Math.min(Math.max(2, Math.round(holdout * rows.length)), rows.length - 2);
    const part = (from: number, to?: number): Asked =>
      new Map(rows.slice(from, to).map((row) => [row, answers.get(row)!]));
    [judges, train] = [part(0, held), part(held)];
  } else {
    const words = wordsOf("distill", options.encode, [...session.pack.tasks.values(), adapter]);
    const made = (count: number, seed: number): Promise<Asked> =>
      madeUpQuestions(session, adapter, head, { words, count, random: uniform(seed) }, { ...ask, features: true });
    // Apart from each other, so that no line to judge by is crossed from one to learn from.
    train = await made(Math.min(most, MOST_MADE), seed);
    judges = await made(MADE_TO_JUDGE, seed + 1);
  }
  const [some] = train!.values();
  const last = headInputs(session.trainable!, head).find(({ out }) => out === undefined);
  const weight = adapter.saved.find(({ name }) => name === `${last?.module}.weight`);
  // A language model has none.
  const count = weight?.shape[0] ?? (asking.tokens ? 0 : some!.distributions[0]!.probabilities.length);
  if (count === 1) {
    const message = `task "${id}" cannot be distilled: the model gives one number for a text, and answers are compared by two labels at least`;
    throw new TaskError(message, { task: id });
  }
  const own = blob.parameters.find(({ name }) => name === `${last?.module}.weight`)?.shape[0];
  if (own !== undefined && own !== count) {
    throw new TaskError(`task "${id}" has ${own} labels, ${adapter.file} ${count}: it was not made of this adapter`, {
      task: id,
    });
  }
  const labels = Array.from({ length: count }, (_, i) => String(i));
  const supervision = asking.tokens ? asking : supervisionOf(session, { ...options, labels });
  const answered = (asked: Asked): Row[] =>
    [...asked].map(([row, { distributions, features }]) => ({ ...supervision.answered(row, distributions), features }));
  const made = !isGiven(options);
  const wholeTexts = made ? !templateOf(adapter.metadata) : options.texts !== undefined;
  const asked = !asking.tokens ? "labels" : wholeTexts ? "texts" : "answers";
  return { supervision, labels, train: answered(train!), judges: answered(judges!), made, asked };
}

function isGiven({ texts, feeds, examples }: TeachOptions): boolean {
  return (texts ?? feeds ?? examples) !== undefined;
}

/** Checks the questions, where there are some. @throws TypeError, RangeError when they are too few or empty */
export function checkQuestions(options: TeachOptions): void {
  if (options.encode !== undefined) checkTokenizer("distill: encode", options.encode);
  else if (!options.feeds) throw new TypeError("distill: texts need `encode`, a tokenizer");
  if (!isGiven(options)) return;
  const all = questionsOf("distill", options);
  if (all.length < LEAST_TEXTS)
    throw new RangeError(
      `distill: expected ${LEAST_TEXTS} texts at least, and some hundreds to gain by; got ${all.length}`,
    );
  const empty = all.findIndex(({ text }) => text?.trim() === "");
  if (empty >= 0) throw new RangeError(`distill: text ${empty} is empty`);
}
