/**
 * Gives a model what is to be trained: low-rank terms beside its linear layers, and heads in the place of its own. Unlike
 * `graft`, whose inputs bring one finished task per row of a batch, this computes one task from its parameters inside the
 * graph, so that gradients reach these. With x the rows that enter a layer:
 *
 *     core     d = ((x·E_Aᵀ)·S)·E_B,  S = [alphaA | 1]ᵀ·[alphaB | 1]   alphaA [rank, K_A], alphaB [rank, K_B]
 *     factors  d = (x·Aᵀ)·B                                            A [rank, in], B [rank, out]
 *
 * A column of ones stands only where the last component is a mean. Rows of B are columns of the adapter's B, with the scale
 * inside, as everywhere in this package. All parameters of terms are one flat input, since many small ones are slow.
 */
import type { Added, Components, GraftHead } from "../onnx/graft.ts";
import { biasAdd, FLOAT, FLOAT16, type Linear } from "../onnx/linear.ts";
import type { OnnxModel } from "../onnx/model.ts";
import { makeFloats, makeInts, makeNode, makeValue, Place, PREFIX, type Attributes } from "../onnx/nodes.ts";
import type { NodeProto } from "../onnx/onnx_pb.ts";
import type { Problems } from "./problems.ts";

/** Coefficients over components. */
export interface CoreTerm {
  /** Rows of coefficients on each side. */
  readonly rank: number;
  /** Of both sides, the mean last where there is one. */
  readonly components: Components;
  /** Whether the last component is a mean, which every row takes once. */
  readonly mean: { readonly A: boolean; readonly B: boolean };
  /** Whether the components (and means) are trained too. Then they are parameters, and `components` gives their number. */
  readonly trainsComponents?: boolean;
}

/** A linear layer that gets terms. */
export interface TrainedModule {
  readonly name: string;
  readonly in: number;
  readonly out: number;
  /** Every place where the model applies the weight. */
  readonly linears: readonly Linear[];
  readonly core?: CoreTerm | undefined;
  /** Rank of factors that are trained themselves: a LoRA, or free terms beside a core. */
  readonly factors?: number | undefined;
}

/** What to train. */
export interface Targets {
  readonly modules: readonly TrainedModule[];
  /** Layers that are trained whole, with any number of labels: `out` is the model's own. */
  readonly heads: readonly GraftHead[];
}

/** One matrix in the flat input. Components lie there as rows, [K_A, in] and [K_B, out]. */
export interface TrainedParameter {
  readonly module: string;
  readonly kind: "alphaA" | "alphaB" | "componentsA" | "componentsB" | "A" | "B";
  readonly dims: readonly [rows: number, columns: number];
  /** Of its first element in the flat input. */
  readonly offset: number;
}

/** Inputs and gradients of one head: weight [labels, in], bias [labels]. */
export interface HeadNames {
  readonly module: string;
  readonly in: number;
  readonly weight: string;
  readonly bias: string | undefined;
}

/** What `addTargets` has made of the model. */
export interface AddedTargets {
  readonly parameters: readonly TrainedParameter[];
  /** Elements of the flat input; 0: there is none. */
  readonly size: number;
  readonly heads: readonly HeadNames[];
  readonly initializers: readonly Added[];
  /** The values that are trained: parameters in order, then weight and bias of each head. */
  readonly sources: readonly string[];
}

/** Name of the flat input. */
export const PARAMETERS: string = `${PREFIX}.parameters`;

/**
 * Changes `model.proto` in place.
 * @param problems gets layers that cannot be added to
 */
export function addTargets(model: OnnxModel, { modules, heads }: Targets, problems: Problems): AddedTargets {
  const adder = new Adder(model, problems);
  for (const module of modules) adder.module(module);
  for (const head of heads) adder.head(head);
  return adder.finish();
}

class Adder {
  readonly #model: OnnxModel;
  readonly #problems: Problems;
  readonly #parameters: (TrainedParameter & { value: string })[] = [];
  readonly #heads: HeadNames[] = [];
  readonly #added: Added[] = [];
  /** Nodes that depend on parameters only; they go first. */
  readonly #first: NodeProto[] = [];
  #size = 0;
  #count = 0;

  constructor(model: OnnxModel, problems: Problems) {
    this.#model = model;
    this.#problems = problems;
  }

