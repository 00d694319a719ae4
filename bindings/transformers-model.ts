/**
 * The model behind a pipeline of transformers.js: its file and its session's options, which a pipeline does not keep.
 * Part of `eigenlora/transformers`, without an entry of its own.
 */
import { BackendError, SourceError } from "../src/errors.ts";
import type { OnProgress, Progress } from "../src/progress.ts";
import { Queue } from "../src/queue.ts";
import type { EngineTensor } from "../src/session/engine.ts";
import type { SourceInput } from "../src/source.ts";
import type { Ort, OrtSession } from "./ort.ts";

/** A model of transformers.js, as far as it is needed here. */
export interface PipelineModel {
  /** Sessions of onnxruntime by the part of the model that they run, for most models one called "model". */
  readonly sessions: Record<string, unknown>;
  readonly config: object;
}

/** A session in a pipeline. */
export interface PipelineSession extends OrtSession {
  /** What transformers.js adds. */
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

/** How to make a session of the pipeline's model. */
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

/** Whether a model is given by its id at a hub or in a folder of models, instead of as a file. */
export function isId(model: SourceInput): model is string {
  return typeof model === "string" && !/^[a-z]{2,}:/i.test(model) && !/\.onnx([?#].*)?$/i.test(model);
}

/** A model that was handed over, with the options that transformers.js has for a device. */
export function handedOver(model: SourceInput, device: string | undefined): Found {
  const session = { logSeverityLevel: 3 };
  // "auto" and "gpu" are onnxruntime's choice.
  if (device === undefined || device === "auto" || device === "gpu") return { model, session };
  const [name, deviceType = "cpu"] = device.split("-");
  return { model, session: { ...session, executionProviders: [name === "webnn" ? { name, deviceType } : device] } };
}

/**
 * Files beside the model by what the model calls them.
 * @throws SourceError, when called, for a file that transformers.js did not load
 */
export function externalFiles(files: NonNullable<Found["externalData"]>): (location: string) => Uint8Array {
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

/** `takeModels` for later. */
export function finder(...what: Parameters<typeof takeModels>): Find {
  return () => takeModels(...what);
}

/**
 * Has transformers.js find the model's files again, by its own rules for folders, caches and hosts, and takes them
 * where it would make sessions.
 * @param own the sessions whose files are wanted
 * @param pretrained options of `from_pretrained`
 * @throws SourceError that says what to pass, when the files are not found
 */
function takeModels(
  model: PipelineModel,
  own: OwnSessions,
  id: string,
  pretrained: Readonly<Record<string, unknown>>,
): Promise<Map<string, Found>> {
  const take = async (): Promise<Map<string, Found>> => {
    const found = new Map<string, Found>();
    for (const [name, { constructor, config: { device, dtype } = {} }] of own) {
      if (found.has(name)) continue;
      const parts = await takeParts(constructor as never, model, id, { device, dtype, ...pretrained });
      // What runs elsewhere or in another type was found for this one's, and is of no use.
      for (const [other, { config }] of own)
        if (other === name || (config?.device === device && config?.dtype === dtype)) found.set(other, parts(other));
    }
    // Same order as the sessions, whichever were found together.
    return new Map([...own.keys()].map((name) => [name, found.get(name)!]));
  };
  return taking.change(take);
}

/** @returns what the session of a name would be made of */
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
