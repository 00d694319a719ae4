/**
 * `eigenlora/react-native/onnxruntime`: sessions on onnxruntime-react-native, whose native half differs from the other
 * builds. A model given as bytes is taken as the whole ArrayBuffer, without the options; so the model is written to a
 * file and its path given. A tensor and a file next to a model are taken from the beginning of their buffers, wherever
 * their arrays begin; so they get buffers of their own.
 */
import type { Pack } from "../src/core/pack.ts";
import { BackendError, checkOptions, checkPack, described } from "../src/errors.ts";
import type { Engine } from "../src/session/engine.ts";
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
  return createSession(nativeEngine(ort, files, session as object | undefined), model, pack, options as SessionOptions);
}

function nativeEngine(ort: Ort, files: ModelFiles, options: object = {}): Engine<OrtSession> {
  /** Runs, releases and makes tensors. */
  const engine = createEngine(ort, options as never);
  const { provider } = engine;
  const name = "onnxruntime-react-native";
  const paths = new WeakMap<OrtSession, string>();
  const loading = new Set<object>();
  let count = 0;
  /** A file that cannot be deleted costs space, not answers. */
  const remove = async (path: string | undefined): Promise<void> => {
    if (path !== undefined) await files.remove(path).catch(() => undefined);
  };
  return {
    ...{ name, provider },
    async load({ bytes, files: parts }, purpose = {}) {
      const externalData = parts.map(({ path, data }) => ({ path, data: alone(data) }));
      // Native code reads these on a thread of its own, and does not keep them alive.
      loading.add(externalData);
      let path: string | undefined;
      try {
        path = await files.write(`eigenlora-${Date.now()}-${count++}.onnx`, bytes);
        const given = { ...optionsFor(options, purpose), ...(parts.length > 0 && { externalData }) };
        const session = await ort.InferenceSession.create(path as never, given as never);
        paths.set(session, path);
        return session;
      } catch (cause) {
        await remove(path);
        const message = `onnxruntime cannot load the model (providers: ${provider}): ${(cause as Error).message}`;
        throw new BackendError(message, { backend: name, cause });
      } finally {
        loading.delete(externalData);
      }
    },
    run(session, feeds, fetches, runOptions) {
      const given = Object.entries(feeds).map(([input, tensor]) => {
        const { data, dims, type } = tensor;
        const fits = !ArrayBuffer.isView(data) || alone(data as Uint8Array) === data;
        return [input, fits ? tensor : engine.tensor(alone(data as Uint8Array), dims, type)] as const;
      });
      return engine.run(session, Object.fromEntries(given), fetches, runOptions);
    },
    // A view is copied here once, instead of in each run.
    tensor: (data, dims, type) =>
      engine.tensor(ArrayBuffer.isView(data) ? alone(data as Uint8Array) : data, dims, type),
    async release(session) {
      await engine.release(session);
      await remove(paths.get(session));
    },
  };
}

/** The same elements in a buffer that holds nothing else. */
function alone(data: Uint8Array): Uint8Array {
  return data.byteLength === data.buffer.byteLength ? data : data.slice();
}
