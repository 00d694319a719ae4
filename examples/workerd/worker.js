// Computes the change of a task to rows of activations: POST { task, module, x } gives x·ΔWᵀ. The pack lies in R2, the
// kernel in the Worker.
import { createRuntime } from "eigenlora";
import simd from "eigenlora/wasm/simd.wasm";
import { keptPack } from "eigenlora/workerd";

/** @param {number[][]} rows @param {number} width @returns {import("eigenlora").View} */
const view = (rows, width) => ({
  dtype: "f32",
  shape: [rows.length, width],
  data: new Uint8Array(Float32Array.from(rows.flat()).buffer),
  byteOffset: 0,
});

export default {
  /** @param {Request} request @param {{ PACKS: import("eigenlora/workerd").R2Bucket }} env */
  async fetch(request, env) {
    const { task, module: name, x } = await request.json();
    const pack = await keptPack(env.PACKS, "tasks.eigen");
    const module = pack.modules.find((one) => one.name === name);
    if (!pack.tasks.has(task) || !module) return Response.json({ tasks: [...pack.tasks.keys()] }, { status: 404 });
    // One for each request: a runtime is in one task at a time.
    const runtime = await createRuntime(pack, { backend: "wasm", wasm: { module: simd } });
    try {
      await runtime.switchTask(task);
      const y = view(
        x.map(() => Array(module.out).fill(0)),
        module.out,
      );
      await runtime.apply(name, view(x, module.in), y);
      const values = new Float32Array(/** @type {Uint8Array} */ (y.data).buffer);
      const rows = x.map((/** @type {number[]} */ _, /** @type {number} */ i) => [
        ...values.subarray(i * module.out, (i + 1) * module.out),
      ]);
      return Response.json({ task, y: rows });
    } finally {
      await runtime.close();
    }
  },
};
