/**
 * A pack's modules and a model's parameters, held against each other: which weight each adapted module is, and whether it is
 * the right model's. Changes nothing.
 */
import { checkFingerprint, SAME_FLOAT, SAME_QUANTIZED } from "../base/fingerprint.ts";
import { findWeight, refuseShared, shapeMismatch } from "../base/mismatch.ts";
import { NameMatcher } from "../base/names.ts";
import { BaseMismatchError } from "../errors.ts";
import type { PackModule } from "../format/format.ts";
import { Copies } from "../onnx/copies.ts";
import type { GraftBias } from "../onnx/graft.ts";
import { fusedNode } from "../onnx/linear.ts";
import { findParameters, matrixShape, type OnnxParameter } from "../onnx/modules.ts";
import type { ModelFile } from "../onnx/read.ts";
import { readLinearWeight } from "../onnx/weights.ts";
import type { ReadOptions } from "../source.ts";

/** How a pack is held against a model. */
export interface MatchOptions extends ReadOptions {
  /** Names of weights or of their initializers in the model, by module name of the pack, where they are not found. */
  readonly names?: ReadonlyMap<string, string> | undefined;
  /** Accept a model whose weights differ from the fingerprints, for instance one that was trained further. Default: false. */
  readonly anyBase?: boolean | undefined;
  /** Parameters of the tasks, or modules with all of theirs, to leave out: `["classifier"]` on a model without one. */
  readonly ignore?: readonly string[] | undefined;
}

export class ModelMatcher {
  readonly #file: ModelFile;
  readonly #options: MatchOptions;
  readonly #parameters = new Map<string, OnnxParameter>();
  readonly #byInitializer = new Map<string, OnnxParameter[]>();
  readonly #names: NameMatcher;
  readonly #copies: Copies;
  /** What was found by the end of its name only, by the pack's name, and the model's name for it. */
  readonly #bySuffix = new Map<string, string>();

  constructor(file: ModelFile, options: MatchOptions) {
    this.#file = file;
    this.#options = options;
    const parameters = findParameters(file.model);
    for (const parameter of parameters) {
      this.#parameters.set(parameter.name, parameter);
      const others = this.#byInitializer.get(parameter.initializer);
      if (others) others.push(parameter);
      else this.#byInitializer.set(parameter.initializer, [parameter]);
    }
    this.#names = new NameMatcher(this.#parameters.keys());
    this.#copies = new Copies(file, parameters, options);
  }

  /**
   * The weight of each module, in their order, with its copies.
   * @throws BaseMismatchError when one is missing, ambiguous, of another shape, or that of two modules
   */
  async weights(modules: readonly PackModule[]): Promise<OnnxParameter[]> {
    const weights = modules.map((module) => {
      const parameter = this.#weight(module.name);
      checkShape(module, parameter);
      return parameter;
    });
    const names = weights.map(({ name }) => name);
    refuseShared(modules, names);
    const found: OnnxParameter[] = [];
    for (const weight of weights) found.push(await this.#copies.of(weight));
    return found;
  }

  #weight(module: string): OnnxParameter {
    const byHand = this.#options.names?.get(module);
    const [held, ...others] = this.#byInitializer.get(byHand ?? "") ?? [];
    if (held && others.length === 0) return held;
    try {
      const found = this.#parameters.get(findWeight(this.#names, module, this.#options.names))!;
      if (byHand === undefined) this.#note(`${module}.weight`, found.name);
      return found;
    } catch (error) {
      const fused = fusedNode(this.#file.model);
      if (!fused || !(error instanceof BaseMismatchError)) throw error;
      const what = `the model is fused already (${fused.opType} "${fused.name}"): pass the unoptimised export`;
      throw new BaseMismatchError(`${what}; ${error.message}`, { module, candidates: error.candidates ?? [] });
    }
  }

  #note(name: string, found: string): void {
    if (name !== found) this.#bySuffix.set(name, found);
  }

