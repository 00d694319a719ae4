/**
 * Every flavour of file that onnxruntime-genai's model builder writes (test/builder-matrix.py) in every mode, on onnxruntime-node and
 * -web, compared with PEFT's logits. Prints a table; fails beyond a tolerance, and where a mode that should work is refused. Skipped
 * without a Python that has the builder, unless EIGENLORA_BUILDER names a folder of files made before.
 *
 * usage: node test/soak-builder.js [TEXT]     files whose names have TEXT
 */
import "./no-telemetry.js";
import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { openPack } from "eigenlora";
import { buildPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { createEigenSession } from "eigenlora/onnxruntime";
import * as node from "onnxruntime-node";
import * as web from "onnxruntime-web";

const ONLY = process.argv[2] ?? "";
/** Tolerance of f32 sums in another order than PEFT's f64. */
const F32 = 1e-5;
/**
 * Tolerance of halves, relative to the largest logit: 2^-11 for each rounding. Some twenty follow each other through two layers; errors
 * of both signs add up like a random walk, to 4 or 5 of them. Twice that is allowed. Seen: 8.
 */
const F16 = 10 * 2 ** -11;
const MODES = /** @type {const} */ (["core", "factors", "folded"]);
const LOSSLESS = /** @type {const} */ ({
  select: { kind: "energy", share: 1 },
  dtype: { basis: "f32", coefficients: "f32", head: "f32" },
});

web.env.wasm.numThreads = 1;
web.env.logLevel = "fatal";
node.env.logLevel = "fatal";
const ORTS = /** @type {[string, typeof node][]} */ ([
  ["node", node],
  ["web", web],
]);

/** The folder of the matrix. @returns {string | undefined} */
function matrixFolder() {
  if (process.env["EIGENLORA_BUILDER"]) return process.env["EIGENLORA_BUILDER"];
  const python = process.env["PYTHON"] ?? "python3";
  const needs = "import onnxruntime_genai, onnx_ir, onnx, peft, transformers";
  const found = spawnSync(python, [
    "-c",
    "import importlib.util as u, onnx_ir, onnx, peft; assert u.find_spec('onnxruntime_genai')",
  ]);
  if (found.status !== 0) {
    const why = `no model builder (PYTHON must have: ${needs})`;
    if (/\bbuilder\b/.test(process.env["EIGENLORA_REQUIRE"] ?? "")) throw new Error(why);
    console.log(`skipped: ${why}`);
    return undefined;
  }
  const folder = mkdtempSync(join(tmpdir(), "eigenlora-builder-"));
  const script = fileURLToPath(new URL("builder-matrix.py", import.meta.url));
  const { status } = spawnSync(python, [script, folder, ...(ONLY ? ["--only", ONLY] : [])], { stdio: "inherit" });
  if (status !== 0) throw new Error(`${script} failed`);
  return folder;
}

/** @param {ArrayLike<number>} found @param {ArrayLike<number>} expected */
function difference(found, expected) {
  if (found.length !== expected.length) return Infinity;
  let [largest, scale] = [0, 1];
  for (let i = 0; i < found.length; i++) {
    if (!Number.isFinite(found[i])) return Infinity;
    largest = Math.max(largest, Math.abs(found[i] - expected[i]));
    scale = Math.max(scale, Math.abs(expected[i]));
  }
  return largest / scale;
}

/** @typedef {{ family: string; precision: string; half: boolean; cache: [number, number]; packed: string[] }} Made */

/** Rows without a cache. @param {typeof node} ort @param {readonly string[]} names @param {number[][]} rows @param {Made} made */
function feedsOf(ort, names, rows, { half, cache }) {
  const [batch, length] = [rows.length, /** @type {number[]} */ (rows[0]).length];
  const Half = /** @type {any} */ (globalThis)["Float16Array"] ?? Uint16Array;
  /** @type {Record<string, import("onnxruntime-common").Tensor>} */
  const feeds = {};
  for (const name of names) {
    if (name.startsWith("past_key_values")) {
      const dims = [batch, cache[0], 0, cache[1]];
      feeds[name] = half
        ? new ort.Tensor("float16", new Half(0), dims)
        : new ort.Tensor("float32", new Float32Array(0), dims);
      continue;
    }
    const at = (/** @type {number} */ i) =>
      name === "input_ids" ? rows.flat()[i] : name === "position_ids" ? i % length : 1;
    const values = BigInt64Array.from({ length: batch * length }, (_, i) => BigInt(/** @type {number} */ (at(i))));
    feeds[name] = new ort.Tensor("int64", values, [batch, length]);
  }
  return feeds;
}

/** A half as a number. @param {number} bits */
function half(bits) {
  const [exponent, fraction] = [(bits >> 10) & 31, bits & 1023];
  const size = exponent === 0 ? fraction * 2 ** -24 : (1024 + fraction) * 2 ** (exponent - 25);
  return (bits & 0x8000 ? -1 : 1) * (exponent === 31 ? (fraction ? Number.NaN : Number.POSITIVE_INFINITY) : size);
}

/** @param {import("onnxruntime-common").Tensor} tensor */
function valuesOf({ type, data }) {
  const values = /** @type {any} */ (data);
  return type === "float16" && values instanceof Uint16Array ? Array.from(values, half) : Array.from(values, Number);
}

/** @param {string} folder @param {Made} made */
async function packOf(folder, { family, precision }) {
  const adapters = await readAdapters([join(folder, family, "adapters")]);
  // A quantised file has other values than the checkpoint; DoRA needs the float weight.
  const kept = precision === "int4" ? adapters.filter(({ id }) => id !== "dora") : adapters;
  const base = join(folder, family, "base.safetensors");
  const { chunks } = await buildPack(kept, { ...LOSSLESS, base });
  for (const adapter of adapters) await adapter.close();
  return openPack(new Uint8Array(Buffer.concat(chunks)), {});
}

/** Message for files for WebGPU, whose operators processors lack. */
const NO_KERNEL = "no kernel";

/** Whether the file runs as it is. @param {typeof node} ort @param {string} path @param {number[][]} rows @param {Made} made */
async function runsAlone(ort, path, rows, made) {
  try {
    const session = await ort.InferenceSession.create(readFileSync(path));
    await session.run(feedsOf(ort, session.inputNames, rows, made));
    return true;
  } catch {
    return false;
  }
}

/**
 * Largest difference over the tasks; or the reason of a refusal.
 * @param {string} folder @param {string} name @param {Made} made @param {typeof node} ort @param {(typeof MODES)[number]} mode
 */
async function run(folder, name, made, ort, mode) {
  const pack = await packOf(folder, made);
  const { rows, logits } = JSON.parse(readFileSync(join(folder, name, "goldens.json"), "utf8"));
  try {
    const session = await createEigenSession(ort, join(folder, name, "model.onnx"), pack, { mode });
    let most = 0;
    for (const task of [...pack.tasks.keys(), null]) {
      await session.switchTask(task);
      const result = await session.run(feedsOf(ort, session.inputNames, rows, made));
      most = Math.max(most, difference(valuesOf(/** @type {any} */ (result["logits"])), logits[task ?? "base"]));
    }
    if (session.unconfirmed.length > 0) throw new Error(`not confirmed: ${session.unconfirmed.join(", ")}`);
    await session.close();
    return most;
  } catch (error) {
    const { message } = /** @type {Error} */ (error);
    const runs = await runsAlone(ort, join(folder, name, "model.onnx"), rows, made);
    return runs ? message : NO_KERNEL;
  } finally {
    await pack.close();
  }
}

const folder = matrixFolder();
let failed = false;
if (folder !== undefined) {
  const { made, failed: notBuilt } = JSON.parse(readFileSync(join(folder, "matrix.json"), "utf8"));
  for (const [name, why] of Object.entries(notBuilt)) console.log(`${name}: not built: ${why}`);
  const chosen = /** @type {[string, Made][]} */ (Object.entries(made)).filter(([name]) => name.includes(ONLY));
  failed = Object.keys(notBuilt).length > 0 || chosen.length === 0;
  console.log(
    ["file".padEnd(28), ...ORTS.flatMap(([name]) => MODES.map((mode) => `${name} ${mode}`.padEnd(14)))].join(" "),
  );
  for (const [name, one] of chosen) {
    const line = [name.padEnd(28)];
    const notes = [];
    for (const [, ort] of ORTS) {
      for (const mode of MODES) {
        const found = await run(folder, name, one, ort, mode);
        const expected = mode === "folded" && one.precision === "int4" ? /quantised/ : undefined;
        if (found === NO_KERNEL && name.includes("webgpu")) {
          line.push(NO_KERNEL.padEnd(14));
          continue;
        }
        const right =
          typeof found === "number" ? !expected && found < (one.half ? F16 : F32) : expected?.test(found) === true;
        if (!right) failed = true;
        if (typeof found === "string" && !right) notes.push(`  ${mode}: ${found}`);
        line.push((typeof found === "number" ? found.toExponential(1) : right ? "refused" : "FAILED").padEnd(14));
      }
    }
    console.log([line.join(" "), ...notes].join("\n"));
  }
  if (!process.env["EIGENLORA_BUILDER"]) rmSync(folder, { recursive: true });
}
if (failed) {
  console.error("beyond the tolerance, or refused");
  process.exit(1);
}
