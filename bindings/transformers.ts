/**
 * `eigenlora/transformers`: a pack on a pipeline of transformers.js 4. The pipeline's sessions are replaced by ones that
 * switch tasks; the pipeline stays what it is, and so do its tokenizer, generation and post-processing. Nothing of
 * transformers.js or onnxruntime is imported here: both are reached through the pipeline.
 */
import { checkChoice, checkOptions, checkPack } from "../src/arguments.ts";
import type { Pack, TaskInfo } from "../src/pack/pack.ts";
import { copySelection, type Selection } from "../src/runtime/selection.ts";
import { hold } from "../src/session/hold.ts";
import { type Labels, labelsOf } from "../src/session/labels.ts";
import { SESSION_OPTIONS } from "../src/session/options.ts";
import { Turns } from "../src/session/turns.ts";
import type { SourceInput } from "../src/source.ts";
import type {
  EigenSession,
  EigenSessionOptions,
  MemoryReport,
  SessionSwitchReport,
  SwitchOptions,
} from "./onnxruntime.ts";
import {
  type Find,
  finder,
  isId,
  type OwnSessions,
  type PipelineModel,
  type PipelineOrt,
  type PipelineSession,
  remake,
} from "./transformers-model.ts";
import {
  byName,
  foundOnly,
  makeOurs,
  type Rest,
  refuseOther,
  releaseAll,
  shownOf,
  standIn,
  type Whole,
} from "./transformers-sessions.ts";

export type { PipelineModel, PipelineOrt, PipelineSession };

/** What `pipeline()` of transformers.js gives, as far as it is needed here. */
export interface TransformersPipeline {
  readonly model: PipelineModel;
  readonly tokenizer?: unknown;
}

/** Options of `attachPack`. */
export interface AttachOptions extends EigenSessionOptions<PipelineOrt> {
  /**
   * The pipeline's model: its id as given to `pipeline()`, or path, URL, Blob or bytes of its ONNX file. A string that
   * ends in ".onnx" or begins with "https:" or the like is a file, any other an id.
   */
  model: SourceInput;
  /**
   * The one of the model's sessions that runs the adapted layers, all of them. Default: every session in which modules of
   * the pack live, by their fingerprints or whole names; the others are left alone.
   */
  part?: string | undefined;
  /**
   * What becomes of the pipeline's own sessions that ours replace. Default: "release", they go once ours are made, so
   * that for a moment both are in memory. "release-first": each goes before ours is made; when making ours fails, the
   * pipeline is of no use any more. "keep": they stay in memory for `close`.
   */
  original?: "release" | "release-first" | "keep" | undefined;
  /**
   * Options that were given to `pipeline()` and say where an id's files are or how to run them: `revision`,
   * `subfolder`, `model_file_name`, `cache_dir`, `session_options`, … `device` and `dtype` are known; a `dtype` by part
   * is needed here where the files that one part's type names are not all there.
   */
  pretrained?: Readonly<Record<string, unknown>> | undefined;
  /** The class `Tensor` of the pipeline's onnxruntime, where no tokenizer makes any. */
  Tensor?: PipelineOrt["Tensor"] | undefined;
}

const OPTIONS = [...SESSION_OPTIONS, "session", "model", "part", "original", "pretrained", "Tensor"] as const;

/** Models that have a pack. */
const attached = new WeakSet<object>();

/**
 * Puts a pack on a pipeline: `pipe` answers as before, until `switchTask`. Call it while no call of `pipe` is running;
 * calls made meanwhile wait. In browsers, no other pipeline must run meanwhile either: onnxruntime-web cannot overlap
 * runs, and the parity probe is one (`probe: false` leaves it out).
 *
 * The model is loaded again, with the components inside; an encoder and its decoder each with the modules that live
 * there. By id, transformers.js finds the files as it did before: a path in Node, its cache in browsers. This costs the
 * time to load the model once more and, unless `original` is "release-first", the memory of both, the pipeline's own
 * sessions and ours, until its own are released.
 *
 * The pack stays the caller's: close it after `close` or `pipe.dispose()`.
 *
 * @throws TypeError when `pipe` is no pipeline or has a pack already, when `model` is another model, or one file for
 *   several sessions without `part`
 * @throws SourceError when the model's files are not found again: the message says what to pass
 * @throws as `createEigenSession`: BaseMismatchError for another base, BackendError when onnxruntime refuses the model;
 *   as `createEigenSessions` for several sessions: BaseMismatchError when a module lives in none of them
 * @example
 * const pipe = await pipeline("text-classification", "minilm", { dtype: "fp16" });
 * const pack = await openPack("tasks.eigen");
 * const tasks = await attachPack(pipe, pack, { model: "minilm" });
 * await tasks.switchTask("debtags-role");
 * console.log(await pipe("a graphical editor for images"));
 * await pipe.dispose();
 * await pack.close();
 */
