/**
 * One suite for every backend. Results are compared with sums in f64 written here, and numbers are decoded and rounded
 * here too, so that no code of the package judges itself. Not a test file: see backends.test.ts
 * and backends-chromium.test.ts.
 */
import type { Dtype, FloatDtype } from "eigenlora";
import fc from "fast-check";
import { encodeTensor, uniform } from "./internals/base.ts";
import type { Backend, Block, FoldJob, Slice } from "./internals/runtime.ts";
import type { SuiteTest } from "./stand-in.ts";

const FLOATS: FloatDtype[] = ["f32", "f16", "bf16"];
const TENSORS: Dtype[] = ["f32", "f16", "bf16", "int8", "int4", "int3"];
const SEED = 20260115;

type Numbers = Uint8Array | Uint16Array | Float32Array;

/** Bytes of a number. */
const sizeOf = (type: FloatDtype): number => (type === "f32" ? 4 : 2);

/** Byte that fills memory which an operation must not touch. */
const GUARD = 0xa5;

/**
 * Runs the whole suite on backends made by `create`.
 * @param flushes whether f32 arithmetic may take subnormal numbers as 0: WGSL lets a device do so, and SwiftShader does
 */
export function backendSuite(t: SuiteTest, create: () => Promise<Backend> | Backend, flushes = false): void {
  const flushed = (value: number, found: number): boolean => flushes && Math.abs(value) < 2 ** -126 && found === 0;

  /** Bytes at a slice once all operations have taken effect. */
  async function download(backend: Backend, at: Slice, byteLength: number): Promise<Uint8Array> {
    if (backend.read) return backend.read(at, byteLength);
    await backend.finish();
    return backend.view!(at, byteLength).slice();
  }

  const check = (name: string, work: (t: SuiteTest, backend: Backend) => Promise<void>): unknown =>
    t.test(name, async (t) => {
      const backend = await create();
      t.teardown(() => backend.close());
      await work(t, backend);
    });

  /** A block filled with guard bytes that holds the bytes of `values` at `byteOffset`, with room behind them. */
  function place(backend: Backend, values: Numbers, byteOffset: number): Slice {
    const bytes = bytesOf(values);
    const whole = new Uint8Array(byteOffset + bytes.byteLength + 64).fill(GUARD);
    whole.set(bytes, byteOffset);
    const block = backend.allocate(whole.byteLength, "scratch");
    backend.upload({ block, byteOffset: 0 }, whole);
    return { block, byteOffset };
  }

  /** f32 numbers at a slice. */
  const floatsAt = async (backend: Backend, at: Slice, length: number): Promise<Float32Array> =>
    new Float32Array((await download(backend, at, 4 * length)).buffer);

  /** Bytes of the slice's block outside the slice. */
  async function surroundings(backend: Backend, at: Slice, byteLength: number): Promise<Uint8Array> {
    const whole = await download(backend, { block: at.block, byteOffset: 0 }, at.block.byteLength);
    return Uint8Array.from([...whole.subarray(0, at.byteOffset), ...whole.subarray(at.byteOffset + byteLength)]);
  }

  check("expand equals the sum in f64, for every tensor type", async (_t, backend) => {
    const cases = fc.record({
      type: fc.constantFrom(...TENSORS),
      rank: fc.constantFrom(0, 1, 2, 3, 8, 17, 33),
      rows: fc.constantFrom(0, 1, 2, 7, 16, 65, 300),
      width: fc.constantFrom(1, 3, 7, 8, 15, 16, 31, 32, 33, 64, 77, 200),
      skew: fc.integer({ min: 0, max: 7 }),
      add: fc.boolean(),
      seed: fc.integer(),
    });
    await fc.assert(
      fc.asyncProperty(cases, async ({ type, rank, rows, width, skew, add, seed }) => {
        const random = uniform(seed);
        const coefficients = values(rank * rows, random);
        const encoded = encodeTensor(type, values(rows * width, random), rows, width);
        const basis = decode(type, encoded, rows, width);
        const before = values(rank * width, random);
        const out = place(backend, add ? before : new Uint8Array(4 * rank * width).fill(0xff), 4 * skew);
        const slices = {
          coefficients: place(backend, coefficients, 4 * ((skew + 1) % 4)),
          basis: place(backend, encoded, 4 * ((skew + 2) % 4)),
        };
        backend.expand({ out, add, ...slices, dtype: type, rank, rows, width });

        const expected = add ? Float64Array.from(before) : new Float64Array(rank * width);
        for (let i = 0; i < rank; i++) {
          for (let k = 0; k < rows; k++) {
            for (let j = 0; j < width; j++) {
              expected[i * width + j]! += coefficients[i * rows + k]! * basis[k * width + j]!;
            }
          }
        }
        const found = await floatsAt(backend, out, rank * width);
        assertClose(found, expected, 1e-6 * Math.max(1, Math.sqrt(rows)));
        assertGuard(await surroundings(backend, out, 4 * rank * width));
        for (const { block } of [out, slices.coefficients, slices.basis]) backend.free(block);
      }),
      { seed: SEED, numRuns: 150 },
    );
  });

  check("project equals the sum in f64", async (_t, backend) => {
    const cases = fc.record({
      count: fc.constantFrom(0, 1, 2, 7, 8, 9, 17),
      rows: fc.constantFrom(0, 1, 2, 7, 33, 300),
      width: fc.constantFrom(0, 1, 3, 7, 8, 31, 32, 33, 64, 77, 200),
      skew: fc.integer({ min: 0, max: 7 }),
      seed: fc.integer(),
    });
    await fc.assert(
      fc.asyncProperty(cases, async ({ count, rows, width, skew, seed }) => {
        const random = uniform(seed);
        const x = values(count * width, random);
        const basis = values(rows * width, random);
        const out = place(backend, new Uint8Array(4 * count * rows).fill(0xff), 4 * skew);
        const slices = {
          x: place(backend, x, 4 * ((skew + 1) % 4)),
          basis: place(backend, basis, 4 * ((skew + 2) % 4)),
        };
        backend.project({ out, ...slices, count, rows, width });

        const expected = new Float64Array(count * rows);
        for (let i = 0; i < count; i++) {
          for (let k = 0; k < rows; k++) {
            for (let j = 0; j < width; j++) expected[i * rows + k]! += x[i * width + j]! * basis[k * width + j]!;
          }
        }
        const found = await floatsAt(backend, out, count * rows);
        assertClose(found, expected, 1e-6 * Math.max(1, Math.sqrt(width)));
        assertGuard(await surroundings(backend, out, 4 * count * rows));
        for (const { block } of [out, slices.x, slices.basis]) backend.free(block);
      }),
      { seed: SEED, numRuns: 150 },
    );
  });

  check("operations take effect in the order of the calls", async (t, backend) => {
    const block = backend.allocate(4096, "scratch");
    const at = (float: number): Slice => ({ block, byteOffset: 4 * float });
    const other = backend.allocate(4096, "scratch");
    const on = (float: number): Slice => ({ block: other, byteOffset: 4 * float });
    backend.upload(at(0), bytesOf(Float32Array.from({ length: 8 }, (_, i) => i + 1)));
    backend.upload(at(8), bytesOf(Float32Array.of(2, 3)));
    const shape = { dtype: "f32", rank: 1, rows: 1, width: 8 } as const;
    // Two results side by side, one over the other, one that reads the first, an upload and a copy between them.
    backend.expand({ out: on(0), coefficients: at(8), basis: at(0), ...shape });
    backend.expand({ out: on(8), coefficients: at(9), basis: at(0), ...shape });
    backend.expand({ out: on(0), add: true, coefficients: at(9), basis: at(0), ...shape });
    backend.upload(at(9), bytesOf(Float32Array.of(10)));
    backend.expand({ out: on(16), coefficients: at(9), basis: at(0), ...shape });
    backend.expand({ out: at(64), coefficients: at(8), basis: on(8), ...shape });
    backend.copy(at(64), on(24), 32);
    backend.expand({ out: on(32), coefficients: at(8), basis: at(64), ...shape });
    backend.project({ out: on(40), x: on(32), basis: on(0), count: 1, rows: 2, width: 8 });
    const found = await floatsAt(backend, on(0), 42);
    const expected = [5, 3, 10, 6, 12].flatMap((factor) => Array.from({ length: 8 }, (_, i) => factor * (i + 1)));
    const squares = 204; // 1 + 4 + … + 64
    t.strictSame([...found], [...expected, 12 * 5 * squares, 12 * 3 * squares]);
  });

  const weights = fc.record({
    type: fc.constantFrom(...FLOATS),
    rank: fc.constantFrom(0, 1, 2, 3, 8, 16, 70),
    rows: fc.constantFrom(0, 1, 2, 3, 15, 16, 17, 34),
    columns: fc.constantFrom(1, 2, 5, 8, 15, 16, 17, 31, 64, 100, 513, 530),
    gap: fc.constantFrom(0, 0, 1, 5),
    skew: fc.integer({ min: 0, max: 7 }),
    scaled: fc.constantFrom("none", "none", "rows", "columns", "both"),
    inPlace: fc.boolean(),
    seed: fc.integer(),
  });
  type Weight = typeof weights extends fc.Arbitrary<infer Value> ? Value : never;

  /** A weight of `rows` by `columns` as bytes and as numbers, and the factors of an update of it. */
  function weightOf({ type, rank, rows, columns, gap, seed }: Weight) {
    const random = uniform(seed);
    const stride = columns + gap;
    const size = sizeOf(type);
    const length = rows === 0 ? 0 : (rows - 1) * stride + columns;
    const base = encodeTensor(type, values(length, random), 1, length).subarray(0, length * size);
    const w0 = decode(type, base, 1, length);
    const [left, right] = [values(rank * rows, random), values(rank * columns, random)];
    return { random, stride, size, length, base, w0, left, right };
  }

  check("fold equals the sum in f64, rounded once, for every float type", async (_t, backend) => {
    await fc.assert(
      fc.asyncProperty(weights, async (weight) => {
        const { type, rank, rows, columns, gap, skew, scaled, inPlace } = weight;
        const { random, stride, size, length, base, w0, left, right } = weightOf(weight);
        const rowScale = scaled === "rows" || scaled === "both" ? values(rows, random) : undefined;
        const columnScale = scaled === "columns" || scaled === "both" ? values(columns, random) : undefined;

        const from = place(backend, base, size * skew);
        const blank = new Uint8Array(length * size).fill(GUARD);
        const out = inPlace ? from : place(backend, blank, size * ((skew + 3) % 8));
        const job: FoldJob = {
          ...{ out, base: from, dtype: type, rows, columns, stride, rank },
          left: place(backend, left, 4 * (skew % 3)),
          right: place(backend, right, 4 * (skew % 5)),
          rowScale: rowScale && place(backend, rowScale, 4),
          columnScale: columnScale && place(backend, columnScale, 12),
        };
        backend.fold(job);

        const bytes = await download(backend, out, length * size);
        const found = decode(type, bytes, 1, length);
        const expected = new Float64Array(length);
        let largest = 1;
        for (let i = 0; i < rows; i++) {
          for (let j = 0; j < columns; j++) {
            let sum = 0;
            for (let k = 0; k < rank; k++) sum += left[k * rows + i]! * right[k * columns + j]!;
            const value = (w0[i * stride + j]! + sum) * (rowScale?.[i] ?? 1) * (columnScale?.[j] ?? 1);
            expected[i * stride + j] = value;
            largest = Math.max(largest, Math.abs(value), Math.abs(sum));
          }
        }
        // Half a unit in the last place of the type, on top of what f32 sums lose.
        const unit = type === "f32" ? 0 : type === "f16" ? 2 ** -11 : 2 ** -8;
        for (let i = 0; i < rows; i++) {
          for (let j = 0; j < columns; j++) {
            const at = i * stride + j;
            const sums = 1e-6 * largest * Math.max(1, Math.sqrt(rank) / 4);
            const allowed = sums + unit * Math.abs(expected[at]!) + 2 ** -25;
            if (!(Math.abs(found[at]! - expected[at]!) <= allowed)) {
              throw new Error(`[${i}, ${j}] is ${found[at]}, expected ${expected[at]} ± ${allowed}`);
            }
          }
          // The gap behind a row keeps what was there.
          const end = (i * stride + columns) * size;
          const gapBytes = bytes.subarray(end, i === rows - 1 ? end : end + gap * size);
          if (inPlace) assertSame(gapBytes, base.subarray(end, end + gapBytes.length));
          else assertGuard(gapBytes);
        }
        assertGuard(await surroundings(backend, out, length * size));
        for (const slice of [from, job.left, job.right, job.rowScale, job.columnScale]) {
          if (slice) backend.free(slice.block);
        }
        if (!inPlace) backend.free(out.block);
      }),
      { seed: SEED, numRuns: 250 },
    );
  });

  check("fold of rank 0 without scales copies bits, NaN payloads included", async (t, backend) => {
    const random = uniform(7);
    for (const type of FLOATS) {
      const size = sizeOf(type);
      for (const [rows, columns, stride] of [
        [5, 21, 21],
        [3, 8, 11],
      ] as const) {
        const bytes = Uint8Array.from({ length: ((rows - 1) * stride + columns) * size }, () => random() * 256);
        const patterns = type === "f32" ? [0x7fa00001, 0xffc12345, 0x80000000] : [0x7c01, 0xff81, 0x8000];
        const view = new DataView(bytes.buffer);
        for (const [i, bits] of patterns.entries()) {
          if (size === 4) view.setUint32(4 * i, bits, true);
          else view.setUint16(2 * i, bits, true);
        }
        const base = place(backend, bytes, size);
        const out = place(backend, new Uint8Array(bytes.length).fill(GUARD), 3 * size);
        const nothing = place(backend, new Uint8Array(0), 0);
        const shape = { dtype: type, rows, columns, stride, rank: 0, left: nothing, right: nothing };
        backend.fold({ out, base, ...shape });
        const copied = await download(backend, out, bytes.length);
        for (let i = 0; i < rows; i++) {
          const [start, end] = [i * stride * size, (i * stride + columns) * size];
          t.strictSame(copied.subarray(start, end), bytes.subarray(start, end), `${type} row ${i}`);
        }
        backend.fold({ out: base, base, ...shape });
        t.strictSame(await download(backend, base, bytes.length), bytes, `${type} in place`);
      }
    }
  });

  check("halves are rounded to nearest, ties to even", async (t, backend) => {
    // [f32 value, half]: from the definition of the formats, not from a converter.
    const f16: [number, number][] = [
      [0, 0x0000],
      [-0, 0x0000],
      [1, 0x3c00],
      [-2, 0xc000],
      [65504, 0x7bff],
      [1 + 2 ** -11, 0x3c00],
      [1 + 3 * 2 ** -11, 0x3c02],
      [1 + 2 ** -11 + 2 ** -20, 0x3c01],
      [-(1 + 2 ** -11), 0xbc00],
      [2 ** -14, 0x0400],
      [2 ** -14 - 2 ** -25, 0x0400],
      [2 ** -14 - 3 * 2 ** -25, 0x03fe],
      [1023 * 2 ** -24, 0x03ff],
      [2 ** -24, 0x0001],
      [2 ** -25, 0x0000],
      [2 ** -25 + 2 ** -40, 0x0001],
      [3 * 2 ** -25, 0x0002],
      [-(2 ** -26), 0x8000],
      [65519.996, 0x7bff],
      [65520, 0x7c00],
      [1e30, 0x7c00],
      [Infinity, 0x7c00],
      [-Infinity, 0xfc00],
    ];
    const bf16: [number, number][] = [
      [0, 0x0000],
      [1, 0x3f80],
      [-1, 0xbf80],
      [1 + 2 ** -8, 0x3f80],
      [1 + 3 * 2 ** -8, 0x3f82],
      [1 + 2 ** -8 + 2 ** -20, 0x3f81],
      [2 ** -133, 0x0001],
      [2 ** -134, 0x0000],
      [3 * 2 ** -134, 0x0002],
      [3.3895313892515355e38, 0x7f7f],
      [3.4028234663852886e38, 0x7f80],
      [Infinity, 0x7f80],
      [-Infinity, 0xff80],
    ];
    for (const [type, cases] of [
      ["f16", f16],
      ["bf16", bf16],
    ] as const) {
      for (const columns of [cases.length, 40]) {
        // Values reach the rounding through right: base is zero and left is 1.
        const right = Float32Array.from({ length: columns }, (_, j) => cases[j % cases.length]![0]);
        const out = place(backend, new Uint8Array(2 * columns), 2);
        const job = { dtype: type, rows: 1, columns, stride: columns, rank: 1 };
        const left = place(backend, Float32Array.of(1), 4);
        backend.fold({ out, base: out, left, right: place(backend, right, 4), ...job });
        const found = new Uint16Array((await download(backend, out, 2 * columns)).buffer);
        for (let j = 0; j < columns; j++) {
          const [value, half] = cases[j % cases.length]!;
          const expected = flushed(value, found[j]! & 0x7fff) ? found[j]! : half;
          t.equal(found[j]!.toString(16), expected.toString(16), `${type} of ${value} at ${j} of ${columns}`);
        }
        right.fill(NaN);
        backend.fold({ out, base: out, left, right: place(backend, right, 4), ...job });
        const nan = decode(type, await download(backend, out, 2 * columns), 1, columns);
        t.ok(nan.every(Number.isNaN), `${type} NaN`);
      }
    }
  });

  check("every half takes an update, rounded to the nearest, also beside infinity and NaN", async (t, backend) => {
    // Odd, so that no width of vectors divides it.
    const [rows, columns] = [255, 257];
    const halves = Uint16Array.from({ length: rows * columns }, (_, i) => (i * 40503) & 0xffff);
    const w0 = decode("f16", bytesOf(halves), 1, halves.length);
    const value = (half: number): number => decode("f16", bytesOf(Uint16Array.of(half)), 1, 1)[0]!;
    for (const size of [1, 2 ** -12, 2 ** 14]) {
      // Powers of two on one side: products are exact, fused or not, and one f32 addition is left.
      const left = Float32Array.from({ length: rows }, (_, i) => (i % 2 ? 1 : -1) * 2 ** ((i % 5) - 2));
      const right = values(columns, uniform(SEED)).map((x) => x * size);
      const out = place(backend, halves, 2);
      const job = { dtype: "f16", rows, columns, stride: columns, rank: 1 } as const;
      const slices = { left: place(backend, left, 4), right: place(backend, right, 4) };
      backend.fold({ out, base: out, ...slices, ...job });
      const found = new Uint16Array((await download(backend, out, halves.byteLength)).buffer);
      const wrong = found.findIndex((half, at) => {
        const sum = Math.fround(w0[at]! + left[Math.floor(at / columns)]! * right[at % columns]!);
        const is = value(half);
        if (!Number.isFinite(sum)) return !Object.is(is, sum);
        if (Math.abs(sum) >= 65520) return is !== Math.sign(sum) * Infinity;
        const off = Math.abs(is - sum);
        // Neighbours by their bits; among equals the even one is right. The sign of zero is left open.
        return [-1, 1].some((step) => {
          const other = Math.abs(value((half & 0x7fff) + step) * (half & 0x8000 ? -1 : 1) - sum);
          return other < off || (other === off && off > 0 && half % 2 === 1);
        });
      });
      t.equal(wrong, -1, `updates of ${size}: first wrong half`);
      for (const { block } of [out, slices.left, slices.right]) backend.free(block);
    }
  });

  check("halves decode to every value they can have", async (t, backend) => {
    for (const type of ["f16", "bf16"] as const) {
      const bytes = bytesOf(Uint16Array.from({ length: 65536 }, (_, i) => i));
      const out = place(backend, new Uint8Array(4 * 65536), 0);
      const coefficients = place(backend, Float32Array.of(1), 0);
      backend.expand({
        out,
        coefficients,
        basis: place(backend, bytes, 0),
        dtype: type,
        rank: 1,
        rows: 1,
        width: 65536,
      });
      const found = await floatsAt(backend, out, 65536);
      const expected = decode(type, bytes, 1, 65536);
      const right = (value: number, i: number): boolean =>
        value === found[i] || (Number.isNaN(value) && Number.isNaN(found[i]!)) || flushed(value, found[i]!);
      const wrong = expected.findIndex((value, i) => !right(value, i));
      t.equal(wrong, -1, `${type}: first wrong half`);
    }
  });

  check("scale gives magnitude over norm, on both axes", async (_t, backend) => {
    await fc.assert(
      fc.asyncProperty(weights, fc.constantFrom("rows" as const, "columns" as const), async (weight, axis) => {
        const { type, rank, rows, columns, skew } = weight;
        const { random, stride, size, base, w0, left, right } = weightOf(weight);
        const count = axis === "rows" ? rows : columns;
        const magnitude = values(count, random);
        const out = place(backend, new Uint8Array(4 * count), 4 * skew);
        const slices = {
          base: place(backend, base, size * skew),
          left: place(backend, left, 4),
          right: place(backend, right, 8),
          magnitude: place(backend, magnitude, 12),
        };
        backend.scale({ out, ...slices, axis, dtype: type, rows, columns, stride, rank });

        const sums = new Float64Array(count);
        for (let i = 0; i < rows; i++) {
          for (let j = 0; j < columns; j++) {
            let value = w0[i * stride + j]!;
            for (let k = 0; k < rank; k++) value += left[k * rows + i]! * right[k * columns + j]!;
            sums[axis === "rows" ? i : j]! += value * value;
          }
        }
        const found = await floatsAt(backend, out, count);
        for (let i = 0; i < count; i++) {
          const expected = sums[i] === 0 ? 0 : magnitude[i]! / Math.sqrt(sums[i]!);
          if (!(Math.abs(found[i]! - expected) <= 2e-5 * Math.abs(expected))) {
            throw new Error(`${axis} ${i} is ${found[i]}, expected ${expected}`);
          }
        }
        assertGuard(await surroundings(backend, out, 4 * count));
        for (const { block } of [out, ...Object.values(slices)]) backend.free(block);
      }),
      { seed: SEED, numRuns: 150 },
    );
  });

  check("scale of a zero row or column is 0, one that leaves the normal numbers NaN", async (t, backend) => {
    const nothing = place(backend, new Uint8Array(0), 0);
    for (const [axis, each, base, expected] of [
      ["rows", 2, [0, 0, 0, 0, 3, 4], [0, 0.4]],
      ["columns", 2, [0, 0, 0, 0, 3, 4], [0, 2 / 3, 0.5]],
      ["rows", 1e-30, [0, 0, 0, 1e15, 1, 1], [0, NaN]],
      ["columns", -1e30, [0, 1e-15, 1, 0, 0, 0], [0, NaN, -1e30]],
    ] as const) {
      const out = place(backend, new Uint8Array(4 * expected.length), 0);
      const magnitude = place(backend, new Float32Array(expected.length).fill(each), 0);
      const weight = {
        base: place(backend, Float32Array.from(base), 0),
        dtype: "f32",
        rows: 2,
        columns: 3,
        stride: 3,
      } as const;
      backend.scale({ out, magnitude, ...weight, left: nothing, right: nothing, rank: 0, axis });
      const found = await floatsAt(backend, out, expected.length);
      t.strictSame([...found], expected.map(Math.fround), axis);
    }
  });

  check("blocks are zeroed, never overlap, and keep their contents while memory grows", async (t, backend) => {
    const random = uniform(3);
    const live: { block: Block; mark: number }[] = [];
    const check = async ({ block, mark }: { block: Block; mark: number }): Promise<void> => {
      const bytes = await download(backend, { block, byteOffset: 0 }, block.byteLength);
      if (!bytes.every((byte) => byte === mark)) t.fail(`a block of ${block.byteLength} bytes was overwritten`);
    };
    for (let step = 0; step < 400; step++) {
      if (live.length > 0 && random() < 0.45) {
        const [gone] = live.splice(Math.floor(random() * live.length), 1);
        await check(gone!);
        backend.free(gone!.block);
        continue;
      }
      const byteLength = Math.floor(random() ** 4 * 300_000);
      const block = backend.allocate(byteLength, "active");
      await check({ block, mark: 0 });
      const mark = 1 + (step % 255);
      backend.upload({ block, byteOffset: 0 }, new Uint8Array(byteLength).fill(mark));
      live.push({ block, mark });
      const { active } = backend.memory();
      const sum = live.reduce((bytes, { block }) => bytes + block.byteLength, 0);
      if (active !== sum) t.equal(active, sum, "bytes by owner");
    }
    for (const item of live) await check(item);
    t.ok(live.length > 10, "some blocks are left");
  });

  check("copy, upload and view move bytes between blocks", async (t, backend) => {
    const from = place(backend, Uint8Array.of(1, 2, 3, 4, 5, 6, 7, 8), 4);
    const to = place(backend, new Uint8Array(8), 8);
    backend.copy(from, to, 8);
    t.strictSame([...(await download(backend, to, 8))], [1, 2, 3, 4, 5, 6, 7, 8]);
    assertGuard(await surroundings(backend, to, 8));
    backend.free(from.block);
    t.throws(() => backend.upload(from, Uint8Array.of(1)), TypeError, "a freed block is refused");
    t.throws(() => backend.copy(to, from, 4), TypeError);
  });

  check("a job that leaves its blocks is refused by name", async (t, backend) => {
    const block = backend.allocate(4096, "active");
    const at = (byteOffset: number): Slice => ({ block, byteOffset });
    const fold: FoldJob = {
      ...{ out: at(0), base: at(0), dtype: "f32", rows: 8, columns: 8, stride: 8, rank: 2 },
      ...{ left: at(1024), right: at(2048), rowScale: at(3072), columnScale: at(3200) },
    };
    backend.fold(fold);
    const refused: [Partial<FoldJob>, RegExp][] = [
      [{ rows: 200 }, /^out /],
      [{ rank: NaN }, /^left /],
      [{ rank: 400 }, /^left /],
      [{ stride: 2 ** 30 }, /^out /],
      [{ out: at(4000), base: at(0) }, /^out /],
      [{ base: at(2), out: at(2) }, /^out.byteOffset /],
      [{ base: at(-256), out: at(-256) }, /^out.byteOffset /],
      [{ left: at(4092) }, /^left /],
      [{ right: at(4092) }, /^right /],
      [{ rowScale: at(4068) }, /^rowScale /],
      [{ columnScale: at(4068) }, /^columnScale /],
      [{ columnScale: at(NaN) }, /^columnScale.byteOffset /],
    ];
    for (const [change, message] of refused) {
      t.throws(() => backend.fold({ ...fold, ...change }), { name: "RangeError", message }, String(message));
    }

    const expand = { out: at(0), coefficients: at(1024), basis: at(2048), rank: 2, rows: 4, width: 16 } as const;
    backend.expand({ ...expand, dtype: "int3" });
    t.throws(() => backend.expand({ ...expand, dtype: "f32", rows: 40 }), { message: /^basis / });
    t.throws(() => backend.expand({ ...expand, dtype: "int4", rank: 65 }), { message: /^out / });
    const project = { out: at(0), x: at(1024), basis: at(2048), count: 2, rows: 4, width: 16 };
    backend.project(project);
    t.throws(() => backend.project({ ...project, count: -2 }), { message: /^out / });
    t.throws(() => backend.project({ ...project, width: 40, rows: 40 }), { message: /^basis / });
    t.throws(() => backend.project({ ...project, x: at(4092) }), { message: /^x / });
    const scale = { ...fold, magnitude: at(512), out: at(768), axis: "columns" } as const;
    backend.scale(scale);
    t.throws(() => backend.scale({ ...scale, out: at(4090) }), { message: /^out.byteOffset / });
    t.throws(() => backend.scale({ ...scale, magnitude: at(4088) }), { message: /^magnitude / });
    const refusal = { name: "RangeError", message: /^at / };
    if (backend.read) await t.rejects(backend.read(at(4000), 97), refusal);
    else t.throws(() => backend.view!(at(4000), 97), refusal);
    t.throws(() => backend.upload(at(4000), new Uint8Array(97)), { name: "RangeError", message: /^to / });
    t.throws(() => backend.allocate(-1, "active"), { name: "RangeError", message: /^byteLength / });
    t.throws(() => backend.allocate(2 ** 45, "active"), { tag: "backend", message: /35184372088832 bytes/ });
  });
}

