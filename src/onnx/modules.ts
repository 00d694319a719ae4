/**
 * Finds which parameter of the PyTorch model each initializer of its export is. Exporters keep some names and lose others, merge
 * parameters of equal values, and write one that is applied in two ways down twice; lost names are found again from the nodes that use
 * an initializer. Names and orientation only: nothing here reads a value (copies.ts does).
 */
import { sameShape } from "../core/base.ts";
import type { Layout } from "../format/format.ts";
import { type Claim, Claims, EVIDENCE, isParameterName, variants } from "./claims.ts";
import { attribute, type Graph, type OnnxModel, type Use } from "./model.ts";
import { type OnnxTensorType, tensorType } from "./tensors.ts";

/** Rows of a packed weight that a layer has: the `index`-th of parts whose sizes are `sizes`. */
export interface Slice {
  readonly index: number;
  readonly sizes: readonly number[];
  /** Name of the parameter that it is a part of. */
  readonly of: string;
}

/** An initializer that holds a parameter. */
export interface Stored extends OnnxTensorType {
  readonly initializer: string;
  /** How a weight lies in the initializer. Absent for vectors and where the use does not tell. */
  readonly layout?: Layout;
  /** Set where the parameter is a part of the initializer: several layers packed into one. */
  readonly slice?: Slice;
  /** Set where the parameter is several initializers' rows, one below the other: a layer that the exporter has divided. */
  readonly joined?: readonly OnnxParameter[];
  /** Nodes that use it, behind Cast, Identity, Transpose and the like. Empty when nothing does. */
  readonly uses: readonly Use[];
}

/** Another initializer that may hold the same parameter. */
export interface Candidate extends Stored {
  /** Whether it has as good a claim to the name: if its values differ, there is no telling which of the two it is. */
  readonly equal: boolean;
}

/** A parameter of the model, and the initializer that holds it. One initializer may hold several, merged on export. */
export interface OnnxParameter extends Stored {
  /** Name in the checkpoint, as far as the file tells; where it tells nothing, the initializer's own name. */
  readonly name: string;
  /** Initializers that may hold the same weight once more: their values tell. */
  readonly candidates: readonly Candidate[];
  /** Initializers that hold the same weight, once `Copies` of copies.ts has compared values. */
  readonly copies: readonly Stored[];
}

/** `TensorProto.DataType` of quantised weights: (u)int8, float8, (u)int4, float4, (u)int2. */
const QUANTISED = new Set([2, 3, 17, 18, 19, 20, 21, 22, 23, 25, 26]);

/** Claims of one name. */
interface Rivals {
  /** The one that has it; undefined where none can be said to. */
  readonly winner: Claim | undefined;
  /** Whether others have as good a claim. */
  readonly tied: boolean;
  /** Those that its values must be compared with; the winner may be among them. */
  readonly candidates: Candidate[];
}

/**
 * The model's float parameters and quantised weights. One that was merged with others of equal values is listed under
 * each name, one whose name several claim under that of its initializer too.
 * @throws FormatError when an initializer's shape is impossible, or nested graphs multiply its uses
 */
export function findParameters(model: OnnxModel): OnnxParameter[] {
  const { graph } = model;
  const claims = new Claims(model);
  const types = new Map<string, OnnxTensorType>();
  const all: Claim[][] = [];
  for (const [initializer, tensor] of graph.initializers) {
    const type = tensorType(tensor, model.name);
    if (type.dtype === "other" && !QUANTISED.has(tensor.dataType) && !isDequantised(graph, initializer)) continue;
    types.set(initializer, type);
    all.push(claims.of(initializer, type));
  }
  const stored = ({ initializer, layout, uses }: Claim): Stored => {
    return { initializer, ...types.get(initializer)!, ...(layout ? { layout } : {}), uses };
  };
  const rivals = settle(all.flat(), stored);
  /** What the rivals for a name are to one that is listed by its initializer. */
  const others = new Map<Rivals, Candidate[]>();
  return all.flatMap((own) => {
    const won = own.filter((claim) => rivals.get(claim.name)!.winner === claim);
    const found = won.map((claim): OnnxParameter => {
      return { name: claim.name, ...stored(claim), candidates: rivals.get(claim.name)!.candidates, copies: [] };
    });
    // A user who knows better can name it by its initializer.
    const lost = own.find(({ name, evidence }) => {
      const { winner, tied } = rivals.get(name)!;
      return tied || (won.length === 0 && (!winner || evidence === EVIDENCE.guessed));
    });
    if (!lost || rivals.get(lost.initializer)?.winner) return found;
    const group = rivals.get(lost.name)!;
    const candidates = others.get(group) ?? group.candidates.map((one) => ({ ...one, equal: false }));
    others.set(group, candidates);
    return [...found, { name: lost.initializer, ...stored(lost), candidates, copies: [] }];
  });
}

/** Whether integers are a parameter's: a bias of a quantised layer is int32, as much else is. */
function isDequantised(graph: Graph, initializer: string): boolean {
  const uses = graph.consumers.get(initializer) ?? [];
  return uses.some(({ node, input }) => node.opType === "DequantizeLinear" && input === 0);
}

