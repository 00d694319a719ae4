/**
 * What every benchmark shares: where the data is, what machine this is, statistics, peers in Python, and how results are
 * printed. Results are `{ question, environment, rows: [{ name, … }], peers: [{ name, version | reason }] }`.
 */
import { spawn, spawnSync } from "node:child_process";
import { cpus, totalmem } from "node:os";
import { fileURLToPath } from "node:url";

/**
 * @typedef {Record<string, string | number | null>} Row
 * @typedef {{ name: string, version?: string, reason?: string }} Peer
 * @typedef {{ question: string, rows: Row[], notes?: string[] }} Part
 */

/**
 * Absolute path of something under test/data.
 * @param {string} path
 */
export const data = (path) => fileURLToPath(new URL(`../test/data/${path}`, import.meta.url));

/**
 * The value after an option of the command line, for instance `--runs 15`.
 * @param {string} name
 */
export function option(name) {
  const at = process.argv.indexOf(`--${name}`);
  return at < 0 ? undefined : process.argv[at + 1];
}

/**
 * mulberry32: numbers in [-0.05, 0.05) that are the same on every machine.
 * @param {number} length
 * @param {number} seed
 */
export function uniform(length, seed) {
  let state = seed;
  return Float32Array.from({ length }, () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let x = Math.imul(state ^ (state >>> 15), 1 | state);
    x ^= x + Math.imul(x ^ (x >>> 7), 61 | x);
    return (((x ^ (x >>> 14)) >>> 0) / 2 ** 32 - 0.5) / 10;
  });
}

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
  const { status, stdout, stderr, error } = spawnSync(PYTHON, [peerPath(script), ...args], {
    encoding: "utf8",
    env: oneThread(),
  });
  if (error) return { reason: `${error.message}; set PYTHON` };
  return status === 0 ? { figures: JSON.parse(stdout.trim().split("\n").at(-1) ?? "") } : { reason: whyFailed(stderr) };
}

/**
 * Starts a peer in Python that stays: it prints one JSON object, then answers each line with one more. So its work and ours can
 * take turns.
 * @param {string} script file under benchmarks/peers
 * @param {string[]} args
 * @returns {Promise<{ first: any, ask(question: object): Promise<any>, stop(): void } | { reason: string }>}
 */
export const startPython = (script, ...args) => start(oneThread(), script, args);

/** The same with as many threads as its libraries take by themselves. @param {string} script @param {string[]} args */
export const startPythonFreely = (script, ...args) => start(native(), script, args);

/** @param {NodeJS.ProcessEnv} env @param {string} script @param {string[]} args @returns {ReturnType<typeof startPython>} */
async function start(env, script, args) {
  const child = spawn(PYTHON, [peerPath(script), ...args], { env });
  let [out, errors] = ["", ""];
  /** @type {((line: string | undefined) => void)[]} */
  const waiting = [];
  child.stderr.on("data", (chunk) => (errors += chunk));
  child.stdout.on("data", (chunk) => {
    out += chunk;
    for (let end = out.indexOf("\n"); end >= 0; end = out.indexOf("\n")) {
      waiting.shift()?.(out.slice(0, end));
      out = out.slice(end + 1);
    }
  });
  child.on("error", (error) => (errors = `${error.message}; set PYTHON`));
  child.on("close", () => waiting.splice(0).forEach((give) => give(undefined)));
  /** @returns {Promise<string | undefined>} */
  const line = () => new Promise((resolve) => waiting.push(resolve));
  const first = await line();
  if (first === undefined) return { reason: whyFailed(errors) };
  return {
    first: JSON.parse(first),
    async ask(question) {
      child.stdin.write(`${JSON.stringify(question)}\n`);
      const answer = await line();
      if (answer === undefined) throw new Error(`${script}: ${whyFailed(errors)}`);
      return JSON.parse(answer);
    },
    stop: () => child.stdin.end(),
  };
}

const PYTHON = process.env.PYTHON ?? "python3";

/** @param {string} script */
const peerPath = (script) => fileURLToPath(new URL(`peers/${script}`, import.meta.url));

const oneThread = () => ({ ...native(), OMP_NUM_THREADS: "1", MKL_NUM_THREADS: "1" });

/** Without settings that keep OpenBLAS from the best code for this processor. @returns {NodeJS.ProcessEnv} */
const native = () => ({ ...process.env, OPENBLAS_CORETYPE: undefined, OPENBLAS_L2_SIZE: undefined });

/** @param {string} stderr of a peer */
function whyFailed(stderr) {
  const missing = /No module named '([^']+)'/.exec(stderr)?.[1];
  if (missing) return `pip install ${missing === "lorashare" ? "lorashare==0.1.3" : "torch peft transformers"}`;
  return stderr.trim().split("\n").at(-1) || "failed";
}

/**
 * Prints a result: JSON with `--json`, else a table.
 * @param {Part & { peers: Peer[] }} result
 */
export const print = (result) => printParts([result], result.peers);

/**
 * Prints a result of several tables. In JSON they are one.
 * @param {Part[]} parts
 * @param {Peer[]} peers
 * @param {Row} [device] of the environment, beside the CPU
 */
export function printParts(parts, peers, device) {
  const full = { ...environment(), ...device };
  if (process.argv.includes("--json")) {
    const question = parts.map((part) => part.question).join(" ");
    const notes = parts.flatMap((part) => part.notes ?? []);
    console.log(JSON.stringify({ question, environment: full, rows: parts.flatMap(({ rows }) => rows), peers, notes }));
    return;
  }
  for (const { question, rows, notes = [] } of parts) {
    console.log(`${question}\n`);
    if (rows.length > 0) printTable(rows);
    for (const note of notes) console.log(note);
    if (notes.length > 0) console.log();
  }
  for (const { name, version, reason } of peers) console.log(`peer ${name}: ${version ?? `not run (${reason})`}`);
  console.log(
    Object.entries(full)
      .map(([k, v]) => `${k} ${v}`)
      .join(", "),
  );
}

/** @param {Row[]} rows */
function printTable(rows) {
  const names = [...new Set(rows.flatMap((row) => Object.keys(row)))];
  const cells = [names, ...rows.map((row) => names.map((n) => format(row[n])))];
  const widths = names.map((_, c) => Math.max(...cells.map((row) => row[c].length)));
  cells.forEach((row, i) => {
    console.log(
      row
        .map((cell, c) => (c && i ? cell.padStart(widths[c]) : cell.padEnd(widths[c])))
        .join("  ")
        .trimEnd(),
    );
    if (i === 0) console.log(widths.map((w) => "-".repeat(w)).join("  "));
  });
  console.log();
}

/** @param {string | number | null | undefined} value */
function format(value) {
  if (value === undefined || value === null) return "";
  if (typeof value === "string" || Number.isInteger(value)) return String(value);
  return Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3);
}
