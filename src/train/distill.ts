/**
 * Wins back what projecting an adapter onto a pack's components lost: coefficients are solved, then trained, until the
 * task answers plain text as the adapter itself does. No labels are needed. The adapter runs in the same session, its
 * own factors in the place of those that coefficients make.
 */

import { type Adapter, checkAdapter } from "../adapters/adapter.ts";
import type { Pack } from "../core/pack.ts";
import { parseTaskFile } from "../core/read-task-file.ts";
import { checkOptions, FormatError, TaskError } from "../errors.ts";
import { type BySide, gauged, memberPair, openModule, type Subspace } from "../extract/components.ts";
import { addScaled, backwardSolve, centred, cholesky, dot, forwardSolve } from "../extract/linalg.ts";
import { fastProducts } from "../extract/wasm-products.ts";
import { encodeTaskFile } from "../format/encode.ts";
import type { TaskBlob } from "../format/format.ts";
import { throwIfAborted } from "../pace.ts";
import { gaugeOf, storedModule } from "../pack/add.ts";
import { bisect } from "../pack/seek.ts";
import type { Session } from "../session/session.ts";
import type { AbortOptions } from "../source.ts";
import { isQuantized, sum } from "../tensor/dtypes.ts";
import { UnstorableError } from "../tensor/encode.ts";
import { uniform } from "../tensor/random.ts";
import { fromBase64, toBase64 } from "../text.ts";
import {
  adapterWeights,
  BATCH,
  BATCHES_TO_SOLVE,
  checkQuestions,
  type Distillable,
  type TeacherOutputs,
  type TeachOptions,
  teacherOutputs,
} from "./questions.ts";
import { type Distribution, drawnFrom, type Row, type Supervision, toBatches } from "./supervision.ts";
import { checkNumbers, checkSession } from "./trainable-model.ts";
import {
  type CreateTrainerOptions,
  type FitOptions,
  type FitRowsOptions,
  makeTrainer,
  type Trainer,
  type TrainingStep,
} from "./trainer.ts";

const OPTIONS = [
  ...(["adapter", "task", "texts", "encode", "feeds", "examples", "end", "decoderStart"] as const),
  ...(["batch", "steps", "temperature", "holdout", "seed"] as const),
  ...(["learningRates", "signal", "onStep"] as const),
] as const;

/**
 * Options of `distill`. Texts, feeds or examples: 8 at least, some hundreds are better. Default: texts of random words
 * from the tokenizer, which must list its vocabulary; the user's texts teach more.
 */
export interface DistillOptions extends TeachOptions {
  /**
   * Learning rates. Default for coefficients and head: 7 √divergence ÷ steps, at most 0.02; fewer than 240 steps count
   * as 240. Models that answer token by token: 0.3 √divergence ÷ steps. The divergence is measured before the first
   * step: its root estimates the error of the logits, and each of Adam's steps is about as long as the rate. A head
   * rate of 0 keeps the adapter's own head, and is the default where texts are made; a rate of 0 of `terms` keeps the
   * task's coefficients. Private terms: 0.3 × `terms`, token by token 2 ×. Layers of a head in front of the one with
   * the labels (`inner`): `head` divided by the number of inputs of the layer.
   */
  readonly learningRates?:
    | { readonly terms?: number; readonly privateTerms?: number; readonly head?: number; readonly inner?: number }
    | undefined;
  /** The adapter to imitate, as the readers of `eigenlora/build` give it. Stays open. */
  readonly adapter: Adapter;
  /** Id of the task made of the adapter. Default: the adapter's id. */
  readonly task?: string | undefined;
  /**
   * Divides the logits of adapter and task while training. Default: the temperature, at most 1, at which the adapter's
   * largest probability is 0.9 on average. Labels of an adapter that is never sure depend on differences that KL hardly
   * sees.
   */
  readonly temperature?: number | undefined;
  /** Called after each step. */
  readonly onStep?: ((step: TrainingStep) => void) | undefined;
}