  /**
   * Holds weights against the pack's fingerprints. What was found by the end of its name only must be confirmed by one, its own or
   * that of another with the same segments in front: a decoder's layer may be called as an encoder's is in a file of its own.
   * @returns modules whose weights no fingerprint was held against
   * @throws BaseMismatchError when one is another model's, or may be
   */
  async check(
    modules: readonly PackModule[],
    weights: readonly OnnxParameter[],
    bases: Uint8Array,
  ): Promise<readonly string[]> {
    if (this.#options.anyBase) return modules.map(({ name }) => name);
    const unconfirmed: string[] = [];
    const confirmed = new Set<string>();
    for (const [i, module] of modules.entries()) {
      const found = this.#bySuffix.get(`${module.name}.weight`);
      if (!(await this.confirms(module, weights[i]!, bases))) unconfirmed.push(module.name);
      else if (found !== undefined) confirmed.add(inFront(`${module.name}.weight`, found));
    }
    for (const [name, found] of this.#bySuffix) {
      if (confirmed.has(inFront(name, found))) continue;
      throw new BaseMismatchError(
        `"${name}" is in the model by the end of its name only, as "${found}", and the pack has no fingerprint to tell ` +
          "whether that is the same: this may be another file of the model, an encoder's for a decoder's, say. Make the pack " +
          "with its base, map the module with the option `names`, or pass anyBase: true",
        { module: moduleOf(name), candidates: [found] },
      );
    }
    return unconfirmed;
  }

  /**
   * Whether the pack's fingerprint of a module is the weight's; false where there is none to tell.
   * @throws BaseMismatchError when it is another model's
   */
  async confirms(module: PackModule, parameter: OnnxParameter, bases: Uint8Array): Promise<boolean> {
    if (module.fingerprint === undefined || (parameter.shape.length !== 2 && parameter.dtype !== "other")) return false;
    const { at, quantized } = await readLinearWeight(this.#file, parameter, this.#options);
    const turned = parameter.layout === "embedding" || module.layout === "embedding";
    const value = turned ? (o: number, n: number): number => at(n, o) : at;
    checkFingerprint(module, parameter.name, value, bases, quantized ? SAME_QUANTIZED : SAME_FLOAT);
    return true;
  }

  /** Whether the model has a parameter by this name. */
  has(name: string): boolean {
    return "name" in this.#names.find(name);
  }

  /**
   * A parameter that tasks bring.
   * @throws BaseMismatchError when the model does not have it, or several match
   */
  async parameter(name: string, role: string): Promise<OnnxParameter> {
    const found = this.#names.find(name);
    if ("name" in found) {
      this.#note(name, found.name);
      return this.#copies.of(this.#parameters.get(found.name)!);
    }
    throw new BaseMismatchError(
      `tasks change "${name}" (${role}), which ${found.ambiguous ? "several parameters of the model match" : "is not in the model"}; ` +
        `candidates: ${found.candidates.join(", ") || "none"}. Export the model with that layer; or, to use the tasks without it, pass ignore: ["${moduleOf(name)}"]`,
      { module: name, candidates: found.candidates },
    );
  }

  /**
   * A bias that tasks bring and the exporter has dropped, where the model has the layer's weight.
   * @throws BaseMismatchError when that may be any of several weights
   */
  async dropped(name: string): Promise<GraftBias | undefined> {
    const module = moduleOf(name);
    const mapped = this.#options.names?.has(module);
    const weight = `${module}.weight`;
    const layer = mapped ? this.#weight(module).name : nameOf(this.#names.find(weight));
    if (layer === undefined || name !== `${module}.bias`) return undefined;
    const bias = nameOf(this.#names.find(name));
    // By the end of a name only it may be another layer's.
    const own = bias !== undefined && (mapped || inFront(name, bias) === inFront(weight, layer));
    if (own && this.#parameters.get(bias)!.uses.length > 0) return undefined;
    const { droppedBias } = await import("./dropped.ts");
    const found = droppedBias(this.#file.model, name, await this.#copies.of(this.#parameters.get(layer)!));
    if (found) this.#note(weight, layer);
    return found;
  }

  /** Whether the user wants a parameter left out. */
  ignores(name: string): boolean {
    return isIgnored(name, this.#options.ignore);
  }
}

function nameOf(found: ReturnType<NameMatcher["find"]>): string | undefined {
  return "name" in found ? found.name : undefined;
}

/** Whether a list of parameters and modules names this parameter. */
export function isIgnored(parameter: string, ignore: readonly string[] = []): boolean {
  return ignore.includes(parameter) || ignore.includes(moduleOf(parameter));
}

/** "classifier" of "classifier.weight". */
export function moduleOf(parameter: string): string {
  return parameter.replace(/\.[^.]*$/, "");
}

function checkShape(module: PackModule, parameter: OnnxParameter): void {
  const shape = matrixShape(parameter);
  const table = parameter.layout === "embedding" || module.layout === "embedding";
  const conv = parameter.shape.length > 2 && module.layout === "conv";
  const expected = table ? [module.in, module.out] : [module.out, module.in];
  const size = parameter.shape.slice(1).reduce((a, b) => a * b, 1);
  const fits = conv
    ? parameter.shape[0] === module.out && size === module.in
    : shape?.every((n, i) => n === expected[i]);
  if (fits) return;
  throw shapeMismatch(module, parameter.name, expected, shape ?? parameter.shape);
}

/** The segments that one of two names has in front of the other. */
function inFront(name: string, found: string): string {
  const longer = name.length > found.length;
  return longer ? `-${name.slice(0, -found.length)}` : `+${found.slice(0, found.length - name.length)}`;
}
