/**
 * Uses of weights that are no linear layers but can be adapted: convolutions, tables of embeddings, weights of
 * normalisations, biases of convolutions; how they are found, and the graph surgery next to them. The base's nodes stay
 * as they are, quantised or not, and what is added is zero without a task. Loaded only for packs with such modules.
 *
 * A convolution, with x [n, channels, …], y [n, out, …] and S positions of y, whose batch comes first:
 *
 *     h  = Conv(x; E_A [K_A, channels, …]), as [tasks, n / tasks, K_A, S]
 *     d  = E_Bᵀ · coreᵀ · h
 *     y' = y + reshape(d, shape of y)
 *
 * Factors: one Conv with the A of all tasks gives [n, tasks · q, …], and each row takes the q channels of its own task.
 *
 * A table: rows of E_Aᵀ [vocabulary, K_A] are looked up, then as in a linear layer. A normalisation: y' = y + x̂·(w −
 * w_base), where x̂ is what it makes with ones for its weight.
 */
import { transpose } from "../tensor/term.ts";
import type { Injector } from "./inject.ts";
import type * as linear from "./linear.ts";
import { dynamic, FLOAT, FLOAT16, INT64, onlyConsumer, quantized, requantized, typeOf } from "./linear.ts";
import { intOf, type OnnxModel, type Use } from "./model.ts";
import type { OnnxParameter } from "./modules.ts";
import type { Operand, Place } from "./nodes.ts";
import type { NodeProto } from "./protobuf.ts";

/**
 * @returns the kind of a layer that is not linear, and its applications; the reason where a use of the weight cannot be
 *   adapted
 */
