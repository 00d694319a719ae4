/**
 * Ranks, types and fixed dimensions of a graph's values, found by running it twice instead of by shape inference. Free
 * dimensions differ between the two feeds, so a size that is equal in both runs is fixed.
 */

import { FormatError } from "../errors.ts";
import type { Feed } from "../onnx/feeds.ts";
import { type Graph, inOrder, intOf, intsOf, nestedGraphs } from "../onnx/model.ts";
import { makeNode, PREFIX } from "../onnx/nodes.ts";
import { create, type NodeProto } from "../onnx/protobuf.ts";
import type { ModelFile } from "../onnx/read.ts";
import { type DetachedModel, detachWeights } from "../onnx/write.ts";
import { elementsOf } from "../tensor/dtypes.ts";
import type { Dimension } from "./emit.ts";

/** The parts of an onnxruntime tensor that are used here. */
interface Probed {
  readonly type: string;
  readonly dims: readonly number[];
  readonly data: unknown;
}

/**
 * Loads a model, runs each feed once, and returns all outputs of each run by name; any runtime of ONNX models can do
 * it. The weights are files apart from the graph (`externalData` of onnxruntime's options).
 */
export type ShapeProbe = (
  model: DetachedModel,
  feeds: readonly ReadonlyMap<string, Feed>[],
) => Promise<readonly Readonly<Record<string, Probed>>[]>;

export type Dims = readonly (number | undefined)[];

export function fromFront(axis: number, rank: number): number {
  return axis < 0 ? axis + rank : axis;
}

/** Larger constants are not compared, so that their data need not be returned. */
export const LARGEST_CONSTANT = 64;

/** Most free dimensions for which products are tabulated. */
const MOST_FREE = 64;

/** Runs the model and records the values of its main graph. @param feeds two, with every input */
export async function probeShapes(
  file: ModelFile,
  values: Iterable<string>,
  feeds: readonly ReadonlyMap<string, Feed>[],
  probe: ShapeProbe,
  problems: Problems,
): Promise<Shapes> {
  const { graph } = file.model;
  const { proto } = graph;
  const found = new Map<string, readonly Probed[]>();
  const asked = [...new Set(values)];
  for (const value of asked) {
    const weight = weightOf(graph, value);
    if (weight) found.set(value, [weight, weight]);
    const inputs = feeds
      .flatMap((feed) => feed.get(value) ?? [])
      .map(({ dataType, dims }) => ({ type: nameOf(dataType), dims, data: undefined }));
    if (inputs.length > 0) found.set(value, inputs);
  }
  const fetches = asked.filter((value) => !found.has(value)).map((value, i) => ({ value, as: `${PREFIX}/probe/${i}` }));
  const [outputs, nodes] = [proto.output, proto.node.length];
  // An Identity in between: runtimes reject inputs and initializers as outputs.
  for (const { value, as } of fetches) proto.node.push(makeNode("Identity", as, [value], as));
  proto.output = fetches.map(({ as }) => create("ValueInfoProto", { name: as }));
  let model: DetachedModel;
  try {
    model = await detachWeights(file);
  } finally {
    proto.node.length = nodes;
    proto.output = outputs;
  }
  const runs = await probe(model, feeds);
  for (const { value, as } of fetches) {
    const probed = runs.map((run) => run[as]!);
    const [first, second] = probed as [Probed, Probed];
    if (first.dims.length !== second.dims.length) problems.add("the rank of a value depends on the input", value);
    if (first.dims.some((size, axis) => size !== second.dims[axis] && (size === 1 || second.dims[axis] === 1))) {
      problems.add(
        "a free dimension becomes 1 on the probe feeds, which looks like broadcasting: export the model so that it stays larger",
        value,
      );
    }
    found.set(value, probed);
  }
  return new Shapes(found, graph, feeds);
}

/** Runtimes' names of `TensorProto.DataType`. */
const TYPES: ReadonlyMap<number, string> = new Map([
  [1, "float32"],
  [2, "uint8"],
  [3, "int8"],
  [6, "int32"],
  [7, "int64"],
  [9, "bool"],
  [10, "float16"],
]);