/** Gives each claimed name to its best founded claim. */
function settle(claims: readonly Claim[], stored: (claim: Claim) => Stored): Map<string, Rivals> {
  const byName = new Map<string, Claim[]>();
  for (const claim of claims) {
    const known = byName.get(claim.name);
    if (known) known.push(claim);
    else byName.set(claim.name, [claim]);
  }
  const settled = new Map<string, Rivals>();
  for (const [name, some] of byName) {
    const evidence = some.reduce((most, claim) => Math.max(most, claim.evidence), 0);
    const best = some.filter((claim) => claim.evidence === evidence);
    const tied = best.length > 1;
    const matrix = best.find((claim) => isMatrix(stored(claim)));
    // A guess is worth something when it explains every layer that the bias is used by.
    const uses = best.reduce((sum, claim) => sum + claim.uses.length, 0);
    const isWeak = evidence === EVIDENCE.guessed && uses !== best[0]!.shared;
    const winner = isWeak ? undefined : tied ? matrix : best[0];
    const candidates = winner ? candidatesOf(winner, some, tied, stored) : [];
    settled.set(name, { winner, tied: tied && matrix !== undefined && !isWeak, candidates });
  }
  // The second call of a module, by the name that the exporter gives it.
  for (const claim of claims) {
    const own = stored(claim);
    if (!claim.name.endsWith(".weight") || claim.evidence > EVIDENCE.used || !isMatrix(own)) continue;
    for (const path of variants(claim.name.slice(0, -".weight".length)).slice(1)) {
      const { winner, candidates } = settled.get(`${path}.weight`) ?? {};
      if (winner && isSameMatrix(stored(winner), own)) candidates?.push({ ...own, equal: false });
    }
  }
  return settled;
}

function candidatesOf(
  winner: Claim,
  claims: readonly Claim[],
  tied: boolean,
  stored: (claim: Claim) => Stored,
): Candidate[] {
  const own = stored(winner);
  return claims.flatMap((claim) => {
    const one = stored(claim);
    // No vector is a matrix' rival: quantisers write the scales of its columns at the same place.
    const equal = tied && claim.evidence === winner.evidence && (!isMatrix(own) || isMatrix(one));
    return claim !== winner && (equal || isSameMatrix(own, one)) ? [{ ...one, equal }] : [];
  });
}

/** [out, in] of a parameter that is the weight of a linear layer; undefined when its dimensions do not tell. */
export function matrixShape(
  stored: Pick<Stored, "shape" | "layout" | "uses" | "slice" | "joined">,
): readonly [out: number, inputs: number] | undefined {
  const { slice, joined } = stored;
  // Checked when they were joined.
  if (joined) return joined.map((one) => matrixShape(one)!).reduce(([out, inputs], [more]) => [out + more, inputs]);
  const whole = wholeShape(stored);
  return whole && slice ? [slice.sizes[slice.index]!, whole[1]] : whole;
}

/** How many outputs a parameter has. */
export function partSize(stored: Stored): number {
  const { slice, shape } = stored;
  if (shape.length === 1) return slice ? slice.sizes[slice.index]! : shape[0]!;
  return matrixShape(stored)![0];
}

/** Index of the first output of a part of a packed parameter; 0 for other parameters. */
export function partStart({ slice }: Stored): number {
  return slice ? slice.sizes.slice(0, slice.index).reduce((a, b) => a + b, 0) : 0;
}

/** The axis along which a parameter's outputs lie. */
export function outputAxis({ shape, layout }: Pick<Stored, "shape" | "layout">): number {
  return shape.length === 2 && layout === "in-out" ? 1 : 0;
}

/** The shape that a parameter has as one of its own. */
export function pieceShape(stored: Stored): readonly number[] {
  const axis = outputAxis(stored);
  return stored.slice ? stored.shape.map((size, i) => (i === axis ? partSize(stored) : size)) : stored.shape;
}

/** A weight as the matrix [out, in] that it is to its module: convolutions are [out, …], tables lie the other way round. */
export function asMatrix<T extends Stored>(stored: T): T {
  const { shape, layout } = stored;
  if (shape.length > 2)
    return { ...stored, shape: [shape[0]!, shape.slice(1).reduce((a, b) => a * b, 1)], layout: "out-in" };
  return layout === "embedding" ? { ...stored, layout: "in-out" } : stored;
}

/** The same of all that the initializer holds. */
function wholeShape({
  shape,
  layout,
  uses,
}: Pick<Stored, "shape" | "layout" | "uses">): readonly [out: number, inputs: number] | undefined {
  const packed = uses.find(({ node }) => node.opType === "MatMulNBits")?.node;
  if (packed) return [Number(attribute(packed, "N")?.i ?? 0), Number(attribute(packed, "K")?.i ?? 0)];
  const [rows, columns] = shape;
  if (shape.length !== 2 || rows === undefined || columns === undefined) return undefined;
  return layout === "in-out" ? [columns, rows] : [rows, columns];
}

/** Whether a linear layer multiplies with it. */
export function isMatrix(stored: Stored): boolean {
  return (stored.layout === "in-out" || stored.layout === "out-in") && matrixShape(stored) !== undefined;
}

/** Whether it is a float matrix that goes by an exporter's name, so that any layer may be its own. */
export function isNameless(parameter: OnnxParameter): boolean {
  const { name, initializer, dtype } = parameter;
  return name === initializer && !isParameterName(name) && dtype !== "other" && isMatrix(parameter);
}

function isSameMatrix(a: Stored, b: Stored): boolean {
  return isMatrix(a) && isMatrix(b) && sameShape(matrixShape(a)!, matrixShape(b)!);
}
