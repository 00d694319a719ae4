/**
 * `eigenlora/transformers`: a pack on a pipeline of transformers.js 4. The pipeline's sessions are replaced by ones that
 * switch tasks; the pipeline stays what it is, and so do its tokenizer, generation and post-processing. Nothing of
 * transformers.js or onnxruntime is imported here: both are reached through the pipeline.
 */
import { checkOptions, checkPack, described } from "../src/arguments.ts";
import type { Pack, TaskInfo } from "../src/core/pack.ts";
import { copySelection, type Selection, Switching } from "../src/core/selection.ts";
import { checkEach } from "../src/session/group.ts";
import { SESSION_OPTIONS } from "../src/session/options.ts";
import type { SourceInput } from "../src/source.ts";
import type {
  EigenSession,
  EigenSessionOptions,
  MemoryReport,
  SessionSwitchOptions,
  SessionSwitchReport,
} from "./onnxruntime.ts";
import {
  byName,
  type Find,
  finder,
  foundOnly,
  HeldPipeline,
  ignoredByAll,
  isId,
  labelsOf,
  makeOurs,
  type OwnSessions,
  type PipelineModel,
  type PipelineOrt,
  type PipelineSession,
  type Rest,
  refuseOther,
  releaseAll,
  remake,
  shownOf,
  staged,
  standIn,
  type TransformersPipeline,
  type Whole,
} from "./pipeline.ts";

export type { PipelineModel, PipelineOrt, PipelineSession, TransformersPipeline };

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
  /** Options of one session, by the pipeline's name for it, in place of those of all. */
  each?: Readonly<Record<string, Omit<EigenSessionOptions<PipelineOrt>, "trainable">>> | undefined;
  /**
   * Options that were given to `pipeline()` and say where an id's files are or how to run them: `revision`,
   * `subfolder`, `model_file_name`, `cache_dir`, `session_options`, … `device` and `dtype` are known; a `dtype` by part
   * is needed here where the files that one part's type names are not all there.
   */
  pretrained?: Readonly<Record<string, unknown>> | undefined;
  /** The class `Tensor` of transformers.js, where nothing of the pipeline makes any. */
  Tensor?: (abstract new (...of: never[]) => object) | undefined;
}

const OPTIONS = [...SESSION_OPTIONS, "session", "model", "part", "each", "pretrained", "Tensor"] as const;

/**
 * Puts a pack on a pipeline: `pipe` answers as before, until `switchTask`. Call it while no call of `pipe` is running;
 * calls made meanwhile wait. In browsers, no other pipeline must run meanwhile either: onnxruntime-web cannot overlap
 * runs, and the parity probe is one (`probe: false` leaves it out).
 *
 * The model is loaded again, with the components inside; an encoder and its decoder each with the modules that live
 * there. By id, transformers.js finds the files as it did before: a path in Node, its cache in browsers. This costs the
 * time to load the model once more, and the memory of both, the pipeline's own sessions and ours, until its own are
 * released.
 *
 * The pack stays the caller's: close it after `close` or `pipe.dispose()`.
 *
 * @throws TypeError when `pipe` is no pipeline, when it has a pack already, when `model` is another model, or one file for
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
  // Options are checked before anything of the pipeline is given up.
  checkOptions("attachPack", options ?? {}, OPTIONS);
  const { model, part, each = {}, pretrained = {}, Tensor, ...rest } = options ?? {};
  if (model === undefined) {
    const what = "pass { model }, the id as given to pipeline(), or the ONNX file";
    throw new TypeError(`attachPack: a pipeline does not keep its model; ${what}`);
  }
  const names = sessionNames(pipe, part);
  refuseForSeveral(names, model, rest);
  checkEach("attachPack", each, names, [...SESSION_OPTIONS, "session"]);
  const ort = { Tensor: tensorClass(pipe, Tensor), env: ENV };
  const loading = { ...(rest.onProgress && { progress_callback: staged(rest.onProgress) }), ...pretrained };
  const held = new HeldPipeline(pipe, pack.name);
  try {
    return await held.queue.alone(async () => {
      const own = ownSessions(pipe.model, names);
      const [{ constructor }] = own.values() as Iterable<PipelineSession> as [PipelineSession];
      const found = isId(model) ? await finder(pipe.model, own, model, loading)() : foundOnly(own, model);
      const find = isId(model) ? finder(pipe.model, own, model, pretrained) : undefined;
      const shown = new Map([...own].map(([name, session]) => [name, shownOf(session)]));
      const whole = await makeOurs({ ...ort, InferenceSession: constructor as never }, found, pack, rest, each);
      const sessions = byName(names, whole);
      const replaced = new Map([...own].filter(([name]) => sessions[name]));
      try {
        for (const name of replaced.keys()) refuseOther(sessions[name]!, shown.get(name)!);
        await releaseAll(pipe.model, replaced, find);
      } catch (error) {
        await whole.close();
        throw error;
      }
      const ignore = ignoredByAll([...replaced.keys()], rest.ignore, each);
      const attached = new AttachedPack({ pipe, whole, sessions, held, replaced, find, ignore });
      const release = (): Promise<void> => attached.release();
      for (const name of replaced.keys())
        pipe.model.sessions[name] = standIn(shown.get(name)!, sessions[name]!, release);
      return attached;
    });
  } catch (error) {
    held.free();
    throw error;
  }
}

interface Parts {
  pipe: TransformersPipeline;
  whole: Whole;
  sessions: Readonly<Record<string, EigenSession<PipelineOrt>>>;
  held: HeldPipeline;
  /** The pipeline's own sessions that ours replace, released: each tells what to make another of. */
  replaced: OwnSessions;
  /** Finds the model again, where it was given by id. */
  find: Find | undefined;
  ignore: readonly string[] | undefined;
}