function nameOf(dataType: number): string {
  return TYPES.get(dataType) ?? "other";
}

/**
 * The weight behind a value, also through Casts and Transposes: returning all weights from the run would tell nothing
 * new.
 */
function weightOf(graph: Graph, value: string, steps = 4): Probed | undefined {
  const { dims: own, dataType } = graph.initializers.get(value) ?? {};
  const dims = own?.map(Number);
  if (dims) {
    const isLarge = elementsOf(dims) > LARGEST_CONSTANT;
    return isLarge ? { type: nameOf(dataType!), dims, data: undefined } : undefined;
  }
  const node = graph.producers.get(value);
  // Only a few steps: damaged files may contain circles.
  if (!node || steps === 0 || !/^(Cast|Transpose)$/.test(node.opType)) return undefined;
  const before = weightOf(graph, node.input[0]!, steps - 1);
  if (node.opType === "Cast") return before && { ...before, type: nameOf(intOf(node, "to")) };
  const perm = intsOf(node, "perm");
  return before && perm && { ...before, dims: perm.map((axis) => before.dims[axis]!) };
}

/** Layer of an input for a term or a head; undefined for the model's own inputs. */
function layerOf(input: string): string | undefined {
  return input.startsWith(`${PREFIX}.`) ? input.slice(0, input.lastIndexOf(".")) : undefined;
}

/** Ranks, types, dimensions and constants of the probed values. */
export class Shapes {
  readonly #found: Map<string, readonly Probed[]>;
  readonly #graph: Graph;
  readonly #fixed = new Map<string, boolean>();
  /** Input sizes by the pair of sizes in the two runs: which inputs multiply to a size. */
  readonly #products = new Map<string, Exclude<Dimension, number>[]>();

  constructor(found: Map<string, readonly Probed[]>, graph: Graph, feeds: readonly ReadonlyMap<string, Feed>[]) {
    this.#found = found;
    this.#graph = graph;
    const [first, second] = feeds as [ReadonlyMap<string, Feed>, ReadonlyMap<string, Feed>];
    const alike = new Set<string>();
    /** One entry for each size, since inputs of the model share dimensions. */
    const free = new Map<string, { sizes: readonly [number, number]; factor: { input: string; axis: number } }>();
    for (const [input, { dims }] of first) {
      for (const [axis, size] of dims.entries()) {
        const sizes = [size, second.get(input)!.dims[axis]!] as const;
        const key = sizes.join();
        const known = free.get(key);
        if (sizes[0] !== sizes[1] && !known) free.set(key, { sizes, factor: { input, axis } });
        // Equal ranks of two modules are a coincidence: each module of a task has its own.
        if (known && layerOf(known.factor.input) !== layerOf(input)) alike.add(key);
      }
    }
    for (const key of alike) free.delete(key);
    const add = (sizes: readonly number[], product: Exclude<Dimension, number>): void => {
      const key = sizes.join();
      this.#products.set(key, [...(this.#products.get(key) ?? []), product]);
    };
    // Among few sizes no product equals another's by chance. The number of products grows with the square.
    const all = free.size > MOST_FREE ? [] : [...free.values()];
    for (const [i, one] of all.entries()) {
      add(one.sizes, [one.factor]);
      for (const other of all.slice(i))
        add([one.sizes[0] * other.sizes[0], one.sizes[1] * other.sizes[1]], [one.factor, other.factor]);
    }
  }

