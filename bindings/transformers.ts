/**
 * `eigenlora/transformers`: a pack on a pipeline of transformers.js 4. The pipeline's session is replaced by one that
 * switches tasks; the pipeline stays what it is, and so do its tokenizer, generation and post-processing. Nothing of
 * transformers.js or onnxruntime is imported here: both are reached through the pipeline.
 */
import { BackendError, SourceError } from "../src/errors.ts";
import type { Pack, TaskInfo } from "../src/pack/pack.ts";
import { copySelection, type Selection } from "../src/runtime/selection.ts";
import { hold } from "../src/session/hold.ts";
import { labelsOf, type Labels } from "../src/session/labels.ts";
import { Turns } from "../src/session/turns.ts";
import type { SourceInput } from "../src/source.ts";
import {
  createEigenSession,
  type EigenSession,
  type EigenSessionOptions,
  type Ort,
  type OrtSession,
  type SessionMemory,
  type SessionSwitchOptions,
  type SessionSwitchReport,
} from "./onnxruntime.ts";

/** What `pipeline()` of transformers.js gives, as far as it is needed here. */
export interface TransformersPipeline {
  readonly model: {
    /** Sessions of onnxruntime by the part of the model that they run, for most models one called "model". */
    readonly sessions: Record<string, unknown>;
    readonly config: object;
  };
  readonly tokenizer?: unknown;
}

export interface AttachOptions extends EigenSessionOptions {
  /**
   * The pipeline's model: its id as given to `pipeline()`, or path, URL, Blob or bytes of its ONNX file. A string that ends
   * in ".onnx" or begins with "https:" or the like is a file, any other an id.
   */
  model: SourceInput;
  /** Which of the model's sessions runs the adapted layers. Needed where there are several. */
  part?: string | undefined;
  /**
   * What becomes of the pipeline's own session. "release" unless given: it goes once ours runs, so that for a moment both
   * are in memory. "release-first": it goes before ours is made; when making ours fails, the pipeline is of no use any
   * more. "keep": it stays in memory for `detach`.
   */
  original?: "release" | "release-first" | "keep" | undefined;
  /**
   * Options that were given to `pipeline()` and say where an id's files are or how to run them: `revision`, `subfolder`,
   * `model_file_name`, `cache_dir`, `session_options`, … `device` and `dtype` are known, but for a `dtype` by part.
   */
  pretrained?: Readonly<Record<string, unknown>> | undefined;
  /** The class `Tensor` of the pipeline's onnxruntime, where no tokenizer makes any. */
  Tensor?: Ort["Tensor"] | undefined;
}

/** A session with what transformers.js adds. */
interface PipelineSession extends OrtSession {
  config?: { device?: string; dtype?: string };
}

/** Classes whose `create` is put aside for a moment. */
interface SessionClass {
  create(this: unknown, model: unknown, options?: Record<PropertyKey, unknown>, ...rest: unknown[]): Promise<unknown>;
}

/** How to make a session of the pipeline's model. */
interface Found {
  model: SourceInput;
  session: Record<string, unknown>;
  externalData?: readonly { path: string; data: Uint8Array }[] | undefined;
}

/** Models that have a pack. */
const attached = new WeakSet<object>();

/**
 * Puts a pack on a pipeline: `pipe` answers as before, until `switchTask`. Call it while no call of `pipe` is running;
 * calls made meanwhile wait. In browsers, no other pipeline must run meanwhile either, since onnxruntime-web cannot overlap
 * runs, and the parity probe is one (`probe: false` leaves it out).
 *
 * The model is loaded again, with the components inside. By id, transformers.js finds the file as it did before: a path in
 * Node, its cache in browsers. This costs the time to load the model once more and, unless `original` is "release-first",
 * the memory of both sessions until the pipeline's own is released.
 *
 * @throws TypeError when `pipe` is no pipeline, has a pack already or has several sessions and no `part` is given, or when
 *   `model` is another model
 * @throws SourceError when the model's files are not found again: the message says what to pass
 * @throws as `createEigenSession`: BaseMismatchError for another base, BackendError when onnxruntime refuses the model
 * @example
 * const pipe = await pipeline("text-classification", "minilm", { dtype: "fp16" });
 * const tasks = await attachPack(pipe, await openPack("tasks.eigen"), { model: "minilm" });
 * await tasks.switchTask("debtags-role");
 * console.log(await pipe("a graphical editor for images"));
 */
