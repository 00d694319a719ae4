/** A base whose weights are called otherwise than the adapters call them. */
import { nearest } from "../arguments.ts";
import { BaseMismatchError } from "../errors.ts";
import type { WeightHost } from "./base.ts";

/**
 * The same base with some weights under the names of the modules that they are. Read-only.
 * @param names the base's names of weights, by module name
 * @throws BaseMismatchError when the base has no such weight
 */
export function renamedHost(host: WeightHost, names: ReadonlyMap<string, string>): WeightHost {
  const parameters = [...host.list()];
  const known = new Set(parameters.map(({ name }) => name));
  const weights = new Map<string, string>();
  for (const [module, weight] of names) {
    if (!known.has(weight)) {
      const candidates = nearest(weight, known);
      throw new BaseMismatchError(
        `the base has no "${weight}", which "${module}" is said to be; candidates: ${candidates.join(", ") || "none"}`,
        { module, candidates },
      );
    }
    weights.set(`${module}.weight`, weight);
  }
  const modules = new Map([...weights].map(([name, weight]) => [weight, name]));
  return {
    list: () => parameters.map((one) => ({ ...one, name: modules.get(one.name) ?? one.name })),
    read: (name, into, options) => host.read(weights.get(name) ?? name, into, options),
    ...(host.close && { close: () => host.close!() }),
  };
}