/** Result of `distill`. */
export interface Distilled {
  readonly id: string;
  /** Task file with the better coefficients, in the number formats of the task. */
  readonly file: Uint8Array<ArrayBuffer>;
  /** Mean KL(adapter ‖ pack) in nats on the hold-out, with tasks as they are stored. */
  readonly divergenceBefore: number;
  readonly divergenceAfter: number;
  /**
   * The share of answers on the hold-out in which the task that is kept has the adapter's likeliest class, each counted
   * by how much likelier the adapter finds that than the second.
   */
  readonly agreement: number;
  readonly steps: number;
  /** Which coefficients the file holds: those that the pack had, or the solved and trained ones. */
  readonly kept: "projected" | "distilled";
}

/** Sessions with checked gradients: one graph trains all tasks of a session. */
const tested: WeakSet<Session> = new WeakSet();

/**
 * Total length of a coefficient's steps ÷ √divergence (nats). Labels: chosen on hold-outs of 12 tasks, whose best
 * values were within a factor of three. Tokens: chosen on hold-outs of two skills of a model with ten times the
 * modules; again between a third and three times.
 */
const WAY = { labels: 7, tokens: 0.3 };
const MOST_RATE = 0.02;
/**
 * Weight, relative to the divergence, of half the squared distance between features of task and adapter, as a share of
 * their variance. Features, the inputs of the head's last layer, say more about a line than labels do, above all about
 * random words. Of 0, 1, 5, 20, 100 and 200 by KL on test rows of eight tasks of own-seed and of hub; 100 and 200 were
 * no better, and 0 was the worst.
 */
const FEATURES = 20;
/** Variance ÷ square of the mean, below which features are alike. */
const ALIKE = 1e-6;
/**
 * Steps between two looks at questions held back, the share of the least divergence by which it must fall, and the
 * looks without such a gain that end training. Divergences of small sets rise and fall: of 15 tasks of hub and
 * own-seed, one look would have ended three that gained a fifth to a half later on.
 */
const CHECKED = 40;
const GAIN = 0.03;
const IDLE = 2;
/** Most questions of such a look: it costs a fifteenth of the steps. */
const LOOKED = 64;
/** The share of the divergence that solving must leave at most, to be kept where training has made it worse. */
const SOLVED = 0.9;
/**
 * The rate of private terms ÷ that of coefficients. Private terms have a number for each input and output, not for each
 * component. Labels: of 0.03, 0.1 and 0.3 the value with the least KL on hold-outs of three tasks. Tokens: a stored
 * integer changes only after half a step, which the rate of coefficients does not reach. On hold-outs of two skills 0.3
 * changed nothing; 1 to 2.6 and 1.7 to 4.3 left the least KL; twice as much did harm.
 */
const PRIVATE = { labels: 0.3, tokens: 2 };

/**
 * Least number of steps that the length of a step is computed with. Labels: longer steps leave more KL. Tokens have
 * farther to go: 80 shorter steps cost a skill of SmolLM2 6 points.
 */
const FEW_STEPS = { labels: 240, tokens: 1 };

/**
 * Distils one task of a session's pack. The session's task and its pack stay as they are. First, coefficients on column
 * components are solved so that the answers, rather than ΔW, lose least; they are used if they lose less on the texts
 * held back. On texts of the user's the head is trained too: it was trained on the adapter's features, which a few
 * components change slightly, and another head costs no bytes.
 * @param session created with `trainable: true`
 * @throws TaskError when the task is not in the pack, leaves it meanwhile, brings what cannot be trained, or has other
 *   labels than the adapter
 * @throws RangeError, TypeError for too few texts, and as `createTrainer` and `Trainer.fit`
 * @example
 * const { file, kept, divergenceBefore, divergenceAfter } = await distill(session, { adapter, texts, encode });
 * await session.addTask(`${adapter.id}, distilled`, file);
 */
export async function distill(session: Session, options: DistillOptions): Promise<Distilled> {
  checkSession("distill", session);
  checkOptions("distill", options, OPTIONS);
  checkAdapter("distill: adapter", options.adapter);
  checkNumbers("distill", options, { steps: "count", batch: "whole", holdout: "between" });
  const { adapter, task: id = adapter.id } = options;
  checkQuestions(options);
  const task = await distillable(session, id, options.signal);
  return distilTask(session, adapter, task, await teacherOutputs(session, adapter, task, options), options);
}

/** @throws TaskError when it is not in the pack, or brings what cannot be trained */
export async function distillable({ pack }: Session, id: string, signal?: AbortSignal): Promise<Distillable> {
  const entry = pack.tasks.get(id);
  const blob = await pack.load(id, { signal });
  return { id, entry: entry!, blob, head: trainableHead(pack, id, blob) };
}

