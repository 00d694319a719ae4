/**
 * Plans the changes to a model for the tasks of a pack: which layers get a term, which parameters the tasks change beside them, and
 * whether that can be done without touching the weights. Checks that the model is the right one. Changes nothing.
 */

import type { PackView } from "../core/part.ts";
import { BaseMismatchError } from "../errors.ts";
import {
  type Brought,
  bringsOf,
  isOfModule,
  moduleOf,
  needsFactors,
  type PackModule,
  parseBrought,
  sharedBases,
} from "../format/format.ts";
import type { AdaptedLayer, Graft, GraftBias, GraftHead, GraftRows } from "../onnx/adapted.ts";
import { appliedAs, biasOf, rowsOf } from "../onnx/additions.ts";
import type { GraftVector } from "../onnx/forms.ts";
import { endOf, linearsOf, NotLinear } from "../onnx/linear.ts";
import { asMatrix, matrixShape, type OnnxParameter } from "../onnx/modules.ts";
import { checkGraftable } from "../onnx/nodes.ts";
import type { ModelFile } from "../onnx/read.ts";
import { readLinearWeight } from "../onnx/weights.ts";
import { transpose } from "../tensor/tensor-file.ts";
import { componentsOf, componentsUnder, MOST_COMPONENTS, sharedReason } from "./components.ts";
import { ModelMatcher } from "./match.ts";
import type { Mode, SessionOptions } from "./options.ts";
import type { BaseHead, BaseValues } from "./values.ts";

/** The changes that a model needs. */
export interface Plan {
  readonly mode: Mode;
  /** Why this mode, for people. */
  readonly reason: string;
  readonly base: BaseValues;
  readonly graft: Graft;
  /** The model's names of the adapted weights, by module name of the pack, and of weights that are mapped by hand. */
  readonly names: ReadonlyMap<string, string>;
  /** Modules of the pack whose weights were found by their names alone: no fingerprint was held against them. */
  readonly unconfirmed: readonly string[];
  /** Biases that the exporter has dropped and tasks bring, by the pack's names: inputs in every mode. */
  readonly dropped: readonly string[];
  /** Mode "folded": what changes inside the weights. */
  readonly folded: readonly OnnxParameter[];
}

/** What a mode cannot do. */
interface Obstacle {
  /** A module or a parameter of the pack. */
  readonly module: string;
  readonly why: string;
}

/** A linear layer that tasks bring whole, and the pack's names of its parameters. */
interface SavedHead {
  readonly graft: GraftHead;
  readonly weight: string;
  readonly bias: string | undefined;
  readonly parameter: OnnxParameter;
}

/** Parameters that tasks bring and that are neither terms nor heads. */
interface Beside {
  readonly biases: readonly GraftBias[];
  readonly rows: readonly GraftRows[];
  readonly vectors: readonly GraftVector[];
  /** The model's parameters for all of it, but for biases that it lacks. */
  readonly others: readonly OnnxParameter[];
}

/**
 * @param bases of the pack, as `pack.bases()` gives them
 * @throws BaseMismatchError when a module is missing, ambiguous, of another shape or of another model, or when the mode
 *   asked for cannot do what the tasks bring; the message names another that can
 * @throws FormatError when the model's opset is too old, or the model has been grafted before
 */
export async function planSession(
  file: ModelFile,
  pack: PackView,
  bases: Uint8Array,
  options: SessionOptions,
): Promise<Plan> {
  // First: what a graft has taken out of a model would be missed by another name.
  checkGraftable(file.model);
  return new Planner(file, pack, options).plan(bases);
}

class Planner {
  readonly #file: ModelFile;
  readonly #pack: PackView;
  readonly #options: SessionOptions;
  readonly #matcher: ModelMatcher;
  /** Why a task cannot come unfolded, and why not folded. */
  readonly #notUnfolded: Obstacle[] = [];
  readonly #notFolded: Obstacle[] = [];
  /** Biases that the exporter has dropped, by the pack's name. */
  readonly #dropped = new Map<string, GraftBias>();

