// @ts-nocheck: it writes what no type allows
/**
 * Small packs that would become large: expanded, exported and folded in a process each. Prints outcome, CPU, memory
 * beyond what the process had before and the most CPU without a turn of the event loop. Exits with 1 beyond the limits:
 * 64 MB; 50 ms where a task is refused; 16 ms without a turn where it is not, and twice as long until an abort is
 * heard.
 *
 * usage: node test/soak/attacks/expand.js [NAME...]
 */
import { spawnSync } from "node:child_process";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { createRuntime, openPack } from "eigenlora";
import { peftFiles, taskAdapter } from "eigenlora/build";
import "../../support/load-typescript.js";
import { packFile } from "../../vectors/format.js";
import { mainThread } from "./clock.js";

const { encodeSection } = await import("../../support/internals/format.ts");
const { dtypes } = await import("../../support/internals/base.ts");

const LIMITS = { refused: 50, block: 16, memory: 64e6 };
/** Runs of a case: the best counts, since threads of the engine spend CPU too. */
const RUNS = 3;

const int3 = { kind: 1, type: 5, explained: 0 };
const none = new Uint8Array(0);

/** An int3 tensor in which every twelfth integer is not 0: a coded section must have some bytes. */
function sparse(rows, width) {
  const row = Math.ceil((3 * width) / 8);
  const start = 4 * Math.ceil(rows / 2);
  const bytes = new Uint8Array(start + 4 * Math.ceil((rows * row) / 4));
  let seed = 1;
  for (let i = 0; i < rows; i++) {
    bytes[2 * i + 1] = 0x20;
    for (let at = 0; at < width; at += 12) {
      seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
      dtypes.setInteger(bytes, 3, start + i * row, at, ((seed >>> 29) % 7) - 3);
    }
  }
  return bytes;
}

/** One module [width, width] of rank `rank` over K components and a mean, whose coefficients are zeros. */
function pack({ width, rank, K = 0, type = 5 }) {
  const mean = K === 0;
  const rows = K || 1;
  const side = { ...int3, K, mean };
  const stored = sparse(rows, width);
  const place = { dtype: "int3", rows, width, byteLength: stored.length };
  const places = [0, Math.ceil(stored.length / 16) * 16].map((byteOffset) => ({ ...place, byteOffset }));
  const alpha = K === 0 ? none : sparse(rank, K);
  const code = 1 + (mean ? 4 : 0) + 8 * (K === 0 ? 0 : type);
  const header = [[[0, rank, code, code, 0, 0, null]], []];
  const modules = [{ name: "layer", out: width, in: width, layout: 0, A: side, B: side }];
  const basis = { producer: "attack", mode: "column", gauge: "as-trained", centering: "keep", modules };
  const plain = {
    basis,
    tensors: [stored, stored],
    tasks: [{ entry: { id: "t", adapterBytes: 0 }, header, tensors: [alpha, alpha] }],
  };
  const second = places[1].byteOffset;
  const section = new Uint8Array(second + stored.length);
  section.set(stored);
  section.set(stored, second);
  const coded = encodeSection(section, places, 16);
  // The writer of the vectors codes small sections only.
  return packFile({ ...plain, codedBases: coded });
}

const factors = (options) => async (opened, signal) => {
  const runtime = await createRuntime(opened, { mode: "factors", ...options });
  return () => runtime.switchTask("t", { signal });
};
const exported = async (opened, signal) => async () => peftFiles(await taskAdapter(opened, "t", { signal }));
const read = async (opened, signal) => async () => {
  const { modules } = await taskAdapter(opened, "t", { signal });
  for (const module of modules.values()) await module.read();
};
const folded = (backend) => async (opened, signal) => {
  const [{ name, out, in: inputs }] = opened.modules;
  const base = new Map([
    [`${name}.weight`, { dtype: "f32", shape: [out, inputs], data: new Float32Array(out * inputs) }],
  ]);
  const runtime = await createRuntime(opened, { base, backend });
  return () => runtime.switchTask("t", { signal });
};

