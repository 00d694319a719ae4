/**
 * Decodes the coefficients of the tasks of one switch into one f32 array, with strengths applied, and lists the pieces of every
 * module's factors, or computes its core from them. Pure: no backend, no host. The staged array is all that a switch uploads.
 */

import {
  type Coefficients,
  type PackModule,
  readTensor,
  type SharedBases,
  type Side,
  sharedBases,
  type TaskBlob,
  type TaskTerm,
  type TensorRef,
} from "../format/format.ts";

/** A task of a switch and its strength. */
export interface ActiveTask {
  readonly id: string;
  readonly strength: number;
  readonly blob: TaskBlob;
}

/** Rows of a factor that expand from a basis. */
export interface Expansion {
  /** First f32 of the coefficients [rows, basis rows] in the staged array. */
  readonly at: number;
  /** Rows of coefficients: the rank (column) or 1 (flat). */
  readonly rows: number;
  readonly basis: Side;
  /** First row of the factor that is made. */
  readonly row: number;
  /** Added to the task's own rows, instead of in their place. */
  readonly add: boolean;
}

/** Rows of a factor that the task brings itself. */
export interface Private {
  /** First f32 of the rows in the staged array; below 0 where they are `stored` alone. */
  readonly at: number;
  readonly row: number;
  readonly rank: number;
  /** Set where nothing but the rows themselves is wanted: `readRows` reads them straight to their place. */
  readonly stored?: StoredRows | undefined;
}

/** Rows as their task stores them, and what multiplies them. */
interface StoredRows {
  readonly blob: TaskBlob;
  readonly tensor: TensorRef;
  readonly strength: number;
}

/** The pieces of a factor. Those of `private` go by pairs, the others make rows that both sides have, each in its way. */
export interface Pieces {
  readonly shared: readonly Expansion[];
  readonly own: readonly Private[];
  readonly private: readonly Private[];
}

/** What a switch does to one module: factors A [rank, in] and Bt [rank, out], piece by piece. */
export interface ModulePlan {
  readonly module: number;
  readonly rank: number;
  readonly A: Pieces;
  readonly Bt: Pieces;
  /** True where all but private rows lie between column bases that the module's tasks share. */
  readonly core: boolean;
  /** First f32 of DoRA's magnitudes [out] in the staged array. */
  readonly magnitude: number | undefined;
}

/** A growing f32 array that is used again by each switch. */
export class Staging {
  values: Float32Array<ArrayBuffer> = new Float32Array(0);
  used = 0;

  /** Room for `count` more values; returns where they begin. */
  reserve(count: number): number {
    const at = this.used;
    this.used += count;
    if (this.used > this.values.length) {
      // It grows by half at least: a copy for each of many modules would take quadratic time.
      const grown = new Float32Array(Math.max(this.used, Math.ceil(1.5 * this.values.length)));
      grown.set(this.values);
      this.values = grown;
    }
    return at;
  }
}

/** A plan that more tasks may add to. */
interface Draft extends ModulePlan {
  rank: number;
  core: boolean;
  readonly A: { readonly shared: Expansion[]; readonly own: Private[]; readonly private: Private[] };
  readonly Bt: Draft["A"];
  magnitude: number | undefined;
}

/**
 * Makes a plan for each module of the tasks of one switch. Strengths multiply B, whose factors carry the adapter's scale already.
 * @param leave whether rows of sides without components, which nothing is added to, are left as they are stored. Default: false
 */
