/**
 * Graph surgery: gives a model small extra inputs that carry a task. The weights stay as they are; next to each
 * adapted layer the low-rank term is computed and added. Knows graphs and shapes, not packs; reads no weight.
 *
 * Every task input has a leading dimension `tasks`, 1 or the batch size: rows of a batch belong to tasks in order. With
 * x [n, in] the rows that enter a layer (all leading dimensions flattened, batch first):
 *
 *     xs = reshape(x·E_Aᵀ, [tasks, n / tasks, K_A]) · core        core [tasks, K_A, K_B]
 *     d  = xs·E_B + (reshape(x, [tasks, n / tasks, in]) · A) · B  A [tasks, in, q], B [tasks, q, out]
 *     y' = y + reshape(d, shape of y)
 *
 * Where tasks share one side alone, factors lie over its components: A is [tasks, K_A, q] behind x·E_Aᵀ, B [tasks, q, K_B] before E_B.
 * Layers that one x enters (queries, keys, values) share its product with their components, and one input that holds their cores along
 * its diagonal. Such inputs of one width may come as one, one below the other. The usual x [batch, sequence, in] needs none of the
 * reshapes. Every node and every input costs: sessions take longer to create and to run.
 */
import {
  type AdaptedBias,
  type AdaptedHead,
  type AdaptedLayer,
  type AdaptedRows,
  type AdaptedVector,
  type ComponentRows,
  endOf,
  FLOAT,
  type GraphChanges,
  INT8,
  INT64,
  type Site,
  UINT8,
} from "./linear.ts";
import { attribute, type OnnxModel, Ranks } from "./model.ts";
import {
  type Added,
  type Attributes,
  CONTRIBUTED,
  dropUnused,
  freeLast,
  importContributed,
  makeInts,
  makeNode,
  makeSplit,
  makeValue,
  NodeEdits,
  Place,
  PREFIX,
} from "./nodes.ts";
import type { GraphProto, NodeProto } from "./protobuf.ts";

/**
 * Operators that a runtime has for products of floats and integers: MatMulNBits where 4 bits are fast, DequantizeLinear of bytes in front
 * of a product, and both where MatMulNBits takes bytes too.
 */
export type IntegerProducts = readonly ("MatMulNBits" | "DequantizeLinear")[];

export interface InjectOptions {
  /** Adds outputs for a probe. Default: true. */
  readonly probe?: boolean | undefined;
  /** Operators for components that are integers. Default: none, they become floats. */
  readonly integers?: IntegerProducts | undefined;
  /** Needed for modules with a form, and for vectors. */
  readonly forms?: FormInjection | undefined;
  /** Joins cores to as few inputs as can be. Default: false: a split into many parts is more than some devices bind at once. */
  readonly join?: boolean | undefined;
}

/** Surgery next to what is no linear layer: forms.ts, which is loaded when it is needed. */
export interface FormInjection {
  addModule(tools: GraphTools, module: AdaptedLayer): void;
  addVector(tools: GraphTools, vector: AdaptedVector): void;
}

/** An input that was added: f32, or int64 for `indices`. A string in `dims` is a free dimension. */
export interface TaskInput {
  readonly name: string;
  /** Module or parameter that it belongs to; modules that share an input are joined by "+". */
  readonly of: string;
  readonly kind: "core" | "A" | "B" | "scale" | "bias" | "indices" | "rows" | "headWeight" | "headBias";
  readonly dims: readonly (number | string)[];
  readonly cores?: readonly CoreBlock[];
  /** Set where a factor's rows are coefficients over components, which the graph has: of A [K, q], of B [q, K]. */
  readonly over?: { readonly K: number; readonly scales: Float32Array | undefined } | undefined;
}

export interface CoreBlock {
  readonly module: string;
  /** Place of its first number. */
  readonly row: number;
  readonly column: number;
  readonly KA: number;
  readonly KB: number;
  /** Factors of rows and columns, where the graph holds integers. */
  readonly scalesA: Float32Array | undefined;
  readonly scalesB: Float32Array | undefined;
}