/** Distils a task with what its adapter has answered. */
export async function distilTask(
  session: Session,
  adapter: Adapter,
  { id, entry, blob, head }: Distillable,
  { supervision, labels, train, holdout, synthetic }: TeacherOutputs,
  options: Omit<DistillOptions, "adapter" | "task">,
): Promise<Distilled> {
  const { steps = 240, batch = BATCH, seed = 0, signal } = options;
  const { pack } = session;
  const modules = blob.terms.map(({ module }) => pack.modules[module]!.name);
  const how: CreateTrainerOptions = { labels, init: { task: id }, modules, seed, head };
  const trainer = await makeTrainer(session, how, supervision);
  await trainer.begin(id);
  const before = await trainer.compare(holdout);
  const { A, B, ownA, ownBt, privateA } = blob.terms[0]!;
  const coefficients = (A?.tensor ?? B?.tensor ?? ownA ?? ownBt ?? privateA!).dtype;
  const stored = blob.parameters.find(({ shape }) => shape.length > 1)?.tensor.dtype;
  const dtype = { coefficients, head: stored ?? coefficients };
  const stepped = trainer.stepsOf(blob);
  const student: Student = { trainer, holdout, asStored: () => trainer.taskFile({ id, dtype, stored: stepped }) };
  const random = uniform(seed);
  const batches = toBatches(train, batch, await supervision.lengths(train), random).slice(0, BATCHES_TO_SOLVE);
  const fixed = options.learningRates?.terms === 0;
  const solved = fixed
    ? undefined
    : await solvedCoefficients(session, adapter, { blob, head }, batches, { supervision, signal, random });
  const start = await betterStart(student, id, before.mean, solved);
  const begun = student.asStored();
  // Tokens have no head, whose outputs could be divided.
  const sure = head.length > 0 && !supervision.tokens ? sureTemperature([...train, ...holdout]) : 1;
  const { temperature = sure } = options;
  const fit: FitRowsOptions = {
    ...{ steps, batch, temperature, signal },
    learningRates: ratesOf(supervision.tokens ? "tokens" : "labels", start, steps, synthetic, options.learningRates),
    dtype: isQuantized(coefficients) ? dtype : undefined,
    ...{ stored: stepped, tested: tested.has(session), featureWeight: featureWeight(train) },
  };
  const softened = ({ probabilities }: Distribution): Distribution => ({
    probabilities: tempered(probabilities, temperature),
  });
  const rows = supervision.tokens ? train : train.map((row): Row => ({ ...row, wanted: row.wanted.map(softened) }));
  const { fitted, taken } = await fitWhileItGains(student, rows, fit, options.onStep);
  if (taken > 0) tested.add(session);
  let best = fitted;
  // Judged as stored: number formats of few bits may cost more than training gains.
  await trainer.begin(best);
  let after = await trainer.compare(holdout);
  // Few steps may lose what solving has won.
  if (after.mean > start && start < SOLVED * before.mean) {
    best = begun;
    await trainer.begin(best);
    after = await trainer.compare(holdout);
  }
  const better = after.mean < before.mean;
  const kept = better ? parseTaskFile(best, "the distilled task").blob : await pack.stored(id);
  if (pack.tasks.get(id)?.metadata !== entry.metadata)
    throw new TaskError(`task "${id}" was removed or replaced while it was distilled`, { task: id });
  const file = encodeTaskFile(entry, pack.basisId, kept);
  const { agreement } = better ? after : before;
  const figures = { divergenceBefore: before.mean, divergenceAfter: after.mean, agreement };
  return { id, file, ...figures, steps: taken, kept: better ? "distilled" : "projected" };
}

interface Student {
  readonly trainer: Trainer;
  readonly holdout: readonly Row[];
  /** Its file, in the number formats and steps of the pack's task. */
  asStored(): Uint8Array<ArrayBuffer>;
}

/**
 * Trains until steps no longer bring answers to questions that were held back closer to the adapter's.
 * @returns the closest task, and the number of steps that were taken
 */
