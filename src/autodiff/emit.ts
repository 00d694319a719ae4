/**
 * Writes the nodes of training graphs: helpers of rules, and values that wait for others. Knows nothing of gradients.
 */
import { FLOAT, INT64, UINT8 } from "../onnx/linear.ts";
import { floatOf, intOf, intsOf } from "../onnx/model.ts";
import {
  type Attributes,
  Constants,
  makeNode,
  type NodeEdits,
  NodeWriter,
  type Operand,
  PREFIX,
} from "../onnx/nodes.ts";
import { create, type GraphProto, type NodeProto } from "../onnx/protobuf.ts";

/** A size, or a product of sizes that inputs have. */
export type Dimension = number | readonly { readonly input: string; readonly axis: number }[];

/**
 * The moment when a value becomes available: the gradient of a node, and one of its dimensions that only the run tells.
 */
export interface Moment {
  readonly value: string;
  readonly axis: number | undefined;
}

/** A node, and what is written about it. */
export class OperatorNode {
  readonly proto: NodeProto;
  readonly emit: Emitter;

  constructor(proto: NodeProto, emit: Emitter) {
    this.proto = proto;
    this.emit = emit;
  }

  x(input = 0): string {
    return this.proto.input[input]!;
  }

  has(input: number): boolean {
    return (this.proto.input[input] ?? "") !== "";
  }

  int(name: string, otherwise = 0): number {
    return intOf(this.proto, name, otherwise);
  }

  ints(name: string): readonly number[] | undefined {
    return intsOf(this.proto, name);
  }

  float(name: string, otherwise: number): number {
    return floatOf(this.proto, name, otherwise);
  }
}

export class Emitter extends NodeWriter {
  /** Nodes that belong among the model's own: shapes that nothing else tells. */
  readonly shapes: NodeProto[] = [];
  /** Moment at which each node is needed. */
  readonly moments: Map<NodeProto, Moment> = new Map();
  moment: Moment | undefined;
  /** Blocks of integers are unpacked by onnxruntime's own operator. */
  gathers = false;
  /** Factors of the dimensions of the model's own values, where they are known. */
  dimensions: ((value: string) => readonly Dimension[] | undefined) | undefined;
  readonly #own = new Set<string>();
  /** Names of `shapes`. */
  readonly #asked = new Set<string>();

  /** @param graph gets the constants @param prefix of names */
  constructor(graph: GraphProto, opset: number, prefix = `${PREFIX}/learn`) {
    super(new Constants(graph, opset, prefix), prefix);
  }

  protected override write(
    opType: string,
    operands: readonly Operand[],
    attributes: Attributes,
    outputs: number,
  ): readonly string[] {
    const written = this.nodes.length;
    const names = super.write(opType, operands, attributes, outputs);
    const node = this.nodes[written];
    if (!node) return names;
    if (this.moment) this.moments.set(node, this.moment);
    for (const name of names) this.#own.add(name);
    return names;
  }

  /** Gives a value another name. @returns nodes to add, where none of these makes it */
  rename(value: string, name: string, nodes: readonly NodeProto[]): readonly NodeProto[] {
    const maker = nodes.find(({ output }) => output.length === 1 && output[0] === value);
    if (!maker) return [makeNode("Identity", `${PREFIX}/as/${name}`, [value], name)];
    maker.output[0] = name;
    for (const { input } of nodes) for (const [i, one] of input.entries()) if (one === value) input[i] = name;
    for (const [key, made] of this.made) if (made === value) this.made.delete(key);
    return [];
  }

  /** Replaces a node. @param write writes nodes that make its output */
  replace(edits: NodeEdits, graph: GraphProto, node: NodeProto, write: () => string): void {
    const written = this.nodes.length;
    const result = write();
    const fresh = this.nodes.slice(written);
    // An earlier node may compute the same.
    edits.insertBefore(graph, node, [...fresh, ...this.rename(result, node.output[0]!, fresh)]);
    edits.remove(graph, node);
  }

  neg(a: Operand): string {
    return this.op("Neg", a);
  }

