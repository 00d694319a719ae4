/**
 * What a graph is changed with: task inputs, constants and nodes that every place shares, places to edit, values to probe. Knows no
 * layers.
 */
import type { FormProbe, GraftOptions, TaskInput } from "./adapted.ts";
import { FLOAT } from "./linear.ts";
import type { OnnxModel } from "./model.ts";
import { type Added, type Attributes, makeInts, makeNode, NodeEdits, Place, PREFIX } from "./nodes.ts";
import type { GraphProto, NodeProto } from "./protobuf.ts";
import { Ranks } from "./rank.ts";

export class GraftTools {
  readonly model: OnnxModel;
  readonly main: GraphProto;
  inputs: TaskInput[] = [];
  readonly added: Added[] = [];
  /** Nodes that every place shares; they depend on a task input only and go in front. */
  readonly shared: NodeProto[] = [];
  readonly edits: NodeEdits = new NodeEdits();
  readonly formProbes: FormProbe[] = [];
  readonly #ranks: Ranks;
  readonly #made = new Set<string>();
  readonly #probe: boolean;
  #count = 0;

  constructor(model: OnnxModel, { probe = true }: GraftOptions) {
    this.model = model;
    this.main = model.graph.proto;
    this.#ranks = new Ranks(model);
    this.#probe = probe;
  }

  /** Adds an initializer, once. */
  add(name: string, dims: readonly number[], data: Float32Array): string {
    if (this.#isNew(name)) this.added.push({ name, type: FLOAT, dims, data });
    return name;
  }

  input(
    of: string,
    kind: TaskInput["kind"],
    dims: readonly (number | string)[],
    more?: Pick<TaskInput, "cores" | "over">,
  ): string {
    const suffix = { headWeight: "weight", headBias: "bias", bias: "change" }[kind as string] ?? kind;
    const name = `${PREFIX}.${of}.${suffix}`;
    this.inputs.push({ name, of, kind, dims: ["tasks", ...dims], ...more });
    return name;
  }

  /** Makes a constant int64 vector, once. */
  ints(values: readonly number[]): string {
    const name = `${PREFIX}/ints/${values.join(",")}`;
    if (this.#isNew(name)) this.main.initializer.push(makeInts(name, values));
    return name;
  }

  /** The numbers from 0 to `count` − 1, made once. */
  range(count: number): string {
    const scalars = [0, count, 1].map((n) => this.first(`${PREFIX}/scalar/${n}`, "Squeeze", [this.ints([n])]));
    return this.first(`${PREFIX}/range/${count}`, "Range", scalars);
  }

  /** The shape of an input from one dimension to another, made once. */
  dims(name: string, input: string, from: number, to: number): string {
    const out = `${PREFIX}/${name}/${input}`;
    const shape = `${out}/shape`;
    if (this.#isNew(out)) {
      this.shared.push(makeNode("Shape", shape, [input], shape));
      this.shared.push(makeNode("Slice", out, [shape, this.ints([from]), this.ints([to])], out));
    }
    return out;
  }

  /** The vector [tasks]. */
  tasks(): string {
    return this.dims("tasks", this.inputs[0]!.name, 0, 1);
  }

  /** Makes a node in front of all others, once, that depends on inputs only. Its name is that of its result. */
  first(name: string, opType: string, input: readonly string[], attributes?: Attributes): string {
    if (this.#isNew(name)) this.shared.push(makeNode(opType, name, input, name, attributes));
    return name;
  }

  #isNew(name: string): boolean {
    return !this.#made.has(name) && Boolean(this.#made.add(name));
  }

  /** rows [n, width] as [tasks, n / tasks, width]. */
  rowsOf(place: Place, value: string, width: number): string {
    const shape = [this.tasks(), this.ints([-1, width])];
    return place.op("Reshape", [value, this.first(`${PREFIX}/rows/${width}`, "Concat", shape, { axis: 0 })]);
  }

  /** Edits behind a node of the model. */
  place(of: string, graph: GraphProto, node: NodeProto, type: number): Place {
    return new Place(this.edits, graph, node, `${PREFIX}/${of}/${this.#count++}`, type);
  }

  /** Rank of a value in the main graph; undefined elsewhere, and where it cannot be told. */
  rank(graph: GraphProto, value: string): number | undefined {
    return graph === this.main ? this.#ranks.of(value) : undefined;
  }

  /** Whether values in this graph are to be outputs, of this kind unless one is already. */
  wantsProbe(graph: GraphProto, kind?: FormProbe["kind"]): boolean {
    return this.#probe && graph === this.main && !this.formProbes.some((probe) => probe.kind === kind);
  }
}
