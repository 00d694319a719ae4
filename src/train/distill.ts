/**
 * What projecting an adapter onto a pack's components lost, won back by solving and training the task's coefficients
 * until the pack answers plain text as the adapter itself does. No labels are needed. The adapter runs in the same session, its
 * own factors in the place of those that coefficients make.
 */

import type { Adapter } from "../adapters/adapter.ts";
import { checkAdapter } from "../adapters/modules.ts";
import { checkOptions } from "../arguments.ts";
import { TaskError } from "../errors.ts";
import { encodeTaskFile } from "../format/encode.ts";
import { sharedBases, type TaskBlob } from "../format/format.ts";
import { parseTaskFile } from "../format/task-file.ts";
import type { Pack } from "../pack/pack.ts";
import type { Session } from "../session/session.ts";
import { isQuantized } from "../tensor/dtypes.ts";
import { UnstorableError } from "../tensor/encode.ts";
import { shuffle, uniform } from "../tensor/random.ts";
import { answersOf, type Questions, questionsOf } from "./answers.ts";
import type { BatchFeeds } from "./batch.ts";
import { solvedCoefficients } from "./curvature.ts";
import { type Example, type Row, toBatches } from "./examples.ts";
import type { Encode } from "./inputs.ts";
import { type CreateTrainerOptions, lessonsOf, makeTrainer } from "./learn.ts";
import type { Lessons } from "./lessons.ts";
import { checkNumbers, checkSession } from "./limits.ts";
import { headInputs } from "./machine.ts";
import { sureTemperature, tempered } from "./probabilities.ts";
import type { SequenceOptions } from "./sequences.ts";
import type { Stepped } from "./steps.ts";
import type { FitOptions, Tested, Trainer, TrainingStep } from "./trainer.ts";

const OPTIONS = [
  ...(["adapter", "task", "texts", "encode", "feeds", "examples", "end", "decoderStart"] as const),
  ...(["batch", "steps", "temperature", "holdout", "seed"] as const),
  ...(["learningRates", "weightDecay", "clip", "warmup", "decay", "signal", "onStep"] as const),
] as const;

/** Options of `distill`. Of texts, feeds or examples 8 are needed at least, better some hundreds. */
export interface DistillOptions
  extends Pick<FitOptions, "weightDecay" | "clip" | "warmup" | "decay" | "signal">,
    Questions,
    SequenceOptions {
  /**
   * Of coefficients and head. Default: both are 7 √divergence ÷ steps, counted as 240 at least, and 0.02 at most (of models that answer
   * token by token: 0.3 √divergence ÷ steps, as many as there are), of the divergence that is left when the steps begin: its root is about
   * how far the logits are off, and Adam's steps are as long as its rate, however short the way is. A head rate of 0 keeps the adapter's
   * own head, a rate of 0 of `terms` the task's coefficients. Of private terms: 0.3 × `terms`, token by token 2 ×. Of a head's layers in
   * front of that with the labels (`inner`): `head` divided by how many numbers enter the layer.
   */
  readonly learningRates?:
    | { readonly terms?: number; readonly privateTerms?: number; readonly head?: number; readonly inner?: number }
    | undefined;
  /** The adapter whose answers count, as the readers of `eigenlora/build` give it. Stays open. */
  readonly adapter: Adapter;
  /** The task that was made of it. Default: the one of its id. */
  readonly task?: string | undefined;
  /** Texts as the model's inputs, one row each: a tokenizer. */
  readonly encode?: Encode | undefined;
  /** Texts of a step. Default: 8. Many small steps gain more than few large ones. */
  readonly batch?: number | undefined;
  /** Default: 240. 0: coefficients are solved once, and nothing is trained. */
  readonly steps?: number | undefined;
  /**
   * What the logits of both are divided by while training. Default: one, 1 at most, at which the adapter's largest probability is 0.9
   * on average: of an adapter that is never sure, labels are decided by differences that KL hardly sees.
   */
  readonly temperature?: number | undefined;
  /** Share of the texts that nothing is learned from, to judge by. Default: an eighth. */
  readonly holdout?: number | undefined;
  /** Default: 0. */
  readonly seed?: number | undefined;
  /** Called after each step. */
  readonly onStep?: ((step: TrainingStep) => void) | undefined;
}