  /** Shape of a value. The model's own values are not asked, since they would have to be kept for that. */
  shape(value: string): string {
    if (this.#own.has(value)) return this.shapeOf(value);
    const known = this.dimensions?.(value);
    if (known) return known.length > 0 ? this.concat(this.#parts(known), 0) : this.constants.of([]);
    const shape = `${PREFIX}/shape/${value}`;
    if (!this.#asked.has(shape)) this.shapes.push(makeNode("Shape", shape, [value], shape));
    this.#asked.add(shape);
    return shape;
  }

  /** Dimensions as vectors: neighbouring fixed ones together, and each one that an input tells alone. */
  #parts(dimensions: readonly Dimension[]): Operand[] {
    const parts: (string | number[])[] = [];
    for (const dimension of dimensions) {
      const last = parts.at(-1);
      if (typeof dimension !== "number") {
        const factors = dimension.map(({ input, axis }) => this.slice(this.shapeOf(input), 0, axis, axis + 1));
        parts.push(factors.reduce((a, b) => this.mul(a, b)));
      } else if (Array.isArray(last)) last.push(dimension);
      else parts.push([dimension]);
    }
    return parts;
  }

  reshapeAs(value: string, like: string): string {
    return this.reshape(value, this.shape(like));
  }

  zerosLike(value: string): string {
    return this.op("Expand", 0, this.shape(value));
  }

  /** Size of one dimension, an int64 scalar. */
  size(value: string, axis: number): string {
    return this.gather(this.shape(value), this.int(axis));
  }

  toFloat(value: string): string {
    return this.cast(value, FLOAT);
  }

  unsqueeze(value: string, axes: readonly number[]): string {
    return axes.length === 0 ? value : this.op("Unsqueeze", value, axes);
  }

  sum(value: string, axes: readonly number[], keepdims: boolean): string {
    return axes.length === 0 ? value : this.op("ReduceSum", value, axes, { keepdims: Number(keepdims) });
  }

  mean(value: string, axes: readonly number[]): string {
    return this.#reduce("ReduceMean", value, axes);
  }

  max(value: string, axes: readonly number[]): string {
    return this.#reduce("ReduceMax", value, axes);
  }

  #reduce(opType: string, value: string, axes: readonly number[]): string {
    if (this.constants.opset >= 18) return this.op(opType, value, axes, { keepdims: 1 });
    return this.op(opType, value, { axes, keepdims: 1 });
  }

  /**
   * An int64 vector of these numbers. The runtime learns its numbers and its length only once `value` is there.
   *
   * A tensor with a shape of unknown length has unknown rank. onnxruntime then skips its search for reusable memory
   * while it loads the graph: that search compares every value of known rank with all values needed before. It skips
   * scalars, too, so the number that this begins with is one.
   * @param axis of a dimension of `value` that only the run tells, if any; it is read where `gathers` is set
   */
  late(numbers: readonly number[], value: string, axis?: number): string {
    const zero = this.mul(this.#someNumber(value, axis), [0]);
    return this.op("Slice", numbers, zero, [numbers.length], [0]);
  }

  /** Any int64 scalar that is known only once `value` is there. */
  #someNumber(value: string, axis: number | undefined): string {
    // WebGPU does not compute Size, so the whole value would be copied to the processor.
    if (!this.gathers) return this.op("Size", value);
    if (axis !== undefined) return this.gather(this.shapeOf(value), this.int(axis));
    // Where all sizes are fixed an element is read instead, since runtimes compute what they can when they load; 0
    // stands behind it, for where there are no elements.
    const first = this.slice(this.reshape(value, [-1]), 0, 0, 1);
    const orZero = this.concat([first, this.op("Unsqueeze", 0, [0])], 0);
    return this.cast(this.gather(orZero, this.int(0)), INT64);
  }

  byte(value: number): string {
    return this.constants.add(`byte/${value}`, (name) =>
      create("TensorProto", { name, dataType: UINT8, rawData: Uint8Array.of(value) }),
    );
  }
}
