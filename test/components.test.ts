/**
 * Leading components by block Lanczos, compared with those of the whole eigenproblem: the same energy, subspace and numbers on spectra
 * that fall off, and the whole eigenproblem wherever a pair cannot be trusted.
 */
import fc from "fast-check";
import t from "tap";
import { noise } from "./compare.ts";
import {
  type Components,
  coordinates,
  createWasmProducts,
  lq,
  PLAIN,
  type Products,
  principalComponents,
  ROUNDING,
  rowSquares,
  transposeMatrix as transpose,
} from "./internals.ts";
import { runs } from "./required.ts";

const ways: [string, Products][] = [
  ["js", PLAIN],
  ["wasm", await createWasmProducts()],
];
const wasm = ways[1]![1];

const rotations = new Map<string, Float64Array>();

/** Rows of a random orthogonal matrix [n, n], made once. */
function rotation(n: number, seed: number): Float64Array {
  const key = `${n} ${seed}`;
  const found = rotations.get(key) ?? lq(noise(n * n, seed), n, n).Q;
  rotations.set(key, found);
  return found;
}

/** A stack [rows, width] with these singular values, in random directions. */
function withSingular(values: readonly number[], rows: number, width: number): Float64Array {
  const rank = values.length;
  const left = rotation(rows, 1)
    .slice(0, rank * rows)
    .map((value, i) => value * values[Math.floor(i / rows)]!);
  const right = rotation(width, 2).slice(0, rank * width);
  return wasm.multiplyTransposed(transpose(left, rank, rows), transpose(right, rank, width), rows, width, rank);
}

function floorsOf(x: Float64Array, rows: number, width: number): Float64Array {
  return rowSquares(x, rows, width).map((square) => ROUNDING * Math.sqrt(square));
}

/** Squared norm of the rows' part in the span of the components. */
function captured(x: Float64Array, rows: number, width: number, { vectors, count }: Components): number {
  return wasm.multiplyTransposed(x, vectors, rows, count, width).reduce((sum, value) => sum + value * value, 0);
}

function largest(x: Float64Array): number {
  return x.reduce((peak, value) => Math.max(peak, Math.abs(value)), 0);
}

/**
 * Compares both ways to the first k components. @returns whether Lanczos found them alone
 * @param tolerance of energy and singular values, relative
 */
function compare(
  name: string,
  x: Float64Array,
  rows: number,
  width: number,
  k: number,
  products: Products,
  tolerance = 1e-12,
): boolean {
  const floors = floorsOf(x, rows, width);
  const before = x.slice();
  const few = principalComponents(x, rows, width, floors, k, products);
  const whole = principalComponents(x, rows, width, floors, () => k, products);
  t.same(x, before, `${name}: the stack is left as it is`);
  t.equal(few.count, whole.count, `${name}: as many components`);
  t.equal(few.total, whole.total);
  const [one, other] = [captured(x, rows, width, few), captured(x, rows, width, whole)];
  t.ok(Math.abs(one - other) <= tolerance * other, `${name}: the same energy, ${one / other - 1}`);
  for (let i = 0; i < few.count; i++) {
    const [value, apart] = [whole.singular[i]!, Math.abs(few.singular[i]! - whole.singular[i]!)];
    // A Gram matrix knows squares to 1e-16 of the largest, and no better.
    if (!(apart <= tolerance * value + (1e-15 * whole.singular[0]! ** 2) / value))
      t.fail(`${name}: singular value ${i} differs by ${apart / value}`);
  }
  const cross = products.multiplyTransposed(few.vectors, few.vectors, few.count, few.count, width);
  for (let i = 0; i < few.count; i++) cross[i * few.count + i]! -= 1;
  t.ok(largest(cross) <= 1e-8, `${name}: orthonormal within ${largest(cross)}`);
  const alone = few.singular.length < Math.min(rows, width);
  if (alone) t.equal(few.singular.length, k, `${name}: no more values than asked for`);
  return alone;
}

/** A spectrum that falls by this factor a step, down to a floor. */
const falling = (count: number, factor: number, floor: number): number[] =>
  Array.from({ length: count }, (_, i) => Math.max(factor ** i, floor));

const [ROWS, WIDTH, K] = [210, 230, 4];