export function stage(
  parts: readonly ActiveTask[],
  modules: readonly PackModule[],
  staging: Staging,
  leave = false,
): ModulePlan[] {
  staging.used = 0;
  const plans = new Map<number, Draft>();
  // Norms of DoRA's rows are computed from whole factors.
  const scaled = new Set(
    parts.flatMap(({ blob }) => blob.terms.filter((term) => term.magnitude).map(({ module }) => module)),
  );
  for (const { blob, strength } of parts) {
    for (const term of blob.terms) {
      const module = modules[term.module]!;
      let plan = plans.get(term.module);
      if (!plan) {
        plan = { module: term.module, rank: 0, A: none(), Bt: none(), core: true, magnitude: undefined };
        plans.set(term.module, plan);
      }
      const own = (tensor: TensorRef, strength: number, { length }: readonly Side[]): Private => {
        const place = { row: plan.rank, rank: tensor.rows };
        if (leave && length === 0 && !scaled.has(term.module))
          return { at: -1, ...place, stored: { blob, tensor, strength } };
        return { at: values(blob, tensor, strength, staging), ...place };
      };
      if (term.rank > 0) {
        const { rank, A, B, ownA, ownBt } = term;
        if (A) plan.A.shared.push(expansion(blob, A, module.A[A.basis]!, 1, plan.rank, !!ownA, staging));
        if (B) plan.Bt.shared.push(expansion(blob, B, module.B[B.basis]!, strength, plan.rank, !!ownBt, staging));
        if (ownA) plan.A.own.push(own(ownA, 1, module.A));
        if (ownBt) plan.Bt.own.push(own(ownBt, strength, module.B));
        plan.core &&= coreBases(term, module) !== undefined;
        plan.rank += rank;
      }
      if (term.privateA && term.privateBt) {
        plan.A.private.push(own(term.privateA, 1, module.A));
        plan.Bt.private.push(own(term.privateBt, strength, module.B));
        plan.rank += term.privateRank;
      }
      if (term.magnitude) plan.magnitude = values(blob, term.magnitude, 1, staging);
    }
  }
  return [...plans.values()];
}

/** The column bases between which a term has a core; undefined where it has none. */
export function coreBases({ rank, ownA, ownBt }: TaskTerm, module: PackModule): SharedBases | undefined {
  const bases = rank > 0 && !ownA && !ownBt ? sharedBases(module) : undefined;
  return bases?.A.kind === "column" && bases.B.kind === "column" ? bases : undefined;
}

function none(): Draft["A"] {
  return { shared: [], own: [], private: [] };
}

function expansion(
  blob: TaskBlob,
  coefficients: Coefficients,
  basis: Side,
  strength: number,
  row: number,
  add: boolean,
  staging: Staging,
): Expansion {
  const { rows, width: K } = coefficients.tensor;
  if (!basis.mean) return { at: values(blob, coefficients.tensor, strength, staging), rows, basis, row, add };
  // The mean is the basis' last row: one more coefficient per row, 1 (times the strength) where the task uses it.
  const at = staging.reserve(rows * (K + 1));
  const out = staging.values;
  readTensor(blob.bytes, coefficients.tensor, out.subarray(at, at + rows * K));
  for (let i = rows - 1; i >= 0; i--) {
    for (let k = K - 1; k >= 0; k--) out[at + i * (K + 1) + k] = out[at + i * K + k]! * strength;
    out[at + i * (K + 1) + K] = coefficients.mean ? strength : 0;
  }
  return { at, rows, basis, row, add };
}

/** Writes rows [rows, width] into [rank, width] from `row` on; or, turned, into [width, rank]. */
export function put(
  values: Float32Array,
  out: Float32Array,
  row: number,
  rank: number,
  width: number,
  turned: boolean,
): void {
  if (!turned) return out.set(values, row * width);
  for (let at = 0, to = row; at < values.length; at += width, to++)
    for (let i = 0; i < width; i++) out[i * rank + to] = values[at + i]!;
}

function values(blob: TaskBlob, tensor: TensorRef, strength: number, staging: Staging): number {
  const count = tensor.rows * tensor.width;
  const at = staging.reserve(count);
  const out = staging.values.subarray(at, at + count);
  readTensor(blob.bytes, tensor, out);
  if (strength !== 1) for (let i = 0; i < count; i++) out[i]! *= strength;
  return at;
}

/** Whether a module's term is handed out as a core. */
export function hasCore({ A, core }: ModulePlan, mode: "core" | "factors"): boolean {
  return mode === "core" && core && A.shared.length > 0;
}

