/**
 * Tells which weights of a base are one in the model: a head that is tied to an embedding, or two embeddings. Files have such a weight once,
 * or once for each layer with the same values; nothing else in them tells. An untied weight that equals the other is taken for tied.
 */
import { BaseMismatchError } from "../errors.ts";
import { moduleOf } from "../format/format.ts";
import type { FloatDtype } from "../tensor/dtypes.ts";
import { type CpuView, type Parameter, sameShape } from "./base.ts";
import { correlation, fingerprint, SAME_FLOAT, SAME_QUANTIZED, type WeightAt, weightAt } from "./mismatch.ts";

/** A matrix, and how exactly its numbers are known: "other" is quantised. */
export interface Matrix {
  readonly at: WeightAt;
  readonly dtype: FloatDtype | "other";
}

/** Says whether two matrices [out, in] have the same values: all of them, or some up to rounding where their types differ. */
export function sameValues(a: Matrix, b: Matrix, out: number, inputs: number): boolean {
  const likeness = correlation(fingerprint("", out, inputs, a.at), fingerprint("", out, inputs, b.at));
  if (a.dtype === "other" || b.dtype === "other") return likeness >= SAME_QUANTIZED;
  if (a.dtype !== b.dtype || likeness < SAME_FLOAT) return likeness >= SAME_FLOAT;
  for (let o = 0; o < out; o++) for (let n = 0; n < inputs; n++) if (!Object.is(a.at(o, n), b.at(o, n))) return false;
  return true;
}

/** What transformers calls layers that follow an embedding they are tied to. */
const HEADS = /(^|\.)(lm_head|embed_out|proj_out|predictions\.decoder|output_projection)\.weight$/;

/** Whether others follow a parameter that they are tied to: an embedding's table, not a head's weight. */
export function leads({ name, layout }: Pick<Parameter, "name" | "layout">): boolean {
  return layout === "embedding" || (layout === undefined && !HEADS.test(name));
}

/** Whether a parameter may be tied to a table [rows, width], by its shape. A layer's weight may lie across it. */
export function mayBeTied({ shape }: Pick<Parameter, "shape">, table: readonly number[]): boolean {
  return sameShape(shape, table) || (table.length === 2 && sameShape(shape, [...table].reverse()));
}

/** Whether a parameter of the right shape has the values of a table [rows, width]. */
export function isTied(one: CpuView & Pick<Parameter, "layout">, table: CpuView): boolean {
  const [rows = 0, width = 0] = table.shape;
  const matrix = ({ data, byteOffset, dtype }: CpuView, across: boolean): Matrix => {
    return { at: weightAt(data.subarray(byteOffset), dtype, rows, width, across), dtype };
  };
  return sameValues(matrix(one, liesAcross(one, table.shape)), matrix(table, false), rows, width);
}

/** Whether the rows of a table are the columns of a parameter of its shape. */
export function liesAcross({ shape, layout }: Pick<Parameter, "shape" | "layout">, table: readonly number[]): boolean {
  return layout === "in-out" || !sameShape(shape, table);
}

/** Refuses rows of a layer with a bias: PEFT leaves the bias out until the adapter is merged, and adds it then. */
export function biasedRows(weight: string): BaseMismatchError {
  const module = moduleOf(weight);
  return new BaseMismatchError(
    `tasks replace rows of "${weight}", of a layer with a bias: PEFT computes it without the bias, and with it once the adapter is ` +
      `merged. Use PEFT's merged model; or, to leave the layer as it is, pass ignore: ["${weight}"]`,
    { module },
  );
}