t.test("a spectrum that falls off: found alone, the same subspace", async () => {
  for (const [name, products] of ways) {
    for (const [rows, width] of [
      [ROWS, WIDTH],
      [WIDTH, ROWS],
    ] as const) {
      for (const factor of [0.95, 0.8, 0.5]) {
        const x = withSingular(falling(ROWS, factor, 0.01), rows, width);
        const alone = compare(`${name} ${rows} × ${width}, ${factor}`, x, rows, width, K, products);
        t.ok(alone || factor > 0.9, `${name} ${rows} × ${width}, ${factor}: found alone`);
      }
      const x = withSingular(falling(ROWS, 0.8, 0.01), rows, width);
      const floors = floorsOf(x, rows, width);
      const one = principalComponents(x, rows, width, floors, K, products).vectors;
      const other = principalComponents(x, rows, width, floors, () => K, products).vectors;
      t.ok(largest(one.map((value, i) => value - other[i]!)) <= 1e-7, "vector by vector");
    }
  }
});

t.test("a stack on its components: coordinates first, components on demand", async (t) => {
  for (const [name, products] of ways) {
    for (const [rows, width, rank] of [
      [60, 90, 60],
      [90, 60, 60],
      [60, 90, 20],
      [90, 60, 20],
    ] as const) {
      const x = withSingular(falling(rank, 0.9, 0), rows, width);
      const { singular, along, count, strongest, total } = coordinates(x, rows, width, products);
      t.equal(count, rank, `${name} ${rows} × ${width}, rank ${rank}`);
      const whole = principalComponents(x, rows, width, floorsOf(x, rows, width), () => rank, products);
      t.ok(Math.abs(total / whole.total - 1) <= 1e-12);
      const found = strongest(12);
      t.same([found.count, found.vectors.length], [12, 12 * width]);
      t.ok(largest(found.vectors.map((value, i) => value - whole.vectors[i]!)) <= 1e-8, "the same components");
      const product = products.multiplyTransposed(x, found.vectors, rows, 12, width);
      for (let i = 0; i < rows; i++)
        for (let k = 0; k < 12; k++) {
          const [one, other] = [along[i * count + k]!, product[i * 12 + k]!];
          if (!(Math.abs(Math.abs(one) - Math.abs(other)) <= 1e-9 * singular[0]!)) t.fail(`row ${i} along ${k}`);
        }
    }
  }
  const none = coordinates(new Float64Array(12), 3, 4);
  t.same([none.count, none.total, none.along.length], [0, 0, 0]);
});

t.test("noise in all directions: nothing falls off, the whole eigenproblem is solved", async () => {
  const x = noise(ROWS * WIDTH, 3);
  t.notOk(compare("noise", x, ROWS, WIDTH, K, wasm));
});

t.test("clusters and equal values", async () => {
  const rest = falling(ROWS - 60, 0.9, 0.001).map((value) => value / 10);
  const cases: [string, number[], number?][] = [
    ["pairs", [5, 5, 4, 4, 3, 3, 2, 2]],
    ["a cluster within 1e-9", Array.from({ length: 8 }, (_, i) => 1 + 1e-9 * i)],
    ["equal values on both sides of the cut", [5, 4, 3, 2, 1, 1, 1, 1, 1]],
    ["more equal values than a block holds", new Array<number>(40).fill(1)],
    // The requested residual does not tell which values of the cluster are largest.
    ["a cluster within 4e-8 that a block does not hold", Array.from({ length: 40 }, (_, i) => 1 + 1e-9 * i), 1e-7],
  ];
  for (const [name, top, tolerance] of cases)
    compare(name, withSingular([...top, ...rest], ROWS, WIDTH), ROWS, WIDTH, K, wasm, tolerance);
});

t.test("one stack a thousand times larger than the others", async () => {
  const x = withSingular(falling(ROWS, 0.8, 0.01), ROWS, WIDTH);
  for (let i = 0; i < 8 * WIDTH; i++) x[i]! *= 1000;
  compare("large rows", x, ROWS, WIDTH, K, wasm);
});

t.test("any shape, any fall", async () => {
  fc.assert(
    fc.property(
      fc.constantFrom(97, 150, 201),
      fc.constantFrom(97, 150, 201),
      fc.integer({ min: 1, max: 3 }),
      fc.double({ min: 0.3, max: 1, noNaN: true }),
      (rows, width, k, factor) => {
        const x = withSingular(falling(Math.min(rows, width), factor, 1e-3), rows, width);
        compare(`[${rows}, ${width}], ${k}, ${factor}`, x, rows, width, k, wasm);
      },
    ),
    { seed: 5, numRuns: runs(25) },
  );
});
