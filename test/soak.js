/**
 * 10 000 random switches over all 20 tasks of own-seed and null, on every backend: every pass through null is bit-identical
 * to the base, every task gives the same bits each time, memory stays flat, on a device by the buffers it was asked for.
 * WebGPU is skipped by name where Dawn does not start. Minutes; `npm run soak`.
 *
 * usage: node test/soak.js [SWITCHES] [BACKEND...]
 */
import { createHash } from "node:crypto";
import { fileURLToPath } from "node:url";
import { setFlagsFromString } from "node:v8";
import { createRuntime, openPack } from "eigenlora";
import { buildPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { openOnnxHost } from "eigenlora/onnx";
import { countingDevice } from "./counting-device.js";

if (process.versions.node.startsWith("20.")) setFlagsFromString("--experimental-wasm-relaxed-simd");
const data = (/** @type {string} */ path) => fileURLToPath(new URL(`data/${path}`, import.meta.url));
const SWITCHES = Number(process.argv[2] ?? 10_000);
const ALL = ["wasm", "js", "webgpu"];
const BACKENDS = process.argv.length > 3 ? process.argv.slice(3) : ALL;
const unknown = BACKENDS.find((name) => !ALL.includes(name));
if (unknown) throw new Error(`${unknown}: expected ${ALL.join(", ")}`);

const adapters = await readAdapters([data("adapters/own-seed")]);
const base = await openOnnxHost(data("minilm/model_fp16.onnx"));
const { chunks } = await buildPack(adapters, { base, select: { kind: "k", k: 16 } });
for (const adapter of adapters) await adapter.close();

const gpu = await countingDevice().catch((/** @type {Error} */ error) => error.message);

/**
 * SHA-256 of every adapted weight.
 * @param {string[]} names of modules
 * @param {(name: string) => Promise<import("eigenlora").View>} read
 */
async function digest(names, read) {
  const hash = createHash("sha256");
  for (const name of names) hash.update(/** @type {Uint8Array} */ ((await read(name)).data));
  return hash.digest("hex");
}

for (const options of /** @type {import("eigenlora").RuntimeOptions[]} */ ([
  { backend: "wasm", wasm: { variant: "relaxed-simd" } },
  { backend: "wasm", wasm: { variant: "simd" } },
  { backend: "wasm", wasm: { variant: "scalar" } },
  { backend: "js" },
  { backend: "webgpu", webgpu: { device: typeof gpu === "string" ? undefined : gpu.device } },
])) {
  if (!BACKENDS.includes(/** @type {string} */ (options.backend))) continue;
  const device = options.backend === "webgpu" ? gpu : undefined;
  if (typeof device === "string") {
    if (/\bdawn\b/.test(process.env.EIGENLORA_REQUIRE ?? ""))
      throw new Error(`dawn is required by EIGENLORA_REQUIRE, but ${device}`);
    console.log(`webgpu: skipped (${device})`);
    continue;
  }
  const pack = await openPack(new Uint8Array(Buffer.concat(chunks)));
  const runtime = await createRuntime(pack, { ...options, base });
  const names = pack.modules.map(({ name }) => name);
  const seen = new Map([["null", await digest(names, (name) => base.read(`${name}.weight`))]]);
  const choices = [...pack.tasks.keys(), null];
  let seed = 99;
  /** Bytes that the runtime reports and bytes of the device's buffers, after 1000 switches. */
  let settled = [Infinity, Infinity];
  const started = performance.now();
  for (let i = 0; i < SWITCHES; i++) {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
    const task = i === SWITCHES - 1 ? null : choices[(seed >>> 8) % choices.length];
    await runtime.switchTask(task);
    const memory = [runtime.memory().total, device?.counts.live ?? 0];
    if (i === 1000) settled = memory;
    if (memory.some((bytes, which) => bytes > settled[which])) {
      throw new Error(
        `${runtime.backend}: memory grew from ${settled.join(", ")} to ${memory.join(", ")} bytes at switch ${i}`,
      );
    }
    // Hashing 3.5 MB takes as long as a switch, so every null and every tenth of the others is hashed.
    if (task !== null && i % 10) continue;
    const now = await digest(names, (name) => runtime.readWeight(name));
    const expected = seen.get(String(task));
    if (expected !== undefined && expected !== now)
      throw new Error(`${runtime.backend}: "${task}" drifted at switch ${i}`);
    seen.set(String(task), now);
  }
  const seconds = (performance.now() - started) / 1000;
  const live = device ? `, ${device.counts.live} bytes of buffers` : "";
  console.log(
    `${runtime.backend}: ${SWITCHES} switches, ${seen.size - 1} tasks, 0 bits drift${live} (${seconds.toFixed(0)} s)`,
  );
  await runtime.close();
  if (device && device.counts.live !== 0) throw new Error(`${device.counts.live} bytes of buffers are left`);
}
if (typeof gpu !== "string") gpu.close();
