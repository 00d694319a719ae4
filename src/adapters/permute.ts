/**
 * The order of rows that llama.cpp gives to queries and keys of Llama's architecture (`permute` of convert_hf_to_gguf.py): rotary
 * embedding turns pairs of rows, which transformers keeps half a head apart and llama.cpp side by side.
 */

/**
 * @param values [rows, columns], rows a multiple of 2 · heads
 * @param way "into pairs": from transformers' order to llama.cpp's; "out of pairs": back
 */
export function permuteRows(
  values: Float32Array,
  rows: number,
  heads: number,
  way: "into pairs" | "out of pairs",
): Float32Array<ArrayBuffer> {
  const columns = values.length / rows;
  const half = rows / heads / 2;
  const out = new Float32Array(values.length);
  for (let row = 0; row < rows; row++) {
    const [head, inHead] = [Math.floor(row / (2 * half)), row % (2 * half)];
    // `row` is of transformers' order: the `pair`-th of its head's first or second half.
    const pair = head * 2 * half + 2 * (inHead % half) + Math.floor(inHead / half);
    const [from, to] = way === "into pairs" ? [row, pair] : [pair, row];
    out.set(values.subarray(from * columns, (from + 1) * columns), to * columns);
  }
  return out;
}
