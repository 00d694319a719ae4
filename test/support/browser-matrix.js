/**
 * Runs in a browser: sessions on every model and provider that the test names, compared with the answers it passes.
 * Reports results and refusals with their messages.
 */
import { openPack } from "eigenlora";
import { createEigenSession } from "eigenlora/onnxruntime";
import * as ort from "onnxruntime-web/webgpu";
import { tensorsOf } from "./tensors.js";

ort.env.wasm.wasmPaths = "/ort/";
ort.env.wasm.numThreads = 1;
ort.env.logLevel = "error";

/**
 * @typedef {{ model: string, pack: string, ignore: string[], feeds: Record<string, import("./tensors.js").Value>,
 *   answers: Record<string, Record<string, number[]>> }} Case
 * @typedef {"core" | "factors" | "folded"} Mode
 * @param {{ cases: Case[], providers: Record<string, [model: string, modes: Mode[]][]>, proxy?: boolean }} plan
 */
export async function matrix({ cases, providers, proxy = false }) {
  ort.env.wasm.proxy = proxy;
  const adapter = await /** @type {any} */ (navigator).gpu?.requestAdapter();
  const rows = [];
  for (const [provider, models] of Object.entries(providers)) {
    if (provider === "webgpu" && !adapter) {
      rows.push({ provider, model: "", mode: "", result: "no adapter" });
      continue;
    }
    for (const [model, modes] of models) {
      const { pack, ignore, feeds, answers } = /** @type {Case} */ (cases.find((one) => one.model === model));
      for (const mode of modes) {
        const found = await one(provider, model, pack, ignore, feeds, answers[provider], mode);
        rows.push({ provider, model, mode, ...found });
      }
    }
  }
  return rows;
}

/**
 * @param {string} provider
 * @param {string} model
 * @param {string} pack
 * @param {string[]} ignore
 * @param {Case["feeds"]} given
 * @param {Record<string, number[]>} answers
 * @param {"core" | "factors" | "folded"} mode
 */
async function one(provider, model, pack, ignore, given, answers, mode) {
  try {
    const options = { mode, ignore, session: { executionProviders: [provider] } };
    const session = await createEigenSession(ort, `/${model}.onnx`, await openPack(`/${pack}.eigen`), options);
    const feeds = tensorsOf(ort, session.inputNames, given);
    /** @type {Record<string, number>} */
    const differences = {};
    for (const [task, expected] of Object.entries(answers)) {
      await session.switchTask(task === "base" ? null : task);
      const results = await session.run(feeds);
      const found = /** @type {Float32Array} */ (await results[session.outputNames[0]].getData());
      differences[task] =
        found.length === expected.length ? Math.max(...expected.map((v, i) => Math.abs(v - found[i]))) : Infinity;
    }
    await session.close();
    return { result: "works", differences, probe: session.probe.result };
  } catch (error) {
    return { result: "refused", why: String(/** @type {Error} */ (error).message) };
  }
}
