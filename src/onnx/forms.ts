/**
 * Uses of weights that are no linear layers but can be adapted: convolutions, tables of embeddings, weights of normalisations, biases of
 * convolutions; how they are found, and the graph surgery next to them. The base's nodes stay as they are, quantised or not, and what is
 * added is zero without a task. Loaded only for packs with such modules.
 *
 * A convolution, with x [n, channels, …], y [n, out, …] and S positions of y, whose batch comes first:
 *
 *     h  = Conv(x; E_A [K_A, channels, …]), as [tasks, n / tasks, K_A, S]
 *     d  = E_Bᵀ · coreᵀ · h
 *     y' = y + reshape(d, shape of y)
 *
 * Factors: one Conv with the A of all tasks gives [n, tasks · q, …], and each row takes the q channels of its own task.
 *
 * A table: rows of E_Aᵀ [vocabulary, K_A] are looked up, then as in a linear layer. A normalisation: y' = y + x̂·(w − w_base), where x̂ is
 * what it makes with ones for its weight.
 */
import { transpose } from "../tensor/tensor-file.ts";
import type { GraphTools } from "./inject.ts";
import {
  type AdaptedLayer,
  type AdaptedVector,
  dynamic,
  FLOAT,
  FLOAT16,
  INT64,
  onlyConsumer,
  quantized,
  requantized,
  type Site,
  typeOf,
  type VectorPlace,
} from "./linear.ts";
import { attribute, type OnnxModel, type Use } from "./model.ts";
import type { OnnxParameter } from "./modules.ts";
import { type Place, PREFIX } from "./nodes.ts";
import type { NodeProto } from "./protobuf.ts";

/** @returns the kind of a layer that is not linear, and its applications; the reason where a use of the weight cannot be adapted */
export function formOf(
  model: OnnxModel,
  { uses, copies, initializer, shape }: OnnxParameter,
): Pick<AdaptedLayer, "kind" | "shape" | "sites"> | string {
  const all = [uses, ...copies.map((copy) => copy.uses)].flat().filter(readsValues);
  if (all.length === 0) return `nothing in the graph uses "${initializer}"`;
  const kind = all[0]!.node.opType.startsWith("Gather") ? "embedding" : "convolution";
  const sites: Site[] = [];
  for (const use of all) {
    const site = kind === "embedding" ? tableOf(model, use) : convolutionOf(model, use);
    if (typeof site === "string") return `${use.node.opType} "${use.node.name}" ${site}`;
    sites.push({ ...site, product: use.node });
  }
  return { kind, shape, sites };
}

/** True if a node reads more than the weight's shape, which is all that some exporters ask for. */
function readsValues({ node }: Use): boolean {
  return node.opType !== "Shape";
}

/** Index of the weight among the inputs, by operator. */
const WEIGHTS: Readonly<Record<string, number>> = { Conv: 1, ConvInteger: 1, QLinearConv: 3 };

function convolutionOf(model: OnnxModel, use: Use): Site | string {
  const { node: op, graph, input } = use;
  const groups = Number(attribute(op, "group")?.i ?? 1);
  if (WEIGHTS[op.opType] !== input) return "is none of Conv, ConvInteger, QLinearConv";
  if (groups !== 1) return `is a grouped convolution (${groups} groups), whose groups see other channels each`;
  if (op.opType === "Conv") {
    const node = requantized(model, use) ?? op;
    const bias = node === op ? op.input[2] || undefined : undefined;
    return { graph, node, x: op.input[0]!, type: typeOf(model, graph, op.input[1]!), bias };
  }
  const found = op.opType === "ConvInteger" ? dynamic(model, use) : quantized(model, use);
  if (!found) return "does not lie between the nodes that quantisers of onnxruntime write";
  return { graph, node: found.node, x: found.x, type: found.type };
}

function tableOf(model: OnnxModel, use: Use): Site | string {
  const { node: op, graph, input } = use;
  const axis = Number(attribute(op, op.opType === "Gather" ? "axis" : "gather_axis")?.i ?? 0);
  if (!/^Gather(BlockQuantized)?$/.test(op.opType) || input !== 0 || axis !== 0) return "does not look up rows";
  const place = { graph, x: op.input[1]! };
  if (op.opType !== "Gather") return { ...place, node: op, type: typeOf(model, graph, op.input[2]!) };
  const next = onlyConsumer(model, graph, op);
  const node = requantized(model, use) ?? (next?.opType === "DequantizeLinear" ? next : op);
  return { ...place, node, type: typeOf(model, graph, node === next ? next.input[1]! : op.input[0]!) };
}

