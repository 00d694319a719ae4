/** Made-up tasks and their terms by plain arithmetic, for the probe. */
import type { AdaptedLayer, TaskInput } from "../onnx/adapted.ts";
import { transpose } from "../tensor/tensor-file.ts";
import { CoreSpace, type InputValue } from "./components.ts";
import type { InputValues } from "./values.ts";

/** What the probe found out. */
export interface ProbeReport {
  /** "passed", or why nothing could be compared. */
  readonly result: string;
  /** Module whose term was compared, and the largest difference relative to the largest value. */
  readonly module?: string;
  readonly difference?: number;
}

/** An output of the model. */
export interface ProbeValue {
  readonly dims: readonly number[];
  readonly data: Float32Array;
}

/** An adapted layer as far as its term is concerned. */
export type ProbedLayer = Pick<AdaptedLayer, "name" | "in" | "out" | "components" | "factors" | "over">;

/** The value of an input for cores of a made-up task. */
export function madeUpCores(input: TaskInput, size?: number): InputValue {
  const space = new CoreSpace(input);
  for (const [i, { KA, KB }] of (input.cores ?? []).entries()) {
    const core = waves(KA * KB, size);
    const { out, at, stride } = space.targets[i]![1];
    for (let a = 0; a < KA; a++) out.set(core.subarray(a * KB, (a + 1) * KB), at + a * stride);
  }
  return space.value(() => true);
}

/** x·E_Aᵀ·S·E_B + x·A·B in f64, for the rows of x: the term of an adapted layer by plain arithmetic. */
export function termOf(
  { name, in: width, out, components, factors, over = {} }: ProbedLayer,
  x: ArrayLike<number>,
  inputs: readonly TaskInput[],
  values: InputValues,
): Float64Array {
  const rows = x.length / width;
  const value = (kind: "A" | "B"): { data: ArrayLike<number>; columns: number } => {
    const input = inputs.find((one) => one.of === name && one.kind === kind)!;
    const { data, dims } = values.get(input.name)!;
    const columns = dims[1]!;
    // The graph's components are without scales where these are in the input.
    const scales = input.over?.scales;
    const scaleAt = (i: number): number => scales?.[kind === "A" ? Math.floor(i / columns) : i % columns] ?? 1;
    return { data: Float64Array.from(data as Float32Array, (one, i) => one / scaleAt(i)), columns };
  };
  let term = new Float64Array(rows * out);
  if (factors) {
    const [A, B] = [value("A"), value("B")];
    const [KA, KB] = [over.A?.rows ?? width, over.B?.rows ?? out];
    const read = over.A ? multiply(x, transpose(over.A.floats(), KA, width), rows, width, KA) : x;
    const made = multiply(multiply(read, A.data, rows, KA, A.columns), B.data, rows, A.columns, KB);
    term = over.B ? multiply(made, over.B.floats(), rows, KB, out) : made;
  }
  if (!components) return term;
  const [KA, KB] = [components.A.rows, components.B.rows];
  const projected = multiply(x, transpose(components.A.floats(), KA, width), rows, width, KA);
  const mixed = multiply(projected, waves(KA * KB), rows, KA, KB);
  multiply(mixed, components.B.floats(), rows, KB, out).forEach((v, i) => (term[i]! += v));
  return term;
}

export function waves(length: number, size = 0.1): Float32Array {
  return Float32Array.from({ length }, (_, i) => size * Math.sin(1 + 1.7 * i));
}

function multiply(
  a: ArrayLike<number>,
  b: ArrayLike<number>,
  rows: number,
  inner: number,
  columns: number,
): Float64Array<ArrayBuffer> {
  const out = new Float64Array(rows * columns);
  for (let r = 0; r < rows; r++) {
    for (let k = 0; k < inner; k++) {
      for (let c = 0; c < columns; c++) out[r * columns + c]! += a[r * inner + k]! * b[k * columns + c]!;
    }
  }
  return out;
}
