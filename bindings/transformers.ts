/**
 * `eigenlora/transformers`: a pack on a pipeline of transformers.js 4. The pipeline's sessions are replaced by ones
 * that switch tasks; the pipeline stays what it is, and so do its tokenizer, generation and post-processing. Nothing of
 * transformers.js or onnxruntime is imported here: both are reached through the pipeline.
 */
import type { Pack, TaskInfo } from "../src/core/pack.ts";
import { copySelection, type Selection, Switching } from "../src/core/selection.ts";
import { BackendError, BaseMismatchError, checkOptions, checkPack, described, SourceError } from "../src/errors.ts";
import { bringsOf, parseBrought } from "../src/format/format.ts";
import type { Progress } from "../src/progress.ts";
import { type EngineTensor, Queue } from "../src/session/engine.ts";
import { checkEach, type GroupFile, groupOf } from "../src/session/group.ts";
import { isIgnored } from "../src/session/match.ts";
import { SESSION_OPTIONS } from "../src/session/options.ts";
import { createSession } from "../src/session/session.ts";
import type { SourceInput } from "../src/source.ts";
import {
  createEngine,
  type EigenSession,
  type EigenSessionOptions,
  type EigenSessions,
  type MemoryReport,
  type Ort,
  type OrtSession,
  type OrtTypes,
  type SessionSwitchOptions,
  type SessionSwitchReport,
} from "./onnxruntime.ts";

/** A model of transformers.js, as far as it is needed here. */
export interface PipelineModel {
  /** Sessions of onnxruntime by the part of the model that they run, for most models one called "model". */
  readonly sessions: Record<string, unknown>;
  readonly config: object;
}

/** A session in a pipeline. */
export interface PipelineSession extends OrtSession {
  /** Added by transformers.js. */
  config?: { device?: string; dtype?: string } | undefined;
  run(
    feeds: Readonly<Record<string, EngineTensor>>,
    fetches: readonly string[] | Readonly<Record<string, EngineTensor | null>>,
    options?: object,
  ): Promise<Record<string, EngineTensor>>;
}

/** The onnxruntime that transformers.js runs. */
export interface PipelineOrt extends Ort {
  readonly InferenceSession: { create(model: Uint8Array, options?: object): Promise<PipelineSession> };
}

/** A pipeline of transformers.js, as far as it is needed here. */
export interface TransformersPipeline {
  readonly model: PipelineModel;
  readonly tokenizer?: unknown;
}

/** Options of one session of several, by its name. */
export type PipelineSessionOptions = Readonly<Record<string, Omit<EigenSessionOptions<PipelineOrt>, "trainable">>>;

/** Sessions of ours, by the pipeline's names. */
export type PipelineSessions = Readonly<Record<string, EigenSession<PipelineOrt>>>;

type Whole = EigenSession<PipelineOrt> | EigenSessions<PipelineOrt>;

