/** Components of a stack on demand, compared with those of the whole eigenproblem, and of stacks without directions. */
import t from "tap";
import { noise } from "../support/compare.ts";
import {
  centred,
  columnMeans,
  coordinates,
  createWasmProducts,
  lq,
  PLAIN,
  type Products,
  principalComponents,
  ROUNDING,
  rowSquares,
  transposeMatrix as transpose,
} from "../support/internals/pack.ts";

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

function largest(x: Float64Array): number {
  return x.reduce((peak, value) => Math.max(peak, Math.abs(value)), 0);
}

/** A spectrum that falls by this factor a step, down to a floor. */
const falling = (count: number, factor: number, floor: number): number[] =>
  Array.from({ length: count }, (_, i) => Math.max(factor ** i, floor));

const [ROWS, WIDTH, K] = [210, 230, 4];

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

t.test("identical rows, zero rows, tiny stacks", async (t) => {
  const row = noise(WIDTH, 23);
  const same = Float64Array.from({ length: ROWS * WIDTH }, (_, i) => Math.fround(row[i % WIDTH]!));
  const x = centred(same, ROWS, WIDTH, columnMeans(same, ROWS, WIDTH));
  const none = principalComponents(x, ROWS, WIDTH, floorsOf(same, ROWS, WIDTH), K, wasm);
  t.equal(none.count, 0);
  t.equal(none.total, 0);
  const once = principalComponents(same, ROWS, WIDTH, floorsOf(same, ROWS, WIDTH), K, wasm);
  t.equal(once.count, 1);
});
