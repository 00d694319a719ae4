/**
 * Runs in a process of its own for test/unit/memory.test.ts: makes a session on a model of more than 50 MB and prints the remaining array
 * buffers and `memory()`. Run with --expose-gc, the mode, and the path of the model.
 */
import { openPack } from "eigenlora";
import { buildPack } from "eigenlora/build";
import { createEigenSession } from "eigenlora/onnxruntime";
import * as ort from "onnxruntime-node";

const [, , mode, path] = /** @type {[string, string, "core" | "factors" | "folded", string]} */ (
  /** @type {unknown} */ (process.argv)
);
const [SIZE, LAYERS] = [1024, 13];
const names = Array.from({ length: LAYERS }, (_, i) => `layers.${i}`);

/** @param {number} length @param {number} seed */
const wave = (length, seed) => Float32Array.from({ length }, (_, i) => 0.02 * Math.sin(seed + 1.3 * i));

/** @param {string} id @param {number} seed @returns {import("eigenlora/build").Adapter} */
function adapter(id, seed) {
  const layout = /** @type {const} */ ("out-in");
  const read = async () => ({ rank: 4, A: wave(4 * SIZE, seed), Bt: wave(4 * SIZE, 2 * seed) });
  const modules = new Map(names.map((name) => [name, { name, out: SIZE, in: SIZE, rank: 4, layout, read }]));
  const rest = { baseModel: undefined, saved: [], metadata: {}, warnings: [], close: async () => undefined };
  return { id, file: id, byteLength: 0, modules, ...rest };
}

async function held() {
  for (let i = 0; i < 5; i++) {
    globalThis.gc?.();
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  return process.memoryUsage().arrayBuffers;
}

const { chunks } = await buildPack([adapter("a", 1), adapter("b", 2)], { select: { kind: "k", k: 4 } });
const file = new Blob(/** @type {BlobPart[]} */ (chunks));
chunks.length = 0;
const before = await held();
const session = await createEigenSession(ort, path, await openPack(file), { mode });
const created = { measured: (await held()) - before, reported: session.memory().total };
await session.switchTask("b");
const x = new ort.Tensor("float32", wave(2 * SIZE, 7), [2, SIZE]);
await session.run({ x });
if (mode !== "folded") await session.run({ x }, { tasks: ["a", "b"] });
const used = { measured: (await held()) - before, reported: session.memory().total };
console.log(JSON.stringify({ created, used, bytes: LAYERS * SIZE * SIZE * 4 }));
await session.close();
