/** Bases to fold into, whose values do not matter. */

/**
 * The adapted weights of MiniLM, in the f32 form that runtimes compute with.
 * @param {import("eigenlora").WeightHost} onnx
 * @returns {Map<string, import("eigenlora").Tensor>}
 */
export function weightsOf(onnx) {
  const tensors = new Map();
  for (const { name, shape, layout } of onnx.list()) {
    if (!/attention\.self\.(query|value)\.weight$/.test(name)) continue;
    tensors.set(name, { dtype: "f32", shape, layout, data: new Float32Array(shape[0] * shape[1]).fill(0.01) });
  }
  return tensors;
}

/**
 * A read-only host that returns its weights once: the runtime keeps the folded ones.
 * @param {ReadonlyMap<string, import("eigenlora").Tensor>} tensors
 * @returns {import("eigenlora").WeightHost}
 */
export const readOnly = (tensors) => ({
  list: () => [...tensors].map(([name, { dtype, shape, layout }]) => ({ name, dtype, shape, layout })),
  async read(name, into) {
    const { dtype, shape, data } = /** @type {import("eigenlora").Tensor} */ (tensors.get(name));
    const view = new Uint8Array(data.buffer);
    into?.set(view);
    return { dtype, shape, data: into ?? view, byteOffset: 0 };
  },
});
