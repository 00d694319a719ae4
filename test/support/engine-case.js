/**
 * The case that every engine must pass, in code without a platform: open a pack from bytes or by HTTP ranges, switch
 * and blend, be refused, switch 500 times, and restore every bit. test/runtimes/engines.test.ts runs it in every engine
 * that it finds.
 */
import { createRuntime, openPack } from "eigenlora";

/** @typedef {{ name: string, shape: number[], hex: string }} BaseTensor */
/**
 * @typedef {{ pack: string, base: BaseTensor[], safetensors: string, tasks: [string, string] }} Material bytes as
 *   hexadecimal
 */
/** @typedef {Record<string, string>} State weights by name, as hexadecimal */
/**
 * @typedef {{ backend: string, states: State[], requests?: number, refused: string, back: boolean, fromFile: boolean }}
 *   Outcome `requests` by URL
 */

/** @param {string} hex */
const bytesOf = (hex) => Uint8Array.from(hex.match(/../g) ?? [], (pair) => parseInt(pair, 16));

/** @param {ArrayBufferView} view */
const hexOf = ({ buffer, byteOffset, byteLength }) =>
  Array.from(new Uint8Array(buffer, byteOffset, byteLength), (byte) => byte.toString(16).padStart(2, "0")).join("");

/**
 * @param {Material} material
 * @param {import("eigenlora").RuntimeOptions} options
 * @param {number} switches that follow the first three, an even number
 * @param {string} [url] of the pack; it is opened from its bytes otherwise
 * @returns {Promise<Outcome>} `states`: after the first task, the second, a blend, and many switches
 */
export async function engineCase(
  { pack: hex, base: tensors, safetensors, tasks: [first, second] },
  options,
  switches = 500,
  url = undefined,
) {
  const pack = await openPack(url ?? bytesOf(hex));
  /** @type {Map<string, import("eigenlora").Tensor>} */
  const base = new Map();
  for (const { name, shape, hex } of tensors)
    base.set(name, { dtype: "f32", shape, data: new Float32Array(bytesOf(hex).buffer) });
  /** @returns {State} */
  const now = () => Object.fromEntries([...base].map(([name, { data }]) => [name, hexOf(data)]));
  const before = JSON.stringify(now());
  const runtime = await createRuntime(pack, { ...options, base });
  /** @type {State[]} */
  const states = [];
  for (const selection of [first, second, { [first]: 0.75, [second]: -0.5 }]) {
    const report = await runtime.switchTask(selection, typeof selection === "string" ? {} : { head: first });
    if (!(report.milliseconds.total >= 0)) throw new Error(`a switch took ${report.milliseconds.total} ms`);
    states.push(now());
  }
  const requests = url === undefined ? undefined : pack.reads.requests;
  const refused = await runtime.switchTask("no such task").then(
    () => "",
    (/** @type {Error} */ error) => `${error.name}: ${error.message}`,
  );
  for (let i = 0; i < switches; i++) await runtime.switchTask(i % 2 ? first : second);
  states.push(now());
  await runtime.switchTask(null);
  const back = JSON.stringify(now()) === before;
  const { backend } = runtime;
  await runtime.close();

  // The same base as a file: its header is text, and the pack's fingerprints are compared with it.
  const other = await createRuntime(pack, { ...options, base: bytesOf(safetensors) });
  await other.switchTask(second);
  const changed = [...other.changes().keys()];
  let fromFile = changed.length > 0;
  for (const name of changed) {
    const { data, byteOffset, shape } = await other.readWeight(name);
    const length = 4 * shape.reduce((product, size) => product * size, 1);
    fromFile &&= hexOf(data.subarray(byteOffset, byteOffset + length)) === states[1]?.[name];
  }
  await other.close();
  return { backend, states, requests, refused, back, fromFile };
}
