/**
 * Files on a disk: ranged reads of one, what lies at a path, and why the system could not do something, in words.
 * `#files` of package.json is this in Node, Deno and Bun, where the condition `node` is set.
 */

import { fstatSync, type Stats } from "node:fs";
import { open, realpath, stat } from "node:fs/promises";
import { basename, dirname } from "node:path";
import { fileURLToPath } from "node:url";
import { SourceError } from "./errors.ts";
import { throwIfAborted } from "./pace.ts";
import type { ByteSource } from "./source.ts";

/**
 * Opens a file, by path or file: URL, for ranged reads. The handle stays open until `close`.
 * @param name for messages. Default: the path
 * @throws SourceError when the path is not a readable file
 */
export async function openPath(pathOrUrl: string, name?: string): Promise<ByteSource> {
  const path = /^file:/i.test(pathOrUrl) ? fileURLToPath(pathOrUrl) : pathOrUrl;
  await refuseOtherKinds(path, "a file");
  const handle = await open(path, "r").catch((cause: unknown) => {
    throw new SourceError(`cannot be opened: ${reasonOf(cause)}`, { file: path, cause });
  });
  let { size } = await handle.stat();
  return {
    name: name ?? path,
    folder: await folderOf(path),
    // Asked each time: a pack grows while another process appends to it, and its window then names more bytes than
    // before.
    get byteLength() {
      if (handle.fd >= 0) size = fstatSync(handle.fd).size;
      return size;
    },
    async read(offset, length, options) {
      throwIfAborted(options?.signal);
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
      throwIfAborted(options?.signal);
      return bytes;
    },
    close: () => handle.close(),
  };
}

/** Resolves the links of the folder that holds a file; undefined where the path itself is a link. */
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

/** Names in words what lies at a path instead of a file. */
export function kindInWords(there: Stats): string {
  if (there.isDirectory()) return "a folder";
  return there.isFIFO() ? "a pipe" : there.isSocket() ? "a socket" : "a device";
}

/**
 * Asks what lies at a path before it is opened: opening a pipe waits for a writer, and a device may give bytes without
 * end. Links are followed. What is missing or may not be seen passes, since opening it says why.
 * @param expected in words
 * @throws SourceError when there is something that is neither a file nor, where one is expected too, a folder
 */
export async function refuseOtherKinds(path: string, expected: "a file" | "a file or a folder"): Promise<void> {
  const there = await stat(path).catch(() => undefined);
  if (!there || there.isFile() || (expected !== "a file" && there.isDirectory())) return;
  const how = there.isFIFO() ? "; save what comes out of it in a file first" : "";
  throw new SourceError(`is ${kindInWords(there)}, expected ${expected}${how}`, { file: path });
}
