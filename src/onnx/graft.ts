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
 * Where tasks share one side alone, factors lie over its components: A is [tasks, K_A, q] behind x·E_Aᵀ, B [tasks, q, K_B] before E_B.
 * Layers that one x enters (queries, keys, values) share its product with their components, and one input that holds their cores along
 * its diagonal. Such inputs of one width may come as one, one below the other. The usual x [batch, sequence, in] needs none of the
 * reshapes. Every node and every input costs: sessions take longer to create and to run.
 */
import type {
  AdaptedLayer,
  CoreBlock,
  Graft,
  GraftBias,
  Grafted,
  GraftHead,
  GraftOptions,
  GraftRows,
  ProbeOutputs,
  TaskInput,
} from "./adapted.ts";
import { ComponentProducts, type Components } from "./components.ts";
import { GraftTools } from "./graft-tools.ts";
import { endOf, FLOAT, INT64, type Linear } from "./linear.ts";
import type { OnnxModel } from "./model.ts";
import { dropUnused, freeLast, importContributed, makeSplit, makeValue, type Place, PREFIX } from "./nodes.ts";
import type { GraphProto, NodeProto } from "./protobuf.ts";

/**
 * Changes `model.proto` in place.
 * @param model that `checkGraftable` has passed; weights that are folded may have a place of their own since then
 * @param options `forms`: needed for modules with a form, and for vectors
 */
export function graft(
  model: OnnxModel,
  { modules, biases, rows, heads, vectors }: Graft,
  options: GraftOptions & { readonly forms?: typeof import("./graft-forms.ts") | undefined } = {},
): Grafted {
  const linear = modules.filter(({ form }) => !form);
  const grafter = new Grafter(model, options, linear);
  // A bias is added behind what DoRA scales, so before the term that goes between.
  for (const bias of biases) grafter.bias(bias);
  for (const table of rows) grafter.rows(table);
  for (const vector of vectors) options.forms!.addVector(grafter, vector);
  for (const { form, ...module } of modules) if (form) options.forms!.addModule(grafter, { ...module, form });
  for (const members of groupsOf(linear, ({ A }) => grafter.products.formOf(A))) grafter.group(members);
  // Terms are added to what replaced rows make.
  for (const table of rows) grafter.rowsOfLayer(table);
  for (const head of heads) grafter.head(head);
  if (options.join) grafter.joinCores();
  return grafter.finish(heads);
}

/** x·E_Aᵀ·core of a module, and the rows of x that it was made of. */
interface Mixed {
  readonly rows: string;
  readonly value: string;
}

/** A layer that lies in a packed one. */
interface Packed {
  readonly member: AdaptedLayer;
  readonly linear: Linear;
  readonly mixed: Mixed;
  readonly index: number;
}

interface RowsInto {
  readonly rank: number | undefined;
  readonly rows: string;
  /** rows [n, width] as [tasks, n / tasks, width], where they have no batch of their own. */
  readonly byTask: (value: string, width: number) => string;
}

class Grafter extends GraftTools {
  readonly products: ComponentProducts;
  #probe: ProbeOutputs | undefined;

  constructor(model: OnnxModel, options: GraftOptions, layers: readonly AdaptedLayer[]) {
    super(model, options);
    this.products = new ComponentProducts(options.integers ?? [], this.added, layers);
  }

  /** @param members which all have components, or one module */
  group(members: readonly AdaptedLayer[]): void {
    const core = members[0]!.components && this.#core(members);
    const own = members.map(({ name, in: inputs, out, factors, over, rowScale }) => {
      const [A, B] = [this.products.under(over?.A), this.products.under(over?.B)];
      return {
        A: factors ? this.input(name, "A", [A?.K ?? inputs, "q"], { over: A }) : undefined,
        B: factors ? this.input(name, "B", ["q", B?.K ?? out], { over: B }) : undefined,
        scale: rowScale ? this.input(name, "scale", [1, out]) : undefined,
      };
    });
    for (const i of members[0]!.linears.keys()) {
      const linears = members.map((member) => member.linears[i]!);
      const mixed = core && this.#mix(members, linears, core);
      const packed = new Map<NodeProto, Packed[]>();
      for (const [m, member] of members.entries()) {
        const linear = linears[m]!;
        const part = mixed && linear.slice && { member, linear, mixed: mixed[m]!, index: linear.slice.index };
        if (part) packed.set(linear.node, [...(packed.get(linear.node) ?? []), part]);
        else this.#term(member, linear, own[m]!, mixed?.[m]);
      }
      for (const parts of packed.values()) this.#addPacked(parts);
    }
  }

