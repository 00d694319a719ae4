/**
 * The meaning of the trained numbers: coefficients over a pack's components, rows of the task's own added to these or
 * in their place, private terms. They become the terms that a model is fed with, and gradients of terms become
 * gradients of the numbers. One side of a module, whose rows are d wide (A: d = in; B: d = out, its rows are those of
 * Bt):
 *
 *     column    row_i = mean + Σ_k alpha[i, k] · E[k]                      alpha [rank, K], E [K, d]
 *     own       row_i + own[i], or own[i] where there are no components    [rank, d]
 *     private   row_i is trained itself                                    [q, d], below the others
 *
 * Arithmetic only, in f32 with sums in f64: no graph, no runtime, no file.
 */

import type { Pack } from "../core/pack.ts";
import {
  type PackModule,
  readTensor,
  type Side,
  sharedBases,
  type TaskBlob,
  type TaskTerm,
  type TensorRef,
} from "../format/format.ts";
import { type Dtype, decodeTensor } from "../tensor/dtypes.ts";
import { encodeTensor, storing } from "../tensor/encode.ts";
import { FACTORS, type Term } from "../tensor/term.ts";

/** Components of one side, as stored. */
export interface SharedBasis {
  /** Which of the side's bases it is. */
  readonly index: number;
  readonly K: number;
  /** Components E [K, width], then the mean as one more row where there is one. */
  readonly values: Float32Array;
  readonly mean: boolean;
  readonly width: number;
}

/** Rows that take each side of a module by itself: over components, of the task's own, or the sum of both. */
interface SharedRows {
  readonly rank: number;
  readonly A: SharedBasis | undefined;
  readonly B: SharedBasis | undefined;
  readonly own: Readonly<Record<SideName, boolean>>;
}

export interface TrainedModule {
  readonly name: string;
  readonly in: number;
  readonly out: number;
  readonly shared?: SharedRows | undefined;
  /** Rows of private terms; a LoRA has no others. */
  readonly privateRank: number;
}

type SideName = "A" | "B";
const SIDES: readonly SideName[] = ["A", "B"];

/** One matrix among the trained numbers. */
export interface TrainedParameter {
  readonly module: string;
  readonly kind: `${"alpha" | "own" | "private"}${SideName}`;
  readonly dims: readonly [rows: number, columns: number];
  readonly offset: number;
}

/** One number for each trained parameter: its value, or its gradient. */
type Values = Float32Array<ArrayBuffer>;

/** Layout and arithmetic of the trained numbers of some modules. */
export class TrainedTerms {
  readonly modules: readonly TrainedModule[];
  readonly parameters: readonly TrainedParameter[];
  readonly size: number;
  readonly #at = new Map<string, TrainedParameter>();