/** Options of `attachPack`. */
export interface AttachOptions extends EigenSessionOptions<PipelineOrt> {
  /**
   * The pipeline's model: its id as given to `pipeline()`, or path, URL, Blob or bytes of its ONNX file. A string that
   * ends in ".onnx" or begins with "https:" or the like is a file, any other an id.
   */
  model: SourceInput;
  /**
   * The one of the model's sessions that runs the adapted layers, all of them. Default: every session in which modules
   * of the pack live, by their fingerprints or whole names; the others are left alone.
   */
  part?: string | undefined;
  /** Options of one session, by the pipeline's name for it, in place of those of all. */
  each?: PipelineSessionOptions | undefined;
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
 * @throws TypeError when `pipe` is no pipeline, when it has a pack already, when `model` is another model, or one file
 *   for several sessions without `part`
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
    const advice = "pass { model }, the id as given to pipeline(), or the ONNX file";
    throw new TypeError(`attachPack: a pipeline does not keep its model; ${advice}`);
  }
  const names = sessionNames(pipe, part);
  refuseForSeveral(names, model, rest);
  checkEach("attachPack", each, names, [...SESSION_OPTIONS, "session"]);
  const ort = { Tensor: tensorClass(pipe, Tensor), env: ENV };
  const { onProgress } = rest;
  const emit = (info: Partial<Progress>): void =>
    onProgress?.({ stage: "model", loaded: 0, total: 0, progress: 0, ...info } as Progress);
  const loading = { ...(onProgress && { progress_callback: emit }), ...pretrained };
  const held = holdPipeline(pipe, pack.name);
  try {
    return await held.queue.alone(async () => {
      const own = ownSessions(pipe.model, names);
      const [{ constructor }] = own.values() as Iterable<PipelineSession> as [PipelineSession];
      const found = isId(model) ? await finder(pipe.model, own, model, loading)() : foundOnly(own, model);
      const find = isId(model) ? finder(pipe.model, own, model, pretrained) : undefined;
      const shown = new Map([...own].map(([name, session]) => [name, shownOf(session)]));
      const whole = await makeSessions({ ...ort, InferenceSession: constructor as never }, found, pack, rest, each);
      // A single one has the first name.
      const sessions: PipelineSessions = "sessions" in whole ? whole.sessions : { [names[0]!]: whole };
      const replaced = new Map([...own].filter(([name]) => sessions[name]));
      try {
        for (const name of replaced.keys()) refuseOther(sessions[name]!, shown.get(name)!);
      } catch (error) {
        await whole.close();
        throw error;
      }
      const ignore = ignoredByAll([...replaced.keys()], rest.ignore, each);
      const attached = new AttachedPack({ pipe, whole, sessions, held, replaced, find, ignore });
      const release = (): Promise<void> => attached.release();
      for (const [name, session] of replaced) {
        pipe.model.sessions[name] = standIn(shown.get(name)!, sessions[name]!, release);
        // A session that cannot be released costs memory, not answers.
        await session.release().catch(() => undefined);
      }
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
  sessions: PipelineSessions;
  held: Held;
  /** The pipeline's own sessions that ours replace, released: each tells what to make another of. */
  replaced: OwnSessions;
  /** Finds the model again, where it was given by id. */
  find: Find | undefined;
  ignore: readonly string[] | undefined;
}

/** A pack on a pipeline. Made by `attachPack`. */
export class AttachedPack extends Switching<SessionSwitchReport> {
  /**
   * Sessions that the pipeline runs now, by its names for its sessions; those in which nothing of the pack lives are
   * not here. For reading, `addTask` (on any of them, for all), and `run` with one task per row; a task switched to
   * here instead of by `switchTask` does not bring its labels, and does not wait for calls.
   */
  readonly sessions: PipelineSessions;
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
   * all sessions. A cache of keys and values that is handed from one `generate` to the next belongs to the task that
   * made it: under another one `generate` refuses it with a TaskError, unless the switch was asked to keep it
   * (`keepCache: true`).
   * @throws as `EigenSession.switchTask`
   */
  switchTask(selection: Selection, options: SessionSwitchOptions = {}): Promise<SessionSwitchReport> {
    const { whole, held, ignore } = this.#parts;
    const requested = copySelection(selection);
    const change = async (): Promise<SessionSwitchReport> => {
      const labels = await labelsOf(whole.pack, requested, options.head, ignore);
      const report = await whole.switchTask(requested, options);
      held.setLabels(labels);
      return report;
    };
    return held.queue.alone(() => this.switching(requested, change));
  }

  /** @internal */
  override heard(type: string): void {
    if (type === "devicelost")
      this.#parts.whole.addEventListener(type, ({ detail }) => this.tell("devicelost", detail));
  }

  /** Resident bytes that come on top of what the pipeline's own sessions hold. */
  memory(): MemoryReport {
    return this.#parts.whole.memory();
  }

  /**
   * Gives the pipeline its own sessions, labels and methods back, after the calls that are running, and releases ours.
   * Its sessions are made anew, from the id.
   * @throws BackendError when `model` was a file, which is not kept: dispose of the pipeline instead. Nothing has
   *   changed then
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
      held.setLabels("base");
      held.free();
      await whole.close();
    });
  }

  /** @internal The pipeline is disposed of. */
  release(): Promise<void> {
    this.#disposed = true;
    return this.#parts.whole.close();
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

/** The pipeline's own sessions, by name. @throws TypeError when something else has replaced one */
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
function refuseForSeveral(
  names: readonly string[],
  model: SourceInput,
  { probe, trainable }: EigenSessionOptions<PipelineOrt>,
): void {
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

const OWN = '`Tensor` of "@huggingface/transformers"';

type TensorClass = PipelineOrt["Tensor"];

/** A tensor: of onnxruntime, or of transformers.js, which wraps those. */
interface Wrapped {
  readonly ort_tensor?: object | undefined;
  readonly dims?: unknown;
}

type Beginning = (options: object) => { readonly input_ids: Wrapped };

/**
 * The class of tensors of the onnxruntime that the pipeline runs. What runs return is of another class where that
 * package is there twice.
 * @param given transformers.js's own class, or onnxruntime's. Default: the class of what the pipeline's tokenizer or
 *   model makes
 * @throws TypeError when it is neither, or the pipeline makes none
 */
function tensorClass({ tokenizer, model }: TransformersPipeline, given: unknown): TensorClass {
  const tokenize = tokenizer as ((text: string) => { input_ids?: Wrapped }) | null | undefined;
  const begin = (model as PipelineModel & { _prepare_decoder_input_ids_for_generation?: Beginning })
    ._prepare_decoder_input_ids_for_generation;
  const makers: (() => Wrapped | undefined)[] =
    given === undefined
      ? [
          // No text at all: any other may hold words that a small vocabulary lacks.
          () => tokenize?.("").input_ids,
          // Pictures have no tokenizer. Nothing runs here: it is one number as a tensor.
          () => begin?.call(model, { batch_size: 1, model_kwargs: {}, decoder_start_token_id: 0 }).input_ids,
        ]
      : [() => new (given as new (...of: unknown[]) => Wrapped)("float32", new Float32Array(1), [1])];
  let cause: unknown;
  for (const make of makers) {
    try {
      const tensor = make();
      const inner = tensor?.ort_tensor?.constructor;
      if (inner) return inner as TensorClass;
      // An array of numbers has no dimensions, a tensor of another library no such argument.
      if (given !== undefined && Array.isArray(tensor?.dims) && tensor.dims.join() === "1") return given as TensorClass;
    } catch (error) {
      cause ??= error;
    }
  }
  const name = typeof given === "function" && given.name ? `"${given.name}"` : described(given);
  const why =
    given === undefined
      ? `nothing of the pipeline shows onnxruntime's class of tensors; pass { Tensor }, ${OWN}`
      : `Tensor: expected the class ${OWN}, got ${name}`;
  throw new TypeError(`attachPack: ${why}`, { cause });
}

// The files of the pipeline's sessions.

/** A model and options that make a session of the pipeline's. */
interface Found {
  readonly model: SourceInput;
  readonly session: Readonly<Record<string, unknown>>;
  readonly externalData?: readonly { path: string; data: Uint8Array }[] | undefined;
}

/** The pipeline's own sessions by its names, those that matter here. */
type OwnSessions = ReadonlyMap<string, PipelineSession>;

type Find = () => Promise<Map<string, Found>>;

/** The class of a session, whose `create` is put aside for a moment. */
interface SessionClass {
  create(this: unknown, model: unknown, options?: Record<PropertyKey, unknown>, ...rest: unknown[]): Promise<unknown>;
}

interface ModelClass {
  from_pretrained(id: string, options: object): Promise<PipelineModel>;
}

/** True if a model is given by its id at a hub or in a folder of models, instead of as a file. */
function isId(model: SourceInput): model is string {
  return typeof model === "string" && !/^[a-z]{2,}:/i.test(model) && !/\.onnx([?#].*)?$/i.test(model);
}

/** The one model that was handed over, with the options that transformers.js has for a device. */
function foundOnly(own: OwnSessions, model: SourceInput): Map<string, Found> {
  return new Map(
    [...own].map(([name, { config: { device = "auto" } = {} }]) => {
      // "auto" and "gpu" are onnxruntime's choice. "webnn-gpu" is transformers.js' word.
      const [provider = device, deviceType = "cpu"] = device.split("-");
      const executionProviders = [provider === "webnn" ? { name: provider, deviceType } : device];
      const isNamed = device !== "auto" && device !== "gpu";
      return [name, { model, session: { logSeverityLevel: 3, ...(isNamed && { executionProviders }) } }];
    }),
  );
}

/**
 * Files that belong to the model, by its names for them.
 * @throws SourceError, when called, for a file that transformers.js did not load
 */
function externalFiles(files: NonNullable<Found["externalData"]>): (location: string) => Uint8Array {
  return (location) => {
    const file = files.find(({ path }) => path === location);
    if (file) return file.data;
    const message = "is not among the files that transformers.js loads for this model; pass it by `external`";
    throw new SourceError(message, { file: location });
  };
}

/** Only one at a time puts a class's method aside. */
const taking = new Queue();

/**
 * Has transformers.js find the model's files again, by its own rules for folders, caches and hosts, and takes them
 * where it would make sessions.
 * @param own the sessions whose files are wanted
 * @param pretrained options of `from_pretrained`
 * @returns finds them; throws SourceError that says what to pass, when the files are not found
 */
function finder(
  model: PipelineModel,
  own: OwnSessions,
  id: string,
  pretrained: Readonly<Record<string, unknown>>,
): Find {
  const take = async (): Promise<Map<string, Found>> => {
    const found = new Map<string, Found>();
    for (const [name, { constructor, config: { device, dtype } = {} }] of own) {
      if (found.has(name)) continue;
      const parts = await takeParts(constructor as never, model, id, { device, dtype, ...pretrained });
      // Files for another device or another type are of no use.
      for (const [other, { config }] of own)
        if (other === name || (config?.device === device && config?.dtype === dtype)) found.set(other, parts(other));
    }
    // Same order as the sessions, whichever were found together.
    return new Map([...own.keys()].map((name) => [name, found.get(name)!]));
  };
  return () => taking.change(take);
}

/** @returns gives the model and options of the session of a name */
async function takeParts(
  Session: SessionClass,
  model: PipelineModel,
  id: string,
  options: Readonly<Record<string, unknown>>,
): Promise<(name: string) => Found> {
  const Model = model.constructor as unknown as ModelClass;
  const mark = Symbol("eigenlora");
  const { create } = Session;
  const instead: SessionClass["create"] = async function (this: unknown, file, given, ...rest) {
    return given?.[mark] ? { file, options: given } : create.call(this, file, given, ...rest);
  };
  Session.create = instead;
  try {
    // A symbol among the session's options gets through to `create`, and tells ours from others made meanwhile.
    const { sessions } = await Model.from_pretrained(id, {
      ...options,
      config: model.config,
      session_options: { ...(options["session_options"] as object | undefined), [mark]: true },
    });
    return (name) => {
      const taken = sessions[name] as { file: SourceInput; options: Record<PropertyKey, unknown> } | undefined;
      if (!taken) throw new SourceError(`transformers.js makes no session "${name}" of this model`, { file: id });
      const { externalData, [mark]: _mark, ...session } = taken.options;
      return { model: taken.file, session, externalData: externalData as Found["externalData"] };
    };
  } catch (cause) {
    const message =
      `transformers.js does not find the model again: ${(cause as Error).message}. Pass { model } as it was given ` +
      "to pipeline(), with its options as { pretrained }; or the path, URL or bytes of the ONNX file as { model }";
    throw new SourceError(message, { file: id, cause });
  } finally {
    if (Session.create === instead) Session.create = create;
  }
}

/**
 * Makes sessions that transformers.js made in the beginning once more, all or none.
 * @param find undefined when the model was handed over
 * @throws BackendError then: the file was not kept
 */
async function remake(own: OwnSessions, find: Find | undefined): Promise<Map<string, PipelineSession>> {
  const made = new Map<string, PipelineSession>();
  if (own.size === 0) return made;
  if (!find) {
    const message =
      "the pipeline's own session was released, and `model` was a file: dispose of the pipeline, or attach with an id";
    throw new BackendError(message, { backend: "transformers.js" });
  }
  const found = await find();
  try {
    for (const [name, { constructor, config }] of own) {
      const { model, session, externalData } = found.get(name)!;
      found.delete(name);
      const options = { ...session, ...(externalData && { externalData }) };
      const one = (await (constructor as unknown as SessionClass).create(model, options)) as PipelineSession;
      if (config) one.config = config;
      made.set(name, one);
    }
  } catch (error) {
    for (const session of made.values()) await session.release();
    throw error;
  }
  return made;
}

// Sessions in place of the pipeline's own.

/** Parameters that all sessions leave out, each by its options. */
function ignoredByAll(
  names: readonly string[],
  ignore: readonly string[] | undefined,
  each: PipelineSessionOptions,
): readonly string[] {
  const [first = [], ...others] = names.map((name) => each[name]?.ignore ?? ignore ?? []);
  return first.filter((name) => others.every((list) => list.includes(name)));
}

/**
 * One session for one model; for several, one for each in which modules of the pack live.
 * @param found emptied: nothing of a model is held longer than it takes to load it
 */
async function makeSessions(
  ort: PipelineOrt,
  found: Map<string, Found>,
  pack: Pack,
  options: EigenSessionOptions<PipelineOrt>,
  each: PipelineSessionOptions,
): Promise<Whole> {
  const isOne = found.size === 1;
  const files = filesOf(ort, found, options, each);
  if (!isOne) return groupOf<OrtTypes<PipelineOrt>, string>(files, pack, "skip");
  const [{ name, engine, model, options: own }] = files as Iterable<GroupFile<string>> as [GroupFile<string>];
  try {
    return await createSession<OrtTypes<PipelineOrt>>(engine, model, pack, own);
  } catch (error) {
    if (!(error instanceof BaseMismatchError)) throw error;
    // The message names the session as transformers.js does.
    const { message, module, candidates } = error;
    throw new BaseMismatchError(`session "${name}": ${message}`, { module, ...(candidates && { candidates }) });
  }
}

function* filesOf(
  ort: PipelineOrt,
  found: Map<string, Found>,
  options: EigenSessionOptions<PipelineOrt>,
  each: PipelineSessionOptions,
): Generator<GroupFile<string>> {
  for (const [name, { model, session, externalData }] of found) {
    found.delete(name);
    const external = externalData && { external: externalFiles(externalData) };
    const { session: given, ...own } = { ...external, ...options, ...each[name] };
    const engine = createEngine(ort, { ...session, ...options.session, ...given });
    yield { name, engine, model, options: own as GroupFile<string>["options"] };
  }
}

/** Stands in for one of the pipeline's own sessions. @param release called when the pipeline is disposed of */
function standIn(own: Shown, session: EigenSession<PipelineOrt>, release: () => Promise<void>): object {
  return { ...own, run: (feeds: Readonly<Record<string, never>>) => session.run(feeds), release };
}

/** Members that transformers.js reads of a session. The metadata name the free dimensions of its first cache. */
type Shown = Signature & Record<"inputMetadata" | "outputMetadata" | "config", unknown>;

function shownOf({ inputNames, outputNames, inputMetadata, outputMetadata, config }: PipelineSession): Shown {
  return { inputNames, outputNames, inputMetadata, outputMetadata, config };
}

type Signature = Pick<OrtSession, "inputNames" | "outputNames">;

/** @throws TypeError when a session runs another model than the pipeline's own */
function refuseOther(session: Signature, own: Signature): void {
  const signature = ({ inputNames, outputNames }: Signature): string =>
    `${[...inputNames].sort().join(", ")} → ${[...outputNames].sort().join(", ")}`;
  if (signature(session) === signature(own)) return;
  const message = `\`model\` (${signature(session)}) is not what the pipeline runs (${signature(own)})`;
  throw new TypeError(`attachPack: ${message}`);
}

// Calls and labels.

/** Names of packs by the models that have them. */
const packs = new WeakMap<object, string>();

/** A pipeline whose calls wait for a pack's switches. */
interface Held {
  /** Calls of the pipeline, and switches. */
  readonly queue: Queue;
  setLabels(labels: Labels): void;
  /** Gives the pipeline and its model their methods back. */
  free(): void;
}

// Functions of their own make what stays while a pack is attached: a closure keeps all that the function around it has
// given to any closure, and that must not be a model's bytes.

/** @throws TypeError when the pipeline's model has a pack */
function holdPipeline(pipe: TransformersPipeline, pack: string): Held {
  const { model } = pipe;
  const other = packs.get(model);
  if (other !== undefined) {
    const message = `attachPack: the pipeline has the pack ${other}; close that first, or put all adapters into one pack`;
    throw new TypeError(message);
  }
  packs.set(model, pack);
  const queue = new Queue();
  const inner = holdMethods(model, ["_call", "forward", "generate"], queue);
  const outer = holdMethods(pipe, ["_call"], queue, { model: inner.inside });
  return {
    queue,
    setLabels: labelSetter(model.config as Record<string, unknown>),
    free() {
      outer.free();
      inner.free();
      packs.delete(model);
    },
  };
}

type Method = (this: unknown, ...args: unknown[]) => unknown;

/**
 * Replaces methods in place by ones that wait, so that all code that has the object has those.
 * @param methods names; unknown ones are passed over. A function that is called itself goes through its method `_call`,
 *   as callable objects of transformers.js do
 * @param others properties that `inside` has in place of some of the object's other properties
 * @returns `inside` is the same object with its methods as they were. Held methods have it as `this`: a call's inner
 *   calls were let through with it, and would wait for themselves otherwise
 */
function holdMethods(
  target: object,
  methods: readonly string[],
  queue: Queue,
  others: Readonly<Record<string, unknown>> = {},
): { readonly inside: object; free(): void } {
  const members = target as Record<string, unknown>;
  const originals = new Map<PropertyKey, unknown>(Object.entries(others));
  const inside: object = new Proxy(target, {
    get: (object, key, receiver) => (originals.has(key) ? originals.get(key) : Reflect.get(object, key, receiver)),
    apply: (_target, _this, args: unknown[]) => (originals.get("_call") as Method).apply(inside, args),
  });
  const undo = methods.map((name) => {
    const original = members[name];
    if (typeof original !== "function") return () => undefined;
    originals.set(name, original);
    const isOwn = Object.hasOwn(target, name);
    const held = (...args: unknown[]): Promise<unknown> =>
      queue.call(async () => (original as Method).apply(inside, args));
    members[name] = held;
    return () => {
      // Another wrapper may lie around ours.
      if (members[name] !== held) return;
      if (isOwn) members[name] = original;
      else delete members[name];
    };
  });
  return { inside, free: () => undo.forEach((restore) => restore()) };
}

/** Names in the order of the head's rows; "numbered" for a head whose task has no names; "base" for the base's own. */
type Labels = readonly string[] | "numbered" | "base";

/**
 * The names for a selection.
 * @param head whose head a blend uses; without it, heads were blended, which takes equal labels
 * @param ignore parameters of the tasks, or modules, that the model was made without
 * @throws as `Pack.load`, for tasks whose pack does not say what they bring
 */
async function labelsOf(
  pack: Pack,
  selection: Selection,
  head: string | undefined,
  ignore: readonly string[] = [],
): Promise<Labels> {
  const { tasks } = pack;
  const active = typeof selection === "object" ? Object.keys(selection ?? {}) : [selection];
  let labels: Labels = "base";
  for (const id of head === undefined ? active : [head]) {
    const task = tasks.get(id);
    // The switch refuses it, in better words.
    if (!task) continue;
    const brings = task.brings ?? bringsOf(await pack.load(id), pack.modules);
    const saved = brings.map(parseBrought).filter(({ role }) => role === "saved");
    if (saved.some(({ name }) => !isIgnored(name, ignore))) return task.metadata.labels ?? "numbered";
    // Adapters without a head of their own were trained on the base's; its classes may mean something else to them.
    if (saved.length === 0 && labels === "base") labels = task.metadata.labels ?? "base";
  }
  return labels;
}

/** Sets the label names in a model's configuration, where transformers.js reads them. */
function labelSetter(config: Record<string, unknown>): (labels: Labels) => void {
  const { id2label, label2id, num_labels } = config;
  const base = { id2label, label2id, num_labels };
  // transformers.js says LABEL_0, LABEL_1, … where there are no names.
  const numbered = { id2label: undefined, label2id: undefined, num_labels: undefined };
  const named = (names: readonly string[]): object => ({
    id2label: Object.fromEntries(names.entries()),
    label2id: Object.fromEntries(names.map((name, id) => [name, id])),
    num_labels: names.length,
  });
  return (labels) =>
    void Object.assign(config, labels === "base" ? base : labels === "numbered" ? numbered : named(labels));
}