  /** The input that holds the cores of modules. */
  #core(members: readonly AdaptedLayer[]): TaskInput {
    let [row, column] = [0, 0];
    const cores = members.map(({ name, components }): CoreBlock => {
      const { A, B } = components!;
      const [scalesA, scalesB] = [this.products.scalesOf(A), this.products.scalesOf(B)];
      const block = { module: name, row, column, KA: A.rows, KB: B.rows, scalesA, scalesB };
      [row, column] = [row + A.rows, column + B.rows];
      return block;
    });
    this.input(joined(cores.map(({ module }) => module)), "core", [row, column], { cores });
    return this.inputs[this.inputs.length - 1]!;
  }

  /** x·E_Aᵀ·core, in front of the first of the layers. @returns the columns of each */
  #mix(members: readonly AdaptedLayer[], linears: readonly Linear[], core: TaskInput): Mixed[] {
    const { graph, x, type } = linears[0]!;
    const nodes = new Set(linears.map(({ node }) => node));
    const first = nodes.size === 1 ? linears[0]!.node : graph.node.find((node) => nodes.has(node))!;
    const place = this.place(core.of, graph, first, type);
    const [, KA] = core.dims as [string, number];
    const { rows, byTask } = this.#rowsInto(place, graph, x);
    const sides = members.map(({ components }) => components!.A);
    const projected = this.products.project(place, rows, sides, `${PREFIX}/${core.of}/E_A`);
    const mixed = place.op("MatMul", [byTask(projected, KA), core.name]);
    const widths = core.cores!.map(({ KB }) => KB);
    const parts = widths.length === 1 ? [mixed] : place.split(this.model, mixed, widths);
    place.before();
    return parts.map((value) => ({ rows, value }));
  }

  /** @param parts all layers that are packed into one: one addition for all */
  #addPacked(parts: Packed[]): void {
    const [{ member, linear, mixed }] = parts as [Packed];
    const { graph, type, x, slice } = linear;
    const end = endOf(this.model, linear);
    const place = this.place("packed", graph, end, type);
    const { rank } = this.#rowsInto(place, graph, x, mixed.rows);
    const terms = parts.map(({ member: { name, components }, mixed: { value } }) =>
      this.products.expand(place, value, components!.B, `${PREFIX}/${name}/E_B`),
    );
    this.#probeAt(graph, member.name, mixed.rows, terms[0]!);
    const inOrder = slice!.sizes.map((_, index) => terms[parts.findIndex((part) => part.index === index)]!);
    const width = slice!.sizes.reduce((a, b) => a + b, 0);
    const y = place.begin();
    const whole = this.#asY(place, place.op("Concat", inOrder, { axis: -1 }), y, rank, width);
    place.end(place.op("Add", [y, place.down(whole)]));
  }

  /** A term in the shape of y. */
  #asY(place: Place, value: string, y: string, rank: number | undefined, out: number): string {
    if (rank === 3) return value;
    return place.op("Reshape", [value, rank === 2 ? this.ints([-1, out]) : place.op("Shape", [y])]);
  }

  #probeAt(graph: GraphProto, module: string, x: string, term: string): void {
    if (this.wantsProbe(graph)) this.#probe ??= { module, x, term };
  }

  #term(
    { name, in: inputs, out, components, over }: AdaptedLayer,
    linear: Linear,
    { A, B, scale }: { A: string | undefined; B: string | undefined; scale: string | undefined },
    mixed: Mixed | undefined,
  ): void {
    // The term comes behind the bias where possible: runtimes fuse a product with its bias. DoRA scales the value in front of it.
    const end = scale === undefined ? endOf(this.model, linear) : linear.node;
    const place = this.place(name, linear.graph, end, linear.type);
    const { rank, rows, byTask } = this.#rowsInto(place, linear.graph, linear.x, mixed?.rows);
    const terms: string[] = [];
    if (A !== undefined && B !== undefined) {
      const read = over?.A ? this.products.project(place, rows, [over.A], `${PREFIX}/${name}/E_A`) : rows;
      const made = place.op("MatMul", [place.op("MatMul", [byTask(read, over?.A?.rows ?? inputs), A]), B]);
      terms.push(over?.B ? this.products.expand(place, made, over.B, `${PREFIX}/${name}/E_B`) : made);
    }
    if (mixed) terms.push(this.products.expand(place, mixed.value, components!.B, `${PREFIX}/${name}/E_B`));
    const term = terms.length === 2 ? place.op("Add", terms) : terms[0]!;
    this.#probeAt(linear.graph, name, rows, term);
    const bias = scale && linear.bias;
    // y without its bias: DoRA scales it.
    if (bias) linear.node.input.length = 2;
    let y = place.begin();
    const asY = (value: string): string => this.#asY(place, value, y, rank, out);
    if (scale === undefined) {
      place.end(place.op("Add", [y, place.down(asY(term))]));
      return;
    }
    const whole = place.op("Add", [byTask(place.up(y), out), term]);
    y = asY(place.op("Mul", [whole, scale]));
    if (bias) y = place.op("Add", [y, place.up(bias)]);
    place.end(place.down(y));
  }

  /**
   * x as f32 rows: [batch, sequence, in], which multiplies with [tasks, …] as it is, or [n, in], which `byTask` reshapes.
   * @param made what another place has made of it
   */
  #rowsInto(place: Place, graph: GraphProto, x: string, made?: string): RowsInto {
    const rank = this.rank(graph, x);
    const flat = (): string =>
      rank === 3 || rank === 2 ? place.up(x) : place.op("Flatten", [place.up(x)], { axis: -1 });
    const byTask = (value: string, width: number): string => (rank === 3 ? value : this.rowsOf(place, value, width));
    return { rank, rows: made ?? flat(), byTask };
  }

  bias({ name, size, type, places }: GraftBias): void {
    const change = this.input(name, "bias", [1, size]);
    for (const { graph, node } of places) {
      const place = this.place(name, graph, node, type);
      const y = place.begin();
      const sum = place.op("Add", [this.rowsOf(place, place.up(y), size), change]);
      place.end(place.down(place.op("Reshape", [sum, place.op("Shape", [y])])));
    }
  }

  rows({ name, width, type, places }: GraftRows): void {
    if (places.length === 0) return;
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
      place.end(place.down(place.op("Reshape", [sum, place.op("Shape", [y])])));
    }
  }

  rowsOfLayer({ name, count: out, width, linears }: GraftRows): void {
    if (linears.length === 0) return;
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
    for (const { graph, node, x, type } of linears) {
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

  head({ name, in: inputs, bias: hasBias, places }: GraftHead): void {
    const weight = this.input(name, "headWeight", [inputs, "labels"]);
    const bias = hasBias ? this.input(name, "headBias", [1, "labels"]) : undefined;
    const labels = this.dims("labels", weight, 2, 3);
    for (const { linear, end } of places) {
      const place = this.place(name, linear.graph, end, linear.type);
      const x = place.op("Flatten", [place.up(linear.x)], { axis: -1 });
      let y = place.op("MatMul", [this.rowsOf(place, x, inputs), weight]);
      // A task without a bias keeps the model's.
      const added = bias ?? (linear.bias && place.up(linear.bias));
      if (added) y = place.op("Add", [y, added]);
      const leading = place.op("Slice", [place.op("Shape", [linear.x]), this.ints([0]), this.ints([-1])]);
      const shape = place.op("Concat", [leading, labels], { axis: 0 });
      place.replace(place.down(place.op("Reshape", [y, shape])));
    }
  }

  /** Makes one input of those for cores that are equally wide: a runtime takes some microseconds for each input of each run. */
  joinCores(): void {
    const { inputs, splits } = joinCores(this.model, this.inputs);
    this.inputs = inputs;
    this.shared.unshift(...splits);
  }

  finish(heads: readonly GraftHead[]): Grafted {
    const main = this.main;
    this.edits.apply();
    // ONNX wants nodes behind those that make their inputs.
    main.node.unshift(...this.shared);
    for (const { name, kind, dims } of this.inputs) {
      const free = dims.map((d) => (typeof d === "number" ? d : d === "tasks" ? `${PREFIX}.tasks` : ""));
      main.input.push(makeValue(name, kind === "indices" ? INT64 : FLOAT, free));
    }
    for (const value of this.#probe ? [this.#probe.x, this.#probe.term] : []) main.output.push(makeValue(value, FLOAT));
    for (const { x, term } of this.formProbes) for (const value of [x, term]) main.output.push(makeValue(value, FLOAT));
    // Shapes written into the file hold the base's number of labels.
    if (heads.length > 0) freeLast(main, new Set(heads.map(({ out }) => BigInt(out))));
    if (this.products.contributed) importContributed(this.model);
    // Replaced heads, and the weights that folding has given a place of their own.
    // Old exporters list initializers among the inputs; an input without its initializer would have to be fed.
    dropUnused(this.main, ({ name }) => !this.model.graph.initializers.has(name));
    const [inputs, initializers] = [this.inputs, this.added];
    return { inputs, initializers, probe: this.#probe, formProbes: this.formProbes };
  }
}

// Groups layers with one common input: queries, keys and values; gate and up. Joins inputs of tasks.

/**
 * Groups modules with components by their common input, in the same order. Other modules with terms stay alone: those without components,
 * and those that are applied several times.
 * @param kindOf modules of different kinds are kept apart
 */
function groupsOf<M extends Pick<AdaptedLayer, "linears" | "components">>(
  modules: readonly M[],
  kindOf: (components: Components) => string,
): M[][] {
  const groups = new Map<unknown, M[]>();
  const graphs = new Map<GraphProto, number>();
  for (const module of modules) {
    const [first, second] = module.linears;
    let key: unknown = module;
    if (first && !second && module.components) {
      if (!graphs.has(first.graph)) graphs.set(first.graph, graphs.size);
      key = `${graphs.get(first.graph)} ${first.type} ${kindOf(module.components)} ${first.x}`;
    }
    groups.set(key, [...(groups.get(key) ?? []), module]);
  }
  return [...groups.values()];
}

/** Joins names of modules, with their common start only once: "layer.self.query+key". */
function joined([first = "", ...others]: readonly string[]): string {
  const parent = first.slice(0, first.lastIndexOf(".") + 1);
  return [first, ...others.map((name) => (name.startsWith(parent) ? name.slice(parent.length) : name))].join("+");
}

/** Puts cores that are equally wide below each other in one input, which nodes split again. */
function joinCores(
  model: OnnxModel,
  inputs: readonly TaskInput[],
): { readonly inputs: TaskInput[]; readonly splits: NodeProto[] } {
  const splits: NodeProto[] = [];
  let left = [...inputs];
  for (const width of new Set(inputs.flatMap(({ kind, dims }) => (kind === "core" ? [dims[2] as number] : [])))) {
    const parts = inputs.filter(({ kind, dims }) => kind === "core" && dims[2] === width);
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
    splits.push(makeSplit(model, `${PREFIX}/cores/${width}`, name, names, heights, 1));
    left = left.filter((input) => !parts.includes(input));
    left.push({ name, of: joined(parts.map(({ of }) => of)), kind: "core", dims: ["tasks", height, width], cores });
  }
  return { inputs: left, splits };
}
