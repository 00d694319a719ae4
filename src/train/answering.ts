/**
 * Tasks of a pack brought close to their adapters' answers: each is distilled within the time there is, judged by questions that were held
 * back, and stored closer to its adapter where it does not agree.
 */
import type { Adapter } from "../adapters/adapter.ts";
import type { Pack } from "../core/pack.ts";
import { parseTaskFile } from "../core/task-file.ts";
import { BackendError, FormatError, TaskError } from "../errors.ts";
import { encodeTaskFile } from "../format/encode.ts";
import type { TaskToWrite } from "../format/layout.ts";
import { projectAdapters, storedDtypes } from "../pack/add.ts";
import { DEFAULT_ERROR } from "../pack/allocate.ts";
import { taskAdapter } from "../pack/expand.ts";
import type { BuildOptions } from "../pack/recipe.ts";
import { storedTask } from "../pack/write.ts";
import type { Session } from "../session/session.ts";
import { fromBase64, toBase64 } from "../text.ts";
import { askAdapter } from "./answers.ts";
import { supervisionOf } from "./create-trainer.ts";
import { distillable, distilTask } from "./distill.ts";
import { MeanDivergence } from "./probabilities.ts";
import { MOST_MADE, seen, type Taught, type TeachOptions, taughtBy } from "./taught.ts";

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
  /**
   * About how long it may take. Steps are as many as that allows, 240 at most. Default: 10, or a quarter of a minute for each task where that
   * is more.
   */
  readonly minutes?: number | undefined;
  /** Steps of each task, instead of as many as time allows. */
  readonly steps?: number | undefined;
  /** Called when there is something new to say of a task. */
  readonly onProgress?: ((progress: ByAnswersProgress) => void) | undefined;
  /** Where outcomes are kept, so that a call that was stopped goes on: by a key that holds all they depend on but the model and questions. */
  readonly finished?: FinishedOutcomes | undefined;
}

/** How far `packByAnswers` is. */
export interface ByAnswersProgress {
  /**
   * How long all will take is found out with one task, sizes are tried on some, then all tasks are distilled for the one that was chosen.
   */
  readonly stage: "planning" | "trying" | "distilling";
  readonly task: string;
  readonly done: number;
  readonly of: number;
}

/** What is finished, by key: JSON. */
export interface FinishedOutcomes {
  /** @returns undefined for what was never written */
  read(key: string): Promise<string | undefined>;
  write(key: string, json: string): Promise<void>;
  /** Names an entry in messages: the path of its file. Default: the key. */
  nameOf?(key: string): string;
}

/** What became of a task. */
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

/** What became of a task, with what it is stored as. */
export interface Outcome extends AnsweringTask {
  /** Task file. */
  readonly file: Uint8Array<ArrayBuffer>;
}

/** An open pack that tasks are distilled in, with a session that can be trained. */
export interface Open {
  readonly pack: Pack;
  readonly session: Session;
}

/** Steps that training may take. */
const TRAINING = [240, 200, 160, 120, 80, 48, 24, 0] as const;
/** Most steps where a size is tried. */
const TRYING = 48;
/** Answers that differ after so few steps ÷ those that do after all: as the root of KL, which is 1.5 times as large (docs/research/learning.md). */
const MORE_DIFFER = 1.2;
/** Shares of ΔW that a task may lose that is stored closer, down to what it loses in a pack without a model. */
const CLOSER = [0.45, 0.3, 0.2, DEFAULT_ERROR] as const;
/** The share of the time that may be planned with. */
const PLANNED = 0.92;
/** Steps that tell how long one takes. */
const PROBED = 8;
/**
 * A word's tokens are foreseen from each other, those of a text even more, so that the same agreement says less of them. Of twenty skills
 * of SmolLM2, three that agreed in 97.0 to 97.6 % of answers' tokens had 3 points fewer answers right, six above 99 % had 0.3.
 */
const DEFAULT_AGREEMENT = { labels: 0.96, answers: 0.98, texts: 0.99 };
/** Minutes by default: for all tasks, or for each where there are many. */
const MINUTES = { all: 10, each: 0.25 };

