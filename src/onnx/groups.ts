/** Groups layers with one common input: queries, keys and values; gate and up. Joins inputs of tasks. */
import type { AdaptedLayer, TaskInput } from "./adapted.ts";
import type { Components } from "./components.ts";
import type { OnnxModel } from "./model.ts";
import { makeSplit, PREFIX } from "./nodes.ts";
import type { GraphProto, NodeProto } from "./onnx_pb.ts";

/**
 * Groups modules with components by their common input, in the same order. Other modules with terms stay alone: those without components,
 * and those that are applied several times.
 * @param kindOf modules of different kinds are kept apart
 */
export function groupsOf<M extends Pick<AdaptedLayer, "linears" | "components">>(
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
export function joined([first = "", ...others]: readonly string[]): string {
  const parent = first.slice(0, first.lastIndexOf(".") + 1);
  return [first, ...others.map((name) => (name.startsWith(parent) ? name.slice(parent.length) : name))].join("+");
}

/** Puts cores that are equally wide below each other in one input, which nodes split again. */
export function joinCores(
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