/** Values in [-1, 1), none so near to 0 that the norm of a vector of one could be. */
export function values(length: number, random: () => number): Float32Array {
  return Float32Array.from({ length }, () => {
    const x = random() * 2 - 1;
    return Math.abs(x) < 0.05 ? 0.05 : x;
  });
}

function bytesOf(array: Numbers): Uint8Array {
  return new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
}

/** Decodes an encoded tensor by the definitions of SPEC.md, bit by bit. */
function decode(type: Dtype, bytes: Uint8Array, rows: number, width: number): Float64Array {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const float = (bits: number, exponentBits: number, fractionBits: number): number => {
    const sign = bits >> (exponentBits + fractionBits) ? -1 : 1;
    const exponent = (bits >> fractionBits) & ((1 << exponentBits) - 1);
    const fraction = (bits & ((1 << fractionBits) - 1)) / 2 ** fractionBits;
    const bias = 2 ** (exponentBits - 1) - 1;
    if (exponent === (1 << exponentBits) - 1) return fraction === 0 ? sign * Infinity : NaN;
    return exponent === 0 ? sign * fraction * 2 ** (1 - bias) : sign * (1 + fraction) * 2 ** (exponent - bias);
  };
  const out = new Float64Array(rows * width);
  const bits = { f32: 32, f16: 16, bf16: 16, int8: 8, int4: 4, int3: 3 }[type];
  const start = type.startsWith("int") ? Math.ceil(rows / 2) * 4 : 0;
  for (let row = 0; row < rows; row++) {
    const scale = float(start > 0 ? view.getUint16(2 * row, true) : 0, 5, 10);
    for (let i = 0; i < width; i++) {
      const at = row * width + i;
      if (type === "f32") out[at] = view.getFloat32(4 * at, true);
      else if (type === "f16") out[at] = float(view.getUint16(2 * at, true), 5, 10);
      else if (type === "bf16") out[at] = float(view.getUint16(2 * at, true), 8, 7);
      else {
        let integer = 0;
        for (let b = 0; b < bits; b++) {
          const bit = 8 * (start + row * Math.ceil((width * bits) / 8)) + i * bits + b;
          if ((bytes[bit >> 3]! >> (bit & 7)) & 1) integer += b === bits - 1 ? -(2 ** b) : 2 ** b;
        }
        out[at] = scale * integer;
      }
    }
  }
  return out;
}

function assertClose(found: ArrayLike<number>, expected: Float64Array, tolerance: number): void {
  const largest = expected.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  for (let i = 0; i < expected.length; i++) {
    if (!(Math.abs(found[i]! - expected[i]!) <= tolerance * largest)) {
      throw new Error(`value ${i} is ${found[i]}, expected ${expected[i]}, largest ${largest}`);
    }
  }
}

function assertGuard(bytes: Uint8Array): void {
  const at = bytes.findIndex((byte) => byte !== GUARD);
  if (at >= 0) throw new Error(`byte ${at} beside the output is ${bytes[at]}, it was ${GUARD}`);
}

function assertSame(found: Uint8Array, expected: Uint8Array): void {
  if (found.some((byte, i) => byte !== expected[i])) throw new Error("bytes between rows were changed");
}
