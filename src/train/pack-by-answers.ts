/**
 * The smallest pack whose tasks still answer as their adapters do, with nothing asked of the user: components that all
 * tasks share, each task distilled onto them, its answers compared on questions that were held back. Sizes are tried on
 * a few tasks, and of a language model also packs whose tasks share no components. A task that does not agree enough is
 * stored closer to its adapter. Where bytes are given, they decide the size. Input and seed decide all; a clock only
 * where the caller sets `minutes`.
 */

import { type Adapter, checkAdapters, sharedModules } from "../adapters/adapter.ts";
import type { WeightHost } from "../core/base.ts";
import { openPack, type Pack } from "../core/pack.ts";
import { taskIn } from "../core/read-task-file.ts";
import {
  AdapterError,
  BackendError,
  BaseMismatchError,
  checkArgument,
  checkOptions,
  checkPack,
  TaskError,
} from "../errors.ts";
import { encodeTaskFile, placeOf, type TaskToWrite } from "../format/encode.ts";
import { readModel } from "../onnx/read.ts";
import { onnxHost } from "../onnx/weights.ts";
import { projectAdapters, storedDtypes } from "../pack/add.ts";
import { type Built, buildPack, readFingerprints, renamedHost } from "../pack/build.ts";
import { taskAdapter } from "../pack/expand.ts";
import type { BuildOptions } from "../pack/recipe.ts";
import type { BuildReport } from "../pack/report.ts";
import { searchPack, spread } from "../pack/search.ts";
import { search, tooFew, Unreachable, withinBytes } from "../pack/seek.ts";
import { DEFAULT_ERROR } from "../pack/tasks.ts";
import { allOf, freshPack, storedTask } from "../pack/write.ts";
import type { Engine } from "../session/engine.ts";
import { createSession, type Session } from "../session/session.ts";
import type { SourceInput } from "../source.ts";
import type { OnWork } from "../work.ts";
import { distillable, distilTask, type FinishedOutcomes, finishedText, readFinished } from "./distill.ts";
import { answers } from "./objective.ts";
import {
  adapterWeights,
  checkQuestions,
  type Distillable,
  type TeacherOutputs,
  type TeachOptions,
  teacherOutputs,
  templateOf,
} from "./questions.ts";
import { MeanDivergence } from "./supervision.ts";
import { checkNumbers } from "./trainable-model.ts";
import type { TrainingStep } from "./trainer.ts";

/** Options of `packByAnswers`. Without texts or examples, questions are made of the tokenizer's words. */
export interface ByAnswersOptions
  extends Omit<TeachOptions, "feeds" | "batch" | "holdout">,
    Pick<BuildOptions, "base" | "anyBase" | "workers"> {
  /** Stay open. */
  readonly adapters: readonly Adapter[];
  /** Names of weights, or of their initializers in the model, by module name, for weights that are not found. */
  readonly names?: ReadonlyMap<string, string> | undefined;
  /**
   * The least agreement of a task with its adapter: the share of held-back answers with the same likeliest class,
   * weighted by the adapter's margin over the second class. Default: 0.96 of labels, 0.98 of a language model's
   * answers, 0.99 of all tokens of texts.
   */
  readonly agreement?: number | undefined;
  /**
   * Most bytes of the pack, which is then the one whose tasks agree most; instead of `agreement`. Not for
   * `tasksByAnswers`.
   */
  readonly bytes?: number | undefined;
  /**
   * Most training steps of a task; they end earlier where the answers held back gain no more. Default: 240 of labels,
   * 24 token by token.
   */
  readonly steps?: number | undefined;
  /**
   * Minutes after which no further task is begun. Those left are stored as without a model, and the report says so.
   * Default: no limit.
   */
  readonly minutes?: number | undefined;
  /** Called after each training step of a task, with the steps of all tasks. */
  readonly onProgress?: OnWork | undefined;
  /**
   * Store of finished tasks, so that a stopped call can resume. Keys cover everything that they depend on but the model
   * and questions.
   */
  readonly finished?: FinishedOutcomes | undefined;
}