async function fitWhileItGains(
  { trainer, holdout, asStored }: Student,
  rows: readonly Row[],
  fit: FitRowsOptions,
  onStep: DistillOptions["onStep"],
): Promise<{ readonly fitted: Uint8Array<ArrayBuffer>; readonly taken: number }> {
  let fitted = asStored();
  let taken = 0;
  if (fit.steps === 0) return { fitted, taken };
  const sample = holdout.filter((_, i) => i % Math.ceil(holdout.length / LOOKED) === 0);
  let least = Infinity;
  let idle = 0;
  for await (const step of trainer.fitRows(rows, fit)) {
    onStep?.(step);
    taken = step.step;
    if (taken % CHECKED !== 0 && taken < fit.steps!) continue;
    // Rounded, since coarse steps train numbers that answer well once they are stored.
    const { mean } = await trainer.compare(sample, fit);
    idle = mean > (1 - GAIN) * least ? idle + 1 : 0;
    if (mean < least) {
      least = mean;
      fitted = asStored();
    }
    if (idle === IDLE) break;
  }
  return { fitted, taken };
}

/** The probabilities of the same logits divided by a temperature. */
function tempered(probabilities: ArrayLike<number>, temperature: number): number[] {
  const values = Array.from(probabilities);
  const top = Math.max(...values);
  const powers = values.map((p) => (p / top) ** (1 / temperature));
  const total = sum(powers);
  return powers.map((value) => value / total);
}

const SURE = 0.9;
const COLDEST = 0.05;

/** The temperature at which the mean of the adapter's largest probabilities is 0.9; from 0.05 to 1. */
function sureTemperature(rows: readonly Row[]): number {
  const answers = rows.map(({ wanted }) => wanted[0]!.probabilities);
  const isUnsure = (temperature: number): boolean =>
    sum(answers, (answer) => Math.max(...tempered(answer, temperature))) < SURE * answers.length;
  return isUnsure(1) ? bisect(COLDEST, 1, isUnsure) : 1;
}

/**
 * Weight of half the squared distance of features, from how far those of the rows lie apart; 0 where they are alike.
 */
function featureWeight(rows: readonly Row[]): number {
  const all = rows.flatMap(({ features }) => features ?? []);
  const mean = new Float64Array(all[0]?.length ?? 0);
  for (const features of all) features.forEach((value, i) => (mean[i]! += value / all.length));
  const size = sum(mean, (value) => value * value);
  let variance = 0;
  for (const features of all) features.forEach((value, i) => (variance += (value - mean[i]!) ** 2 / all.length));
  return variance > ALIKE * size ? FEATURES / variance : 0;
}

function ratesOf(
  kind: "labels" | "tokens",
  divergence: number,
  steps: number,
  synthetic: boolean,
  given: DistillOptions["learningRates"] = {},
): FitOptions["learningRates"] {
  const rate = Math.min(MOST_RATE, (WAY[kind] * Math.sqrt(divergence)) / Math.max(steps, FEW_STEPS[kind]));
  const { terms = rate } = given;
  // Random words help a head no more than they harm it: untrained it answers as well, in fewer bytes.
  return { terms, privateTerms: PRIVATE[kind] * terms, head: synthetic ? 0 : rate, ...given };
}

/**
 * Lets the trainer begin with the solved coefficients if, once stored, they lose less of the answers.
 * @param task that the trainer has begun with; its divergence is `before`
 * @returns the divergence to begin with
 */
async function betterStart(
  { trainer, holdout, asStored }: Student,
  task: string,
  before: number,
  solved: Awaited<ReturnType<typeof solvedCoefficients>> | undefined,
): Promise<number> {
  if (!solved?.size) return before;
  for (const [module, { A, B }] of solved) {
    trainer.place(module, "alphaA", A);
    trainer.place(module, "alphaB", B);
  }
  try {
    await trainer.begin(asStored());
    const after = (await trainer.compare(holdout)).mean;
    if (after < before) return after;
  } catch (error) {
    if (!(error instanceof UnstorableError)) throw error;
  }
  await trainer.begin(task);
  return before;
}

/**
 * Names of the head's layers that the task brings.
 * @throws TaskError when training would leave out some of what the task does
 */
