/**
 * Whether weights of a model are the same one, by their values, whichever way round they lie in the file. Loaded where names leave
 * that open (copies.ts).
 */
import { correlation, fingerprint, SAME_FLOAT, SAME_QUANTIZED, type WeightAt } from "../core/mismatch.ts";
import { BaseMismatchError } from "../errors.ts";
import type { ReadOptions } from "../source.ts";
import { type Candidate, isMatrix, isNameless, matrixShape, type OnnxParameter, type Stored } from "./modules.ts";
import type { ModelFile } from "./read.ts";
import { readLinearWeight } from "./weights.ts";

/** Candidates that a message spells out. */
const TOLD = 3;

/** Compares the weights of one model. */
export class Likeness {
  readonly #file: ModelFile;
  readonly #options: ReadOptions | undefined;
  /** Float weights of linear layers that nothing names, and so anything may be: by some of their values, once they are read. */
  #nameless: Promise<ReadonlyMap<string, readonly Stored[]>> | undefined;
  readonly #parameters: readonly OnnxParameter[];

  /** @param parameters of the file, as `findParameters` gives them */
  constructor(file: ModelFile, parameters: readonly OnnxParameter[], options?: ReadOptions) {
    this.#file = file;
    this.#parameters = parameters;
    this.#options = options;
  }

  /**
   * The copies of a matrix.
   * @throws BaseMismatchError when several weights have an equal claim to its name, and their values differ
   * @throws FormatError, SourceError when a weight that may be a copy cannot be read
   */
  async copiesOf(parameter: OnnxParameter): Promise<Stored[]> {
    const copies: Stored[] = [];
    for (const candidate of parameter.candidates) {
      if (candidate.initializer === parameter.initializer) continue;
      if (await this.#isSame(parameter, candidate)) copies.push(candidate);
      else if (candidate.equal) throw ambiguous(this.#file, parameter);
    }
    const known = new Set([parameter, ...copies].map(({ initializer }) => initializer));
    for (const one of await this.#alike(parameter)) {
      if (!known.has(one.initializer) && (await this.#isSame(parameter, one))) copies.push(one);
    }
    return copies;
  }

  /** Whether two weights are equal, up to how they lie in the file and, of different number formats, to rounding. */
  async #isSame(a: Stored, b: Stored): Promise<boolean> {
    const [out, inputs] = matrixShape(a)!;
    if (!isMatrix(b) || matrixShape(b)!.join() !== `${out},${inputs}`) return false;
    const [left, right] = [await this.#values(a), await this.#values(b)];
    const likeness = correlation(fingerprint("", out, inputs, left), fingerprint("", out, inputs, right));
    if (a.dtype === "other" || b.dtype === "other") return likeness >= SAME_QUANTIZED;
    if (a.dtype !== b.dtype || likeness < SAME_FLOAT) return likeness >= SAME_FLOAT;
    for (let o = 0; o < out; o++)
      for (let n = 0; n < inputs; n++) if (!Object.is(left(o, n), right(o, n))) return false;
    return true;
  }

  async #values(stored: Stored): Promise<WeightAt> {
    const { at } = await readLinearWeight(this.#file, { ...stored, name: stored.initializer }, this.#options);
    return matrixShape(stored)!.includes(0) ? () => 0 : at;
  }

  /** Weights without a name whose values may be these. */
  async #alike(parameter: OnnxParameter): Promise<readonly Stored[]> {
    if (parameter.dtype === "other") return [];
    this.#nameless ??= this.#findNameless();
    const nameless = await this.#nameless;
    return nameless.size === 0 ? [] : (nameless.get(await this.#keyOf(parameter)) ?? []);
  }

  async #findNameless(): Promise<ReadonlyMap<string, readonly Stored[]>> {
    const found = new Map<string, Stored[]>();
    const named = new Set(this.#parameters.flatMap((one) => (isNameless(one) ? [] : one.initializer)));
    for (const one of this.#parameters) {
      if (!isNameless(one) || named.has(one.initializer)) continue;
      const key = await this.#keyOf(one);
      const others = found.get(key);
      if (others) others.push(one);
      else found.set(key, [one]);
    }
    return found;
  }

  /** Type, shape and some values. */
  async #keyOf(stored: Stored): Promise<string> {
    const [out, inputs] = matrixShape(stored)!;
    return `${stored.dtype} ${out} ${inputs} ${fingerprint("", out, inputs, await this.#values(stored)).join()}`;
  }
}

function ambiguous({ model }: ModelFile, parameter: OnnxParameter): BaseMismatchError {
  const told = (stored: Stored): string => {
    const nodes = stored.uses.map(({ node }) => `${node.opType} "${node.name || node.output[0]}"`);
    return `"${stored.initializer}" of ${nodes.slice(0, TOLD).join(", ")}`;
  };
  const equal: readonly Stored[] = [parameter, ...parameter.candidates.filter((one: Candidate) => one.equal)];
  const more = equal.length > TOLD ? ` and ${equal.length - TOLD} more` : "";
  return new BaseMismatchError(
    `${model.name}: "${parameter.name}" may be any of several weights, which differ: ` +
      `${equal.slice(0, TOLD).map(told).join("; ")}${more}. Say which with the option \`names\``,
    { module: parameter.name, candidates: equal.slice(0, TOLD).map(({ initializer }) => initializer) },
  );
}
