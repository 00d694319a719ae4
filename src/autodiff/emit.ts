/**
 * Writes nodes of standard operators in the form that the model's opset needs. A node is never written twice. Knows nothing of gradients.
 */
import { FLOAT, INT64, UINT8 } from "../onnx/linear.ts";
import { type Attributes, makeFloats, makeInts, makeNode, PREFIX } from "../onnx/nodes.ts";
import { create, type GraphProto, type NodeProto, TensorProtoSchema } from "../onnx/protobuf.ts";

/** A value by name, or a number as a constant. */
export type Operand = string | number;

/**
 * Most inputs of one Concat. WebGPU allows a shader eight storage buffers, and onnxruntime-web 1.30's older build does not
 * check it: a Concat of 24 tensors gives garbage without an error.
 */
const CONCAT_INPUTS = 6;

/** A size, or a product of sizes that inputs have. */
export type Dimension = number | readonly { readonly input: string; readonly axis: number }[];

/** The moment when a value becomes available: the gradient of a node, and one of its dimensions that only the run tells. */
export interface Moment {
  readonly value: string;
  readonly axis: number | undefined;
}

export class Emitter {
  /** Nodes in the order in which they must run. */
  readonly nodes: NodeProto[] = [];
  /** Nodes that belong among the model's own: shapes that nothing else tells. */
  readonly shapes: NodeProto[] = [];
  /** Moment at which each node is needed. */
  readonly moments: Map<NodeProto, Moment> = new Map();
  moment: Moment | undefined;
  /** Blocks of integers are unpacked by onnxruntime's own operator. */
  gathers = false;
  /** Factors of the dimensions of the model's own values, where they are known. */
  dimensions: ((value: string) => readonly Dimension[] | undefined) | undefined;
  readonly #constants: GraphProto;
  readonly #opset: number;
  readonly #prefix: string;
  readonly #made = new Map<string, string>();
  readonly #own = new Set<string>();
  /** Names of `shapes`. */
  readonly #asked = new Set<string>();

  /**
   * @param constants graph that gets the constants as initializers
   * @param prefix of the names of written nodes and values
   */
  constructor(constants: GraphProto, opset: number, prefix = `${PREFIX}/learn`) {
    this.#constants = constants;
    this.#opset = opset;
    this.#prefix = prefix;
  }

  /** Another emitter for the same graph. */
  beside(prefix: string): Emitter {
    return new Emitter(this.#constants, this.#opset, prefix);
  }

  op(opType: string, input: readonly Operand[], attributes: Attributes = {}, domain = ""): string {
    return this.#write(opType, input, attributes, domain, 1)[0]!;
  }

  /** @returns the outputs of the node */
  #write(
    opType: string,
    input: readonly Operand[],
    attributes: Attributes,
    domain: string,
    outputs: number,
  ): readonly string[] {
    const values = input.map((one) => (typeof one === "number" ? this.float(one) : one));
    const key = JSON.stringify([opType, values, attributes]);
    const made = this.#made.get(key) ?? `${this.#prefix}/${opType}_${this.nodes.length}`;
    const names = outputs === 1 ? [made] : Array.from({ length: outputs }, (_, i) => `${made}/${i}`);
    if (!this.#made.has(key)) {
      const node = makeNode(opType, made, values, names, attributes, domain);
      this.nodes.push(node);
      if (this.moment) this.moments.set(node, this.moment);
      this.#made.set(key, made);
      for (const name of names) this.#own.add(name);
    }
    return names;
  }

  /** Splits a value along one axis into pieces of these sizes. */
  split(value: string, axis: number, sizes: readonly number[]): readonly string[] {
    return this.#write("Split", [value, this.ints(sizes)], { axis }, "", sizes.length);
  }