export async function attachPack(pipe: TransformersPipeline, pack: Pack, options: AttachOptions): Promise<AttachedPack> {
  const { model, part, original = "release", pretrained = {}, Tensor, ...rest } = options ?? {};
  if (model === undefined) {
    throw new TypeError('attachPack: pass { model }, the id as given to pipeline(), or its ONNX file: a pipeline does not keep it');
  }
  if (!["release", "release-first", "keep"].includes(original)) throw new RangeError(`original: got ${JSON.stringify(original)}`);
  const name = partOf(pipe, part);
  const own = pipe.model.sessions[name] as PipelineSession;
  const ort = { InferenceSession: own.constructor as never, Tensor: Tensor ?? tensorClass(pipe), env: ENV } satisfies Ort;
  const find = isId(model) ? (): Promise<Found> => takeModel(pipe.model, name, own, model, pretrained) : undefined;
  // Calls see the pipeline's methods as they were: one that waited for its turn must not wait again for the runs inside.
  const turns = new Turns();
  const enter: Turns["call"] = (work) => turns.call(work);
  attached.add(pipe.model);
  const inner = hold(pipe.model, ["_call", "forward", "generate"], enter);
  const outer = hold(pipe, ["_call"], enter, { model: inner.inside });
  const free = (): void => {
    outer.free();
    inner.free();
    attached.delete(pipe.model);
  };
  const attach = async (): Promise<AttachedPack> => {
    const found = (await find?.()) ?? { model, session: sessionOptions(own.config?.device) };
    const { inputNames, outputNames, inputMetadata, outputMetadata, config } = own;
    if (original === "release-first") await own.release();
    const session = await createEigenSession<Ort>(ort, found.model, pack, {
      ...(found.externalData && { external: (location) => externalFile(found, location) }),
      ...rest,
      session: { ...found.session, ...(rest.session as object | undefined) } as never,
    });
    const differs = !sameNames(session.inputNames, inputNames) || !sameNames(session.outputNames, outputNames);
    if (differs) {
      await session.release();
      const signature = (of: Pick<OrtSession, "inputNames" | "outputNames">): string => `${of.inputNames.join(", ")} → ${of.outputNames.join(", ")}`;
      const message = `attachPack: \`model\` (${signature(session)}) is not what the pipeline runs (${signature({ inputNames, outputNames })})`;
      throw new TypeError(message);
    }
    const kept = original === "keep" ? own : undefined;
    pipe.model.sessions[name] = {
      inputNames,
      outputNames,
      inputMetadata,
      outputMetadata,
      config,
      run: (feeds: never) => session.run(feeds),
      release: async () => {
        await session.release();
        await kept?.release();
      },
    };
    if (original === "release") await own.release();
    const restore = async (): Promise<PipelineSession> => kept ?? reload(ort.InferenceSession, find, config);
    return new AttachedPack({ pipe, name, session, turns, restore, free, ignore: rest.ignore });
  };
  try {
    return await turns.change(attach);
  } catch (error) {
    free();
    throw error;
  }
}

interface Parts {
  pipe: TransformersPipeline;
  name: string;
  session: EigenSession;
  turns: Turns;
  restore: () => Promise<PipelineSession>;
  free: () => void;
  ignore: readonly string[] | undefined;
}

/** A pack on a pipeline. Made by `attachPack`. */
export class AttachedPack {
  /**
   * What the pipeline runs now. For reading, `addTask` and `run` with one task per row; a task switched to here instead of
   * by `switchTask` has the labels of the one before.
   */
  readonly session: EigenSession;
  readonly #parts: Parts;
  readonly #labels: ConfigLabels;
  #detached = false;

  /** @internal */
  constructor(parts: Parts) {
    this.session = parts.session;
    this.#parts = parts;
    this.#labels = new ConfigLabels(parts.pipe.model.config);
  }

