/**
 * The products of extraction in WebAssembly. Apart from the backend, since only packing needs them.
 */
import { claim, instantiate, type WasmOptions } from "./wasm.ts";

/**
 * The products of extraction (`timesTransposed` in `src/extract/linalg.ts`) in WebAssembly. Data is copied in and out; the
 * memory stays as large as the largest call needs.
 * @returns a function (x [m, width], y [n, width], m, n, width, lower) → X·Yᵀ [m, n]
 * @throws BackendError as `createWasmBackend`; the function when memory is short
 */
export async function createWasmProducts(
  options: WasmOptions = {},
): Promise<
  (x: Float64Array, y: Float64Array, m: number, n: number, width: number, lower?: boolean) => Float64Array
> {
  const instance = await instantiate(options);
  const { kernels, memory, heap } = instance;
  return (x, y, m, n, width, lower = false) => {
    if (x.length < m * width || y.length < n * width) {
      throw new RangeError(`products: [${m}, ${width}] and [${n}, ${width}] do not fit ${x.length} and ${y.length} values`);
    }
    const counts = [m * n, m * width, x === y ? 0 : n * width] as const;
    const byteLength = 8 * (counts[0] + counts[1] + counts[2]);
    const out = claim(instance, byteLength, "scratch");
    try {
      const xAt = out + 8 * counts[0];
      const yAt = x === y ? xAt : xAt + 8 * counts[1];
      new Float64Array(memory.buffer, xAt, counts[1]).set(x.subarray(0, counts[1]));
      if (x !== y) new Float64Array(memory.buffer, yAt, counts[2]).set(y.subarray(0, counts[2]));
      kernels.products(xAt, yAt, m, n, width, lower ? 1 : 0, out);
      return new Float64Array(memory.buffer, out, counts[0]).slice();
    } finally {
      heap.free(out, byteLength);
    }
  };
}
