/**
 * Files that commands write: where they may go, one writer at a time, whole or not at all, and nothing half written
 * after a signal. All writes are synchronous steps, so a signal is heard between two of them. Locks are own code:
 * proper-lockfile finds a dead holder by the age of its lock alone, and brings three packages.
 */
import { isUtf8 } from "node:buffer";
import { createHash, randomBytes, randomUUID } from "node:crypto";
import * as fs from "node:fs";
import { readFile } from "node:fs/promises";
import { hostname } from "node:os";
import { basename, dirname, join, resolve } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { SourceError } from "../errors.ts";
import { kindInWords, reasonOf, refuseOtherKinds } from "../files-node.ts";
import type { Append } from "../format/encode.ts";
import { kindOf } from "../format/kind.ts";
import type { Scratch } from "../pack/write.ts";
import { UsageError } from "./options.ts";

export type Chunks = Iterable<Uint8Array> | AsyncIterable<Uint8Array>;

/** The file that a path stands for, through links: locked and replaced in its place. */
export function realTarget(path: string): string {
  try {
    return fs.realpathSync(path);
  } catch {
    return resolve(path);
  }
}

/** Entry at a path, through links; undefined when there is none. */
export function stat(path: string): fs.Stats | undefined {
  try {
    return fs.statSync(path, { throwIfNoEntry: false });
  } catch {
    // Part of the path is a file, or may not be read: the system reports it when something is written there.
    return undefined;
  }
}

/** @throws SourceError saying what could not be done with a file, and why */
function failed(path: string, what: string, cause: unknown, more = ""): never {
  if (cause instanceof SourceError) throw cause;
  throw new SourceError(`cannot be ${what}: ${reasonOf(cause)}${more}`, { file: path, cause });
}

function attempt<T>(path: string, what: string, work: () => T): T {
  try {
    return work();
  } catch (cause) {
    return failed(path, what, cause);
  }
}

/** Runs a step whose failure does no harm. */
function quietly(step: () => void): void {
  try {
    step();
  } catch {}
}