/** A task after distilling. */
export interface Distilled {
  readonly id: string;
  /** Task file with the better coefficients, of the number formats that the task had. */
  readonly file: Uint8Array<ArrayBuffer>;
  /** Mean KL(adapter ‖ pack) in nats on the hold-out, of tasks as they are stored. */
  readonly divergenceBefore: number;
  readonly divergenceAfter: number;
  readonly steps: number;
  /** Which coefficients the file has: those that came, or those that were solved and trained. */
  readonly kept: "projected" | "distilled";
}

const LEAST_TEXTS = 8;
/** Whose gradients were held against the loss: all tasks of a session are trained by one graph. */
const tested: WeakSet<Session> = new WeakSet();

/**
 * How far all steps of one coefficient go for each root of a nat. Of labels: chosen by hold-outs of 12 tasks, whose own best lay between a
 * third and three times of it. Of tokens: by hold-outs of two skills of a model with ten times the modules, between a third and three times too.
 */
const WAY = { labels: 7, tokens: 0.3 };
const MOST_RATE = 0.02;
/**
 * The rate of private terms ÷ that of coefficients: they have a number for each input and output, not for each component. Of labels:
 * of 0.03, 0.1 and 0.3 the one with the least KL on hold-outs of three tasks. Of tokens: stored integers must move by half a step to
 * change at all, for which the way of coefficients is too short. On hold-outs of two skills 0.3 changed nothing, 1 to 2.6 and 1.7 to 4.3
 * left the least KL, and twice as much did harm.
 */
const PRIVATE = { labels: 0.3, tokens: 2 };

/**
 * Of labels: with fewer steps each is as long as with so many, since longer ones leave more KL. Tokens have farther to go: 80 shorter steps
 * cost a skill of SmolLM2 6 points.
 */
const FEW_STEPS = { labels: 240, tokens: 1 };
/** Batches that show where answers depend on coefficients, before any step. */
const BATCHES_TO_SOLVE = 24;

/**
 * Distils one task of a session's pack. The session's task and its pack stay as they are. Before any step, coefficients on column
 * components are solved to lose least of the answers instead of ΔW, and taken where they do on the texts held back. The head is trained
 * too: what a few components make of a text is not quite what the adapter's head was trained on, and another head costs no bytes.
 * @param session made with `trainable: true`
 * @throws TaskError when the task is not in the pack, leaves it meanwhile, brings what cannot be trained, or has other labels than the adapter
 * @throws RangeError, TypeError for too few texts, and as `createTrainer` and `Trainer.fit`
 * @example
 * const { file, kept, divergenceBefore, divergenceAfter } = await distill(session, { adapter, texts, encode });
 * await session.addTask(`${adapter.id}, distilled`, file);
 */