/** A pack on a pipeline. Made by `attachPack`. */
export class AttachedPack extends Switching<SessionSwitchReport> {
  /**
   * Sessions that the pipeline runs now, by its names for its sessions; those in which nothing of the pack lives are not here. For
   * reading, `addTask` (on any of them, for all), and `run` with one task per row; a task switched to here instead of by
   * `switchTask` does not bring its labels, and does not wait for calls.
   */
  readonly sessions: Readonly<Record<string, EigenSession<PipelineOrt>>>;
  readonly #parts: Parts;
  #closed = false;
  /** True if the pipeline was disposed of, and our sessions with it. */
  #disposed = false;

  /** @internal */
  constructor(parts: Parts) {
    super();
    this.sessions = parts.sessions;
    this.#parts = parts;
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

  /** The selection that calls of the pipeline now belong to. */
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
   * all sessions. A cache of keys and values that is handed from one `generate` to the next belongs to the task that made it:
   * under another one `generate` refuses it with a TaskError, unless the switch was asked to keep it (`keepCache: true`).
   * @throws as `EigenSession.switchTask`
   */
  switchTask(selection: Selection, options: SessionSwitchOptions = {}): Promise<SessionSwitchReport> {
    const { whole, held, ignore } = this.#parts;
    const asked = copySelection(selection);
    const change = async (): Promise<SessionSwitchReport> => {
      const labels = await labelsOf(whole.pack, asked, options.head, ignore);
      const report = await whole.switchTask(asked, options);
      held.labels.set(labels);
      return report;
    };
    return held.queue.alone(() => this.switching(asked, change));
  }

  /** @internal */
  override heard(type: string): void {
    if (type === "devicelost")
      this.#parts.whole.addEventListener(type, ({ detail }) => this.tell("devicelost", detail), { once: true });
  }

  /** Resident bytes that come on top of what the pipeline's own sessions hold. */
  memory(): MemoryReport {
    return this.#parts.whole.memory();
  }

  /**
   * Gives the pipeline its own sessions, labels and methods back, after the calls that are running, and releases ours.
   * Its sessions are made anew, from the id.
   * @throws BackendError when `model` was a file, which is not kept: dispose of the pipeline instead. Nothing has changed then
   * @throws SourceError when the model's files are not found any more
   */
  close(): Promise<void> {
    const { pipe, whole, held, replaced, find } = this.#parts;
    return held.queue.alone(async () => {
      if (this.#closed) return;
      // A pipeline that was disposed of has no use for sessions.
      const own = this.#disposed ? new Map<string, PipelineSession>() : await remake(replaced, find);
      for (const [name, session] of own) pipe.model.sessions[name] = session;
      this.#closed = true;
      held.labels.set("base");
      held.free();
      await whole.close();
    });
  }

  /** @internal The pipeline is disposed of. */
  release(): Promise<void> {
    this.#disposed = true;
    return this.#parts.whole.close();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

/**
 * A pipeline does not tell which onnxruntime it has. Taking turns, as onnxruntime-web must, is right for all of them.
 */
const ENV = { versions: { web: "of transformers.js" } };

/** Names of the sessions that the pack may be in: the one that was named, or all. */
function sessionNames(pipe: TransformersPipeline, part: string | undefined): readonly string[] {
  const { sessions, config } = (pipe as Partial<TransformersPipeline> | undefined)?.model ?? {};
  if (typeof sessions !== "object" || !sessions || typeof config !== "object" || !config) {
    const what = "a pipeline of transformers.js 4, as `await pipeline(…)` gives it";
    throw new TypeError(`attachPack: the first argument must be ${what}`);
  }
  const names = Object.keys(sessions);
  if (part !== undefined && !names.includes(part)) {
    throw new TypeError(`part: the model has the sessions ${quoted(names)}, got ${JSON.stringify(part)}`);
  }
  if (names.length === 0) throw new TypeError("attachPack: the pipeline's model has no sessions");
  return part === undefined ? names : [part];
}

/**
 * The pipeline's own sessions, by name.
 * @throws TypeError when something else has replaced one
 */
function ownSessions(model: PipelineModel, names: readonly string[]): OwnSessions {
  return new Map(
    names.map((name) => {
      const session = model.sessions[name] as PipelineSession;
      if (typeof (session.constructor as { create?: unknown }).create === "function") return [name, session];
      throw new TypeError(`attachPack: the session "${name}" is not onnxruntime's own; something else has replaced it`);
    }),
  );
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

// The class of tensors of the onnxruntime that a pipeline of transformers.js runs. What runs return is of another class where
// that package is there twice. Part of `eigenlora/transformers`, without an entry of its own.

type TensorClass = PipelineOrt["Tensor"];

/** A tensor of transformers.js, around one of onnxruntime. */
interface Wrapped {
  readonly ort_tensor?: object | undefined;
}

const OWN = '`Tensor` of "@huggingface/transformers"';

/**
 * @param given transformers.js's own class, or onnxruntime's
 * @throws TypeError when it is neither
 */
function tensorClass(pipe: TransformersPipeline, given: unknown): TensorClass {
  return given === undefined ? shownBy(pipe) : within(given);
}

function within(given: unknown): TensorClass {
  let cause: unknown;
  try {
    const made = new (given as new (...of: unknown[]) => Wrapped & { readonly dims?: unknown })(
      "float32",
      new Float32Array(1),
      [1],
    ) as Wrapped & {
      readonly dims?: unknown;
    };
    const inner = made.ort_tensor?.constructor;
    if (inner) return inner as TensorClass;
    // An array of numbers has no dimensions, a tensor of another library no such argument.
    if (Array.isArray(made.dims) && made.dims.join() === "1") return given as TensorClass;
  } catch (error) {
    cause = error;
  }
  const name = typeof given === "function" && given.name ? `"${given.name}"` : described(given);
  throw new TypeError(`attachPack: Tensor: expected the class ${OWN}, got ${name}`, { cause });
}

/** The class of what the pipeline makes: its tokenizer, or the model where it begins a text. */
function shownBy({ tokenizer, model }: TransformersPipeline): TensorClass {
  const tokenize = tokenizer as ((text: string) => { input_ids?: Wrapped }) | null | undefined;
  const begin = (model as PipelineModel & { _prepare_decoder_input_ids_for_generation?: Beginning })
    ._prepare_decoder_input_ids_for_generation;
  const ways: (() => Wrapped | undefined)[] = [
    // No text at all: any other may hold words that a small vocabulary lacks.
    () => tokenize?.("").input_ids,
    // Pictures have no tokenizer. Nothing runs here: it is one number as a tensor.
    () => begin?.call(model, { batch_size: 1, model_kwargs: {}, decoder_start_token_id: 0 }).input_ids,
  ];
  let cause: unknown;
  for (const way of ways) {
    try {
      const Tensor = way()?.ort_tensor?.constructor;
      if (Tensor) return Tensor as TensorClass;
    } catch (error) {
      cause ??= error;
    }
  }
  const message = `attachPack: nothing of the pipeline shows onnxruntime's class of tensors; pass { Tensor }, ${OWN}`;
  throw new TypeError(message, cause === undefined ? undefined : { cause });
}

type Beginning = (options: object) => { readonly input_ids: Wrapped };
