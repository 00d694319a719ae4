/**
 * Graph surgery: gives a model small extra inputs that carry a task. The weights stay as they are; beside each adapted
 * layer the low-rank term is computed and added. Knows graphs and shapes, not packs; reads no weight.
 *
 * Every task input has a leading dimension `tasks`, 1 or the batch size: rows of a batch belong to tasks in order. With
 * x [n, in] the rows that enter a layer (all leading dimensions flattened, batch first):
 *
 *     xs = reshape(x·E_Aᵀ, [tasks, n / tasks, K_A]) · core        core [tasks, K_A, K_B]
 *     d  = xs·E_B + (reshape(x, [tasks, n / tasks, in]) · A) · B  A [tasks, in, q], B [tasks, q, out]
 *     y' = y + reshape(d, shape of y)
 *
 * The usual x [batch, sequence, in] needs none of the reshapes. Every node costs: sessions take longer to create and to run.
 */
import { FormatError } from "../errors.ts";
import type { Form, GraftVector } from "./forms.ts";
import type { FormGrafter, FormProbe, GraftTools } from "./graft-forms.ts";
import { biasAdd, FLOAT, INT64, type Linear } from "./linear.ts";
import type { OnnxModel } from "./model.ts";
import { dropUnused, makeInts, makeNode, makeValue, NodeEdits, Place, PREFIX } from "./nodes.ts";
import type { GraphProto, NodeProto } from "./onnx_pb.ts";
import { Ranks } from "./rank.ts";

/** The least opset in which the operators that are added mean what is meant here. */
const LEAST_OPSET = 11;

/** Components of one module, as initializers of the graph. */
export interface Components {
  /** E_Aᵀ [in, K_A], the mean as last column where there is one. */
  readonly At: Float32Array;
  /** E_B [K_B, out]. */
  readonly B: Float32Array;
  readonly KA: number;
  readonly KB: number;
}

/** An adapted layer. */
export interface GraftModule {
  readonly name: string;
  readonly in: number;
  readonly out: number;
  readonly linears: readonly Linear[];
  /** What it is where it is no linear layer. */
  readonly form?: Form | undefined;
  /** For a core between them. */
  readonly components?: Components | undefined;
  /** Whether tasks bring factors: expanded ones, or private ones beside a core. True without components. */
  readonly factors: boolean;
  /** Whether tasks scale the rows of W + ΔW (DoRA). */
  readonly rowScale: boolean;
}

/** A bias that tasks change, of any layer: the change is added to what the node makes. */
export interface GraftBias {
  /** Of the parameter. */
  readonly name: string;
  readonly size: number;
  readonly type: number;
  readonly places: readonly { graph: GraphProto; node: NodeProto }[];
}

/**
 * Rows of an embedding that tasks replace. Where an index is met, y' = (1 − s)·y + s·row, with the strength s behind the
 * values of the row: so the base's rows need not be known.
 */
export interface GraftRows {
  /** Of the parameter. */
  readonly name: string;
  readonly width: number;
  readonly type: number;
  /** Gather nodes. */
  readonly places: readonly { graph: GraphProto; node: NodeProto }[];
}

/** A layer that each task brings whole, with a number of outputs of its own. */
export interface GraftHead {
  /** Of the module. */
  readonly name: string;
  readonly in: number;
  readonly out: number;
  readonly bias: boolean;
  /** `end` makes the layer's result, bias included. */
  readonly places: readonly { linear: Linear; end: NodeProto }[];
}

export interface Graft {
  readonly modules: readonly GraftModule[];
  readonly biases: readonly GraftBias[];
  readonly rows: readonly GraftRows[];
  readonly heads: readonly GraftHead[];
  readonly vectors: readonly GraftVector[];
}

/** An input that was added: f32, or int64 for `indices`. A string in `dims` is a free dimension. */
export interface TaskInput {
  readonly name: string;
  /** Module or parameter that it belongs to. */
  readonly of: string;
  readonly kind: "core" | "A" | "B" | "scale" | "bias" | "indices" | "rows" | "headWeight" | "headBias";
  readonly dims: readonly (number | string)[];
}

/** A tensor that was added to the graph; its bytes are held back until the model is written. */
export interface Added {
  readonly name: string;
  readonly dims: readonly number[];
  readonly data: Float32Array;
}

/** What `graft` made of the model. */
export interface Grafted {
  readonly inputs: readonly TaskInput[];
  readonly initializers: readonly Added[];
  /** Of the first adapted layer in the main graph: what enters it and the term, as graph outputs for a probe. */
  readonly probe: ProbeOutputs | undefined;
  /** The same of the first of each kind that is no linear layer. */
  readonly formProbes: readonly FormProbe[];
}

