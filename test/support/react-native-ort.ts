/**
 * Emulates onnxruntime-react-native on onnxruntime-node, as far as they differ: the native half runs on devices only.
 * Follows cpp/ of its release 1.24: `InferenceSessionHostObject.cpp`, `SessionUtils.cpp`, `TensorUtils.cpp`.
 */
import { readFile, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { NODE, type Ort } from "./sessions.ts";

/** A typed array in native code's view: `count` elements from the beginning of its buffer. */
function fromStart<T>(array: T, count?: number): T {
  const typed = array as unknown as Float32Array;
  const Kind = typed.constructor as new (buffer: ArrayBufferLike, offset: number, length?: number) => T;
  return new Kind(typed.buffer, 0, count);
}

interface Given {
  readonly externalData?: readonly { path: string; data: Uint8Array }[];
}
type Feeds = Record<string, { type: string; data: unknown; dims: readonly number[] }>;

/** The module; every model it loads is noted in `loaded`. */
export function nativeOrt(loaded: (string | Uint8Array)[]): Ort {
  const { Tensor, InferenceSession, env } = NODE;
  const create = async (model: string | Uint8Array, options?: Given) => {
    loaded.push(model);
    // `loadModel(buffer, byteOffset, byteLength, options)` reads its first argument whole, and the second as the
    // options.
    const external = options?.externalData?.map(({ path, data }) => ({ path, data: fromStart(data) }));
    const session = await (typeof model === "string"
      ? InferenceSession.create(new Uint8Array(await readFile(model)), {
          ...options,
          ...(external && { externalData: external }),
        })
      : InferenceSession.create(new Uint8Array(model.buffer)));
    return {
      inputNames: session.inputNames,
      outputNames: session.outputNames,
      inputMetadata: session.inputMetadata,
      outputMetadata: session.outputMetadata,
      release: () => session.release(),
      run(feeds: Feeds, fetches: never, more: never) {
        const seen = Object.entries(feeds).map(([name, { type, data, dims }]) => {
          const count = dims.reduce((product, size) => product * size, 1);
          return [name, new (Tensor as never as new (...of: unknown[]) => unknown)(type, fromStart(data, count), dims)];
        });
        return session.run(Object.fromEntries(seen), fetches, more);
      },
    };
  };
  return { ...NODE, InferenceSession: { create: create as never } as never, Tensor, env };
}

/** A folder of the app; `files` lists those that exist. */
export function folderFiles(folder: string): {
  files: Set<string>;
  write(name: string, bytes: Uint8Array): Promise<string>;
  remove(path: string): Promise<void>;
} {
  const files = new Set<string>();
  return {
    files,
    async write(name, bytes) {
      const path = join(folder, name);
      await writeFile(path, bytes);
      files.add(path);
      return path;
    },
    async remove(path) {
      await rm(path);
      files.delete(path);
    },
  };
}