export async function distill(session: Session, options: DistillOptions): Promise<Distilled> {
  checkSession("distill", session);
  checkOptions("distill", options, OPTIONS);
  checkAdapter("distill: adapter", options.adapter);
  const { adapter, task: id = adapter.id, steps = 240, batch = 8, holdout = 0.125, seed = 0, signal } = options;
  const all = checkedQuestions(options);
  checkNumbers("distill", options, { steps: "count", batch: "whole", holdout: "between" });
  const { pack } = session;
  const entry = pack.tasks.get(id);
  const blob = await pack.load(id, { signal });
  const head = trainableHead(pack, id, blob);
  // The adapter is not asked what no step would see.
  const seen = Math.max(steps, BATCHES_TO_SOLVE) * batch;
  const most = Math.max(LEAST_TEXTS, Math.ceil(seen / (1 - holdout)));
  const some = shuffle([...all], uniform(seed)).slice(0, most);
  const { lessons, labels, taught } = await taughtBy(session, adapter, id, head, some, options);
  const held = Math.min(Math.max(2, Math.round(holdout * taught.length)), taught.length - 2);
  const [judges, train] = [taught.slice(0, held), taught.slice(held)];

  const modules = blob.terms.map(({ module }) => pack.modules[module]!.name);
  const how: CreateTrainerOptions = { labels, init: { task: id }, modules, seed, head };
  const trainer = await makeTrainer(session, how, lessons);
  await trainer.begin(id);
  const divergenceBefore = await trainer.divergence(judges);
  const coefficients = (blob.terms[0]!.A?.tensor ?? blob.terms[0]!.privateA!).dtype;
  const stored = blob.parameters.find(({ shape }) => shape.length > 1)?.tensor.dtype;
  const dtype = { coefficients, head: stored ?? coefficients };
  const stepped = trainer.stepsOf(blob);
  const asStored = () => trainer.taskFile({ id, dtype, stored: stepped });
  const random = uniform(seed);
  const batches = toBatches(train, batch, await lessons.lengths(train), random).slice(0, BATCHES_TO_SOLVE);
  const ask = { where: "distill", lessons, signal, random };
  const fixed = options.learningRates?.terms === 0;
  const solved = fixed ? undefined : await solvedCoefficients(session, adapter, { blob, head }, batches, ask);
  const start = await betterStart(trainer, id, solved, { judges, before: divergenceBefore, asStored });
  const sure = head.length > 0 ? sureTemperature(taught.map(({ target }) => Float32Array.from(target!))) : 1;
  const { temperature = sure, weightDecay, clip, warmup, decay } = options;
  const fit: FitOptions & Stepped & Tested = {
    ...{ steps, batch, temperature, weightDecay, clip, warmup, decay, signal },
    learningRates: ratesOf(lessons.tokens, start, steps, options.learningRates),
    dtype: isQuantized(coefficients) ? dtype : undefined,
    stored: stepped,
    tested: tested.has(session),
  };
  const softened = (row: Row<BatchFeeds>) => ({ ...row, target: tempered(row.target!, temperature) });
  const lessonRows = lessons.tokens ? train : train.map(softened);
  for await (const step of steps > 0 ? trainer.fitRows(lessonRows, fit) : []) options.onStep?.(step);
  if (steps > 0) tested.add(session);
  const trained = asStored();
  // As it is stored, since number formats of few bits may cost more than training gains.
  await trainer.begin(trained);
  const divergenceAfter = await trainer.divergence(judges);
  const better = divergenceAfter < divergenceBefore;
  const kept = better ? parseTaskFile(trained, "the distilled task").blob : await pack.stored(id);
  if (pack.tasks.get(id)?.metadata !== entry!.metadata)
    throw new TaskError(`task "${id}" was removed or replaced while it was distilled`, { task: id });
  const file = encodeTaskFile(entry!, pack.basisId, kept);
  return { id, file, divergenceBefore, divergenceAfter, steps, kept: better ? "distilled" : "projected" };
}

/** Learning rates. @param divergence when the steps begin */
function ratesOf(
  tokens: boolean,
  divergence: number,
  steps: number,
  given: DistillOptions["learningRates"] = {},
): FitOptions["learningRates"] {
  const kind = tokens ? "tokens" : "labels";
  const rate = Math.min(MOST_RATE, (WAY[kind] * Math.sqrt(divergence)) / Math.max(steps, FEW_STEPS[kind]));
  const { terms = rate } = given;
  return { terms, privateTerms: PRIVATE[kind] * terms, head: rate, ...given };
}

/**
 * Lets the trainer begin with solved coefficients where they lose less of the answers, as they will be stored.
 * @param task that it has begun with, whose divergence is `before`
 * @returns the divergence to begin with
 */
async function betterStart(
  trainer: Trainer<BatchFeeds>,
  task: string,
  solved: Awaited<ReturnType<typeof solvedCoefficients>> | undefined,
  {
    judges,
    before,
    asStored,
  }: { judges: readonly Row<BatchFeeds>[]; before: number; asStored: () => Uint8Array<ArrayBuffer> },
): Promise<number> {
  if (!solved?.size) return before;
  for (const [module, { alphaA, alphaB }] of solved) {
    trainer.place(module, "alphaA", alphaA);
    trainer.place(module, "alphaB", alphaB);
  }
  try {
    await trainer.begin(asStored());
    const after = await trainer.divergence(judges);
    if (after < before) return after;
  } catch (error) {
    if (!(error instanceof UnstorableError)) throw error;
  }
  await trainer.begin(task);
  return before;
}

/**
 * What the adapter answers, as what is to be learned.
 * @throws TaskError when the task has other labels than the adapter
 */
