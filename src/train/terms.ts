/**
 * What the numbers that are trained mean: coefficients over a pack's components, the components themselves, factors of a task's
 * own. Here they become the factors that a model is fed with, and gradients of factors become theirs. For one side of a module,
 * with its rows d wide (d = in for A, out for B; rows of B are columns of the adapter's B, with the scale inside):
 *
 *     column   row_i = mean + Σ_k alpha[i, k] · E[k]                      alpha [rank, K], E [K, d]
 *     flat     all rows in one = mean + Σ_k alpha[k] · E[k]               alpha [1, K], E [K, rank·d]
 *     own      row_i is trained itself                                    [q, d], below the shared rows
 *
 * Arithmetic only, in f32 with sums in f64: no graph, no runtime, no file.
 */

import type { PackModule, Side } from "../format/format.ts";
import { readTensor } from "../format/tensors.ts";
import { type Dtype, decodeTensor } from "../tensor/dtypes.ts";
import { encodeTensor } from "../tensor/encode.ts";

/** Components of one side, as stored. */
export interface Basis {
  readonly kind: Side["kind"];
  readonly K: number;
  /** E [K, width], and the mean as one row more where there is one. */
  readonly values: Float32Array;
  readonly mean: boolean;
  /** d, or rank·d where it is flat. */
  readonly width: number;
}

/** What is trained of one module. */
export interface TrainedModule {
  readonly name: string;
  readonly in: number;
  readonly out: number;
  /** Components of both sides, and rows that are made of them. */
  readonly shared?:
    | { readonly rank: number; readonly A: Basis; readonly B: Basis; readonly trained: boolean }
    | undefined;
  /** Rows of the task's own: a LoRA, or free rank-1 terms. */
  readonly privateRank: number;
}

/** One matrix among the numbers that are trained. */
export interface TrainedParameter {
  readonly module: string;
  readonly kind: "alphaA" | "alphaB" | "componentsA" | "componentsB" | "A" | "B";
  readonly dims: readonly [rows: number, columns: number];
  /** Of its first element. */
  readonly offset: number;
}

/** Rows of both sides of one module: A [q, in], B [q, out]. */
export interface Factors {
  readonly A: Float32Array<ArrayBuffer>;
  readonly B: Float32Array<ArrayBuffer>;
}

type Letter = "A" | "B";

export class Terms {
  readonly modules: readonly TrainedModule[];
  /** Coefficients and own rows first, then components. */
  readonly parameters: readonly TrainedParameter[];
  /** Numbers of all parameters. */
  readonly size: number;
  /** Of them, those in front that are no components. */
  readonly ofTasks: number;
  readonly #at = new Map<string, TrainedParameter>();

  constructor(modules: readonly TrainedModule[]) {
    this.modules = modules;
    const all: { module: string; kind: TrainedParameter["kind"]; dims: readonly [number, number] }[] = [];
    const sides = ["A", "B"] as const;
    for (const { name, in: inputs, out, shared, privateRank } of modules) {
      for (const side of shared ? sides : [])
        all.push({ module: name, kind: `alpha${side}`, dims: [rowsOf(shared!, side), shared![side].K] });
      for (const side of privateRank > 0 ? sides : [])
        all.push({ module: name, kind: side, dims: [privateRank, side === "A" ? inputs : out] });
    }
    this.ofTasks = all.reduce((sum, { dims }) => sum + dims[0] * dims[1], 0);
    for (const { name, shared } of modules) {
      for (const side of shared?.trained ? sides : []) {
        const { K, mean, width } = shared![side];
        all.push({ module: name, kind: `components${side}`, dims: [K + Number(mean), width] });
      }
    }
    let offset = 0;
    this.parameters = all.map((one) => {
      const parameter = { ...one, offset };
      offset += one.dims[0] * one.dims[1];
      this.#at.set(`${one.kind} ${one.module}`, parameter);
      return parameter;
    });
    this.size = offset;
  }

  /** The part of `values` that is one parameter, undefined where there is none. */
  part(
    values: Float32Array<ArrayBuffer>,
    module: string,
    kind: TrainedParameter["kind"],
  ): Float32Array<ArrayBuffer> | undefined {
    const found = this.#at.get(`${kind} ${module}`);
    return found && values.subarray(found.offset, found.offset + found.dims[0] * found.dims[1]);
  }

  /** The components as they are stored, into those that are trained. */
  fillComponents(values: Float32Array<ArrayBuffer>): void {
    for (const { name, shared } of this.modules) {
      for (const side of ["A", "B"] as const) this.part(values, name, `components${side}`)?.set(shared![side].values);
    }
  }

  /** The same numbers as they would be read from a file of this type; components, which are no task's, stay. */
  rounded(values: Float32Array<ArrayBuffer>, type: Dtype): Float32Array<ArrayBuffer> {
    const stored = values.slice();
    for (const {
      kind,
      dims: [rows, columns],
      offset,
    } of this.parameters) {
      if (kind === "componentsA" || kind === "componentsB") continue;
      const part = stored.subarray(offset, offset + rows * columns);
      part.set(decodeTensor(type, encodeTensor(type, part, rows, columns), rows, columns));
    }
    return stored;
  }