/** @throws SourceError when it is no file, cannot be read, or is not UTF-8 */
export async function readText(path: string): Promise<string> {
  await refuseOtherKinds(path, "a file");
  const bytes = await readFile(path).catch((cause) => failed(path, "read", cause));
  if (isUtf8(bytes)) return bytes.toString();
  const kind = kindOf(bytes);
  throw new SourceError(`is not text in UTF-8${kind === undefined ? "" : `: this is ${kind}`}`, { file: path });
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

/** Facts about a file to write. */
export interface TargetOptions {
  /** Replace a file that is there already; undefined where no option would. */
  readonly force?: boolean;
  /** Paths of what the command reads; undefined for what was not named. */
  readonly inputs?: readonly (string | undefined)[];
  /** Make missing folders on the way. Default: false, so that a mistyped folder is not made in silence. */
  readonly makesFolders?: boolean;
  /** The value of `--output`, where `path` is one of several files that come of it. */
  readonly output?: string;
}

/** Checked before the work begins, which may take hours. @throws UsageError when a file may not be written at `path` */
export function checkTarget(
  path: string,
  { force, inputs = [], makesFolders = false, output = path }: TargetOptions,
): void {
  const refuse = (problem: string, where = path === output ? "" : `${path} `): never => {
    throw new UsageError(`--output ${output}: ${where}${problem}`);
  };
  if (path === "-") refuse("nothing is written to standard output; name a file");
  if (/[/\\]$/.test(path)) refuse("ends like a folder; name a file in it");
  const folder = dirname(output);
  if (!makesFolders && !stat(folder)) refuse(`there is no folder ${folder}; make it first`, "");
  if (!makesFolders && !stat(folder)?.isDirectory()) refuse(`${folder} is not a folder`, "");
  const there = stat(path);
  if (there?.isDirectory()) refuse("is a folder; name a file in it");
  if (there && !there.isFile()) refuse(`is ${kindInWords(there)}; name a file`);
  if (!there && isLink(path)) refuse("is a link to a file that is not there; remove it, or name that file");
  if (inputs.some((input) => input !== undefined && realTarget(input) === realTarget(path)))
    refuse("would overwrite what it is made of; choose another name");
  if (there && !force)
    refuse(`already exists; choose another name${force === undefined ? "" : ", or replace it with --force"}`);
}

function isLink(path: string): boolean {
  try {
    return fs.lstatSync(path).isSymbolicLink();
  } catch {
    return false;
  }
}

/**
 * Makes a folder, and those that it lies in, as far as they are missing.
 * @throws SourceError when there cannot be one
 */
export function makeFolder(path: string): void {
  attempt(path, "made a folder", () => fs.mkdirSync(path, { recursive: true }));
}

// Writing.

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

/** A file under a temporary name in the folder of its target. */
interface Written {
  readonly path: string;
  readonly target: string;
  readonly temporary: string;
}

/**
 * Writes files that belong together: each under a temporary name first, and only when all are there they are renamed.
 * @param replace files that are there already. Otherwise one that appeared during the work stays, and what was to be
 *   written is kept under other names
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
    for (const path of [...written.map(({ temporary }) => temporary), ...placed]) fs.rmSync(path, { force: true });
  };
  const forget = undoOnExit(undo);
  const sizes: number[] = [];
  let at = "";
  try {
    for (const [path, chunks, mode] of files) {
      at = path;
      const target = realTarget(path);
      const temporary = temporaryOf(target);
      written.push({ path, target, temporary });
      // The new file keeps the permissions of the old one.
      sizes.push(await writeNew(temporary, chunks, mode ?? stat(target)?.mode));
    }
    refuseTaken(written, replace);
    for (const { path, target, temporary } of written) {
      at = path;
      const isNew = stat(target) === undefined;
      fs.renameSync(temporary, target);
      if (isNew) placed.push(target);
    }
    for (const folder of new Set(written.map(({ target }) => dirname(target)))) syncFolder(folder);
    return sizes;
  } catch (cause) {
    undo();
    if ((cause as NodeJS.ErrnoException).code === undefined) throw cause;
    return failed(at, "written", cause);
  } finally {
    forget();
  }
}

/** Not by process id: machines that share a folder have the same ones, and so has a container that starts again. */
function temporaryOf(target: string): string {
  return `${target}.${randomUUID().slice(0, 8)}.tmp`;
}

/** @throws SourceError when something came to lie where a file should go; what was written stays, under other names */
function refuseTaken(written: readonly Written[], replace: boolean): void {
  const taken = written.find(({ target }) => {
    const there = stat(target);
    return there && (!replace || !there.isFile());
  });
  if (!taken) return;
  const names = written.map(({ temporary }) => {
    const name = temporary.replace(/\.tmp$/, "");
    fs.renameSync(temporary, name);
    return name;
  });
  const message = `was made by somebody else in the meantime and stays; what was to be written is in ${names.join(", ")}`;
  throw new SourceError(message, { file: taken.path });
}

async function writeNew(path: string, chunks: Chunks, mode: number | undefined): Promise<number> {
  const file = fs.openSync(path, "wx", mode);
  try {
    if (mode !== undefined) fs.fchmodSync(file, mode);
    let bytes = 0;
    for await (const chunk of chunks) bytes += writeAt(file, chunk, bytes);
    fs.fsyncSync(file);
    return bytes;
  } finally {
    fs.closeSync(file);
  }
}

/** All of a chunk: one call of the system may take less. @returns its length */
function writeAt(file: number, chunk: Uint8Array, at: number): number {
  for (let done = 0; done < chunk.length; )
    done += fs.writeSync(file, chunk, done, Math.min(chunk.length - done, 2 ** 30), at + done);
  return chunk.length;
}

/** A rename is durable once its folder is; some file systems cannot sync a folder. */
function syncFolder(path: string): void {
  quietly(() => {
    const folder = fs.openSync(path, "r");
    quietly(() => fs.fsyncSync(folder));
    fs.closeSync(folder);
  });
}

/**
 * Appends to a pack whose lock is held. The superblock goes last, behind a flush: until it is written the file reads as
 * before (SPEC.md, section 9).
 * @throws SourceError when it cannot be written, as when the disk is full; the pack is then as it was
 */
export function append(path: string, { offset, body, superblock, superblockOffset }: Append): void {
  const file = attempt(path, "appended to", () => fs.openSync(path, "r+"));
  try {
    let at = offset;
    try {
      for (const chunk of body) at += writeAt(file, chunk, at);
      fs.fsyncSync(file);
    } catch (cause) {
      quietly(() => fs.ftruncateSync(file, offset));
      failed(path, "appended to", cause, "; it is as it was before");
    }
    attempt(path, "appended to", () => {
      // An append that never finished left bytes behind the new end.
      fs.ftruncateSync(file, at);
      writeAt(file, superblock, superblockOffset);
      fs.fsyncSync(file);
    });
  } finally {
    fs.closeSync(file);
  }
}

/** Storage for parts of a target: a temporary file, made when it is needed, and gone when it is closed. */
export function openScratch(path: string): Scratch & { close(): void } {
  const temporary = temporaryOf(realTarget(path));
  let file: number | undefined;
  let end = 0;
  const undo = (): void => fs.rmSync(temporary, { force: true });
  let forget = (): void => {};
  return {
    async put(bytes) {
      if (file === undefined) {
        forget = undoOnExit(undo);
        file = attempt(path, "written", () => fs.openSync(temporary, "wx+", 0o600));
      }
      const handle = file;
      const at = end;
      end += attempt(path, "written", () => writeAt(handle, bytes, at));
      return reading(path, handle, at, bytes.length);
    },
    close() {
      if (file !== undefined) fs.closeSync(file);
      file = undefined;
      undo();
      forget();
    },
  };
}

// A closure of its own: one within `put` would keep the bytes that were written alive.
const reading = (path: string, file: number, at: number, size: number) => async (): Promise<Uint8Array> =>
  attempt(path, "read", () => {
    const bytes = new Uint8Array(size);
    for (let done = 0; done < size; ) {
      const count = fs.readSync(file, bytes, done, size - done, at + done);
      if (count === 0) throw new Error("it has become shorter");
      done += count;
    }
    return bytes;
  });

// One writer at a time: a command holds FILE.lock from its beginning until the new content is there. The lock names the
// process that holds it. That of a process that has ended is taken over, any other is waited for.

interface Owner {
  readonly pid: number;
  /** Name of the machine, for people. */
  readonly host: string;
  /** Digest of the machine's name and id. */
  readonly machine: string;
  /** Start of the machine; empty where the system does not tell it, as the next two. */
  readonly boot: string;
  /** Namespace of process ids: a container has one of its own. */
  readonly namespace: string;
  /** Start of the process, which tells it from a later one with the same id. */
  readonly start: string;
  /** Start of the lock, for people. */
  readonly since: string;
  /** Unique, so that no lock is taken for another. */
  readonly token: string;
}

/** A lock that cannot be read: of another program, or about to be written. */
const NAMELESS = "nameless";

/** Milliseconds to wait for a process, and for a lock without a name; and those before a wait is reported. */
const PATIENCE = 60_000;
const NAMELESS_PATIENCE = 2_000;
const SILENCE = 1_000;

/**
 * Takes the lock of a file, there or not. `close` releases it, and so does the end of the process by a signal or an
 * exit; the next taker removes what SIGKILL leaves.
 * @param warn is given the process that is waited for
 * @param patience milliseconds to wait for another process
 * @throws SourceError naming the process that holds it for longer, or when the lock cannot be made
 */
export async function takeLock(
  path: string,
  warn: (message: string) => void,
  patience: number = PATIENCE,
): Promise<{ close(): void }> {
  const target = realTarget(path);
  const lock = `${target}.lock`;
  const token = randomBytes(8).toString("hex");
  // If the file was deleted by hand, another process may have made its own by now.
  const release = (): void => {
    if (isOf(lock, token)) fs.rmSync(lock, { force: true });
  };
  // Before there is a lock: otherwise a signal would end the process between its making and the next line.
  const forget = undoOnExit(release);
  try {
    const began = performance.now();
    let warned = false;
    for (;;) {
      const holder = take(lock, token);
      if (holder === undefined) break;
      const waited = performance.now() - began;
      const nameless = holder === NAMELESS;
      if (waited >= (nameless ? Math.min(NAMELESS_PATIENCE, patience) : patience))
        throw new SourceError(refusal(holder, lock, waited), { file: path });
      if (!warned && waited >= SILENCE && !nameless) {
        warn(`waiting for ${describe(holder)}, which is writing ${path}`);
        warned = true;
      }
      await sleep(20 + 60 * Math.random());
    }
    sweep(target);
  } catch (cause) {
    forget();
    return failed(path, "written", cause);
  }
  return {
    close() {
      release();
      forget();
    },
  };
}

function describe({ pid, host, since }: Owner): string {
  return `process ${pid} on ${host} (since ${since})`;
}

function refusal(holder: Owner | typeof NAMELESS, lock: string, waited: number): string {
  if (holder === NAMELESS) return `has a lock that names no process; if nothing is writing it, delete ${lock}`;
  const seconds = Math.round(waited / 1000);
  return `is being written by ${describe(holder)}, waited ${seconds} s for it: try again later, or if it no longer runs, delete ${lock}`;
}

/** Makes the lock, in place of one whose owner is gone. @returns the owner that holds it instead */
function take(lock: string, token: string): Owner | typeof NAMELESS | undefined {
  for (;;) {
    if (make(lock, token)) return undefined;
    const holder = holderOf(lock);
    if (holder === undefined) continue;
    if (holder === NAMELESS || !isGone(holder)) return holder;
    // Two processes may see the same dead lock, and the second would remove the first one's new lock. So the removal
    // has a lock, named after the dead one, whose token never comes again.
    const turn = `${lock}.${holder.token}`;
    const other = take(turn, token);
    if (other !== undefined) return other;
    try {
      if (isOf(lock, holder.token)) fs.rmSync(lock, { force: true });
    } finally {
      fs.rmSync(turn, { force: true });
    }
  }
}

/** Makes the lock whole, by a link to a file that is complete. @returns false when there is one already */
function make(lock: string, token: string): boolean {
  // `sweep` knows the name.
  const temporary = `${lock}.${token}.0`;
  try {
    fs.writeFileSync(temporary, JSON.stringify({ ...SELF, since: new Date().toISOString(), token }));
    try {
      fs.linkSync(temporary, lock);
    } catch (error) {
      // A file system without hard links, as on memory cards, or a file that `sweep` has removed meanwhile.
      if (!isCode(error, "EEXIST")) fs.copyFileSync(temporary, lock, fs.constants.COPYFILE_EXCL);
      else throw error;
    }
    return true;
  } catch (error) {
    const { code, syscall } = error as NodeJS.ErrnoException;
    if (code === "EEXIST" || (code === "ENOENT" && syscall === "copyfile")) return false;
    throw error;
  } finally {
    fs.rmSync(temporary, { force: true });
  }
}

/** Removes what killed writers left of a file whose lock is held. */
function sweep(target: string): void {
  for (const name of fs.readdirSync(dirname(target))) {
    const rest = name.startsWith(basename(target)) ? name.slice(basename(target).length) : "";
    if (/^\.(lock\.[0-9a-f.]+|[0-9a-f]{8}\.tmp)$/.test(rest)) fs.rmSync(join(dirname(target), name), { force: true });
  }
}

/** @returns undefined when there is no lock */
function holderOf(lock: string): Owner | typeof NAMELESS | undefined {
  try {
    // A pipe would be waited for.
    if (!fs.lstatSync(lock).isFile()) return NAMELESS;
    const owner = JSON.parse(fs.readFileSync(lock, "utf8")) as Record<string, unknown>;
    const { pid, token } = owner;
    const texts = TEXTS.every((key) => typeof owner[key] === "string");
    const known = texts && /^[0-9a-f]{16}$/.test(String(token)) && Number.isSafeInteger(pid) && (pid as number) > 0;
    return known ? (owner as unknown as Owner) : NAMELESS;
  } catch (error) {
    return isCode(error, "ENOENT") ? undefined : NAMELESS;
  }
}

function isOf(lock: string, token: string): boolean {
  const holder = holderOf(lock);
  return typeof holder === "object" && holder.token === token;
}

/**
 * True when the process that made a lock has certainly ended, which nobody knows of a process of another machine or in
 * another container.
 */
function isGone({ pid, machine, boot, namespace, start }: Owner): boolean {
  if (machine !== SELF.machine) return false;
  // Machines of one name that share a folder are told apart by their ids alone.
  if (boot !== SELF.boot) return ID !== "";
  if (namespace !== SELF.namespace) return false;
  const now = startOf(pid);
  if (now !== "" && now !== start) return true;
  try {
    process.kill(pid, 0);
    return false;
  } catch (error) {
    return isCode(error, "ESRCH");
  }
}

/** Ticks of the clock from the machine's start to a process's, the 22nd field; the 2nd may hold spaces and brackets. */
function startOf(pid: number): string {
  return textOf(`/proc/${pid}/stat`).replace(/.*\)/s, "").split(" ")[20] ?? "";
}

