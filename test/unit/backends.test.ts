/** The backend suite on every backend, and features that only some have: agreement, allocator, Gram, checksums. */
import { setFlagsFromString } from "node:v8";
import type { FloatDtype } from "eigenlora";
import fc from "fast-check";
import t from "tap";
import { dawnMissing } from "../support/backend-list.ts";
import { backendSuite, values } from "../support/backend-suite.ts";
import { encodeTensor, uniform } from "../support/internals/base.ts";
import { createWasmProducts, PLAIN, transposeMatrix as transpose } from "../support/internals/pack.ts";
import {
  type Backend,
  createJsBackend,
  createWasmBackend,
  createWebgpuBackend,
  Heap,
  WASM_VARIANTS,
  type WasmVariant,
} from "../support/internals/runtime.ts";
import { runs, skip } from "../support/required.ts";

// Node 20 has relaxed SIMD behind a flag; later versions have it anyway and do not know the flag.
if (process.versions.node.startsWith("20.")) setFlagsFromString("--experimental-wasm-relaxed-simd");

/** Variants that this engine accepts. The others are skipped by name, or fail where EIGENLORA_REQUIRE lists them. */
const available: WasmVariant[] = [];
for (const variant of WASM_VARIANTS) {
  try {
    (await createWasmBackend({ variant })).close();
    available.push(variant);
  } catch (error) {
    skip(t, variant, `this engine refuses ${variant}: ${(error as Error).message}`);
  }
}

t.test("js", (t) => (backendSuite(t, createJsBackend), t.end()));
for (const variant of available) {
  t.test(variant, (t) => (backendSuite(t, () => createWasmBackend({ variant })), t.end()));
}
if ((await dawnMissing()) === undefined) {
  t.test("dawn", (t) => (backendSuite(t, () => createWebgpuBackend()), t.end()));
}

t.test("without a wish the best variant runs", async (t) => {
  const backend = await createWasmBackend();
  t.equal(backend.name, "wasm");
  t.equal(backend.variant, available.at(-1));
});

/** Runs one fold or expand with the same seeded input on any backend. @returns the bytes of its result */
function run(backend: Backend, type: FloatDtype, rank: number): Uint8Array {
  const [rows, columns] = [37, 531];
  const random = uniform(11);
  const put = (bytes: Uint8Array): { block: ReturnType<Backend["allocate"]>; byteOffset: number } => {
    const block = backend.allocate(bytes.byteLength, "scratch");
    backend.upload({ block, byteOffset: 0 }, bytes);
    return { block, byteOffset: 0 };
  };
  const floats = (length: number) => put(new Uint8Array(values(length, random).buffer));
  const base = put(encodeTensor(type, values(rows * columns, random), 1, rows * columns));
  const right = floats(rank * columns);
  backend.expand({
    ...{ out: right, coefficients: floats(rank * 50), dtype: "int4", rank, rows: 50, width: columns },
    basis: put(encodeTensor("int4", values(50 * columns, random), 50, columns)),
  });
  const left = floats(rank * rows);
  const rowScale = type === "f32" ? undefined : floats(rows);
  backend.fold({ out: base, base, dtype: type, rows, columns, stride: columns, left, right, rank, rowScale });
  return backend.view!(base, base.block.byteLength).slice();
}

t.test("js, scalar and simd agree to the bit, relaxed within 1e-6 of the largest element", async (t) => {
  for (const type of ["f32", "f16", "bf16"] as const) {
    for (const rank of [1, 8, 16]) {
      const expected = run(createJsBackend(), type, rank);
      for (const variant of available) {
        const found = run(await createWasmBackend({ variant }), type, rank);
        if (variant !== "relaxed-simd") {
          t.ok(Buffer.compare(found, expected) === 0, `${variant} ${type} rank ${rank}`);
        } else if (type === "f32") {
          const [a, b] = [new Float32Array(found.buffer), new Float32Array(expected.buffer)];
          const largest = b.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
          const apart = a.reduce((most, x, i) => Math.max(most, Math.abs(x - b[i]!)), 0);
          t.ok(apart <= 1e-6 * largest, `${variant} rank ${rank}: ${apart / largest} of the largest element`);
        }
      }
    }
  }
});

