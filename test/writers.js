/**
 * Runs two writers of one pack at once, in processes of their own, stopped or killed now and then. After each pair the pack must equal
 * the result of the two commands one after the other, in one order or the other; a command that exited 0 has taken place. A reader looks
 * on all the while.
 */
import { fork } from "node:child_process";
import { createHash } from "node:crypto";
import { once } from "node:events";
import { cp, mkdtemp, readdir, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { fileURLToPath } from "node:url";
import { openPack } from "eigenlora";
import { encodeTaskFile } from "eigenlora/build";

/** Effect of a command on the tasks of a pack. @typedef {Map<string, string>} Tasks digests of blobs by id */
/** @typedef {{ argv: string[], apply: (tasks: Tasks) => { code: number, tasks: Tasks } }} Command */
/** End of a command. @typedef {{ code: number, said: string } | "stopped" | "killed"} Outcome */

const child = fileURLToPath(new URL("writer-child.js", import.meta.url));
const own = fileURLToPath(new URL("data/adapters/own-seed", import.meta.url));

const digest = (/** @type {Uint8Array} */ bytes) => createHash("sha256").update(bytes).digest("hex").slice(0, 16);

/** A process that takes commands, and is restarted after it has ended. */
class Writer {
  /** @type {import("node:child_process").ChildProcess | undefined} */
  #process;

  /** Starts the process, so that two begin at the same time. */
  async start() {
    if (this.#process) return;
    // Drops what a test runner loads into its own processes.
    const env = { ...process.env, NODE_OPTIONS: "" };
    this.#process = fork(child, { stdio: ["ignore", "ignore", "inherit", "ipc"], execArgv: [], env });
    await once(this.#process, "message");
  }

  /**
   * @param {string[]} argv
   * @param {{ signal: NodeJS.Signals, after: number } | undefined} stop
   * @returns {Promise<Outcome>}
   */
  async run(argv, stop) {
    await this.start();
    const running = /** @type {import("node:child_process").ChildProcess} */ (this.#process);
    /** @type {Promise<Outcome>} */
    const ended = new Promise((resolve, reject) => {
      running.once("message", (message) => resolve(/** @type {{ code: number, said: string }} */ (message)));
      running.once("exit", (code, signal) => {
        this.#process = undefined;
        // Only a signal ends a writer that has not answered.
        if (signal === null) reject(new Error(`${argv}: ended with ${code}`));
        else resolve(signal === "SIGKILL" ? "killed" : "stopped");
      });
    });
    running.send(argv);
    const timer = stop && setTimeout(() => running.kill(stop.signal), stop.after);
    const outcome = await ended;
    clearTimeout(timer);
    for (const event of ["message", "exit"]) running.removeAllListeners(event);
    if (stop && typeof outcome === "object") await this.close();
    return outcome;
  }

  async close() {
    const running = this.#process;
    this.#process = undefined;
    if (!running || running.exitCode !== null || running.signalCode !== null) return;
    const gone = once(running, "exit");
    if (running.connected) running.disconnect();
    await gone;
  }
}

/** Runs the command line by itself, which must succeed. @param {string[]} argv */
async function succeed(argv) {
  const writer = new Writer();
  const outcome = await writer.run(argv, undefined);
  await writer.close();
  if (typeof outcome === "string" || outcome.code !== 0)
    throw new Error(`${argv.join(" ")}: ${JSON.stringify(outcome)}`);
}

/** The tasks of a pack, all of it checked. @param {string} path @returns {Promise<Tasks>} */
async function read(path) {
  const pack = await openPack(path);
  try {
    (await pack.bases()).close();
    /** @type {Tasks} */
    const tasks = new Map();
    for (const id of pack.tasks.keys()) tasks.set(id, digest((await pack.load(id)).bytes));
    return tasks;
  } finally {
    await pack.close();
  }
}

/** @param {Tasks} a @param {Tasks} b */
function same(a, b) {
  return a.size === b.size && [...a].every(([id, sum]) => b.get(id) === sum);
}

/** A pack, a part and task files of the same basis. @param {string} folder */
async function prepare(folder) {
  const names = (await readdir(own)).sort().slice(0, 8);
  const paths = names.map((name) => join(own, name));
  const at = (/** @type {string} */ name) => join(folder, name);
  await succeed(["pack", ...paths.slice(0, 3), "-o", at("all.eigen"), "--k", "3"]);
  await succeed(["hub", "project", at("all.eigen"), ...paths.slice(3, 5), "-o", at("two.part")]);
  await cp(at("all.eigen"), at("basis.eigen"));
  await succeed(["add", at("basis.eigen"), ...paths.slice(5), "--max-loss", "1"]);
  const pack = await openPack(at("basis.eigen"));
  /** @type {Map<string, string>} */
  const files = new Map();
  for (let i = 0; i < 9; i++) {
    const donor = names[5 + (i % 3)];
    const { bytes } = await pack.load(donor);
    const path = at(`new-${i}.eigentask`);
    await writeFile(path, encodeTaskFile({ id: `new-${i}`, adapterBytes: 0, metadata: {} }, pack.basisId, bytes));
    files.set(path, digest(bytes));
  }
  await pack.close();
  await cp(at("all.eigen"), at("basis.eigen"));
  await succeed(["hub", "assemble", at("basis.eigen"), at("two.part"), "-o", at("assembled.eigen")]);
  return { files, assembled: await read(at("assembled.eigen")) };
}

/**
 * @param {string} folder
 * @param {Awaited<ReturnType<typeof prepare>>} made
 * @param {Tasks} tasks of the pack now
 * @param {(below: number) => number} random
 * @returns {Command}
 */
function choose(folder, { files, assembled }, tasks, random) {
  const path = join(folder, "p.eigen");
  const what = random(10);
  if (what < 5) {
    const some = [...files].filter(() => random(4) === 0);
    const chosen = some.length > 0 ? some : [[...files][random(files.size)]];
    return {
      argv: ["add", path, ...chosen.map(([file]) => file)],
      apply(before) {
        const added = chosen.map(([file, sum]) => /** @type {const} */ ([basename(file, ".eigentask"), sum]));
        if (added.some(([id]) => before.has(id))) return { code: 1, tasks: before };
        return { code: 0, tasks: new Map([...before, ...added]) };
      },
    };
  }
  if (what < 9) {
    const ids = [...tasks.keys()].filter(() => random(3) === 0).slice(0, 3);
    if (ids.length === 0) ids.push([...tasks.keys()][random(tasks.size)]);
    return {
      argv: ["remove", path, ...ids],
      apply(before) {
        if (ids.some((id) => !before.has(id))) return { code: 1, tasks: before };
        if (ids.length === before.size) return { code: 2, tasks: before };
        return { code: 0, tasks: new Map([...before].filter(([id]) => !ids.includes(id))) };
      },
    };
  }
  const argv = ["hub", "assemble", join(folder, "basis.eigen"), join(folder, "two.part"), "-o", path, "--force"];
  return { argv, apply: () => ({ code: 0, tasks: assembled }) };
}

/**
 * Whether commands with these outcomes turn `before` into `after`, one after the other; one that was ended may have taken place or not.
 * @param {Tasks} before @param {Tasks} after @param {{ command: Command, outcome: Outcome }[]} pair
 */
function explained(before, after, pair) {
  for (const order of [pair, [...pair].reverse()]) {
    for (let took = 0; took < 4; took++) {
      let [tasks, holds] = [before, true];
      for (const [i, { command, outcome }] of order.entries()) {
        const ended = typeof outcome === "string";
        if (ended && !(took & (1 << i))) continue;
        const result = command.apply(tasks);
        if (!ended && result.code !== outcome.code) holds = false;
        tasks = result.tasks;
      }
      if (holds && same(tasks, after)) return true;
    }
  }
  return false;
}

/**
 * @param {number} pairs
 * @param {(message: string) => void} say
 * @returns {Promise<Record<string, number>>} how commands ended, and how often the reader looked
 */
export async function raceWriters(pairs, say = () => {}, seed = 7) {
  const folder = await mkdtemp(join(tmpdir(), "eigenlora-writers-"));
  const writers = [new Writer(), new Writer()];
  const path = join(folder, "p.eigen");
  /** @type {string[]} */
  let leftBefore = [];
  const ends = { done: 0, refused: 0, stopped: 0, killed: 0, reads: 0 };
  let state = seed;
  const random = (/** @type {number} */ below) => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return Math.floor((state / 2 ** 32) * below);
  };
  try {
    const made = await prepare(folder);
    await cp(join(folder, "basis.eigen"), path);
    for (let i = 0; i < pairs; i++) {
      const before = await read(path);
      const commands = writers.map(() => choose(folder, made, before, random));
      await Promise.all(writers.map((writer) => writer.start()));
      const pair = [];
      for (const [w, command] of commands.entries()) {
        const fate = random(12);
        const signal = /** @type {const} */ (["SIGKILL", "SIGKILL", "SIGINT", "SIGTERM"])[fate];
        // Most of a command's time lies before and behind the moments that matter.
        const stop = signal && { signal, after: random(30) };
        pair.push(writers[w].run(command.argv, stop).then((outcome) => ({ command, outcome })));
      }
      const all = Promise.all(pair);
      let running = true;
      void all.then(() => (running = false));
      while (running) {
        await read(path);
        ends.reads++;
        await new Promise((resolve) => setTimeout(resolve, 2));
      }
      const ended = await all;
      const after = await read(path);
      const told = ended.map(
        ({ command, outcome }) =>
          `${command.argv.slice(0, 1)} ${command.argv.slice(2).map((one) => basename(one))} → ${JSON.stringify(outcome)}`,
      );
      if (!explained(before, after, ended))
        throw new Error(`pair ${i}: ${[...before.keys()]} became ${[...after.keys()]}\n${told.join("\n")}`);
      for (const { outcome } of ended)
        ends[typeof outcome === "string" ? outcome : outcome.code === 0 ? "done" : "refused"]++;
      const left = (await readdir(folder)).filter((name) => /\.lock|\.tmp$/.test(name));
      // Only SIGKILL leaves files, until the next writer comes.
      const may = ended.some(({ outcome }) => outcome === "killed")
        ? left
        : ended.some(({ outcome }) => typeof outcome === "object" && outcome.code === 0)
          ? []
          : leftBefore;
      if (left.some((name) => !may.includes(name))) throw new Error(`pair ${i} left ${left}\n${told.join("\n")}`);
      leftBefore = left;
      if (i % 100 === 99) say(`${i + 1} pairs: ${JSON.stringify(ends)}`);
    }
    return ends;
  } finally {
    for (const writer of writers) await writer.close();
    await rm(folder, { recursive: true });
  }
}
