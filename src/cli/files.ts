/**
 * Files of the command line: written beside the target and renamed, or appended so that a crash at any byte leaves the old
 * content (SPEC.md, section 9). The only code of the package that writes to disk. All in synchronous steps: see undo.ts. What
 * others may change at the same time is written under its lock (`Run.lock`).
 */
import { randomUUID } from "node:crypto";
import {
  closeSync,
  fchmodSync,
  fsyncSync,
  ftruncateSync,
  openSync,
  renameSync,
  rmSync,
  statSync,
  writeSync,
} from "node:fs";
import { mkdir, readFile } from "node:fs/promises";
import { dirname } from "node:path";
import { SourceError } from "../errors.ts";
import type { Append } from "../format/layout.ts";
import { realTarget } from "./lock.ts";
import { UsageError } from "./options.ts";
import { undoOnExit } from "./undo.ts";

type Chunks = Iterable<Uint8Array> | AsyncIterable<Uint8Array>;

/** @throws UsageError when `target` is one of the files that it is made of */
export function refuseOverwriting(target: string, ...paths: readonly string[]): void {
  if (!paths.some((path) => realTarget(path) === realTarget(target))) return;
  throw new UsageError(`--output ${target}: that would overwrite what it is made of; choose another name`);
}

/** @throws UsageError naming a file that is there: it is not to be replaced */
export function refuseExisting(...paths: readonly string[]): void {
  const there = paths.find((path) => statSync(path, { throwIfNoEntry: false }));
  if (there !== undefined) throw new UsageError(`${there} is there already; choose another name`);
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
  const [size] = await writeTogether([[path, chunks]]);
  return size!;
}

/**
 * Writes files that belong together: each beside its target first, and only when all are there they are renamed.
 * @returns their sizes in bytes
 * @throws SourceError naming the one that cannot be written
 */
export async function writeTogether(files: readonly (readonly [path: string, chunks: Chunks])[]): Promise<number[]> {
  const written: { path: string; target: string; beside: string }[] = [];
  const undo = (): void => {
    for (const { beside } of written) rmSync(beside, { force: true });
  };
  const forget = undoOnExit(undo);
  const sizes: number[] = [];
  let at = "";
  try {
    for (const [path, chunks] of files) {
      at = path;
      const target = realTarget(path);
      // Not by process id: machines that share a folder have the same ones, and so has a container that starts again.
      const beside = `${target}.${randomUUID().slice(0, 8)}.tmp`;
      written.push({ path, target, beside });
      sizes.push(await writeNew(beside, chunks, statSync(target, { throwIfNoEntry: false })?.mode));
    }
    for (const { path, target, beside } of written) {
      at = path;
      renameSync(beside, target);
    }
    for (const folder of new Set(written.map(({ target }) => dirname(target)))) syncFolder(folder);
    return sizes;
  } catch (cause) {
    undo();
    if ((cause as NodeJS.ErrnoException).code === undefined) throw cause;
    return failed(at, "written")(cause);
  } finally {
    forget();
  }
}

/** @param mode of the file that it is to replace: who may not read that may not read this */
async function writeNew(path: string, chunks: Chunks, mode: number | undefined): Promise<number> {
  const file = openSync(path, "wx", mode);
  try {
    if (mode !== undefined) fchmodSync(file, mode);
    let bytes = 0;
    for await (const chunk of chunks) bytes += writeAt(file, chunk, bytes);
    fsyncSync(file);
    return bytes;
  } finally {
    closeSync(file);
  }
}

/** All of a chunk: one call of the system may take less. @returns its length */
function writeAt(file: number, chunk: Uint8Array, at: number): number {
  for (let done = 0; done < chunk.length; )
    done += writeSync(file, chunk, done, Math.min(chunk.length - done, 2 ** 30), at + done);
  return chunk.length;
}

/** A rename is durable once its folder is; some file systems cannot sync a folder, and then there is nothing to do. */
function syncFolder(path: string): void {
  quietly(() => {
    const folder = openSync(path, "r");
    quietly(() => fsyncSync(folder));
    closeSync(folder);
  });
}

function quietly(step: () => void): void {
  try {
    step();
  } catch {
    // Nothing hangs on it.
  }
}

/**
 * Appends to a pack whose lock is held. The superblock goes last, behind a flush: until it is written the file reads as before.
 * @throws SourceError when it cannot be written, as when the disk is full; the pack is then as it was
 */
export function append(path: string, { offset, body, superblock, superblockOffset }: Append): void {
  const fail = failed(path, "appended to");
  let file: number;
  try {
    file = openSync(path, "r+");
  } catch (cause) {
    return fail(cause);
  }
  try {
    let at = offset;
    try {
      for (const chunk of body) at += writeAt(file, chunk, at);
      fsyncSync(file);
    } catch (cause) {
      quietly(() => ftruncateSync(file, offset));
      failed(path, "appended to", `${(cause as Error).message}; it is as it was before`)(cause);
    }
    // What lies behind the new end was left by an append that never finished.
    ftruncateSync(file, at);
    writeAt(file, superblock, superblockOffset);
    fsyncSync(file);
  } catch (cause) {
    if (cause instanceof SourceError) throw cause;
    fail(cause);
  } finally {
    closeSync(file);
  }
}