t.test("heap: first fit, coalescing, growth by what is missing", (t) => {
  const memory = new WebAssembly.Memory({ initial: 1, maximum: 8 });
  const heap = new Heap(memory, 65536);
  const [a, b, c] = [heap.allocate(100)!, heap.allocate(16)!, heap.allocate(65000)!];
  t.strictSame([a, b, c], [65536, 65536 + 112, 65536 + 128]);
  t.equal(memory.buffer.byteLength, 2 * 65536, "one page was enough");
  heap.free(a, 100);
  heap.free(b, 16);
  t.equal(heap.allocate(128), a, "two freed neighbours are one range");
  heap.free(c, 65000);
  t.equal(heap.allocate(2 * 65536), c, "the freed end is the beginning of a larger block");
  t.equal(memory.buffer.byteLength, 4 * 65536);
  t.equal(heap.allocate(5 * 65536), undefined, "beyond the maximum");
  t.equal(memory.buffer.byteLength, 4 * 65536, "a refused block takes nothing");
  t.ok(heap.allocate(3 * 65536), "a smaller one still fits");
  t.end();
});

t.test("heap: a random walk that ends empty ends in one range", (t) => {
  fc.assert(
    fc.property(fc.array(fc.nat(5000), { minLength: 1, maxLength: 60 }), fc.integer(), (sizes, seed) => {
      const random = uniform(seed);
      const memory = new WebAssembly.Memory({ initial: 1 });
      const heap = new Heap(memory, 65536);
      const live: [number, number][] = [];
      for (const size of sizes) {
        const at = heap.allocate(size)!;
        for (const [start, length] of live) {
          if (at < start + Math.max(16, length) && start < at + Math.max(16, size)) throw new Error("overlap");
        }
        if (at % 16 !== 0 || at + size > memory.buffer.byteLength) throw new Error(`bad address ${at}`);
        live.push([at, size]);
        if (random() < 0.4) heap.free(...live.splice(Math.floor(random() * live.length), 1)[0]!);
      }
      for (const [at, size] of live) heap.free(at, size);
      const held = memory.buffer.byteLength;
      if (heap.allocate(held - 65536) !== 65536) throw new Error("freed memory is not one range");
      if (memory.buffer.byteLength !== held) throw new Error("memory grew though all of it was free");
    }),
    { seed: 5, numRuns: runs(200) },
  );
  t.end();
});

t.test("addresses beyond 2 GiB", async (t) => {
  const backend = await createWasmBackend();
  try {
    // Untouched memory costs address space only.
    backend.allocate(2 ** 31 + 2 ** 20, "pristine");
  } catch (error) {
    return void t.pass(`this machine has no 2 GiB of address space: ${(error as Error).message}`);
  }
  t.strictSame(run(backend, "f32", 8), run(await createWasmBackend(), "f32", 8));
});

for (const variant of ["plain", "scalar", "simd"] as const) {
  if (variant !== "plain" && !available.includes(variant)) continue;
  t.test(`${variant}: products equal the sums`, async (t) => {
    const products = variant === "plain" ? PLAIN : await createWasmProducts({ variant });
    for (const m of [0, 1, 2, 3, 5, 9, 31]) {
      for (const n of [1, 2, 4, 7, 31]) {
        for (const width of [0, 1, 2, 7, 64, 385]) {
          const x = Float64Array.from(values(m * width, uniform(m * 1000 + width)));
          const y = Float64Array.from(values(n * width, uniform(n * 77 + width)));
          for (const [right, lower] of [
            [y, false],
            [x, true],
          ] as const) {
            const columns = right === x ? m : n;
            const g = lower ? products.gram(x, m, width) : products.multiplyTransposed(x, right, m, columns, width);
            let worst = 0;
            for (let i = 0; i < m; i++) {
              for (let j = 0; j < (lower ? i + 1 : columns); j++) {
                let sum = 0;
                for (let k = 0; k < width; k++) sum += x[i * width + k]! * right[j * width + k]!;
                worst = Math.max(worst, Math.abs(g[i * columns + j]! - sum));
              }
            }
            if (!(worst <= 1e-12 * Math.max(1, width))) t.fail(`[${m}, ${columns}, ${width}]: ${worst}`);
          }
          const [straight, across] = [
            products.multiplyTransposed(x, transpose(y, width, n), m, n, width),
            products.multiply(x, y, m, n, width),
          ];
          if (straight.some((sum, i) => !(Math.abs(sum - across[i]!) <= 1e-12 * Math.max(1, width))))
            t.fail(`[${m}, ${n}, ${width}] across`);
        }
      }
    }
    if (variant !== "plain")
      t.throws(() => products.multiplyTransposed(new Float64Array(5), new Float64Array(9), 2, 3, 3), RangeError);
  });
}
