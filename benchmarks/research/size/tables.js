/** Tables of the measurements. */
import { mean, sum } from "simple-statistics";
import { bytesOfAdapter } from "../../lib/adapters.js";
import { headerBytes } from "./suite.js";

/**
 * @typedef {import("./measure.js").Row} Row
 * @typedef {import("./suite.js").Suite} Suite
 * @typedef {import("../../lib/report.js").Part} Part
 * @typedef {object} Point a way, as the tables show it
 * @property {string} way
 * @property {string} family
 * @property {number} bytes
 * @property {number | undefined} error
 * @property {number | undefined} accuracy mean over tasks, as `same`
 * @property {number | undefined} same
 * @property {number} tasks that were asked
 *
 * @typedef {Pick<Row, "suite" | "way" | "bytes"> & { accuracy: number[], before?: { bytes: number, accuracy: number[] } }} Distilled
 *   before: of entropy-coded packs, what they were before they were distilled
 */

export const LORA = "LoRA, f32";
const ALONE = /^cut|^LoRA/;
/** Largest ΔW errors at which bytes are compared. */
const LEVELS = [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1];

/** Measurements by suite and number of adapters. */
export class Reader {
  /** @param {readonly Row[]} rows @param {readonly Suite[]} suites @param {readonly Distilled[]} [distilled] of all adapters of a suite */
  constructor(rows, suites, distilled = []) {
    this.distilled = distilled;
    this.rows = rows;
    this.suites = suites;
  }

  /** @param {Suite} suite @param {number} n @returns {Point[]} fewest bytes first */
  points(suite, n) {
    const own = this.rows.filter((row) => row.suite === suite.name);
    const all = suite.adapters.length;
    const alone = own.filter((row) => row.n === all && row.sizes).map((row) => part(row, suite, n));
    const rest = own.filter((row) => row.n === n && !row.sizes);
    const distilled = this.distilled.filter((one) => one.suite === suite.name && n === all);
    return [...alone, ...rest, ...distilled].map(pointOf).sort((a, b) => a.bytes - b.bytes);
  }

  /**
   * Bytes that a way stores, files' headers included: adapters by themselves are files with headers of their own.
   * @param {Suite} suite @param {number} n @param {string} way
   * @returns {number} NaN where it was not measured
   */
  fileBytes(suite, n, way) {
    const point = this.points(suite, n).find((one) => one.way === way);
    return point ? point.bytes + (ALONE.test(way) ? sum(suite.take(n).map(headerBytes)) : 0) : NaN;
  }

  /** Bytes of the adapters in f32, counted by their numbers. @param {Suite} suite @param {number} n */
  bytes(suite, n) {
    return sum(suite.take(n).map(bytesOfAdapter));
  }
}

/**
 * Results of a way that stores adapters by themselves, for fewer of them. @param {Row} row @param {Suite} suite @param {number} n
 * @returns {Row}
 */
function part(row, suite, n) {
  const ids = new Set(suite.take(n).map(({ id }) => id));
  const pick = (/** @type {number[] | undefined} */ values) => values?.filter((_, i) => ids.has(suite.adapters[i].id));
  const [sizes, errors, accuracy, same] = [row.sizes, row.errors, row.accuracy, row.same].map(pick);
  return {
    ...row,
    n,
    bytes: sum(sizes ?? []),
    ...(errors ? { error: mean(errors) } : {}),
    ...(accuracy && same ? { accuracy, same } : {}),
  };
}

/** @param {Pick<Row, "way" | "bytes" | "error" | "accuracy" | "same">} row @returns {Point} */
function pointOf({ way, bytes, error, accuracy, same }) {
  return {
    way,
    family: familyOf(way),
    bytes,
    error,
    accuracy: accuracy && mean(accuracy),
    same: same && mean(same),
    tasks: accuracy?.length ?? 0,
  };
}

/** @param {string} way */
function familyOf(way) {
  if (way.endsWith("distilled")) return "pack, distilled";
  if (/^cut/.test(way)) return "each cut by SVD";
  return (
    /^(?:balanced )?(LoRA|heads|lorashare|vlora|column|flat|joint|auto|coded|SVD-cut, coded)/.exec(way)?.[1] ?? way
  );
}

/** @param {Reader} reader @returns {Part[]} */
export function tables(reader) {
  return reader.suites
    .flatMap((suite) =>
      suite.sizes.flatMap((n) => [behaviour(reader, suite, n), errors(reader, suite, n), searched(reader, suite, n)]),
    )
    .filter(({ rows }) => rows.length > 0);
}

/** @param {Reader} reader @param {Suite} suite @param {number} n @returns {Part} */
function behaviour(reader, suite, n) {
  const points = reader.points(suite, n);
  const whole = reader.bytes(suite, n);
  const lora = points.find(({ way }) => way === LORA);
  const rows = points.flatMap(({ way, bytes, error, accuracy, same, tasks }) => {
    if (accuracy === undefined) return [];
    return [
      {
        name: tasks === n ? way : `${way} (${tasks} of ${n} tasks)`,
        kB: bytes / 1000,
        "× fewer": whole / bytes,
        "ΔW error": error === undefined ? null : error,
        "accuracy, %": 100 * accuracy,
        "to LoRA": lora?.accuracy && tasks === n ? 100 * (accuracy - lora.accuracy) : null,
        "PEFT's answer, %": same === undefined ? null : 100 * same,
      },
    ];
  });
  return {
    question: `${suite.name}, ${n} adapters: what do the tasks still answer, for how many bytes? (MiniLM, r 8)`,
    rows,
    notes: [
      "Means over tasks, at most 240 test rows each. kB: 1 kB = 1000 B, all tasks with their heads; packs and what lorashare saves are",
      "whole files, vlora-dev saves no heads and gets ours in int4; of adapters by themselves the numbers alone count. × fewer: than f32.",
    ],
  };
}

/** @param {Reader} reader @param {Suite} suite @param {number} n @returns {Part} */
function errors(reader, suite, n) {
  const points = reader.points(suite, n).filter(({ family, error }) => error !== undefined && family !== "heads");
  const families = [...new Set(points.map(({ family }) => family))].sort();
  const rows = families.map((family) => {
    const own = points.filter((one) => one.family === family);
    const least = LEVELS.map((level) =>
      Math.min(...own.filter(({ error }) => Number(error) <= level).map(({ bytes }) => bytes)),
    );
    return {
      name: family,
      ...Object.fromEntries(
        LEVELS.map((level, i) => [`≤ ${level}`, Number.isFinite(least[i]) ? least[i] / 1000 : null]),
      ),
    };
  });
  return {
    question: `${suite.name}, ${n} adapters: fewest kB among those measured, by the mean ΔW error allowed`,
    rows,
  };
}

/** @param {Reader} reader @param {Suite} suite @param {number} n @returns {Part} */
function searched(reader, suite, n) {
  const points = reader.points(suite, n);
  const rows = points.flatMap((point) => {
    const other = /^auto, within the bytes of (.*)$/.exec(point.way)?.[1];
    const theirs = points.find(({ way }) => way === other);
    if (!theirs || theirs.error === undefined || point.error === undefined) return [];
    return [
      {
        name: theirs.way,
        kB: reader.fileBytes(suite, n, theirs.way) / 1000,
        "ΔW error": theirs.error,
        "auto, kB": point.bytes / 1000,
        "auto, ΔW error": point.error,
      },
    ];
  });
  const notes = ["Whole files: adapters by themselves have the headers of their files."];
  return { question: `${suite.name}, ${n} adapters: what does a search find within the bytes of others?`, rows, notes };
}