/** Normalisations, and the index of their weight. */
const NORMALISATIONS: Readonly<Record<string, number>> = {
  LayerNormalization: 1,
  RMSNormalization: 1,
  SimplifiedLayerNormalization: 1,
  SkipLayerNormalization: 2,
  SkipSimplifiedLayerNormalization: 2,
};

/** Uses of a vector; undefined where one is neither the weight of a normalisation nor the bias of a convolution. */
export function vectorOf(model: OnnxModel, name: string, { shape, uses }: OnnxParameter): AdaptedVector | undefined {
  const [size] = shape;
  if (shape.length !== 1 || size === undefined || uses.length === 0) return undefined;
  const places: VectorPlace[] = [];
  for (const use of uses.filter(readsValues)) {
    const { node: op, graph, input } = use;
    const kind = NORMALISATIONS[op.opType] === input || op.opType === "Mul" ? "weight" : "bias";
    if (kind === "bias" && !(op.opType === "Conv" && input === 2)) return undefined;
    // The type of a convolution's bias is that of its weight, since a quantised bias is integers.
    const type = typeOf(model, graph, op.input[kind === "weight" ? input : 1]!);
    if (type !== FLOAT && type !== FLOAT16) return undefined;
    places.push({ kind, graph, op, input, node: requantized(model, use) ?? op, type });
  }
  return { name, size, places };
}

export function addModule(tools: GraphTools, module: AdaptedLayer): void {
  if (module.kind === "embedding") addTable(tools, module);
  else addConvolution(tools, module);
}

/** The inputs of a module, made once for all of its places. */
function inputsOf(tools: GraphTools, { name, in: width, out, components, factors, rowScale }: AdaptedLayer) {
  const [KA, KB] = [components?.A.rows ?? 0, components?.B.rows ?? 0];
  const block = { module: name, row: 0, column: 0, KA, KB, scalesA: undefined, scalesB: undefined };
  const core = components && tools.input(name, "core", [KA, KB], { cores: [block] });
  const A = factors ? tools.input(name, "A", [width, "q"]) : undefined;
  const B = factors ? tools.input(name, "B", ["q", out]) : undefined;
  const scale = rowScale ? tools.input(name, "scale", [1, out]) : undefined;
  return { core, A, B, scale };
}

// ---- convolutions

/** Parts of a term: the weight of the convolution that enters it, and what its channels are multiplied with. */
interface Pieces {
  /** E_A [K_A, channels, …] and coreᵀ [tasks, 1, K_B, K_A] and E_Bᵀ [out, K_B]. */
  readonly shared: { readonly EA: string; readonly core: string; readonly EB: string; readonly KA: number } | undefined;
  /** Aᵀ of all tasks [tasks · q, channels, …], Bᵀ [tasks, 1, out, q], the vector [q]. */
  readonly own: { readonly A: string; readonly B: string; readonly q: string } | undefined;
  /** [tasks, 1, out, 1]. */
  readonly scale: string | undefined;
}

function addConvolution(tools: GraphTools, module: AdaptedLayer): void {
  const pieces = piecesOf(tools, module);
  for (const place of module.sites) convolve(tools, module, place, pieces);
}

function piecesOf(tools: GraphTools, module: AdaptedLayer): Pieces {
  const { name, out, components } = module;
  const kernel = module.shape!.slice(1);
  const { core, A, B, scale } = inputsOf(tools, module);
  const at = (what: string): string => `${PREFIX}/${name}/${what}`;
  /** [tasks, a, b] as [tasks, 1, b, a]. */
  const turned = (what: string, value: string, b: number, a: number): string => {
    const swapped = tools.first(`${at(what)}/swapped`, "Transpose", [value], { perm: [0, 2, 1] });
    return tools.first(at(what), "Reshape", [swapped, tools.ints([0, 1, b, a])]);
  };
  const scaled = scale && tools.first(at("scale"), "Reshape", [scale, tools.ints([0, 1, out, 1])]);
  const shared = core !== undefined && components ? { core, ...components } : undefined;
  const [KA, KB] = [shared?.A.rows ?? 0, shared?.B.rows ?? 0];
  return {
    scale: scaled,
    shared: shared && {
      KA,
      EA: tools.add(at("E_A"), [KA, ...kernel], shared.A.floats()),
      EB: tools.add(at("E_B"), [out, KB], transpose(shared.B.floats(), KB, out)),
      core: turned("core", shared.core, KB, KA),
    },
    own:
      A !== undefined && B !== undefined
        ? {
            A: tools.first(at("A"), "Reshape", [
              tools.first(`${at("A")}/swapped`, "Transpose", [A], { perm: [0, 2, 1] }),
              tools.ints([-1, ...kernel]),
            ]),
            B: turned("B", B, out, -1),
            q: tools.dims("q", A, 2, 3),
          }
        : undefined,
  };
}

