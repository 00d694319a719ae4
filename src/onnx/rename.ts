/**
 * Other names for the values and nodes of a graph, so that two can become one: what says to which module a layer belongs is kept, and
 * says in addition on which side of the model it is.
 */
import { isParameterName, SCOPES, writtenPath } from "./claims.ts";
import { nestedGraphs } from "./model.ts";
import type { GraphProto, NodeProto } from "./onnx_pb.ts";

/** The halves of a model that are told apart by a module's name: "encoder.block.0", "model.decoder.layers.0". */
export type Half = "encoder" | "decoder";

/** Gives other names to values, those of nested graphs too. */
export function renameValues(graph: GraphProto, name: (value: string) => string): void {
  for (const one of [...graph.initializer, ...graph.input, ...graph.output, ...graph.valueInfo])
    one.name = name(one.name);
  for (const node of graph.node) {
    node.input = node.input.map((value) => value && name(value));
    node.output = node.output.map((value) => value && name(value));
    for (const nested of nestedGraphs(node)) renameValues(nested, name);
  }
}

/** Gives nodes of a graph other names where theirs are taken, which stay of the same module: runtimes want them to differ. */
export function renameNodes(nodes: readonly NodeProto[], others: readonly NodeProto[], ending: string): void {
  const taken = new Set(others.map(({ name }) => name).filter((name) => name !== ""));
  for (const node of nodes) {
    while (taken.has(node.name)) node.name += ending;
    if (node.name !== "") taken.add(node.name);
  }
}

function* nodesOf(graph: GraphProto): Generator<NodeProto> {
  for (const node of graph.node) {
    yield node;
    for (const nested of nestedGraphs(node)) yield* nodesOf(nested);
  }
}

/** Names of modules and parameters, as the exporter wrote them. */
export function* pathsOf(graph: GraphProto): Generator<string> {
  for (const { name } of graph.initializer) if (isParameterName(name)) yield name;
  for (const node of nodesOf(graph)) {
    const module = writtenPath(node);
    if (module) yield module;
  }
}

/** The segments of a path behind the one that names its half; all of them where none does. */
function inside(path: string, half: Half): string[] {
  const segments = path.split(".");
  return segments.slice(segments.indexOf(half) + 1);
}

/** What both halves need to know of each other's names. */
export interface Halves {
  /** In front of the half's own segment: "model" of "model.decoder.layers.0". */
  readonly lead: string;
  /** First segments of what is in the encoder: what is called so in the decoder as well would be taken for it. */
  readonly common: ReadonlySet<string>;
}

export function halvesOf(encoder: GraphProto, decoder: GraphProto): Halves {
  const [own, other] = [[...pathsOf(encoder)], [...pathsOf(decoder)]];
  const leadOf = (paths: readonly string[], half: Half): string | undefined => {
    const segments = paths.map((path) => path.split(".")).find((path) => path.includes(half));
    return segments?.slice(0, segments.indexOf(half)).join(".");
  };
  return {
    lead: leadOf(other, "decoder") ?? leadOf(own, "encoder") ?? "",
    common: new Set(own.map((path) => inside(path, "encoder")[0]!)),
  };
}

/**
 * Renames one half, in place. Its modules and parameters get the half's name in front where they lack it; of a decoder those only that
 * may be meant by a name of the encoder too, so that "lm_head" stays what it is. Other values change where their name is taken.
 * @param fixed values that get a name of their own, or keep theirs
 * @param taken names that are given away; those of this half are added
 */
export function nameHalf(
  graph: GraphProto,
  half: Half,
  { lead, common }: Halves,
  fixed: ReadonlyMap<string, string>,
  taken: Set<string>,
): void {
  const before = lead === "" ? "" : `${lead}.`;
  /** What is to stand in front of a path. */
  const front = (path: string): string => {
    const segments = path.split(".");
    // Nodes may lack what initializers have: an exporter sees the modules that ran.
    if (segments[0] === half) return before;
    const stays = segments.includes(half) || (half === "decoder" && !common.has(segments[0]!));
    return stays ? "" : `${before}${half}${path === "" ? "" : "."}`;
  };
  const names = new Map(fixed);
  for (const value of fixed.values()) taken.add(value);
  renameValues(graph, (value) => {
    let name = names.get(value);
    if (name !== undefined) return name;
    name = isParameterName(value) ? front(value) + value : value;
    while (taken.has(name)) name = `${half}/${name}`;
    taken.add(name);
    names.set(value, name);
    return name;
  });
  for (const node of nodesOf(graph)) {
    const module = writtenPath(node);
    if (module === undefined || front(module) === "") continue;
    const scopes = node.metadataProps.find(({ key }) => key === SCOPES);
    if (scopes) scopes.value = `['${front(module)}${module}', '']`;
    else node.name = `/${front(module).replace(/\.$/, "").replaceAll(".", "/")}${node.name}`;
  }
}
