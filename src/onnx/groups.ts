/** Groups layers with one common input: queries, keys and values; gate and up. */
import type { AdaptedLayer } from "./adapted.ts";
import type { Components } from "./components.ts";
import type { GraphProto } from "./onnx_pb.ts";

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