export interface Injected {
  readonly inputs: readonly TaskInput[];
  readonly initializers: readonly Added[];
  /** Outputs for a probe of the first adapted layer in the main graph. */
  readonly probe: ProbeOutputs | undefined;
}

/** Values of one adapted layer that are outputs of the graph: x, f32 rows of [in], and the term, f32 rows of [out]. */
export interface ProbeOutputs {
  readonly module: string;
  readonly x: string;
  readonly term: string;
}

/**
 * GraphChanges `model.proto` in place.
 * @param model that `checkInjectable` has passed; weights that are folded may have a place of their own since then
 */
export function inject(
  model: OnnxModel,
  { modules, biases, rows, heads, vectors }: GraphChanges,
  options: InjectOptions = {},
): Injected {
  const linear = modules.filter(({ kind }) => kind === "linear");
  const injector = new Injector(model, options, linear);
  // A bias is added behind what DoRA scales, so before the term that goes between.
  for (const bias of biases) injector.bias(bias);
  for (const table of rows) if (table.places.length > 0) injector.rowsOfTable(table);
  for (const vector of vectors) options.forms!.addVector(injector, vector);
  for (const module of modules) if (module.kind !== "linear") options.forms!.addModule(injector, module);
  for (const members of injector.groupsOf(linear)) injector.terms(members);
  // Terms are added to what replaced rows make.
  for (const layer of rows) if (layer.sites.length > 0) injector.rowsOfLayer(layer);
  for (const head of heads) injector.head(head);
  if (options.join) injector.joinCores();
  return injector.finish(heads);
}

/** Task inputs, constants and nodes that every place shares, places to edit, values to probe. Knows no layers. */
export class GraphTools {
  readonly model: OnnxModel;
  readonly main: GraphProto;
  inputs: TaskInput[] = [];
  readonly added: Added[] = [];
  /** Nodes that every place shares; they depend on a task input only and go in front. */
  readonly shared: NodeProto[] = [];
  readonly edits: NodeEdits = new NodeEdits();
  readonly #ranks: Ranks;
  readonly #made = new Set<string>();
  #count = 0;

  constructor(model: OnnxModel) {
    this.model = model;
    this.main = model.graph.proto;
    this.#ranks = new Ranks(model);
  }

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

  place(of: string, graph: GraphProto, node: NodeProto, type: number): Place {
    return new Place(this.edits, graph, node, `${PREFIX}/${of}/${this.#count++}`, type);
  }

  /** Rank of a value in the main graph; undefined elsewhere, and where it cannot be told. */
  rank(graph: GraphProto, value: string): number | undefined {
    return graph === this.main ? this.#ranks.of(value) : undefined;
  }
}

/** x·E_Aᵀ·core of a module, and the rows of x that it was made of. */
interface Mixed {
  readonly rows: string;
  readonly value: string;
}

/** The x of a layer in the shape that multiplies with task inputs. */
interface RowsInto {
  readonly rank: number | undefined;
  readonly rows: string;
  /** rows [n, width] as [tasks, n / tasks, width], where they have no batch of their own. */
  readonly byTask: (value: string, width: number) => string;
}

class Injector extends GraphTools {
  readonly #products: ComponentProducts;
  readonly #wantsProbe: boolean;
  #probe: ProbeOutputs | undefined;

  constructor(model: OnnxModel, { integers = [], probe = true }: InjectOptions, layers: readonly AdaptedLayer[]) {
    super(model);
    this.#products = new ComponentProducts(integers, this.added, layers);
    this.#wantsProbe = probe;
  }

  /**
   * Groups modules with components by their common input (queries, keys and values; gate and up), in the same order. Other modules with
   * terms stay alone: those without components, those whose components have another form, and those that are applied several times.
   */
  groupsOf(modules: readonly AdaptedLayer[]): AdaptedLayer[][] {
    const groups = new Map<unknown, AdaptedLayer[]>();
    const graphs = [...this.model.graph.scopes.keys()];
    for (const module of modules) {
      const [first, second] = module.sites;
      const key =
        first && !second && module.components
          ? `${graphs.indexOf(first.graph)} ${first.type} ${this.#products.formatOf(module.components.A)} ${first.x}`
          : module;
      groups.set(key, [...(groups.get(key) ?? []), module]);
    }
    return [...groups.values()];
  }