/** Attributes of a convolution that hold for the term's too. */
const GEOMETRY = /^(auto_pad|dilations|kernel_shape|pads|strides)$/;

function convolve(tools: GraphTools, module: AdaptedLayer, found: Site, { shared, own, scale }: Pieces): void {
  const { name, out, shape } = module;
  const { graph, node, type, bias } = found;
  const op = found.product!;
  const geometry = op.attribute.filter((one) => GEOMETRY.test(one.name));
  const place = tools.place(name, graph, node, type);
  // DoRA scales y without its bias.
  const apart = scale !== undefined && bias !== undefined;
  if (apart) op.input.length = 2;
  const x = place.up(found.x);
  const y = place.begin();
  const flat = place.op("Shape", [place.op("Reshape", [y, tools.ints([0, out, -1])])]);
  const positions = place.op("Slice", [flat, tools.ints([2]), tools.ints([3])]);
  /** [n, channels, …] as [tasks, n / tasks, channels, S]. */
  const byTask = (value: string, channels: string): string => {
    const shape = place.op("Concat", [tools.tasks(), tools.ints([-1]), channels, positions], { axis: 0 });
    return place.op("Reshape", [value, shape]);
  };
  const conv = (weight: string): string =>
    place.like(op, [x, weight], { opType: "Conv", domain: "", attribute: geometry });
  const terms: string[] = [];
  if (own) {
    const rows = ownChannels(tools, place, conv(own.A), { flat, positions, q: own.q });
    terms.push(place.op("MatMul", [own.B, byTask(rows, own.q)]));
  }
  if (shared) {
    const mixed = place.op("MatMul", [shared.core, byTask(conv(shared.EA), tools.ints([shared.KA]))]);
    terms.push(place.op("MatMul", [shared.EB, mixed]));
  }
  const term = terms.length === 2 ? place.op("Add", terms) : terms[0]!;
  const whole = place.op("Shape", [y]);
  if (scale === undefined) {
    place.end(place.op("Add", [y, place.down(place.op("Reshape", [term, whole]))]));
    return;
  }
  const sum = place.op("Add", [byTask(place.up(y), tools.ints([out])), term]);
  const result = place.op("Reshape", [place.op("Mul", [sum, scale]), whole]);
  place.end(place.down(apart ? addChannels(tools, place, result, place.up(bias), shape!.length - 2) : result));
}

/** x + a vector [channels], of its channels. */
function addChannels(tools: GraphTools, place: Place, x: string, vector: string, dimensions: number): string {
  const ones = Array<number>(dimensions).fill(1);
  return place.op("Add", [x, place.op("Reshape", [vector, tools.ints([-1, ...ones])])]);
}

/** Takes from [n, tasks · q, …] the q channels of each row's own task: row i of n is one of task ⌊i · tasks / n⌋. */
function ownChannels(
  tools: GraphTools,
  place: Place,
  all: string,
  { flat, positions, q }: Readonly<Record<"flat" | "positions" | "q", string>>,
): string {
  const blocks = place.op("Concat", [tools.ints([-1]), q, positions], { axis: 0 });
  const scalar = (value: string): string => place.op("Squeeze", [value]);
  const n = scalar(place.op("Slice", [flat, tools.ints([0]), tools.ints([1])]));
  const tasks = scalar(tools.tasks());
  const zero = scalar(tools.ints([0]));
  const from = place.op("Range", [zero, place.op("Mul", [n, tasks]), tasks]);
  const index = place.op("Add", [from, place.op("Div", [from, n])]);
  return place.op("Gather", [place.op("Reshape", [all, blocks]), index], { axis: 0 });
}

// ---- tables

function addTable(tools: GraphTools, module: AdaptedLayer): void {
  const { name, in: rows, out, components, sites } = module;
  const { core, A, B, scale } = inputsOf(tools, module);
  const at = (what: string): string => `${PREFIX}/${name}/${what}`;
  const EA =
    components &&
    tools.add(at("E_A"), [rows, components.A.rows], transpose(components.A.floats(), components.A.rows, rows));
  const EB = components && tools.add(at("E_B"), [components.B.rows, out], components.B.floats());
  for (const { graph, node, x: ids, type } of sites) {
    const place = tools.place(name, graph, node, type);
    const y = place.begin();
    // [batch, sequence, …] multiplies with [tasks, …] as it is; but factors look up their rows by task.
    const asIs = A === undefined && tools.rank(graph, ids) === 2;
    const byTask = (value: string, width: number): string => (asIs ? value : tools.rowsOf(place, value, width));
    const terms: string[] = [];
    if (A !== undefined && B !== undefined) terms.push(place.op("MatMul", [ownRows(tools, place, A, ids, rows), B]));
    if (core !== undefined && components) {
      const found = byTask(place.op("Gather", [EA!, ids], { axis: 0 }), components.A.rows);
      terms.push(place.op("MatMul", [place.op("MatMul", [found, core]), EB!]));
    }
    const term = terms.length === 2 ? place.op("Add", terms) : terms[0]!;
    const asY = (value: string): string => (asIs ? value : place.op("Reshape", [value, place.op("Shape", [y])]));
    if (scale === undefined) place.end(place.op("Add", [y, place.down(asY(term))]));
    else {
      const sum = place.op("Add", [byTask(place.up(y), out), term]);
      place.end(place.down(asY(place.op("Mul", [sum, scale]))));
    }
  }
}

