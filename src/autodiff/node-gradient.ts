/**
 * One node in the backward pass: what a rule can ask about it, and where it puts the gradients of the node's inputs.
 */
import { attribute, type Graph } from "../onnx/model.ts";
import type { NodeProto } from "../onnx/protobuf.ts";
import type { Emitter, Moment } from "./emit.ts";
import { type Dims, fromFront, type Problems, type Shapes } from "./shapes.ts";

/** Rule to differentiate one operator. */
export interface Rule {
  /** Inputs that a gradient can flow to. Default: all of them. */
  readonly inputs?: readonly number[];
  /** The rule uses gradients of other outputs than the first. */
  readonly manyOutputs?: boolean;
  /** Emits the gradients of the inputs that are wanted. */
  readonly backward: (node: NodeGradient) => void;
}

/** Rule of an operator that broadcasts: gives the gradient of each input in the shape of the output. Inputs without an entry get none. */
export function broadcast(derive: Readonly<Record<number, (node: NodeGradient) => string>>): Rule {
  const inputs = Object.keys(derive).map(Number);
  return {
    inputs,
    backward(node) {
      for (const input of inputs) node.giveSummed(input, () => derive[input]!(node));
    },
  };
}

/** State of the backward walk. */
export interface Walk {
  readonly graph: Graph;
  readonly active: ReadonlySet<string>;
  readonly shapes: Shapes;
  readonly emit: Emitter;
  readonly problems: Problems;
  /** Sum of the gradients of a value so far. */
  gradient(value: string): string | undefined;
  /** Adds to the gradient of a value. */
  add(value: string, gradient: string): void;
}

export class NodeGradient {
  readonly proto: NodeProto;
  readonly emit: Emitter;
  readonly #walk: Walk;

  constructor(proto: NodeProto, walk: Walk) {
    this.proto = proto;
    this.emit = walk.emit;
    this.#walk = walk;
  }

  get graph(): Graph {
    return this.#walk.graph;
  }

  /** The first output. */
  get y(): string {
    return this.proto.output[0]!;
  }

  /** The gradient of the first output. */
  get g(): string {
    return this.#walk.gradient(this.y)!;
  }

  /** The gradient of any output; undefined where none arrived. */
  gradient(output: string): string | undefined {
    return this.#walk.gradient(output);
  }

  x(input = 0): string {
    return this.proto.input[input]!;
  }

  has(input: number): boolean {
    return (this.proto.input[input] ?? "") !== "";
  }

  wants(input: number): boolean {
    return this.has(input) && this.#walk.active.has(this.x(input));
  }

  dims(value: string): Dims {
    return this.#walk.shapes.dims(value);
  }

  rank(value: string): number {
    return this.dims(value).length;
  }

  /** Type of a value: "float32", "int64", … */
  type(value: string): string {
    return this.#walk.shapes.type(value);
  }

  /** An int64 vector of these numbers that becomes available together with this node's gradient. */
  late(numbers: readonly number[]): string {
    const { value, axis } = this.moment();
    return this.emit.late(numbers, value, axis);
  }

  /** Moment at which this node's gradient is available. */
  moment(): Moment {
    const value = this.proto.output.find((output) => this.gradient(output) !== undefined)!;
    return { value: this.gradient(value)!, axis: this.#walk.shapes.freeAxis(value) };
  }

  /** The elements of a small value that no input changes. */
  constant(value: string): readonly number[] | undefined {
    return this.#walk.shapes.constant(value);
  }

  int(name: string): number | undefined {
    const found = attribute(this.proto, name);
    return found && Number(found.i);
  }

  ints(name: string): readonly number[] | undefined {
    return attribute(this.proto, name)?.ints.map(Number);
  }

  float(name: string, otherwise: number): number {
    return attribute(this.proto, name)?.f ?? otherwise;
  }

  text(name: string): string {
    return new TextDecoder().decode(attribute(this.proto, name)?.s);
  }

  /** An axis of the attribute `axis`, counted from the front. */
  axis(otherwise: number, rank: number): number {
    return fromFront(this.int("axis") ?? otherwise, rank);
  }

  /** Gives a gradient in the shape of the input. */
  give(input: number, gradient: string): void {
    if (this.wants(input)) this.#walk.add(this.x(input), gradient);
  }

  /** Gives a gradient that has the elements of the input in another shape. */
  giveReshaped(input: number, gradient: string): void {
    if (this.wants(input)) this.give(input, this.emit.reshapeAs(gradient, this.x(input)));
  }

  /** Gives a gradient in a shape that the input was broadcast to, summed over what was repeated. */
  giveSummed(input: number, gradient: () => string, dims: Dims = this.dims(this.y)): void {
    if (this.wants(input)) this.give(input, this.summed(gradient(), dims, this.dims(this.x(input))));
  }

  /** Sums a value of dimensions `from` over the dimensions that broadcasting from `to` has repeated. */
  summed(value: string, from: Dims, to: Dims): string {
    const more = from.length - to.length;
    const leading = from.slice(0, more).map((_, axis) => axis);
    const repeated = to.flatMap((size, axis) => (size === 1 && from[more + axis] !== 1 ? [axis] : []));
    return this.emit.sum(this.emit.sum(value, leading, false), repeated, true);
  }

  /** Reports that this node cannot be differentiated as it is used here. */
  refuse(why: string): void {
    this.#walk.problems.node(this.proto, why);
  }
}
