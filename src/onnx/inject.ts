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
 * Where tasks share one side alone, factors lie over its components: A is [tasks, K_A, q] behind x·E_Aᵀ, B [tasks, q,
 * K_B] before E_B. Layers that one x enters (queries, keys, values) share its product with their components, and one
 * input that holds their cores along its diagonal. Such inputs of one width may come as one, one below the other. The
 * usual x [batch, sequence, in] needs none of the reshapes. Every node and every input costs: sessions take longer to
 * create and to run.
 */
import { transpose } from "../tensor/term.ts";
import type * as linear from "./linear.ts";
import { endOf, FLOAT, INT8, INT64, joinedRows, UINT8 } from "./linear.ts";
import { intOf, type OnnxModel, type RankOf, ranksOf } from "./model.ts";
import {
  CONTRIBUTED,
  Constants,
  dropUnused,
  freeLast,
  importContributed,
  makeSplit,
  makeTensor,
  makeValue,
  NodeEdits,
  NodeWriter,
  Place,
  PREFIX,
} from "./nodes.ts";
import type { GraphProto, NodeProto } from "./protobuf.ts";

/**
 * Operators of a runtime for products with integers: MatMulNBits for 4 bits, DequantizeLinear for bytes, both for
 * MatMulNBits of bytes too.
 */
type IntegerProducts = readonly ("MatMulNBits" | "DequantizeLinear")[];

export interface InjectOptions {
  /** Adds outputs for the parity probe. Default: true. */
  readonly probeOutputs?: boolean | undefined;
  /** Operators for components that are integers. Default: none, they become floats. */
  readonly integers?: IntegerProducts | undefined;
  /** Needed for modules with a form, and for vectors. */
  readonly forms?: FormInjection | undefined;
  /**
   * Joins cores to as few inputs as can be. Default: false: a split into many parts is more than some devices bind at
   * once.
   */
  readonly joinCores?: boolean | undefined;
}

/** Surgery next to what is no linear layer: forms.ts, which is loaded when it is needed. */
interface FormInjection {
  addModule(tools: Injector, module: linear.AdaptedLayer): void;
  addVector(tools: Injector, vector: linear.AdaptedVector): void;
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
  readonly scalesA?: Float32Array | undefined;
  readonly scalesB?: Float32Array | undefined;
}

export interface Injected {
  readonly inputs: readonly TaskInput[];
  /** Bytes of the components, which are initializers of the graph. */
  readonly componentBytes: number;
  /** Outputs for a probe of the first adapted layer in the main graph. */
  readonly probe: ProbeOutputs | undefined;
}

/** Values of one adapted layer that are outputs of the graph: x, f32 rows of [in], and the term, f32 rows of [out]. */
interface ProbeOutputs {
  readonly module: string;
  readonly x: string;
  readonly term: string;
}

/**
 * Changes the graph, in place, of a model that `checkInjectable` has passed. Weights that are folded may have a place
 * of their own.
 */
export function inject(
  model: OnnxModel,
  { modules, biases, rows, heads, vectors }: linear.GraphChanges,
  options: InjectOptions = {},
): Injected {
  const layers = modules.filter(({ kind }) => kind === "linear");
  const injector = new Injector(model, options, layers);
  // A bias is added behind what DoRA scales, so before the term that goes between.
  for (const bias of biases) injector.bias(bias);
  for (const table of rows) if (table.places.length > 0) injector.rowsOfTable(table);
  for (const vector of vectors) options.forms!.addVector(injector, vector);
  for (const module of modules) if (module.kind !== "linear") options.forms!.addModule(injector, module);
  for (const members of injector.groupsOf(layers)) injector.terms(members);
  // Terms are added to what replaced rows make.
  for (const layer of rows) if (layer.sites.length > 0) injector.rowsOfLayer(layer);
  for (const head of heads) injector.head(head);
  if (options.joinCores) injector.joinCores();
  return injector.finish(heads);
}