  /** Factors of every module, in memory of their own. */
  expand(values: Float32Array<ArrayBuffer>): Map<string, Factors> {
    return new Map(
      this.modules.map((module) => [
        module.name,
        { A: this.#expand(values, module, "A"), B: this.#expand(values, module, "B") },
      ]),
    );
  }

  #expand(
    values: Float32Array<ArrayBuffer>,
    { name, in: inputs, out, shared, privateRank }: TrainedModule,
    side: Letter,
  ): Float32Array<ArrayBuffer> {
    const d = side === "A" ? inputs : out;
    const rows = new Float32Array(((shared?.rank ?? 0) + privateRank) * d);
    if (shared) {
      const { K, mean, width, values: stored } = shared[side];
      const E = this.part(values, name, `components${side}`) ?? stored;
      const alpha = this.part(values, name, `alpha${side}`)!;
      const sums = new Float64Array(width);
      for (let row = 0; row < alpha.length / K; row++) {
        if (mean) sums.set(E.subarray(K * width, (K + 1) * width));
        else sums.fill(0);
        accumulate(sums, alpha.subarray(row * K, (row + 1) * K), E);
        rows.set(sums, row * width);
      }
    }
    const free = this.part(values, name, side);
    if (free) rows.set(free, rows.length - free.length);
    return rows;
  }

  /** Gradients of all parameters, from those of the factors. */
  pullBack(values: Float32Array<ArrayBuffer>, factors: ReadonlyMap<string, Factors>): Float32Array<ArrayBuffer> {
    const gradients = new Float32Array(this.size);
    for (const module of this.modules) {
      for (const side of ["A", "B"] as const)
        this.#pullBack(values, gradients, module, side, factors.get(module.name)![side]);
    }
    return gradients;
  }

  #pullBack(
    values: Float32Array<ArrayBuffer>,
    gradients: Float32Array<ArrayBuffer>,
    { name, shared }: TrainedModule,
    side: Letter,
    rows: Float32Array,
  ): void {
    const free = this.part(gradients, name, side);
    free?.set(rows.subarray(rows.length - free.length));
    if (!shared) return;
    const { K, mean, width, values: stored } = shared[side];
    const E = this.part(values, name, `components${side}`) ?? stored;
    const alpha = this.part(values, name, `alpha${side}`)!;
    const ofAlpha = this.part(gradients, name, `alpha${side}`)!;
    const ofE = this.part(gradients, name, `components${side}`);
    for (let row = 0; row < alpha.length / K; row++) {
      const g = rows.subarray(row * width, (row + 1) * width);
      products(ofAlpha.subarray(row * K, (row + 1) * K), g, E);
      for (let k = 0; k < (ofE ? K : 0); k++) {
        const [from, a] = [k * width, alpha[row * K + k]!];
        for (let i = 0; i < width; i++) ofE![from + i]! += a * g[i]!;
      }
      if (ofE && mean) for (let i = 0; i < width; i++) ofE[K * width + i]! += g[i]!;
    }
  }
}

/** sums [width] += a [K] · E [K, width], four rows at a time: a step of training waits for this. */
function accumulate(sums: Float64Array, a: Float32Array, E: Float32Array): void {
  const width = sums.length;
  let k = 0;
  for (; k + 4 <= a.length; k += 4) {
    const [a0, a1, a2, a3] = [a[k]!, a[k + 1]!, a[k + 2]!, a[k + 3]!];
    const [at0, at1, at2, at3] = [k * width, (k + 1) * width, (k + 2) * width, (k + 3) * width];
    for (let i = 0; i < width; i++)
      sums[i]! += a0 * E[at0 + i]! + a1 * E[at1 + i]! + (a2 * E[at2 + i]! + a3 * E[at3 + i]!);
  }
  for (; k < a.length; k++) for (let i = 0, at = k * width; i < width; i++) sums[i]! += a[k]! * E[at + i]!;
}

/** out [K] = E [K, width] · g [width]. */
function products(out: Float32Array, g: Float32Array, E: Float32Array): void {
  const width = g.length;
  let k = 0;
  for (; k + 4 <= out.length; k += 4) {
    const [at0, at1, at2, at3] = [k * width, (k + 1) * width, (k + 2) * width, (k + 3) * width];
    let [s0, s1, s2, s3] = [0, 0, 0, 0];
    for (let i = 0; i < width; i++) {
      const one = g[i]!;
      s0 += one * E[at0 + i]!;
      s1 += one * E[at1 + i]!;
      s2 += one * E[at2 + i]!;
      s3 += one * E[at3 + i]!;
    }
    out.set([s0, s1, s2, s3], k);
  }
  for (; k < out.length; k++) {
    let sum = 0;
    for (let i = 0, at = k * width; i < width; i++) sum += g[i]! * E[at + i]!;
    out[k] = sum;
  }
}

/** Rows of coefficients: one for each row that is made, or one for all. */
function rowsOf({ rank, ...sides }: NonNullable<TrainedModule["shared"]>, side: Letter): number {
  return sides[side].kind === "flat" ? 1 : rank;
}

/**
 * The components of a module; undefined where it has none on a side, for there is nothing to take coefficients of.
 * @param bases of the pack, as `pack.bases()` gives them
 */
export function basesOf({ A, B }: PackModule, bases: Uint8Array): { A: Basis; B: Basis } | undefined {
  if (!A || !B || A.K === 0 || B.K === 0) return undefined;
  const read = ({ kind, K, mean, tensor }: Side): Basis => {
    return { kind, K, mean, width: tensor.width, values: readTensor(bases, tensor) };
  };
  return { A: read(A), B: read(B) };
}
