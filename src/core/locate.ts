/**
 * Which weight of the base model an adapted module is, and which way round it is stored. Used when packing (fingerprints)
 * and when a runtime attaches. Why there is none is said in `mismatch.ts`.
 */
import type { PackModule } from "../format/format.ts";
import { byteLengthOf, type Parameter, sameShape, type WeightHost } from "./host.ts";
import { NameMatcher } from "./names.ts";

/** What identifies a weight of the base. */
export type ModuleToFind = Pick<PackModule, "name" | "out" | "in" | "layout">;

/** A weight of the base that a module adapts. */
export interface Located extends Parameter {
  /** Stored as [in, out]. */
  readonly transposed: boolean;
  readonly byteLength: number;
}

/** The parameters of a host, found by an adapter's names. */
export class Locator {
  readonly parameters: ReadonlyMap<string, Parameter>;
  names: NameMatcher;
  /** Names of weights by module name, before anything else. */
  readonly byHand: ReadonlyMap<string, string> | undefined;

  constructor(host: WeightHost | undefined, byHand?: ReadonlyMap<string, string>) {
    this.byHand = byHand;
    const parameters = new Map<string, Parameter>();
    for (const parameter of host?.list() ?? []) parameters.set(parameter.name, parameter);
    this.parameters = parameters;
    this.names = new NameMatcher(parameters.keys());
  }

  /** The base's name of a parameter, in the layer that its module is mapped to, if it is; or the candidates. */
  find(name: string): ReturnType<NameMatcher["find"]> {
    const at = name.lastIndexOf(".");
    const weight = this.byHand?.get(name.slice(0, at));
    const leaf = name.slice(at + 1);
    const mapped = weight && this.names.find(leaf === "weight" ? weight : weight.replace(/[^.]*$/, leaf));
    return mapped && "name" in mapped ? mapped : this.names.find(name);
  }

  /** A module's weight; undefined where it is missing, ambiguous or of another shape. */
  weight(module: ModuleToFind): Located | undefined {
    const found = this.names.find(this.byHand?.get(module.name) ?? `${module.name}.weight`);
    const parameter = "name" in found && this.parameters.get(found.name);
    return parameter ? asWeight(module, parameter) : undefined;
  }
}

/** A parameter as the weight of a module; undefined where it has another shape. */
export function asWeight(module: ModuleToFind, parameter: Parameter): Located | undefined {
  const { shape, layout = module.layout } = parameter;
  const transposed = layout === "in-out" || layout === "embedding";
  const matrix = [shape[0] ?? 0, shape.slice(1).reduce((a, b) => a * b, 1)];
  if (!sameShape(transposed ? [module.in, module.out] : [module.out, module.in], matrix)) return undefined;
  return { ...parameter, transposed, byteLength: byteLengthOf(parameter) };
}