const ALLOWED = { maxExpansion: Infinity };
/** Cases by name: the file, what is done with it, and how it is opened. */
const CASES = {
  "factors, width 100 000, rank 256": [{ width: 100_000, rank: 256 }, factors()],
  "factors, width 100 000, rank 2 048": [{ width: 100_000, rank: 2048 }, factors()],
  "factors, width 1 200 000": [{ width: 1_200_000, rank: 256 }, factors()],
  "export, width 500 000": [{ width: 500_000, rank: 256 }, exported],
  "export, rank 65 535": [{ width: 32_768, rank: 65_535 }, exported],
  "core of 60 000 × 60 000": [{ width: 1, rank: 1, K: 60_000 }, factors({ mode: "core" })],
  "factors below the limit, js": [{ width: 8000, rank: 256 }, factors({ backend: "js" })],
  "factors below the limit, wasm": [{ width: 8000, rank: 256 }, factors({ backend: "wasm" })],
  "export below the limit": [{ width: 8000, rank: 256 }, exported],
  "factors, allowed, js": [{ width: 3000, rank: 2000, K: 64 }, factors({ backend: "js" }), ALLOWED],
  "factors, allowed, wasm": [{ width: 3000, rank: 2000, K: 64 }, factors({ backend: "wasm" }), ALLOWED],
  "export, allowed": [{ width: 3000, rank: 2000, K: 64 }, read, ALLOWED],
  "folded, rank 768, js": [{ width: 384, rank: 768, K: 64 }, folded("js")],
  "folded, rank 2 048, wasm": [{ width: 1024, rank: 2048, K: 64 }, folded("wasm")],
};

/** Does one case in this process. @param abort whether the work is aborted after its first turn */
async function attack(name, bytes, abort) {
  const [, prepare, options = {}] = CASES[name];
  // What is loaded and compiled by a small one of its kind is not the attack's.
  const small = pack({ width: 384, rank: 64, K: 16 });
  await (await prepare(await openPack(small), undefined))();
  const opened = await openPack(bytes, options);
  // Checking a blob takes time in proportion to its bytes, which are many where its task expands by leave or with a
  // base.
  if (options.maxExpansion || name.startsWith("folded")) await opened.load("t");
  const controller = new AbortController();
  const work = await prepare(opened, controller.signal);
  const before = process.resourceUsage().maxRSS;
  const start = mainThread();
  let [last, block, turns, ended, stopped] = [start, 0, 0, 0, 0];
  const beat = () => {
    const now = mainThread();
    block = Math.max(block, now - last);
    last = now;
    if (abort && ++turns === 3) (stopped = now), controller.abort();
    if (!ended) setImmediate(beat);
  };
  setImmediate(beat);
  const outcome = await work().then(
    () => "done",
    (error) => error.name,
  );
  ended = mainThread();
  block = Math.max(block, ended - last);
  const memory = 1024 * (process.resourceUsage().maxRSS - before);
  return { outcome, cpu: ended - start, memory, block, heard: stopped ? ended - stopped : 0 };
}

const [mode, ...rest] = process.argv.slice(2);
if (mode === "--child") {
  const [name, file, abort] = rest;
  console.log(JSON.stringify(await attack(name, new Uint8Array(await readFile(file)), abort === "abort")));
} else {
  const folder = await mkdtemp(join(tmpdir(), "expand-"));
  const script = fileURLToPath(import.meta.url);
  const file = join(folder, "attack.eigen");
  const child = (name, abort) => {
    const args = [script, "--child", name, file, abort];
    const { stdout, stderr, status, signal } = spawnSync(process.execPath, args, { encoding: "utf8" });
    if (status === 0) return JSON.parse(stdout);
    return {
      outcome: `died: ${signal ?? stderr.trim().split("\n").at(-1)}`,
      cpu: 0,
      memory: 0,
      block: Infinity,
      heard: Infinity,
    };
  };
  let wrong = 0;
  const asked = process.argv.slice(2);
  for (const [name, [spec, , options]] of Object.entries(CASES)) {
    if (asked.length > 0 && !asked.includes(name)) continue;
    const bytes = pack(spec);
    await writeFile(file, bytes);
    const best = (runs) => runs.reduce((a, b) => (b.block < a.block ? b : a));
    const found = best(Array.from({ length: RUNS }, () => child(name, "")));
    const refused = found.outcome === "TaskError";
    const stopped = refused ? found : best(Array.from({ length: RUNS }, () => child(name, "abort")));
    const heard = refused ? 0 : stopped.heard;
    const good = refused
      ? found.cpu < LIMITS.refused && found.memory <= LIMITS.memory
      : found.outcome === "done" &&
        found.block <= LIMITS.block &&
        heard <= 2 * LIMITS.block &&
        (options || found.memory <= LIMITS.memory);
    if (!good) wrong++;
    const [mb, kb] = [found.memory / 1e6, bytes.length / 1e3].map((n) => n.toFixed(1));
    const times = `${found.cpu.toFixed(0)} ms CPU, ${mb} MB, longest block ${found.block.toFixed(1)} ms`;
    const after = refused ? "" : `, an abort heard after ${heard.toFixed(1)} ms`;
    console.log(`${good ? "ok  " : "LIMIT"} ${name} (${kb} kB): ${found.outcome}, ${times}${after}`);
  }
  await rm(folder, { recursive: true });
  process.exit(wrong > 0 ? 1 : 0);
}
