/**
 * Files of the command line: written beside the target and renamed, or appended so that a crash at any byte leaves the old
 * content (SPEC.md, section 9). Beside the caches the only code of the package that writes to disk. All in synchronous steps: see undo.ts. What
 * others may change at the same time is written under its lock (`Run.lock`).
 */
import { randomUUID } from "node:crypto";
import {
  closeSync,
  existsSync,
  fchmodSync,
  fsyncSync,
  ftruncateSync,
  mkdirSync,
  openSync,
  readSync,
  renameSync,
  rmdirSync,
  rmSync,
  writeSync,
} from "node:fs";
import { readFile } from "node:fs/promises";
import { dirname, resolve } from "node:path";
import { reasonOf, refuseOtherKinds } from "../disk.ts";
import { SourceError } from "../errors.ts";
import type { Append } from "../format/encode.ts";
import type { Scratch } from "../pack/write.ts";
import { realTarget, undoOnExit } from "./lock.ts";
import { stat } from "./target.ts";

type Chunks = Iterable<Uint8Array> | AsyncIterable<Uint8Array>;

/** Makes a handler for `catch` that says what could not be done with a file. */
function failed(path: string, what: string, how = ""): (cause: unknown) => never {
  return (cause) => {
    throw new SourceError(`cannot be ${what}: ${reasonOf(cause)}${how}`, { file: path, cause });
  };
}

/** @throws SourceError when it is no file, or cannot be read */
export async function readText(path: string): Promise<string> {
  await refuseOtherKinds(path, "a file");
  return readFile(path, "utf8").catch(failed(path, "read"));
}

/** @throws SourceError when it cannot be read or is not valid JSON */
export async function readJson(path: string): Promise<unknown> {
  const text = await readText(path);
  try {
    return JSON.parse(text);
  } catch (cause) {
    throw new SourceError(`is not valid JSON: ${(cause as Error).message}`, { file: path, cause });
  }
}

/**
 * Makes a folder, and those that it lies in, as far as they are not there.
 * @returns removes those that it made again, unless something is in them by then
 * @throws SourceError when there cannot be one; none is then made
 */
export function makeFolder(path: string): () => void {
  const missing: string[] = [];
  for (let at = resolve(path); !existsSync(at); at = dirname(at)) missing.push(at);
  const made: string[] = [];
  const undo = (): void => {
    for (const folder of made.splice(0).reverse()) quietly(() => rmdirSync(folder));
  };
  try {
    for (const folder of missing.reverse()) {
      mkdirSync(folder);
      made.push(folder);
    }
    // Says what is there instead.
    mkdirSync(path, { recursive: true });
    return undo;
  } catch (cause) {
    undo();
    return failed(path, "made a folder")(cause);
  }
}

/** An object as a JSON file for people. */
export function jsonFile(value: object): Uint8Array[] {
  return [new TextEncoder().encode(`${JSON.stringify(value, null, 2)}\n`)];
}

/**
 * Writes a file as a whole or not at all.
 * @param replace as of `writeTogether`
 * @returns its size in bytes
 * @throws SourceError when it cannot be written; an existing file is then untouched
 */
export async function writeWhole(path: string, chunks: Chunks, replace = true): Promise<number> {
  const [size] = await writeTogether([[path, chunks]], replace);
  return size!;
}

/**
 * Writes files that belong together: each beside its target first, and only when all are there they are renamed.
 * @param replace files that are there already. Otherwise one that appeared during the work stays, and what was to be written is kept
 *   under other names
 * @returns their sizes in bytes
 * @throws SourceError naming the one that cannot be written
 */
export async function writeTogether(
  files: readonly (readonly [path: string, chunks: Chunks, mode?: number])[],
  replace = true,
): Promise<number[]> {
  const written: Written[] = [];
  const placed: string[] = [];
  const undo = (): void => {
    for (const path of [...written.map(({ beside }) => beside), ...placed]) rmSync(path, { force: true });
  };
  const forget = undoOnExit(undo);
  const sizes: number[] = [];
  let at = "";
  try {
    for (const [path, chunks, mode] of files) {
      at = path;
      const target = realTarget(path);
      const beside = besideOf(target);
      written.push({ path, target, beside });
      sizes.push(await writeNew(beside, chunks, mode ?? stat(target)?.mode));
    }
    refuseTaken(written, replace);
    for (const { path, target, beside } of written) {
      at = path;
      const isNew = stat(target) === undefined;
      renameSync(beside, target);
      if (isNew) placed.push(target);
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

/** So much of what is put aside stays in memory. */
const HELD_BYTES = 2 ** 23;

/**
 * A file beside a target, for what will be part of it: made when there is much, and gone when it is closed.
 * @param most bytes that stay in memory
 */
export function openScratch(path: string, most: number = HELD_BYTES): Scratch & { close(): void } {
  const beside = besideOf(realTarget(path));
  let file: number | undefined;
  let [held, end] = [0, 0];
  const undo = (): void => rmSync(beside, { force: true });
  let forget = (): void => {};
  return {
    async put(bytes) {
      if (held + bytes.length <= most) {
        held += bytes.length;
        return holding(bytes);
      }
      if (file === undefined) {
        forget = undoOnExit(undo);
        file = await attempt(path, "written", () => openSync(beside, "wx+", 0o600));
      }
      const at = end;
      end += await attempt(path, "written", () => writeAt(file!, bytes, at));
      return reading(path, file, at, bytes.length);
    },
    close() {
      if (file !== undefined) closeSync(file);
      file = undefined;
      undo();
      forget();
    },
  };
}

// Functions keep all that lies around them: here that is not the bytes that were written.
const holding = (bytes: Uint8Array) => async (): Promise<Uint8Array> => bytes;
const reading = (path: string, file: number, at: number, size: number) => (): Promise<Uint8Array> =>
  attempt(path, "read", () => readAt(file, at, size));

function readAt(file: number, at: number, size: number): Uint8Array {
  const bytes = new Uint8Array(size);
  for (let done = 0; done < size; ) {
    const count = readSync(file, bytes, done, size - done, at + done);
    if (count === 0) throw new Error("it has become shorter");
    done += count;
  }
  return bytes;
}

/** A name of its own. Not by process id: machines that share a folder have the same ones, and so has a container that starts again. */
function besideOf(target: string): string {
  return `${target}.${randomUUID().slice(0, 8)}.tmp`;
}

async function attempt<T>(path: string, what: string, work: () => T): Promise<T> {
  try {
    return work();
  } catch (cause) {
    return failed(path, what)(cause);
  }
}

/** A file beside its target. */
interface Written {
  readonly path: string;
  readonly target: string;
  readonly beside: string;
}

/** @throws SourceError when something came to lie where a file should go; what was written stays, under names of its own */
function refuseTaken(written: readonly Written[], replace: boolean): void {
  const taken = written.find(({ target }) => {
    const there = stat(target);
    return there && (!replace || !there.isFile());
  });
  if (!taken) return;
  const kept = written.map(({ beside }) => {
    const name = beside.replace(/\.tmp$/, "");
    renameSync(beside, name);
    return name;
  });
  const message = `was made by somebody else in the meantime and stays; what was to be written is in ${kept.join(", ")}`;
  throw new SourceError(message, { file: taken.path });
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
      failed(path, "appended to", "; it is as it was before")(cause);
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
