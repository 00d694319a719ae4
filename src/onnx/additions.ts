/**
 * Finds the nodes of a graph at which something can be added: to the result of an adapted layer, to a bias, to rows of a table. Knows
 * graphs and names; reads no weight and changes nothing.
 */
import { biasedRows } from "../core/tied.ts";
import type { PackModule } from "../format/format.ts";
import type { AdaptedLayer, GraftBias, GraftRows } from "./adapted.ts";
import { endOf, FLOAT, FLOAT16, type Linear, linearsOf, NotLinear, origin, producer, requantized } from "./linear.ts";
import { attribute, type OnnxModel, type Use } from "./model.ts";
import { matrixShape, type OnnxParameter, partSize, SUMS } from "./modules.ts";
import type { GraphProto } from "./protobuf.ts";

/**
 * Finds the applications of an adapted weight: as a linear layer, or as one of the forms that are loaded on demand.
 * @returns the reason where it cannot be added to
 */
export async function appliedAs(
  model: OnnxModel,
  { name, layout }: PackModule,
  parameter: OnnxParameter,
  rowScale: boolean,
): Promise<Pick<AdaptedLayer, "linears" | "form"> | string> {
  const linears = linearsOf(model, parameter);
  if (!(linears instanceof NotLinear)) {
    const biased = rowScale ? linears.filter(({ bias }) => bias !== undefined) : [];
    if (biased.length > 0 && (parameter.slice ?? parameter.joined))
      return `"${name}" has DoRA tasks, and its layer is packed or divided together with its bias`;
    if (biased.some(({ node }) => node.opType !== "Gemm"))
      return `"${name}" has DoRA tasks, and its layer's result is quantised together with its bias`;
    return { linears };
  }
  const isForm = layout === "conv" || layout === "embedding";
  const form = isForm ? (await import("./forms.ts")).formOf(model, parameter) : linears.reason;
  if (typeof form === "string") return `"${name}" cannot be added to: ${form}`;
  if (rowScale && form.places.some(({ op, node }) => op !== node))
    return `"${name}" has DoRA tasks, and what its layer makes is quantised`;
  return { linears: [], form };
}

/** A bias that the model has; undefined where it cannot be added to. */
export function biasOf(model: OnnxModel, name: string, parameter: OnnxParameter): GraftBias | undefined {
  const { slice, shape, uses } = parameter;
  if (shape.length !== 1) return undefined;
  const size = partSize(parameter);
  const places = uses.flatMap((use) => placeOfBias(model, use) ?? []);
  if (places.length === 0 || places.length < uses.length) return undefined;
  return { name, size, type: typeWhereUsed(parameter), places, ...(slice && { slice }) };
}

/**
 * Rows of a parameter that tasks replace.
 * @returns the reason where it is neither an embedding's table nor the weight of a linear layer
 * @throws BaseMismatchError for a layer with a bias
 */
export function rowsOf(model: OnnxModel, name: string, parameter: OnnxParameter): GraftRows | string {
  const { dtype, layout, shape, uses } = parameter;
  const type = typeWhereUsed(parameter);
  if (layout === "embedding") {
    const places = uses.filter(({ node, input }) => node.opType === "Gather" && input === 0);
    if (dtype === "other") return "which is quantised here";
    if (places.length === 0 || places.length < uses.length) return "which is no plain table of rows here";
    return { name, count: shape[0]!, width: shape[1]!, type, places, linears: [] };
  }
  const linears = linearsOf(model, parameter);
  if (linears instanceof NotLinear) return `which has no rows here: ${linears.reason}`;
  const biased = linears.some((linear) => linear.bias !== undefined || endOf(model, linear) !== linear.node);
  if (biased) throw biasedRows(name);
  const [count, width] = matrixShape(parameter)!;
  return { name, count, width, type, places: [], linears };
}

/** Inputs that are added to the last dimension of what the node makes. */
const LAST: Readonly<Record<string, number>> = {
  EmbedLayerNormalization: 6,
  Gemm: 2,
  LayerNormalization: 2,
  MatMulNBits: 5,
  SkipLayerNormalization: 3,
};

