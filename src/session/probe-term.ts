/** The term of an adapted layer by plain arithmetic, for the probe. */
import type { CoreBlock, TaskInput } from "../onnx/adapted.ts";
import { transpose } from "../tensor/derived.ts";
import type { AdaptedLayer } from "./prepare.ts";
import type { InputValue, WriteCore } from "./values.ts";

/** An output of the model. */
export interface ProbeValue {
  readonly dims: readonly number[];
  readonly data: Float32Array;
}

/** Values of task inputs by name. */
export type Inputs = ReadonlyMap<string, InputValue>;

/** x·E_Aᵀ·S·E_B + x·A·B in f64, for the rows of x. */
export function termOf(
  { name, in: width, out, components, factors }: AdaptedLayer,
  x: ArrayLike<number>,
  inputs: readonly TaskInput[],
  values: Inputs,
): Float64Array {
  const rows = x.length / width;
  const value = (kind: string): { data: ArrayLike<number>; columns: number } => {
    const { data, dims } = values.get(inputs.find((input) => input.of === name && input.kind === kind)!.name)!;
    return { data: data as Float32Array, columns: dims[1]! };
  };
  let term = new Float64Array(rows * out);
  if (factors) {
    const [A, B] = [value("A"), value("B")];
    term = multiply(multiply(x, A.data, rows, width, A.columns), B.data, rows, A.columns, out);
  }
  if (!components) return term;
  const [KA, KB] = [components.A.rows, components.B.rows];
  const core = inputs.flatMap(({ cores = [] }) => cores.filter(({ module }) => module === name))[0]!;
  const projected = multiply(x, transpose(components.A.floats(), KA, width), rows, width, KA);
  const mixed = multiply(projected, madeUpCore(core), rows, KA, KB);
  multiply(mixed, components.B.floats(), rows, KB, out).forEach((v, i) => (term[i]! += v));
  return term;
}

/** A core of a task that there is not. */
function madeUpCore({ KA, KB }: CoreBlock, size = 0.1): Float32Array {
  return waves(KA * KB, size);
}

/** The same where it goes. */
export function writeMadeUp(block: CoreBlock, size?: number): WriteCore {
  const { KA, KB } = block;
  const core = madeUpCore(block, size);
  return (out, at, stride) => {
    for (let a = 0; a < KA; a++) out.set(core.subarray(a * KB, (a + 1) * KB), at + a * stride);
  };
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
