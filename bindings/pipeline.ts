/**
 * A pipeline of transformers.js from within: the files of its sessions, ours in their place, the order of its calls and switches, and the
 * label names in its configuration. Part of `eigenlora/transformers`, without an entry of its own.
 */
import type { Pack } from "../src/core/pack.ts";
import type { PackView } from "../src/core/part.ts";
import type { Selection } from "../src/core/selection.ts";
import { BackendError, BaseMismatchError, SourceError } from "../src/errors.ts";
import { bringsOf, parseBrought } from "../src/format/format.ts";
import type { OnProgress, Progress } from "../src/progress.ts";
import { Queue } from "../src/queue.ts";
import type { EngineTensor } from "../src/session/engine.ts";
import { type GroupFile, groupOf } from "../src/session/group.ts";
import { isIgnored } from "../src/session/match.ts";
import { createSession } from "../src/session/session.ts";
import type { SourceInput } from "../src/source.ts";
import {
  createEngine,
  type EigenSession,
  type EigenSessionOptions,
  type EigenSessions,
  type Ort,
  type OrtSession,
  type OrtTypes,
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

/** A model and options that make a session of the pipeline's. */
export interface Found {
  readonly model: SourceInput;
  readonly session: Readonly<Record<string, unknown>>;
  readonly externalData?: readonly { path: string; data: Uint8Array }[] | undefined;
}

/** The class of a session, whose `create` is put aside for a moment. */
interface SessionClass {
  create(this: unknown, model: unknown, options?: Record<PropertyKey, unknown>, ...rest: unknown[]): Promise<unknown>;
}

interface ModelClass {
  from_pretrained(id: string, options: object): Promise<PipelineModel>;
}

/** True if a model is given by its id at a hub or in a folder of models, instead of as a file. */
export function isId(model: SourceInput): model is string {
  return typeof model === "string" && !/^[a-z]{2,}:/i.test(model) && !/\.onnx([?#].*)?$/i.test(model);
}

/** The one model that was handed over, with the options that transformers.js has for a device. */
export function foundOnly(own: OwnSessions, model: SourceInput): Map<string, Found> {
  return new Map(
    [...own].map(([name, { config: { device } = {} }]) => {
      const session = { logSeverityLevel: 3 };
      // "auto" and "gpu" are onnxruntime's choice.
      if (device === undefined || device === "auto" || device === "gpu") return [name, { model, session }];
      const [provider, deviceType = "cpu"] = device.split("-");
      const executionProviders = [provider === "webnn" ? { name: provider, deviceType } : device];
      return [name, { model, session: { ...session, executionProviders } }];
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

/** The pipeline's own sessions by its names, those that matter here. */
export type OwnSessions = ReadonlyMap<string, PipelineSession>;

/** Finds what sessions are made of, by their names. */
export type Find = () => Promise<Map<string, Found>>;

/** Hands what transformers.js tells of its files to `onProgress`. */
export function staged(onProgress: OnProgress): (info: Partial<Progress>) => void {
  return (info) => onProgress({ stage: "model", loaded: 0, total: 0, progress: 0, ...info } as Progress);
}

/**
 * Has transformers.js find the model's files again, by its own rules for folders, caches and hosts, and takes them
 * where it would make sessions.
 * @param own the sessions whose files are wanted
 * @param pretrained options of `from_pretrained`
 * @returns finds them; throws SourceError that says what to pass, when the files are not found
 */
export function finder(
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
export async function remake(own: OwnSessions, find: Find | undefined): Promise<Map<string, PipelineSession>> {
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
    for (const one of made.values()) await one.release();
    throw error;
  }
  return made;
}

// Sessions in place of the pipeline's own.

/** One session of ours, or several that switch together. */
export type Whole = EigenSession<PipelineOrt> | EigenSessions<PipelineOrt>;

/** The options of `attachPack` that go on to sessions. */
export type Rest = EigenSessionOptions<PipelineOrt>;

/** Options of one session of several, by its name. */
export type Each = Readonly<Record<string, Omit<Rest, "trainable">>>;

/** Parameters that all sessions leave out, each by its options. */
export function ignoredByAll(names: readonly string[], ignore: Rest["ignore"], each: Each): readonly string[] {
  const [first = [], ...others] = names.map((name) => each[name]?.ignore ?? ignore ?? []);
  return first.filter((one) => others.every((list) => list.includes(one)));
}

/**
 * One session for one model; for several, one for each in which modules of the pack live.
 * @param found emptied: nothing of a model is held longer than it takes to load it
 */
export async function makeOurs(
  ort: PipelineOrt,
  found: Map<string, Found>,
  pack: Pack,
  options: Rest,
  each: Each,
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
  options: Rest,
  each: Each,
): Generator<GroupFile<string>> {
  for (const [name, { model, session, externalData }] of found) {
    found.delete(name);
    const external = externalData && { external: externalFiles(externalData) };
    const { session: given, ...own } = { ...external, ...options, ...each[name] };
    const engine = createEngine(ort, { ...session, ...options.session, ...given });
    yield { name, engine, model, options: own as GroupFile<string>["options"] };
  }
}

/** Sessions by the pipeline's names; a single one has the first name. */
export function byName(names: readonly string[], whole: Whole): Readonly<Record<string, EigenSession<PipelineOrt>>> {
  return "sessions" in whole ? whole.sessions : { [names[0]!]: whole };
}

/** Stands in for one of the pipeline's own sessions. @param release called when the pipeline is disposed of */
export function standIn(own: Shown, session: EigenSession<PipelineOrt>, release: () => Promise<void>): object {
  return { ...own, run: (feeds: Readonly<Record<string, never>>) => session.run(feeds), release };
}

/** Members that transformers.js reads of a session. The metadata name the free dimensions of its first cache. */
type Shown = Signature & Record<"inputMetadata" | "outputMetadata" | "config", unknown>;

export function shownOf({ inputNames, outputNames, inputMetadata, outputMetadata, config }: PipelineSession): Shown {
  return { inputNames, outputNames, inputMetadata, outputMetadata, config };
}

/** Releases the pipeline's own sessions; when one refuses, those before it are made anew. */
export async function releaseAll(model: PipelineModel, own: OwnSessions, find: Find | undefined): Promise<void> {
  const released = new Map<string, PipelineSession>();
  try {
    for (const [name, session] of own) {
      await session.release();
      released.set(name, session);
    }
  } catch (error) {
    Object.assign(model.sessions, Object.fromEntries(await remake(released, find)));
    throw error;
  }
}

type Signature = Pick<OrtSession, "inputNames" | "outputNames">;

/** @throws TypeError when a session runs another model than the pipeline's own */
export function refuseOther(session: Signature, own: Signature): void {
  const signature = ({ inputNames, outputNames }: Signature): string =>
    `${[...inputNames].sort().join(", ")} → ${[...outputNames].sort().join(", ")}`;
  if (signature(session) === signature(own)) return;
  const message = `\`model\` (${signature(session)}) is not what the pipeline runs (${signature(own)})`;
  throw new TypeError(`attachPack: ${message}`);
}

// Calls and labels.

/** A pipeline of transformers.js, as far as it is needed here. */
export interface TransformersPipeline {
  readonly model: PipelineModel;
  readonly tokenizer?: unknown;
}

/** Names of packs by the models that have them. */
const packs = new WeakMap<object, string>();

// Functions of their own make what stays while a pack is attached: a closure keeps all that the function around it has given to
// any closure, and that must not be a model's bytes.

/** A pipeline whose calls wait for a pack's switches. Every one needs a `free`. */
export class HeldPipeline {
  /** Calls of the pipeline, and switches. */
  readonly queue: Queue = new Queue();
  readonly labels: ConfigLabels;
  readonly #model: PipelineModel;
  readonly #held: readonly Held<object>[];

  /** @throws TypeError when the pipeline's model has a pack */
  constructor(pipe: TransformersPipeline, pack: string) {
    const { model } = pipe;
    const other = packs.get(model);
    if (other !== undefined) {
      const message = `attachPack: the pipeline has the pack ${other}; close that first, or put all adapters into one pack`;
      throw new TypeError(message);
    }
    packs.set(model, pack);
    this.#model = model;
    this.labels = new ConfigLabels(model.config);
    const enter: Queue["call"] = (work) => this.queue.call(work);
    const inner = hold(model, ["_call", "forward", "generate"], enter);
    this.#held = [hold<object>(pipe, ["_call"], enter, { model: inner.inside }), inner];
  }

  /** Gives the pipeline and its model their methods back. */
  free(): void {
    for (const { free } of this.#held) free();
    packs.delete(this.#model);
  }
}

// Replaces methods of an object by ones that wait first. Knows neither what they wait for nor the object's class.

/** An object whose methods are held. */
interface Held<Target extends object> {
  /**
   * The same object with its methods as they were. Held methods have it as `this`: a call's inner calls were let through with it,
   * and would wait for themselves otherwise.
   */
  readonly inside: Target;
  /** Puts the methods back. */
  free(): void;
}

type Method = (this: unknown, ...args: unknown[]) => unknown;
type Members = Record<PropertyKey, unknown>;

/**
 * Replaces methods in place, so that all code that has the object has the held methods.
 * @param methods names; unknown ones are passed over. A function that is called itself goes through its method `_call`, as callable
 *   objects of transformers.js do
 * @param enter calls what it is given, now or later
 * @param others properties that `inside` has in place of some of the object's other properties
 */
export function hold<Target extends object>(
  target: Target,
  methods: readonly string[],
  enter: <Result>(work: () => Promise<Result>) => Promise<Result>,
  others: Readonly<Members> = {},
): Held<Target> {
  const members = target as Members;
  const originals = new Map<PropertyKey, unknown>(Object.entries(others));
  const inside = new Proxy(target, {
    get: (object, key, receiver) => (originals.has(key) ? originals.get(key) : Reflect.get(object, key, receiver)),
    apply: (_target, _this, args: unknown[]) => (originals.get("_call") as Method).apply(inside, args),
  });
  const undo = methods.map((name) => {
    const original = members[name];
    if (typeof original !== "function") return () => undefined;
    originals.set(name, original);
    const own = Object.getOwnPropertyDescriptor(target, name) !== undefined;
    const held = (...args: unknown[]): Promise<unknown> => enter(async () => (original as Method).apply(inside, args));
    members[name] = held;
    return () => {
      // Another wrapper may lie around ours.
      if (members[name] !== held) return;
      if (own) members[name] = original;
      else delete members[name];
    };
  });
  return { inside, free: () => undo.forEach((put) => put()) };
}

// The class names that answers have while a task is active, and where transformers.js reads them. Part of `eigenlora/transformers`,
// without an entry of its own.

/** Names in the order of the head's rows; "numbered" for a head whose task has no names; "base" for the base's own. */
type Labels = readonly string[] | "numbered" | "base";

/**
 * The names for a selection.
 * @param head whose head a blend uses; without it, heads were blended, which takes equal labels
 * @param ignore parameters of the tasks, or modules, that the model was made without
 * @throws as `Pack.load`, for tasks whose pack does not say what they bring
 */
export async function labelsOf(
  pack: PackView,
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
    // transformers.js says LABEL_0, LABEL_1, … where there are no names.
    const numbered = { id2label: undefined, label2id: undefined, num_labels: undefined };
    Object.assign(this.#config, labels === "base" ? this.#own : labels === "numbered" ? numbered : named(labels));
  }
}