/** Rows of A [tasks, rows, q] as [tasks, ids / tasks, q], each of its own task. */
function ownRows(tools: GraphTools, place: Place, A: string, ids: string, rows: number): string {
  const at = (what: string): string => `${PREFIX}/table/${what}`;
  const scalar = (name: string, value: string): string => tools.first(at(name), "Squeeze", [value]);
  const tasks = scalar("tasks", tools.tasks());
  const range = tools.first(at("range"), "Range", [
    scalar("zero", tools.ints([0])),
    tasks,
    scalar("one", tools.ints([1])),
  ]);
  const column = tools.first(at("column"), "Reshape", [range, tools.ints([-1, 1])]);
  const first = tools.first(at(`first/${rows}`), "Mul", [column, tools.ints([rows])]);
  const q = tools.dims("q", A, 2, 3);
  const shape = tools.first(`${A}/shape`, "Concat", [tools.ints([-1]), q], { axis: 0 });
  const table = tools.first(`${A}/table`, "Reshape", [A, shape]);
  // An index may count from the end.
  const within = place.op("Mod", [place.op("Cast", [ids], { to: INT64 }), tools.ints([rows])]);
  const byTask = place.op("Reshape", [
    within,
    tools.first(at("ids"), "Concat", [tools.tasks(), tools.ints([-1])], { axis: 0 }),
  ]);
  return place.op("Gather", [table, place.op("Add", [byTask, first])], { axis: 0 });
}

// ---- vectors

export function addVector(tools: GraphTools, { name, size, places }: AdaptedVector): void {
  const change = tools.input(name, "bias", [1, size]);
  for (const found of places) {
    const place = tools.place(name, found.graph, found.node, found.type);
    if (found.kind === "weight") scaleDifferently(tools, place, size, found, change);
    else {
      const y = place.begin();
      const column = tools.first(`${change}/column`, "Reshape", [change, tools.ints([0, 1, size, 1])]);
      const flat = place.op("Shape", [place.op("Reshape", [y, tools.ints([0, size, -1])])]);
      const positions = place.op("Slice", [flat, tools.ints([2]), tools.ints([3])]);
      const shape = place.op("Concat", [tools.tasks(), tools.ints([-1, size]), positions], { axis: 0 });
      const sum = place.op("Add", [place.op("Reshape", [place.up(y), shape]), column]);
      place.end(place.down(place.op("Reshape", [sum, place.op("Shape", [y])])));
    }
  }
}

/** y + x̂ · (w − w_base): the base's own numbers are not touched, and a weight of zero can become another. */
function scaleDifferently(
  tools: GraphTools,
  place: Place,
  size: number,
  { graph, op, input }: VectorPlace,
  change: string,
): void {
  const plain = op.opType === "Mul" ? place.up(op.input[1 - input]!) : normalised(tools, place, op, input, size);
  const y = place.begin();
  const rank = tools.rank(graph, op.input[op.opType === "Mul" ? 1 - input : 0]!);
  const x = rank === 3 ? plain : tools.rowsOf(place, plain, size);
  const term = place.op("Mul", [x, change]);
  const back = rank === 3 ? term : place.op("Reshape", [term, place.op("Shape", [y])]);
  place.end(place.op("Add", [y, place.down(back)]));
}

/** The normalisation once more in f32, with ones for its weight and without what is added behind. */
function normalised(tools: GraphTools, place: Place, op: NodeProto, input: number, size: number): string {
  const ones = tools.add(`${PREFIX}/ones/${size}`, [size], new Float32Array(size).fill(1));
  const inputs = op.input.flatMap((value, i) => {
    if (i === input) return [ones];
    // The bias follows the weight; a Skip…'s third addend behind it is a part of the normalised sum.
    const dropped = i === input + 1 && op.opType !== "SkipSimplifiedLayerNormalization";
    return [dropped || value === "" ? "" : place.up(value)];
  });
  while (inputs.at(-1) === "") inputs.pop();
  return place.like(op, inputs);
}
