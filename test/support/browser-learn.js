/**
 * Runs in a browser: training graphs on the providers of both builds of onnxruntime-web, with every output reported.
 */
import * as all from "onnxruntime-web/all";
import * as webgpu from "onnxruntime-web/webgpu";
import { optionsFor } from "./internals/models.ts";
import { tensorsOf } from "./tensors.js";

for (const { env } of [all, webgpu]) {
  env.wasm.wasmPaths = "/ort/";
  env.wasm.numThreads = 1;
  env.logLevel = "error";
}

/**
 * @typedef {{ name: string, feeds: Record<string, import("./tensors.js").Value>[], turning: string[] }} Case
 * @param {Case[]} cases
 * @param {Record<string, string[]>} [some] names of cases, by build and provider; all where absent
 */
export async function learn(cases, some) {
  const adapter = await /** @type {any} */ (navigator).gpu?.requestAdapter();
  const rows = [];
  for (const [build, ort, provider] of /** @type {const} */ ([
    ["webgpu", webgpu, "wasm"],
    ["webgpu", webgpu, "webgpu"],
    ["jsep", all, "webgpu"],
  ])) {
    for (const one of cases) {
      if (some && !some[`${build}, ${provider}`].includes(one.name)) continue;
      const skipped = provider === "webgpu" && !adapter;
      rows.push({
        build,
        provider,
        name: one.name,
        ...(skipped ? { why: "no adapter" } : await run(ort, provider, one)),
      });
    }
  }
  return rows;
}

/**
 * @param {typeof webgpu} ort
 * @param {string} provider
 * @param {Case} one
 */
async function run(ort, provider, { name, feeds, turning }) {
  try {
    const session = await ort.InferenceSession.create(
      `/${name}.onnx`,
      optionsFor({ executionProviders: [provider] }, { exactNodes: turning }),
    );
    const runs = [];
    for (const given of feeds) {
      /** @type {Record<string, (number | null)[]>} */
      const found = {};
      const results = await session.run(tensorsOf(ort, Object.keys(given), given));
      for (const [output, value] of Object.entries(results)) {
        const data = /** @type {Float32Array} */ (await value.getData());
        found[output] = Array.from(data, (v) => (Number.isFinite(v) ? v : null));
      }
      runs.push(found);
    }
    await session.release();
    return { runs };
  } catch (error) {
    return { why: String(/** @type {Error} */ (error).message) };
  }
}
