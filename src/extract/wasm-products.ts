/** The large loops of extraction in WebAssembly. Apart from the backend, since only packing needs them. */

import { type Binaries, type Instance, instantiate } from "../backends/wasm.ts";
import { BackendError } from "../errors.ts";
import { sum } from "../tensor/dtypes.ts";
import { mirrored, PLAIN, type Products, type Tridiagonal } from "./linalg.ts";

type Variant = "scalar" | "simd";

/** Exports of `assembly/extraction.ts`. Addresses of f64 values. */
interface ExtractionKernels {
  variant: WebAssembly.Global;
  products(x: number, y: number, m: number, n: number, width: number, lower: number, across: number, out: number): void;
  tridiagonalize(a: number, n: number, diagonal: number, off: number, taus: number): void;
  bestScale(values: number, byteLength: number, scales: number, count: number, largest: number): number;
  turnBack(a: number, n: number, taus: number, z: number, count: number): void;
}

const BINARIES: Binaries<Variant> = {
  scalar: () => import("#wasm/extract-scalar"),
  simd: () => import("#wasm/extract-simd"),
};

/**
 * Products and reductions of extraction in WebAssembly. Data is copied in and out; the memory stays as large as the
 * largest call needs.
 * @throws BackendError as `createWasmBackend`; the functions when memory is short
 */
export async function createWasmProducts(options: { variant?: Variant } = {}): Promise<Required<Products>> {
  const instance = await instantiate<ExtractionKernels, Variant>(BINARIES, options);
  const { kernels } = instance;
  const product =
    (lower: 0 | 1, across: 0 | 1): Products["multiply"] =>
    (x, y, m, n, width) => {
      if (x.length < m * width || y.length < n * width) {
        throw new RangeError(
          `products: [${m}, ${width}] and [${n}, ${width}] do not fit ${x.length} and ${y.length} values`,
        );
      }
      const lengths = [m * n, m * width, x === y ? 0 : n * width];
      return onBlocks(instance, lengths, ([out, xAt, yAt], [result, xs, ys]) => {
        xs!.set(x.subarray(0, xs!.length));
        ys!.set(y.subarray(0, ys!.length));
        kernels.products(xAt!, x === y ? xAt! : yAt!, m, n, width, lower, across, out!);
        return result!.slice();
      });
    };
  const lowerHalf = product(1, 0);
  return {
    multiply: product(0, 1),
    multiplyTransposed: product(0, 0),
    gram: (x, rows, width) => mirrored(lowerHalf(x, x, rows, rows, width), rows),
    tridiagonalize: (a, n) => tridiagonalize(instance, a, n),
    findScale: (values, scales, largest) =>
      onBlocks(instance, [values.length, scales.length], ([at, scalesAt], [row, tried]) => {
        row!.set(values);
        tried!.set(scales);
        return kernels.bestScale(at!, values.byteLength, scalesAt!, scales.length, largest);
      }),
  };
}

/** Makes products in WebAssembly where the engine has it. */
export async function fastProducts(): Promise<Products> {
  return typeof WebAssembly === "undefined" ? PLAIN : createWasmProducts();
}

/**
 * Runs `work` on f64 blocks of these lengths, one behind the other, at their addresses. They hold any numbers.
 * @throws BackendError where there is no memory for them
 */
function onBlocks<T>(
  instance: Instance<ExtractionKernels>,
  lengths: readonly number[],
  work: (addresses: number[], views: Float64Array[]) => T,
): T {
  const byteLength = 8 * sum(lengths);
  const { heap, memory } = instance;
  const start = heap.allocate(byteLength, false);
  if (start === undefined)
    throw new BackendError(
      `extraction: no memory for ${byteLength} bytes in addition to ${memory.buffer.byteLength} in WebAssembly: pack fewer adapters at once`,
      { backend: "wasm" },
    );
  let next = start;
  const addresses = lengths.map((length) => (next += 8 * length) - 8 * length);
  try {
    return work(
      addresses,
      lengths.map((length, i) => new Float64Array(memory.buffer, addresses[i]!, length)),
    );
  } finally {
    heap.free(start, byteLength);
  }
}

function tridiagonalize(instance: Instance<ExtractionKernels>, a: Float64Array, n: number): Tridiagonal {
  const { kernels } = instance;
  return onBlocks(instance, [n * n, n, n, 3 * n], ([at, diagonalAt, offAt, tausAt], [values, diagonal, off, taus]) => {
    values!.set(a);
    for (const empty of [diagonal, off, taus]) empty!.fill(0);
    kernels.tridiagonalize(at!, n, diagonalAt!, offAt!, tausAt!);
    const reflectors = values!.slice();
    const factors = taus!.slice(0, n);
    const turn = (z: Float64Array, count: number): void =>
      onBlocks(instance, [n * n, n, count * n], ([at, tausAt, zAt], [values, taus, vectors]) => {
        values!.set(reflectors);
        taus!.set(factors);
        vectors!.set(z);
        kernels.turnBack(at!, n, tausAt!, zAt!, count);
        z.set(vectors!);
      });
    return { diagonal: diagonal!.slice(), off: off!.slice(), turn };
  });
}
