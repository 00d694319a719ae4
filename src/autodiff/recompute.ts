/**
 * Chooses which values of the forward run the backward nodes find kept, and makes the others again. Kept values are memory that an
 * answering run does not need, so few are kept; but no product with a weight is computed twice. What is made again waits for the gradient
 * that needs it: runtimes order nodes by their inputs alone, and would recompute all layers first.
 */

import type { Graph } from "../onnx/model.ts";
import { makeNode, PREFIX } from "../onnx/nodes.ts";
import type { GraphProto, NodeProto } from "../onnx/protobuf.ts";
import type { Emitter, Moment } from "./emit.ts";
import type { ProbedPath } from "./path.ts";
import type { Shapes } from "./shapes.ts";

/** First letters of the names of values that are made again. */
export const AGAIN: string = `${PREFIX}/again/`;

/**
 * Adds the nodes that make values again.
 * @param path forward nodes
 * @param main the model's graph; receives shapes of its values, and constants of definitions
 * @param emit has written the backward nodes; their inputs are changed
 * @returns the backward nodes, each behind the nodes that make its values again
 */
export function recompute(path: ProbedPath, main: GraphProto, emit: Emitter): NodeProto[] {
  const backward = [...emit.nodes];
  const constants = new Set(main.initializer.map(({ name }) => name));
  const real = new Set([
    ...main.node.flatMap(({ output }) => output),
    ...main.input.map(({ name }) => name),
    ...constants,
  ]);
  const makers = new Map(path.graph.producers);
  for (const node of emit.shapes) {
    const [shape] = node.output as [string];
    if (real.has(node.input[0]!)) {
      main.node.push(node);
      real.add(shape);
    } else makers.set(shape, node);
  }
  const own = new Set(backward.flatMap(({ output }) => output));
  const read = backward.flatMap(({ input }) => input).filter((value) => value !== "" && !own.has(value));
  const needed = new Set<string>();
  // Values that depend on nothing trained are not counted as needed: they are made again from values that exist in any case.
  const pending = [...read];
  const seen = new Set<string>();
  for (const value of pending) {
    if (seen.has(value)) continue;
    seen.add(value);
    if (path.active.has(value)) needed.add(value);
    else if (!real.has(value)) pending.push(...(makers.get(value)?.input ?? []));
  }
  const isReal = (value: string): boolean => real.has(value);
  const again = new Again(
    path,
    makers,
    isReal,
    valuesToKeep({ ...path, isReal }, needed),
    emit.beside(`${PREFIX}/late`),
  );
  const nodes = backward.flatMap((node) => {
    const moment = emit.moments.get(node);
    node.input = node.input.map((value) => (own.has(value) || value === "" ? value : again.value(value, moment)));
    return [...again.take(), node];
  });
  for (const value of again.constants) {
    if (!constants.has(value)) main.initializer.push(path.graph.initializers.get(value)!);
  }
  return nodes;
}

/** Makes values of the forward run again. */
class Again {
  /** Weights and other constants that are read. */
  readonly constants = new Set<string>();
  readonly #path: ProbedPath;
  readonly #makers: ReadonlyMap<string, NodeProto>;
  readonly #isReal: (value: string) => boolean;
  readonly #kept: Kept;
  readonly #emit: Emitter;
  readonly #done = new Map<string, string>();
  #nodes: NodeProto[] = [];
  /** Nodes of the emitter that were taken over. */
  #taken = 0;

  constructor(
    path: ProbedPath,
    makers: ReadonlyMap<string, NodeProto>,
    isReal: (value: string) => boolean,
    kept: Kept,
    emit: Emitter,
  ) {
    this.#path = path;
    this.#makers = makers;
    this.#isReal = isReal;
    this.#kept = kept;
    this.#emit = emit;
  }

  /** The nodes since the last call. */
  take(): NodeProto[] {
    const nodes = this.#nodes;
    this.#nodes = [];
    return nodes;
  }

