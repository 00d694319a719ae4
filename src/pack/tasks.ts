/** An adapter as a task of a pack, encoded: its terms on the pack's bases, and what it changes whole. */
import type { Adapter, SavedTensor } from "../adapters/adapter.ts";
import { AdapterError, FormatError } from "../errors.ts";
import type { Factor, TaskUpdate } from "../extract/components.ts";
import { pairNorm, pairOf } from "../extract/factors.ts";
import {
  checkEntry,
  encodeTask,
  type ParameterInput,
  type TaskToWrite,
  type TensorInput,
  type TermInput,
} from "../format/encode.ts";
import { bringsOf, misfitLabels, mostRank } from "../format/format.ts";
import { type Dtype, isQuantized, mean, type QuantizedDtype } from "../tensor/dtypes.ts";
import { advised, encodeSteps, encodeTensor, narrowed, SCALE_DOWN, UnstorableError } from "../tensor/encode.ts";
import type { HeadFormat } from "./recipe.ts";
import type { ModuleError } from "./report.ts";

/** The share of its ΔW that a task may lose by default: docs/pack.md has what that costs and saves. */
export const DEFAULT_ERROR = 0.15;

/** A search makes many packs of the same adapters, and each norm takes reading all of one. */
const norms = new WeakMap<Adapter, Promise<number>>();

/** The root of the mean of ‖ΔW‖² over the modules of an adapter; 1 where nothing changes. */
async function typicalNorm({ modules }: Adapter): Promise<number> {
  let sum = 0;
  for (const module of modules.values()) sum += pairNorm(pairOf(await module.read())) ** 2;
  return Math.sqrt(sum / modules.size) || 1;
}

/** Steps of ΔW by adapter id, for a share of its typical norm. */
export async function stepsOf(adapters: readonly Adapter[], share: number): Promise<Map<string, number>> {
  const steps = new Map<string, number>();
  for (const adapter of new Set(adapters)) {
    if (!norms.has(adapter)) norms.set(adapter, typicalNorm(adapter));
    steps.set(adapter.id, share * (await norms.get(adapter)!));
  }
  return steps;
}

interface Widths {
  readonly in: number;
  readonly out: number;
  readonly A?: readonly { readonly K: number }[] | undefined;
  readonly B?: readonly { readonly K: number }[] | undefined;
}

/** Integers of one type, in the smallest that they all fit. */
function narrow(tensors: readonly (readonly [tensor: TensorInput, rows: number, width: number])[]): TensorInput[] {
  const { dtype, encoded } = narrowed(
    tensors.map(([{ dtype, encoded }, rows, width]) => ({ dtype: dtype as QuantizedDtype, encoded, rows, width })),
  );
  return encoded.map((bytes) => ({ dtype, encoded: bytes }));
}

/** Terms of one task in the smallest integers that they fit: all coefficients, and by module the residual rows. */
export function narrowTerms(terms: readonly TermInput[], modules: readonly Widths[]): TermInput[] {
  const coefficients = narrow(
    terms.flatMap(({ module, rank, A, B }) => {
      const bases = modules[module]!;
      return [
        ...(A ? [[A, rank, bases.A![A.basis ?? 0]!.K] as const] : []),
        ...(B ? [[B, rank, bases.B![B.basis ?? 0]!.K] as const] : []),
      ];
    }),
  ).values();
  const next = (): TensorInput => coefficients.next().value!;
  return terms.map(({ A, B, ownA, ownBt, privateTerms, ...term }) => {
    const { module, rank } = term;
    const { in: inputs, out } = modules[module]!;
    const pairOfRows = ({ rank, dtype, ...rows }: NonNullable<TermInput["privateTerms"]>) => {
      const pair = [
        [{ dtype, encoded: rows.A }, rank, inputs] as const,
        [{ dtype, encoded: rows.Bt }, rank, out] as const,
      ];
      const [a, bt] = narrow(pair) as [TensorInput, TensorInput];
      return { rank, dtype: a.dtype, A: a.encoded, Bt: bt.encoded };
    };
    return {
      ...term,
      ...(A && { A: { ...A, ...next() } }),
      ...(B && { B: { ...B, ...next() } }),
      ...(ownA && { ownA: narrow([[ownA, rank, inputs]])[0] }),
      ...(ownBt && { ownBt: narrow([[ownBt, rank, out]])[0] }),
      ...(privateTerms && { privateTerms: pairOfRows(privateTerms) }),
    };
  });
}

export interface EncodedTask {
  readonly error: ModuleError;
  readonly term: Omit<TermInput, "module">;
}

/** @param module name of the module that the update is of */
export function encodedTask(
  module: string,
  { id: task, rank, dtype, A, B, error, norm }: TaskUpdate,
  magnitude: Float32Array | undefined,
  adapter: Adapter,
): EncodedTask {
  const what = `the DoRA magnitude of "${module}"`;
  const vectored = magnitude && vector(magnitude, dtype, adapter, what, SCALE_DOWN);
  const encoded = (term: EncodedTask["term"]): EncodedTask => {
    return { error: { task, module, error, norm }, term: { ...term, magnitude: vectored } };
  };
  if (rank === 0) return encoded({ rank });
  if (!A.coefficients && !B.coefficients)
    return encoded({ rank: 0, privateTerms: { rank, dtype, A: A.residual!, Bt: B.residual! } });
  const over = ({ basis, mean = false, coefficients }: Factor): TermInput["A"] =>
    coefficients && { mean, basis, dtype, encoded: coefficients };
  return encoded({
    rank,
    A: over(A),
    B: over(B),
    ownA: A.residual && { dtype, encoded: A.residual },
    ownBt: B.residual && { dtype, encoded: B.residual },
  });
}

