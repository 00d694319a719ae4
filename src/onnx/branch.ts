/**
 * Takes one branch of a decoder that has two, as Optimum merges them: the branch that reads no cache and computes all tokens at once, as
 * training needs.
 */
import { FormatError } from "../errors.ts";
import { attribute } from "./model.ts";
import { makeNode } from "./nodes.ts";
import type { GraphProto, NodeProto } from "./onnx_pb.ts";
import { renameNodes, renameValues } from "./rename.ts";

/** The input that chooses the branch. */
const CHOICE = "use_cache_branch";

/** Operators that pass a condition on unchanged. */
const SAME = new Set(["Cast", "Identity", "Reshape", "Squeeze"]);

/**
 * Replaces each `If` on that input by the nodes of its branch without a cache, in place.
 * @param file for messages
 * @throws FormatError when a branch and its `If` differ in outputs
 */
export function takeFirstRun(graph: GraphProto, file: string): void {
  for (let at = graph.node.findIndex((node) => isChoice(graph, node)); at >= 0; ) {
    const node = graph.node[at]!;
    const branch = attribute(node, "else_branch")?.g;
    if (!branch || branch.output.length !== node.output.length) {
      const message = `expected a branch with ${node.output.length} outputs for use_cache_branch = false, found ${branch?.output.length ?? "none"}: damaged, export the model again`;
      throw new FormatError(message, { file, part: `node ${node.name}` });
    }
    graph.node.splice(at, 1, ...unfolded(graph, node, branch));
    graph.initializer.push(...branch.initializer);
    graph.valueInfo.push(...branch.valueInfo);
    at = graph.node.findIndex((one) => isChoice(graph, one));
  }
}

function isChoice(graph: GraphProto, { opType, input }: NodeProto): boolean {
  if (opType !== "If") return false;
  let value = input[0];
  for (let i = 0; value !== CHOICE && i < SAME.size; i++) {
    const origin = graph.node.find(({ output }) => output.includes(value!));
    if (!origin || !SAME.has(origin.opType)) return false;
    value = origin.input[0];
  }
  return value === CHOICE;
}

/** Nodes of a branch, renamed so that no name of the surrounding graph is taken twice, with the results of the `If`. */
function unfolded(graph: GraphProto, node: NodeProto, branch: GraphProto): NodeProto[] {
  const around = [...graph.initializer, ...graph.input].map(({ name }) => name);
  const taken = new Set([...around, ...graph.node.flatMap(({ output }) => output)]);
  const own = new Set([...branch.initializer.map(({ name }) => name), ...branch.node.flatMap(({ output }) => output)]);
  const names = new Map<string, string>();
  const handed: NodeProto[] = [];
  for (const [i, result] of node.output.entries()) {
    if (result === "") continue;
    const { name } = branch.output[i]!;
    if (own.has(name) && !names.has(name)) names.set(name, result);
    else handed.push(makeNode("Identity", result, [name], result));
  }
  renameValues(branch, (value) => {
    let name = names.get(value) ?? value;
    if (names.has(value) || !own.has(value)) return name;
    while (taken.has(name)) name = `first/${name}`;
    taken.add(name);
    names.set(value, name);
    return name;
  });
  for (const one of handed) one.input = one.input.map((value) => names.get(value) ?? value);
  renameNodes(branch.node, graph.node, "_first");
  return [...branch.node, ...handed];
}
