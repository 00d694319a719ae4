/**
 * The model behind a pipeline of transformers.js: its file and its session's options, which a pipeline does not keep.
 * Part of `eigenlora/transformers`, without an entry of its own.
 */
import { BackendError, SourceError } from "../src/errors.ts";
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
let taking: Promise<unknown> = Promise.resolve();

/** `takeModel` for later. */
export function finder(...what: Parameters<typeof takeModel>): () => Promise<Found> {
  return () => takeModel(...what);
}

/**
 * Has transformers.js find the model's files again, by its own rules for folders, caches and hosts, and takes them
 * where it would make a session.
 * @param part which of the sessions
 * @param pretrained options of `from_pretrained`
 * @throws SourceError that says what to pass, when the files are not found
 */
function takeModel(
  model: PipelineModel,
  part: string,
  { constructor, config = {} }: PipelineSession,
  id: string,
  pretrained: Readonly<Record<string, unknown>>,
): Promise<Found> {
  const Session = constructor as unknown as SessionClass;
  const Model = model.constructor as unknown as ModelClass;
  const mark = Symbol("eigenlora");
  const take = async (): Promise<Found> => {
    const { create } = Session;
    const instead: SessionClass["create"] = async function (this: unknown, file, options, ...rest) {
      return options?.[mark] ? { file, options } : create.call(this, file, options, ...rest);
    };
    Session.create = instead;
    try {
      // A symbol among the session's options gets through to `create`, and tells ours from others made meanwhile.
      const { sessions } = await Model.from_pretrained(id, {
        device: config.device,
        dtype: config.dtype,
        ...pretrained,
        config: model.config,
        session_options: { ...(pretrained["session_options"] as object | undefined), [mark]: true },
      });
      const { file, options } = sessions[part] as { file: SourceInput; options: Record<PropertyKey, unknown> };
      const { externalData, [mark]: _mark, ...session } = options;
      return { model: file, session, externalData: externalData as Found["externalData"] };
    } catch (cause) {
      const message =
        `transformers.js does not find the model again: ${(cause as Error).message}. Pass { model } as it was given ` +
        "to pipeline(), with its options as { pretrained }; or the path, URL or bytes of the ONNX file as { model }";
      throw new SourceError(message, { file: id, cause });
    } finally {
      if (Session.create === instead) Session.create = create;
    }
  };
  const taken = taking.then(take);
  taking = taken.catch(() => undefined);
  return taken;
}

/**
 * Makes the session that transformers.js made in the beginning once more.
 * @param find undefined when the model was handed over
 * @throws BackendError then: nobody has kept the file
 */
export async function remake(
  { constructor, config }: PipelineSession,
  find: (() => Promise<Found>) | undefined,
): Promise<PipelineSession> {
  if (!find) {
    const why = "the pipeline's own session was released, and `model` was a file";
    const message = `${why}: pass original: "keep" to attachPack, or dispose of the pipeline`;
    throw new BackendError(message, { backend: "transformers.js" });
  }
  const { model, session, externalData } = await find();
  const options = { ...session, ...(externalData && { externalData }) };
  const made = (await (constructor as unknown as SessionClass).create(model, options)) as PipelineSession;
  if (config) made.config = config;
  return made;
}
