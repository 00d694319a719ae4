/** A pack's components as a graph takes them. */

import type { CoreTarget } from "../core/session-runtime.ts";
import {
  type Brought,
  encodedTensor,
  type PackModule,
  readTensor,
  sharedBases,
  type TensorRef,
} from "../format/format.ts";
import type { AdaptedLayer, CoreBlock, TaskInput } from "../onnx/adapted.ts";
import type { ComponentRows, Components, StoredIntegers } from "../onnx/components.ts";
import { BITS, isQuantized } from "../tensor/dtypes.ts";
import { decodeIntegers, decodeScales } from "../tensor/encode.ts";
import type { SessionOptions } from "./options.ts";

/** Most components for which mode "core" costs a run at most 5 %; with more, factors are faster (`bench switch --live`). */
export const MOST_COMPONENTS = 48;

/**
 * Components of each side that the factors of all tasks of a module can lie over: none brings whole rows of it, and none may later.
 * @param brought by the tasks
 */
export function componentsUnder(
  module: PackModule,
  brought: readonly Brought[],
  bases: Uint8Array,
  { trainable, reserve, mode }: SessionOptions,
): AdaptedLayer["over"] {
  // Factors that are asked for where a core would do are whole ones.
  if (trainable || reserve?.privateTerms || (mode === "factors" && sharedBases(module))) return undefined;
  const brings = new Set(brought.flatMap(({ role, name }) => (name === module.name ? role : [])));
  const side = (which: "A" | "B"): ComponentRows | undefined => {
    const K = module[which].reduce((sum, { tensor }) => sum + tensor.rows, 0);
    const isWhole = brings.has("private") || brings.has(`own-${which}`);
    if (isWhole || K === 0 || K > MOST_COMPONENTS || module[which].some(({ kind }) => kind === "flat"))
      return undefined;
    return joinedRows(module[which].map(({ tensor }) => rowsOf(tensor, bases)));
  };
  const [A, B] = [side("A"), side("B")];
  return A || B ? { ...(A && { A }), ...(B && { B }) } : undefined;
}

/** What tasks share where they do not share both sides; undefined where that is nothing. */
export function sharedReason(modules: readonly PackModule[]): string | undefined {
  const count = (which: "A" | "B"): number => modules.filter((module) => module[which].length > 0).length;
  const sides = [
    ...(count("A") > 0 ? [`what layers read (A) in ${count("A")} of ${modules.length} modules`] : []),
    ...(count("B") > 0 ? [`what they write (B) in ${count("B")} of ${modules.length} modules`] : []),
  ];
  return sides.length > 0 ? `tasks share ${sides.join(", ")}: a switch hands over the rest` : undefined;
}

/**
 * The components of a module that a core lies between.
 * @param bases of the pack, which are read when the graph is made
 * @returns undefined for a module that no core can lie between
 */
export function componentsOf(module: PackModule, bases: Uint8Array): Components | undefined {
  const { A, B } = sharedBases(module) ?? {};
  if (A?.kind !== "column" || B?.kind !== "column") return undefined;
  if (A.tensor.rows === 0 || B.tensor.rows === 0) return undefined;
  return { A: rowsOf(A.tensor, bases), B: rowsOf(B.tensor, bases) };
}

/** Components one below the other: integers of the widest type among theirs, floats where some are. */
function joinedRows(all: readonly ComponentRows[]): ComponentRows {
  const [first, ...others] = all as [ComponentRows, ...ComponentRows[]];
  if (others.length === 0) return first;
  const rows = all.reduce((sum, one) => sum + one.rows, 0);
  const join = <T extends Float32Array | Int8Array>(to: T, parts: readonly T[]): T => {
    let at = 0;
    for (const part of parts) {
      to.set(part, at);
      at += part.length;
    }
    return to;
  };
  const floats = (): Float32Array =>
    join(
      new Float32Array(rows * first.width),
      all.map((one) => one.floats()),
    );
  const integers = all.flatMap((one) => one.integers ?? []);
  if (integers.length < all.length) return { rows, width: first.width, floats };
  const bits = Math.max(...integers.map((one) => one.bits)) as StoredIntegers["bits"];
  const scales = join(
    new Float32Array(rows),
    integers.map((one) => one.scales),
  );
  const values = (): Int8Array =>
    join(
      new Int8Array(rows * first.width),
      integers.map((one) => one.values()),
    );
  return { rows, width: first.width, floats, integers: { bits, scales, values } };
}

function rowsOf(tensor: TensorRef, bases: Uint8Array): ComponentRows {
  const { dtype, rows, width } = tensor;
  const floats = (): Float32Array => readTensor(bases, tensor);
  if (!isQuantized(dtype)) return { rows, width, floats };
  const bytes = encodedTensor(bases, tensor);
  const values = (): Int8Array => decodeIntegers(dtype, bytes, rows, width);
  return {
    rows,
    width,
    floats,
    integers: { bits: BITS[dtype] as 3 | 4 | 8, scales: decodeScales(bytes, rows), values },
  };
}

// Values of inputs that lie between or over components of the graph: cores, and coefficients of factors.

/** The value of one input for one task, without the leading dimension `tasks`. */
export interface InputValue {
  readonly dims: readonly number[];
  readonly data: Float32Array | BigInt64Array;
}

/** The value of an input for cores while it is filled: each core of a module has its place. */
export class CoreSpace {
  readonly name: string;
  /** Targets in the order of the blocks, with names of modules. */
  readonly targets: readonly (readonly [module: string, target: CoreTarget])[];
  readonly #dims: readonly [height: number, width: number];
  readonly #data: Float32Array;
  readonly #blocks: readonly CoreBlock[];

  /** @param old a value of the same input that may be written over: what lies beside its cores is 0 */
  constructor({ name, dims, cores = [] }: TaskInput, old?: InputValue) {
    const [, height, width] = dims as [string, number, number];
    this.name = name;
    this.#dims = [height, width];
    this.#blocks = cores;
    const data = old?.data as Float32Array | undefined;
    this.#data = data?.length === height * width ? data : new Float32Array(height * width);
    this.targets = cores.map(({ module, row, column }) => {
      return [module, { out: this.#data, at: row * width + column, stride: width }];
    });
  }

  /** The value once cores are written. @param isWritten whether a module's is: the others become zeros */
  value(isWritten: (module: string) => boolean): InputValue {
    const data = this.#data;
    for (const [i, { module, KA, KB, scalesA, scalesB }] of this.#blocks.entries()) {
      const { at, stride } = this.targets[i]![1];
      const written = isWritten(module);
      if (written && !scalesA && !scalesB) continue;
      const across = written && (scalesB ?? new Float32Array(KB).fill(1));
      for (let a = 0, from = at; a < KA; a++, from += stride) {
        const scale = scalesA?.[a] ?? 1;
        if (!across) data.fill(0, from, from + KB);
        else for (let b = 0; b < KB; b++) data[from + b]! *= scale * across[b]!;
      }
    }
    return { dims: this.#dims, data };
  }
}

/** Multiplies coefficients with the scales of their components, in place. @param every how many numbers in a row have one scale @param count of scales, which then begin again */
export function scaled(
  value: InputValue & { readonly data: Float32Array },
  scales: Float32Array | undefined,
  every: number,
  count: number,
): InputValue {
  const { data } = value;
  for (let i = 0; scales && i < data.length; i++) data[i]! *= scales[Math.floor(i / every) % count]!;
  return value;
}