/** Outcome of a task. */
export interface AnsweringTask {
  readonly id: string;
  /** Its agreement with its adapter, as of `ByAnswersOptions`; undefined where it was not asked. */
  readonly agreement: number | undefined;
  /** The agreement that was asked for; undefined with `bytes`, and where the task was not asked. */
  readonly wanted: number | undefined;
  /**
   * "distilled" onto the components; "projected" where that was no worse, or `bytes` were too few; "closer", with terms
   * of its own, where that agreed better; "undistilled" where time ran out, or it cannot be distilled: as a pack
   * without a model has it, or with `bytes` as projected.
   */
  readonly kept: "distilled" | "projected" | "closer" | "undistilled";
  /** Why it cannot be distilled, whatever time there is. */
  readonly reason?: string | undefined;
  readonly bytes: number;
}

/** Report of `packByAnswers`. What it says of ΔW and terms is from before tasks were distilled. */
export interface ByAnswersReport extends BuildReport {
  /** Empty if distilling saves no bytes: the pack is then the one made without a model. */
  readonly answers: readonly AnsweringTask[];
  /** Most training steps of a task. */
  readonly steps: number;
  /** Ids of tasks that were stored as without a model, since `signal` or `minutes` left them no turn. */
  readonly left: readonly string[];
}

interface Outcome extends AnsweringTask {
  readonly file: Uint8Array<ArrayBuffer>;
}

/** An open pack that tasks are distilled in, with a session that can be trained. */
interface Open {
  readonly pack: Pack;
  readonly session: Session;
}

const OPTIONS = [
  ...(["adapters", "encode", "texts", "examples", "end", "decoderStart", "names", "base", "anyBase"] as const),
  ...(["agreement", "bytes", "minutes", "steps", "seed", "signal", "onProgress", "finished", "workers"] as const),
] as const;

/** A pack that exists has its size. */
const TASK_OPTIONS = OPTIONS.filter((name) => name !== "bytes");

/**
 * Distils adapters onto the components of a pack that exists. The pack stays as it is.
 * @param pack without tasks of these ids
 * @returns a task file and what became of it, for each adapter
 * @throws TaskError when an id is taken; and as `packByAnswers`
 * @example
 * const tasks = await tasksByAnswers(createEngine(ort), "model.onnx", pack, { adapters: newcomers, encode: tokenizer
 * }); for (const { id, file } of tasks) await pack.addTask(id, file);
 */
export async function tasksByAnswers(
  engine: Engine,
  model: SourceInput,
  pack: Pack,
  options: ByAnswersOptions,
): Promise<(AnsweringTask & { readonly file: Uint8Array<ArrayBuffer> })[]> {
  checkArgument("tasksByAnswers", engine, "an engine (createEngine(ort))", "load");
  checkPack("tasksByAnswers", pack);
  check("tasksByAnswers", options, TASK_OPTIONS);
  const { adapters, names } = options;
  const projected = await projectAdapters(pack, adapters, await storedDtypes(pack), { maxLoss: 1 });
  const added: string[] = [];
  try {
    for (const { entry, blob } of projected) {
      await pack.addTask(entry.id, encodeTaskFile(entry, pack.basisId, blob));
      added.push(entry.id);
    }
    const session = await createSession(engine, model, pack, { trainable: true, names });
    try {
      return await new Answering(options).all({ pack, session });
    } finally {
      await session.close();
    }
  } finally {
    for (const id of added) await pack.removeTask(id);
  }
}

/**
 * Packs adapters for a model, judged by answers. Without `base`, fingerprints are of the model, where its weights are
 * floats under the adapters' names.
 * @param engine runs the model: `createEngine` of a binding makes one
 * @param model path, URL, Blob or bytes of the ONNX model
 * @throws RangeError for fewer `bytes` than any such pack takes, with the least
 * @throws TypeError without texts where the tokenizer does not tell its words
 * @throws AdapterError, BaseMismatchError as `buildPack` and `createSession`
 * @example
 * const { chunks, report } = await packByAnswers(createEngine(ort), "model.onnx", { adapters, encode: tokenizer });
 */
export async function packByAnswers(
  engine: Engine,
  model: SourceInput,
  options: ByAnswersOptions,
): Promise<Built<ByAnswersReport>> {
  checkArgument("packByAnswers", engine, "an engine (createEngine(ort))", "load");
  check("packByAnswers", options, OPTIONS);
  const host = options.base === undefined ? await modelBase(model, options.adapters, options.names) : undefined;
  const making = new Making(engine, model, host ? { ...options, base: host } : options);
  try {
    return await making.made();
  } finally {
    await making.close();
    await host?.close?.();
  }
}

