/**
 * Tells which weights of a base are one in the model: a head that is tied to an embedding, or two embeddings. Files have such a weight once,
 * or once for each layer with the same values; nothing else in them tells. An untied weight that equals the other is taken for tied.
 */
import { BaseMismatchError } from "../errors.ts";
import { moduleOf } from "../format/format.ts";
import type { FloatDtype } from "../tensor/dtypes.ts";
import { type CpuView, onDevice, type Parameter, sameShape, type WeightHost } from "./base.ts";
import type { ParameterChange } from "./merge.ts";
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

/** Names in transformers of layers that are tied to an embedding. */
const HEADS = /(^|\.)(lm_head|embed_out|proj_out|predictions\.decoder|output_projection)\.weight$/;

/** True if others follow a parameter that they are tied to: an embedding's table, not a head's weight. */
export function leads({ name, layout }: Pick<Parameter, "name" | "layout">): boolean {
  return layout === "embedding" || (layout === undefined && !HEADS.test(name));
}

/** True if a parameter may be tied to a table [rows, width], by its shape. A layer's weight may lie across it. */
export function mayBeTied({ shape }: Pick<Parameter, "shape">, table: readonly number[]): boolean {
  return sameShape(shape, table) || (table.length === 2 && sameShape(shape, [...table].reverse()));
}

/** True if a parameter of the right shape has the values of a table [rows, width]. */
export function isTied(one: CpuView & Pick<Parameter, "layout">, table: CpuView): boolean {
  const [rows = 0, width = 0] = table.shape;
  const matrix = ({ data, byteOffset, dtype }: CpuView, across: boolean): Matrix => {
    return { at: weightAt(data.subarray(byteOffset), dtype, rows, width, across), dtype };
  };
  return sameValues(matrix(one, liesAcross(one, table.shape)), matrix(table, false), rows, width);
}

/** True if the rows of a table are the columns of a parameter of its shape. */
export function liesAcross({ shape, layout }: Pick<Parameter, "shape" | "layout">, table: readonly number[]): boolean {
  return layout === "in-out" || !sameShape(shape, table);
}

/** A base in which tied parameters are looked for. */
export interface TiedBase {
  readonly parameters: ReadonlyMap<string, Parameter>;
  readonly host: WeightHost | undefined;
  /** Names of parameters that are left as they are. */
  readonly ignored: ReadonlySet<string>;
  /** Names of parameters that are tied to an embedding, by its name: filled by `tieRows`. */
  readonly tied: Map<string, readonly string[]>;
  /** Name of the module that a parameter is the adapted weight of. */
  moduleOf(name: string): string | undefined;
  /** The pristine value of an embedding, which is kept. */
  table(name: string): Promise<CpuView>;
  /** The pristine value of another parameter. */
  read(name: string): Promise<CpuView>;
}

/**
 * Copies rows of an embedding to the parameters tied to it, in `changes`, for tasks that bring none for them.
 * @returns names of embeddings whose rows alone change: parameters in the same memory change as well
 * @throws BaseMismatchError for rows of a layer with a bias
 */
export async function tieRows(changes: Map<string, ParameterChange[]>, base: TiedBase): Promise<Set<string>> {
  const isRows = ({ parameter }: ParameterChange): boolean => parameter.role === "rows";
  const isTable = (name: string): boolean => {
    const parameter = base.parameters.get(name);
    return parameter !== undefined && leads(parameter);
  };
  for (const [name, list] of [...changes]) {
    if (!isTable(name) || !list.some(isRows)) continue;
    for (const tied of await tiedTo(name, base)) {
      const others = changes.get(tied) ?? [];
      const module = base.moduleOf(tied);
      const following = list
        .filter((change) => isRows(change) && others.every(({ part }) => part !== change.part))
        .map(({ part, parameter }) => {
          return { part, parameter: { ...parameter, name: module === undefined ? tied : `${module}.weight` } };
        });
      if (following.length > 0) changes.set(tied, [...others, ...following]);
    }
  }
  return new Set([...changes.keys()].filter((name) => isTable(name) && changes.get(name)!.every(isRows)));
}

/** Names of what is tied to an embedding and lies in memory of its own. */
async function tiedTo(name: string, base: TiedBase): Promise<readonly string[]> {
  const known = base.tied.get(name);
  if (known) return known;
  const table = await base.table(name);
  const found: string[] = [];
  for (const parameter of base.parameters.values()) {
    const { name: other, layout } = parameter;
    if (other === name || base.ignored.has(other) || !mayBeTied(parameter, table.shape)) continue;
    if (base.host!.begin && isOnePlace(base.host!, name, other)) continue;
    if (!isTied({ ...(await base.read(other)), ...(layout && { layout }) }, table)) continue;
    if (base.parameters.has(other.replace(/weight$/, "bias"))) throw biasedRows(other);
    found.push(other);
  }
  base.tied.set(name, found);
  return found;
}

/** True if a host has two parameters in the same memory, so that one write changes both. */
function isOnePlace(host: WeightHost, name: string, other: string): boolean {
  const one = host.view?.(name);
  const two = host.view?.(other);
  if (!one || !two || one.byteOffset !== two.byteOffset) return false;
  if (onDevice(one.data) || onDevice(two.data)) return one.data === two.data;
  return one.data.buffer === two.data.buffer && one.data.byteOffset === two.data.byteOffset;
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