async function taughtBy(
  session: Session,
  adapter: Adapter,
  id: string,
  head: readonly string[],
  examples: readonly Example<BatchFeeds>[],
  options: DistillOptions,
): Promise<{ lessons: Lessons<BatchFeeds>; labels: string[]; taught: Row<BatchFeeds>[] }> {
  const asking = lessonsOf(session, options);
  const rows = await asking.ask(examples, "distill");
  const ask = { where: "distill", lessons: asking, signal: options.signal };
  const answers = await answersOf(session, adapter, head, rows, ask);
  const count = asking.tokens ? 0 : answers.get(rows[0]!)![0]!.probabilities.length;
  const last = headInputs(session.trainable!, head).find(({ out }) => out === undefined);
  const own = (await session.pack.load(id)).parameters.find(({ name }) => name === `${last?.module}.weight`)?.shape[0];
  if (own !== undefined && own !== count) {
    throw new TaskError(`task "${id}" has ${own} labels, ${adapter.file} ${count}: it was not made of this adapter`, {
      task: id,
    });
  }
  const labels = Array.from({ length: count }, (_, i) => String(i));
  const lessons = asking.tokens ? asking : lessonsOf(session, { ...options, labels });
  return { lessons, labels, taught: rows.map((row) => lessons.answered(row, answers.get(row)!)) };
}

/** What the adapter is asked. @throws TypeError, RangeError when it is too little to learn from */
function checkedQuestions(options: DistillOptions): readonly Example<BatchFeeds>[] {
  const all = questionsOf("distill", options);
  if (!options.feeds && !options.encode) throw new TypeError("distill: texts need `encode`, a tokenizer");
  if (all.length < LEAST_TEXTS)
    throw new RangeError(
      `distill: expected ${LEAST_TEXTS} texts at least, and some hundreds to gain by; got ${all.length}`,
    );
  const empty = all.findIndex(({ text }) => text?.trim() === "");
  if (empty >= 0) throw new RangeError(`distill: text ${empty} is empty`);
  return all;
}

/**
 * Names of the head's layers that the task brings.
 * @throws TaskError when training would leave out some of what the task does
 */
function trainableHead(pack: Pack, id: string, { terms, parameters }: TaskBlob): string[] {
  const refuse = (why: string): TaskError => new TaskError(`task "${id}" cannot be distilled: ${why}`, { task: id });
  if (terms.length === 0) throw refuse("it has no terms");
  if (terms.some(({ privateRank }) => privateRank > 0) && pack.directory.basis.step === undefined)
    throw refuse("it has private terms, which keep their bytes in packs with a step alone: pack with --step");
  for (const { module, A, B, ownA, ownBt, magnitude } of terms) {
    const { name } = pack.modules[module]!;
    const { A: basisA, B: basisB } = sharedBases(pack.modules[module]!) ?? {};
    if (magnitude) throw refuse(`it brings a DoRA magnitude of "${name}"`);
    if (ownA || ownBt) throw refuse(`it has rows of its own beside components of "${name}"`);
    if (basisA && !A) throw refuse(`it has private terms alone on "${name}", which has components`);
    if (!A || !B) continue;
    if (A.mean !== basisA?.mean || B.mean !== basisB?.mean) throw refuse(`it leaves out the mean of "${name}"`);
    if (basisA?.kind !== "column" || basisB?.kind !== "column") throw refuse(`"${name}" has no column basis`);
  }
  const saved = parameters.filter(({ role }) => role === "saved");
  const weights = saved.filter(({ name, shape }) => shape.length === 2 && name.endsWith(".weight"));
  const head = weights.map(({ name }) => name.slice(0, -".weight".length));
  const isBias = (name: string): boolean => head.some((module) => name === `${module}.bias`);
  const other = parameters.find((one) => !weights.includes(one) && !(one.role === "saved" && isBias(one.name)));
  if (other) throw refuse(`it brings "${other.name}" (${other.role}), beside coefficients only heads can be trained`);
  const bare = head.find((module) => !saved.some(({ name }) => name === `${module}.bias`));
  if (bare !== undefined) throw refuse(`its head "${bare}" has no bias`);
  return head;
}
