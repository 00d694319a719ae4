/**
 * The large loops of extraction in WebAssembly. Apart from the backend, since only packing needs them.
 */
import type { Products } from "../extract/linalg.ts";
import { claim, instantiate, type Binaries } from "./wasm.ts";

type Variant = "scalar" | "simd";

/** Exports of `assembly/extraction.ts`. Addresses of f64 values. */
interface ExtractionKernels {
  variant: WebAssembly.Global;
  products(x: number, y: number, m: number, n: number, width: number, lower: number, out: number): void;
  tridiagonalize(a: number, n: number, diagonal: number, off: number, taus: number): void;
}

const BINARIES: Binaries<Variant> = {
  scalar: () => import("#wasm/extract-scalar"),
  simd: () => import("#wasm/extract-simd"),
};

/**
 * Products and reductions of extraction (`Products` in `src/extract/linalg.ts`) in WebAssembly. Data is copied in and out;
 * the memory stays as large as the largest call needs.
 * @throws BackendError as `createWasmBackend`; the functions when memory is short
 */
export async function createWasmProducts(options: { variant?: Variant } = {}): Promise<Products> {
  const instance = await instantiate<ExtractionKernels, Variant>(BINARIES, options);
  const { kernels, memory, heap } = instance;

  /** Runs `work` on f64 blocks of these lengths, one behind the other, at their addresses. */
  function onBlocks<T>(lengths: readonly number[], work: (addresses: number[], views: Float64Array[]) => T): T {
    const byteLength = 8 * lengths.reduce((sum, length) => sum + length, 0);
    const start = claim(instance, byteLength, "scratch");
    let next = start;
    const addresses = lengths.map((length) => (next += 8 * length) - 8 * length);
    try {
      return work(addresses, lengths.map((length, i) => new Float64Array(memory.buffer, addresses[i]!, length)));
    } finally {
      heap.free(start, byteLength);
    }
  }

  const products: Products = (x, y, m, n, width, lower = false) => {
    if (x.length < m * width || y.length < n * width) {
      throw new RangeError(`products: [${m}, ${width}] and [${n}, ${width}] do not fit ${x.length} and ${y.length} values`);
    }
    return onBlocks([m * n, m * width, x === y ? 0 : n * width], ([out, xAt, own], [result, xs, ys]) => {
      xs!.set(x.subarray(0, m * width));
      if (x !== y) ys!.set(y.subarray(0, n * width));
      kernels.products(xAt!, x === y ? xAt! : own!, m, n, width, lower ? 1 : 0, out!);
      return result!.slice();
    });
  };
  products.tridiagonalize = (a, n) =>
    onBlocks([n * n, n, n, 3 * n], ([at, diagonalAt, offAt, tausAt], [values, diagonal, off, taus]) => {
      values!.set(a);
      kernels.tridiagonalize(at!, n, diagonalAt!, offAt!, tausAt!);
      a.set(values!);
      return { diagonal: diagonal!.slice(), off: off!.slice(), taus: taus!.slice(0, n) };
    });
  return products;
}