  /** Adds the terms of modules that share their x. @param members which all have components, or one module */
  terms(members: readonly AdaptedLayer[]): void {
    const core = members[0]!.components && this.#core(members);
    const inputs = members.map(({ name, in: width, out, factors, over, rowScale }) => {
      const [A, B] = [this.#products.under(over?.A), this.#products.under(over?.B)];
      return {
        A: factors ? this.input(name, "A", [A?.K ?? width, "q"], { over: A }) : undefined,
        B: factors ? this.input(name, "B", ["q", B?.K ?? out], { over: B }) : undefined,
        scale: rowScale ? this.input(name, "scale", [1, out]) : undefined,
      };
    });
    for (const i of members[0]!.sites.keys()) {
      const sites = members.map((member) => member.sites[i]!);
      const mixed = core && this.#mix(members, sites, core);
      for (const [m, member] of members.entries()) this.#term(member, sites[m]!, inputs[m]!, mixed?.[m]);
    }
  }

  #core(members: readonly AdaptedLayer[]): TaskInput {
    let row = 0;
    let column = 0;
    const cores = members.map(({ name, components }): CoreBlock => {
      const { A, B } = components!;
      const [scalesA, scalesB] = [this.#products.scalesOf(A), this.#products.scalesOf(B)];
      const block = { module: name, row, column, KA: A.rows, KB: B.rows, scalesA, scalesB };
      row += A.rows;
      column += B.rows;
      return block;
    });
    this.input(joined(cores.map(({ module }) => module)), "core", [row, column], { cores });
    return this.inputs[this.inputs.length - 1]!;
  }

  /** x·E_Aᵀ·core, in front of the first of the layers. @returns the columns of each */
  #mix(members: readonly AdaptedLayer[], sites: readonly Site[], core: TaskInput): Mixed[] {
    const { graph, x, type } = sites[0]!;
    const nodes = new Set(sites.map(({ node }) => node));
    const first = nodes.size === 1 ? sites[0]!.node : graph.node.find((node) => nodes.has(node))!;
    const place = this.place(core.of, graph, first, type);
    const [, KA] = core.dims as [string, number];
    const { rows, byTask } = this.#rowsInto(place, graph, x);
    const sides = members.map(({ components }) => components!.A);
    const projected = this.#products.project(place, rows, sides, `${PREFIX}/${core.of}/E_A`);
    const mixed = place.op("MatMul", [byTask(projected, KA), core.name]);
    const widths = core.cores!.map(({ KB }) => KB);
    const parts = widths.length === 1 ? [mixed] : place.split(this.model, mixed, widths);
    place.before();
    return parts.map((value) => ({ rows, value }));
  }

