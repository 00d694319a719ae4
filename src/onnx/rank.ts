/**
 * Ranks of values, as far as the nodes before them tell. No shape inference: one number, for the operators between a transformer's inputs
 * and its linear layers. Unknown ranks are undefined.
 */
import { attribute, type OnnxModel } from "./model.ts";
import type { NodeProto, ValueInfoProto } from "./protobuf.ts";

/** Operators whose result has as many dimensions as their first input. */
const KEEPS = new Set([
  ...[
    "Cast",
    "Identity",
    "Relu",
    "Gelu",
    "Erf",
    "Tanh",
    "Sigmoid",
    "Softmax",
    "Sqrt",
    "Neg",
    "Dropout",
    "Transpose",
    "Clip",
  ],
  ...["LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization"],
  ...[
    "SkipSimplifiedLayerNormalization",
    "GroupQueryAttention",
    "MultiHeadAttention",
    "Split",
    "QuantizeLinear",
    "DequantizeLinear",
    "DynamicQuantizeLinear",
    "LeakyRelu",
  ],
  ...["QuickGelu", "FastGelu", "BiasGelu", "MatMulNBits", "Reciprocal", "Slice", "Concat", "Softplus", "Mod", "Abs"],
]);

/** Operators that broadcast their inputs. */
const BROADCASTS = new Set(["Add", "Sub", "Mul", "Div", "Pow", "Where", "Max", "Min", "Sum"]);

/** Most nested Concats that are followed. */
const DEEPEST_SHAPE = 8;

/** Ranks of the values of a model's main graph. */
export class Ranks {
  readonly #model: OnnxModel;
  readonly #known = new Map<string, number | undefined>();
  /** Number of elements of values that are shapes. */
  readonly #lengths = new Map<string, number | undefined>();

  constructor(model: OnnxModel) {
    this.#model = model;
    const { input, valueInfo } = model.graph.proto;
    for (const info of [...input, ...valueInfo]) {
      const rank = declaredRank(info);
      if (rank !== undefined) this.#known.set(info.name, rank);
    }
    for (const [name, { dims }] of model.graph.initializers) this.#known.set(name, dims.length);
  }

  /** Rank of a value; undefined where it cannot be told. */
  of(value: string): number | undefined {
    // A loop rather than recursion: models are thousands of nodes deep. A value met again while it waits lies on a circle, which only a
    // damaged file has.
    const waiting = new Set<string>();
    const pending = [value];
    for (let name = pending.at(-1); name !== undefined; name = pending.at(-1)) {
      const node = this.#known.has(name) ? undefined : this.#model.graph.producers.get(name);
      if (node && !waiting.has(name)) {
        waiting.add(name);
        for (const input of inputsOf(node)) if (input !== "" && !waiting.has(input)) pending.push(input);
        continue;
      }
      if (!this.#known.has(name)) this.#known.set(name, node && this.#rank(node));
      pending.pop();
    }
    return this.#known.get(value);
  }

  #rank(node: NodeProto): number | undefined {
    const ranks = inputsOf(node).map((input) => this.#known.get(input));
    const [first, second] = ranks;
    if (KEEPS.has(node.opType)) return first;
    if (BROADCASTS.has(node.opType)) {
      return ranks.reduce((a, b) => (a === undefined || b === undefined ? undefined : Math.max(a, b)), 0);
    }
    switch (node.opType) {
      case "MatMul":
      case "MatMulInteger":
        if (first === undefined || second === undefined || first < 2 || second < 2) return undefined;
        return Math.max(first, second);
      case "Gemm":
        return 2;
      case "Shape":
      case "Range":
        return 1;
      case "Constant":
        return attribute(node, "value")?.t?.dims.length;
      case "ReduceMean":
        return attribute(node, "keepdims")?.i === 0n ? undefined : first;
      case "Unsqueeze": {
        const axes = attribute(node, "axes")?.ints.length ?? this.#elements(node.input[1] ?? "");
        return first === undefined || axes === undefined ? undefined : first + axes;
      }
      case "Gather":
        return first === undefined || second === undefined ? undefined : first - 1 + second;
      case "Reshape":
        return this.#elements(node.input[1] ?? "");
      default:
        return undefined;
    }
  }

  /** Number of elements of a shape, made by a few Concats at most. */
  #elements(value: string, depth = 0): number | undefined {
    if (!this.#lengths.has(value)) this.#lengths.set(value, this.#lengthOf(value, depth));
    return this.#lengths.get(value);
  }

  #lengthOf(value: string, depth: number): number | undefined {
    const { initializers, producers } = this.#model.graph;
    const node = producers.get(value);
    const constant = node?.opType === "Constant" ? attribute(node, "value")?.t : undefined;
    const { dims } = initializers.get(value) ?? constant ?? {};
    if (dims) return dims.length === 1 ? Number(dims[0]) : undefined;
    if (node?.opType !== "Concat" || depth > DEEPEST_SHAPE) return undefined;
    let sum = 0;
    for (const input of node.input) {
      const part = producers.get(input)?.opType === "Unsqueeze" ? 1 : this.#elements(input, depth + 1);
      if (part === undefined) return undefined;
      sum += part;
    }
    return sum;
  }
}

/** Inputs that decide the rank. */
function inputsOf({ opType, input }: NodeProto): readonly string[] {
  if (BROADCASTS.has(opType)) return input;
  if (opType === "Reshape" || opType === "Gemm") return [];
  return KEEPS.has(opType) ? input.slice(0, 1) : input.slice(0, 2);
}

function declaredRank({ type }: ValueInfoProto): number | undefined {
  return type?.value.case === "tensorType" ? type.value.value.shape?.dim.length : undefined;
}