  /** What calls of the pipeline now belong to. */
  get task(): Selection {
    return this.session.task;
  }

  /** The pack's tasks by id, with their metadata. */
  get tasks(): ReadonlyMap<string, TaskInfo> {
    return this.session.tasks;
  }

  /**
   * Makes a task, a blend or the pristine base active, with its label names in `pipe.model.config`. Waits for calls of the
   * pipeline, of its model and of `generate` that are running, so that each belongs to one task from its first run to its
   * last; calls made after wait for the switch. When it fails or is aborted, the previous task stays whole. A cache of
   * keys and values that is handed from one `generate` to the next belongs to the task that made it.
   * @throws as `EigenSession.switchTask`
   */
  switchTask(selection: Selection, options: SessionSwitchOptions = {}): Promise<SessionSwitchReport> {
    const { session, turns, ignore } = this.#parts;
    const asked = copySelection(selection);
    return turns.change(async () => {
      const labels = await labelsOf(session.pack, asked, options.head, ignore);
      const report = await session.switchTask(asked, options);
      this.#labels.set(labels);
      return report;
    });
  }

  /** Resident bytes that come on top of what the pipeline's own session holds. */
  memory(): SessionMemory {
    return this.session.memory();
  }

  /**
   * Gives the pipeline its own session and labels back, after the calls that are running, and releases ours. The session
   * that was not kept is made anew from the id.
   * @throws BackendError when it was not kept and `model` was a file: pass `original: "keep"` to `attachPack`, or dispose of
   *   the pipeline. Nothing has changed then
   * @throws SourceError when the model's files are not found any more
   */
  detach(): Promise<void> {
    const { pipe, name, session, turns, restore, free } = this.#parts;
    return turns.change(async () => {
      if (this.#detached) return;
      pipe.model.sessions[name] = await restore();
      this.#detached = true;
      this.#labels.set("base");
      free();
      await session.release();
    });
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
    const tables = (names: readonly string[]): object => ({
      id2label: Object.fromEntries(names.entries()),
      label2id: Object.fromEntries(names.map((name, id) => [name, id])),
      num_labels: names.length,
    });
    // Without names, transformers.js says LABEL_0, LABEL_1, …
    const numbered = { id2label: undefined, label2id: undefined, num_labels: undefined };
    Object.assign(this.#config, labels === "base" ? this.#own : labels === "numbered" ? numbered : tables(labels));
  }
}

/**
 * A pipeline does not tell which onnxruntime it has. To take turns, as onnxruntime-web must, is right for all of them.
 */
const ENV = { versions: { web: "of transformers.js" } };

/** Which session to replace. */
function partOf(pipe: TransformersPipeline, part: string | undefined): string {
  const sessions = (pipe as Partial<TransformersPipeline> | undefined)?.model?.sessions;
  if (typeof sessions !== "object" || sessions === null) {
    throw new TypeError("attachPack: the first argument must be a pipeline of transformers.js 4, as `await pipeline(…)` gives it");
  }
  if (attached.has(pipe.model)) throw new TypeError("attachPack: this pipeline's model has a pack; detach() that first");
  const names = Object.keys(sessions);
  const known = names.map((name) => `"${name}"`).join(", ");
  if (part === undefined && names.length !== 1) throw new TypeError(`attachPack: the model has the sessions ${known}; say which, { part }`);
  const name = part ?? names[0]!;
  if (!names.includes(name)) throw new TypeError(`part: the model has the sessions ${known}, got ${JSON.stringify(name)}`);
  if (typeof (sessions[name] as OrtSession).constructor !== "function" || !("create" in (sessions[name] as OrtSession).constructor)) {
    throw new TypeError(`attachPack: the session "${name}" is not onnxruntime's own; something else has replaced it`);
  }
  return name;
}

/** Of the onnxruntime in use; what runs return is of another class where the package is there twice. */
function tensorClass({ tokenizer }: TransformersPipeline): Ort["Tensor"] {
  const tokenize = tokenizer as ((text: string) => { input_ids?: { ort_tensor?: object } }) | null | undefined;
  let cause: unknown;
  try {
    // No text at all: any other may hold words that a small vocabulary lacks.
    const Tensor = tokenize?.("").input_ids?.ort_tensor?.constructor;
    if (Tensor) return Tensor as Ort["Tensor"];
  } catch (error) {
    cause = error;
  }
  const message = "attachPack: the pipeline has no tokenizer that shows onnxruntime's class of tensors; pass { Tensor }";
  throw new TypeError(message, cause === undefined ? undefined : { cause });
}

function isId(model: SourceInput): model is string {
  return typeof model === "string" && !/^[a-z]{2,}:/i.test(model) && !/\.onnx([?#].*)?$/i.test(model);
}

function sameNames(a: readonly string[], b: readonly string[]): boolean {
  return a.length === b.length && a.every((name) => b.includes(name));
}

/** As transformers.js would make them for a device. */
function sessionOptions(device: string | undefined): Record<string, unknown> {
  const options = { logSeverityLevel: 3 };
  // "auto" and "gpu" are onnxruntime's choice.
  if (device === undefined || device === "auto" || device === "gpu") return options;
  const [name, deviceType = "cpu"] = device.split("-");
  return { ...options, executionProviders: [name === "webnn" ? { name, deviceType } : device] };
}

function externalFile({ externalData = [] }: Found, location: string): Uint8Array {
  const file = externalData.find(({ path }) => path === location);
  if (file) return file.data;
  throw new SourceError("is not among the files that transformers.js loads for this model; pass it by `external`", { file: location });
}

/** `takeModel` puts a class's method aside: one at a time. */
let taking: Promise<unknown> = Promise.resolve();

/**
 * Has transformers.js find the model's files again, by its own rules for caches and hosts, and takes them where it would
 * make a session: it keeps neither the id nor the options of a pipeline.
 */
function takeModel(
  model: object,
  name: string,
  { constructor, config = {} }: PipelineSession,
  id: string,
  pretrained: Readonly<Record<string, unknown>>,
): Promise<Found> {
  const Session = constructor as unknown as SessionClass;
  const { from_pretrained } = model.constructor as unknown as { from_pretrained(id: string, options: object): Promise<unknown> };
  const mark = Symbol("eigenlora");
  const take = async (): Promise<Found> => {
    const { create } = Session;
    const instead: SessionClass["create"] = async function (file, options, ...rest) {
      return options?.[mark] ? { file, options } : create.call(this, file, options, ...rest);
    };
    Session.create = instead;
    try {
      const loading = {
        device: config.device,
        dtype: config.dtype,
        ...pretrained,
        config: (model as TransformersPipeline["model"]).config,
        session_options: { ...(pretrained["session_options"] as object | undefined), [mark]: true },
      };
      const shell = (await from_pretrained.call(model.constructor, id, loading)) as TransformersPipeline["model"];
      const taken = shell.sessions[name] as { file: SourceInput; options: Record<string, unknown> };
      const { externalData, [mark]: _mark, ...session } = taken.options as Record<PropertyKey, unknown>;
      return { model: taken.file, session, externalData: externalData as Found["externalData"] };
    } catch (cause) {
      const message =
        `transformers.js does not find the model again: ${(cause as Error).message}. Pass { model } as it was given to ` +
        "pipeline() and the options given with it as { pretrained }, or the path, URL or bytes of the ONNX file as { model }";
      throw new SourceError(message, { file: id, cause });
    } finally {
      if (Session.create === instead) Session.create = create;
    }
  };
  const taken = taking.then(take);
  taking = taken.catch(() => undefined);
  return taken;
}

/** The session that transformers.js made in the beginning, once more. */
async function reload(Session: unknown, find: (() => Promise<Found>) | undefined, config: PipelineSession["config"]): Promise<PipelineSession> {
  if (!find) {
    const message = 'the pipeline\'s own session was released, and `model` was a file: pass original: "keep" to attachPack, or dispose of the pipeline';
    throw new BackendError(message, { backend: "transformers.js" });
  }
  const { model, session, externalData } = await find();
  const options = { ...session, ...(externalData && { externalData }) };
  const made = (await (Session as SessionClass).create(model, options)) as PipelineSession;
  if (config) made.config = config;
  return made;
}
