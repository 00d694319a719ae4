/**
 * Files of the command line: written beside the target and renamed, or appended so that a crash at any byte leaves the old
 * content (SPEC.md, section 9). The only code of the package that writes to disk.
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

/** For `catch`: says what could not be done with a file. */
function failed(path: string, what: string, how?: string): (cause: unknown) => never {
  return (cause) => {
    throw new SourceError(`cannot be ${what}: ${how ?? (cause as Error).message}`, { file: path, cause });
  };
}

/** @throws SourceError when it cannot be read */
export function readText(path: string): Promise<string> {
  return readFile(path, "utf8").catch(failed(path, "read"));
}

/** @throws SourceError when it cannot be read or is no JSON */
export async function readJson(path: string): Promise<unknown> {
  const text = await readText(path);
  try {
    return JSON.parse(text);
  } catch (cause) {
    throw new SourceError(`is not JSON: ${(cause as Error).message}`, { file: path, cause });
  }
}

/** @throws SourceError when there cannot be one */
export async function makeFolder(path: string): Promise<void> {
  await mkdir(path, { recursive: true }).catch(failed(path, "made a folder"));
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
    return failed(path, "written")(cause);
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
    const why = cause.code === "EEXIST" ? `another append is under way; if none is, delete ${lock}` : undefined;
    return failed(path, "appended to", why)(cause);
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

async function carryOut(path: string, { offset, body, superblock, superblockOffset }: Append): Promise<void> {
  const file = await open(path, "r+").catch(failed(path, "appended to"));
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
      failed(path, "appended to", `${(cause as Error).message}; it is as it was before`)(cause);
    }
    // What lies behind the new end was left by an append that never finished.
    await file.truncate(at);
    await file.write(superblock, 0, superblock.length, superblockOffset);
    await file.sync();
  } finally {
    await file.close();
  }
}