export async function attachPack(
  pipe: TransformersPipeline,
  pack: Pack,
  options: AttachOptions,
): Promise<AttachedPack> {
  checkPack("attachPack", pack);
  // Before anything of the pipeline is given up.
  checkOptions("attachPack", options ?? {}, OPTIONS);
  const { model, part, original = "release", pretrained = {}, Tensor, ...rest } = options ?? {};
  if (model === undefined) {
    const what = "pass { model }, the id as given to pipeline(), or the ONNX file";
    throw new TypeError(`attachPack: a pipeline does not keep its model; ${what}`);
  }
  checkChoice("original", original, ["release", "release-first", "keep"]);
  const own = ownSessions(pipe, part);
  refuseForSeveral([...own.keys()], model, rest);
  const [[, { constructor }]] = own as unknown as [[string, PipelineSession]];
  const ort: PipelineOrt = { InferenceSession: constructor as never, Tensor: Tensor ?? tensorClass(pipe), env: ENV };
  const held = holdCalls(pipe);
  try {
    return await held.turns.change(async () => {
      const find = isId(model) ? finder(pipe.model, own, model, pretrained) : undefined;
      const shown = shownOf(own);
      const found = (await find?.()) ?? foundOnly(own, model);
      const whole = await makeOurs(ort, found, pack, rest, original === "release-first" ? own : undefined);
      const sessions = byName([...own.keys()], whole);
      const replaced = new Map([...own].filter(([name]) => sessions[name]));
      const kept = original === "keep";
      try {
        for (const name of replaced.keys()) refuseOther(sessions[name]!, shown.get(name)!);
        if (original === "release") await releaseAll(pipe.model, replaced, find);
      } catch (error) {
        await whole.close();
        throw error;
      }
      for (const [name, session] of replaced)
        pipe.model.sessions[name] = standIn(shown.get(name)!, sessions[name]!, whole, kept ? session : undefined);
      return new AttachedPack({ pipe, whole, sessions, held, replaced, kept, find, ignore: rest.ignore });
    });
  } catch (error) {
    held.free();
    throw error;
  }
}

// What stays as long as the pack is attached is made by functions of their own: a closure keeps whatever the function
// around it has given to any closure, and that must not be the model's bytes.

/** The calls of a pipeline, in turns with switches. */
interface HeldCalls {
  readonly turns: Turns;
  /** Gives the pipeline its methods back. */
  free(): void;
}

function holdCalls(pipe: TransformersPipeline): HeldCalls {
  const turns = new Turns();
  const enter: Turns["call"] = (work) => turns.call(work);
  attached.add(pipe.model);
  const inner = hold(pipe.model, ["_call", "forward", "generate"], enter);
  const outer = hold(pipe, ["_call"], enter, { model: inner.inside });
  return {
    turns,
    free() {
      outer.free();
      inner.free();
      attached.delete(pipe.model);
    },
  };
}

interface Parts {
  pipe: TransformersPipeline;
  whole: Whole;
  sessions: Readonly<Record<string, EigenSession<PipelineOrt>>>;
  held: HeldCalls;
  /** The pipeline's own sessions that ours replace, and whether they were kept. */
  replaced: OwnSessions;
  kept: boolean;
  /** Finds the model again, where it was given by id. */
  find: Find | undefined;
  ignore: readonly string[] | undefined;
}

/** A pack on a pipeline. Made by `attachPack`. */
export class AttachedPack {
  /**
   * What the pipeline runs now, by its names for its sessions; those in which nothing of the pack lives are not here. For
   * reading, `addTask` (on any of them, for all), and `run` with one task per row; a task switched to here instead of by
   * `switchTask` does not bring its labels, and does not wait for calls.
   */
  readonly sessions: Readonly<Record<string, EigenSession<PipelineOrt>>>;
  readonly #parts: Parts;
  readonly #labels: ConfigLabels;
  #closed = false;

  /** @internal */
  constructor(parts: Parts) {
    this.sessions = parts.sessions;
    this.#parts = parts;
    this.#labels = new ConfigLabels(parts.pipe.model.config);
  }

  /**
   * The session that runs the adapted layers, where it is one.
   * @throws TypeError where there are several: see `sessions`
   */
  get session(): EigenSession<PipelineOrt> {
    const [[, only], ...others] = Object.entries(this.sessions) as [[string, EigenSession<PipelineOrt>]];
    if (others.length === 0) return only;
    const names = quoted(Object.keys(this.sessions));
    throw new TypeError(`session: the pack is on several sessions, ${names}; take one of \`sessions\``);
  }

  /** What calls of the pipeline now belong to. */
  get task(): Selection {
    return this.#parts.whole.task;
  }

  /** The pack's tasks by id, with their metadata. */
  get tasks(): ReadonlyMap<string, TaskInfo> {
    return this.#parts.whole.tasks;
  }

  /**
   * Makes a task, a blend or the pristine base active, with its label names in `pipe.model.config`. Waits for calls of
   * the pipeline, of its model and of `generate` that are running, so that each belongs to one task from its first run
   * to its last; calls made after wait for the switch. When it fails or is aborted, the previous task stays whole, in
   * all sessions. A cache of keys and values that is handed from one `generate` to the next belongs to the task that made it.
   * @throws as `EigenSession.switchTask`
   */
  switchTask(selection: Selection, options: SwitchOptions = {}): Promise<SessionSwitchReport> {
    const { whole, held, ignore } = this.#parts;
    const asked = copySelection(selection);
    return held.turns.change(async () => {
      const labels = await labelsOf(whole.pack, asked, options.head, ignore);
      const report = await whole.switchTask(asked, options);
      this.#labels.set(labels);
      return report;
    });
  }