/** Reads a small file of the system; empty when it is not there. */
function textOf(path: string, read: (path: string, encoding: "utf8") => string = fs.readFileSync): string {
  try {
    return read(path, "utf8").trim();
  } catch {
    return "";
  }
}

const ID = textOf("/etc/machine-id");
const SELF: Omit<Owner, "since" | "token"> = {
  pid: process.pid,
  host: hostname(),
  machine: createHash("sha256")
    .update(JSON.stringify([hostname(), ID]))
    .digest("hex")
    .slice(0, 16),
  boot: textOf("/proc/sys/kernel/random/boot_id"),
  namespace: textOf("/proc/self/ns/pid", fs.readlinkSync),
  start: startOf(process.pid),
};
const TEXTS = ["host", "machine", "boot", "namespace", "start", "since"];

function isCode(error: unknown, code: string): boolean {
  return (error as NodeJS.ErrnoException).code === code;
}

// Undone when a command is stopped halfway: locks, and temporary files.

const SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP"] as const;
const steps = new Set<() => void>();

/**
 * Calls `step` when the process ends, by a signal or otherwise, before the function returned has been called.
 * @param step synchronous
 */
export function undoOnExit(step: () => void): () => void {
  if (steps.size === 0) listen("on");
  steps.add(step);
  return () => {
    if (steps.delete(step) && steps.size === 0) listen("off");
  };
}

/** True while a listener answers the next Ctrl-C. */
let sigintHandled = false;

/**
 * Calls `step` at the first Ctrl-C, which ends nothing then; a second one does.
 * @returns a function that stops listening
 */
export function onInterrupt(step: () => void): () => void {
  const first = (): void => {
    // Other listeners hear the same signal first.
    setImmediate(forget);
    step();
  };
  const forget = (): void => {
    sigintHandled = false;
    process.off("SIGINT", first);
  };
  sigintHandled = true;
  process.once("SIGINT", first);
  return forget;
}

function listen(how: "on" | "off"): void {
  for (const signal of SIGNALS) process[how](signal, stop);
  process[how]("exit", undo);
}

/** Latest first. A step that fails must not keep the rest from being undone. */
function undo(): void {
  for (const step of [...steps].reverse()) quietly(step);
  steps.clear();
}

/** Ends the process by the same signal, so that its parent sees why. */
function stop(signal: NodeJS.Signals): void {
  if (signal === "SIGINT" && sigintHandled) return;
  undo();
  listen("off");
  process.kill(process.pid, signal);
}
