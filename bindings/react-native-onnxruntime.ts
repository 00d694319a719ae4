/**
 * `eigenlora/react-native/onnxruntime`: sessions on onnxruntime-react-native, whose native half differs from the other builds. A model given
 * as bytes is taken as the whole ArrayBuffer, without the options; so the model is written to a file and its path given. A tensor
 * and a file next to a model are taken from the beginning of their buffers, wherever their arrays begin; so they get buffers of their own.
 */
import { checkOptions, checkPack, described } from "../src/arguments.ts";
import type { Pack } from "../src/core/pack.ts";
import { BackendError } from "../src/errors.ts";
import type { DetachedModel } from "../src/onnx/write.ts";
import type { Engine, EngineTensor, LoadOptions, Tensors } from "../src/session/engine.ts";
import { SESSION_OPTIONS, type SessionOptions } from "../src/session/options.ts";
import { createSession } from "../src/session/session.ts";
import type { SourceInput } from "../src/source.ts";
import type { EigenSession, EigenSessionOptions } from "./onnxruntime.ts";
import { createEngine, type Ort, type OrtSession, optionsFor } from "./ort-engine.ts";

/** A folder of the app's, through the app's library for files. */
export interface ModelFiles {
  /** Writes a file. @returns its path, as native code opens it: no "file://" before it */
  write(name: string, bytes: Uint8Array): Promise<string>;
  /** Deletes it, once no session needs it. */
  remove(path: string): Promise<unknown>;
}

/** Options of `createEigenSession`. */
export interface NativeSessionOptions<O extends Ort = Ort> extends EigenSessionOptions<O> {
  /** Writes models to files before they are loaded. */
  readonly files: ModelFiles;
}

/**
 * Prepares a model for all tasks of a pack and loads it once.
 * @param ort the module onnxruntime-react-native
 * @param model bytes of the ONNX file, or a source of them (`fileSource`)
 * @throws as `createEigenSession` of `eigenlora/onnxruntime`; BackendError also when the model's file cannot be written
 * @example
 * const session = await createEigenSession(ort, model, pack, { files });
 * await session.switchTask("debtags-role");
 */
export async function createEigenSession<O extends Ort>(
  ort: O,
  model: SourceInput,
  pack: Pack,
  given: NativeSessionOptions<O>,
): Promise<EigenSession<O>> {
  checkPack("createEigenSession", pack);
  checkOptions("createEigenSession", given, [...SESSION_OPTIONS, "session", "files"]);
  const { files, session, ...options } = given;
  if (typeof files?.write !== "function" || typeof files.remove !== "function")
    throw new TypeError(`createEigenSession: files: expected { write, remove }, got ${described(files)}`);
  return createSession(
    new NativeEngine(ort, files, session as object | undefined),
    model,
    pack,
    options as SessionOptions,
  );
}

class NativeEngine implements Engine<OrtSession> {
  readonly name = "onnxruntime-react-native";
  readonly #ort: Ort;
  readonly #files: ModelFiles;
  readonly #options: object;
  /** Runs, releases and makes tensors. */
  readonly #engine: Engine<OrtSession>;
  readonly #paths = new WeakMap<OrtSession, string>();
  readonly #loading = new Set<object>();
  #count = 0;

  constructor(ort: Ort, files: ModelFiles, options: object = {}) {
    this.#ort = ort;
    this.#files = files;
    this.#options = options;
    this.#engine = createEngine(ort, options as never);
  }

  get provider(): string {
    return this.#engine.provider;
  }

  async load({ bytes, files }: DetachedModel, options: LoadOptions = {}): Promise<OrtSession> {
    const externalData = files.map(({ path, data }) => ({ path, data: alone(data) }));
    // Native code reads these on a thread of its own, and does not keep them alive.
    this.#loading.add(externalData);
    let path: string | undefined;
    try {
      path = await this.#files.write(`eigenlora-${Date.now()}-${this.#count++}.onnx`, bytes);
      const given = { ...optionsFor(this.#options, options), ...(files.length > 0 && { externalData }) };
      const session = await this.#ort.InferenceSession.create(path as never, given as never);
      this.#paths.set(session, path);
      return session;
    } catch (cause) {
      await this.#remove(path);
      const message = `onnxruntime cannot load the model (providers: ${this.provider}): ${(cause as Error).message}`;
      throw new BackendError(message, { backend: this.name, cause });
    } finally {
      this.#loading.delete(externalData);
    }
  }

  run(session: OrtSession, feeds: Tensors, fetches: unknown, options?: object): Promise<Tensors> {
    const own = Object.entries(feeds).map(([name, tensor]) => {
      const { data, dims, type } = tensor;
      const fits = !ArrayBuffer.isView(data) || alone(data as Uint8Array) === data;
      return [name, fits ? tensor : this.#engine.tensor(alone(data as Uint8Array), dims, type)] as const;
    });
    return this.#engine.run(session, Object.fromEntries(own), fetches, options);
  }

  tensor(data: Parameters<Engine["tensor"]>[0], dims: readonly number[], type?: string): EngineTensor {
    // A view is copied here once, instead of in each run.
    return this.#engine.tensor(ArrayBuffer.isView(data) ? alone(data as Uint8Array) : data, dims, type);
  }

  async release(session: OrtSession): Promise<void> {
    await this.#engine.release(session);
    await this.#remove(this.#paths.get(session));
  }

  /** A file that cannot be deleted costs space, not answers. */
  async #remove(path: string | undefined): Promise<void> {
    if (path !== undefined) await this.#files.remove(path).catch(() => undefined);
  }
}

/** The same elements in a buffer that holds nothing else. */
function alone(data: Uint8Array): Uint8Array {
  return data.byteLength === data.buffer.byteLength ? data : data.slice();
}
