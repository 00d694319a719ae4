/** Packs and bases to measure whole switches on a GPU. */
import { openOnnxHost } from "eigenlora/onnx";
import { model } from "../../examples/minilm.js";
import { f32Entry, folderOf, packOfK, safetensorsOf, smallNumbers, withAdapters } from "./adapters.js";

/**
 * @typedef {import("eigenlora/build").Adapter} Adapter
 * @typedef {{ name: string, bytes: Uint8Array, base: import("eigenlora").BaseInput }} Case
 * @typedef {{ name: string, out: number, in: number }} Shape
 */

export const TASKS = 8;
const COMPONENTS = [16, 32];
/** Modules, side and rank of the synthetic pack. */
const [MODULES, SIZE, RANK] = [24, 768, 8];

/**
 * Real adapters on the model's own f16 weights and on f32 ones; then a synthetic pack of larger modules.
 * @returns {AsyncGenerator<Case>}
 */
export async function* cases() {
  const onnx = await openOnnxHost(model);
  const { modules, packs } = await withAdapters([folderOf("own-seed")], async (adapters) => ({
    modules: [...adapters[0].modules.values()],
    packs: await Promise.all(COMPONENTS.map((k) => packOfK(adapters, k))),
  }));
  for (const [i, k] of COMPONENTS.entries()) {
    const name = `${modules.length} modules of MiniLM, K ${k}`;
    yield { name: `${name}, f16`, bytes: packs[i], base: onnx };
    yield { name: `${name}, f32`, bytes: packs[i], base: await weights(modules) };
  }
  const larger = Array.from({ length: MODULES }, (_, i) => ({ name: `layer.${i}`, out: SIZE, in: SIZE }));
  const made = Array.from({ length: TASKS }, (_, i) => makeAdapter(`task-${i}`, larger, 100 * (i + 1)));
  yield {
    name: `${MODULES} modules of ${SIZE}×${SIZE}, K 32, f32`,
    bytes: await packOfK(made, 32),
    base: await weights(larger),
  };
}

/** Seeded f32 weights, in a safetensors file: the runtime keeps the folded ones. @param {readonly Shape[]} modules */
const weights = (modules) =>
  safetensorsOf(
    modules.map(({ name, out, in: inputs }, i) =>
      f32Entry(`${name}.weight`, [out, inputs], smallNumbers(out * inputs, i + 1)),
    ),
  );

/**
 * @param {string} id
 * @param {readonly Shape[]} shapes
 * @param {number} seed
 * @returns {Adapter}
 */
function makeAdapter(id, shapes, seed) {
  const modules = shapes.map(({ name, out, in: inputs }, i) => ({
    name,
    out,
    in: inputs,
    rank: RANK,
    layout: /** @type {const} */ ("out-in"),
    read: async () => ({
      rank: RANK,
      A: smallNumbers(RANK * inputs, seed + 2 * i),
      Bt: smallNumbers(RANK * out, seed + 2 * i + 1),
    }),
  }));
  const bytes = modules.reduce((sum, module) => sum + 4 * RANK * (module.in + module.out), 0);
  const rest = { saved: [], metadata: {}, warnings: [], baseModel: undefined, close: async () => undefined };
  return { id, file: id, byteLength: bytes, modules: new Map(modules.map((module) => [module.name, module])), ...rest };
}