function trainableHead(pack: Pack, id: string, { terms, parameters }: TaskBlob): string[] {
  const refuse = (why: string): TaskError => new TaskError(`task "${id}" cannot be distilled: ${why}`, { task: id });
  if (terms.length === 0) throw refuse("it has no terms");
  const hasRows = terms.some(({ privateRank, ownA, ownBt }) => privateRank > 0 || ownA || ownBt);
  if (hasRows && pack.directory.basis.step === undefined)
    throw refuse("it has residual rows, which keep their bytes in packs with a `step` alone");
  for (const { module, magnitude, ...term } of terms) {
    const { name, ...bases } = pack.modules[module]!;
    if (magnitude) throw refuse(`it brings a DoRA magnitude of "${name}"`);
    for (const side of ["A", "B"] as const) {
      const coefficients = term[side];
      if (!coefficients) continue;
      const basis = bases[side][coefficients.basis]!;
      if (coefficients.mean !== basis.mean) throw refuse(`it leaves out the mean of "${name}"`);
      if (basis.kind !== "column") throw refuse(`"${name}" has no column basis`);
    }
  }
  const saved = parameters.filter(({ role }) => role === "saved");
  const weights = saved.filter(({ name, shape }) => shape.length === 2 && name.endsWith(".weight"));
  const head = weights.map(({ name }) => name.slice(0, -".weight".length));
  const isBias = (name: string): boolean => head.some((module) => name === `${module}.bias`);
  const other = parameters.find((one) => !weights.includes(one) && !(one.role === "saved" && isBias(one.name)));
  if (other) throw refuse(`it brings "${other.name}" (${other.role}), and only coefficients and heads can be trained`);
  const lone = weights.find(({ shape }) => shape[0]! < 2);
  if (lone) throw refuse(`"${lone.name}" gives one number for a text, and answers are compared by two labels at least`);
  const bare = head.find((module) => !saved.some(({ name }) => name === `${module}.bias`));
  if (bare !== undefined) throw refuse(`its head "${bare}" has no bias`);
  return head;
}

// Outcomes that are kept, so that a call which was stopped goes on.

/** Finished outcomes as JSON, by key. */
export interface FinishedOutcomes {
  /** @returns undefined for what was never written */
  read(key: string): Promise<string | undefined>;
  write(key: string, json: string): Promise<void>;
  /** Names an entry in messages: the path of its file. Default: the key. */
  nameOf?(key: string): string;
}

/** Outcome of a task, with its task file. */
type Kept = Pick<Distilled, "id" | "file"> & { readonly kept: string };

export function finishedText({ file, ...figures }: Kept): string {
  return JSON.stringify({ ...figures, file: toBase64(file) });
}

/**
 * Reads an outcome that `finishedText` wrote; undefined where there is none.
 * @throws FormatError where it is damaged
 */
export async function readFinished<T extends Kept>(finished: FinishedOutcomes, key: string): Promise<T | undefined> {
  const json = await finished.read(key);
  if (json === undefined) return undefined;
  const name = finished.nameOf?.(key) ?? key;
  try {
    const { file, ...figures } = JSON.parse(json) as Omit<T, "file"> & { readonly file: string };
    const task = fromBase64(file);
    if (parseTaskFile(task, name).id !== figures.id) throw new TypeError("it is of another task");
    return { ...figures, file: task } as unknown as T;
  } catch (cause) {
    const message = `is damaged: delete it, and the task is distilled again (${(cause as Error).message})`;
    throw new FormatError(message, { file: name, part: "finished task", cause });
  }
}

// Solves for the coefficients from which distilling begins. A pack's own coefficients minimise the error of ΔW; these
// minimise the change of the task's answers, to second order. An error e of a row costs e·F·eᵀ, where F is the
// curvature of KL (Fisher's information). F is estimated from gradients at the adapter itself, for labels drawn from
// its own answers; there is one F for each side of a module, as in K-FAC (J. Martens, R. Grosse, 2015). Each row is
// then a least squares problem: no steps, and no matrix of the size of F in memory.

/**
 * Least curvature of every direction, as a share of the mean curvature: sample texts never cover all that a model will
 * see.
 */
const DAMPING = 0.1;

interface LeastSquares {
  /** @param gradient [_, width] of rows */
  add(gradient: Float32Array): void;
  /** Coefficients [count, K]. */
  solve(): Float64Array;
}