  /** Name under which a value is available in the branch, not before `moment`. */
  value(wanted: string, moment: Moment | undefined): string {
    // A loop rather than recursion: models are thousands of nodes deep.
    const pending = [wanted];
    while (pending.length > 0) {
      const value = pending.at(-1)!;
      const node = this.#captured(value) || this.#done.has(value) ? undefined : this.#makers.get(value);
      const missing = node?.input.filter((one) => one !== "" && !this.#captured(one) && !this.#done.has(one)) ?? [];
      if (missing.length > 0) {
        pending.push(...missing);
        continue;
      }
      if (node) this.#make(node, moment);
      pending.pop();
    }
    return this.#done.get(wanted) ?? this.#late(wanted, moment);
  }

  /** Whether a value comes from outside the branch. */
  #captured(value: string): boolean {
    if (!this.#makers.has(value)) return true;
    return this.#isReal(value) && (!this.#path.active.has(value) || this.#kept.stays(value));
  }

  #make(node: NodeProto, moment: Moment | undefined): void {
    const again = (value: string): string => AGAIN + value;
    const inputs = node.input.map((value) =>
      value === "" ? "" : (this.#done.get(value) ?? this.#late(value, moment)),
    );
    const outputs = node.output.map((value) => (value === "" ? "" : again(value)));
    const copy = makeNode(node.opType, again(node.output[0]!), inputs, outputs, {}, node.domain);
    copy.attribute = node.attribute;
    this.#nodes.push(copy);
    for (const value of node.output) if (value !== "") this.#done.set(value, again(value));
  }

  /** Re-emits an existing value so that it becomes available only after `moment`. Reshape reuses its buffer. */
  #late(value: string, moment: Moment | undefined): string {
    if (this.#path.graph.initializers.has(value)) this.constants.add(value);
    if (moment === undefined || !this.#path.active.has(value) || !this.#makers.has(value)) return value;
    const rank = this.#path.shapes.dims(value).length;
    if (rank === 0) return value;
    const emit = this.#emit;
    const zeros = emit.late(Array<number>(rank).fill(0), moment.value, moment.axis);
    const late = emit.op("Reshape", [value, zeros]);
    for (; this.#taken < emit.nodes.length; this.#taken++) this.#nodes.push(emit.nodes[this.#taken]!);
    return late;
  }
}

/** Product operators; with a weight or a factor they are expensive. */
const PRODUCT = /^(MatMul|Gemm|MatMulNBits|Conv|MatMulInteger.*)$/;

/** Size assumed for a free dimension, to compare values. */
const FREE = 64;

/** Products between a value and its use that make the use far: farther than within one layer. */
const FAR = 2;

export interface Forward {
  readonly graph: Graph;
  /** Values that depend on what is trained. */
  readonly active: ReadonlySet<string>;
  readonly shapes: Shapes;
  /** Whether a value is the model's own, rather than a definition's. */
  readonly isReal: (value: string) => boolean;
}

/** The choice of values to keep. */
export interface Kept {
  /** Whether a value of the model is kept for later readers. */
  stays(value: string): boolean;
}

/**
 * Chooses the values to keep. All others can be made from them and from what depends on nothing trained.
 * @param needed active values that the backward nodes read
 */
function valuesToKeep(forward: Forward, needed: ReadonlySet<string>): Kept {
  const { graph, active, shapes, isReal } = forward;
  const far = farUsed(forward);
  const mustStay = (value: string): boolean => {
    const node = graph.producers.get(value);
    return node !== undefined && isReal(value) && (isDear(node, graph) || far.has(value));
  };
  const places = new Map<string, NetworkNode<string>>();
  const pending = [...needed];
  for (const value of pending) {
    const node = graph.producers.get(value);
    if (!node || !active.has(value) || places.has(value)) continue;
    const real = isReal(value);
    const source = mustStay(value);
    const size = shapes.dims(value).reduce<number>((product, dim) => product * (dim ?? FREE), 1);
    const before = source ? [] : [...new Set(node.input)];
    places.set(value, { cost: real ? size : Infinity, source, sink: needed.has(value), before });
    for (const one of before) pending.push(one);
  }
  const kept = minCut(places);
  return { stays: (value) => kept.has(value) || mustStay(value) };
}

/** Whether one side of a product is a weight or a factor. */
function isDear({ opType, input }: NodeProto, { producers }: Graph): boolean {
  if (!PRODUCT.test(opType)) return false;
  return input.slice(0, 2).some((value) => {
    let name: string | undefined = value;
    // An f16 embedding that is the last layer too passes two of these. Damaged files may contain circles.
    for (let depth = 0; depth < 4 && name !== undefined; depth++) {
      const maker = producers.get(name);
      if (!maker) return true;
      name = /^(Transpose|Cast|Squeeze|Reshape|Constant|Identity)$/.test(maker.opType)
        ? (maker.input[0] ?? "")
        : undefined;
    }
    return false;
  });
}

/**
 * Values that bypass a layer, such as residuals. Each could be made from the one before and the layer's result, but then the last one
 * would need all of them at once.
 */
export function farUsed({ graph, active }: Pick<Forward, "graph" | "active">): ReadonlySet<string> {
  const depths = new Map<string, number>();
  const found = new Set<string>();
  for (const node of graph.proto.node) {
    const before = node.input.filter((value) => active.has(value));
    if (before.length === 0) continue;
    const depth = Math.max(...before.map((value) => depths.get(value) ?? 0)) + Number(isDear(node, graph));
    for (const value of node.output) depths.set(value, depth);
    for (const value of before) if (depth >= (depths.get(value) ?? 0) + FAR) found.add(value);
  }
  return found;
}

// Finds the cheapest set of nodes that every path from a source to a sink passes (Dinic's algorithm): the values of a forward run to keep
// so that everything needed later can be computed from them.

/** A node: its cost, and the nodes that lead to it. */
interface NetworkNode<P> {
  /** Infinity: never chosen. */
  readonly cost: number;
  /** Whether paths begin here. */
  readonly source: boolean;
  readonly sink: boolean;
  readonly before: readonly P[];
}

interface Edge {
  readonly to: number;
  left: number;
  readonly back: number;
}

/** The flow network. Each node becomes two, joined by an edge with the cost as capacity. */
class Network {
  readonly #edges: Edge[][];
  #level: number[] = [];
  #next: number[] = [];

  constructor(size: number) {
    this.#edges = Array.from({ length: size }, () => []);
  }

  connect(from: number, to: number, capacity: number): void {
    const [there, back] = [this.#edges[from]!, this.#edges[to]!];
    there.push({ to, left: capacity, back: back.length });
    back.push({ to: from, left: 0, back: there.length - 1 });
  }

  /** Sends as much flow as possible. */
  fill(source: number, sink: number): void {
    while (this.#measure(source, sink)) {
      this.#next = this.#edges.map(() => 0);
      while (this.#augment(source, sink) > 0);
    }
  }

  #measure(source: number, sink: number): boolean {
    this.#level = this.#edges.map(() => -1);
    this.#level[source] = 0;
    const queue = [source];
    for (const at of queue) {
      for (const { to, left } of this.#edges[at]!) {
        if (left <= 0 || this.#level[to]! >= 0) continue;
        this.#level[to] = this.#level[at]! + 1;
        queue.push(to);
      }
    }
    return this.#level[sink]! >= 0;
  }

  /** Adds one path. A loop rather than recursion: models are thousands of nodes deep. */
  #augment(source: number, sink: number): number {
    const path: Edge[] = [];
    let at = source;
    while (at !== sink) {
      const edge = this.#edges[at]![this.#next[at]!];
      if (edge && edge.left > 0 && this.#level[edge.to] === this.#level[at]! + 1) {
        path.push(edge);
        at = edge.to;
      } else if (edge) {
        this.#next[at]!++;
      } else {
        if (path.length === 0) return 0;
        const last = path.pop()!;
        at = this.#edges[last.to]![last.back]!.to;
        this.#next[at]!++;
      }
    }
    const most = path.reduce((least, { left }) => Math.min(least, left), Infinity);
    for (const edge of path) {
      edge.left -= most;
      this.#edges[edge.to]![edge.back]!.left += most;
    }
    return most;
  }

  /** Nodes that still reach the sink. */
  behind(sink: number): ReadonlySet<number> {
    const found = new Set([sink]);
    for (const at of found) {
      for (const { to, back } of this.#edges[at]!) if (this.#edges[to]![back]!.left > 0) found.add(to);
    }
    return found;
  }
}

/**
 * @param places no path may consist of nodes with cost Infinity only
 * @returns the cheapest set; among equally cheap ones the nearest to the sinks
 */
function minCut<P>(places: ReadonlyMap<P, NetworkNode<P>>): ReadonlySet<P> {
  const number = new Map([...places.keys()].map((place, i) => [place, 2 * i]));
  const [source, sink] = [2 * places.size, 2 * places.size + 1];
  const network = new Network(sink + 1);
  for (const [place, one] of places) {
    const at = number.get(place)!;
    network.connect(at, at + 1, one.cost);
    if (one.source) network.connect(source, at, Infinity);
    if (one.sink) network.connect(at + 1, sink, Infinity);
    for (const before of one.before) {
      const from = number.get(before);
      if (from !== undefined) network.connect(from + 1, at, Infinity);
    }
  }
  network.fill(source, sink);
  const behind = network.behind(sink);
  return new Set([...number].flatMap(([place, at]) => (!behind.has(at) && behind.has(at + 1) ? [place] : [])));
}
