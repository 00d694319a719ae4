/**
 * Which parameter of a base model an adapter's module means.
 */
import { nearest } from "../arguments.ts";

/**
 * Finds, for names of an adapter, the parameters of a base model they mean: by the longest common suffix of whole dotted
 * segments that is the whole of one of the two names. "bert.encoder.layer.0.query.weight" finds
 * "encoder.layer.0.query.weight", and the other way round; "layer.1.query" never finds "layer.0.query".
 */
export class NameMatcher {
  readonly #exact = new Set<string>();
  /** Base names by each of their proper suffixes. */
  readonly #bySuffix = new Map<string, string[]>();

  constructor(baseNames: Iterable<string>) {
    for (const name of baseNames) {
      this.#exact.add(name);
      for (let at = name.indexOf("."); at >= 0; at = name.indexOf(".", at + 1)) {
        const suffix = name.slice(at + 1);
        const names = this.#bySuffix.get(suffix);
        if (names) names.push(name);
        else this.#bySuffix.set(suffix, [name]);
      }
    }
  }

  /** The base's name; or the candidates, when there are several equally good ones or none. */
  find(name: string): { name: string } | { ambiguous: boolean; candidates: string[] } {
    if (this.#exact.has(name)) return { name };
    const longer = this.#bySuffix.get(name) ?? [];
    if (longer.length === 1) return { name: longer[0]! };
    if (longer.length > 1) return { ambiguous: true, candidates: longer };
    for (let at = name.indexOf("."); at >= 0; at = name.indexOf(".", at + 1)) {
      const suffix = name.slice(at + 1);
      // A bare "weight" or "bias" says nothing about which module it belongs to.
      if (suffix.includes(".") && this.#exact.has(suffix)) return { name: suffix };
    }
    return { ambiguous: false, candidates: nearest(name, this.#exact) };
  }
}
