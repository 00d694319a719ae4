/**
 * What every benchmark shares: where the data is, what machine this is, statistics, peers in Python, and how results are
 * printed. Results are `{ question, environment, rows: [{ name, … }], peers: [{ name, version | reason }] }`.
 */
import { spawnSync } from "node:child_process";
import { cpus, totalmem } from "node:os";
import { fileURLToPath } from "node:url";

/**
 * @typedef {Record<string, string | number | null>} Row
 * @typedef {{ name: string, version?: string, reason?: string }} Peer
 */

/**
 * Absolute path of something under test/data.
 * @param {string} path
 */
export const data = (path) => fileURLToPath(new URL(`../test/data/${path}`, import.meta.url));

/** @param {readonly number[]} values */
export function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[sorted.length >> 1];
}

/** @param {readonly number[]} values */
export const min = (values) => Math.min(...values);

export function environment() {
  return {
    node: process.versions.node,
    v8: process.versions.v8,
    cpu: cpus()[0]?.model ?? "unknown",
    cores: cpus().length,
    memoryGiB: Math.round(totalmem() / 2 ** 30),
    platform: `${process.platform} ${process.arch}`,
    date: new Date().toISOString().slice(0, 10),
  };
}

/**
 * Runs a peer in Python (`PYTHON` or python3), one thread. It prints one JSON object.
 * @param {string} script file under benchmarks/peers
 * @param {string[]} args
 * @returns {{ figures: any } | { reason: string }}
 */
export function python(script, ...args) {
  const path = fileURLToPath(new URL(`peers/${script}`, import.meta.url));
  const env = { ...process.env, OMP_NUM_THREADS: "1", MKL_NUM_THREADS: "1" };
  const { status, stdout, stderr, error } = spawnSync(process.env.PYTHON ?? "python3", [path, ...args], { encoding: "utf8", env });
  if (error) return { reason: `${error.message}; set PYTHON` };
  if (status !== 0) {
    const missing = /No module named '([^']+)'/.exec(stderr)?.[1];
    if (missing) return { reason: `pip install ${missing === "lorashare" ? "lorashare==0.1.3" : "torch peft transformers"}` };
    return { reason: stderr.trim().split("\n").at(-1) ?? "failed" };
  }
  return { figures: JSON.parse(stdout.trim().split("\n").at(-1) ?? "") };
}

/**
 * Prints a result: JSON with `--json`, else a table.
 * @param {{ question: string, environment?: object, rows: Row[], peers: Peer[], notes?: string[] }} result
 */
export function print(result) {
  const full = { question: result.question, environment: environment(), rows: result.rows, peers: result.peers, notes: result.notes ?? [] };
  if (process.argv.includes("--json")) {
    console.log(JSON.stringify(full));
    return;
  }
  console.log(`${full.question}\n`);
  const names = [...new Set(full.rows.flatMap((row) => Object.keys(row)))];
  const cells = [names, ...full.rows.map((row) => names.map((n) => format(row[n])))];
  const widths = names.map((_, c) => Math.max(...cells.map((row) => row[c].length)));
  cells.forEach((row, i) => {
    console.log(row.map((cell, c) => (c && i ? cell.padStart(widths[c]) : cell.padEnd(widths[c]))).join("  ").trimEnd());
    if (i === 0) console.log(widths.map((w) => "-".repeat(w)).join("  "));
  });
  console.log();
  for (const { name, version, reason } of full.peers) console.log(`peer ${name}: ${version ?? `not run (${reason})`}`);
  for (const note of full.notes) console.log(note);
  console.log(Object.entries(full.environment).map(([k, v]) => `${k} ${v}`).join(", "));
}

/** @param {string | number | null | undefined} value */
function format(value) {
  if (value === undefined || value === null) return "";
  if (typeof value === "string" || Number.isInteger(value)) return String(value);
  return Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3);
}
