/**
 * Platform glue for Node, Deno and Bun: strings that are not URLs are paths. Not a public module: it is what `#platform`
 * resolves to where the `node` condition is set.
 */
/// <reference types="@webgpu/types" />
import { fstatSync } from "node:fs";
import { open, realpath } from "node:fs/promises";
import { basename, dirname } from "node:path";
import { fileURLToPath } from "node:url";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import { SourceError } from "../src/errors.ts";
import type { Thread } from "../src/extract/extractor.ts";
import { refuseOtherKinds } from "../src/file-kind.ts";
import type { ByteSource } from "../src/source.ts";

/**
 * Opens a file, by path or file: URL, for ranged reads. The handle stays open until `close`.
 * @throws SourceError when the path is not a readable file
 */
export const openPath: ((path: string) => Promise<ByteSource>) | undefined = async (pathOrUrl) => {
  const path = /^file:/i.test(pathOrUrl) ? fileURLToPath(pathOrUrl) : pathOrUrl;
  await refuseOtherKinds(path, "a file");
  const handle = await open(path, "r").catch((cause: unknown) => {
    throw new SourceError(`cannot be opened: ${reasonOf(cause)}`, { file: path, cause });
  });
  let { size } = await handle.stat();
  return {
    name: path,
    folder: await folderOf(path),
    // As it is now: a pack grows while another process appends to it, and its window then speaks of more than there was.
    get byteLength() {
      if (handle.fd >= 0) size = fstatSync(handle.fd).size;
      return size;
    },
    async read(offset, length, options) {
      options?.signal?.throwIfAborted();
      const bytes = new Uint8Array(length);
      // One read of Node is limited to 2 GiB.
      for (let done = 0; done < length; ) {
        if (handle.fd < 0) throw new SourceError("cannot be read: it was closed; open it again", { file: path });
        const { bytesRead } = await handle.read(bytes, done, Math.min(length - done, 2 ** 30), offset + done);
        if (bytesRead === 0) {
          throw new SourceError(
            `ends at byte ${offset + done}, but bytes ${offset} to ${offset + length} are needed: the file is truncated`,
            { file: path },
          );
        }
        done += bytesRead;
      }
      options?.signal?.throwIfAborted();
      return bytes;
    },
    close: () => handle.close(),
  };
};

/** The folder that holds a file, without links; undefined where the path itself is a link. */
async function folderOf(path: string): Promise<string | undefined> {
  const [file, folder] = await Promise.all([realpath(path), realpath(dirname(path))]);
  return dirname(file) === folder && basename(file) === basename(path) ? folder : undefined;
}

const REASONS: ReadonlyMap<unknown, string> = new Map([
  ["ENOENT", "there is no such file or folder"],
  ["EISDIR", "it is a folder"],
  ["ENOTDIR", "what should be a folder of its path is a file"],
  ["EACCES", "its permissions do not allow that"],
  ["EPERM", "its permissions do not allow that"],
  ["EROFS", "the disk is read-only"],
  ["ENOSPC", "the disk is full"],
  ["EMFILE", "too many files are open"],
  ["ENFILE", "too many files are open"],
  ["ENAMETOOLONG", "its name is too long"],
  ["ELOOP", "its links lead in a circle"],
]);

/** Why the system could not do something with a file, in words, with the system's own name for it. */
export function reasonOf(cause: unknown): string {
  const { code, message } = cause as NodeJS.ErrnoException;
  const words = REASONS.get(code);
  return words === undefined ? message : `${words} (${code})`;
}

/** Starts a thread for extraction. @throws Error when it cannot be started; from `ask` when it ends before it has answered */
export const openThread: (() => Promise<Thread>) | undefined = async () => {
  const { Worker } = await import("node:worker_threads");
  // Flags of this process are for its own entry: some, as --eval, would stop a thread. Almost all that a thread holds lies outside its heap.
  const options = { execArgv: [], resourceLimits: { maxYoungGenerationSizeMb: 4 } };
  const worker = new Worker(new URL("./extract-thread.js", import.meta.url), options);
  let [answered, failed]: [(answer: unknown) => void, (cause: unknown) => void] = [() => {}, () => {}];
  let ended: Error | undefined;
  const end = (cause: unknown): void => {
    ended ??= new Error("a thread that extracts modules has ended; try again with fewer workers", { cause });
    failed(ended);
  };
  worker
    .on("message", (answer) => answered(answer))
    .on("error", end)
    .on("exit", end);
  return {
    ask: (question, owned) =>
      new Promise((resolve, reject) => {
        if (ended) throw ended;
        [answered, failed] = [resolve, reject];
        worker.postMessage(question, owned);
      }),
    close: async () => void (await worker.terminate()),
  };
};

/** What V8's own collector is called with; undefined until it is first asked for, null where there is none. */
let collector: ((options?: { type: "minor" }) => void) | null | undefined;

/** Frees arrays that nobody uses any more, all of them or those made a moment ago. Does nothing where the engine has no way to. */
export function collectGarbage(which: "young" | "all"): void {
  if (collector === undefined) {
    collector = null;
    try {
      // The flag gives new contexts the function, and no others.
      setFlagsFromString("--expose-gc");
      collector = runInNewContext("gc") as NonNullable<typeof collector>;
      setFlagsFromString("--no-expose-gc");
    } catch {
      // Another engine: it keeps its own time.
    }
  }
  if (which === "young") collector?.({ type: "minor" });
  else collector?.();
}

/** Dawn's entry point. One for the life of the process: when it is collected, drivers may crash (dawn-gpu/node-webgpu#18). */
let dawn: object | undefined;

/**
 * The system's WebGPU: the runtime's own (Deno, newer engines), else that of the optional package `webgpu`.
 * @throws Error when neither is there
 */
export const openGpu: () => Promise<object> = async () => {
  const own = (globalThis.navigator as Navigator | undefined)?.gpu;
  if (own) return own;
  try {
    const { create } = await import("webgpu");
    return (dawn ??= create([]));
  } catch (cause) {
    throw new Error(`WebGPU needs the package "webgpu": npm install webgpu (${(cause as Error).message})`, { cause });
  }
};