/** Brings tasks close to the answers of their adapters. */
export class Answering {
  readonly #options: ByAnswersOptions;
  readonly #minutes: number;
  readonly #until: number;
  /** Answers of adapters by id, with the steps that they are for: each is asked once, as long as it is not done. */
  readonly #taught = new Map<string, Taught & { readonly steps: number }>();
  readonly #outcomes = new Map<string, Outcome>();
  /** Why tasks cannot be distilled, by id. */
  readonly #refused = new Map<string, string>();
  #steps: number | undefined;
  /** How long a question takes, in milliseconds. */
  #question = 0;

  constructor(options: ByAnswersOptions) {
    this.#options = options;
    this.#steps = options.steps;
    const { all, each } = MINUTES;
    this.#minutes = options.minutes ?? Math.max(all, each * options.adapters.length);
    this.#until = performance.now() + 60_000 * this.#minutes;
  }

  /** Steps of each task, once they are planned. */
  get steps(): number {
    return this.#steps ?? 0;
  }

  /** Whether the model answers token by token. */
  asksTokens({ session }: Open): boolean {
    return supervisionOf(session, this.#questions).tokens;
  }

  /** Whether what is not done must be left. */
  get late(): boolean {
    return this.#options.signal?.aborted === true || performance.now() > this.#until;
  }

  /** Why no task could be distilled, if none could. */
  get refused(): readonly string[] {
    return this.#outcomes.size > 0 ? [] : [...this.#refused.values()];
  }

  /**
   * Decides how many steps there is time for, by how long one task takes now.
   * @param tried tasks that will be distilled in trying sizes before all are
   */
  async plan(level: Open, tried: number = 0): Promise<void> {
    const { finished, adapters, steps } = this.#options;
    if (steps !== undefined) return;
    // A call that goes on takes as many.
    const key = `steps in ${this.#minutes} minutes for ${adapters.length} tasks, with ${tried} tried before`;
    const known = await finished?.read(key);
    const planned =
      known === undefined ? await this.#unlessStopped(this.#planned(level, tried), undefined) : Number(known);
    if (planned === undefined) return;
    this.#steps = planned;
    if (known === undefined) await finished?.write(key, String(planned));
  }

  async #planned(level: Open, tried: number): Promise<number | undefined> {
    const { adapters, texts, examples } = this.#options;
    const adapter = await this.#askedFirst(level);
    if (!adapter) return undefined;
    const { judges } = await this.#teach(level, adapter);
    const began = performance.now();
    let [first, last] = [0, 0];
    const onStep = (): void => {
      last = performance.now();
      first ||= last;
    };
    await this.#distil(level, adapter, PROBED, onStep);
    const fixed = first - began;
    const each = (last - first) / (PROBED - 1);
    const left = PLANNED * (this.#until - performance.now());
    // Few steps see few questions.
    const asked = (steps: number): number => Math.min((texts ?? examples)?.length ?? MOST_MADE, seen(steps));
    // An adapter that was asked enough is not asked again.
    const isKnown = ({ id }: Adapter, steps: number): boolean => {
      const taught = this.#taught.get(id);
      return taught !== undefined && asked(taught.steps) >= asked(steps);
    };
    const asking = (steps: number): number =>
      adapters.filter((one) => !isKnown(one, steps)).length * this.#question * (asked(steps) + judges.length);
    const takes = (steps: number): number =>
      asking(steps) + adapters.length * (fixed + steps * each) + tried * (fixed + Math.min(steps, TRYING) * each);
    const found = TRAINING.find((steps) => takes(steps) <= left) ?? 0;
    for (const one of adapters) if (!isKnown(one, found)) this.#taught.delete(one.id);
    return found;
  }

  /** An adapter that can be distilled, asked some questions, which tell how long one takes. */
  async #askedFirst(level: Open): Promise<Adapter | undefined> {
    const { adapters } = this.#options;
    const unasked = adapters.filter(({ id }) => !this.#taught.has(id));
    for (const adapter of new Set([...unasked, ...adapters])) {
      this.tell("planning", adapter.id, 0, 1);
      const isNew = !this.#taught.has(adapter.id);
      const started = performance.now();
      const taught = await this.#unlessRefused(adapter, this.#teach(level, adapter, PROBED));
      if (!taught) continue;
      if (isNew) this.#question = (performance.now() - started) / (taught.train.length + taught.judges.length);
      return adapter;
    }
    return undefined;
  }

  /** What work gives; undefined where the task cannot be distilled, and why is known then. */
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

  /** What work gives; `otherwise` where the caller's signal ended it. */
  async #unlessStopped<T>(work: Promise<T>, otherwise: T): Promise<T> {
    return work.catch((cause: unknown) => {
      if (!this.#options.signal?.aborted) throw cause;
      return otherwise;
    });
  }

  /** What becomes of all tasks. */
  async all(level: Open): Promise<Outcome[]> {
    const { adapters } = this.#options;
    const outcomes: Outcome[] = [];
    for (const adapter of adapters) {
      this.tell("distilling", adapter.id, outcomes.length, adapters.length);
      outcomes.push(await this.#outcome(level, adapter, this.steps));
      // Answers of all adapters would be the most that is held.
      this.#taught.delete(adapter.id);
    }
    this.tell("distilling", adapters.at(-1)!.id, adapters.length, adapters.length);
    return outcomes;
  }

  tell(stage: ByAnswersProgress["stage"], task: string, done: number, of: number): void {
    this.#options.onProgress?.({ stage, task, done, of });
  }

  /** @param steps that are planned */
  async #teach({ session }: Open, adapter: Adapter, steps: number = this.steps): Promise<Taught> {
    const known = this.#taught.get(adapter.id);
    if (known) return known;
    const task = await distillable(session, adapter.id);
    const taught = { ...(await taughtBy(session, adapter, task, { ...this.#questions, steps })), steps };
    this.#taught.set(adapter.id, taught);
    return taught;
  }

  get #questions(): TeachOptions {
    const { encode, texts, examples, end, decoderStart, seed, signal } = this.#options;
    return { encode, texts, examples, end, decoderStart, seed, signal };
  }

  async #distil(level: Open, adapter: Adapter, steps: number, onStep?: () => void) {
    const { session } = level;
    const taught = await this.#teach(level, adapter);
    return distilTask(session, adapter, await distillable(session, adapter.id), taught, {
      ...this.#questions,
      steps,
      onStep,
    });
  }

  /** What is expected to become of a task, from fewer steps. */
  tried(level: Open, adapter: Adapter): Promise<Outcome> {
    const all = this.steps <= TRYING;
    return this.#outcome(level, adapter, all ? this.steps : TRYING, all ? 1 : MORE_DIFFER);
  }

  /** @param differ times the share of answers that may differ */
  async #outcome(level: Open, adapter: Adapter, steps: number, differ: number = 1): Promise<Outcome> {
    const { finished, agreement, bytes, seed, end, decoderStart } = this.#options;
    const { id, file, byteLength, metadata } = adapter;
    const asked = { agreement, bytes, seed, end, decoderStart };
    const key = JSON.stringify([level.pack.basisId, id, file, byteLength, metadata, steps, differ, asked]);
    const known = this.#outcomes.get(key) ?? outcomeOf(await finished?.read(key), finished?.nameOf?.(key) ?? key);
    if (known) {
      this.#outcomes.set(key, known);
      return known;
    }
    if (this.late) return this.#undistilled(level, adapter);
    const judged = this.#unlessRefused(adapter, this.#judged(level, adapter, steps, differ));
    const outcome = await this.#unlessStopped(judged, undefined);
    if (!outcome) return { ...(await this.#undistilled(level, adapter)), reason: this.#refused.get(adapter.id) };
    this.#outcomes.set(key, outcome);
    await finished?.write(key, written(outcome));
    return outcome;
  }

  async #judged(level: Open, adapter: Adapter, steps: number, differ: number): Promise<Outcome> {
    const { bytes: most, agreement } = this.#options;
    const { asked } = await this.#teach(level, adapter);
    const wanted = agreement ?? (most === undefined ? DEFAULT_AGREEMENT[asked] : 0);
    const least = 1 - differ * (1 - wanted);
    const { id, file, kept, agreement: found } = await this.#distil(level, adapter, steps);
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
