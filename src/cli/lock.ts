/**
 * One writer at a time. A command that changes a file holds the lock beside it, `FILE.lock`, from before the file is read until its new
 * content is there. The lock names the process that holds it: that of a process that has ended is taken over, any other is waited for.
 * Own code, since proper-lockfile finds a dead holder by the age of its lock alone, and brings three packages.
 */
import { createHash, randomBytes } from "node:crypto";
import {
  closeSync,
  lstatSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  realpathSync,
  rmSync,
  symlinkSync,
  writeSync,
} from "node:fs";
import { hostname } from "node:os";
import { basename, dirname, join, resolve } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { reasonOf } from "../disk.ts";
import { SourceError } from "../errors.ts";

/** Who holds a lock. */
interface Owner {
  readonly pid: number;
  /** Name of the machine, for people. */
  readonly host: string;
  /** Digest of what tells machines, and containers with process ids of their own, from each other. */
  readonly machine: string;
  /** When the process began, as the system says it: a process id is used again. Empty where the system does not say. */
  readonly began: string;
  /** Since when it is held, for people. */
  readonly since: string;
  /** Differs from lock to lock, so that none is taken for another. */
  readonly token: string;
}

/** A lock that cannot be read: of another program, or on its way to be written. */
const NAMELESS = "nameless";
type Holder = Owner | typeof NAMELESS;

/** Milliseconds. */
const PATIENCE = 60_000;
const NAMELESS_PATIENCE = 2_000;
const SILENCE = 1_000;

/** A lock that is held. */
export interface Lock {
  close(): void;
}

/** The file that a path stands for, through symbolic links: what is to be locked and replaced. */
export function realTarget(path: string): string {
  try {
    return realpathSync(path);
  } catch {
    return resolve(path);
  }
}

/**
 * Takes the lock of a file, there or not. It is given back by `close`, and when the process ends by a signal or an exit; what SIGKILL
 * leaves, the next taker removes.
 * @param warn is told what it waits for
 * @param patience milliseconds that it waits for another process
 * @throws SourceError naming the process that holds it for longer, or when the lock cannot be made
 */
