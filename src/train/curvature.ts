/**
 * Solves for the coefficients from which distilling begins. A pack's own coefficients minimise the error of ΔW; these minimise the change
 * of the task's answers, to second order. An error e of a row costs e·F·eᵀ, where F is the curvature of KL (Fisher's information). F is
 * estimated from gradients at the adapter itself, for labels drawn from its own answers; there is one F for each side of a module, as in
 * K-FAC (J. Martens, R. Grosse, 2015). Each row is then a least squares problem: no steps, and no matrix of the size of F in memory.
 */

import type { Adapter } from "../adapters/adapter.ts";
import { backwardSolve, cholesky, forwardSolve, gram, multiplyTransposed } from "../extract/linalg.ts";
import { gauged, openModule, toPair } from "../extract/project.ts";
import type { Subspace } from "../extract/subspace.ts";
import type { TaskBlob } from "../format/format.ts";
import { throwIfAborted } from "../pace.ts";
import { gaugeOf, storedModule } from "../pack/add.ts";
import type { Session } from "../session/session.ts";
import type { BatchFeeds } from "../session/tokens.ts";
import { type AskOptions, adapterWeights } from "./answers.ts";
import type { Row } from "./examples.ts";
import { drawnFrom } from "./probabilities.ts";

/** Least curvature of every direction, as a share of the mean curvature: sample texts never cover all that a model will see. */
const DAMPING = 0.1;

/** Coefficients [rows, K] of both sides of a module. */
interface Solved {
  readonly alphaA: Float64Array;
  readonly alphaB: Float64Array;
}

/** Accumulates the least squares problem of one side. */
class Side {
  readonly #space: Subspace;
  /** Target rows without the mean [count, width]. */
  readonly #x: Float64Array;
  readonly #count: number;
  /** Σ (E·gᵀ)(E·gᵀ)ᵀ [K, K] and Σ (x·gᵀ)(E·gᵀ)ᵀ [count, K], and Σ |g|². */
  readonly #gram: Float64Array;
  readonly #right: Float64Array;
  #trace = 0;

  constructor(space: Subspace, rows: Float64Array, count: number) {
    const { components: K, width, mean } = space;
    this.#space = space;
    this.#x = rows.slice(0, count * width).map((value, i) => value - (mean?.[i % width] ?? 0));
    this.#count = count;
    this.#gram = new Float64Array(K * K);
    this.#right = new Float64Array(count * K);
  }

  /** @param gradient [_, width] of rows */
  add(gradient: Float32Array): void {
    const { components: K, width, vectors } = this.#space;
    const g = Float64Array.from(gradient);
    const rank = g.length / width;
    const [ofE, ofX] = [
      multiplyTransposed(vectors, g, K, rank, width),
      multiplyTransposed(this.#x, g, this.#count, rank, width),
    ];
    const [squares, products] = [gram(ofE, K, rank), multiplyTransposed(ofX, ofE, this.#count, K, rank)];
    for (let i = 0; i < squares.length; i++) this.#gram[i]! += squares[i]!;
    for (let i = 0; i < products.length; i++) this.#right[i]! += products[i]!;
    for (const value of g) this.#trace += value * value;
  }

  /** Coefficients [count, K]. */
  solve(): Float64Array {
    const { components: K, width, vectors } = this.#space;
    // The mean curvature is 1.
    const scale = this.#trace > 0 ? width / this.#trace : 0;
    const [even, along] = [gram(vectors, K, width), multiplyTransposed(this.#x, vectors, this.#count, K, width)];
    const factor = cholesky(
      even.map((value, i) => DAMPING * value + scale * this.#gram[i]!),
      K,
    );
    const alpha = along.map((value, i) => DAMPING * value + scale * this.#right[i]!);
    forwardSolve(factor, K, alpha, this.#count);
    backwardSolve(factor, K, K, alpha, this.#count);
    return alpha;
  }
}

/**
 * Finds coefficients that change the adapter's answers least, by module name. Modules with private terms are left out.
 * @param blob the task; the coefficients have its ranks
 * @param head the layers that the adapter brings
 * @param batches questions with the adapter's answers
 */
export async function solvedCoefficients(
  session: Session,
  adapter: Adapter,
  { blob, head }: { readonly blob: TaskBlob; readonly head: readonly string[] },
  batches: readonly (readonly Row<BatchFeeds>[])[],
  { supervision, signal, random }: AskOptions & { readonly random: () => number },
): Promise<Map<string, Solved>> {
  const sides = await sidesOf(session, adapter, blob);
  if (sides.size === 0) return new Map();
  const { model, weights } = await adapterWeights(session, adapter, head);
  for (const rows of batches) {
    throwIfAborted(signal);
    const drawn = rows.map((row) =>
      supervision.answered(
        row,
        supervision.wanted(row).map((one) => drawnFrom(one, random)),
      ),
    );
    for (const { rows: run, targets } of supervision.microBatches(drawn, 0)) {
      const { gradients } = await model.step(await supervision.feeds(run), weights, targets);
      for (const [module, { A, B }] of sides) {
        const { A: ofA, Bt } = gradients.terms.get(module)!;
        A.add(ofA);
        B.add(Bt);
      }
    }
  }
  const solved = [...sides].map(([module, { A, B }]) => [module, { alphaA: A.solve(), alphaB: B.solve() }] as const);
  // Answers that are not finite give no information.
  return new Map(solved.filter(([, { alphaA, alphaB }]) => [...alphaA, ...alphaB].every(Number.isFinite)));
}

/** Opens the least squares problems of both sides, by module. */
async function sidesOf(
  { pack }: Session,
  adapter: Adapter,
  blob: TaskBlob,
): Promise<Map<string, { readonly A: Side; readonly B: Side }>> {
  const bases = await pack.bases();
  const sides = new Map<string, { readonly A: Side; readonly B: Side }>();
  try {
    for (const { module: index, rank, privateRank, A, B, ownA, ownBt } of blob.terms) {
      const stored = pack.modules[index]!;
      const module = adapter.modules.get(stored.name);
      if (!A || !B || ownA || ownBt || privateRank > 0 || !module) continue;
      const own = { ...stored, A: [stored.A[A.basis]!], B: [stored.B[B.basis]!] };
      const space = openModule(storedModule(own, bases.bytes, adapter));
      const { rank: most } = pack.directory.basis;
      const how = {
        gauge: gaugeOf(pack),
        rank: most,
        coefficientDtype: A.tensor.dtype,
        step: pack.directory.basis.step,
      };
      const pair = gauged(toPair({ id: adapter.id, ...(await module.read()) }, stored.out, stored.in), space, how);
      const count = Math.min(rank, pair.rank);
      if (count < rank) continue;
      sides.set(stored.name, { A: new Side(space.A, pair.A, count), B: new Side(space.B, pair.Bt, count) });
    }
  } finally {
    bases.close();
  }
  return sides;
}