export interface Encoded {
  readonly terms: Map<Adapter, TermInput[]>;
  readonly errors: ModuleError[];
}

/** Adds a task of a module to what was encoded. Terms that change nothing are left out. */
export function add({ terms, errors }: Encoded, module: number, owner: Adapter, { error, term }: EncodedTask): void {
  errors.push(error);
  if (term.rank === 0 && !term.privateTerms && !term.magnitude) return;
  if (!terms.has(owner)) terms.set(owner, []);
  terms.get(owner)!.push({ module, ...term });
}

/**
 * A task as it is written.
 * @param terms sorted by module
 * @param names of the pack's modules
 * @throws AdapterError for a value that its number format cannot hold, metadata that the format does not, and labels
 *   that are more or fewer than the rows of the head
 */
export async function encodeAdapter(
  adapter: Adapter,
  terms: readonly TermInput[],
  names: readonly string[],
  head: HeadFormat,
): Promise<TaskToWrite> {
  const { id, byteLength, metadata, saved } = adapter;
  const brings = bringsOf(
    { parameters: saved, terms: terms.map((term) => ({ ...term, privateA: term.privateTerms })) },
    names.map((name) => ({ name })),
  );
  const entry = { id, adapterBytes: byteLength, metadata, brings: brings.sort() };
  storable(adapter, { name: "metadata" }, () => checkEntry(entry, id));
  const misfit = misfitLabels(metadata.labels, saved);
  if (misfit !== undefined) throw new AdapterError(misfit, { file: adapter.file, field: "labels" });
  for (const { module, rank, privateTerms } of terms) {
    const name = names[module]!;
    const { in: inputs, out } = adapter.modules.get(name)!;
    const whole = rank + (privateTerms?.rank ?? 0);
    const most = mostRank(inputs, out);
    if (whole > most)
      throw new AdapterError(
        `"${name}" has rank ${whole}, and a pack holds ${most} of [${out}, ${inputs}]: take gauge balanced`,
        {
          file: adapter.file,
          field: name,
        },
      );
  }
  const parameters = await encodeParameters(adapter, head);
  return { entry, blob: blobOf(adapter, terms, parameters, names) };
}

/** @throws AdapterError naming the module with a value that no pack can hold */
function blobOf(
  adapter: Adapter,
  terms: readonly TermInput[],
  parameters: readonly ParameterInput[],
  names: readonly string[],
): Uint8Array {
  try {
    return storable(adapter, { name: "a task" }, () => encodeTask(terms, parameters, names));
  } catch (cause) {
    // One that is too large is too large by itself.
    for (const term of terms) storable(adapter, { name: names[term.module]! }, () => encodeTask([term], [], names));
    throw cause;
  }
}

async function encodeParameters(adapter: Adapter, { type, step }: HeadFormat): Promise<ParameterInput[]> {
  const parameters: ParameterInput[] = [];
  for (const saved of adapter.saved) {
    const { name, role, shape } = saved;
    const { indices, values } = ascending(saved, await saved.read());
    if (shape.length === 1) {
      parameters.push({ name, role, shape, ...vector(values, type, adapter, name) });
      continue;
    }
    const rows = shape[0]!;
    const width = values.length / rows;
    const stored = storable(adapter, saved, () =>
      step === undefined
        ? { dtype: type, encoded: encodeTensor(type, values, rows, width) }
        : encodeSteps(
            values,
            rows,
            width,
            Array<number>(rows).fill(step * Math.sqrt(mean(values, (value) => value ** 2))),
          ),
    );
    parameters.push({ name, role, shape, indices, ...stored });
  }
  return parameters;
}

/** Rows of a table in the order of their indices, which adapters may have in any. */
function ascending(
  { shape, indices }: SavedTensor,
  values: Float32Array,
): { readonly indices: readonly number[] | undefined; readonly values: Float32Array } {
  if (!indices || indices.every((index, i) => i === 0 || index > indices[i - 1]!)) return { indices, values };
  const width = values.length / shape[0]!;
  const order = [...indices.keys()].sort((a, b) => indices[a]! - indices[b]!);
  const sorted = new Float32Array(values.length);
  for (const [i, from] of order.entries()) sorted.set(values.subarray(from * width, (from + 1) * width), i * width);
  return { indices: order.map((i) => indices[i]!), values: sorted };
}

/** A vector: f16 where matrices are packed integers, since one scale for all of it would be coarse and save nothing. */
function vector(
  values: Float32Array,
  type: Dtype,
  adapter: Adapter,
  name: string,
  advice?: string,
): Pick<ParameterInput, "dtype" | "encoded"> {
  const own = isQuantized(type) ? "f16" : type;
  return {
    dtype: own,
    encoded: storable(adapter, { name }, () => encodeTensor(own, values, 1, values.length), advice),
  };
}

/** @throws AdapterError where `encode` does for a value that cannot be stored */
export function storable<T>(
  adapter: Adapter,
  { name }: Pick<SavedTensor, "name">,
  encode: () => T,
  advice: string = "use f32",
): T {
  try {
    return encode();
  } catch (cause) {
    if (!(cause instanceof UnstorableError || cause instanceof FormatError)) throw cause;
    throw new AdapterError(`${name} cannot be stored: ${advised(cause, advice)}`, {
      file: adapter.file,
      field: name,
      cause,
    });
  }
}