/** x·E_Aᵀ·core of a module, and the rows of x that it was made of. */
type Mixed = { readonly [Value in "rows" | "value"]: string };

/** Names of the inputs of a layer's own. */
type FactorInputs = { readonly [Kind in "A" | "B" | "scale"]: string | undefined };

/** Task inputs, places to edit, and nodes in front of all others that every place shares. */
export class Injector extends NodeWriter {
  readonly model: OnnxModel;
  readonly main: GraphProto;
  inputs: TaskInput[] = [];
  #componentBytes = 0;
  readonly edits: NodeEdits = new NodeEdits();
  readonly #rankOf: RankOf;
  readonly #integers: IntegerProducts;
  /** `accuracy_level` of products with components. */
  readonly #level: number;
  /** True if an operator of onnxruntime's own domain was used. */
  #contributed = false;
  readonly #wantsProbe: boolean;
  #probe: ProbeOutputs | undefined;
  #places = 0;

  constructor(
    model: OnnxModel,
    { integers = [], probeOutputs = true }: InjectOptions,
    layers: readonly linear.AdaptedLayer[],
  ) {
    super(new Constants(model.graph.proto, model.opset, PREFIX), `${PREFIX}/shared`);
    this.model = model;
    this.main = model.graph.proto;
    this.#rankOf = ranksOf(model);
    this.#integers = integers;
    const levels = layers.flatMap(({ sites }) =>
      sites.map(({ node, product = node }) => intOf(product, "accuracy_level")),
    );
    // Where the model rounds all of their inputs to 8 bits, products with components do the same.
    this.#level = levels.length > 0 && levels.every((level) => level === EIGHT_BITS) ? EIGHT_BITS : F32;
    this.#wantsProbe = probeOutputs;
  }

