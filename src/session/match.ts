/**
 * A pack's modules and a model's parameters, held against each other: which weight each adapted module is, and whether
 * it is the right model's. Changes nothing.
 */

import {
  checkFingerprint,
  NameMatcher,
  notFound,
  refuseShared,
  SAME_FLOAT,
  SAME_QUANTIZED,
  shapeMismatch,
} from "../core/mismatch.ts";
import { BaseMismatchError } from "../errors.ts";
import { moduleOf, type PackModule } from "../format/format.ts";
import { type AdaptedBias, droppedBias, fusedNode } from "../onnx/linear.ts";
import { asMatrix, findParameters, matrixShape, type OnnxParameter } from "../onnx/modules.ts";
import type { ModelFile } from "../onnx/read.ts";
import { Copies, readLinearWeight } from "../onnx/weights.ts";
import { elementsOf } from "../tensor/dtypes.ts";
import type { SessionOptions } from "./options.ts";

/** A weight of a model that may be an embedding's, or tied to one. */
export interface Table {
  readonly name: string;
  /** "ROWS,WIDTH". */
  readonly shape: string;
}

export class ModelMatcher {
  readonly #file: ModelFile;
  readonly #options: SessionOptions;
  readonly #parameters = new Map<string, OnnxParameter>();
  readonly #byInitializer = new Map<string, OnnxParameter[]>();
  readonly #names: NameMatcher;
  readonly #copies: Copies;
  /** The model's names of parameters that were found by the end of their names only, by the pack's names. */
  readonly #bySuffix = new Map<string, string>();

  constructor(file: ModelFile, options: SessionOptions) {
    this.#file = file;
    this.#options = options;
    const parameters = findParameters(file.model);
    for (const parameter of parameters) {
      const { name, initializer } = parameter;
      this.#parameters.set(name, parameter);
      const held = this.#byInitializer.get(initializer);
      if (held) held.push(parameter);
      else this.#byInitializer.set(initializer, [parameter]);
    }
    this.#names = new NameMatcher(this.#parameters.keys());
    this.#copies = new Copies(file, parameters, options);
  }

  /**
   * The weights of modules, with copies.
   * @throws BaseMismatchError when one is missing, ambiguous, of another shape, or that of two
   */
  async weights(modules: readonly PackModule[]): Promise<OnnxParameter[]> {
    const weights: OnnxParameter[] = [];
    for (const module of modules) weights.push(await this.#locate(module));
    refuseShared(
      modules,
      weights.map(({ name }) => name),
    );
    for (const [i, weight] of weights.entries())
      if (!weight.slice && !weight.joined) weights[i] = await this.#copies.of(weight);
    return weights;
  }

  /**
   * The weight of a module, or its part of a packed one.
   * @throws BaseMismatchError when it is missing or of another shape
   */
  async #locate(module: PackModule): Promise<OnnxParameter> {
    let weight = await this.#weight(module.name);
    if (misfitOf(module, weight)) weight = await this.#byHand(module.name, weight);
    const misfit = misfitOf(module, weight);
    if (misfit) throw misfit;
    return weight;
  }

