/**
 * Tasks of a pack brought close to their adapters' answers: each is distilled within the time there is, judged by questions that were held
 * back, and stored closer to its adapter where it does not agree.
 */

import type { Adapter } from "../adapters/adapter.ts";
import type { Pack } from "../core/pack.ts";
import { parseTaskFile } from "../core/task-file.ts";
import { BackendError, FormatError, TaskError } from "../errors.ts";
import { encodeTaskFile, type TaskToWrite } from "../format/encode.ts";
import { projectAdapters, storedDtypes } from "../pack/add.ts";
import { type Built, buildPack } from "../pack/build.ts";
import { taskAdapter } from "../pack/expand.ts";
import type { BuildOptions } from "../pack/recipe.ts";
import { searchPack } from "../pack/search.ts";
import { DEFAULT_ERROR } from "../pack/tasks.ts";
import { storedTask } from "../pack/write.ts";
import type { Session } from "../session/session.ts";
import { fromBase64, toBase64 } from "../text.ts";
import type { OnWork } from "../work.ts";
import { distillable, distilTask } from "./distill.ts";
import { askAdapter } from "./questions.ts";
import { MeanDivergence } from "./supervision.ts";
import { type Taught, type TeachOptions, taughtBy } from "./teacher.ts";
import { supervisionOf } from "./trainer.ts";

/** Options of `packByAnswers`. Without texts or examples, questions are made of the tokenizer's words. */
export interface ByAnswersOptions
  extends Omit<TeachOptions, "feeds" | "batch" | "holdout">,
    Pick<BuildOptions, "base" | "anyBase" | "workers"> {
  /** Stay open. */
  readonly adapters: readonly Adapter[];
  /** Names of weights, or of their initializers in the model, by module name, for weights that are not found. */
  readonly names?: ReadonlyMap<string, string> | undefined;
  /**
   * The least agreement of a task with its adapter: the share of held-back answers with the same likeliest class, each counted by how much
   * likelier the adapter finds that than the second. Default: 0.96 of labels, 0.98 of a
   * language model's answers, 0.99 of all tokens of texts.
   */
  readonly agreement?: number | undefined;
  /** Most bytes of the pack, which is then the one whose tasks agree most; instead of `agreement`. Not for `tasksByAnswers`. */
  readonly bytes?: number | undefined;
  /** Most training steps of a task; they end earlier where the answers held back gain no more. Default: 240 of labels, 24 token by token. */
  readonly steps?: number | undefined;
  /** Minutes after which no further task is begun. Those left are stored as without a model, and the report says so. Default: no limit. */
  readonly minutes?: number | undefined;
  /** Called after each training step of a task, with the steps of all tasks. */
  readonly onProgress?: OnWork | undefined;
  /** Where outcomes are kept, so that a call that was stopped goes on: by a key that holds all they depend on but the model and questions. */
  readonly finished?: FinishedOutcomes | undefined;
}

/** Finished outcomes as JSON, by key. */
export interface FinishedOutcomes {
  /** @returns undefined for what was never written */
  read(key: string): Promise<string | undefined>;
  write(key: string, json: string): Promise<void>;
  /** Names an entry in messages: the path of its file. Default: the key. */
  nameOf?(key: string): string;
}

/** Outcome of a task. */
export interface AnsweringTask {
  readonly id: string;
  /** Its agreement with its adapter, as of `ByAnswersOptions`; undefined where it was not asked. */
  readonly agreement: number | undefined;
  /**
   * "distilled" onto the components; "projected" where that was no worse, or `bytes` were too few; "closer", with terms of its own, where that
   * agreed better; "undistilled" where time ran out, or it cannot be distilled: as a pack without a model has it, or with `bytes` as projected.
   */
  readonly kept: "distilled" | "projected" | "closer" | "undistilled";
  /** Why it cannot be distilled, whatever time there is. */
  readonly reason?: string | undefined;
  readonly bytes: number;
}

export interface Outcome extends AnsweringTask {
  /** Task file. */
  readonly file: Uint8Array<ArrayBuffer>;
}

/** An open pack that tasks are distilled in, with a session that can be trained. */
export interface Open {
  readonly pack: Pack;
  readonly session: Session;
}

interface Training {
  /** Most steps. */
  readonly steps: number;
  readonly onStep: (step: number) => void;
}