  /** A tensor that is added to the model, once. */
  tensor(key: string, type: number, dims: readonly number[], data: () => ArrayBufferView): string {
    return this.constants.add(key, (name) => {
      const tensor = makeTensor(name, type, dims, data());
      this.#componentBytes += tensor.rawData.length;
      return tensor;
    });
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

  dims(input: string, from: number, to: number): string {
    return this.slice(this.shapeOf(input), 0, from, to);
  }

  tasks(): string {
    return this.dims(this.inputs[0]!.name, 0, 1);
  }

  /** rows [n, width] as [tasks, n / tasks, width]. */
  rowsOf(place: Place, value: string, width: number): string {
    return place.reshape(value, this.concat([this.tasks(), [-1, width]], 0));
  }

  /** Adds the inputs of a layer's own factors and of its rows' scale. */
  factorInputs({ name, in: width, out, factors, rowScale, over }: linear.AdaptedLayer): FactorInputs {
    const under = (rows: linear.ComponentRows | undefined): TaskInput["over"] =>
      rows && { K: rows.rows, scales: this.#scalesOf(rows) };
    const A = under(over?.A);
    const B = under(over?.B);
    return {
      A: factors ? this.input(name, "A", [A?.K ?? width, "q"], { over: A }) : undefined,
      B: factors ? this.input(name, "B", ["q", B?.K ?? out], { over: B }) : undefined,
      scale: rowScale ? this.input(name, "scale", [1, out]) : undefined,
    };
  }

  /**
   * Ends a place with y + term; with DoRA, with (y + term) · scale + bias, where y has no bias any more.
   * @param shapes bring y into the shape of the term, and a sum back into that of y
   */
  endWith(
    place: Place,
    y: string,
    term: string,
    shapes: { byTask(y: string): string; asY(sum: string): string },
    scale: string | undefined,
    bias?: string,
  ): void {
    if (scale === undefined) return place.end(place.add(y, place.down(shapes.asY(term))));
    const whole = shapes.asY(place.mul(place.add(shapes.byTask(place.up(y)), term), scale));
    place.end(place.down(bias === undefined ? whole : place.add(whole, bias)));
  }

  place(of: string, graph: GraphProto, node: NodeProto, type: number): Place {
    return new Place(this.edits, this.constants, graph, node, `${PREFIX}/${of}/${this.#places++}`, type);
  }

  /** Rank of a value in the main graph; undefined elsewhere, and where it cannot be told. */
  rank(graph: GraphProto, value: string): number | undefined {
    return graph === this.main ? this.#rankOf(value) : undefined;
  }

  /**
   * Groups modules with components of one form by their common input: queries, keys and values; gate and up. Others
   * stay alone.
   */
  groupsOf(modules: readonly linear.AdaptedLayer[]): linear.AdaptedLayer[][] {
    const groups = new Map<unknown, linear.AdaptedLayer[]>();
    const graphs = [...this.model.graph.scopes.keys()];
    for (const module of modules) {
      const [first, second] = module.sites;
      const key =
        first && !second && module.components
          ? `${graphs.indexOf(first.graph)} ${first.type} ${this.#formatOf(module.components.A)} ${first.x}`
          : module;
      groups.set(key, [...(groups.get(key) ?? []), module]);
    }
    return [...groups.values()];
  }

  /** Adds the terms of modules that share their x. @param members which all have components, or one module */
  terms(members: readonly linear.AdaptedLayer[]): void {
    const core = members[0]!.components && this.#core(members);
    const inputs = members.map((member) => this.factorInputs(member));
    for (const i of members[0]!.sites.keys()) {
      const sites = members.map((member) => member.sites[i]!);
      const mixed = core && this.#mix(members, sites, core);
      for (const [m, member] of members.entries()) this.#term(member, sites[m]!, inputs[m]!, mixed?.[m]);
    }
  }

  #core(members: readonly linear.AdaptedLayer[]): TaskInput {
    let row = 0;
    let column = 0;
    const cores = members.map(({ name, components }): CoreBlock => {
      const { A, B } = components!;
      const scalesA = this.#scalesOf(A);
      const scalesB = this.#scalesOf(B);
      const block = { module: name, row, column, KA: A.rows, KB: B.rows, scalesA, scalesB };
      row += A.rows;
      column += B.rows;
      return block;
    });
    this.input(joined(cores.map(({ module }) => module)), "core", [row, column], { cores });
    return this.inputs.at(-1)!;
  }

  /** x·E_Aᵀ·core, in front of the first of the layers. @returns the columns of each */
  #mix(members: readonly linear.AdaptedLayer[], sites: readonly linear.Site[], core: TaskInput): Mixed[] {
    const { graph, x, type } = sites[0]!;
    const nodes = new Set(sites.map(({ node }) => node));
    const first = nodes.size === 1 ? sites[0]!.node : graph.node.find((node) => nodes.has(node))!;
    const place = this.place(core.of, graph, first, type);
    const [, KA] = core.dims as [string, number];
    const { rows, byTask } = this.#rowsInto(place, graph, x);
    const sides = joinedRows(members.map(({ components }) => components!.A));
    const projected = this.#multiply(place, rows, sides, `${core.of}/E_A`, true);
    const mixed = place.matMul(byTask(projected, KA), core.name);
    const widths = core.cores!.map(({ KB }) => KB);
    const parts = widths.length === 1 ? [mixed] : place.split(mixed, -1, widths);
    place.before();
    return parts.map((value) => ({ rows, value }));
  }

