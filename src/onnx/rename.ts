/**
 * Renames the values and nodes of a graph so that two graphs can be joined. Names keep the module that a layer belongs to, and also tell
 * its side of the model.
 */
import { isParameterName, SCOPES, writtenPath } from "./claims.ts";
import { nestedGraphs } from "./model.ts";
import type { GraphProto, NodeProto } from "./onnx_pb.ts";

/** The halves of a model, as module names tell them: "encoder.block.0", "model.decoder.layers.0". */
export type Half = "encoder" | "decoder";

/** Renames values, also in nested graphs. */
export function renameValues(graph: GraphProto, name: (value: string) => string): void {
  for (const one of [...graph.initializer, ...graph.input, ...graph.output, ...graph.valueInfo])
    one.name = name(one.name);
  for (const node of graph.node) {
    node.input = node.input.map((value) => value && name(value));
    node.output = node.output.map((value) => value && name(value));
    for (const nested of nestedGraphs(node)) renameValues(nested, name);
  }
}

/** Renames nodes whose names are taken, within the same module: runtimes want names to differ. */
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
function* pathsOf(graph: GraphProto): Generator<string> {
  for (const { name } of graph.initializer) if (isParameterName(name)) yield name;
  for (const node of nodesOf(graph)) {
    const module = writtenPath(node);
    if (module) yield module;
  }
}

/** Segments of a path behind the one that names its half; all of them where none does. */
function inside(path: string, half: Half): string[] {
  const segments = path.split(".");
  return segments.slice(segments.indexOf(half) + 1);
}

/** Facts that both halves need to know of each other's names. */
export interface Halves {
  /** Segments in front of the half's own: "model" in "model.decoder.layers.0". */
  readonly lead: string;
  /** First segments of names in the encoder: names of the decoder that begin so would be taken for the encoder's. */
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
 * Renames one half, in place. Its modules and parameters get the half's name in front where they lack it. In a decoder only names that
 * also occur in the encoder change, so that "lm_head" stays. Other values change where their name is taken.
 * @param fixed values that get a name of their own, or keep theirs
 * @param taken names already given; those of this half are added
 */
export function nameHalf(
  graph: GraphProto,
  half: Half,
  { lead, common }: Halves,
  fixed: ReadonlyMap<string, string>,
  taken: Set<string>,
): void {
  const before = lead === "" ? "" : `${lead}.`;
  /** Segments to put in front of a path. */
  const front = (path: string): string => {
    const segments = path.split(".");
    // Nodes may lack modules that initializers name: an exporter sees only the modules that ran.
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