  /** Resident bytes that come on top of what the pipeline's own sessions hold. */
  memory(): MemoryReport {
    return this.#parts.whole.memory();
  }

  /**
   * Gives the pipeline its own sessions, labels and methods back, after the calls that are running, and releases ours.
   * Sessions that were not kept are made anew, from the id.
   * @throws BackendError when they were not kept and `model` was a file: pass `original: "keep"` to `attachPack`, or
   *   dispose of the pipeline. Nothing has changed then
   * @throws SourceError when the model's files are not found any more
   */
  close(): Promise<void> {
    const { pipe, whole, held, replaced, kept, find } = this.#parts;
    return held.turns.change(async () => {
      if (this.#closed) return;
      const own = kept ? replaced : await remake(replaced, find);
      for (const [name, session] of own) pipe.model.sessions[name] = session;
      this.#closed = true;
      this.#labels.set("base");
      held.free();
      await whole.close();
    });
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

/** The label names in a model's configuration. */
class ConfigLabels {
  readonly #config: Record<string, unknown>;
  readonly #own: Readonly<Record<string, unknown>>;

  constructor(config: object) {
    this.#config = config as Record<string, unknown>;
    const { id2label, label2id, num_labels } = this.#config;
    this.#own = { id2label, label2id, num_labels };
  }

  set(labels: Labels): void {
    const named = (names: readonly string[]): object => ({
      id2label: Object.fromEntries(names.entries()),
      label2id: Object.fromEntries(names.map((name, id) => [name, id])),
      num_labels: names.length,
    });
    // Without names, transformers.js says LABEL_0, LABEL_1, …
    const numbered = { id2label: undefined, label2id: undefined, num_labels: undefined };
    Object.assign(this.#config, labels === "base" ? this.#own : labels === "numbered" ? numbered : named(labels));
  }
}

/**
 * A pipeline does not tell which onnxruntime it has. Taking turns, as onnxruntime-web must, is right for all of them.
 */
const ENV = { versions: { web: "of transformers.js" } };

/** The sessions that the pack may be in: the one that was named, or all. */
function ownSessions(pipe: TransformersPipeline, part: string | undefined): OwnSessions {
  const sessions = (pipe as Partial<TransformersPipeline> | undefined)?.model?.sessions;
  if (typeof sessions !== "object" || sessions === null) {
    const what = "a pipeline of transformers.js 4, as `await pipeline(…)` gives it";
    throw new TypeError(`attachPack: the first argument must be ${what}`);
  }
  if (attached.has(pipe.model)) throw new TypeError("attachPack: the pipeline's model has a pack; close that first");
  const names = Object.keys(sessions);
  if (part !== undefined && !names.includes(part)) {
    throw new TypeError(`part: the model has the sessions ${quoted(names)}, got ${JSON.stringify(part)}`);
  }
  const own = new Map<string, PipelineSession>();
  for (const name of part === undefined ? names : [part]) {
    const session = sessions[name] as PipelineSession;
    if (typeof (session.constructor as { create?: unknown }).create !== "function") {
      throw new TypeError(`attachPack: the session "${name}" is not onnxruntime's own; something else has replaced it`);
    }
    own.set(name, session);
  }
  if (own.size === 0) throw new TypeError("attachPack: the pipeline's model has no sessions");
  return own;
}

/** @throws TypeError for what only one session can be given */
function refuseForSeveral(names: readonly string[], model: SourceInput, { probe, trainable }: Rest): void {
  if (names.length === 1) return;
  const which = `the model has the sessions ${quoted(names)}`;
  if (!isId(model)) {
    throw new TypeError(
      `attachPack: ${which}, and \`model\` is one file: pass the id, or say whose file it is, { part }`,
    );
  }
  const option = trainable ? "trainable" : typeof probe === "object" ? "probe" : undefined;
  if (option) throw new TypeError(`attachPack: ${option}: ${which}; say which it is for, { part }`);
}

function quoted(names: readonly string[]): string {
  return names.map((name) => `"${name}"`).join(", ");
}

/** Of the onnxruntime in use; what runs return is of another class where the package is there twice. */
function tensorClass({ tokenizer }: TransformersPipeline): PipelineOrt["Tensor"] {
  const tokenize = tokenizer as ((text: string) => { input_ids?: { ort_tensor?: object } }) | null | undefined;
  let cause: unknown;
  try {
    // No text at all: any other may hold words that a small vocabulary lacks.
    const Tensor = tokenize?.("").input_ids?.ort_tensor?.constructor;
    if (Tensor) return Tensor as PipelineOrt["Tensor"];
  } catch (error) {
    cause = error;
  }
  const message = "attachPack: no tokenizer of the pipeline shows onnxruntime's class of tensors; pass { Tensor }";
  throw new TypeError(message, cause === undefined ? undefined : { cause });
}
