/**
 * Runs in a process of its own for test/unit/memory.test.ts, with --expose-gc. Prints what `memory()` reports, and the
 * engine's own figures: array buffers plus the pages of every WebAssembly.Memory, plus the buffers requested from a
 * device.
 *
 *   memory-child.js js | wasm | webgpu                         holds 24 weights of 768×768 twice
 *   memory-child.js core | factors | folded MODEL.onnx         makes a session on a model of more than 50 MB
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
const { webgpu } = await import("eigenlora/webgpu");

const [, , what = "", model = ""] = process.argv;
const gpu = what === "webgpu" ? await (await import("./counting-device.js")).countingDevice() : undefined;
const [SIZE, LAYERS, RANK] = model ? [1024, 13, 4] : [768, 24, 8];
const names = Array.from({ length: LAYERS }, (_, i) => (model ? `layers.${i}` : `layers.${i}.proj`));

/** @param {number} length @param {number} seed */
const wave = (length, seed) => Float32Array.from({ length }, (_, i) => 0.02 * Math.sin(seed + 1.3 * i));

/** @param {string} id @param {number} seed @returns {import("eigenlora/build").Adapter} */
function adapter(id, seed) {
  const layout = /** @type {const} */ ("out-in");
  const read = async () => ({ rank: RANK, A: wave(RANK * SIZE, seed), Bt: wave(RANK * SIZE, 2 * seed) });
  const modules = new Map(names.map((name) => [name, { name, out: SIZE, in: SIZE, rank: RANK, layout, read }]));
  const rest = { baseModel: undefined, saved: [], metadata: {}, warnings: [], close: async () => undefined };
  return { id, file: id, byteLength: 0, modules, ...rest };
}

async function held() {
  for (let i = 0; i < 5; i++) {
    globalThis.gc?.();
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  const pages = memories.reduce((sum, m) => sum + m.buffer.byteLength, 0);
  return process.memoryUsage().arrayBuffers + pages + (gpu?.counts.live ?? 0);
}

const { chunks } = await buildPack([adapter("a", 1), adapter("b", 2)], { select: { kind: "k", k: RANK } });
const file = new Blob(/** @type {BlobPart[]} */ (chunks));
chunks.length = 0;

async function weights() {
  const before = await held();
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
  const backend = gpu ? webgpu({ device: gpu.device }) : /** @type {"js" | "wasm"} */ (what);
  const runtime = await createRuntime(pack, { base: host, backend });
  for (const task of ["a", "b", null, "b"]) await runtime.switchTask(task);
  const found = { measured: (await held()) - before, reported: runtime.memory() };
  await runtime.close();
  gpu?.close();
  return found;
}

async function session() {
  const { createEigenSession } = await import("eigenlora/onnxruntime");
  const ort = await import("onnxruntime-node");
  const before = await held();
  const mode = /** @type {"core" | "factors" | "folded"} */ (what);
  const session = await createEigenSession(ort, model, await openPack(file), { mode });
  const created = { measured: (await held()) - before, reported: session.memory().total };
  await session.switchTask("b");
  const x = new ort.Tensor("float32", wave(2 * SIZE, 7), [2, SIZE]);
  await session.run({ x });
  if (mode !== "folded") await session.run({ x }, { tasks: ["a", "b"] });
  const used = { measured: (await held()) - before, reported: session.memory().total };
  await session.close();
  return { created, used, bytes: LAYERS * SIZE * SIZE * 4 };
}

console.log(JSON.stringify(await (model ? session() : weights())));