  module({ name, in: inputs, out, linears, core, factors = 0 }: TrainedModule): void {
    if (linears.map((linear) => this.#canAdd(linear)).includes(false)) return;
    /** The matrices that x is multiplied by, one after the other. */
    const chains: string[][] = [];
    if (core) chains.push(this.#core(name, inputs, out, core));
    if (factors > 0) {
      const A = this.#parameter(name, "A", factors, inputs);
      const B = this.#parameter(name, "B", factors, out);
      chains.push([this.#before("Transpose", [A], { perm: [1, 0] }), B]);
    }
    for (const linear of linears) {
      const end = biasAdd(this.#model, linear) ?? linear.node;
      const place = new Place(linear.graph, end, `${PREFIX}/${name}/${this.#count++}`, linear.type);
      const terms = chains.map((chain) => chain.reduce((value, matrix) => place.op("MatMul", [value, matrix]), linear.x));
      if (terms.length === 0) continue;
      const term = terms.reduce((a, b) => place.op("Add", [a, b]));
      place.end(place.op("Add", [place.begin(), term]));
    }
  }

  /** x·E_Aᵀ, then ·S, then ·E_B */
  #core(name: string, inputs: number, out: number, { rank, components, mean, trainsComponents }: CoreTerm): string[] {
    const { KA, KB, At, B } = components;
    const side = (kind: "alphaA" | "alphaB", columns: number, hasMean: boolean): string => {
      const alpha = this.#parameter(name, kind, rank, columns - Number(hasMean));
      return hasMean ? this.#before("Concat", [alpha, this.#ones(rank)], { axis: 1 }) : alpha;
    };
    const [a, b] = [side("alphaA", KA, mean.A), side("alphaB", KB, mean.B)];
    const S = this.#before("Gemm", [a, b], { transA: 1 });
    if (trainsComponents) {
      const A = this.#parameter(name, "componentsA", KA, inputs);
      return [this.#before("Transpose", [A], { perm: [1, 0] }), S, this.#parameter(name, "componentsB", KB, out)];
    }
    const [left, right] = [`${PREFIX}/${name}/E_A`, `${PREFIX}/${name}/E_B`];
    this.#added.push({ name: left, dims: [inputs, KA], data: At }, { name: right, dims: [KB, out], data: B });
    return [left, S, right];
  }

  head({ name, in: inputs, bias: hasBias, places }: GraftHead): void {
    if (places.map(({ linear }) => this.#canAdd(linear)).includes(false)) return;
    const weight = `${PREFIX}.${name}.weight`;
    const bias = hasBias ? `${PREFIX}.${name}.bias` : undefined;
    this.#heads.push({ module: name, in: inputs, weight, bias });
    const turned = this.#before("Transpose", [weight], { perm: [1, 0] });
    for (const { linear, end } of places) {
      const place = new Place(linear.graph, end, `${PREFIX}/${name}/${this.#count++}`, linear.type);
      const y = place.op("MatMul", [linear.x, turned]);
      place.replace(bias === undefined ? y : place.op("Add", [y, bias]));
    }
  }

  #canAdd({ node, graph, type }: Linear): boolean {
    const inside = graph !== this.#model.graph.proto;
    if (inside) this.#problems.node(node, "is trained inside control flow, which gradients do not pass");
    if (type === FLOAT16) this.#problems.node(node, "computes in float16, whose gradients would vanish (export in float32)");
    return !inside && type !== FLOAT16;
  }

  #parameter(module: string, kind: TrainedParameter["kind"], rows: number, columns: number): string {
    const [offset, size] = [this.#size, rows * columns];
    this.#size += size;
    const name = `${PREFIX}/${module}/${kind}`;
    this.#parameters.push({ module, kind, dims: [rows, columns], offset, value: name });
    const part = this.#before("Slice", [PARAMETERS, this.#ints([offset]), this.#ints([this.#size])]);
    this.#first.push(makeNode("Reshape", name, [part, this.#ints([rows, columns])], name));
    return name;
  }

  #before(opType: string, input: readonly string[], attributes: Attributes = {}): string {
    const name = `${PREFIX}/parameters/${opType}_${this.#first.length}`;
    this.#first.push(makeNode(opType, name, input, name, attributes));
    return name;
  }

  #ones(rows: number): string {
    return this.#constant(`ones/${rows}`, (name) => makeFloats(name, Array<number>(rows).fill(1), [rows, 1]));
  }

  #ints(values: readonly number[]): string {
    return this.#constant(`ints/${values.join(",")}`, (name) => makeInts(name, values));
  }

  #constant(of: string, make: (name: string) => ReturnType<typeof makeInts>): string {
    const name = `${PREFIX}/parameters/${of}`;
    const { initializer } = this.#model.graph.proto;
    if (!initializer.some((tensor) => tensor.name === name)) initializer.push(make(name));
    return name;
  }

  finish(): AddedTargets {
    const { node, input, valueInfo } = this.#model.graph.proto;
    // In front, so that what uses them comes later, as ONNX asks.
    node.unshift(...this.#first);
    if (this.#size > 0) input.push(makeValue(PARAMETERS, FLOAT, [this.#size]));
    for (const { weight, bias, in: inputs } of this.#heads) {
      input.push(makeValue(weight, FLOAT, [`${PREFIX}.labels`, inputs]));
      if (bias !== undefined) input.push(makeValue(bias, FLOAT, [`${PREFIX}.labels`]));
    }
    // Shapes that were written down no longer hold.
    valueInfo.length = 0;
    const heads = this.#heads.flatMap(({ weight, bias }) => (bias === undefined ? [weight] : [weight, bias]));
    return {
      parameters: this.#parameters.map(({ value: _, ...parameter }) => parameter),
      size: this.#size,
      heads: this.#heads,
      initializers: this.#added,
      sources: [...this.#parameters.map(({ value }) => value), ...heads],
    };
  }
}
