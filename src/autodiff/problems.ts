/**
 * Reasons why a model cannot be trained: collected during the search and reported all at once.
 */
import { FormatError } from "../errors.ts";
import type { NodeProto } from "../onnx/onnx_pb.ts";

/** Nodes that a message names for each problem. */
const NAMED = 3;

export class Problems {
  /** Names of affected nodes or values, by problem. */
  readonly #found = new Map<string, Set<string>>();

  /** Adds a problem of a node's operator. */
  node({ opType, name, output }: NodeProto, why: string): void {
    this.add(`${opType} ${why}`, name === "" ? (output[0] ?? "") : name);
  }

  /** @param of name of an affected node or value, where there is one */
  add(problem: string, of?: string): void {
    const names = this.#found.get(problem) ?? new Set();
    if (of !== undefined) names.add(of);
    this.#found.set(problem, names);
  }

  get any(): boolean {
    return this.#found.size > 0;
  }

  /** @throws FormatError with all problems, if there are any */
  throwIfAny(file: string): void {
    if (!this.any) return;
    const told = [...this.#found].map(([problem, names]) => {
      const more = names.size > NAMED ? ` and ${names.size - NAMED} more` : "";
      const named = [...names].slice(0, NAMED).map((name) => `"${name}"`);
      return names.size === 0 ? problem : `${problem}: ${named.join(", ")}${more}`;
    });
    throw new FormatError(`no training graph can be made of it; ${told.join("; ")}`, { file, part: "graph" });
  }
}