export async function takeLock(
  path: string,
  warn: (message: string) => void,
  patience: number = PATIENCE,
): Promise<Lock> {
  const target = realTarget(path);
  const file = `${target}.lock`;
  const fail = (message: string, cause?: unknown): never => {
    throw new SourceError(message, { file: path, cause });
  };
  const token = randomBytes(8).toString("hex");
  // Compare the token: if the file was deleted by hand, another process may have made its own by now.
  const release = (): void => {
    if (isOf(file, token)) rmSync(file, { force: true });
  };
  // Before there is a lock: without a listener a signal would end the process between its making and the next line.
  const forget = undoOnExit(release);
  try {
    const began = performance.now();
    let told = false;
    for (;;) {
      const holder = take(file, token);
      if (holder === undefined) {
        sweep(target);
        break;
      }
      const waited = performance.now() - began;
      if (waited >= (holder === NAMELESS ? Math.min(NAMELESS_PATIENCE, patience) : patience))
        fail(refusal(holder, file, waited));
      if (!told && waited >= SILENCE && holder !== NAMELESS) {
        warn(`waiting for ${describe(holder)}, which is writing ${path}`);
        told = true;
      }
      await sleep(20 + 60 * Math.random());
    }
  } catch (cause) {
    forget();
    if (cause instanceof SourceError) throw cause;
    const missing = isCode(cause, "ENOENT") ? `the folder ${dirname(target)} is not there; make it first` : undefined;
    fail(`cannot be written: ${missing ?? reasonOf(cause)}`, cause);
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

function refusal(holder: Holder, file: string, waited: number): string {
  if (holder === NAMELESS) return `has a lock that names no process; if nothing is writing it, delete ${file}`;
  const what = `is being written by ${describe(holder)}, waited ${Math.round(waited / 1000)} s for it: try again later`;
  if (holder.machine === MACHINE) return what;
  return `${what}. Whether it still runs cannot be told from here; if it does not, delete ${file}`;
}

/** Makes the lock, in place of one whose owner is gone. @returns who holds it instead */
function take(file: string, token: string): Holder | undefined {
  for (;;) {
    if (make(file, token)) return undefined;
    const found = holderOf(file);
    if (found === undefined) continue;
    if (found === NAMELESS || !isGone(found)) return found;
    // Two that see the same dead lock must not both remove it: the second would remove the first one's own. So its removal has
    // a lock, named after the dead one, which never comes again.
    const turn = `${file}.${found.token}`;
    const other = take(turn, token);
    if (other !== undefined) return other;
    try {
      if (isOf(file, found.token)) rmSync(file, { force: true });
    } finally {
      rmSync(turn, { force: true });
    }
  }
}

/** Removes what killed writers left of a file whose lock is held: nobody else has any of it by now. */
function sweep(target: string): void {
  const [folder, own] = [dirname(target), basename(target)];
  for (const name of readdirSync(folder)) {
    const left = name.startsWith(own) && /^\.(lock\.[0-9a-f.]+|[0-9a-f]{8}\.tmp)$/.test(name.slice(own.length));
    if (left) rmSync(join(folder, name), { force: true });
  }
}

/** @returns false when there is one already */
function make(file: string, token: string): boolean {
  const owner: Owner = { ...SELF, since: new Date().toISOString(), token };
  const text = JSON.stringify(owner);
  try {
    // A symbolic link that points to its own text is there with it or not at all; a file is empty for a moment.
    symlinkSync(text, file);
    return true;
  } catch (error) {
    if (isCode(error, "EEXIST")) return false;
  }
  // A file system without such links, or one that refuses any file; then this says why.
  let handle: number;
  try {
    handle = openSync(file, "wx");
  } catch (error) {
    if (isCode(error, "EEXIST")) return false;
    throw error;
  }
  try {
    writeSync(handle, text);
    return true;
  } catch (error) {
    rmSync(file, { force: true });
    throw error;
  } finally {
    closeSync(handle);
  }
}

/** @returns undefined when there is no lock */
function holderOf(file: string): Holder | undefined {
  try {
    return parse(readlinkSync(file));
  } catch (error) {
    if (isCode(error, "ENOENT")) return undefined;
  }
  try {
    // A pipe would be waited for.
    return lstatSync(file).isFile() ? parse(readFileSync(file, "utf8")) : NAMELESS;
  } catch (error) {
    return isCode(error, "ENOENT") ? undefined : NAMELESS;
  }
}

function isOf(file: string, token: string): boolean {
  const holder = holderOf(file);
  return typeof holder === "object" && holder.token === token;
}

function parse(text: string): Holder {
  try {
    const { pid, host, machine, began, since, token } = JSON.parse(text) as Record<keyof Owner, unknown>;
    const isText = (value: unknown): value is string => typeof value === "string";
    const known = isText(host) && isText(machine) && isText(began) && isText(since) && isText(token);
    if (!known || !/^[0-9a-f]{16}$/.test(token) || !Number.isSafeInteger(pid) || (pid as number) < 1) return NAMELESS;
    return { pid: pid as number, host, machine, began, since, token };
  } catch {
    return NAMELESS;
  }
}

/** Whether the process that made a lock has certainly ended. Of another machine's nothing is certain. */
function isGone({ pid, machine, began }: Owner): boolean {
  if (machine !== MACHINE) return false;
  try {
    process.kill(pid, 0);
  } catch (error) {
    if (isCode(error, "ESRCH")) return true;
  }
  const found = processOf(pid);
  if (found === undefined) return false;
  return found.ended || (began !== "" && began !== found.began);
}

/** What Linux says of a process; undefined elsewhere. */
function processOf(pid: number): { began: string; ended: boolean } | undefined {
  const stat = textOf(`/proc/${pid}/stat`);
  // The name of the command, in brackets, may hold anything: state and start are counted from behind it.
  const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
  const start = fields[19];
  if (start === undefined) return undefined;
  // Ended, but nobody has asked how: still there under its id.
  return { began: `${textOf("/proc/sys/kernel/random/boot_id")} ${start}`, ended: /[ZX]/.test(fields[0]!) };
}

/** Text of a small file of the system; empty when it is not there. */
function textOf(path: string): string {
  try {
    return readFileSync(path, "utf8").trim();
  } catch {
    return "";
  }
}

function pidSpace(): string {
  try {
    return readlinkSync("/proc/self/ns/pid");
  } catch {
    return "";
  }
}

const MACHINE = createHash("sha256")
  .update(JSON.stringify([hostname(), textOf("/etc/machine-id"), pidSpace()]))
  .digest("hex")
  .slice(0, 16);
const SELF = { pid: process.pid, host: hostname(), machine: MACHINE, began: processOf(process.pid)?.began ?? "" };

function isCode(error: unknown, code: string): boolean {
  return (error as NodeJS.ErrnoException).code === code;
}

/**
 * What is undone when a command is stopped halfway: locks, and files beside their targets. What writes to disk does so in synchronous
 * steps (files.ts), so a signal is heard between two of them, never within one.
 */
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

/** Whether the next Ctrl-C is somebody's to answer. */
let gentle = false;

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
    gentle = false;
    process.off("SIGINT", first);
  };
  gentle = true;
  process.once("SIGINT", first);
  return forget;
}

function listen(how: "on" | "off"): void {
  for (const signal of SIGNALS) process[how](signal, stop);
  process[how]("exit", undo);
}

/** Latest first. What cannot be undone must not keep the rest from it. */
function undo(): void {
  for (const step of [...steps].reverse()) {
    try {
      step();
    } catch {
      // The process ends; there is nobody left to be told.
    }
  }
  steps.clear();
}

/** Ends the process by the same signal, so that its parent sees why. */
function stop(signal: NodeJS.Signals): void {
  if (signal === "SIGINT" && gentle) return;
  undo();
  listen("off");
  process.kill(process.pid, signal);
}