  constructor(modules: readonly TrainedModule[]) {
    this.modules = modules;
    let offset = 0;
    const add = (module: string, kind: TrainedParameter["kind"], rows: number, columns: number): void => {
      this.#at.set(`${kind} ${module}`, { module, kind, dims: [rows, columns], offset });
      offset += rows * columns;
    };
    for (const { name, in: inputs, out, shared, privateRank } of modules) {
      const widths = { A: inputs, B: out };
      for (const side of SIDES) {
        const basis = shared?.[side];
        if (basis) add(name, `alpha${side}`, shared.rank, basis.K);
      }
      for (const side of SIDES) if (shared?.own[side]) add(name, `own${side}`, shared.rank, widths[side]);
      for (const side of privateRank > 0 ? SIDES : []) add(name, `private${side}`, privateRank, widths[side]);
    }
    this.parameters = [...this.#at.values()];
    this.size = offset;
  }

  parameter(module: string, kind: TrainedParameter["kind"]): TrainedParameter | undefined {
    return this.#at.get(`${kind} ${module}`);
  }

  /** A view of one parameter in `values`; undefined where it is not trained. */
  part(values: Values, module: string, kind: TrainedParameter["kind"]): Values | undefined {
    const found = this.parameter(module, kind);
    return found && values.subarray(found.offset, found.offset + found.dims[0] * found.dims[1]);
  }

  rounded(values: Values, dtype: Dtype): Values {
    const stored = values.slice();
    for (const { module, kind, dims } of this.parameters) {
      const part = this.part(stored, module, kind)!;
      part.set(storingTrained(`${kind} of "${module}"`, () => asStored(part, dtype, ...dims)));
    }
    return stored;
  }

  /** Makes the terms of every module, in new memory. */
  expand(values: Values): Map<string, Term> {
    const terms = this.modules.map((module): [string, Term] => {
      const { name, shared, privateRank } = module;
      const rank = (shared?.rank ?? 0) + privateRank;
      const side = (which: SideName, d: number): Float32Array => {
        const rows = new Float32Array(rank * d);
        const basis = shared?.[which];
        // Even without components there are rows, made of the mean alone.
        if (basis) expandRows(basis, shared.rank, this.part(values, name, `alpha${which}`)!, rows);
        const own = this.part(values, name, `own${which}`) ?? [];
        for (let i = 0; i < own.length; i++) rows[i]! += own[i]!;
        const residual = this.part(values, name, `private${which}`);
        if (residual) rows.set(residual, rows.length - residual.length);
        return rows;
      };
      return [name, { rank, A: side("A", module.in), Bt: side("B", module.out) }];
    });
    return new Map(terms);
  }

  pullBack(terms: ReadonlyMap<string, Term>): Values {
    const gradients = new Float32Array(this.size);
    for (const { name, shared } of this.modules) {
      for (const which of SIDES) {
        const rows = terms.get(name)![FACTORS[which]];
        const own = this.part(gradients, name, `own${which}`);
        own?.set(rows.subarray(0, own.length));
        const residual = this.part(gradients, name, `private${which}`);
        residual?.set(rows.subarray(rows.length - residual.length));
        const basis = shared?.[which];
        if (basis) multiplyRows(basis, rows, this.part(gradients, name, `alpha${which}`)!);
      }
    }
    return gradients;
  }
}

// A step waits for both products. Loads and stores take most of their time, so rows go by twos and components by fours.
// An odd last row is computed twice; for components beyond the last one stands the last, times 0.

const FOUR = [0, 1, 2, 3] as const;
type Four = [number, number, number, number];

/** rows_i = mean + Σ_k alpha[i, k] · E[k]. */
function expandRows(
  { K, mean, width, values: E }: SharedBasis,
  count: number,
  alpha: Values,
  rows: Float32Array,
): void {
  const [one, other] = [new Float64Array(width), new Float64Array(width)];
  for (let row = 0; row < count; row += 2) {
    const next = Math.min(row + 1, count - 1);
    for (const sums of [one, other]) {
      if (mean) sums.set(E.subarray(K * width, (K + 1) * width));
      else sums.fill(0);
    }
    for (let k = 0; k < K; k += 4) {
      const [p, q, r, s] = FOUR.map((i) => Math.min(k + i, K - 1) * width) as Four;
      const by = (row: number): Four => FOUR.map((i) => (k + i < K ? alpha[row * K + k + i]! : 0)) as Four;
      const [a, b, c, d] = by(row);
      const [e, f, g, h] = by(next);
      for (let i = 0; i < width; i++) {
        // Arrays here would double the time.
        const w = E[p + i]!;
        const x = E[q + i]!;
        const y = E[r + i]!;
        const z = E[s + i]!;
        one[i]! += a * w + b * x + c * y + d * z;
        other[i]! += e * w + f * x + g * y + h * z;
      }
    }
    rows.set(one, row * width);
    rows.set(other, next * width);
  }
}

/** alpha[i, k] = rows_i · E[k]. */
function multiplyRows({ K, width, values: E }: SharedBasis, rows: Float32Array, alpha: Values): void {
  const count = alpha.length / K;
  for (let row = 0; row < count; row += 2) {
    const next = Math.min(row + 1, count - 1);
    const [m, n] = [row * width, next * width];
    for (let k = 0; k < K; k += 4) {
      const [p, q, r, s] = FOUR.map((i) => Math.min(k + i, K - 1) * width) as Four;
      let [a, b, c, d, e, f, g, h] = [0, 0, 0, 0, 0, 0, 0, 0];
      for (let i = 0; i < width; i++) {
        const u = rows[m + i]!;
        const v = rows[n + i]!;
        const w = E[p + i]!;
        const x = E[q + i]!;
        const y = E[r + i]!;
        const z = E[s + i]!;
        a += u * w;
        b += u * x;
        c += u * y;
        d += u * z;
        e += v * w;
        f += v * x;
        g += v * y;
        h += v * z;
      }
      alpha.set([a, b, c, d].slice(0, K - k), row * K + k);
      alpha.set([e, f, g, h].slice(0, K - k), next * K + k);
    }
  }
}

/** Rounds values [rows, width] to what a file would hold. */
export function asStored(values: Float32Array, dtype: Dtype, rows: number, width: number): Float32Array {
  return decodeTensor(dtype, encodeTensor(dtype, values, rows, width), rows, width);
}

/** Names what was to be stored in the errors of `encode`. @throws UnstorableError */
export function storingTrained<T>(what: string, encode: () => T): T {
  return storing(what, undefined, encode, "take a smaller learning rate");
}

/**
 * Reads what the rows of a module are made of; undefined where there are no components to take coefficients of.
 * @param bases of the pack, as `pack.bases()` gives them
 * @param rank of the rows
 * @param own the term of the task that is followed, which says how it takes each side. Default: components of both
 *   sides
 * @throws RangeError for components of whole factors
 */
export function sharedRows(
  module: PackModule,
  bases: Uint8Array,
  rank: number,
  own?: TaskTerm,
): SharedRows | undefined {
  const read = (sides: readonly Side[], index: number | undefined): SharedBasis | undefined => {
    if (index === undefined) return undefined;
    const { kind, K, mean, tensor } = sides[index]!;
    if (kind === "flat")
      throw new RangeError(`"${module.name}" has components of whole factors (flat), which cannot be trained`);
    return { index, K, mean, width: tensor.width, values: readTensor(bases, tensor) };
  };
  if (own) {
    if (own.rank === 0) return undefined;
    const rows = { A: own.ownA !== undefined, B: own.ownBt !== undefined };
    return { rank: own.rank, A: read(module.A, own.A?.basis), B: read(module.B, own.B?.basis), own: rows };
  }
  const { A, B } = sharedBases(module) ?? {};
  if (!A || !B || A.K === 0 || B.K === 0) return undefined;
  const none = { A: false, B: false };
  return { rank, A: read(module.A, 0), B: read(module.B, 0), own: none };
}

export function tensorOf(
  pack: Pack,
  { terms }: TaskBlob,
  { module, kind, dims }: TrainedParameter,
): TensorRef | undefined {
  const term = terms.find((term) => pack.modules[term.module]!.name === module);
  const tensors: Partial<Record<TrainedParameter["kind"], TensorRef | undefined>> = {
    alphaA: term?.A?.tensor,
    alphaB: term?.B?.tensor,
    ownA: term?.ownA,
    ownB: term?.ownBt,
    privateA: term?.privateA,
    privateB: term?.privateBt,
  };
  const tensor = tensors[kind];
  return tensor?.width === dims[1] ? tensor : undefined;
}