/** Values of one adapted layer that are outputs of the graph: x, f32 rows of [in], and the term, f32 rows of [out]. */
export interface ProbeOutputs {
  readonly module: string;
  readonly x: string;
  readonly term: string;
}

/**
 * To be asked of a model as its file has it, before anything is added: no name of ours can be told from the file's own afterwards.
 * @throws FormatError when the model's opset is too old, the model has been grafted before, or it uses names of ours
 */
export function checkGraftable(model: OnnxModel): void {
  if (model.opset < LEAST_OPSET) {
    const message = `opset ${model.opset}: at least ${LEAST_OPSET} is needed; export it again with opset_version=17`;
    throw new FormatError(message, { file: model.name, part: "opset" });
  }
  if (model.graph.proto.input.some(({ name }) => name.startsWith(`${PREFIX}.`))) {
    throw new FormatError("has task inputs already; pass the model as it was before", {
      file: model.name,
      part: "graph",
    });
  }
  const taken = ownNames(model).find((name) => name.startsWith(`${PREFIX}/`) || name.startsWith(`${PREFIX}.`));
  if (taken === undefined) return;
  // What is added would be taken for it, or it for what is added.
  const message = `its value "${taken}" has a name as this package gives them: rename it, or pass the model as it was before`;
  throw new FormatError(message, { file: model.name, part: "graph" });
}

/** All names of values. */
function ownNames({ graph }: OnnxModel): string[] {
  const inputs = [...graph.scopes.keys()].flatMap(({ input }) => input.map(({ name }) => name));
  const made = [...graph.scopes.values()].flatMap(({ initializers, producers, outputs }) => [
    ...initializers.keys(),
    ...producers.keys(),
    ...outputs,
  ]);
  return [...inputs, ...made, ...graph.consumers.keys()];
}

/**
 * Changes `model.proto` in place.
 * @param model that `checkGraftable` has passed; weights that are folded may have a place of their own since then
 * @param options `probe: false` adds no outputs for a probe; `forms`: needed for modules with a form, and for vectors
 */
export function graft(
  model: OnnxModel,
  { modules, biases, rows, heads, vectors }: Graft,
  options: { probe?: boolean; forms?: FormGrafter | undefined } = {},
): Grafted {
  const grafter = new Grafter(model, options.probe ?? true);
  // A bias is added behind what DoRA scales, so before the term that goes between.
  for (const bias of biases) grafter.bias(bias);
  for (const table of rows) grafter.rows(table);
  const tools = grafter.tools();
  for (const vector of vectors) options.forms!.addVector(tools, vector);
  for (const { form, ...module } of modules) {
    if (form) options.forms!.addModule(tools, { ...module, form });
    else grafter.module(module);
  }
  for (const head of heads) grafter.head(head);
  return grafter.finish(heads);
}

class Grafter {
  readonly #model: OnnxModel;
  readonly #main: GraphProto;
  readonly #ranks: Ranks;
  readonly #inputs: TaskInput[] = [];
  readonly #added: Added[] = [];
  /** Nodes that every place shares; they depend on a task input only and go first. */
  readonly #first: NodeProto[] = [];
  readonly #shared = new Set<string>();
  readonly #edits = new NodeEdits();
  readonly #wantsProbe: boolean;
  #probe: ProbeOutputs | undefined;
  readonly #formProbes: FormProbe[] = [];
  #count = 0;

  constructor(model: OnnxModel, wantsProbe: boolean) {
    this.#model = model;
    this.#wantsProbe = wantsProbe;
    this.#main = model.graph.proto;
    this.#ranks = new Ranks(model);
  }

