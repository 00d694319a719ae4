/**
 * Prints results: `{ question, environment, rows: [{ name, … }], peers: [{ name, version | reason }], notes }` as JSON,
 * or tables. The table printer is the command line's.
 */
import { cpus, totalmem } from "node:os";
import { table } from "../../dist/src/cli/output.js";

/**
 * @typedef {Record<string, string | number | null>} Row
 * @typedef {{ name: string, version?: string, reason?: string }} Peer
 * @typedef {{ question: string, rows: Row[], notes?: string[] }} Part
 * @typedef {[parts: readonly Part[], peers?: readonly Peer[], device?: Row]} Result device: the environment's device,
 *   in addition to the CPU
 */

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
 * Prints a result of one or several tables. In JSON they are one.
 * @param {boolean} json
 * @param {Result} result
 */
export function print(json, ...[parts, peers = [], device = {}]) {
  const full = { ...environment(), ...device };
  if (json) {
    const question = parts.map((part) => part.question).join(" ");
    const notes = parts.flatMap((part) => part.notes ?? []);
    console.log(JSON.stringify({ question, environment: full, rows: parts.flatMap(({ rows }) => rows), peers, notes }));
    return;
  }
  for (const { question, rows, notes = [] } of parts) {
    console.log(`${question}\n`);
    if (rows.length > 0) console.log(`${tableOf(rows).join("\n")}\n`);
    for (const note of notes) console.log(note);
    if (notes.length > 0) console.log();
  }
  for (const { name, version, reason } of peers) console.log(`peer ${name}: ${version ?? `not run (${reason})`}`);
  console.log(
    Object.entries(full)
      .map(([key, value]) => `${key} ${value}`)
      .join(", "),
  );
}

/** @param {readonly Row[]} rows */
function tableOf(rows) {
  const names = [...new Set(rows.flatMap((row) => Object.keys(row)))];
  return table([names, ...rows.map((row) => names.map((name) => cell(row[name])))]);
}

/** @param {string | number | null | undefined} value */
function cell(value) {
  if (typeof value !== "number" || Number.isInteger(value)) return String(value ?? "");
  return Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3);
}

/** @param {string} step of a long run */
export const progress = (step) => process.stderr.write(`${step}\n`);