/** @throws TypeError, RangeError */
function check(where: string, options: ByAnswersOptions, known: readonly (keyof ByAnswersOptions)[]): void {
  checkOptions(where, options, known);
  checkAdapters(`${where}: adapters`, options.adapters);
  if (options.adapters.length === 0) throw new RangeError(`${where}: no adapters`);
  for (const { file, modules } of options.adapters) {
    const untrained = [...modules.values()].find(({ layout }) => layout === "conv" || layout === "embedding");
    if (!untrained) continue;
    const message = `"${untrained.name}" has the layout "${untrained.layout}", which cannot be trained: pack without a model`;
    throw new AdapterError(message, { file, field: untrained.name });
  }
  checkNumbers(where, options, { agreement: "between", bytes: "positive", minutes: "positive", steps: "count" });
  if (options.bytes !== undefined && options.agreement !== undefined)
    throw new RangeError(`${where}: agreement or bytes: give one of them`);
  checkQuestions(options);
}

/**
 * Most training steps of a task by default. With 120, own-seed takes 3 % fewer bytes and hub 9 % more. Steps of tokens
 * take far longer.
 */
const STEPS = { labels: 240, tokens: 24 };
/** Most steps of a task that a size is tried on. */
const TRYING = 48;
/**
 * Answers that differ after so few steps ÷ those that differ after all steps: as the root of KL, which is 1.5 times as
 * large (docs/research/learning.md).
 */
const MORE_DIFFER = 1.2;
/** Shares of ΔW that a task stored closer may lose, down to the share of a pack without a model. */
const CLOSER = [0.45, 0.3, 0.2, DEFAULT_ERROR] as const;
/**
 * Tokens of a word predict each other, tokens of a text even more, so the same agreement means less there. Of twenty
 * skills of SmolLM2, three that agreed in 97.0 to 97.6 % of answers' tokens had 3 points fewer answers right, six above
 * 99 % had 0.3.
 */
const DEFAULT_AGREEMENT = { labels: 0.96, answers: 0.98, texts: 0.99 };

interface Attempt {
  readonly level: Open;
  readonly adapter: Adapter;
  readonly steps: number;
  /** Factor of the share of answers that may differ. */
  readonly differ: number;
  onStep(step: number): void;
}

class Answering {
  readonly #options: ByAnswersOptions;
  readonly #until: number;
  /** Answers of adapters by id: each adapter is asked once, and forgotten once its task is done. */
  readonly #teacher = new Map<string, TeacherOutputs>();
  readonly #outcomes = new Map<string, Outcome>();
  /** Reasons for which tasks cannot be distilled, by id. */
  readonly #refused = new Map<string, string>();
  /** Steps that the progress counts for trying sizes, whose number is not known in advance. */
  #trying = 0;
  #done = 0;

  constructor(options: ByAnswersOptions) {
    this.#options = options;
    this.#until = performance.now() + 60_000 * (options.minutes ?? Infinity);
  }

  /** Most training steps of a task. */
  stepsOf({ session }: Open): number {
    return this.#options.steps ?? STEPS[asksTokens(session) ? "tokens" : "labels"];
  }

