/**
 * An adapter as a task of a pack, encoded: its terms on the pack's components, and what it brings beside them.
 */
import type { Adapter, SavedTensor } from "../adapters/adapter.ts";
import { AdapterError } from "../errors.ts";
import type { PrivateTerms } from "../extract/private.ts";
import type { TaskCoefficients } from "../extract/project.ts";
import { checkEntry, encodeTask, type ParameterInput, type TermInput } from "../format/encode.ts";
import { encodeBrings } from "../format/format.ts";
import { misfitLabels } from "../format/heads.ts";
import type { TaskToWrite } from "../format/layout.ts";
import type { Dtypes } from "../tensor/dtypes.ts";
import { type Dtype, isQuantized } from "../tensor/dtypes.ts";
import { advised, encodeSteps, encodeTensor, SCALE_DOWN } from "../tensor/encode.ts";

/** What of a module's bases is said in each of its terms. */
type Bases = Record<"A" | "B", { rank?: number | undefined; mean: unknown }>;

export function encodeTerm(
  { index, name }: { readonly index: number; readonly name: string },
  { rank, alphaA, alphaB, privateTerms }: TaskCoefficients & { readonly privateTerms?: PrivateTerms | undefined },
  { A, B }: Bases,
  magnitude: Float32Array | undefined,
  adapter: Adapter,
  dtype: Dtypes,
): TermInput {
  const side = ({ rank: flat, mean }: Bases["A"], encoded: Uint8Array): NonNullable<TermInput["A"]> => {
    return { kind: flat === undefined ? "column" : "flat", dtype: dtype.coefficients, mean: Boolean(mean), encoded };
  };
  return {
    module: index,
    rank,
    A: rank > 0 ? side(A, alphaA) : undefined,
    B: rank > 0 ? side(B, alphaB) : undefined,
    privateTerms,
    magnitude:
      magnitude && vector(magnitude, dtype.coefficients, adapter, `the DoRA magnitude of "${name}"`, SCALE_DOWN),
  };
}

/**
 * A task as it is written.
 * @param terms sorted by module
 * @param names of the pack's modules
 * @throws AdapterError for a value that its number format cannot hold, metadata that the format does not, and labels that are more
 *   or fewer than the rows of the head
 */
export async function encodeAdapter(
  adapter: Adapter,
  terms: readonly TermInput[],
  names: readonly string[],
  head: HeadFormat,
): Promise<TaskToWrite> {
  const { id, byteLength, metadata, saved } = adapter;
  const named = (which: readonly TermInput[]): string[] => which.map(({ module }) => names[module]!);
  const brings = encodeBrings(saved, {
    magnitude: named(terms.filter(({ magnitude }) => magnitude)),
    private: named(terms.filter(({ privateTerms }) => privateTerms)),
  });
  const entry = { id, adapterBytes: byteLength, metadata, brings: brings.sort() };
  storable(adapter, { name: "metadata" }, () => checkEntry(entry, id));
  const misfit = misfitLabels(metadata.labels, saved);
  if (misfit !== undefined) throw new AdapterError(misfit, { file: adapter.file, field: "labels" });
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

/** How saved matrices are stored. */
export interface HeadFormat {
  readonly type: Dtype;
  /** Of integers, as a share of the root mean square of a matrix. Default: as `type` says. */
  readonly step?: number | undefined;
}

async function encodeParameters(adapter: Adapter, { type, step }: HeadFormat): Promise<ParameterInput[]> {
  const parameters: ParameterInput[] = [];
  for (const saved of adapter.saved) {
    const { name, role, shape, indices } = saved;
    const values = await saved.read();
    if (shape.length === 1) {
      parameters.push({ name, role, shape, ...vector(values, type, adapter, name) });
      continue;
    }
    const rows = shape[0]!;
    const width = values.length / rows;
    const stored = storable(adapter, saved, () =>
      step === undefined
        ? { dtype: type, encoded: encodeTensor(type, values, rows, width) }
        : encodeSteps(values, rows, width, Array<number>(rows).fill(step * rootMeanSquare(values))),
    );
    parameters.push({ name, role, shape, indices, ...stored });
  }
  return parameters;
}

function rootMeanSquare(values: Float32Array): number {
  return Math.sqrt(values.reduce((sum, value) => sum + value ** 2, 0) / values.length);
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
    throw new AdapterError(`${name} cannot be stored: ${advised(cause, advice)}`, {
      file: adapter.file,
      field: name,
      cause,
    });
  }
}
