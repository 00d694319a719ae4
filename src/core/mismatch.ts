/** What is said of a module whose weight the base does not have, or not as it must be. Loaded by a runtime where that is so. */
import { BaseMismatchError } from "../errors.ts";
import type { PackModule } from "../format/format.ts";
import { asWeight, type Located, type Locator, type ModuleToFind } from "./locate.ts";
import type { NameMatcher, NotFound } from "./names.ts";

/** Candidates that are named at most. */
const MOST_NAMED = 8;

/**
 * The base's name of a module's weight.
 * @param byHand names of weights by module name, before anything else
 * @param alike names of weights that it may be, whatever they are called
 * @throws BaseMismatchError when the weight is missing or ambiguous
 */
export function findWeight(
  names: NameMatcher,
  module: string,
  byHand?: ReadonlyMap<string, string>,
  alike: () => string[] = () => [],
): string {
  const found = names.find(byHand?.get(module) ?? `${module}.weight`);
  if ("name" in found) return found.name;
  throw notFound(module, found, found.ambiguous ? [] : alike());
}

/**
 * What is said where a module's weight is missing or ambiguous.
 * @param alike names of weights that it may be, whatever they are called
 */
export function notFound(module: string, found: NotFound, alike: readonly string[] = []): BaseMismatchError {
  const likely = found.candidates();
  const candidates = [...new Set([...likely, ...alike])].slice(0, Math.max(MOST_NAMED, likely.length));
  return new BaseMismatchError(
    `"${module}" ${found.ambiguous ? "matches several weights" : "is not"} in the base; ` +
      `candidates: ${candidates.join(", ") || "none (another model?)"}. If the names differ, map them with the option \`names\``,
    { module, candidates },
  );
}

/**
 * The weight of a module.
 * @throws BaseMismatchError when it is missing, ambiguous or of another shape
 */
export function locate(locator: Locator, module: ModuleToFind): Located {
  const found = locator.weight(module);
  if (found) return found;
  const { parameters, names, byHand } = locator;
  const fitting = (): string[] =>
    [...parameters.values()].filter((one) => asWeight(module, one)).map(({ name }) => name);
  const weight = findWeight(names, module.name, byHand, fitting);
  const { shape, layout = module.layout } = parameters.get(weight)!;
  const transposed = layout === "in-out" || layout === "embedding";
  const expected = transposed ? [module.in, module.out] : [module.out, module.in];
  throw shapeMismatch(module, weight, expected, shape, transposed);
}

/**
 * The weights of modules that a runtime has not found, under the names of other versions too.
 * @throws BaseMismatchError for the first module whose weight is missing, ambiguous, of another shape or another module's too
 */
export async function locateModules(locator: Locator, modules: readonly PackModule[]): Promise<Located[]> {
  const { AliasMatcher } = await import("./aliases.ts");
  locator.names = new AliasMatcher(locator.parameters.keys());
  const weights = modules.map((module) => locate(locator, module));
  refuseShared(
    modules,
    weights.map(({ name }) => name),
  );
  return weights;
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