/** Most training steps of a task by default: more gain no right answers (docs/research/size.md). Steps of tokens take far longer. */
const STEPS = { labels: 240, tokens: 24 };
/** Most steps where a size is tried. */
const TRYING = 48;
/** Answers that differ after so few steps ÷ those that do after all: as the root of KL, which is 1.5 times as large (docs/research/learning.md). */
const MORE_DIFFER = 1.2;
/** Shares of ΔW that a task may lose that is stored closer, down to what it loses in a pack without a model. */
const CLOSER = [0.45, 0.3, 0.2, DEFAULT_ERROR] as const;
/**
 * A word's tokens are foreseen from each other, those of a text even more, so that the same agreement says less of them. Of twenty skills
 * of SmolLM2, three that agreed in 97.0 to 97.6 % of answers' tokens had 3 points fewer answers right, six above 99 % had 0.3.
 */
const DEFAULT_AGREEMENT = { labels: 0.96, answers: 0.98, texts: 0.99 };

/** Brings tasks close to the answers of their adapters. */
export class Answering {
  readonly #options: ByAnswersOptions;
  readonly #until: number;
  /** Answers of adapters by id: each adapter is asked once, and forgotten once its task is done. */
  readonly #taught = new Map<string, Taught>();
  readonly #outcomes = new Map<string, Outcome>();
  /** Why tasks cannot be distilled, by id. */
  readonly #refused = new Map<string, string>();
  /** Steps that trying sizes counts for, whatever it takes: in advance nobody knows how many sizes are tried. */
  #trying = 0;
  #done = 0;

  constructor(options: ByAnswersOptions) {
    this.#options = options;
    this.#until = performance.now() + 60_000 * (options.minutes ?? Infinity);
  }

  /** Most training steps of a task. */
  stepsOf(level: Open): number {
    return this.#options.steps ?? STEPS[this.asksTokens(level) ? "tokens" : "labels"];
  }

  asksTokens({ session }: Open): boolean {
    return supervisionOf(session, this.#questions).tokens;
  }

  /** True once no further task may begin. */
  get late(): boolean {
    return this.#options.signal?.aborted === true || performance.now() > this.#until;
  }

  /** Why no task could be distilled, if none could. */
  get refused(): readonly string[] {
    return this.#outcomes.size > 0 ? [] : [...this.#refused.values()];
  }

  /** The result of work; undefined where the task cannot be distilled: `#refused` has the reason. */
  async #unlessRefused<T>({ id }: Adapter, work: Promise<T>): Promise<T | undefined> {
    try {
      const done = await work;
      this.#refused.delete(id);
      return done;
    } catch (error) {
      const isAstray = error instanceof BackendError && error.backend === "train";
      if (!isAstray && !(error instanceof TaskError)) throw error;
      this.#refused.set(id, isAstray ? `task "${id}" cannot be distilled: its training goes astray` : error.message);
      return undefined;
    }
  }

  /** The result of work; `otherwise` where the caller's signal ended it. */
  async #unlessStopped<T>(work: Promise<T>, otherwise: T): Promise<T> {
    return work.catch((cause: unknown) => {
      if (!this.#options.signal?.aborted) throw cause;
      return otherwise;
    });
  }

  /** Distils all tasks. */
  async all(level: Open): Promise<Outcome[]> {
    const { adapters } = this.#options;
    const steps = this.stepsOf(level);
    const outcomes: Outcome[] = [];
    for (const adapter of adapters) {
      const before = this.#trying + outcomes.length * steps;
      const onStep = (step: number): void => this.#tell(level, adapter.id, before + step);
      onStep(0);
      outcomes.push(await this.#outcome(level, adapter, { steps, onStep }));
      // Answers of all adapters together would be the most that is held.
      this.#taught.delete(adapter.id);
    }
    this.#tell(level, adapters.at(-1)!.id, Infinity);
    return outcomes;
  }

  #tell(level: Open, detail: string, done: number): void {
    const total = this.#trying + this.#options.adapters.length * Math.max(this.stepsOf(level), 1);
    this.#done = Math.max(this.#done, Math.min(done, total));
    this.#options.onProgress?.({ stage: "distilling", done: this.#done, total, unit: "steps", detail });
  }

  async #teach(level: Open, adapter: Adapter): Promise<Taught> {
    const known = this.#taught.get(adapter.id);
    if (known) return known;
    const task = await distillable(level.session, adapter.id);
    const taught = await taughtBy(level.session, adapter, task, { ...this.#questions, steps: this.stepsOf(level) });
    this.#taught.set(adapter.id, taught);
    return taught;
  }

  get #questions(): TeachOptions {
    const { encode, texts, examples, end, decoderStart, seed, signal } = this.#options;
    return { encode, texts, examples, end, decoderStart, seed, signal };
  }

