/**
 * Runs one family that make.py has made: every export in every mode, each task and one task a row, compared with PEFT's answers.
 * Differences are relative to the largest number of an answer.
 */
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { openPack } from "eigenlora";
import { buildPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { createEigenSession, createEigenSessions } from "eigenlora/onnxruntime";
import * as ort from "onnxruntime-node";

import { refusalOf } from "./refusals.js";

/**
 * @typedef {{ type: "int64" | "float32" | "bool", dims: number[], data: number[] }} Feed
 * @typedef {Record<string, Record<string, number[]>>} Goldens answers by part and task
 * @typedef {{ exporter: string, format: string, files: Record<string, string>, goldens?: Goldens }} Export
 * @typedef {{ name: string, title: string, tasks: string[], goldens: Goldens, exports: Export[],
 *   parts: Record<string, { feeds: Record<string, Feed>, output: string }> }} Family
 * @typedef {number | { refused: string }} Outcome
 * @typedef {{ exporter: string, format: string, plain: number, modes: Record<string, Outcome>, rows: Record<string, Outcome> }} Result
 */

const MODES = /** @type {const} */ (["core", "factors", "folded"]);
/** Tolerances for f32 and for 4 bits: additions are computed in f32 for both. */
const EXACT = 1e-5;
/**
 * Allowed multiple of a file's own difference without a pack. Files that compute in f16, or quantise inputs of layers, differ by
 * themselves, and each task differs by an amount of its own. A difference near the task's whole effect is an error in any case.
 */
const OF_PLAIN = 8;
const OF_EFFECT = 0.25;

/** @param {string} folder of a family @returns {Promise<{ family: Family, results: Result[], failures: string[] }>} */
export async function runFamily(folder) {
  const family = /** @type {Family} */ (JSON.parse(await readFile(join(folder, "family.json"), "utf8")));
  const pack = await packOf(folder, family.tasks);
  const results = [];
  /** @type {string[]} */
  const failures = [];
  for (const one of family.exports) {
    const plain = await plainOff(folder, family, one);
    /** @type {Result} */
    const result = { exporter: one.exporter, format: one.format, plain, modes: {}, rows: {} };
    for (const mode of MODES) await tryMode(folder, family, one, pack, mode, result, failures);
    results.push(result);
  }
  await pack.close();
  return { family, results, failures };
}

/** A lossless pack with the base's fingerprints. @param {string} folder @param {readonly string[]} tasks */
export async function packOf(folder, tasks) {
  const adapters = await readAdapters(tasks.map((task) => join(folder, "adapters", task)));
  const base = join(folder, "base.safetensors");
  const dtype = /** @type {const} */ ({ basis: "f32", coefficients: "f32", head: "f32" });
  const { chunks } = await buildPack(adapters, { base, select: { kind: "energy", share: 1 }, dtype });
  for (const adapter of adapters) await adapter.close();
  return openPack(new Blob(/** @type {BlobPart[]} */ (chunks)));
}

/** @param {Record<string, Feed>} feeds */
export function tensors(feeds) {
  return Object.fromEntries(
    Object.entries(feeds).map(([name, { type, dims, data }]) => {
      const values =
        type === "int64"
          ? BigInt64Array.from(data, BigInt)
          : type === "bool"
            ? Uint8Array.from(data)
            : Float32Array.from(data);
      return [name, new ort.Tensor(type, /** @type {any} */ (values), dims)];
    }),
  );
}

/**
 * Feeds that the file takes: exporters drop inputs without effect. @param {readonly string[]} names @param {Record<string, Feed>} feeds
 */
function taken(names, feeds) {
  return tensors(Object.fromEntries(Object.entries(feeds).filter(([name]) => names.includes(name))));
}

/**
 * Difference of the file from PyTorch without a pack: the largest of its parts. @param {string} folder @param {Family} family @param
 * {Export} one
 */
async function plainOff(folder, family, one) {
  let off = 0;
  for (const [name, file] of Object.entries(one.files)) {
    const { feeds, output } = family.parts[name];
    const session = await ort.InferenceSession.create(join(folder, file), { logSeverityLevel: 3 });
    const found = await session.run(taken(session.inputNames, feeds));
    off = Math.max(off, difference(found[output], (one.goldens ?? family.goldens)[name].base));
    await session.release();
  }
  return off;
}

/**
 * @param {string} folder @param {Family} family @param {Export} one @param {import("eigenlora").Pack} pack
 * @param {(typeof MODES)[number]} mode @param {Result} result @param {string[]} failures
 */
async function tryMode(folder, family, one, pack, mode, result, failures) {
  const where = `${family.name}, ${one.exporter}, ${one.format}, ${mode}`;
  const isExact = one.format === "f32" || one.format === "q4";
  const most = isExact
    ? EXACT
    : Math.min(OF_PLAIN * result.plain, OF_EFFECT * leastEffect(one.goldens ?? family.goldens));
  /** @param {"modes" | "rows"} kind @param {() => Promise<number>} work */
  const note = async (kind, work) => {
    const label = kind === "rows" ? `${where}, one task a row` : where;
    try {
      const off = await work();
      result[kind][mode] = off;
      if (!(off <= most)) failures.push(`${label}: off by ${off.toExponential(1)}, more than ${most.toExponential(1)}`);
    } catch (error) {
      const message = String(/** @type {Error} */ (error).message ?? error);
      const cause = refusalOf(family, one, kind === "rows" ? "rows" : mode, message);
      result[kind][mode] = { refused: cause ?? message };
      if (cause === undefined) failures.push(`${label}: ${/** @type {Error} */ (error).name}: ${message}`);
    }
  };
  /** @type {Record<string, import("eigenlora/onnxruntime").EigenSession<typeof ort>> | undefined} */
  let sessions;
  /** @type {() => Promise<void>} */
  let close = async () => undefined;
  /** @type {(task: string | null) => Promise<unknown>} */
  let change = async () => undefined;
  await note("modes", async () => {
    const files = Object.entries(one.files).map(([name, file]) => [name, join(folder, file)]);
    const options = { mode, session: { logSeverityLevel: /** @type {const} */ (3) } };
    if (files.length === 1) {
      const session = await createEigenSession(ort, files[0][1], pack, options);
      [sessions, close, change] = [
        { [files[0][0]]: session },
        () => session.close(),
        (task) => session.switchTask(task),
      ];
    } else {
      const group = await createEigenSessions(ort, Object.fromEntries(files), pack, options);
      [sessions, close, change] = [group.sessions, () => group.close(), (task) => group.switchTask(task)];
    }
    return ofTasks(family, one, sessions, change);
  });
  if (sessions && mode !== "folded") {
    const live = sessions;
    await note("rows", () => ofRows(family, one, live));
  }
  await close();
}

/** Effect of the weakest task, in its file with the least effect. @param {Goldens} goldens */
function leastEffect(goldens) {
  const effects = Object.values(goldens).flatMap(({ base, ...tasks }) =>
    Object.values(tasks).map((task) => difference({ data: base }, task)),
  );
  return Math.min(...effects);
}

/**
 * Runs every task, and the base before and after.
 * @param {Family} family @param {Export} one @param {Record<string, import("eigenlora/onnxruntime").EigenSession<typeof ort>>} sessions
 * @param {(task: string | null) => Promise<unknown>} change
 */
async function ofTasks(family, one, sessions, change) {
  let off = 0;
  for (const task of [null, ...family.tasks, null]) {
    await change(task);
    for (const [name, session] of Object.entries(sessions)) {
      const { feeds, output } = family.parts[name];
      const found = await session.run(taken(session.inputNames, feeds));
      off = Math.max(off, difference(found[output], (one.goldens ?? family.goldens)[name][task ?? "base"]));
    }
  }
  return off;
}

/**
 * Runs one task a row: the first task, the base, the other task, and the other way round.
 * @param {Family} family @param {Export} one @param {Record<string, import("eigenlora/onnxruntime").EigenSession<typeof ort>>} sessions
 */
async function ofRows(family, one, sessions) {
  let off = 0;
  const [a, b] = family.tasks;
  for (const tasks of [
    [a, null, b],
    [b, a, null],
  ]) {
    for (const [name, session] of Object.entries(sessions)) {
      const { feeds, output } = family.parts[name];
      const answers = (one.goldens ?? family.goldens)[name];
      const width = answers.base.length / tasks.length;
      const expected = tasks.flatMap((task, row) => answers[task ?? "base"].slice(row * width, (row + 1) * width));
      const found = await session.run(taken(session.inputNames, feeds), { tasks });
      off = Math.max(off, difference(found[output], expected));
    }
  }
  return off;
}

/** Largest difference relative to the largest expected number. @param {{ data: any }} tensor @param {readonly number[]} expected */
export function difference({ data }, expected) {
  const found = /** @type {ArrayLike<number>} */ (data);
  if (found.length !== expected.length) return Infinity;
  let [off, largest] = [0, 0];
  for (let i = 0; i < found.length; i++) {
    const apart = Math.abs(found[i] - expected[i]);
    off = Number.isNaN(apart) ? Infinity : Math.max(off, apart);
    largest = Math.max(largest, Math.abs(expected[i]));
  }
  return off / largest;
}
