/**
 * The families of families.py in every mode on onnxruntime-node: each task, the base before and after, and one task per
 * row, compared with PEFT. Needs PYTHON with torch, transformers, PEFT, diffusers and onnx; skips itself without,
 * unless EIGENLORA_REQUIRE lists families.
 *
 * usage: node test/soak/families.js [FAMILY...]
 */
import "../support/no-telemetry.js";
import { spawnSync } from "node:child_process";
import { mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { openPack } from "eigenlora";
import { buildPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { createEigenSession } from "eigenlora/onnxruntime";
import * as ort from "onnxruntime-node";
import { tensorsOf } from "../support/tensors.js";

/** Largest difference from PEFT's answers, relative to the largest number of an answer. */
const MOST = 1e-5;
/**
 * Families that run on one task, and not on several at a time: layers see a table that all rows share, or windows of
 * pictures.
 */
const ONE_TASK = ["deberta-v2", "swin"];
const LOSSLESS = /** @type {const} */ ({
  select: { kind: "energy", share: 1 },
  dtype: { basis: "f32", coefficients: "f32", head: "f32" },
});
const TASKS = ["a", "b"];

const python = process.env["PYTHON"] ?? "python3";
const env = { ...process.env, OMP_NUM_THREADS: "1", PYTHONDONTWRITEBYTECODE: "1" };
const there = { cwd: tmpdir(), env, encoding: /** @type {const} */ ("utf8") };
const { status, stderr } = spawnSync(python, ["-c", "import torch, transformers, peft, diffusers, onnx"], there);
if (status !== 0) {
  if (/\bfamilies\b/.test(process.env["EIGENLORA_REQUIRE"] ?? "")) throw new Error(stderr);
  console.log(`skipped: ${python} has not all of torch, transformers, peft, diffusers, onnx`);
} else {
  const root = mkdtempSync(join(tmpdir(), "eigenlora-families-"));
  try {
    const script = fileURLToPath(new URL("families.py", import.meta.url));
    const made = spawnSync(python, [script, root, ...process.argv.slice(2)], { ...there, stdio: "inherit" });
    if (made.status !== 0) throw new Error(`families.py: exit code ${made.status}`);
    for (const name of readdirSync(root)) await check(name, join(root, name));
  } finally {
    rmSync(root, { recursive: true, force: true });
  }
}

/** @param {string} name @param {string} folder */
async function check(name, folder) {
  /** @type {{ feeds: Record<string, import("../support/tensors.js").Value>, answers: Record<string, number[]> }} */
  const { feeds, answers } = JSON.parse(readFileSync(join(folder, "family.json"), "utf8"));
  const adapters = await readAdapters(TASKS.map((task) => join(folder, "adapters", task)));
  const { chunks } = await buildPack(adapters, { ...LOSSLESS, base: join(folder, "base.safetensors") });
  for (const adapter of adapters) await adapter.close();
  const pack = await openPack(new Blob(/** @type {BlobPart[]} */ (chunks)));
  for (const mode of /** @type {const} */ (["core", "factors", "folded"])) {
    const session = await createEigenSession(ort, join(folder, "model.onnx"), pack, { mode });
    const inputs = tensorsOf(ort, session.inputNames, feeds);
    let off = 0;
    for (const task of [null, ...TASKS, null]) {
      await session.switchTask(task);
      const { answer } = await session.run(inputs);
      off = Math.max(off, difference(answer, answers[task ?? "base"]));
    }
    if (mode !== "folded") {
      const tasks = ["a", null, "b"];
      const width = answers["base"].length / tasks.length;
      const expected = tasks.flatMap((task, row) => answers[task ?? "base"].slice(row * width, (row + 1) * width));
      const mixed = await session.run(inputs, { tasks }).catch((/** @type {Error} */ error) => error);
      const refused = mixed instanceof Error && /runs on one task and not on several/.test(mixed.message);
      if (ONE_TASK.includes(name) !== refused) off = Infinity;
      if (mixed instanceof Error && !refused) console.log(mixed);
      if (!(mixed instanceof Error)) off = Math.max(off, difference(mixed["answer"], expected));
    }
    console.log(`${off <= MOST ? "ok" : "FAILED"} ${name}, ${mode}: off by ${off.toExponential(1)}`);
    if (!(off <= MOST)) process.exitCode = 1;
    await session.close();
  }
  await pack.close();
}

/** @param {{ data: any }} tensor @param {readonly number[]} expected */
function difference({ data }, expected) {
  if (data.length !== expected.length) return Infinity;
  const off = expected.map((value, i) => Math.abs(data[i] - value));
  return off.some(Number.isNaN)
    ? Infinity
    : off.reduce((a, b) => Math.max(a, b), 0) / expected.reduce((a, b) => Math.max(a, Math.abs(b)), 0);
}