  #term(
    { name, in: inputs, out, components, over }: AdaptedLayer,
    site: Site,
    { A, B, scale }: { A: string | undefined; B: string | undefined; scale: string | undefined },
    mixed: Mixed | undefined,
  ): void {
    // The term comes behind the bias where possible: runtimes fuse a product with its bias. DoRA scales the value in front of it.
    const end = scale === undefined ? endOf(this.model, site) : site.node;
    const place = this.place(name, site.graph, end, site.type);
    const { rank, rows, byTask } = this.#rowsInto(place, site.graph, site.x, mixed?.rows);
    const terms: string[] = [];
    if (A !== undefined && B !== undefined) {
      const read = over?.A ? this.#products.project(place, rows, [over.A], `${PREFIX}/${name}/E_A`) : rows;
      const made = place.op("MatMul", [place.op("MatMul", [byTask(read, over?.A?.rows ?? inputs), A]), B]);
      terms.push(over?.B ? this.#products.expand(place, made, over.B, `${PREFIX}/${name}/E_B`) : made);
    }
    if (mixed) terms.push(this.#products.expand(place, mixed.value, components!.B, `${PREFIX}/${name}/E_B`));
    const term = terms.length === 2 ? place.op("Add", terms) : terms[0]!;
    if (this.#wantsProbe && site.graph === this.main) this.#probe ??= { module: name, x: rows, term };
    const bias = scale && site.bias;
    // y without its bias: DoRA scales it.
    if (bias) site.node.input.length = 2;
    const y = place.begin();
    if (scale === undefined) {
      place.end(place.op("Add", [y, place.down(this.#asY(place, term, y, rank, out))]));
      return;
    }
    const scaled = place.op("Mul", [place.op("Add", [byTask(place.up(y), out), term]), scale]);
    const whole = this.#asY(place, scaled, y, rank, out);
    place.end(place.down(bias ? place.op("Add", [whole, place.up(bias)]) : whole));
  }

  /** A value [tasks, n / tasks, out] in the shape of y. */
  #asY(place: Place, value: string, y: string, rank: number | undefined, out: number): string {
    if (rank === 3) return value;
    return place.op("Reshape", [value, rank === 2 ? this.ints([-1, out]) : place.op("Shape", [y])]);
  }

  /**
   * x as f32 rows: [batch, sequence, in], which multiplies with [tasks, …] as it is, or [n, in], which `byTask` reshapes.
   * @param made the result of another place
   */
  #rowsInto(place: Place, graph: GraphProto, x: string, made?: string): RowsInto {
    const rank = this.rank(graph, x);
    const flat = (): string =>
      rank === 3 || rank === 2 ? place.up(x) : place.op("Flatten", [place.up(x)], { axis: -1 });
    const byTask = (value: string, width: number): string => (rank === 3 ? value : this.rowsOf(place, value, width));
    return { rank, rows: made ?? flat(), byTask };
  }

  bias({ name, size, type, places }: AdaptedBias): void {
    const change = this.input(name, "bias", [1, size]);
    for (const { graph, node } of places) {
      const place = this.place(name, graph, node, type);
      const y = place.begin();
      const sum = place.op("Add", [this.rowsOf(place, place.up(y), size), change]);
      place.end(place.down(this.#asY(place, sum, y, undefined, size)));
    }
  }

  rowsOfTable({ name, width, type, places }: AdaptedRows): void {
    const indices = this.input(name, "indices", [1, "rows"]);
    const change = this.input(name, "rows", ["rows", width + 1]);
    for (const { graph, node } of places) {
      const place = this.place(name, graph, node, type);
      const y = place.begin();
      const ids = this.rowsOf(place, place.op("Cast", [node.input[1]!], { to: INT64 }), 1);
      const met = place.op("Cast", [place.op("Equal", [ids, indices])], { to: FLOAT });
      const found = place.op("MatMul", [met, change]);
      const part = (from: number, to: number): string =>
        place.op("Slice", [found, this.ints([from]), this.ints([to]), this.ints([-1])]);
      const old = this.rowsOf(place, place.up(y), width);
      const left = place.op("Sub", [old, place.op("Mul", [old, part(width, width + 1)])]);
      const sum = place.op("Add", [left, part(0, width)]);
      place.end(place.down(this.#asY(place, sum, y, undefined, width)));
    }
  }

  rowsOfLayer({ name, count: out, width, sites }: AdaptedRows): void {
    const indices = this.input(name, "indices", [1, "rows"]);
    const change = this.input(name, "rows", ["rows", width + 1]);
    const columns = (value: string): string =>
      this.first(`${value}/columns`, "Transpose", [value], { perm: [0, 2, 1] });
    const outputs = this.range(out);
    const isMet = this.first(`${indices}/met`, "Equal", [columns(indices), outputs]);
    const met = this.first(`${isMet}/float`, "Cast", [isMet], { to: FLOAT });
    const part = (from: number, to: number): string => {
      const bounds = [this.ints([from]), this.ints([to]), this.ints([-1])];
      return columns(this.first(`${change}/${from}`, "Slice", [change, ...bounds]));
    };
    const strength = this.first(`${change}/strength`, "MatMul", [part(width, width + 1), met]);
    for (const { graph, node, x, type } of sites) {
      const place = this.place(name, graph, node, type);
      const { rank, rows, byTask } = this.#rowsInto(place, graph, x);
      const found = place.op("MatMul", [byTask(rows, width), part(0, width)]);
      const y = place.begin();
      const old = byTask(place.up(y), out);
      const left = place.op("Sub", [old, place.op("Mul", [old, strength])]);
      const sum = place.op("Add", [left, place.op("MatMul", [found, met])]);
      place.end(place.down(this.#asY(place, sum, y, rank, out)));
    }
  }

  head({ name, in: inputs, bias: hasBias, places }: AdaptedHead): void {
    const weight = this.input(name, "headWeight", [inputs, "labels"]);
    const bias = hasBias ? this.input(name, "headBias", [1, "labels"]) : undefined;
    const labels = this.dims("labels", weight, 2, 3);
    for (const { site, end } of places) {
      const place = this.place(name, site.graph, end, site.type);
      const x = place.op("Flatten", [place.up(site.x)], { axis: -1 });
      let y = place.op("MatMul", [this.rowsOf(place, x, inputs), weight]);
      // A task without a bias keeps the model's.
      const added = bias ?? (site.bias && place.up(site.bias));
      if (added) y = place.op("Add", [y, added]);
      const leading = place.op("Slice", [place.op("Shape", [site.x]), this.ints([0]), this.ints([-1])]);
      const shape = place.op("Concat", [leading, labels], { axis: 0 });
      place.replace(place.down(place.op("Reshape", [y, shape])));
    }
  }

  /**
   * Puts cores that are equally wide below each other in one input, which nodes split again: a runtime takes some microseconds for each
   * input of each run.
   */
  joinCores(): void {
    const isCore = ({ kind }: TaskInput): boolean => kind === "core";
    for (const width of new Set(this.inputs.filter(isCore).map(({ dims }) => dims[2] as number))) {
      const parts = this.inputs.filter((input) => isCore(input) && input.dims[2] === width);
      if (parts.length < 2) continue;
      const heights = parts.map(({ dims }) => dims[1] as number);
      let height = 0;
      const cores = parts.flatMap(({ cores = [] }, i) => {
        const above = height;
        height += heights[i]!;
        return cores.map((block) => ({ ...block, row: above + block.row }));
      });
      const name = `${PREFIX}.cores.${width}`;
      const names = parts.map((part) => part.name);
      this.shared.unshift(makeSplit(this.model, `${PREFIX}/cores/${width}`, name, names, heights, 1));
      this.inputs = this.inputs.filter((input) => !parts.includes(input));
      const of = joined(parts.map((part) => part.of));
      this.inputs.push({ name, of, kind: "core", dims: ["tasks", height, width], cores });
    }
  }

  finish(heads: readonly AdaptedHead[]): Injected {
    const { main, inputs } = this;
    this.edits.apply();
    // ONNX wants nodes behind those that make their inputs.
    main.node.unshift(...this.shared);
    for (const { name, kind, dims } of inputs) {
      const free = dims.map((d) => (typeof d === "number" ? d : d === "tasks" ? `${PREFIX}.tasks` : ""));
      main.input.push(makeValue(name, kind === "indices" ? INT64 : FLOAT, free));
    }
    for (const value of this.#probe ? [this.#probe.x, this.#probe.term] : []) main.output.push(makeValue(value, FLOAT));
    // Shapes written into the file hold the base's number of labels.
    if (heads.length > 0) freeLast(main, new Set(heads.map(({ out }) => BigInt(out))));
    if (this.#products.contributed) importContributed(this.model);
    // Replaced heads, and the weights that folding has given a place of their own.
    // Old exporters list initializers among the inputs; an input without its initializer would have to be fed.
    dropUnused(main, ({ name }) => !this.model.graph.initializers.has(name));
    return { inputs, initializers: this.added, probe: this.#probe };
  }
}

/** Joins names of modules, with their common start only once: "layer.self.query+key". */
function joined([first = "", ...others]: readonly string[]): string {
  const parent = first.slice(0, first.lastIndexOf(".") + 1);
  return [first, ...others.map((name) => (name.startsWith(parent) ? name.slice(parent.length) : name))].join("+");
}

// Products with components.

/** Form in which components enter the graph. */
type Format = "floats" | "bytes" | "nibbles";

/**
 * Adds products with a pack's components to a graph, in the smallest form that a runtime multiplies by. Integers enter the graph without
 * the scales of their rows: the core between the components contains these.
 */
class ComponentProducts {
  readonly #by: IntegerProducts;
  readonly #added: Added[];
  readonly #level: number;
  readonly #shared = new Set<string>();
  /** True if an operator of onnxruntime's own domain was used. */
  contributed = false;

  /**
   * @param by operators for integers; none: floats only
   * @param layers that terms are added to: where the model has all of their inputs rounded to 8 bits, products with 4 bits do the same
   */
  constructor(by: IntegerProducts, added: Added[], layers: readonly AdaptedLayer[]) {
    this.#by = by;
    this.#added = added;
    const levelOf = (node: NodeProto): number => Number(attribute(node, "accuracy_level")?.i ?? 0);
    const levels = layers.flatMap(({ sites }) => sites.map(({ node, product = node }) => levelOf(product)));
    this.#level = levels.length > 0 && levels.every((level) => level === EIGHT_BITS) ? EIGHT_BITS : F32;
  }

  /** Form that these components take. Components of different forms do not share a product. */
  formatOf({ integers }: ComponentRows): Format {
    if (integers && integers.bits <= 4 && this.#by.includes("MatMulNBits")) return "nibbles";
    return integers && this.#by.includes("DequantizeLinear") ? "bytes" : "floats";
  }

  /** Factors that the core has to apply to the row of each component; undefined: none. */
  scalesOf(rows: ComponentRows): Float32Array | undefined {
    return this.formatOf(rows) === "floats" ? undefined : rows.integers!.scales;
  }

  /** Facts of components for an input whose rows are coefficients over them. */
  under(
    rows: ComponentRows | undefined,
  ): { readonly K: number; readonly scales: Float32Array | undefined } | undefined {
    return rows && { K: rows.rows, scales: this.scalesOf(rows) };
  }

  /**
   * Product x [.., width] · Eᵀ with all sides one below the other: [.., Σ rows].
   * @param sides of one form and width
   */
  project(place: Place, x: string, sides: readonly ComponentRows[], name: string): string {
    const width = sides[0]!.width;
    const count = sides.reduce((sum, { rows }) => sum + rows, 0);
    return this.#product(place, x, name, width, count, this.formatOf(sides[0]!), (values) => {
      const joined = new (values(sides[0]!).constructor as Float32ArrayConstructor)(count * width);
      let at = 0;
      for (const side of sides) {
        joined.set(values(side) as Float32Array, at);
        at += side.rows * width;
      }
      return { values: joined, inner: 1, outer: width };
    });
  }

  /** Product x [.., rows] · E: [.., width]. */
  expand(place: Place, x: string, side: ComponentRows, name: string): string {
    return this.#product(place, x, name, side.rows, side.width, this.formatOf(side), (values) => {
      return { values: values(side), inner: side.width, outer: 1 };
    });
  }

  /**
   * Product x [.., inner] · M, with M[i, o] = values[i · strides.inner + o · strides.outer].
   * @param matrix returns the values of the sides in the form
   */
  #product(
    place: Place,
    x: string,
    name: string,
    inner: number,
    outer: number,
    format: Format,
    matrix: (values: (side: ComponentRows) => Float32Array | Int8Array) => Matrix,
  ): string {
    const isNew = !this.#shared.has(name);
    this.#shared.add(name);
    if (format === "floats") {
      if (isNew)
        this.#add(
          name,
          FLOAT,
          [inner, outer],
          turned(
            matrix((side) => side.floats()),
            inner,
            outer,
          ),
        );
      return place.op("MatMul", [x, name]);
    }
    const integers = (): Matrix => matrix((side) => side.integers!.values());
    // Rounded inputs share a scale within a block: small ones keep what is rounded as exact as in the model's own layers.
    const block = this.#level === EIGHT_BITS ? 32 : blockOf(inner);
    const blocks = Math.ceil(inner / block);
    if (format === "bytes" && !this.#multipliesBytes(inner, blocks * block)) {
      if (isNew) this.#add(name, INT8, [inner, outer], turned(integers(), inner, outer));
      return place.op("MatMul", [x, place.op("DequantizeLinear", [name, this.#ones(1, [])])]);
    }
    const bits = format === "bytes" ? 8 : 4;
    const pack = format === "bytes" ? padded : nibbles;
    if (isNew)
      this.#add(name, UINT8, [outer, blocks, (block * bits) / 8], pack(integers(), inner, outer, blocks * block));
    this.contributed = true;
    const attributes = { K: inner, N: outer, bits, block_size: block, accuracy_level: this.#level };
    return place.op("MatMulNBits", [x, name, this.#ones(outer * blocks)], attributes, CONTRIBUTED);
  }

  /**
   * True if a product with bytes is one operator, instead of unpacking them in each run. It rounds its inputs to 8 bits, so the model's
   * layers must do so too; and few components must not grow much when they are padded to a block.
   */
  #multipliesBytes(inner: number, padded: number): boolean {
    return this.#level === EIGHT_BITS && this.#by.includes("MatMulNBits") && 2 * padded <= 3 * inner;
  }

  /** Scales of blocks, all 1; products of one shape share them. */
  #ones(count: number, dims: readonly number[] = [count]): string {
    const name = `${PREFIX}/scales/${dims.join()}`;
    if (!this.#shared.has(name)) {
      this.#shared.add(name);
      this.#add(name, FLOAT, dims, new Float32Array(count).fill(1));
    }
    return name;
  }

  #add(name: string, type: number, dims: readonly number[], data: Added["data"]): void {
    this.#added.push({ name, type, dims, data });
  }
}

/** `accuracy_level` of MatMulNBits: inputs are not rounded to integers first, or to 8 bits, which takes a third of the time. */
const F32 = 1;
const EIGHT_BITS = 4;

/** Values with their strides along both dimensions of a matrix. */
interface Matrix {
  readonly values: Float32Array | Int8Array;
  readonly inner: number;
  readonly outer: number;
}

/** Copies a matrix to [inner, outer], row-major. */
function turned<T extends Float32Array | Int8Array>(matrix: Matrix, inner: number, outer: number): T {
  const { values } = matrix;
  if (matrix.outer === 1) return values as T;
  const out = new (values.constructor as Float32ArrayConstructor)(inner * outer);
  for (let i = 0; i < inner; i++) {
    for (let o = 0; o < outer; o++) out[i * outer + o] = values[i * matrix.inner + o * matrix.outer]!;
  }
  return out as unknown as T;
}

/** Block size that wastes least, its f32 scale included; the largest of equals. */
function blockOf(inner: number): number {
  const bytes = (block: number): number => Math.ceil(inner / block) * (block / 2 + 4);
  return [256, 128, 64, 32, 16].reduce((best, block) => (bytes(block) < bytes(best) ? block : best));
}

/** Bytes [outer, inner] as MatMulNBits needs them: each with 128 added; rows are padded with zeros. */
function padded({ values, ...strides }: Matrix, inner: number, outer: number, width: number): Uint8Array {
  const out = new Uint8Array(outer * width).fill(128);
  for (let o = 0; o < outer; o++)
    for (let i = 0; i < inner; i++) out[o * width + i] = values[o * strides.outer + i * strides.inner]! + 128;
  return out;
}

/** Packs [outer, inner] as MatMulNBits needs it: two values a byte, the first one low, each with 8 added; rows are padded with zeros. */
function nibbles({ values, ...strides }: Matrix, inner: number, outer: number, padded: number): Uint8Array {
  const out = new Uint8Array((outer * padded) / 2).fill(0x88);
  for (let o = 0; o < outer; o++) {
    for (
      let i = 0, from = o * strides.outer, at = (o * padded) >> 1;
      i < inner;
      i += 2, from += 2 * strides.inner, at++
    ) {
      const high = i + 1 < inner ? values[from + strides.inner]! : 0;
      out[at] = (values[from]! + 8) | ((high + 8) << 4);
    }
  }
  return out;
}