  async #distil(level: Open, adapter: Adapter, steps: number, onStep: (step: number) => void) {
    const { session } = level;
    const taught = await this.#teach(level, adapter);
    return distilTask(session, adapter, await distillable(session, adapter.id), taught, {
      ...this.#questions,
      steps,
      onStep: ({ step }) => onStep(step),
    });
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
      onStep(0);
      outcomes.push(await this.#outcome(level, adapter, { steps, onStep }, steps < all ? MORE_DIFFER : 1));
    }
    return outcomes;
  }

  /** @param differ times the share of answers that may differ */
  async #outcome(level: Open, adapter: Adapter, training: Training, differ: number = 1): Promise<Outcome> {
    const { finished, agreement, bytes, seed, end, decoderStart } = this.#options;
    const { id, file, byteLength, metadata } = adapter;
    const asked = { agreement, bytes, seed, end, decoderStart };
    const key = JSON.stringify([level.pack.basisId, id, file, byteLength, metadata, training.steps, differ, asked]);
    const known = this.#outcomes.get(key) ?? outcomeOf(await finished?.read(key), finished?.nameOf?.(key) ?? key);
    if (known) {
      this.#outcomes.set(key, known);
      return known;
    }
    if (this.late) return this.#undistilled(level, adapter);
    const judged = this.#unlessRefused(adapter, this.#judged(level, adapter, training, differ));
    const outcome = await this.#unlessStopped(judged, undefined);
    if (!outcome) return { ...(await this.#undistilled(level, adapter)), reason: this.#refused.get(adapter.id) };
    this.#outcomes.set(key, outcome);
    await finished?.write(key, written(outcome));
    return outcome;
  }

  async #judged(level: Open, adapter: Adapter, { steps, onStep }: Training, differ: number): Promise<Outcome> {
    const { bytes: most, agreement } = this.#options;
    const { asked } = await this.#teach(level, adapter);
    const wanted = agreement ?? (most === undefined ? DEFAULT_AGREEMENT[asked] : 0);
    const least = 1 - differ * (1 - wanted);
    const { id, file, kept, agreement: found } = await this.#distil(level, adapter, steps, onStep);
    let best: Outcome = { id, file, kept, agreement: found, bytes: parseTaskFile(file, id).blob.length };
    for (const error of CLOSER) {
      if (best.agreement! >= least) break;
      const made = await this.#closer(level, adapter, error);
      const agreement = await this.#agreement(level, adapter, made.file);
      if (agreement > best.agreement!) best = { ...made, kept: "closer", agreement };
    }
    return best;
  }

  #undistilled(level: Open, adapter: Adapter): Promise<Outcome> {
    const { bytes } = this.#options;
    return bytes === undefined ? this.#closer(level, adapter, DEFAULT_ERROR) : projected(level, adapter);
  }

  /** The task as the pack has it, where what it was distilled to is too large. */
  async projected(level: Open, adapter: Adapter): Promise<Outcome> {
    const made = { ...(await projected(level, adapter)), kept: "projected" as const };
    if (this.late) return made;
    return { ...made, agreement: await this.#unlessStopped(this.#agreement(level, adapter, made.file), undefined) };
  }

  /** The task on the pack's components, with terms of its own for what they lack. */
  async #closer({ pack }: Open, adapter: Adapter, error: number): Promise<Outcome> {
    const [task] = await projectAdapters(pack, [adapter], await storedDtypes(pack), { error });
    return asStored(pack, storedTask(pack, task!));
  }

  /** The agreement of a task file with its adapter. */
  async #agreement(level: Open, adapter: Adapter, file: Uint8Array<ArrayBuffer>): Promise<number> {
    const { pack, session } = level;
    const { supervision, judges } = await this.#teach(level, adapter);
    const { head } = await distillable(session, adapter.id);
    let id = "closer";
    while (pack.tasks.has(id)) id += "'";
    await pack.addTask(id, file);
    let task: Adapter | undefined;
    const found = new MeanDivergence();
    try {
      task = await taskAdapter(pack, id);
      const how = { where: "packByAnswers", supervision, signal: this.#options.signal };
      for await (const { row, logits } of askAdapter(session, task, head, judges, how))
        found.add(supervision.wanted(row), logits);
    } finally {
      await task?.close();
      await pack.removeTask(id);
    }
    return found.agreement;
  }
}

async function projected({ pack }: Open, { id }: Adapter): Promise<Outcome> {
  return asStored(pack, { entry: pack.tasks.get(id)!, blob: await pack.stored(id) });
}

function asStored({ basisId }: Pack, { entry, blob }: TaskToWrite): Outcome {
  const file = encodeTaskFile(entry, basisId, blob);
  return { id: entry.id, file, bytes: blob.length, agreement: undefined, kept: "undistilled" };
}