  constructor(file: ModelFile, pack: PackView, options: SessionOptions) {
    this.#file = file;
    this.#pack = pack;
    this.#options = options;
    this.#matcher = new ModelMatcher(file, options);
  }

  async plan(bases: Uint8Array): Promise<Plan> {
    const { modules } = this.#pack;
    const weights = await this.#matcher.weights(modules);
    const brought = await this.#brought();
    const namesOf = (some: readonly Brought[]): ReadonlySet<string> => new Set(some.map(({ name }) => name));
    const scaled = namesOf(brought.filter(({ role }) => role === "magnitude"));
    const withFactors = namesOf(brought.filter(({ role }) => needsFactors(role)));
    const withRows = namesOf(brought.filter(({ role }) => role === "own-A" || role === "own-B"));
    const parameters = brought.filter(({ role }) => !isOfModule(role));
    const ignored = new Set(parameters.map(({ name }) => name).filter((name) => this.#matcher.ignores(name)));
    const wanted = parameters.filter(({ name }) => !ignored.has(name));
    for (const { name } of wanted) {
      const bias = await this.#matcher.dropped(name);
      if (bias) this.#dropped.set(name, bias);
    }
    const heads = await this.#heads(wanted);
    const { biases, rows, vectors: changed, others } = await this.#beside(wanted, heads);
    const adapted = await this.#adaptedHeads(heads, weights, scaled);
    const grafts: AdaptedLayer[] = [];
    for (const [i, one] of modules.entries())
      grafts.push(...(await this.#layer(one, weights[i]!, scaled.has(one.name))));
    const { mode, reason } = this.#choose();
    const unconfirmed = await this.#matcher.check(modules, weights, bases);

    const names = new Map([
      ...this.#matcher.byHand(),
      ...modules.map(({ name }, i) => [name, weights[i]!.name] as const),
    ]);
    const found = { mode, reason, names, unconfirmed, dropped: [...this.#dropped.keys()] };
    // An adapted weight is always folded: an input in its place would not get the terms of other tasks.
    const fed = mode === "folded" ? heads.filter((head) => !adapted.has(head)) : heads;
    const baseHeads = new Map<string, BaseHead>();
    for (const head of fed) baseHeads.set(head.graft.name, await this.#baseHead(head, adapted.has(head)));
    const tied = new Map(
      rows.flatMap(({ name, follows }) => (follows === undefined ? [] : [[name, follows] as const])),
    );
    const base = { ignored, wanted: new Set(wanted.map(({ name }) => name)), heads: baseHeads, tied };
    const graft = { modules: [], biases: [], rows: [], vectors: [], heads: fed.map((head) => head.graft) };
    // No weight holds a bias that the model lacks.
    const lacking = [...biases.map(({ name }) => name), ...[...adapted.keys()].map(({ bias = "" }) => bias)];
    const added = mode === "folded" ? lacking.flatMap((name) => this.#dropped.get(name) ?? []) : biases;
    const vectors = new Map<string, Float32Array>();
    for (const { name, size } of [...added, ...(mode === "folded" ? [] : changed)])
      vectors.set(name, await this.#vector(name, "bias", size));
    if (mode === "folded") {
      const all = [...weights, ...others, ...[...adapted.values()].flat()];
      const folded = [...new Map(all.map((parameter) => [parameter.name, parameter])).values()];
      const values = { ...base, biases: vectors, weights: new Map() };
      return { ...found, base: values, graft: { ...graft, biases: added }, folded };
    }
    const matrices = new Map<string, Float32Array>();
    for (const [i, { name }] of modules.entries())
      if (scaled.has(name)) matrices.set(name, await this.#matrix(weights[i]!));
    const filled = grafts.map((module) => {
      const own = modules.find(({ name }) => name === module.name)!;
      const components = mode === "core" ? componentsOf(own, bases) : undefined;
      const { privateTerms: reserved = false } = this.#options.reserve ?? {};
      const factors = !components || reserved || withFactors.has(module.name);
      const over = components || module.form ? undefined : componentsUnder(own, brought, bases, this.#options);
      const expands = components ? reserved || withRows.has(module.name) : isExpanded(own, over);
      return { ...module, components, factors, over, expands };
    });
    const all = { ...graft, modules: filled, biases: added, rows, vectors: changed };
    return { ...found, base: { ...base, biases: vectors, weights: matrices }, graft: all, folded: [] };
  }

  /** Everything that the tasks change, and the heads that are reserved. */
  async #brought(): Promise<Brought[]> {
    const brought = await broughtBy(this.#pack, this.#options);
    const reserved = [this.#options.reserve?.head ?? []]
      .flat()
      .flatMap((head) => [`${head}.weight`, ...(this.#matcher.has(`${head}.bias`) ? [`${head}.bias`] : [])]);
    const others = brought.filter(({ role, name }) => role !== "saved" || !reserved.includes(name));
    return [...reserved.map((name): Brought => ({ role: "saved", name })), ...others];
  }

  /** Sorts biases, token rows and other vectors by how they can be added to. */
  async #beside(wanted: readonly Brought[], heads: readonly SavedHead[]): Promise<Beside> {
    const headNames = new Set(heads.flatMap(({ weight, bias }) => [weight, bias]));
    const biases = new Map<string, GraftBias>();
    const rows = new Map<OnnxParameter, GraftRows | undefined>();
    const vectors: GraftVector[] = [];
    const others: OnnxParameter[] = [];
    for (const { role, name } of wanted) {
      if (headNames.has(name)) continue;
      const dropped = this.#dropped.get(name);
      if (dropped) {
        biases.set(name, dropped);
        continue;
      }
      const parameter = await this.#matcher.parameter(name, role);
      others.push(parameter);
      const quantised = parameter.dtype === "other";
      this.#checkFoldable(name, `"${name}"`, parameter);
      if (role === "rows") {
        rows.set(parameter, this.#rows(name, parameter));
        continue;
      }
      const bias =
        quantised || (role === "saved" && !name.endsWith(".bias"))
          ? undefined
          : biasOf(this.#file.model, name, parameter);
      const why = quantised ? "which is quantised here" : "no linear layer's head, bias or weight of a normalisation";
      const vector = bias ? undefined : await this.#vectorOf(name, parameter);
      if (bias) biases.set(name, bias);
      else if (vector) vectors.push(vector);
      else this.#notUnfolded.push({ module: name, why: `tasks bring "${name}" (${role}), ${why}` });
    }
    for (const [table, { name } = { name: "" }] of [...rows]) {
      if (table.layout !== "embedding") continue;
      for (const tied of await this.#matcher.tiedTo(table)) {
        const own = rows.has(tied) ? rows.get(tied) : this.#rows(tied.name, tied);
        if (!rows.has(tied)) this.#checkFoldable(name, `"${tied.name}", which is tied to "${name}",`, tied);
        rows.set(tied, own && { ...own, follows: name });
        others.push(tied);
        const head = heads.find(({ parameter }) => parameter.name === tied.name);
        const why = `tasks bring rows of "${name}", which "${tied.name}" is tied to, and others bring that whole`;
        if (head) this.#notUnfolded.push({ module: name, why });
      }
    }
    return { biases: [...biases.values()], rows: [...rows.values()].flatMap((one) => one ?? []), vectors, others };
  }

  #rows(name: string, parameter: OnnxParameter): GraftRows | undefined {
    const rows = rowsOf(this.#file.model, name, parameter);
    if (typeof rows !== "string") return rows;
    this.#notUnfolded.push({ module: name, why: `tasks bring rows of "${name}", ${rows}` });
    return undefined;
  }

  async #vectorOf(name: string, parameter: OnnxParameter): Promise<GraftVector | undefined> {
    const { vectorOf } = await import("../onnx/forms.ts");
    return vectorOf(this.#file.model, name, parameter);
  }

  /** Saved linear layers: the weight and, where there is one, the bias behind it. */
  async #heads(brought: readonly Brought[]): Promise<SavedHead[]> {
    const of = (which: string) => new Set(brought.filter(({ role }) => role === which).map(({ name }) => name));
    const [saved, rows] = [of("saved"), of("rows")];
    const heads = [];
    for (const weight of saved) {
      if (!weight.endsWith(".weight") || rows.has(weight)) continue;
      const parameter = await this.#matcher.parameter(weight, "saved");
      const shape = matrixShape(parameter);
      const linears = linearsOf(this.#file.model, parameter);
      if (!shape || linears instanceof NotLinear || linears.some(({ slice, joined }) => slice ?? joined)) continue;
      const name = moduleOf(weight);
      const bias = saved.has(`${name}.bias`) ? `${name}.bias` : undefined;
      const places = linears.map((linear) => ({
        linear,
        end: bias ? endOf(this.#file.model, linear) : linear.node,
      }));
      // A bias that is added somewhere else would be added to the task's own.
      if (
        bias &&
        !this.#dropped.has(bias) &&
        places.some(({ linear, end }) => linear.bias === undefined && end === linear.node)
      )
        continue;
      const graft = { name, in: shape[1], out: shape[0], bias: bias !== undefined, places };
      heads.push({ graft, weight, bias, parameter });
    }
    return heads;
  }

  /**
   * Heads that other tasks adapt, with their parameters: an input takes the weight's place, and terms are added behind it.
   * @throws BaseMismatchError when tasks call one layer by two names
   */
  async #adaptedHeads(
    heads: readonly SavedHead[],
    weights: readonly OnnxParameter[],
    scaled: ReadonlySet<string>,
  ): Promise<Map<SavedHead, OnnxParameter[]>> {
    const adapted = new Map<SavedHead, OnnxParameter[]>();
    for (const head of heads) {
      const { name } = head.graft;
      const isSame = (parameter: OnnxParameter): boolean => parameter.name === head.parameter.name;
      const others = heads.filter(({ parameter }) => isSame(parameter)).map(({ graft }) => graft.name);
      const index = weights.findIndex(isSame);
      if (index >= 0) others.push(this.#pack.modules[index]!.name);
      const alias = others.find((other) => other !== name);
      if (alias !== undefined) {
        const message = `"${name}" and "${alias}" of the pack are one layer of the model, "${head.parameter.name}"`;
        throw new BaseMismatchError(`${message}: pack the adapters under one name`, { module: name });
      }
      if (index < 0) continue;
      const bias =
        head.bias === undefined || this.#dropped.has(head.bias)
          ? []
          : [await this.#matcher.parameter(head.bias, "saved")];
      if (bias.some(({ dtype }) => dtype === "other"))
        this.#notFolded.push({ module: name, why: `the bias of "${name}" is quantised` });
      if (scaled.has(name))
        this.#notUnfolded.push({ module: name, why: `one task brings "${name}" whole, and another adapts it by DoRA` });
      adapted.set(head, [head.parameter, ...bias]);
    }
    return adapted;
  }

  async #layer(module: PackModule, parameter: OnnxParameter, rowScale: boolean): Promise<AdaptedLayer[]> {
    const { name, in: inputs, out } = module;
    const quantised = parameter.dtype === "other";
    this.#checkFoldable(name, `the weight of "${name}"`, parameter);
    const applied = await appliedAs(this.#file.model, module, parameter, rowScale);
    if (typeof applied === "string") this.#notUnfolded.push({ module: name, why: applied });
    if (rowScale && quantised) {
      const why = `"${name}" has DoRA tasks, which need the float weight, and the model's is quantised`;
      this.#notUnfolded.push({ module: name, why });
    }
    return typeof applied === "string" ? [] : [{ name, in: inputs, out, ...applied, factors: true, rowScale }];
  }

  #checkFoldable(module: string, what: string, { dtype, copies, joined }: OnnxParameter): void {
    if (joined) {
      for (const part of joined) this.#checkFoldable(module, `${what}, as "${part.name}",`, part);
      if (new Set(joined.map(({ layout }) => layout)).size > 1)
        this.#notFolded.push({ module, why: `${what} is divided into parts that lie in different ways` });
      return;
    }
    const other = copies.find((copy) => copy.dtype !== dtype);
    if (dtype === "other" || other?.dtype === "other") this.#notFolded.push({ module, why: `${what} is quantised` });
    else if (other) this.#notFolded.push({ module, why: `${what} is there in ${dtype} and in ${other.dtype}` });
  }

  #choose(): { mode: Mode; reason: string } {
    const { mode = "auto" } = this.#options;
    const refuse = (obstacles: readonly Obstacle[], before: string, after: string): BaseMismatchError => {
      const [{ module, why }] = obstacles as [Obstacle];
      const more = obstacles.length > 1 ? ` (and ${obstacles.length - 1} more)` : "";
      return new BaseMismatchError(`${before}: ${why}${more}${after}`, { module });
    };
    const [notUnfolded, notFolded] = [this.#notUnfolded[0], this.#notFolded[0]];
    if (notUnfolded && notFolded) {
      const neither = `; nor can they be folded: ${notFolded.why}. Pass a float export of the model`;
      throw refuse(this.#notUnfolded, "no mode can bring these tasks to this model", neither);
    }
    if (mode === "folded" && notFolded) {
      throw refuse(this.#notFolded, 'mode "folded"', '; use mode "core" or "factors"');
    }
    if (mode !== "auto" && mode !== "folded" && notUnfolded) {
      throw refuse(this.#notUnfolded, `mode "${mode}"`, '; use mode "folded"');
    }
    const K = this.#pack.modules.flatMap((module) => {
      const { A, B } = sharedBases(module) ?? {};
      return A?.kind === "column" && B?.kind === "column" ? [A.tensor.rows, B.tensor.rows] : [];
    });
    if (mode === "core" && K.length === 0) {
      const why = "tasks share no components on both sides of a layer";
      throw refuse([{ module: "", why }], 'mode "core"', '; use mode "factors"');
    }
    if (mode !== "auto") return { mode, reason: "asked for" };
    if (notUnfolded) return { mode: "folded", reason: notUnfolded.why };
    const why = notFolded ? `; ${notFolded.why}, which rules folding out` : "";
    const none = "tasks share no components: a switch hands over whole tasks";
    if (K.length === 0) return { mode: "factors", reason: (sharedReason(this.#pack.modules) ?? none) + why };
    const most = Math.max(...K);
    if (most > MOST_COMPONENTS) {
      return {
        mode: "factors",
        reason: `tasks share up to ${most} components a side, too many to mix in each run${why}`,
      };
    }
    return {
      mode: "core",
      reason: `tasks share up to ${most} components a side: a switch hands over how one mixes them${why}`,
    };
  }

  async #baseHead({ graft, bias, parameter }: SavedHead, adapted: boolean): Promise<BaseHead> {
    const weight = transpose(await this.#matrix(parameter), graft.out, graft.in);
    const vector = bias === undefined ? undefined : await this.#vector(bias, "saved", graft.out);
    return { weight, bias: vector, labels: graft.out, adapted };
  }

  async #vector(name: string, role: string, size: number): Promise<Float32Array> {
    if (this.#dropped.has(name)) return new Float32Array(size);
    const { readVector } = await import("../onnx/dequantize.ts");
    return readVector(this.#file, await this.#matcher.parameter(name, role), this.#options);
  }

  async #matrix(parameter: OnnxParameter): Promise<Float32Array> {
    const weight = asMatrix(parameter);
    const [out, inputs] = matrixShape(weight)!;
    const { at } = await readLinearWeight(this.#file, weight, this.#options);
    return Float32Array.from({ length: out * inputs }, (_, i) => at(Math.floor(i / inputs), i % inputs));
  }
}

/** Parameters that the tasks of a pack change beside their terms, each once. */
export async function broughtBy(pack: PackView, options: SessionOptions): Promise<Brought[]> {
  const all = new Set<string>();
  for (const { id, brings } of pack.tasks.values()) {
    const own = brings ?? bringsOf(await pack.load(id, options), pack.modules);
    for (const one of own) all.add(one);
  }
  return [...all].map(parseBrought);
}

/** Whether factors of a module without a core are made of components: those that no coefficients stand for. */
function isExpanded({ A, B }: PackModule, over: AdaptedLayer["over"]): boolean {
  return (A.length > 0 && !over?.A) || (B.length > 0 && !over?.B);
}