  /**
   * Gives a value another name: where one of these nodes makes it, by renaming.
   * @returns what has to be added to them where none does
   */
  rename(value: string, name: string, nodes: readonly NodeProto[]): readonly NodeProto[] {
    const maker = nodes.find(({ output }) => output.length === 1 && output[0] === value);
    if (!maker) return [makeNode("Identity", `${PREFIX}/as/${name}`, [value], name)];
    maker.output[0] = name;
    for (const { input } of nodes) for (const [i, one] of input.entries()) if (one === value) input[i] = name;
    for (const [key, made] of this.#made) if (made === value) this.#made.delete(key);
    return [];
  }

  add(a: Operand, b: Operand): string {
    return this.op("Add", [a, b]);
  }

  sub(a: Operand, b: Operand): string {
    return this.op("Sub", [a, b]);
  }

  mul(a: Operand, b: Operand): string {
    return this.op("Mul", [a, b]);
  }

  div(a: Operand, b: Operand): string {
    return this.op("Div", [a, b]);
  }

  neg(a: Operand): string {
    return this.op("Neg", [a]);
  }

  /** Reshapes [… , in] to [x, in]. */
  rows(value: string): string {
    return this.op("Flatten", [value], { axis: -1 });
  }

  /** Shape of a value. The model's own values are not asked, since they would have to be kept for that. */
  shape(value: string): string {
    if (this.#own.has(value)) return this.op("Shape", [value]);
    const known = this.dimensions?.(value);
    if (known) return this.concat(this.#join(known), 0);
    const shape = `${PREFIX}/shape/${value}`;
    if (!this.#asked.has(shape)) this.shapes.push(makeNode("Shape", shape, [value], shape));
    this.#asked.add(shape);
    return shape;
  }

  /** Dimensions as vectors: neighbouring fixed ones together, and each one that an input tells alone. */
  #join(dimensions: readonly Dimension[]): string[] {
    const parts: string[] = [];
    let fixed: number[] = [];
    const flush = (): void => {
      if (fixed.length > 0) parts.push(this.ints(fixed));
      fixed = [];
    };
    for (const dimension of dimensions) {
      if (typeof dimension === "number") {
        fixed.push(dimension);
        continue;
      }
      flush();
      const factors = dimension.map(({ input, axis }) => this.slice(this.op("Shape", [input]), 0, axis, axis + 1));
      parts.push(factors.reduce((a, b) => this.mul(a, b)));
    }
    flush();
    return parts.length > 0 ? parts : [this.ints([])];
  }

  /** Reshapes `value` to the shape of `like`. */
  reshapeAs(value: string, like: string): string {
    return this.op("Reshape", [value, this.shape(like)]);
  }

  zerosLike(value: string): string {
    return this.op("Expand", [0, this.shape(value)]);
  }

  /** Size of one dimension, an int64 scalar. */
  size(value: string, axis: number): string {
    return this.op("Gather", [this.shape(value), this.int(axis)], { axis: 0 });
  }

  toFloat(value: string): string {
    return this.op("Cast", [value], { to: FLOAT });
  }

  unsqueeze(value: string, axes: readonly number[]): string {
    return axes.length === 0 ? value : this.op("Unsqueeze", [value, this.ints(axes)]);
  }

  sum(value: string, axes: readonly number[], keepdims: boolean): string {
    return axes.length === 0 ? value : this.op("ReduceSum", [value, this.ints(axes)], { keepdims: Number(keepdims) });
  }

  /** Mean over axes; the dimensions are kept. */
  mean(value: string, axes: readonly number[]): string {
    return this.#reduce("ReduceMean", value, axes);
  }

  /** Maximum over axes; the dimensions are kept. */
  max(value: string, axes: readonly number[]): string {
    return this.#reduce("ReduceMax", value, axes);
  }

  #reduce(opType: string, value: string, axes: readonly number[]): string {
    if (this.#opset >= 18) return this.op(opType, [value, this.ints(axes)], { keepdims: 1 });
    return this.op(opType, [value], { axes, keepdims: 1 });
  }

  concat(values: readonly string[], axis: number): string {
    let level = values;
    while (level.length > 1) {
      const next: string[] = [];
      for (let i = 0; i < level.length; i += CONCAT_INPUTS) {
        const part = level.slice(i, i + CONCAT_INPUTS);
        next.push(part.length === 1 ? part[0]! : this.op("Concat", part, { axis }));
      }
      level = next;
    }
    return level[0]!;
  }

  /**
   * An int64 vector of these numbers. The runtime learns its numbers and its length only once `value` is there.
   *
   * A tensor with a shape of unknown length has unknown rank. onnxruntime then skips its search for reusable memory while it loads the
   * graph: that search compares every value of known rank with all values needed before. It skips scalars, too, so the
   * number that this begins with is one.
   * @param axis of a dimension of `value` that only the run tells, if any; it is read where `gathers` is set
   */
  late(numbers: readonly number[], value: string, axis?: number): string {
    const zero = this.mul(this.#someNumber(value, axis), this.ints([0]));
    return this.op("Slice", [this.ints(numbers), zero, this.ints([numbers.length]), this.ints([0])]);
  }

  /** Any int64 scalar that is known only once `value` is there. */
  #someNumber(value: string, axis: number | undefined): string {
    // WebGPU does not compute Size, so the whole value would be copied to the processor.
    if (!this.gathers) return this.op("Size", [value]);
    if (axis !== undefined) return this.op("Gather", [this.op("Shape", [value]), this.int(axis)], { axis: 0 });
    // Where all sizes are fixed an element is read instead, since runtimes compute what they can when they load; 0 stands behind it, for
    // where there are no elements.
    const first = this.slice(this.op("Reshape", [value, this.ints([-1])]), 0, 0, 1);
    const orZero = this.concat([first, this.unsqueeze(this.float(0), [0])], 0);
    return this.op("Cast", [this.op("Gather", [orZero, this.int(0)], { axis: 0 })], { to: INT64 });
  }

  /** Slice value[from:to] along one axis. */
  slice(value: string, axis: number, from: number, to: number): string {
    return this.op("Slice", [value, this.ints([from]), this.ints([to]), this.ints([axis])]);
  }

  /** A constant int64 vector. */
  ints(values: readonly number[]): string {
    return this.#constant(`ints/${values.join(",")}`, (name) => makeInts(name, values));
  }

  /** A constant int64 scalar. */
  int(value: number): string {
    return this.#constant(`int/${value}`, (name) => makeInts(name, [value], []));
  }

  /** A constant uint8 scalar. */
  byte(value: number): string {
    return this.#constant(`byte/${value}`, (name) =>
      create(TensorProtoSchema, { name, dataType: UINT8, rawData: Uint8Array.of(value) }),
    );
  }

  /** A constant f32 scalar. */
  float(value: number): string {
    return this.#constant(`float/${value}`, (name) => makeFloats(name, [value], []));
  }

  #constant(of: string, make: (name: string) => ReturnType<typeof makeInts>): string {
    let name = this.#made.get(of);
    if (name === undefined) {
      name = `${this.#prefix}/${of}`;
      this.#constants.initializer.push(make(name));
      this.#made.set(of, name);
    }
    return name;
  }
}