/** The node to whose result a change of the bias is added. */
function placeOfBias(model: OnnxModel, { node, input, graph }: Use): Pick<Use, "node" | "graph"> | undefined {
  if (node.opType === "Add" || LAST[node.opType] === input)
    return { node: requantized(model, { node, graph }) ?? node, graph };
  // Operators of onnxruntime's optimiser add it to their first input, and go on from there.
  const [before = ""] = node.input;
  const isAlone = SUMS[node.opType] === input && model.graph.consumers.get(before)?.length === 1;
  const made = isAlone ? origin(model, graph, before) : undefined;
  return made?.node.output[0] === before ? made : undefined;
}

/** Type of the values around a vector or table: its own, or f32 where it is stored as f16 behind a Cast. */
function typeWhereUsed({ dtype, uses, initializer }: OnnxParameter): number {
  return dtype === "f16" && uses.every(({ node, input }) => node.input[input] === initializer) ? FLOAT16 : FLOAT;
}

/**
 * A bias that tasks bring and the model lacks: the places where it would be added. torch's optimiser drops a bias of zeros, as a fresh
 * classifier has: a Gemm without C is left, or a MatMul without Add.
 * @param name of the bias
 * @param weight of the same layer
 * @returns undefined where the weight is no linear layer's, or something is added to its result that may be the bias
 */
export function droppedBias(model: OnnxModel, name: string, weight: OnnxParameter): GraftBias | undefined {
  const linears = linearsOf(model, weight);
  const [size] = matrixShape(weight) ?? [];
  if (size === undefined || linears instanceof NotLinear) return undefined;
  if (linears.some((linear) => addsVector(model, linear, size))) return undefined;
  return { name, size, type: linears[0]!.type, places: linears.map(({ graph, node }) => ({ graph, node })) };
}

/** Operators that pass the numbers of their first input on, in another shape or type. */
const RESHAPES = new Set(["Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"]);

/** Operators that add a vector, as onnxruntime fuses them: by their names, or by the index of the input that is added. */
const FUSED_SUMS = /^(Bias|FastGelu$)/;
const FUSED_NORMS: Readonly<Record<string, number>> = {
  SkipLayerNormalization: 4,
  SkipSimplifiedLayerNormalization: 3,
};

/**
 * Whether a constant that may be a bias is added to a layer's result, by its own node or one behind it. The shape may change in
 * between.
 * @param size of the bias
 */
function addsVector(model: OnnxModel, { node, bias }: Linear, size: number): boolean {
  if (bias !== undefined) return true;
  const seen = new Set(node.output.slice(0, 1));
  // The set grows during the loop.
  for (const value of seen) {
    for (const { node: next, graph } of model.graph.consumers.get(value) ?? []) {
      const { opType, input, output } = next;
      if (RESHAPES.has(opType) && input[0] === value && output[0]) seen.add(output[0]);
      const first = opType === "Add" || opType === "Sub" || FUSED_SUMS.test(opType) ? 0 : FUSED_NORMS[opType];
      const others = first === undefined ? [] : input.slice(first).filter((other) => other !== value);
      if (others.some((other) => constantSize(model, graph, other) === size)) return true;
    }
  }
  return false;
}

/** How many numbers a constant has; undefined where a value is none. */
function constantSize(model: OnnxModel, graph: GraphProto, value: string): number | undefined {
  const seen = new Set<string>();
  for (let at = value; !seen.has(at); ) {
    seen.add(at);
    const made = producer(model, graph, at);
    const tensor =
      model.graph.initializers.get(at) ??
      model.graph.scopes.get(graph)?.initializers.get(at) ??
      (made?.opType === "Constant" ? attribute(made, "value")?.t : undefined);
    if (tensor) return tensor.dims.reduce((a, b) => a * Number(b), 1);
    if (made?.opType !== "DequantizeLinear" && !RESHAPES.has(made?.opType ?? "")) return undefined;
    at = made!.input[0] ?? "";
  }
  return undefined;
}
