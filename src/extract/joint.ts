/**
 * Joint mode: orthonormal bases P_A [kA, in] and P_B [kB, out] of one module that minimise
 *
 *     Σ_t ‖ΔW_t − P_Bᵀ·C_t·P_A‖²,  whose best cores are C_t = P_B·ΔW_t·P_Aᵀ
 *
 * themselves, instead of what each side's rows lose. With one side held the other's best is the leading eigenvectors of a sum over
 * tasks, so the two take turns. Each turn is one step of subspace iteration from where the side was, for the other side moves
 * anyway; ΔW is never formed. The result does not depend on the gauge. A core is of the task's rank, so its coefficients are
 * the plain projections of both factors: file and runtime do not know the difference.
 */
import { type Components, fixSigns, principalComponents } from "./components.ts";
import { symmetricEigen } from "./eigen.ts";
import { balance, type Pair } from "./gauge.ts";
import { cholesky, dot, gram, norm, PLAIN, type Products, scale, straighten, transpose } from "./linalg.ts";

/** Turns at most; most modules need 20 to 80. */
const MOST_TURNS = 400;

/** So many of them take the other side's best bases, which leaves bad neighbourhoods; later ones take a step towards them, for less. */
const WHOLE_TURNS = 16;

/** It ends when this share of what is captured is gained no more in a turn. */
const SETTLED = 1e-8;

/** Some rows [count, width]. */
interface Rows {
  readonly count: number;
  readonly values: Float64Array;
}

/**
 * @param kA of components; fewer come back where ΔW has fewer directions
 * @returns both sides strongest first; `singular` are those of the rows that reach through the other side's basis, `total` is Σ‖ΔW‖²
 */
export function jointComponents(
  given: readonly Pair[],
  kA: number,
  kB: number,
  outputs: number,
  inputs: number,
  products: Products = PLAIN,
): { A: Components; B: Components } {
  const pairs = given.map((pair) => balance(pair, outputs, inputs));
  const total = pairs.reduce((sum, { rank, A, Bt }) => {
    const [a, b] = [gram(A, rank, inputs), gram(Bt, rank, outputs)];
    return sum + dot(a, 0, b, 0, a.length);
  }, 0);
  const throughB = (B: Rows): Rows =>
    reach(
      pairs.map(({ rank, A, Bt }) => ({ rank, through: Bt, rows: A })),
      B,
      outputs,
      inputs,
      products,
    );
  const throughA = (A: Rows): Rows =>
    reach(
      pairs.map(({ rank, A: through, Bt }) => ({ rank, through, rows: Bt })),
      A,
      inputs,
      outputs,
      products,
    );
  let B = leading(joined(pairs.map(({ rank, Bt }) => ({ count: rank, values: Bt }))), kB, outputs, products);
  let A = leading(throughB(B), kA, inputs, products);
  for (let turn = 0, before = 0; turn < MOST_TURNS; turn++) {
    const [rowsA, whole] = [throughB(B), turn < WHOLE_TURNS];
    A = whole ? leading(rowsA, kA, inputs, products) : step(rowsA, A, inputs, products);
    const rowsB = throughA(A);
    B = whole ? leading(rowsB, kB, outputs, products) : step(rowsB, B, outputs, products);
    const captured = squares(products.multiplyTransposed(rowsB.values, B.values, rowsB.count, B.count, outputs));
    if (captured - before <= SETTLED * captured) break;
    before = captured;
  }
  return { A: sorted(throughB(B), A, inputs, total, products), B: sorted(throughA(A), B, outputs, total, products) };
}

/**
 * P·ΔW of every task, or rows with the same Gram matrix where those are fewer: one side, seen through the other side's basis P.
 */
function reach(
  tasks: readonly { readonly rank: number; readonly through: Float64Array; readonly rows: Float64Array }[],
  P: Rows,
  other: number,
  width: number,
  products: Products,
): Rows {
  return joined(
    tasks.map(({ rank, through, rows }) => {
      const seen = products.multiplyTransposed(P.values, through, P.count, rank, other);
      const turned = transpose(rows, rank, width);
      if (P.count <= rank)
        return { count: P.count, values: products.multiplyTransposed(seen, turned, P.count, width, rank) };
      const factor = transpose(cholesky(gram(transpose(seen, P.count, rank), rank, P.count), rank), rank, rank);
      return { count: rank, values: products.multiplyTransposed(factor, turned, rank, width, rank) };
    }),
  );
}

function joined(parts: readonly Rows[]): Rows {
  const values = new Float64Array(parts.reduce((sum, part) => sum + part.values.length, 0));
  let [count, at] = [0, 0];
  for (const part of parts) {
    values.set(part.values, at);
    at += part.values.length;
    count += part.count;
  }
  return { count, values };
}

/** Their strongest k directions. */
function leading({ count, values }: Rows, k: number, width: number, products: Products): Rows {
  const found = principalComponents(values, count, width, new Float64Array(count), () => k, products);
  return { count: found.count, values: found.vectors };
}

/** One step of subspace iteration: V ← orthonormal rows of V·RᵀR. */
function step({ count, values }: Rows, V: Rows, width: number, products: Products): Rows {
  const next = products.multiplyTransposed(
    products.multiplyTransposed(V.values, values, V.count, count, width),
    transpose(values, count, width),
    V.count,
    width,
    count,
  );
  return { count: V.count, values: orthonormal(next, V.values, V.count, width) };
}

/** Rows made orthonormal; those that nothing is left of stay as they were, at right angles to the rest. */
function orthonormal(rows: Float64Array, before: Float64Array, k: number, width: number): Float64Array {
  const lengths = Array.from({ length: k }, (_, i) => norm(rows, i * width, width));
  const largest = Math.max(...lengths);
  for (let i = 0; i < k; i++) {
    if (lengths[i]! <= 1e-14 * largest) rows.set(before.subarray(i * width, (i + 1) * width), i * width);
    else scale(1 / lengths[i]!, rows, i * width, width);
    // Twice is enough.
    for (let pass = 0; pass < 2; pass++) {
      straighten(rows, i, width);
      const length = norm(rows, i * width, width);
      if (length > 0) scale(1 / length, rows, i * width, width);
    }
  }
  return rows;
}

/** The same span, its directions by strength, the largest entry of each positive. */
function sorted(
  rows: Rows,
  { count: k, values: V }: Rows,
  width: number,
  total: number,
  products: Products,
): Components {
  const { values, vectors } = symmetricEigen(
    gram(products.multiplyTransposed(V, rows.values, k, rows.count, width), k, rows.count),
    k,
  );
  const turned = products.multiplyTransposed(vectors(k), transpose(V, k, width), k, width, k);
  fixSigns(turned, k, width);
  return {
    count: k,
    vectors: orthonormal(turned, V, k, width),
    singular: values.map((value) => Math.sqrt(Math.max(0, value))),
    total,
  };
}

function squares(values: Float64Array): number {
  return dot(values, 0, values, 0, values.length);
}
