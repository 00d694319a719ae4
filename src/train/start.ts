/**
 * Where training begins: coefficients of the tasks that a pack has say where useful ones lie. Their mean is a start for tasks
 * trained from one seed, whose rows correspond; random ones of their spread are for tasks of their own seeds (the paper's
 * zero-shot). All rows equal are no start: they would receive the same gradient for ever.
 */

import { TaskError } from "../errors.ts";
import type { TaskBlob, TensorRef } from "../format/format.ts";
import { readTensor } from "../format/tensors.ts";
import type { Pack } from "../pack/pack.ts";
import { normal } from "../tensor/random.ts";
import type { Terms, TrainedParameter } from "./terms.ts";

/**
 * Kinds of starts; "auto" tries mean and random for a few steps and takes the better. "fresh" is for factors that are trained
 * themselves: as PEFT begins, without the pack.
 */
export type Start = "auto" | "mean" | "random" | "fresh" | { readonly task: string };

/** Most tasks that the spread is taken of. */
const MOST_DONORS = 64;

/** Deviation of factors that begin free, and of heads: as PyTorch's. */
const SMALL = 0.02;

/** Weight [labels, in] and bias [labels]. */
export interface HeadValues {
  readonly weight: Float32Array<ArrayBuffer>;
  readonly bias: Float32Array<ArrayBuffer>;
}

interface Moments {
  /** By row and column: sums of the tasks' coefficients. */
  readonly sums: Float64Array;
  /** By column: sums and sums of squares over rows and tasks. */
  readonly columns: Float64Array;
  readonly squares: Float64Array;
  count: number;
  /** By row: how many tasks have it. */
  readonly tasks: Float64Array;
}

/** A task to start from. */
export interface Donor {
  readonly id: string;
  readonly blob: TaskBlob;
}

/** Coefficients of the pack's tasks, for the parameters of a training graph. */
export class Donors {
  readonly #moments = new Map<TrainedParameter, Moments>();
  readonly #pack: Pack;
  readonly #terms: Terms;

  private constructor(pack: Pack, terms: Terms) {
    this.#pack = pack;
    this.#terms = terms;
  }

  /** Reads the pack's first tasks. */
  static async of(pack: Pack, terms: Terms, signal?: AbortSignal): Promise<Donors> {
    const donors = new Donors(pack, terms);
    for (const id of [...pack.tasks.keys()].slice(0, MOST_DONORS)) donors.#add(await pack.load(id, { signal }));
    return donors;
  }

  #add(blob: TaskBlob): void {
    for (const parameter of this.#terms.parameters) {
      const found = parameter.kind.startsWith("alpha") ? this.#values(blob, parameter) : undefined;
      if (!found) continue;
      const { values, rows } = found;
      const [rank, K] = parameter.dims;
      let moments = this.#moments.get(parameter);
      if (!moments) {
        moments = {
          sums: new Float64Array(rank * K),
          columns: new Float64Array(K),
          squares: new Float64Array(K),
          count: 0,
          tasks: new Float64Array(rank),
        };
        this.#moments.set(parameter, moments);
      }
      for (let row = 0; row < Math.min(rows, rank); row++) moments.tasks[row]!++;
      moments.count += rows;
      for (let i = 0; i < rows * K; i++) {
        const value = values[i]!;
        if (i < rank * K) moments.sums[i]! += value;
        moments.columns[i % K]! += value;
        moments.squares[i % K]! += value * value;
      }
    }
  }

  /** What a task has of a parameter. */
  #values(
    blob: TaskBlob,
    { module, kind, dims }: TrainedParameter,
  ): { values: Float32Array; rows: number } | undefined {
    const index = this.#pack.modules.findIndex(({ name }) => name === module);
    const term = blob.terms.find((one) => one.module === index);
    const tensors = { alphaA: term?.A?.tensor, alphaB: term?.B?.tensor, A: term?.privateA, B: term?.privateBt };
    const tensor = tensors[kind as keyof typeof tensors];
    return tensor?.width === dims[1] ? { values: valuesOf(blob, tensor), rows: tensor.rows } : undefined;
  }

  /**
   * Writes the start of all parameters.
   * @throws TaskError when the task to start from is of another rank
   */
  fill(start: "mean" | "random" | "fresh" | Donor, out: Float32Array<ArrayBuffer>, random: () => number): void {
    const donor = typeof start === "object" ? start : undefined;
    this.#terms.fillComponents(out);
    for (const parameter of this.#terms.parameters) {
      const { module, kind, dims } = parameter;
      if (kind === "componentsA" || kind === "componentsB") continue;
      const values = this.#terms.part(out, module, kind)!;
      const own = donor && this.#values(donor.blob, parameter);
      if (own && own.rows !== dims[0]) {
        const [{ id }, which] = [donor, kind === "A" || kind === "B" ? "terms of its own" : "rank"];
        throw new TaskError(
          `task "${id}" has ${which} ${own.rows} on "${module}", the trainer ${dims[0]}: leave \`rank\` and \`terms\` out`,
          { task: id },
        );
      }
      if (own) values.set(own.values);
      else if (kind === "A") for (let i = 0; i < values.length; i++) values[i] = SMALL * normal(random);
      else if (kind === "B") values.fill(0);
      else this.#begin(parameter, start === "mean" ? "mean" : "random", values, random);
    }
  }

  #begin(parameter: TrainedParameter, start: "mean" | "random", values: Float32Array, random: () => number): void {
    const moments = this.#moments.get(parameter);
    const K = parameter.dims[1];
    for (let i = 0; i < values.length; i++) {
      const tasks = moments?.tasks[Math.floor(i / K)] ?? 0;
      if (!moments) values[i] = SMALL * normal(random);
      else if (start === "mean" && tasks > 0) values[i] = moments.sums[i]! / tasks;
      else {
        const mean = moments.columns[i % K]! / moments.count;
        const variance = Math.max(0, moments.squares[i % K]! / moments.count - mean * mean);
        values[i] = mean + Math.sqrt(variance) * normal(random);
      }
    }
  }
}

/** The rank that most of a pack's first tasks have; 8 where there are none. */
export async function usualRank(pack: Pack): Promise<number> {
  const counts = new Map<number, number>();
  for (const id of [...pack.tasks.keys()].slice(0, 8)) {
    for (const { A, rank } of (await pack.load(id)).terms) if (A) counts.set(rank, (counts.get(rank) ?? 0) + 1);
  }
  return [...counts].sort((a, b) => b[1] - a[1])[0]?.[0] ?? 8;
}

/** A tensor of a task as numbers. */
function valuesOf({ bytes }: TaskBlob, tensor: TensorRef): Float32Array<ArrayBuffer> {
  return new Float32Array(readTensor(bytes, tensor));
}

/** The head that a task brings, where it has the shape asked for. */
export function headOf(blob: TaskBlob, module: string, labels: number, inputs: number): HeadValues | undefined {
  const of = (name: string, shape: readonly number[]): Float32Array<ArrayBuffer> | undefined => {
    const found = blob.parameters.find(
      (one) => one.role === "saved" && one.name === `${module}.${name}` && one.shape.join() === shape.join(),
    );
    return found && valuesOf(blob, found.tensor);
  };
  const weight = of("weight", [labels, inputs]);
  return weight && { weight, bias: of("bias", [labels]) ?? new Float32Array(labels) };
}

/** A new head. */
export function newHead(labels: number, inputs: number, random: () => number): HeadValues {
  return {
    weight: Float32Array.from({ length: labels * inputs }, () => SMALL * normal(random)),
    bias: new Float32Array(labels),
  };
}
