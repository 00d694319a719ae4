/**
 * The case that every runtime must pass, in portable code: open a pack over HTTP ranges, fold its tasks into weights, restore every bit.
 * test/runtimes/runtimes.test.ts runs it in each runtime it finds, in Chromium's window and in a worker.
 */
import { createRuntime, openPack } from "eigenlora";

/**
 * @param {string} url of the pack
 * @param {import("eigenlora").RuntimeOptions} options
 */
export async function smoke(url, options) {
  const pack = await openPack(url);
  /** @type {Map<string, import("eigenlora").Tensor>} */
  const base = new Map();
  for (const [n, { name, out, in: inputs }] of pack.modules.entries()) {
    const data = Float32Array.from({ length: out * inputs }, (_, i) => Math.fround(((i * 31 + n) % 1000) / 5000 - 0.1));
    base.set(`${name}.weight`, { dtype: "f32", shape: [out, inputs], data });
  }
  const before = [...base.values()].map(({ data }) => data.slice());
  const runtime = await createRuntime(pack, { ...options, base });
  const sums = [];
  for (const task of pack.tasks.keys()) {
    const { requests } = await runtime.switchTask(task);
    if (requests !== 1) throw new Error(`${requests} requests for "${task}"`);
    let sum = 0;
    for (const { name } of pack.modules) for (const v of base.get(`${name}.weight`)?.data ?? []) sum += v * v;
    sums.push(sum);
  }
  await runtime.switchTask(null);
  const after = [...base.values()];
  const identical = before.every((data, i) => data.every((v, k) => v === after[i]?.data[k]));
  const { backend } = runtime;
  await runtime.close();
  return { backend, sums, identical, requests: pack.reads.requests };
}

/** @param {string} url */
export async function smokeAll(url) {
  return [await smoke(url, { backend: "js" }), await smoke(url, { backend: "auto" })];
}