/** @param rows [count, width], the adapter's */
function leastSquares(space: Subspace, rows: Float64Array, count: number): LeastSquares {
  const { components: K, width, vectors, mean, products } = space;
  const { gram, multiplyTransposed } = products;
  const x = centred(rows, count, width, mean);
  /** Σ (E·gᵀ)(E·gᵀ)ᵀ [K, K], Σ (x·gᵀ)(E·gᵀ)ᵀ [count, K], and Σ |g|². */
  const left = new Float64Array(K * K);
  const right = new Float64Array(count * K);
  let trace = 0;
  return {
    add(gradient) {
      const g = Float64Array.from(gradient);
      const rank = g.length / width;
      const ofE = multiplyTransposed(vectors, g, K, rank, width);
      const ofX = multiplyTransposed(x, g, count, rank, width);
      addScaled(1, gram(ofE, K, rank), 0, left, 0, left.length);
      addScaled(1, multiplyTransposed(ofX, ofE, count, K, rank), 0, right, 0, right.length);
      trace += dot(g, 0, g, 0, g.length);
    },
    solve() {
      // The mean curvature is 1.
      const scale = trace > 0 ? width / trace : 0;
      const even = gram(vectors, K, width);
      const damped = even.map((value, i) => DAMPING * value + scale * left[i]!);
      const factor = cholesky(damped, K);
      const along = multiplyTransposed(x, vectors, count, K, width);
      const alpha = along.map((value, i) => DAMPING * value + scale * right[i]!);
      forwardSolve(factor, K, alpha, count);
      backwardSolve(factor, K, K, alpha, count);
      return alpha;
    },
  };
}

/**
 * Finds coefficients that change the adapter's answers least, by module name: those of A, and of B. Modules with
 * residual rows are left out.
 * @param batches questions with the adapter's answers
 */
async function solvedCoefficients(
  session: Session,
  adapter: Adapter,
  { blob, head }: Pick<Distillable, "blob" | "head">,
  batches: readonly (readonly Row[])[],
  { supervision, signal, random }: AbortOptions & { readonly supervision: Supervision; readonly random: () => number },
): Promise<Map<string, BySide<Float64Array>>> {
  const problems = await problemsOf(session, adapter, blob);
  if (problems.size === 0) return new Map();
  const { model, weights } = await adapterWeights(session, adapter, head);
  for (const rows of batches) {
    throwIfAborted(signal);
    const drawn = rows.map((row) => ({ ...row, wanted: row.wanted.map((answer) => drawnFrom(answer, random)) }));
    for (const { rows: run, targets } of supervision.microBatches(drawn)) {
      const { gradients } = await model.step(await supervision.feeds(run), weights, targets);
      for (const [module, { A, B }] of problems) {
        const gradient = gradients.terms.get(module)!;
        A.add(gradient.A);
        B.add(gradient.Bt);
      }
    }
  }
  const solved = [...problems].map(([module, { A, B }]) => [module, { A: A.solve(), B: B.solve() }] as const);
  // Answers that are not finite give no information.
  return new Map(solved.filter(([, { A, B }]) => [...A, ...B].every(Number.isFinite)));
}

async function problemsOf(
  { pack }: Session,
  adapter: Adapter,
  { terms }: TaskBlob,
): Promise<Map<string, BySide<LeastSquares>>> {
  const bases = await pack.bases();
  const products = await fastProducts();
  const problems = new Map<string, BySide<LeastSquares>>();
  try {
    for (const { module: index, rank, privateRank, A, B, ownA, ownBt } of terms) {
      const stored = pack.modules[index]!;
      const module = adapter.modules.get(stored.name);
      if (!A || !B || ownA || ownBt || privateRank > 0 || !module) continue;
      const shared = { ...stored, A: [stored.A[A.basis]!], B: [stored.B[B.basis]!] };
      const space = openModule(storedModule(shared, bases.bytes, adapter), products);
      const { rank: most, step } = pack.directory.basis;
      const how = { gauge: gaugeOf(pack), rank: most, coefficientDtype: A.tensor.dtype, step };
      const pair = gauged(memberPair({ id: adapter.id, ...(await module.read()) }, stored.out, stored.in), space, how);
      if (Math.min(rank, pair.rank) < rank) continue;
      problems.set(stored.name, {
        A: leastSquares(space.A, pair.A, rank),
        B: leastSquares(space.B, pair.Bt, rank),
      });
    }
  } finally {
    bases.close();
  }
  return problems;
}
