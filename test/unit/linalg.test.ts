/**
 * Linear algebra of extraction, compared with spectra known in closed form and with residuals, at sizes 1 to 200:
 * simple, clustered, multiple, graded and rank-deficient.
 */
import fc from "fast-check";
import t from "tap";
import { noise } from "../support/compare.ts";
import {
  backwardSolve,
  centred,
  cholesky,
  columnMeans,
  coordinates,
  createWasmProducts,
  forwardSolve,
  gram,
  lq,
  PLAIN,
  type Products,
  principalComponents,
  ROUNDING,
  rowSquares,
  svd,
  symmetricEigen,
  transposeMatrix as transpose,
} from "../support/internals/pack.ts";
import { runs } from "../support/required.ts";

/** X·Yᵀ, the slow way. */
function product(x: Float64Array, y: Float64Array, m: number, n: number, width: number): Float64Array {
  const out = new Float64Array(m * n);
  for (let i = 0; i < m; i++) {
    for (let j = 0; j < n; j++) {
      for (let k = 0; k < width; k++) out[i * n + j]! += x[i * width + k]! * y[j * width + k]!;
    }
  }
  return out;
}

function largest(x: Float64Array, y?: Float64Array): number {
  return x.reduce((peak, value, i) => Math.max(peak, Math.abs(value - (y?.[i] ?? 0))), 0);
}

function identity(n: number): Float64Array {
  return Float64Array.from({ length: n * n }, (_, i) => (i % (n + 1) === 0 ? 1 : 0));
}

/** Rows of a random orthogonal matrix [n, n]. */
function rotation(n: number, seed: number): Float64Array {
  return lq(noise(n * n, seed), n, n).Q;
}

/** Tridiagonal forms in plain JavaScript, and by WebAssembly. */
const FORMS = new Map<string, Products["tridiagonalize"]>([["js", PLAIN.tridiagonalize]]);
for (const variant of ["scalar", "simd"] as const)
  FORMS.set(variant, (await createWasmProducts({ variant })).tridiagonalize);

function checkEigen(
  name: string,
  a: Float64Array,
  n: number,
  expected: readonly number[],
  form: Products["tridiagonalize"],
): void {
  const norm = Math.max(...expected.map(Math.abs), Number.MIN_VALUE);
  const sorted = [...expected].sort((x, y) => y - x);
  const eigen = symmetricEigen(a.slice(), n, form);
  const tolerance = 1e-14 * norm * Math.sqrt(n) * 4;
  t.ok(largest(eigen.values, Float64Array.from(sorted)) <= tolerance, `${name}: values`);
  for (const count of new Set([1, Math.ceil(n / 3), n])) {
    const v = eigen.vectors(count);
    const image = product(v, a, count, n, n);
    const residual = image.map((value, i) => value - eigen.values[Math.floor(i / n)]! * v[i]!);
    t.ok(largest(residual) <= 10 * tolerance, `${name}: residual of ${count} vectors is ${largest(residual) / norm}`);
    const off = largest(product(v, v, count, count, n), identity(count));
    t.ok(off <= 1e-10, `${name}: ${count} vectors are orthonormal within ${off}`);
  }
}

for (const [name, form] of FORMS)
  t.test(`${name}: eigenvalues known in closed form`, async (t) => {
    for (const n of [1, 2, 3, 4, 5, 8, 13, 21, 50, 100, 151, 200]) {
      const second = new Float64Array(n * n);
      for (let i = 0; i < n; i++) {
        second[i * n + i] = 2;
        if (i > 0) second[i * n + i - 1] = second[(i - 1) * n + i] = -1;
      }
      const cosines = Array.from({ length: n }, (_, k) => 2 - 2 * Math.cos(((k + 1) * Math.PI) / (n + 1)));
      checkEigen(`second difference ${n}`, second, n, cosines, form);
      checkEigen(`ones ${n}`, new Float64Array(n * n).fill(1), n, [n, ...new Array<number>(n - 1).fill(0)], form);
      checkEigen(`zero ${n}`, new Float64Array(n * n), n, new Array<number>(n).fill(0), form);
    }
    t.throws(() => symmetricEigen(Float64Array.from([1, NaN, NaN, 1]), 2, form), RangeError);
  });

