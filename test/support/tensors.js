/** Tensors of what a test hands over as JSON: to a page, or from another program. */

/**
 * @typedef {{ type: string, dims: number[], data: number[] }} Value
 * @param {{ Tensor: any }} ort a module of onnxruntime
 * @param {readonly string[]} names of inputs
 * @param {Record<string, Value>} given
 * @returns {Record<string, any>}
 */
export function tensorsOf({ Tensor }, names, given) {
  return Object.fromEntries(
    names.map((name) => {
      const { type, dims, data } = /** @type {Value} */ (given[name]);
      const kinds = { int64: () => BigInt64Array.from(data, BigInt), bool: () => Uint8Array.from(data) };
      const values = kinds[/** @type {keyof typeof kinds} */ (type)]?.() ?? Float32Array.from(data);
      return [name, new Tensor(type, values, dims)];
    }),
  );
}