  /**
   * Factors of a value's dimensions; undefined where one is neither an input's size nor a product of two, or is
   * ambiguous.
   */
  dimensions(value: string): readonly Dimension[] | undefined {
    if (!this.has(value)) return undefined;
    const known = this.sizes(value).map(([size, other]) => {
      const [product, ...more] = size === other ? [size] : (this.#products.get(`${size},${other}`) ?? []);
      return more.length === 0 ? product : undefined;
    });
    return known.every((one) => one !== undefined) ? known : undefined;
  }

  sizes(value: string): readonly (readonly [number, number])[] {
    const [first, second] = this.#found.get(value) ?? [];
    return first?.dims.map((size, axis) => [size, second!.dims[axis]!]) ?? [];
  }

  has(value: string): boolean {
    return this.#found.has(value);
  }

  /** Registers `name` as `value` with one index of a dimension. */
  narrow(value: string, axis: number, name: string): void {
    const runs = this.#found.get(value)!.map(({ type, dims }) => ({ type, dims: dims.with(axis, 1), data: undefined }));
    this.#found.set(name, runs);
  }

  /** Registers a vector of integers that was added to the graph. */
  addInts(name: string, data: readonly number[]): void {
    const vector = { type: "int64", dims: [data.length], data };
    this.#found.set(name, [vector, vector]);
  }

  dims(value: string): Dims {
    if (!this.has(value)) throw new Error(`"${value}" was not probed`);
    return this.sizes(value).map(([size, other]) => (size === other ? size : undefined));
  }

  /** An axis whose size only a run tells; undefined where there is none, or the value was not probed. */
  freeAxis(value: string): number | undefined {
    const free = this.has(value) ? this.dims(value).indexOf(undefined) : -1;
    return free < 0 ? undefined : free;
  }

  rank(value: string): number | undefined {
    return this.has(value) ? this.dims(value).length : undefined;
  }

  dataType(value: string): number | undefined {
    const type = this.has(value) ? this.type(value) : undefined;
    return [...TYPES].find(([, name]) => name === type)?.[0];
  }

  type(value: string): string {
    return this.#found.get(value)![0]!.type;
  }

  /** The elements of a value that no input changes; undefined for others. */
  constant(value: string): readonly number[] | undefined {
    const [first, second] = (this.#found.get(value) ?? []).flatMap(({ data }) => {
      const numbers = data as ArrayLike<number | bigint> | undefined;
      return numbers && numbers.length <= LARGEST_CONSTANT ? [Array.from(numbers, Number)] : [];
    });
    if (!first || first.length !== second?.length) return undefined;
    return first.every((one, i) => Object.is(one, second[i])) && this.#isFixed(value) ? first : undefined;
  }

  /**
   * Tells whether a value is made of constants and shapes: values that depend on an input's data may agree in both runs
   * by chance.
   */
  #isFixed(value: string): boolean {
    const { producers, initializers } = this.#graph;
    const needs = (name: string): readonly string[] => {
      const node = producers.get(name);
      return !node || /^(Shape|Size)$/.test(node.opType) ? [] : node.input.filter((input) => input !== "");
    };
    inOrder(value, this.#fixed, needs, (name) => {
      const node = producers.get(name);
      const isOpen = node ? nestedGraphs(node).length > 0 : !initializers.has(name);
      this.#fixed.set(name, !isOpen && needs(name).every((input) => this.#fixed.get(input) ?? true));
    });
    return this.#fixed.get(value)!;
  }
}

// Reasons why a model cannot be trained: collected during the search and reported all at once.

const NAMED = 3;

export class Problems {
  readonly #found = new Map<string, Set<string>>();

  node({ opType, name, output }: NodeProto, why: string): void {
    this.add(`${opType} ${why}`, name === "" ? (output[0] ?? "") : name);
  }

  /** @param of name of an affected node or value, where there is one */
  add(problem: string, of?: string): void {
    const names = this.#found.get(problem) ?? new Set();
    if (of !== undefined) names.add(of);
    this.#found.set(problem, names);
  }

  get any(): boolean {
    return this.#found.size > 0;
  }

  throwIfAny(file: string): void {
    if (!this.any) return;
    const told = [...this.#found].map(([problem, names]) => {
      const more = names.size > NAMED ? ` and ${names.size - NAMED} more` : "";
      const named = [...names].slice(0, NAMED).map((name) => `"${name}"`);
      return names.size === 0 ? problem : `${problem}: ${named.join(", ")}${more}`;
    });
    throw new FormatError(`no training graph can be made of it; ${told.join("; ")}`, { file, part: "graph" });
  }
}