t.test("any symmetric matrix", async () => {
  const size = fc.integer({ min: 1, max: 40 });
  const forms = fc.constantFrom(...FORMS.values());
  fc.assert(
    fc.property(size, fc.integer({ min: 1, max: 12 }), fc.nat(), forms, (n, rank, seed, form) => {
      const x = noise(n * rank, seed).map((value) => (Math.abs(value) < 0.3 ? 0 : value));
      const a = gram(x, n, rank);
      const { values, vectors } = symmetricEigen(a.slice(), n, form);
      const v = vectors(n);
      const columns = transpose(v, n, n);
      const rebuilt = product(
        columns.map((value, i) => value * values[i % n]!),
        columns,
        n,
        n,
        n,
      );
      const scale = Math.max(values[0]!, Number.MIN_VALUE);
      return (
        largest(rebuilt, a) <= 1e-12 * scale &&
        largest(product(v, v, n, n, n), identity(n)) <= 1e-10 &&
        values.slice(rank).every((value) => Math.abs(value) <= 1e-13 * scale)
      );
    }),
    { seed: 3, numRuns: runs(150) },
  );
});

t.test("Cholesky", async () => {
  for (const n of [1, 2, 5, 30]) {
    const x = noise(n * (n + 3), n);
    const g = gram(x, n, n + 3);
    const l = cholesky(g, n);
    t.ok(largest(product(l, l, n, n, n), g) <= 1e-13 * n, "L·Lᵀ");
    const wanted = noise(2 * n, 8);
    const h = product(wanted, g, 2, n, n);
    forwardSolve(l, n, h, 2);
    backwardSolve(l, n, n, h, 2);
    t.ok(largest(h, wanted) <= 1e-8, "solves");
    if (n < 2) continue;
    // The leading block of the factor solves the problem of the leading vectors.
    const few = n - 1;
    const block = Float64Array.from({ length: few * few }, (_, i) => g[Math.floor(i / few) * n + (i % few)]!);
    const target = noise(few, 9);
    const right = new Float64Array(n);
    right.set(product(target, block, 1, few, few));
    forwardSolve(l, n, right, 1);
    const solved = right.slice(0, few);
    backwardSolve(l, n, few, solved, 1);
    t.ok(largest(solved, target) <= 1e-8, "solves a prefix");
  }
});

/** Components of a stack on demand, compared with those of the whole eigenproblem, and of stacks without directions. */
const ways: [string, Products][] = [
  ["js", PLAIN],
  ["wasm", await createWasmProducts()],
];
const wasm = ways[1]![1];

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

t.test("identical rows", async (t) => {
  const row = noise(WIDTH, 23);
  const same = Float64Array.from({ length: ROWS * WIDTH }, (_, i) => Math.fround(row[i % WIDTH]!));
  const x = centred(same, ROWS, WIDTH, columnMeans(same, ROWS, WIDTH));
  const none = principalComponents(x, ROWS, WIDTH, floorsOf(same, ROWS, WIDTH), K, wasm);
  t.equal(none.count, 0);
  t.equal(none.total, 0);
  const once = principalComponents(same, ROWS, WIDTH, floorsOf(same, ROWS, WIDTH), K, wasm);
  t.equal(once.count, 1);
});

t.test("LQ and SVD, rows of very different length and zeros too", async (t) => {
  for (const [m, n] of [
    [1, 1],
    [2, 5],
    [5, 2],
    [8, 8],
  ] as const) {
    for (const ratio of [0, 1e-9, 1]) {
      const x = noise(m * n, m + n).map((value, i) => value * ratio ** Math.floor(i / n));
      const { L, Q, size } = lq(x.slice(), m, n);
      t.ok(largest(product(L, transpose(Q, size, n), m, n, size), x) <= 1e-13, "L·Q");
      t.ok(largest(product(Q, Q, size, size, n), identity(size)) <= 1e-13, "Q·Qᵀ");
      const { U, S, V } = svd(x, m, n);
      const scaled = transpose(U, m, m).map((entry, i) => entry * S[i % m]!);
      t.ok(largest(product(scaled, transpose(V, m, n), m, n, m), x) <= 1e-13, "U·S·V");
      t.ok(largest(product(U, U, m, m, m), identity(m)) <= 1e-13, "U·Uᵀ");
    }
  }
  const graded = svd(Float64Array.from([1, 1, 0, 0, 1e-12, 1e-12, 0, 0, 1e-30]), 3, 3);
  for (const [i, value] of [Math.SQRT2, Math.sqrt(1.5) * 1e-12, 1e-30 / Math.sqrt(3)].entries())
    t.ok(Math.abs(graded.S[i]! / value - 1) <= 1e-14, "small values are accurate relative to themselves");
});