  get #isAborted(): boolean {
    return this.#options.signal?.aborted === true;
  }

  get late(): boolean {
    return this.#isAborted || performance.now() > this.#until;
  }

  /** Reasons for which no task could be distilled, if none could. */
  get refused(): readonly string[] {
    return this.#outcomes.size > 0 ? [] : [...this.#refused.values()];
  }

  async all(level: Open): Promise<Outcome[]> {
    const { adapters } = this.#options;
    const steps = this.stepsOf(level);
    const outcomes: Outcome[] = [];
    for (const [i, adapter] of adapters.entries()) {
      const before = this.#trying + i * steps;
      const onStep = (step: number): void => this.#tell(level, adapter.id, before + step);
      outcomes.push(await this.#outcome({ level, adapter, steps, differ: 1, onStep }));
      // Answers of all adapters together would be the most that is held.
      this.#teacher.delete(adapter.id);
    }
    if (!this.late) this.#tell(level, adapters.at(-1)!.id, Infinity);
    return outcomes;
  }

  /**
   * Foresees from fewer steps how tasks are stored.
   * @param before sizes that were tried
   * @param expected sizes that are tried in all, if nothing surprises
   */
  async tried(level: Open, adapters: readonly Adapter[], before: number, expected: number): Promise<Outcome[]> {
    const all = this.stepsOf(level);
    const steps = Math.min(all, TRYING);
    const each = Math.max(steps, 1);
    this.#trying = expected * adapters.length * each;
    const outcomes: Outcome[] = [];
    for (const [i, adapter] of adapters.entries()) {
      const done = (before * adapters.length + i) * each;
      const onStep = (step: number): void =>
        this.#tell(level, `${adapter.id} to try a size`, Math.min(done + step, this.#trying));
      outcomes.push(await this.#outcome({ level, adapter, steps, differ: steps < all ? MORE_DIFFER : 1, onStep }));
    }
    return outcomes;
  }

  #tell(level: Open, detail: string, done: number): void {
    const total = this.#trying + this.#options.adapters.length * Math.max(this.stepsOf(level), 1);
    this.#done = Math.max(this.#done, Math.min(done, total));
    this.#options.onProgress?.({ stage: "distilling", done: this.#done, total, unit: "steps", detail });
  }

  async #teach(
    level: Open,
    adapter: Adapter,
  ): Promise<{ readonly task: Distillable; readonly outputs: TeacherOutputs }> {
    const task = await distillable(level.session, adapter.id);
    const steps = this.stepsOf(level);
    const outputs =
      this.#teacher.get(adapter.id) ??
      (await teacherOutputs(level.session, adapter, task, { ...this.#options, steps }));
    this.#teacher.set(adapter.id, outputs);
    return { task, outputs };
  }

  async #outcome(attempt: Attempt): Promise<Outcome> {
    const { level, adapter, steps, differ } = attempt;
    attempt.onStep(0);
    const { finished, agreement, bytes, seed, end, decoderStart } = this.#options;
    const { id, file, byteLength, metadata } = adapter;
    const asked = { agreement, bytes, seed, end, decoderStart };
    const key = JSON.stringify([level.pack.basisId, id, file, byteLength, metadata, steps, differ, asked]);
    let outcome = this.#outcomes.get(key) ?? (finished && (await readFinished<Outcome>(finished, key)));
    if (!outcome) {
      if (this.late) return this.#undistilled(level, adapter);
      try {
        outcome = await this.#distilled(attempt);
        this.#refused.delete(id);
      } catch (error) {
        const isAstray = error instanceof BackendError && error.backend === "train";
        if (!isAstray && !(error instanceof TaskError)) {
          if (!this.#isAborted) throw error;
          return this.#undistilled(level, adapter);
        }
        const reason = isAstray ? `task "${id}" cannot be distilled: its training goes astray` : error.message;
        this.#refused.set(id, reason);
        return { ...(await this.#undistilled(level, adapter)), reason };
      }
      await finished?.write(key, finishedText(outcome));
    }
    this.#outcomes.set(key, outcome);
    return outcome;
  }

  async #distilled({ level, adapter, steps, differ, onStep }: Attempt): Promise<Outcome> {
    const { task, outputs } = await this.#teach(level, adapter);
    const { bytes: most, agreement: wanted = most === undefined ? DEFAULT_AGREEMENT[outputs.asked] : undefined } =
      this.#options;
    const least = 1 - differ * (1 - (wanted ?? 0));
    const how = { ...this.#options, steps, onStep: ({ step }: TrainingStep) => onStep(step) };
    const { id, file, kept, agreement } = await distilTask(level.session, adapter, task, outputs, how);
    let best: Outcome = { id, file, kept, agreement, wanted, bytes: taskIn(file, id).blob.length };
    for (const error of CLOSER) {
      if (best.agreement! >= least) break;
      const made = await closer(level, adapter, error);
      const agreement = await this.#agreement(level, adapter, made.file);
      if (agreement > best.agreement!) best = { ...made, kept: "closer", agreement, wanted };
    }
    return best;
  }

  #undistilled(level: Open, adapter: Adapter): Promise<Outcome> {
    return this.#options.bytes === undefined ? closer(level, adapter, DEFAULT_ERROR) : projected(level, adapter);
  }

  /** The task as the pack has it, where the distilled one is too large. */
  async projected(level: Open, adapter: Adapter): Promise<Outcome> {
    const made = { ...(await projected(level, adapter)), kept: "projected" as const };
    if (this.late) return made;
    const agreement = await this.#agreement(level, adapter, made.file).catch((cause: unknown) => {
      if (!this.#isAborted) throw cause;
      return undefined;
    });
    return { ...made, agreement };
  }

  async #agreement(level: Open, adapter: Adapter, file: Uint8Array<ArrayBuffer>): Promise<number> {
    const { pack, session } = level;
    const { task, outputs } = await this.#teach(level, adapter);
    const { supervision, holdout } = outputs;
    let id = "closer";
    while (pack.tasks.has(id)) id += "'";
    await pack.addTask(id, file);
    let stored: Adapter | undefined;
    const fidelity = new MeanDivergence();
    try {
      stored = await taskAdapter(pack, id);
      const { model, weights } = await adapterWeights(session, stored, task.head);
      for await (const { row, logits } of answers({ model, supervision }, holdout, weights, this.#options))
        fidelity.add(row.wanted, logits);
    } finally {
      await stored?.close();
      await pack.removeTask(id);
    }
    return fidelity.agreement;
  }
}

function asksTokens({ trainable }: Session): boolean {
  return trainable!.graph.tokens !== undefined;
}

/** The task on the pack's components, with residual rows for what they lack. */
async function closer({ pack }: Open, adapter: Adapter, error: number): Promise<Outcome> {
  const [task] = await projectAdapters(pack, [adapter], await storedDtypes(pack), { error });
  return asStored(pack, storedTask(pack, task!));
}

async function projected({ pack }: Open, { id }: Adapter): Promise<Outcome> {
  return asStored(pack, { entry: pack.tasks.get(id)!, blob: await pack.stored(id) });
}

function asStored({ basisId }: Pack, { entry, blob }: TaskToWrite): Outcome {
  const file = encodeTaskFile(entry, basisId, blob);
  return { id: entry.id, file, bytes: blob.length, agreement: undefined, wanted: undefined, kept: "undistilled" };
}

// Packs that tasks are distilled in, from few bytes to many: with components of all tasks, or without.

/** Fewer tasks than this share too little for components of all. */
const FEW = 8;
/**
 * Components of a side: of 20 to 40, on two suites of 20 and 53 adapters, those whose answers lost least for their
 * bytes.
 */
const COMPONENTS = 36;
/** Quantisation steps, from few bytes to many: each pack is about a fifth larger than the one before. */
const STEP_SIZES = [0.28, 0.2, 0.14, 0.1, 0.07, 0.05, 0.035, 0.025, 0.018];
/** Shares of ΔW that tasks without such components may lose. */
const ERROR_SIZES = [0.8, 0.6, 0.45, 0.34, 0.25, DEFAULT_ERROR, 0.1, 0.07, 0.05, 0.035, 0.025];

interface Kind {
  readonly sizes: readonly number[];
  readonly first: number;
  make(size: number): Promise<Built>;
}

interface Sized {
  readonly kind: Kind;
  readonly size: number;
}

/** Kinds of packs for the adapters, the most promising first. */
function kindsOf({ adapters, base, anyBase, workers }: ByAnswersOptions): readonly Kind[] {
  const common = { base, anyBase, workers };
  const shared: Kind = {
    sizes: STEP_SIZES,
    first: 0.05,
    make: (step) => buildPack(adapters, { ...common, gauge: "balanced", step, select: { kind: "k", k: COMPONENTS } }),
  };
  const unshared: Kind = {
    sizes: ERROR_SIZES,
    first: 0.34,
    make: (max) => searchPack(adapters, { ...common, goal: { kind: "error", max } }),
  };
  return adapters.length < FEW ? [unshared] : [shared, unshared];
}

const EXPECTED = 3;
/**
 * Tasks that sizes are tried on. Of 20 tasks of own-seed nine were stored closer where one of six was expected, for 141
 * kB instead of 103. Steps of tokens take far longer.
 */
const TRIED = { labels: 16, tokens: 6 };

interface Level extends Open, Sized {
  readonly report: BuildReport;
  readonly close: () => Promise<void>;
}

class Making {
  readonly #engine: Engine;
  readonly #model: SourceInput;
  readonly #options: ByAnswersOptions;
  readonly #answering: Answering;
  readonly #kinds: readonly Kind[];
  #level: Level | undefined;
  #count = 0;

  constructor(engine: Engine, model: SourceInput, options: ByAnswersOptions) {
    this.#engine = engine;
    this.#model = model;
    this.#options = options;
    this.#answering = new Answering(options);
    this.#kinds = kindsOf(options);
  }

  async made(): Promise<Built<ByAnswersReport>> {
    const { adapters, bytes: most, base, anyBase, workers } = this.#options;
    const { expected, ...sized } = await (most === undefined ? this.#smallest() : this.#within(most));
    const plain = most === undefined ? await searchPack(adapters, { base, anyBase, workers }) : undefined;
    if (plain && expected >= plain.report.bytes) return this.#undistilled(plain);
    const level = await this.#open(sized);
    const outcomes = await this.#answering.all(level);
    let made = await this.#packed(level, outcomes);
    while (most !== undefined && made.report.bytes > most) {
      // The task that has grown most is stored as it was.
      const grown = outcomes.map(({ id, bytes }) => bytes - level.pack.tasks.get(id)!.bytes);
      const i = grown.indexOf(Math.max(...grown));
      if (grown[i]! <= 0) throw tooFew(most, made.report.bytes);
      outcomes[i] = await this.#answering.projected(level, adapters[i]!);
      made = await this.#packed(level, outcomes);
    }
    // The sample may have underestimated the size.
    return plain && made.report.bytes >= plain.report.bytes ? this.#undistilled(plain, made.report.left) : made;
  }

  /** A pack without a model, which takes no more. @param left Default: all tasks, where time is over */
  #undistilled({ chunks, report }: Built<BuildReport>, left?: readonly string[]): Built<ByAnswersReport> {
    const warnings = [...report.warnings, ...this.#unusedTemplates(), ...this.#answering.refused];
    left ??= this.#answering.late ? this.#options.adapters.map(({ id }) => id) : [];
    return { chunks, report: { ...report, warnings, answers: [], steps: 0, left } };
  }

  async #packed(level: Level, outcomes: readonly Outcome[]): Promise<Built<ByAnswersReport>> {
    const places = await Promise.all(outcomes.map(({ file }) => placeOf(taskIn(file, "a distilled task"))));
    const { bytes, chunks } = await freshPack(level.pack, places);
    const answers = outcomes.map(({ file, ...outcome }) => outcome);
    const ratio = level.report.adapterBytes / bytes;
    const left = outcomes.flatMap(({ id, kept, reason }) => (kept === "undistilled" && !reason ? [id] : []));
    const steps = this.#answering.stepsOf(level);
    const warnings = [...level.report.warnings, ...this.#unusedTemplates()];
    return {
      chunks: await allOf(chunks),
      report: { ...level.report, bytes, ratio, warnings, answers, steps, left },
    };
  }

  #unusedTemplates(): string[] {
    const { adapters, texts, examples } = this.#options;
    if (texts || examples || !asksTokens(this.#level!.session)) return [];
    const unused = adapters.filter(({ metadata }) => metadata["template"] !== undefined && !templateOf(metadata));
    return unused.map(({ id }) => `${id}: its template has no "{input}", so it was asked lines of words`);
  }

  async close(): Promise<void> {
    await this.#level?.close();
    this.#level = undefined;
  }

  /** The pack in which all tasks are expected to take least, by the outcomes of a few of them. */
  async #smallest(): Promise<Sized & { readonly expected: number }> {
    const [kind, ...others] = this.#kinds as [Kind, ...Kind[]];
    let best: Sized & { readonly expected: number } = { kind, size: kind.first, expected: Infinity };
    const isLess = async (sized: Sized): Promise<boolean> => {
      const { bytes } = await this.#tried(sized);
      if (bytes >= best.expected) return false;
      best = { ...sized, expected: bytes };
      return true;
    };
    await isLess(best);
    // Components gain labels most at every size that was measured, and tokens little (docs/research/size.md).
    const rivals = asksTokens(this.#level!.session) ? others : [];
    // A rival in which all tasks agree takes no more than its own bytes.
    for (const rival of rivals) if (!this.#answering.late) await isLess(await finest(rival, best.expected));
    for (const isFiner of [false, true]) {
      const { size: start } = best;
      for (;;) {
        const { sizes } = best.kind;
        const next = isFiner ? sizes.find((size) => size < best.size) : sizes.filter((size) => size > best.size).at(-1);
        if (next === undefined || this.#answering.late || !(await isLess({ kind: best.kind, size: next }))) break;
      }
      // Coarser packs were smaller: finer ones are not.
      if (best.size !== start) break;
    }
    return best;
  }

  /** The finest pack that the bytes allow, of the kind in which a few tasks agree most. */
  async #within(most: number): Promise<Sized & { readonly expected: number }> {
    let best: (Sized & { readonly agreement: number }) | undefined;
    let least = Infinity;
    for (const kind of this.#kinds) {
      const sized = await finest(kind, most);
      least = Math.min(least, sized.bytes);
      if (sized.bytes > most) continue;
      const { bytes, agreement } = await this.#tried(sized);
      if (best && agreement <= best.agreement) continue;
      // Tasks take more when they are distilled.
      best = { ...(await finest(kind, (most * sized.bytes) / bytes)), agreement };
    }
    if (!best) throw tooFew(most, least);
    return { kind: best.kind, size: best.size, expected: most };
  }

  /** Expected bytes of a pack with distilled tasks, and how far they agree; from a few of them. */
  async #tried(sized: Sized): Promise<{ readonly bytes: number; readonly agreement: number }> {
    const level = await this.#open(sized);
    const sample = spread(this.#options.adapters, TRIED[asksTokens(level.session) ? "tokens" : "labels"]);
    const expected = this.#options.bytes === undefined ? EXPECTED : this.#kinds.length;
    let grown = 0;
    let agreed = 0;
    for (const { id, bytes, agreement = 0 } of await this.#answering.tried(level, sample, this.#count++, expected)) {
      grown += bytes - level.pack.tasks.get(id)!.bytes;
      agreed += agreement;
    }
    const bytes = level.report.bytes + (grown / sample.length) * this.#options.adapters.length;
    return { bytes, agreement: agreed / sample.length };
  }

  /** A pack with a session. There is one at a time. */
  async #open({ kind, size }: Sized): Promise<Level> {
    if (this.#level?.kind === kind && this.#level.size === size) return this.#level;
    await this.close();
    const { chunks, report } = await kind.make(size);
    const pack = await openPack(new Blob(chunks as BlobPart[]));
    const { names } = this.#options;
    const session = await createSession(this.#engine, this.#model, pack, { trainable: true, names });
    const close = async (): Promise<void> => {
      await session.close();
      await pack.close();
    };
    this.#level = { kind, size, pack, session, report, close };
    return this.#level;
  }
}

/** The finest pack of a kind with at most so many bytes; the coarsest where there is none. */
async function finest(kind: Kind, most: number): Promise<Sized & { readonly bytes: number }> {
  const coarsest = kind.sizes[0]!;
  const known = new Map<number, number>();
  const sized = async (asked: number): Promise<Sized & { readonly bytes: number }> => {
    const size = Math.min(coarsest, Math.max(kind.sizes.at(-1)!, asked));
    const bytes = known.get(size) ?? (await kind.make(size)).report.bytes;
    known.set(size, bytes);
    return { kind, size, bytes };
  };
  try {
    return await search(
      new Map([["", kind.first]]),
      (steps) => sized(steps.get("")!),
      withinBytes(most, ({ bytes }) => bytes),
    );
  } catch (error) {
    if (!(error instanceof Unreachable)) throw error;
    return sized(coarsest);
  }
}

// The model that a pack is made with as its base: apps recognise it by fingerprints of its weights.

/**
 * The weights of a model; undefined where they are not all in it in floats, under the names that the adapters have for
 * them.
 * @param names of weights, by module name
 * @throws FormatError, SourceError where it cannot be read; AdapterError for adapters that do not agree about a module
 */
export async function modelBase(
  model: SourceInput,
  adapters: readonly Adapter[],
  names: ReadonlyMap<string, string> = new Map(),
): Promise<WeightHost | undefined> {
  const shapes = [...sharedModules(adapters).values()].map(({ shape }) => shape);
  const whole = onnxHost(await readModel(model, { weightsApart: true }));
  try {
    const host = names.size > 0 ? renamedHost(whole, names) : whole;
    await readFingerprints(host, shapes);
    return host;
  } catch (error) {
    await whole.close!();
    if (error instanceof BaseMismatchError) return undefined;
    throw error;
  }
}