/**
 * An array of this length: `old`, or in its memory where that is large enough, and at most twice as large. Switches between tasks of like
 * ranks allocate nothing once they are warm.
 */
export function reuse(old: Float32Array | undefined, length: number): Float32Array {
  if (old?.length === length) return old;
  const room = old?.byteOffset === 0 ? old.buffer.byteLength / 4 : 0;
  return old && room >= length && room <= 2 * length
    ? new Float32Array(old.buffer, 0, length)
    : new Float32Array(length);
}

/**
 * Writes the core of a plan that has one: core[a, b] = Σ_r α_A[r, a] · α_B[r, b] over all its tasks. Yields between pieces of work.
 * @param staged coefficients, as `stage` has left them
 * @param at where in `out` the core begins, its rows `stride` apart
 */
export function* writeCore(
  plan: ModulePlan,
  staged: Float32Array,
  out: Float32Array,
  at: number,
  stride: number,
): Generator<void> {
  for (const [i, { at: a0, rows, basis }] of plan.A.shared.entries()) {
    const B = plan.Bt.shared[i]!;
    const [KA, KB] = [basis.tensor.rows, B.basis.tensor.rows];
    const high = 2 * Math.ceil(PIECE / Math.max(1, rows) / KB / 2);
    for (let a = 0; a < KA; a += high) {
      addProduct(staged, [a0, KA, B.at, KB, rows], [a, Math.min(a + high, KA)], out, at, stride, i === 0);
      yield;
    }
  }
}

/** Products of a piece of work: a millisecond. */
const PIECE = 2 ** 20;

/** First coefficient of A and how many a row has, the same for B, and the number of rows. */
type Sizes = readonly [a0: number, rowsA: number, b0: number, rowsB: number, rows: number];

/**
 * Adds the product of a task's coefficients to rows of a core, in tiles of 2 × 4 whose sums stay in registers. Rows and columns at an edge stand in for
 * those beyond it. @param first whether `out` is overwritten
 */
function addProduct(
  staged: Float32Array,
  [a0, rowsA, b0, rowsB, rows]: Sizes,
  [from, to]: readonly [from: number, to: number],
  out: Float32Array,
  at: number,
  stride: number,
  first: boolean,
): void {
  for (let a = from; a < to; a += 2) {
    const below = Math.min(1, rowsA - 1 - a);
    for (let b = 0; b < rowsB; b += 4) {
      const left = rowsB - 1 - b;
      const c1 = Math.min(1, left);
      const c2 = Math.min(2, left);
      const c3 = Math.min(3, left);
      const o = at + a * stride + b;
      const p = o + below * stride;
      let s0 = first ? 0 : out[o]!;
      let s1 = first ? 0 : out[o + c1]!;
      let s2 = first ? 0 : out[o + c2]!;
      let s3 = first ? 0 : out[o + c3]!;
      let t0 = first ? 0 : out[p]!;
      let t1 = first ? 0 : out[p + c1]!;
      let t2 = first ? 0 : out[p + c2]!;
      let t3 = first ? 0 : out[p + c3]!;
      for (let r = 0, i = a0 + a, j = b0 + b; r < rows; r++, i += rowsA, j += rowsB) {
        const x = staged[i]!;
        const y = staged[i + below]!;
        const z0 = staged[j]!;
        const z1 = staged[j + c1]!;
        const z2 = staged[j + c2]!;
        const z3 = staged[j + c3]!;
        s0 += x * z0;
        s1 += x * z1;
        s2 += x * z2;
        s3 += x * z3;
        t0 += y * z0;
        t1 += y * z1;
        t2 += y * z2;
        t3 += y * z3;
      }
      out[p + c3] = t3;
      out[p + c2] = t2;
      out[p + c1] = t1;
      out[p] = t0;
      out[o + c3] = s3;
      out[o + c2] = s2;
      out[o + c1] = s1;
      out[o] = s0;
    }
  }
}