  #term(
    { name, in: inputs, out, components, over }: linear.AdaptedLayer,
    site: linear.Site,
    { A, B, scale }: FactorInputs,
    mixed: Mixed | undefined,
  ): void {
    // The term comes behind the bias where possible: runtimes fuse a product with its bias. DoRA scales the value in
    // front of it.
    const end = scale === undefined ? endOf(this.model, site) : site.node;
    const place = this.place(name, site.graph, end, site.type);
    const { rank, rows, byTask } = this.#rowsInto(place, site.graph, site.x, mixed?.rows);
    const terms: string[] = [];
    if (A !== undefined && B !== undefined) {
      const read = over?.A ? this.#multiply(place, rows, over.A, `${name}/E_A`, true) : rows;
      const made = place.matMul(place.matMul(byTask(read, over?.A?.rows ?? inputs), A), B);
      terms.push(over?.B ? this.#multiply(place, made, over.B, `${name}/E_B`) : made);
    }
    if (mixed) terms.push(this.#multiply(place, mixed.value, components!.B, `${name}/E_B`));
    const term = terms.reduce((a, b) => place.add(a, b));
    if (this.#wantsProbe && site.graph === this.main) this.#probe ??= { module: name, x: rows, term };
    const bias = scale && site.bias && place.up(site.bias);
    // y without its bias: DoRA scales it.
    if (bias) site.node.input.length = 2;
    const y = place.begin();
    const asY = (sum: string): string => this.#asY(place, sum, y, rank, out);
    this.endWith(place, y, term, { byTask: (value) => byTask(value, out), asY }, scale, bias);
  }

  /** A value [tasks, n / tasks, out] in the shape of y. */
  #asY(place: Place, value: string, y: string, rank: number | undefined, out: number): string {
    if (rank === 3) return value;
    return place.reshape(value, rank === 2 ? [-1, out] : place.shapeOf(y));
  }

  /**
   * x as f32 rows: [batch, sequence, in], which multiplies with [tasks, …] as it is, or [n, in], which `byTask`
   * reshapes.
   */
  #rowsInto(place: Place, graph: GraphProto, x: string, made?: string) {
    const rank = this.rank(graph, x);
    const flat = (): string => (rank === 3 || rank === 2 ? place.up(x) : place.rows(place.up(x)));
    /** rows [n, width] as [tasks, n / tasks, width], where they have no batch of their own. */
    const byTask = (value: string, width: number): string => (rank === 3 ? value : this.rowsOf(place, value, width));
    return { rank, rows: made ?? flat(), byTask };
  }

  bias({ name, size, type, places }: linear.AdaptedBias): void {
    const change = this.input(name, "bias", [1, size]);
    for (const { graph, node } of places) {
      const place = this.place(name, graph, node, type);
      const y = place.begin();
      const sum = place.add(this.rowsOf(place, place.up(y), size), change);
      place.end(place.down(this.#asY(place, sum, y, undefined, size)));
    }
  }

  rowsOfTable({ name, width, type, places }: linear.AdaptedRows): void {
    const indices = this.input(name, "indices", [1, "rows"]);
    const change = this.input(name, "rows", ["rows", width + 1]);
    for (const { graph, node } of places) {
      const place = this.place(name, graph, node, type);
      const y = place.begin();
      const ids = this.rowsOf(place, place.cast(node.input[1]!, INT64), 1);
      const met = place.cast(place.op("Equal", ids, indices), FLOAT);
      const found = place.matMul(met, change);
      const old = this.rowsOf(place, place.up(y), width);
      const left = place.sub(old, place.mul(old, place.slice(found, -1, width, width + 1)));
      const sum = place.add(left, place.slice(found, -1, 0, width));
      place.end(place.down(this.#asY(place, sum, y, undefined, width)));
    }
  }

  rowsOfLayer({ name, count: out, width, sites }: linear.AdaptedRows): void {
    const indices = this.input(name, "indices", [1, "rows"]);
    const change = this.input(name, "rows", ["rows", width + 1]);
    const columns = (value: string): string => this.transpose(value, [0, 2, 1]);
    const outputs = this.range(this.int(out));
    const met = this.cast(this.op("Equal", columns(indices), outputs), FLOAT);
    const values = columns(this.slice(change, -1, 0, width));
    const strength = this.matMul(columns(this.slice(change, -1, width, width + 1)), met);
    for (const { graph, node, x, type } of sites) {
      const place = this.place(name, graph, node, type);
      const { rank, rows, byTask } = this.#rowsInto(place, graph, x);
      const found = place.matMul(byTask(rows, width), values);
      const y = place.begin();
      const old = byTask(place.up(y), out);
      const left = place.sub(old, place.mul(old, strength));
      const sum = place.add(left, place.matMul(found, met));
      place.end(place.down(this.#asY(place, sum, y, rank, out)));
    }
  }

  head({ name, in: inputs, bias: hasBias, places }: linear.AdaptedHead): void {
    const weight = this.input(name, "headWeight", [inputs, "labels"]);
    const bias = hasBias ? this.input(name, "headBias", [1, "labels"]) : undefined;
    const labels = this.dims(weight, 2, 3);
    for (const { site, end } of places) {
      const place = this.place(name, site.graph, end, site.type);
      const x = place.rows(place.up(site.x));
      let y = place.matMul(this.rowsOf(place, x, inputs), weight);
      // A task without a bias keeps the model's.
      const added = bias ?? (site.bias && place.up(site.bias));
      if (added) y = place.add(y, added);
      place.replace(place.down(place.unrows(y, site.x, labels)));
    }
  }

  /**
   * Joins cores of one width to one input, which nodes split again: a runtime takes some microseconds for each input of
   * each run.
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
      this.nodes.unshift(makeSplit(this.model, `${PREFIX}/cores/${width}`, name, names, heights, 1));
      this.inputs = this.inputs.filter((input) => !parts.includes(input));
      const of = joined(parts.map((part) => part.of));
      this.inputs.push({ name, of, kind: "core", dims: ["tasks", height, width], cores });
    }
  }

  // Products with components, in the smallest form that a runtime multiplies by. Scales of integers are in the core
  // between them.

  /** Form that these components take. Components of different forms do not share a product. */
  #formatOf({ integers }: linear.ComponentRows): Format {
    if (integers && integers.bits <= 4 && this.#integers.includes("MatMulNBits")) return "nibbles";
    return integers && this.#integers.includes("DequantizeLinear") ? "bytes" : "floats";
  }

  /** Factors that the core has to apply to the row of each component; undefined: none. */
  #scalesOf(rows: linear.ComponentRows): Float32Array | undefined {
    return this.#formatOf(rows) === "floats" ? undefined : rows.integers!.scales;
  }

  /**
   * Product of x with components [rows, width].
   * @param turned true for x [.., width] · Eᵀ, false for x [.., rows] · E
   */
  #multiply(place: Place, x: string, factor: linear.ComponentRows, key: string, turned = false): string {
    const { rows, width } = factor;
    const [inner, outer] = turned ? [width, rows] : [rows, width];
    const format = this.#formatOf(factor);
    const asMatrix = <T extends Float32Array | Int8Array>(values: T): T =>
      turned ? transpose(values, outer, inner) : values;
    if (format === "floats") {
      const floats = this.tensor(key, FLOAT, [inner, outer], () => asMatrix(factor.floats()));
      return place.matMul(x, floats);
    }
    const integers = (): Int8Array => factor.integers!.values();
    // Rounded inputs share a scale within a block: small ones keep what is rounded as exact as in the model's own
    // layers.
    const block = this.#level === EIGHT_BITS ? 32 : blockOf(inner);
    const blocks = Math.ceil(inner / block);
    if (format === "bytes" && !this.#multipliesBytes(inner, blocks * block)) {
      const bytes = this.tensor(key, INT8, [inner, outer], () => asMatrix(integers()));
      return place.matMul(x, place.op("DequantizeLinear", bytes, this.#ones(1, [])));
    }
    const bits = format === "bytes" ? 8 : 4;
    const weight = this.tensor(key, UINT8, [outer, blocks, (block * bits) / 8], () =>
      packed(turned ? integers() : transpose(integers(), inner, outer), bits, inner, blocks * block),
    );
    this.#contributed = true;
    const attributes = { K: inner, N: outer, bits, block_size: block, accuracy_level: this.#level };
    return place.op(`${CONTRIBUTED}.MatMulNBits`, x, weight, this.#ones(outer * blocks), attributes);
  }

  /**
   * True if one operator multiplies by bytes. It rounds its inputs to 8 bits, as the model must, and components are
   * padded to a block.
   */
  #multipliesBytes(inner: number, padded: number): boolean {
    return this.#level === EIGHT_BITS && this.#integers.includes("MatMulNBits") && 2 * padded <= 3 * inner;
  }

  /** Scales of blocks, all 1; products of one shape share them. */
  #ones(count: number, dims: readonly number[] = [count]): string {
    return this.tensor(`scales/${dims.join()}`, FLOAT, dims, () => new Float32Array(count).fill(1));
  }

  finish(heads: readonly linear.AdaptedHead[]): Injected {
    const { main, inputs } = this;
    this.edits.apply();
    // ONNX wants nodes behind those that make their inputs.
    main.node.unshift(...this.nodes);
    for (const { name, kind, dims } of inputs) {
      const free = dims.map((d) => (typeof d === "number" ? d : d === "tasks" ? `${PREFIX}.tasks` : ""));
      main.input.push(makeValue(name, kind === "indices" ? INT64 : FLOAT, free));
    }
    for (const value of this.#probe ? [this.#probe.x, this.#probe.term] : []) main.output.push(makeValue(value, FLOAT));
    // Shapes written into the file hold the base's number of labels.
    if (heads.length > 0) freeLast(main, new Set(heads.map(({ out }) => BigInt(out))));
    if (this.#contributed) importContributed(this.model);
    // Replaced heads, and the weights that folding has given a place of their own.
    // Old exporters list initializers among the inputs; an input without its initializer would have to be fed.
    dropUnused(main, ({ name }) => !this.model.graph.initializers.has(name));
    return { inputs, componentBytes: this.#componentBytes, probe: this.#probe };
  }
}

/** Joins names of modules, with their common start only once: "layer.self.query+key". */
function joined([first = "", ...others]: readonly string[]): string {
  const parent = first.slice(0, first.lastIndexOf(".") + 1);
  return [first, ...others.map((name) => (name.startsWith(parent) ? name.slice(parent.length) : name))].join("+");
}

type Format = "floats" | "bytes" | "nibbles";

/**
 * `accuracy_level` of MatMulNBits: inputs are not rounded to integers first, or to 8 bits, which takes a third of the
 * time.
 */
const F32 = 1;
const EIGHT_BITS = 4;

/** Block size that wastes least, its f32 scale included; the largest of equals. */
function blockOf(inner: number): number {
  const bytes = (block: number): number => Math.ceil(inner / block) * (block / 2 + 4);
  return [256, 128, 64, 32, 16].reduce((best, block) => (bytes(block) < bytes(best) ? block : best));
}

/**
 * Rows of `inner` integers as MatMulNBits needs them: padded to `width`, 2^(bits − 1) added; of 4 bits two in a byte,
 * the first low.
 */
function packed(values: Int8Array, bits: 4 | 8, inner: number, width: number): Uint8Array {
  const outer = values.length / inner;
  const out = new Uint8Array((outer * width * bits) / 8).fill(bits === 8 ? 0x80 : 0x88);
  for (let o = 0; o < outer; o++) {
    for (let i = 0; i < inner; i++) {
      const value = values[o * inner + i]!;
      const at = o * width + i;
      if (bits === 8) out[at] = value + 128;
      // Either half is 8 so far.
      else out[at >> 1]! ^= ((value + 8) ^ 8) << (4 * (i & 1));
    }
  }
  return out;
}