  /** The only parameter that an initializer holds. */
  #heldBy(initializer = ""): OnnxParameter | undefined {
    const [held, ...others] = this.#byInitializer.get(initializer) ?? [];
    return others.length === 0 ? held : undefined;
  }

  async #weight(module: string): Promise<OnnxParameter> {
    const byHand = this.#options.names?.get(module);
    const held = this.#heldBy(byHand);
    if (held) return held;
    const found = this.#names.find(byHand ?? `${module}.weight`);
    if ("name" in found) {
      if (byHand === undefined) this.#note(`${module}.weight`, found.name);
      return this.#parameters.get(found.name)!;
    }
    const part = await this.#piece(byHand?.replace(/\.weight$/, "") ?? module, "weight");
    if (part) return part;
    const error = notFound(module, found);
    const { model } = this.#file;
    const fused = fusedNode(model);
    if (!fused) throw error;
    const what = (await import("../onnx/packed.ts")).whyFused(model, fused);
    throw new BaseMismatchError(`${what}; ${error.message}`, { module, candidates: error.candidates ?? [] });
  }

  /** The name that the user has for a weight that tasks bring. */
  #byName(name: string): string | undefined {
    return name.endsWith(".weight") ? this.#options.names?.get(moduleOf(name)) : undefined;
  }

  /** The model's names of weights that are mapped by hand, by module. */
  *byHand(): Generator<[module: string, name: string]> {
    for (const [module, weight] of this.#options.names ?? []) {
      const name = this.#heldBy(weight)?.name ?? nameOf(this.#names.find(weight));
      if (name !== undefined) yield [module, name];
    }
  }

  #findParameter(name: string): ReturnType<NameMatcher["find"]> {
    const byHand = this.#byName(name);
    return this.#heldBy(byHand) ?? this.#names.find(byHand ?? name);
  }

  /** A layer that lies in a packed one, or in several. */
  async #piece(module: string, suffix: "weight" | "bias"): Promise<OnnxParameter | undefined> {
    const { findPiece } = await import("../onnx/packed.ts");
    const found = await findPiece(this.#file.model, module, suffix, async (name) => {
      const known = nameOf(this.#names.find(name));
      return known === undefined ? undefined : this.#copies.of(this.#parameters.get(known)!);
    });
    if (found) this.#note(`${module}.${suffix}`, found.name);
    return found;
  }

  /** Its part of a packed weight that was named by hand; what was named, where it is none. */
  async #byHand(module: string, weight: OnnxParameter): Promise<OnnxParameter> {
    if (!this.#options.names?.has(module) || weight.slice || weight.joined) return weight;
    const { partByHand } = await import("../onnx/packed.ts");
    return partByHand(this.#file.model, module, await this.#copies.of(weight)) ?? weight;
  }

  #note(name: string, found: string): void {
    if (name !== found) this.#bySuffix.set(name, found);
  }

  /**
   * Holds weights against the pack's fingerprints. What was found by the end of its name only must be confirmed by one,
   * its own or that of another with the same segments in front: a decoder's layer may be called as an encoder's is in a
   * file of its own.
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
    const fronts = new Set<string>();
    for (const [i, module] of modules.entries())
      if (!(await this.#confirm(module, weights[i]!, bases, fronts))) unconfirmed.push(module.name);
    for (const [name, found] of this.#unsure(fronts))
      throw new BaseMismatchError(
        `"${name}" is in the model by the end of its name only, as "${found}", and the pack has no fingerprint to tell ` +
          "whether that is the same: this may be another file of the model, an encoder's for a decoder's, say. Make the pack " +
          "with its base, map the module with the option `names`, or pass anyBase: true",
        { module: moduleOf(name), candidates: [found] },
      );
    return unconfirmed;
  }

  /** Checks a fingerprint. @param fronts takes the segments in front by which the model's name differs */
  async #confirm(module: PackModule, weight: OnnxParameter, bases: Uint8Array, fronts: Set<string>): Promise<boolean> {
    const isSame = await this.confirms(module, weight, bases);
    const name = `${module.name}.weight`;
    const found = this.#bySuffix.get(name);
    if (isSame && found !== undefined) fronts.add(inFront(name, found));
    return isSame;
  }

  /** Names that were found by their ends only, and whose segments in front no fingerprint has confirmed. */
  #unsure(fronts: ReadonlySet<string>): [name: string, found: string][] {
    return [...this.#bySuffix].filter(([name, found]) => !fronts.has(inFront(name, found)));
  }

  /**
   * The modules and parameters of a pack that live in this model, where it is one of several files: those whose
   * fingerprint fits, those of the whole name, and those whose names differ from such by the same segments in front.
   * @returns by name, the reason why one is not there; undefined where it is
   */
  async residents(
    modules: readonly PackModule[],
    parameters: Iterable<string>,
    bases: Uint8Array,
  ): Promise<Map<string, string | undefined>> {
    const found = new Map<string, string | undefined>();
    const fronts = new Set<string>();
    for (const module of modules) {
      try {
        const weight = await this.#locate(module);
        if (!this.#options.anyBase) await this.#confirm(module, weight, bases, fronts);
        found.set(module.name, undefined);
      } catch (error) {
        if (!(error instanceof BaseMismatchError)) throw error;
        found.set(module.name, error.message);
      }
    }
    for (const name of parameters) {
      const parameter = this.#findParameter(name);
      if ("name" in parameter) {
        if (!this.#byName(name)) this.#note(name, parameter.name);
        found.set(name, undefined);
        // The exporter may have dropped it from a layer that is here.
      } else found.set(name, (await this.dropped(name)) ? undefined : "is not in it");
    }
    for (const [name, as] of this.#unsure(fronts)) {
      const module = moduleOf(name);
      const why = `is in it by the end of its name only, as "${as}", which no fingerprint confirms: make the pack with its base`;
      for (const key of name.endsWith(".weight") ? [name, module, `${module}.bias`] : [name])
        if (found.has(key)) found.set(key, found.get(key) ?? why);
    }
    return found;
  }

  /**
   * True if the pack's fingerprint of a module is the weight's; false without one.
   * @throws BaseMismatchError when it is another's
   */
  async confirms(module: PackModule, parameter: OnnxParameter, bases: Uint8Array): Promise<boolean> {
    const weight = module.layout === "conv" ? asMatrix(parameter) : parameter;
    if (module.fingerprint === undefined || (weight.shape.length !== 2 && weight.dtype !== "other")) return false;
    const at = await readLinearWeight(this.#file, weight, this.#options);
    const turned = parameter.layout === "embedding" || module.layout === "embedding";
    const value = turned ? (o: number, n: number): number => at(n, o) : at;
    checkFingerprint(module, parameter.name, value, bases, weight.dtype === "other" ? SAME_QUANTIZED : SAME_FLOAT);
    return true;
  }

  has(name: string): boolean {
    return "name" in this.#names.find(name);
  }

  /** A parameter that tasks bring. @throws BaseMismatchError when the model does not have it, or several match */
  async parameter(name: string, role: string): Promise<OnnxParameter> {
    const found = this.#findParameter(name);
    if ("name" in found) {
      if (!this.#byName(name)) this.#note(name, found.name);
      const parameter = this.#parameters.get(found.name)!;
      if (role === "saved" && parameter.shape.length === 1 && name.endsWith(".weight")) await this.#refuseShifted(name);
      return this.#copies.of(parameter);
    }
    const cut = name.lastIndexOf(".");
    const part = name.endsWith(".bias") ? await this.#piece(name.slice(0, cut), "bias") : undefined;
    if (part) return part;
    throw new BaseMismatchError(
      `tasks change "${name}" (${role}), which ${found.ambiguous ? "several parameters of the model match" : "is not in the model"}; ` +
        `candidates: ${found.candidates().join(", ") || "none"}. Export the model with that layer; or, to use the tasks without it, pass ignore: ["${moduleOf(name)}"]`,
      { module: name, candidates: found.candidates() },
    );
  }

  /** All weights with rows, but for those that the user wants left out. */
  *tables(): Generator<Table> {
    for (const parameter of this.#parameters.values()) {
      const shape = parameter.layout === "embedding" ? parameter.shape : matrixShape(parameter);
      if (shape && parameter.uses.length > 0 && !this.ignores(parameter.name))
        yield { name: parameter.name, shape: shape.join() };
    }
  }

  /** The shape of an embedding's table; undefined where the model uses the parameter as something else. */
  shapeOfTable(name: string): string | undefined {
    const found = nameOf(this.#names.find(this.#byName(name) ?? name));
    const { layout, shape } = (found !== undefined && this.#parameters.get(found)) || {};
    return layout === "embedding" ? shape!.join() : undefined;
  }

  /** Parameters that are tied to an embedding's table, but for those that the user wants left out. */
  async tiedTo(table: OnnxParameter): Promise<OnnxParameter[]> {
    return (await this.#copies.tiedTo(table)).filter(({ name }) => !this.ignores(name));
  }

  /** @throws BaseMismatchError where the file has another number for a normalisation's weight than the checkpoint */
  async #refuseShifted(name: string): Promise<void> {
    if (!(await import("../onnx/packed.ts")).addsOneToNorms(this.#file.model)) return;
    throw new BaseMismatchError(
      `tasks bring "${name}", which onnxruntime-genai's builder has stored with 1 added, as it does for Gemma: export the model ` +
        `with Optimum; or, to use the tasks without it, pass ignore: ["${moduleOf(name)}"]`,
      { module: name },
    );
  }

  /**
   * A bias that tasks bring and the exporter has dropped.
   * @throws BaseMismatchError when its layer may be any of several
   */
  async dropped(name: string): Promise<AdaptedBias | undefined> {
    const module = moduleOf(name);
    const mapped = this.#options.names?.has(module);
    const weight = `${module}.weight`;
    const layer = mapped ? (await this.#weight(module)).name : nameOf(this.#names.find(weight));
    if (layer === undefined || name !== `${module}.bias`) return undefined;
    const bias = nameOf(this.#names.find(name));
    // A bias found by the end of its name only may be another layer's.
    const own = bias !== undefined && (mapped || inFront(name, bias) === inFront(weight, layer));
    if (own && this.#parameters.get(bias)!.uses.length > 0) return undefined;
    const found = droppedBias(this.#file.model, name, await this.#copies.of(this.#parameters.get(layer)!));
    if (found) this.#note(weight, layer);
    return found;
  }

  ignores(name: string): boolean {
    return isIgnored(name, this.#options.ignore);
  }
}

function nameOf(found: ReturnType<NameMatcher["find"]>): string | undefined {
  return "name" in found ? found.name : undefined;
}

/** True if a list of parameters and modules names this parameter. */
export function isIgnored(parameter: string, ignore: readonly string[] = []): boolean {
  return ignore.includes(parameter) || ignore.includes(moduleOf(parameter));
}

/** The error for a weight of another shape than the module's; undefined where it fits. */
function misfitOf(module: PackModule, parameter: OnnxParameter): BaseMismatchError | undefined {
  const table = parameter.layout === "embedding" || module.layout === "embedding";
  const expected = table ? [module.in, module.out] : [module.out, module.in];
  const conv = module.layout === "conv" && parameter.shape.length > 2;
  const shape = (conv ? undefined : matrixShape(parameter)) ?? parameter.shape;
  const [rows, ...others] = shape;
  const fits = conv ? rows === module.out && elementsOf(others) === module.in : shape.join() === expected.join();
  return fits ? undefined : shapeMismatch(module, parameter.name, expected, shape);
}

/** The segments that one of two names has in front of the other. */
function inFront(name: string, found: string): string {
  const longer = name.length > found.length;
  return longer ? `-${name.slice(0, -found.length)}` : `+${found.slice(0, found.length - name.length)}`;
}
