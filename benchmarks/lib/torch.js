/** The bundled model and a task of a pack as f32 tensors in PyTorch's layout. */

import { openOnnxHost } from "eigenlora/onnx";
import { decodeTensor } from "../../dist/src/tensor/dtypes.js";
import { model } from "../../examples/minilm.js";
import { f32Entry } from "./adapters.js";

/** The task that steps begin with. */
export const TASK = "debtags-role";

/** Every weight of a model but the head, in PyTorch's layout: out before in. @param {string} file */
export async function baseEntries(file = model) {
  const host = await openOnnxHost(file);
  const entries = [];
  for (const { name, shape, dtype, layout } of host.list()) {
    if (name.startsWith("classifier")) continue;
    const view = await host.read(name);
    const count = shape.reduce((a, b) => a * b, 1);
    const bytes = /** @type {Uint8Array} */ (view.data).subarray(view.byteOffset);
    const values = decodeTensor(dtype, bytes, 1, count);
    if (layout !== "in-out") entries.push(f32Entry(name, [...shape], values));
    else {
      const [inputs, out] = shape;
      const turned = Float32Array.from(values, (_, i) => values[(i % inputs) * out + Math.floor(i / inputs)]);
      entries.push(f32Entry(name, [out, inputs], turned));
    }
  }
  await host.close?.();
  return entries;
}

/**
 * Components and coefficients of the task, and its head.
 * @param {import("eigenlora").Pack} pack
 */
export async function taskEntries(pack) {
  const bases = await pack.bases();
  const blob = await pack.load(TASK);
  /**
   * @param {Uint8Array} section
   * @param {{ dtype: any, rows: number, width: number, byteOffset: number, byteLength: number }} tensor
   */
  const decode = (section, { dtype, rows, width, byteOffset, byteLength }) =>
    decodeTensor(dtype, section.subarray(byteOffset, byteOffset + byteLength), rows, width);
  const entries = [];
  for (const term of blob.terms) {
    const module = pack.modules[term.module];
    for (const side of /** @type {const} */ (["A", "B"])) {
      const basis = /** @type {typeof module.A[number]} */ (module[side][0]);
      const { tensor } = /** @type {NonNullable<typeof term.A>} */ (term[side]);
      const { width } = basis.tensor;
      const rows = decode(bases.bytes, basis.tensor);
      entries.push(f32Entry(`${module.name}.E_${side}`, [basis.K, width], rows.slice(0, basis.K * width)));
      entries.push(f32Entry(`${module.name}.M_${side}`, [width], rows.slice(basis.K * width)));
      entries.push(f32Entry(`${module.name}.alpha_${side}`, [term.rank, basis.K], decode(blob.bytes, tensor)));
    }
  }
  for (const { name, shape, tensor } of blob.parameters)
    entries.push(f32Entry(name.replace("classifier", "head"), [...shape], decode(blob.bytes, tensor)));
  bases.close();
  return entries;
}
