/**
 * Which weight of the base model an adapted module is, and which way round it is stored. Used when packing (fingerprints)
 * and when a runtime attaches.
 */
import { BaseMismatchError } from "../errors.ts";
import type { PackModule } from "../format/format.ts";
import { byteLengthOf, type Parameter, sameShape, type WeightHost } from "./host.ts";
import { NameMatcher } from "./names.ts";

/** A weight of the base that a module adapts. */
export interface Located extends Parameter {
  /** Stored as [in, out]. */
  readonly transposed: boolean;
  readonly byteLength: number;
}

/**
 * The base's name of a module's weight.
 * @param byHand names of weights by module name, before anything else
 * @throws BaseMismatchError when the weight is missing or ambiguous
 */
export function findWeight(names: NameMatcher, module: string, byHand?: ReadonlyMap<string, string>): string {
  const found = names.find(byHand?.get(module) ?? `${module}.weight`);
  if ("name" in found) return found.name;
  throw new BaseMismatchError(
    `the adapted module "${module}" ${found.ambiguous ? "matches several weights" : "is not"} in the base; ` +
      `candidates: ${found.candidates.join(", ") || "none (another model?)"}. If the names differ, map them with the option \`names\``,
    { module, candidates: found.candidates },
  );
}

/** @param transposed whether the weight is stored as [in, out] */
export function shapeMismatch(
  module: Pick<PackModule, "name" | "out" | "in">,
  weight: string,
  expected: readonly number[],
  found: readonly number[],
  transposed = false,
): BaseMismatchError {
  return new BaseMismatchError(
    `the adapted module "${module.name}" is [out ${module.out}, in ${module.in}], but the base's "${weight}" is ` +
      `[${found.join(", ")}]${transposed ? " (stored as [in, out])" : ""}: it is of another model`,
    { module: module.name, expected, found },
  );
}

/**
 * @param weights the base's name of each module's weight
 * @throws BaseMismatchError when two modules match one weight
 */
export function refuseShared(modules: readonly Pick<PackModule, "name">[], weights: readonly string[]): void {
  const owners = new Map<string, string>();
  for (const [i, weight] of weights.entries()) {
    const module = modules[i]!.name;
    const other = owners.get(weight);
    if (other !== undefined) {
      const message = `the modules "${other}" and "${module}" both match the weight "${weight}"; map them with the option \`names\``;
      throw new BaseMismatchError(message, { module, candidates: [weight] });
    }
    owners.set(weight, module);
  }
}

/** The parameters of a host, found by an adapter's names. */
export class Locator {
  readonly parameters: ReadonlyMap<string, Parameter>;
  readonly names: NameMatcher;

  constructor(host: WeightHost | undefined) {
    const parameters = new Map<string, Parameter>();
    for (const parameter of host?.list() ?? []) parameters.set(parameter.name, parameter);
    this.parameters = parameters;
    this.names = new NameMatcher(parameters.keys());
  }

  /**
   * @param byHand names of weights by module name, before anything else
   * @throws BaseMismatchError when the weight is missing, ambiguous or of another shape
   */
  locate(module: Pick<PackModule, "name" | "out" | "in" | "layout">, byHand?: ReadonlyMap<string, string>): Located {
    const weight = findWeight(this.names, module.name, byHand);
    const parameter = this.parameters.get(weight)!;
    const { shape, layout = module.layout } = parameter;
    const transposed = layout === "in-out" || layout === "embedding";
    const matrix = [shape[0] ?? 0, shape.slice(1).reduce((a, b) => a * b, 1)];
    const expected = transposed ? [module.in, module.out] : [module.out, module.in];
    if (!sameShape(expected, matrix)) throw shapeMismatch(module, weight, expected, shape, transposed);
    return { ...parameter, transposed, byteLength: byteLengthOf(parameter) };
  }
}
