/**
 * Files of the command line: written beside the target and renamed, or appended so that a crash at any byte leaves the old
 * content (SPEC.md, section 8). The only code of the package that writes to disk.
 */
import { randomUUID } from "node:crypto";
import { mkdir, open, readFile, rename, unlink } from "node:fs/promises";
import { dirname, resolve } from "node:path";
import { SourceError } from "../errors.ts";
import type { Append } from "../format/layout.ts";
import { UsageError } from "./options.ts";

type Chunks = Iterable<Uint8Array> | AsyncIterable<Uint8Array>;

/** @throws UsageError when `target` is one of the files that it is made of */
export function refuseOverwriting(target: string, ...paths: readonly string[]): void {
  if (!paths.some((path) => resolve(path) === resolve(target))) return;
  throw new UsageError(`--output ${target}: that would overwrite what it is made of; choose another name`);
}

/** @throws SourceError when it cannot be read */
export async function readText(path: string): Promise<string> {
  return readFile(path, "utf8").catch((cause: Error) => {
    throw new SourceError(`cannot be read: ${cause.message}`, { file: path, cause });
  });
}

/** @throws SourceError when there cannot be one */
export async function makeFolder(path: string): Promise<void> {
  await mkdir(path, { recursive: true }).catch((cause: Error) => {
    throw new SourceError(`cannot be made a folder: ${cause.message}`, { file: path, cause });
  });
}

/** An object as a JSON file for people. */
export function jsonFile(value: object): Uint8Array[] {
  return [new TextEncoder().encode(`${JSON.stringify(value, null, 2)}\n`)];
}

/**
 * Writes a file as a whole or not at all.
 * @returns its size in bytes
 * @throws SourceError when it cannot be written; an existing file is then untouched
 */
export async function writeWhole(path: string, chunks: Chunks): Promise<number> {
  // Not by process id: machines that share a folder have the same ones, and so has a container that starts again.
  const beside = `${path}.${randomUUID().slice(0, 8)}.tmp`;
  let bytes = 0;
  try {
    const file = await open(beside, "wx");
    try {
      for await (const chunk of chunks) {
        await file.writeFile(chunk);
        bytes += chunk.length;
      }
      await file.sync();
    } finally {
      await file.close();
    }
    await rename(beside, path);
    await syncFolder(path);
    return bytes;
  } catch (cause) {
    await unlink(beside).catch(() => undefined);
    if ((cause as NodeJS.ErrnoException).code === undefined) throw cause;
    throw new SourceError(`cannot be written: ${(cause as Error).message}`, { file: path, cause });
  }
}

/** A rename is durable once its folder is; some file systems cannot sync a folder, and then there is nothing to do. */
async function syncFolder(path: string): Promise<void> {
  const folder = await open(dirname(path), "r").catch(() => undefined);
  await folder?.sync().catch(() => undefined);
  await folder?.close();
}

/**
 * Appends to a pack. The superblock goes last, behind a flush: until it is written the file reads as before.
 * @param plan reads the pack and says what to write; called while no other append can run
 * @throws SourceError when the disk is full or another append is under way; the pack is then as it was
 */
export async function append<T extends Append>(path: string, plan: () => Promise<T>): Promise<T> {
  const lock = `${path}.lock`;
  const held = await open(lock, "wx").catch((cause: NodeJS.ErrnoException) => {
    const why = cause.code === "EEXIST" ? `another append is under way; if none is, delete ${lock}` : cause.message;
    throw refused(path, cause, why);
  });
  try {
    const planned = await plan();
    await carryOut(path, planned);
    return planned;
  } finally {
    await held.close();
    await unlink(lock).catch(() => undefined);
  }
}

function refused(path: string, cause: Error, why: string = cause.message): SourceError {
  return new SourceError(`cannot be appended to: ${why}`, { file: path, cause });
}

async function carryOut(path: string, { offset, body, superblock, superblockOffset }: Append): Promise<void> {
  const file = await open(path, "r+").catch((cause: Error) => {
    throw refused(path, cause);
  });
  try {
    let at = offset;
    try {
      for (const chunk of body) {
        for (let done = 0; done < chunk.length; ) {
          done += (await file.write(chunk, done, chunk.length - done, at + done)).bytesWritten;
        }
        at += chunk.length;
      }
      await file.sync();
    } catch (cause) {
      await file.truncate(offset).catch(() => undefined);
      throw refused(path, cause as Error, `${(cause as Error).message}; it is as it was before`);
    }
    // What lies behind the new end was left by an append that never finished.
    await file.truncate(at);
    await file.write(superblock, 0, superblock.length, superblockOffset);
    await file.sync();
  } finally {
    await file.close();
  }
}