  module({ name, in: inputs, out, linears, components, factors, rowScale }: GraftModule): void {
    const core = components && this.#input(name, "core", [components.KA, components.KB]);
    const A = factors ? this.#input(name, "A", [inputs, "q"]) : undefined;
    const B = factors ? this.#input(name, "B", ["q", out]) : undefined;
    const scale = rowScale ? this.#input(name, "scale", [1, out]) : undefined;
    if (components) {
      this.#added.push({ name: `${PREFIX}/${name}/E_A`, dims: [inputs, components.KA], data: components.At });
      this.#added.push({ name: `${PREFIX}/${name}/E_B`, dims: [components.KB, out], data: components.B });
    }
    for (const linear of linears) {
      // Behind the bias where that can be: runtimes fuse a product with its bias. DoRA scales what is in front of it.
      const end = rowScale ? linear.node : (biasAdd(this.#model, linear) ?? linear.node);
      const place = new Place(this.#edits, linear.graph, end, `${PREFIX}/${name}/${this.#count++}`, linear.type);
      const rank = linear.graph === this.#main ? this.#ranks.of(linear.x) : undefined;
      const rows =
        rank === 3 || rank === 2 ? place.up(linear.x) : place.op("Flatten", [place.up(linear.x)], { axis: -1 });
      // [batch, sequence, in] multiplies with [tasks, …] as it is.
      const byTask = (value: string, width: number): string => (rank === 3 ? value : this.#rowsOf(place, value, width));
      const terms: string[] = [];
      if (A !== undefined && B !== undefined) {
        terms.push(place.op("MatMul", [place.op("MatMul", [byTask(rows, inputs), A]), B]));
      }
      if (core !== undefined && components) {
        const projected = place.op("MatMul", [rows, `${PREFIX}/${name}/E_A`]);
        const mixed = place.op("MatMul", [byTask(projected, components.KA), core]);
        terms.push(place.op("MatMul", [mixed, `${PREFIX}/${name}/E_B`]));
      }
      const term = terms.length === 2 ? place.op("Add", terms) : terms[0]!;
      if (this.#wantsProbe && linear.graph === this.#main) this.#probe ??= { module: name, x: rows, term };
      const bias = scale && linear.addsBias ? linear.node.input[2]! : undefined;
      // y without its bias: DoRA scales it.
      if (bias !== undefined) linear.node.input.length = 2;
      let y = place.begin();
      const asY = (value: string): string => {
        if (rank === 3) return value;
        return place.op("Reshape", [value, rank === 2 ? this.#ints([-1, out]) : place.op("Shape", [y])]);
      };
      if (scale) {
        const whole = place.op("Add", [byTask(place.up(y), out), term]);
        y = asY(place.op("Mul", [whole, scale]));
        if (bias !== undefined) y = place.op("Add", [y, place.up(bias)]);
        place.end(place.down(y));
      } else {
        place.end(place.op("Add", [y, place.down(asY(term))]));
      }
    }
  }

  bias({ name, size, type, places }: GraftBias): void {
    const change = this.#input(name, "bias", [1, size]);
    for (const { graph, node } of places) {
      const place = new Place(this.#edits, graph, node, `${PREFIX}/${name}/${this.#count++}`, type);
      const y = place.begin();
      const sum = place.op("Add", [this.#rowsOf(place, place.up(y), size), change]);
      place.end(place.down(place.op("Reshape", [sum, place.op("Shape", [y])])));
    }
  }

  rows({ name, width, type, places }: GraftRows): void {
    const indices = this.#input(name, "indices", [1, "rows"]);
    const change = this.#input(name, "rows", ["rows", width + 1]);
    for (const { graph, node } of places) {
      const place = new Place(this.#edits, graph, node, `${PREFIX}/${name}/${this.#count++}`, type);
      const y = place.begin();
      const ids = this.#rowsOf(place, place.op("Cast", [node.input[1]!], { to: INT64 }), 1);
      const met = place.op("Cast", [place.op("Equal", [ids, indices])], { to: FLOAT });
      const found = place.op("MatMul", [met, change]);
      const part = (from: number, to: number): string =>
        place.op("Slice", [found, this.#ints([from]), this.#ints([to]), this.#ints([-1])]);
      const old = this.#rowsOf(place, place.up(y), width);
      const left = place.op("Sub", [old, place.op("Mul", [old, part(width, width + 1)])]);
      const sum = place.op("Add", [left, part(0, width)]);
      place.end(place.down(place.op("Reshape", [sum, place.op("Shape", [y])])));
    }
  }

  head({ name, in: inputs, bias: hasBias, places }: GraftHead): void {
    const weight = this.#input(name, "headWeight", [inputs, "labels"]);
    const bias = hasBias ? this.#input(name, "headBias", [1, "labels"]) : undefined;
    const labels = this.#once("labels", "Slice", ["Shape", weight], [2, 3]);
    for (const { linear, end } of places) {
      const place = new Place(this.#edits, linear.graph, end, `${PREFIX}/${name}/${this.#count++}`, linear.type);
      const x = place.op("Flatten", [place.up(linear.x)], { axis: -1 });
      let y = place.op("MatMul", [this.#rowsOf(place, x, inputs), weight]);
      if (bias !== undefined) y = place.op("Add", [y, bias]);
      const leading = place.op("Slice", [place.op("Shape", [linear.x]), this.#ints([0]), this.#ints([-1])]);
      const shape = place.op("Concat", [leading, labels], { axis: 0 });
      place.replace(place.down(place.op("Reshape", [y, shape])));
    }
  }

  tools(): GraftTools {
    return {
      add: (name, dims, data) => {
        if (!this.#shared.has(name)) this.#added.push({ name, dims, data });
        return this.#shared.add(name) && name;
      },
      input: (...of) => this.#input(...of),
      ints: (values) => this.#ints(values),
      dims: (name, input, from, to) => this.#once(name, "Slice", ["Shape", input], [from, to]),
      tasks: () => this.#once("tasks", "Slice", ["Shape", this.#inputs[0]!.name], [0, 1]),
      first: (name, opType, input, attributes) => {
        if (!this.#shared.has(name)) this.#first.push(makeNode(opType, name, input, name, attributes));
        return this.#shared.add(name) && name;
      },
      rowsOf: (place, value, width) => this.#rowsOf(place, value, width),
      place: (of, graph, node, type) => new Place(this.#edits, graph, node, `${PREFIX}/${of}/${this.#count++}`, type),
      rank: (graph, value) => (graph === this.#main ? this.#ranks.of(value) : undefined),
      wantsProbe: (graph, kind) =>
        this.#wantsProbe && graph === this.#main && !this.#formProbes.some((probe) => probe.kind === kind),
      probe: (probe) => this.#formProbes.push(probe),
    };
  }

  /** rows [n, width] as [tasks, n / tasks, width]. */
  #rowsOf(place: Place, value: string, width: number): string {
    return place.op("Reshape", [value, this.#taskRows(width)]);
  }

  /** The shape [tasks, -1, width] as a value. */
  #taskRows(width: number): string {
    const name = `${PREFIX}/rows/${width}`;
    if (!this.#shared.has(name)) {
      this.#shared.add(name);
      const tasks = this.#once("tasks", "Slice", ["Shape", this.#inputs[0]!.name], [0, 1]);
      this.#first.push(makeNode("Concat", name, [tasks, this.#ints([-1, width])], name, { axis: 0 }));
    }
    return name;
  }

  /** shape(value)[from:to], made once. */
  #once(
    name: string,
    op: "Slice",
    [, value]: readonly ["Shape", string],
    [from, to]: readonly [number, number],
  ): string {
    const out = `${PREFIX}/${name}/${value}`;
    if (!this.#shared.has(out)) {
      this.#shared.add(out);
      this.#first.push(makeNode("Shape", `${out}/shape`, [value], `${out}/shape`));
      this.#first.push(makeNode(op, out, [`${out}/shape`, this.#ints([from]), this.#ints([to])], out));
    }
    return out;
  }

  /** A constant int64 vector. */
  #ints(values: readonly number[]): string {
    const name = `${PREFIX}/ints/${values.join(",")}`;
    if (!this.#shared.has(name)) {
      this.#shared.add(name);
      this.#main.initializer.push(makeInts(name, values));
    }
    return name;
  }

  #input(of: string, kind: TaskInput["kind"], dims: readonly (number | string)[]): string {
    const suffix = { headWeight: "weight", headBias: "bias", bias: "change" }[kind as string] ?? kind;
    const name = `${PREFIX}.${of}.${suffix}`;
    this.#inputs.push({ name, of, kind, dims: ["tasks", ...dims] });
    return name;
  }

  finish(heads: readonly GraftHead[]): Grafted {
    const main = this.#main;
    this.#edits.apply();
    // In front, so that what uses them comes later, as ONNX asks.
    main.node.unshift(...this.#first);
    for (const { name, kind, dims } of this.#inputs) {
      const free = dims.map((d) => (typeof d === "number" ? d : d === "tasks" ? `${PREFIX}.tasks` : ""));
      main.input.push(makeValue(name, kind === "indices" ? INT64 : FLOAT, free));
    }
    for (const value of this.#probe ? [this.#probe.x, this.#probe.term] : []) main.output.push(makeValue(value, FLOAT));
    for (const { x, term } of this.#formProbes)
      for (const value of [x, term]) main.output.push(makeValue(value, FLOAT));
    if (heads.length > 0) this.#freeLabels(heads);
    // Replaced heads, and the weights that folding has given a place of their own.
    dropUnused(this.#model);
    const [inputs, initializers] = [this.#inputs, this.#added];
    return { inputs, initializers, probe: this.#probe, formProbes: this.#formProbes };
  }

  /** Shapes written into the file that hold the base's number of labels no longer hold. */
  #freeLabels(heads: readonly GraftHead[]): void {
    const labels = new Set(heads.map(({ out }) => BigInt(out)));
    for (const { type } of this.#main.output) {
      const dims = type?.value.case === "tensorType" ? (type.value.value.shape?.dim ?? []) : [];
      const last = dims[dims.length - 1];
      if (last?.value.case === "dimValue" && labels.has(last.value.value)) last.value = { case: undefined };
    }
    this.#main.valueInfo.length = 0;
  }
}
