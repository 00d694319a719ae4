/**
 * Which parameter of a base model an adapter's module means.
 */
import { nearest } from "../arguments.ts";

/** Segments that are dropped at most, so that a long name makes no more than a few others. */
const MOST_DROPPED = 64;

/** Why there is no one name. */
export interface NotFound {
  readonly ambiguous: boolean;
  /** Those that are equally good, or look alike. */
  candidates(): string[];
}

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
      for (const suffix of suffixesOf(name)) {
        const names = this.#bySuffix.get(suffix);
        if (names) names.push(name);
        else this.#bySuffix.set(suffix, [name]);
      }
    }
  }

  /** The base's name; or the candidates, when there are several equally good ones or none. */
  find(name: string): { name: string } | NotFound {
    if (this.#exact.has(name)) return { name };
    const longer = this.#bySuffix.get(name) ?? [];
    if (longer.length === 1) return { name: longer[0]! };
    if (longer.length > 1) return { ambiguous: true, candidates: () => longer };
    for (const suffix of suffixesOf(name)) {
      // A bare "weight" or "bias" says nothing about which module it belongs to.
      if (suffix.includes(".") && this.#exact.has(suffix)) return { name: suffix };
    }
    // Not before they are asked for: they take a step for each pair of letters of each name.
    return { ambiguous: false, candidates: () => nearest(name, this.#exact) };
  }
}

/** A name without its first segment, without its first two, and so on. */
function* suffixesOf(name: string): Generator<string, void> {
  let at = name.indexOf(".");
  for (let dropped = 0; at >= 0 && dropped < MOST_DROPPED; dropped++) {
    yield name.slice(at + 1);
    at = name.indexOf(".", at + 1);
  }
}