export function formOf(
  model: OnnxModel,
  { uses, copies, initializer, shape }: OnnxParameter,
): Pick<linear.AdaptedLayer, "kind" | "shape" | "sites"> | string {
  const all = [uses, ...copies.map((copy) => copy.uses)].flat().filter(readsValues);
  if (all.length === 0) return `nothing in the graph uses "${initializer}"`;
  const kind = all[0]!.node.opType.startsWith("Gather") ? "embedding" : "convolution";
  const sites: linear.Site[] = [];
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

function convolutionOf(model: OnnxModel, use: Use): linear.Site | string {
  const { node: op, graph, input } = use;
  const groups = intOf(op, "group", 1);
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

function tableOf(model: OnnxModel, use: Use): linear.Site | string {
  const { node: op, graph, input } = use;
  const axis = intOf(op, op.opType === "Gather" ? "axis" : "gather_axis");
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
export function vectorOf(
  model: OnnxModel,
  name: string,
  { shape, uses }: OnnxParameter,
): linear.AdaptedVector | undefined {
  const [size] = shape;
  if (shape.length !== 1 || size === undefined || uses.length === 0) return undefined;
  const places: linear.VectorPlace[] = [];
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

export function addModule(tools: Injector, module: linear.AdaptedLayer): void {
  if (module.kind === "embedding") addTable(tools, module);
  else addConvolution(tools, module);
}

/** The inputs of a module, made once for all of its places. */
function inputsOf(tools: Injector, module: linear.AdaptedLayer) {
  const { name, components } = module;
  const KA = components?.A.rows ?? 0;
  const KB = components?.B.rows ?? 0;
  const cores = [{ module: name, row: 0, column: 0, KA, KB }];
  const core = components && { ...components, KA, KB, input: tools.input(name, "core", [KA, KB], { cores }) };
  return { core, ...tools.factorInputs(module) };
}

function sumOf(place: Place, terms: readonly string[]): string {
  return terms.reduce((a, b) => place.add(a, b));
}

// ---- convolutions

/** Attributes of a convolution that hold for the term's too. */
const GEOMETRY = /^(auto_pad|dilations|kernel_shape|pads|strides)$/;

/** Reads values like y [n, channels, …], whose batch comes first. */
function channelsOf(tools: Injector, place: Place, y: string, channels: number) {
  const flat = place.shapeOf(place.reshape(y, [0, channels, -1]));
  const positions = place.slice(flat, 0, 2, 3);
  /** [n, channels, …] as [tasks, n / tasks, channels, S]. */
  const byTask = (value: string, channels: Operand): string =>
    place.reshape(value, place.concat([tools.tasks(), [-1], channels, positions], 0));
  return { flat, positions, byTask };
}

function addConvolution(tools: Injector, module: linear.AdaptedLayer): void {
  const { name, out, shape } = module;
  const kernel = shape!.slice(1);
  const { core, A, B, scale } = inputsOf(tools, module);
  const turned = (value: string): string => tools.transpose(value, [0, 2, 1]);
  const scales = scale && tools.reshape(scale, [0, 1, out, 1]);
  const own = A !== undefined &&
    B !== undefined && {
      A: tools.reshape(turned(A), [-1, ...kernel]),
      B: tools.reshape(turned(B), [0, 1, out, -1]),
      q: tools.dims(A, 2, 3),
    };
  const shared = core && {
    EA: tools.tensor(`${name}/E_A`, FLOAT, [core.KA, ...kernel], () => core.A.floats()),
    EB: tools.tensor(`${name}/E_B`, FLOAT, [out, core.KB], () => transpose(core.B.floats(), core.KB, out)),
    core: tools.reshape(turned(core.input), [0, 1, core.KB, core.KA]),
  };
  for (const { graph, node, x, type, bias, product } of module.sites) {
    const op = product!;
    const geometry = op.attribute.filter((one) => GEOMETRY.test(one.name));
    const place = tools.place(name, graph, node, type);
    // DoRA scales y without its bias.
    const apart = scales !== undefined && bias !== undefined;
    if (apart) op.input.length = 2;
    const entering = place.up(x);
    const y = place.begin();
    const { flat, positions, byTask } = channelsOf(tools, place, y, out);
    const conv = (weight: string): string =>
      place.like(op, [entering, weight], { opType: "Conv", domain: "", attribute: geometry });
    const terms: string[] = [];
    if (own) {
      // Each row of [n, tasks · q, …] takes the q channels of its own task: row i of n is one of task ⌊i · tasks / n⌋.
      const n = place.op("Squeeze", place.slice(flat, 0, 0, 1));
      const tasks = place.op("Squeeze", tools.tasks());
      const from = place.op("Range", place.int(0), place.mul(n, tasks), tasks);
      const blocks = place.reshape(conv(own.A), place.concat([[-1], own.q, positions], 0));
      const rows = place.gather(blocks, place.add(from, place.div(from, n)));
      terms.push(place.matMul(own.B, byTask(rows, own.q)));
    }
    if (shared) {
      const mixed = place.matMul(shared.core, byTask(conv(shared.EA), [core!.KA]));
      terms.push(place.matMul(shared.EB, mixed));
    }
    const shapes = {
      byTask: (value: string) => byTask(value, [out]),
      asY: (sum: string) => place.reshape(sum, place.shapeOf(y)),
    };
    const added = apart ? place.reshape(place.up(bias), [-1, ...kernel.slice(1).map(() => 1)]) : undefined;
    tools.endWith(place, y, sumOf(place, terms), shapes, scales, added);
  }
}

// ---- tables

function addTable(tools: Injector, module: linear.AdaptedLayer): void {
  const { name, in: rows, out, sites } = module;
  const { core, A, B, scale } = inputsOf(tools, module);
  const shared = core && {
    EA: tools.tensor(`${name}/E_A`, FLOAT, [rows, core.KA], () => transpose(core.A.floats(), core.KA, rows)),
    EB: tools.tensor(`${name}/E_B`, FLOAT, [core.KB, out], () => core.B.floats()),
  };
  for (const { graph, node, x: ids, type } of sites) {
    const place = tools.place(name, graph, node, type);
    const y = place.begin();
    // [batch, sequence, …] multiplies with [tasks, …] as it is; but factors look up their rows by task.
    const asIs = A === undefined && tools.rank(graph, ids) === 2;
    const byTask = (value: string, width: number): string => (asIs ? value : tools.rowsOf(place, value, width));
    const terms: string[] = [];
    if (A !== undefined && B !== undefined) terms.push(place.matMul(ownRows(tools, place, A, ids, rows), B));
    if (shared) {
      const found = byTask(place.gather(shared.EA, ids), core!.KA);
      terms.push(place.matMul(place.matMul(found, core!.input), shared.EB));
    }
    const asY = (sum: string): string => (asIs ? sum : place.reshape(sum, place.shapeOf(y)));
    tools.endWith(place, y, sumOf(place, terms), { byTask: (value) => byTask(value, out), asY }, scale);
  }
}

/** Rows of A [tasks, rows, q] as [tasks, ids / tasks, q], each of its own task. */
function ownRows(tools: Injector, place: Place, A: string, ids: string, rows: number): string {
  const range = tools.range(tools.op("Squeeze", tools.tasks()));
  const first = tools.mul(tools.reshape(range, [-1, 1]), [rows]);
  const table = tools.reshape(A, tools.concat([[-1], tools.dims(A, 2, 3)], 0));
  // An index may count from the end.
  const within = place.op("Mod", place.cast(ids, INT64), [rows]);
  const byTask = place.reshape(within, tools.concat([tools.tasks(), [-1]], 0));
  return place.gather(table, place.add(byTask, first));
}

// ---- vectors

export function addVector(tools: Injector, { name, size, places }: linear.AdaptedVector): void {
  const change = tools.input(name, "bias", [1, size]);
  for (const found of places) {
    const place = tools.place(name, found.graph, found.node, found.type);
    if (found.kind === "weight") scaleDifferently(tools, place, size, found, change);
    else {
      const y = place.begin();
      const sum = place.add(
        channelsOf(tools, place, y, size).byTask(place.up(y), [size]),
        tools.reshape(change, [0, 1, size, 1]),
      );
      place.end(place.down(place.reshape(sum, place.shapeOf(y))));
    }
  }
}

/** y + x̂ · (w − w_base): the base's own numbers are not touched, and a weight of zero can become another. */
function scaleDifferently(
  tools: Injector,
  place: Place,
  size: number,
  { graph, op, input }: linear.VectorPlace,
  change: string,
): void {
  const plain = op.opType === "Mul" ? place.up(op.input[1 - input]!) : normalised(tools, place, op, input, size);
  const y = place.begin();
  const rank = tools.rank(graph, op.input[op.opType === "Mul" ? 1 - input : 0]!);
  const x = rank === 3 ? plain : tools.rowsOf(place, plain, size);
  const term = place.mul(x, change);
  const back = rank === 3 ? term : place.reshape(term, place.shapeOf(y));
  place.end(place.add(y, place.down(back)));
}

/** The normalisation once more in f32, with ones for its weight and without what is added behind. */
function normalised(tools: Injector, place: Place, op: NodeProto, input: number, size: number): string {
  const ones = tools.tensor(`ones/${size}`, FLOAT, [size], () => new Float32Array(size).fill(1));
  const inputs = op.input.flatMap((value, i) => {
    if (i === input) return [ones];
    // The bias follows the weight; a Skip…'s third addend behind it is a part of the normalised sum.
    const dropped = i === input + 1 && op.opType !== "SkipSimplifiedLayerNormalization";
    return [dropped || value === "" ? "" : place.up(value)];
  });
  while (inputs.at(-1) === "") inputs.pop();
  return place.like(op, inputs);
}
