/**
 * Runs in a process of its own for test/unit/memory.test.ts: holds 24 weights of 768×768 twice and prints `memory()` and the engine's own
 * figures: array buffers plus the pages of every WebAssembly.Memory, plus the buffers requested from a device. Run with --expose-gc.
 */
/** @type {WebAssembly.Memory[]} */
const memories = [];
const Memory = WebAssembly.Memory;
WebAssembly.Memory = /** @type {any} */ (
  class extends Memory {
    /** @param {WebAssembly.MemoryDescriptor} descriptor */
    constructor(descriptor) {
      super(descriptor);
      memories.push(this);
    }
  }
);
const { createRuntime, openPack } = await import("eigenlora");
const { buildPack } = await import("eigenlora/build");

const backend = /** @type {"js" | "wasm" | "webgpu"} */ (process.argv[2]);
const gpu = backend === "webgpu" ? await (await import("./counting-device.js")).countingDevice() : undefined;
const SIZE = 768;
let seed = 1;
const random = () => ((seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0) / 2 ** 32 - 0.5) / 10;
/** @param {number} n */
const values = (n) => Float32Array.from({ length: n }, random);
const names = Array.from({ length: 24 }, (_, i) => `layers.${String(i).padStart(2, "0")}.proj`);

/** @param {string} id @returns {import("eigenlora/build").Adapter} */
function adapter(id) {
  const layout = /** @type {const} */ ("out-in");
  const read = async () => ({ rank: 8, A: values(8 * SIZE), Bt: values(8 * SIZE) });
  const modules = new Map(names.map((name) => [name, { name, out: SIZE, in: SIZE, rank: 8, layout, read }]));
  const rest = { baseModel: undefined, saved: [], metadata: {}, warnings: [], close: async () => undefined };
  return { id, file: id, byteLength: 0, modules, ...rest };
}

async function settled() {
  for (let i = 0; i < 5; i++) {
    globalThis.gc?.();
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
  const pages = memories.reduce((sum, m) => sum + m.buffer.byteLength, 0);
  return process.memoryUsage().arrayBuffers + pages + (gpu?.counts.live ?? 0);
}

const { chunks } = await buildPack([adapter("a"), adapter("b")], { select: { kind: "k", k: 8 } });
const file = new Blob(/** @type {BlobPart[]} */ (chunks));
chunks.length = 0;
const before = await settled();
const pack = await openPack(file);
const host = {
  list: () =>
    names.map((name) => ({ name: `${name}.weight`, shape: [SIZE, SIZE], dtype: /** @type {const} */ ("f32") })),
  /** @param {string} _ @param {Uint8Array} [into] */
  async read(_, into) {
    const data = into ?? new Uint8Array(4 * SIZE * SIZE);
    new Float32Array(data.buffer, data.byteOffset, SIZE * SIZE).fill(0.5);
    return { dtype: /** @type {const} */ ("f32"), shape: [SIZE, SIZE], data, byteOffset: 0 };
  },
};
const runtime = await createRuntime(pack, { base: host, backend, ...(gpu && { webgpu: { device: gpu.device } }) });
for (const task of ["a", "b", null, "b"]) await runtime.switchTask(task);
const after = await settled();
console.log(JSON.stringify({ measured: after - before, reported: runtime.memory() }));
await runtime.close();
gpu?.close();
