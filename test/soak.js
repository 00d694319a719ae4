/**
 * 10 000 random switches over all 20 tasks of own-seed and null, on every CPU backend: every pass through null is
 * bit-identical to the base, every task gives the same bits each time, memory stays flat. Minutes; `npm run soak`.
 */
import { createHash } from "node:crypto";
import { setFlagsFromString } from "node:v8";
import { fileURLToPath } from "node:url";
import { createRuntime, openPack } from "eigenlora";
import { buildPack, readAdapters } from "eigenlora/build";
import { openOnnxHost } from "eigenlora/onnx";

if (process.versions.node.startsWith("20.")) setFlagsFromString("--experimental-wasm-relaxed-simd");
const data = (/** @type {string} */ path) => fileURLToPath(new URL(`data/${path}`, import.meta.url));
const SWITCHES = Number(process.argv[2] ?? 10_000);

const adapters = await readAdapters([data("adapters/own-seed")]);
const base = await openOnnxHost(data("minilm/model_fp16.onnx"));
const { chunks } = await buildPack(adapters, { base, select: { kind: "k", k: 16 } });
for (const adapter of adapters) await adapter.close();

for (const options of /** @type {const} */ ([
  { backend: "wasm", wasm: { variant: "relaxed-simd" } },
  { backend: "wasm", wasm: { variant: "simd" } },
  { backend: "wasm", wasm: { variant: "scalar" } },
  { backend: "js" },
])) {
  const pack = await openPack(new Uint8Array(Buffer.concat(chunks)));
  const runtime = await createRuntime(pack, { ...options, base });
  const digest = () => {
    const hash = createHash("sha256");
    for (const { name } of pack.modules) hash.update(/** @type {Uint8Array} */ (runtime.weight(name).data));
    return hash.digest("hex");
  };
  const seen = new Map([["null", digest()]]);
  const choices = [...pack.tasks.keys(), null];
  let seed = 99;
  let memory = 0;
  const started = performance.now();
  for (let i = 0; i < SWITCHES; i++) {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
    const task = i === SWITCHES - 1 ? null : choices[(seed >>> 8) % choices.length];
    await runtime.switchTask(task);
    // Hashing 3.5 MB takes as long as a switch: every null, and every tenth of the others.
    if (task !== null && i % 10) continue;
    const now = digest();
    const before = seen.get(String(task));
    if (before !== undefined && before !== now) throw new Error(`${runtime.backend}: "${task}" drifted at switch ${i}`);
    seen.set(String(task), now);
    if (i === 1000) memory = runtime.memory().total;
    if (i > 1000 && memory > 0 && runtime.memory().total > memory) throw new Error(`${runtime.backend}: memory grew at switch ${i}`);
  }
  const seconds = (performance.now() - started) / 1000;
  console.log(`${runtime.backend}: ${SWITCHES} switches, ${seen.size - 1} tasks, 0 bits drift (${seconds.toFixed(0)} s)`);
  await runtime.dispose();
}