function written({ file, ...outcome }: Outcome): string {
  return JSON.stringify({ ...outcome, file: toBase64(file) });
}

/** @param name for messages @throws FormatError where it is damaged */
function outcomeOf(json: string | undefined, name: string): Outcome | undefined {
  if (json === undefined) return undefined;
  try {
    const { file, ...outcome } = JSON.parse(json) as Omit<Outcome, "file"> & { readonly file: string };
    const { id, bytes, agreement = 0, kept } = outcome;
    const known = ["projected", "distilled", "closer", "undistilled"].includes(kept);
    if (typeof id !== "string" || !known || !Number.isFinite(bytes) || !Number.isFinite(agreement))
      throw new TypeError("it is not what packByAnswers writes");
    const task = fromBase64(file);
    parseTaskFile(task, name);
    return { ...outcome, file: task };
  } catch (cause) {
    const message = `is damaged: delete it, and the task is distilled again (${(cause as Error).message})`;
    throw new FormatError(message, { file: name, part: "finished task", cause });
  }
}

// Packs that tasks are distilled in, from few bytes to many: with components of all tasks, or with tasks by themselves.

/** Fewer tasks than this share too little for components of all. */
const FEW = 8;
/** Components of a side: of 20 to 40, on two suites of 20 and 53 adapters, those whose answers lost least for their bytes. */
const COMPONENTS = 36;
/** Steps of numbers, from few bytes to many: each pack is about a fifth larger than the one before. */
const SIZES = [0.28, 0.2, 0.14, 0.1, 0.07, 0.05, 0.035, 0.025, 0.018];
/** The same for tasks by themselves: shares of ΔW that may be lost. */
const ERRORS = [0.8, 0.6, 0.45, 0.34, 0.25, DEFAULT_ERROR, 0.1, 0.07, 0.05, 0.035, 0.025];
/** Packs from one of these to the next, where bytes are given. */
const BETWEEN = 8;

type Common = Pick<BuildOptions, "base" | "anyBase" | "workers">;

/** Number of indexes below `count` before the first for which `holds` is true; it must stay true from there on. */
async function partition(count: number, holds: (i: number) => Promise<boolean>): Promise<number> {
  let low = 0;
  let high = count;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (await holds(middle)) high = middle;
    else low = middle + 1;
  }
  return low;
}

/** Packs of one kind, by their place among the sizes; places between two have fractions. */
export class SizedPacks {
  /** The last place. */
  readonly last: number;
  /** Where trying begins. */
  readonly first: number;
  readonly #sizes: readonly number[];
  readonly #make: (size: number) => Promise<Built>;
  readonly #bytes = new Map<number, number>();

  constructor(sizes: readonly number[], first: number, make: (size: number) => Promise<Built>) {
    this.last = sizes.length - 1;
    this.first = sizes.indexOf(first);
    this.#sizes = sizes;
    this.#make = make;
  }

  async make(at: number): Promise<Built> {
    const [low, high] = [this.#sizes[Math.floor(at)]!, this.#sizes[Math.ceil(at)]!];
    const built = await this.#make(low * (high / low) ** (at % 1));
    this.#bytes.set(at, built.report.bytes);
    return built;
  }

  async bytes(at: number): Promise<number> {
    return this.#bytes.get(at) ?? (await this.make(at)).report.bytes;
  }

  /** The whole place of the largest of at most so many bytes; the first where there is none. */
  async largest(most: number): Promise<number> {
    return Math.max(0, (await partition(this.last + 1, async (i) => (await this.bytes(i)) > most)) - 1);
  }

  /** The place of the largest of at most so many bytes, between two sizes too; undefined where there is none. */
  async within(most: number): Promise<number | undefined> {
    const first = await partition(BETWEEN * this.last + 1, async (i) => (await this.bytes(i / BETWEEN)) > most);
    return first > 0 ? (first - 1) / BETWEEN : undefined;
  }
}

/** Kinds of packs for these adapters, the most promising first. */
export function kindsOf(adapters: readonly Adapter[], common: Common): readonly SizedPacks[] {
  const shared = (step: number): Promise<Built> =>
    buildPack(adapters, { ...common, gauge: "balanced", step, select: { kind: "k", k: COMPONENTS } });
  // Sides are shared where that pays.
  const alone = (max: number): Promise<Built> => searchPack(adapters, { ...common, goal: { kind: "error", max } });
  const all = [new SizedPacks(SIZES, 0.05, shared), new SizedPacks(ERRORS, 0.34, alone)];
  return adapters.length < FEW ? all.slice(1) : all;
}
