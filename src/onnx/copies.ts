/**
 * Which of a model's weights are the same one, written down more than once. An exporter does so to a layer that is applied in
 * several ways, to inputs of two and of three dimensions, say: one initializer for a Gemm and a turned one for a MatMul. A task
 * must change all of them. Names say which may be the same (modules.ts), and values say which are (likeness.ts).
 */
import type { ReadOptions } from "../source.ts";
import type { Likeness } from "./likeness.ts";
import { isMatrix, isNameless, type OnnxParameter } from "./modules.ts";
import type { ModelFile } from "./read.ts";

/** Finds the copies of weights. */
export class Copies {
  readonly #of: readonly [ModelFile, readonly OnnxParameter[], ReadOptions | undefined];
  /** Whether there are weights that nothing names, and so anything may be. */
  readonly #open: boolean;
  readonly #found = new Map<OnnxParameter, Promise<OnnxParameter>>();
  #likeness: Promise<Likeness> | undefined;

  /** @param parameters of the file, as `findParameters` gives them */
  constructor(file: ModelFile, parameters: readonly OnnxParameter[], options?: ReadOptions) {
    this.#of = [file, parameters, options];
    this.#open = parameters.some(isNameless);
  }

  /**
   * The parameter with its copies, each time the same object.
   * @throws BaseMismatchError when several weights have an equal claim to its name, and their values differ
   * @throws FormatError, SourceError when a weight that may be a copy cannot be read
   */
  of(parameter: OnnxParameter): Promise<OnnxParameter> {
    const found = this.#found.get(parameter) ?? this.#find(parameter);
    this.#found.set(parameter, found);
    return found;
  }

  async #find(parameter: OnnxParameter): Promise<OnnxParameter> {
    if (parameter.uses.length === 0 || !isMatrix(parameter)) return parameter;
    if (!this.#open && parameter.candidates.length === 0) return parameter;
    this.#likeness ??= import("./likeness.ts").then((loaded) => new loaded.Likeness(...this.#of));
    return { ...parameter, copies: await (await this.#likeness).copiesOf(parameter) };
  }
}
