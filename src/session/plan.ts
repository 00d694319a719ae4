/**
 * A pack and a model, held against each other: which layers of the graph are the pack's modules, what else the tasks
 * change there, and which of it can be done without touching the weights. Checks that the model is the right one. Changes
 * nothing.
 */

import { checkFingerprint, SAME_FLOAT, SAME_QUANTIZED } from "../base/fingerprint.ts";
import { findWeight, refuseShared, shapeMismatch } from "../base/locate.ts";
import { NameMatcher } from "../base/names.ts";
import { BaseMismatchError } from "../errors.ts";
import type { PackModule, TaskBlob, TaskTerm } from "../format/format.ts";
import { readTensor } from "../format/tensors.ts";
import { readLinearWeight, readVector } from "../onnx/dequantize.ts";
import {
  type Components,
  checkGraftable,
  type Graft,
  type GraftBias,
  type GraftHead,
  type GraftModule,
  type GraftRows,
} from "../onnx/graft.ts";
import { biasAdd, FLOAT, FLOAT16, fusedNode, linearsOf, matrixShape, NotLinear } from "../onnx/linear.ts";
import type { Use } from "../onnx/model.ts";
import { findParameters, type OnnxParameter } from "../onnx/modules.ts";
import type { ModelFile } from "../onnx/read.ts";
import type { Pack } from "../pack/pack.ts";
import type { ReadOptions } from "../source.ts";

/** How a task reaches the model. */
export type Mode = "core" | "factors" | "folded";

export interface PlanOptions extends ReadOptions {
  /** Unless given, or "auto": what fits the pack and the model best. */
  mode?: Mode | "auto" | undefined;
  /** Names of weights or of their initializers in the model, by module name of the pack, where they are not found. */
  names?: ReadonlyMap<string, string> | undefined;
  /** Accept a model whose weights differ from the fingerprints, for instance one that was trained further. */
  anyBase?: boolean | undefined;
  /**
   * Whether the model takes private rank-1 terms beside the core though no task of the pack has any, for tasks that are
   * added later. They cost a little in every run.
   */
  privateTerms?: boolean | undefined;
  /** A layer that tasks may bring whole though no task of the pack does, for tasks that are added or learned later. */
  head?: string | undefined;
  /** Parameters of the tasks, or modules with all of theirs, to leave out: `["classifier"]` on a model without one. */
  ignore?: readonly string[] | undefined;
}

/** A head as the base has it: weight [in, labels], bias [labels]. */
export interface BaseHead {
  readonly weight: Float32Array;
  readonly bias: Float32Array | undefined;
  readonly labels: number;
}

/** What is to be known of the model to evaluate tasks, once it is loaded. Holds nothing of the graph or the file. */
export interface BaseValues {
  readonly mode: Mode;
  /** By module name of the pack. */
  readonly heads: ReadonlyMap<string, BaseHead>;
  /** Values of the biases that tasks change, by the pack's name of the parameter. */
  readonly biases: ReadonlyMap<string, Float32Array>;
  /** Float weights of modules with DoRA, f32 [out, in], by module name. */
  readonly weights: ReadonlyMap<string, Float32Array>;
  /** Parameters of tasks that are left out. */
  readonly ignored: ReadonlySet<string>;
}

/** What is to be done to the model. */
export interface Plan {
  readonly mode: Mode;
  /** Why this mode, for people. */
  readonly reason: string;
  readonly base: BaseValues;
  readonly graft: Graft;
  /** The model's names of the adapted weights, by module name of the pack. */
  readonly names: ReadonlyMap<string, string>;
  /** Mode "folded": what changes inside the weights. */
  readonly folded: readonly OnnxParameter[];
}

/** What a mode cannot do. */
interface Obstacle {
  /** Of the pack: a module or a parameter. */
  module: string;
  why: string;
}

/** Roles that are no parameters of the model: they belong to the term of the module that they name. */
const OF_TERMS: ReadonlySet<string> = new Set(["magnitude", "private"]);

/** A linear layer that tasks bring whole, and the pack's names of its parameters. */
interface Head {
  graft: GraftHead;
  weight: string;
  bias: string | undefined;
  parameter: OnnxParameter;
}

/** A parameter that some task changes. */
interface Brought {
  role: string;
  name: string;
}

/**
 * @param bases of the pack, as `pack.bases()` gives them
 * @throws BaseMismatchError when a module is missing, ambiguous, of another shape or of another model, or when the mode
 *   asked for cannot do what the tasks bring; the message names another that can
 * @throws FormatError when the model's opset is too old, or the model has been grafted before
 */
export async function planSession(file: ModelFile, pack: Pack, bases: Uint8Array, options: PlanOptions): Promise<Plan> {
  // First: what a graft has taken out of a model would be missed by another name.
  checkGraftable(file.model);
  const planner = new Planner(file, pack, bases, options);
  return planner.plan();
}

class Planner {
  readonly #file: ModelFile;
  readonly #pack: Pack;
  readonly #bases: Uint8Array;
  readonly #options: PlanOptions;
  readonly #parameters = new Map<string, OnnxParameter>();
  readonly #names: NameMatcher;
  /** Why a task cannot come unfolded, and why not folded. */
  readonly #notUnfolded: Obstacle[] = [];
  readonly #notFolded: Obstacle[] = [];

  constructor(file: ModelFile, pack: Pack, bases: Uint8Array, options: PlanOptions) {
    this.#file = file;
    this.#pack = pack;
    this.#bases = bases;
    this.#options = options;
    for (const parameter of findParameters(file.model)) this.#parameters.set(parameter.name, parameter);
    this.#names = new NameMatcher(this.#parameters.keys());
  }

  async plan(): Promise<Plan> {
    const found = this.#pack.modules.map((module) => this.#module(module));
    refuseShared(
      this.#pack.modules,
      found.map(({ name }) => name),
    );
    const brought = await this.#brought();
    const parameters = brought.filter(({ role }) => !OF_TERMS.has(role));
    const ignored = new Set(parameters.map(({ name }) => name).filter((name) => this.#isIgnored(name)));
    const wanted = brought.filter(({ name }) => !ignored.has(name));
    const named = (of: string): Set<string> =>
      new Set(wanted.filter(({ role }) => role === of).map(({ name }) => name));
    const [scaled, ownTerms] = [named("magnitude"), named("private")];
    const heads = this.#heads(wanted);
    const { biases, rows, others } = this.#beside(wanted, heads);
    const modules = this.#pack.modules.map((module, i) =>
      this.#graftModule(module, found[i]!, scaled.has(module.name)),
    );
    const { mode, reason } = this.#choose();
    if (!this.#options.anyBase)
      for (const [i, parameter] of found.entries()) await this.#check(this.#pack.modules[i]!, parameter);

    const base = {
      mode,
      ignored,
      heads: new Map<string, BaseHead>(),
      biases: new Map<string, Float32Array>(),
      weights: new Map<string, Float32Array>(),
    };
    for (const head of heads) base.heads.set(head.graft.name, await this.#baseHead(head));
    const names = new Map(this.#pack.modules.map(({ name }, i) => [name, found[i]!.name]));
    const graftHeads = heads.map(({ graft }) => graft);
    if (mode === "folded") {
      const graft = { modules: [], biases: [], rows: [], heads: graftHeads };
      return { mode, reason, names, base, graft, folded: [...new Set([...found, ...others])] };
    }
    for (const { name } of biases)
      base.biases.set(name, await readVector(this.#file, this.#parameter(name, "bias"), this.#options));
    for (const [i, { name }] of this.#pack.modules.entries())
      if (scaled.has(name)) base.weights.set(name, await this.#matrix(found[i]!));
    const grafts = modules.filter((module) => module !== undefined);
    const filled = grafts.map((module) => {
      const components = mode === "core" ? this.#components(module.name) : undefined;
      return {
        ...module,
        components,
        factors: !components || this.#options.privateTerms === true || ownTerms.has(module.name),
      };
    });
    return { mode, reason, names, base, graft: { modules: filled, biases, rows, heads: graftHeads }, folded: [] };
  }

  /** What is neither a term nor a head: biases and token rows that can be added to, and all their parameters. */
  #beside(
    wanted: readonly Brought[],
    heads: readonly Head[],
  ): { biases: GraftBias[]; rows: GraftRows[]; others: OnnxParameter[] } {
    const headNames = new Set(heads.flatMap(({ weight, bias }) => [weight, bias]));
    const biases: GraftBias[] = [];
    const rows: GraftRows[] = [];
    const others: OnnxParameter[] = [];
    for (const { role, name } of wanted) {
      if (OF_TERMS.has(role) || headNames.has(name)) continue;
      const parameter = this.#parameter(name, role);
      others.push(parameter);
      const quantised = parameter.dtype === "other";
      if (quantised) this.#notFolded.push({ module: name, why: `"${name}" is quantised` });
      const bias = quantised || (role === "saved" && !name.endsWith(".bias")) ? undefined : this.#bias(name, parameter);
      const table = quantised || role !== "rows" ? undefined : this.#table(name, parameter);
      const why = quantised ? "which is quantised here" : "no linear layer's head or bias";
      if (bias) biases.push(bias);
      else if (table) rows.push(table);
      else this.#notUnfolded.push({ module: name, why: `tasks bring "${name}" (${role}), ${why}` });
    }
    return { biases, rows, others };
  }

  #module(module: PackModule): OnnxParameter {
    const parameter = this.#weight(module.name);
    const { name } = parameter;
    const shape = matrixShape(parameter);
    const table = parameter.layout === "embedding" || module.layout === "embedding";
    const conv = parameter.shape.length > 2 && module.layout === "conv";
    const expected = table ? [module.in, module.out] : [module.out, module.in];
    const size = parameter.shape.slice(1).reduce((a, b) => a * b, 1);
    const fits = conv
      ? parameter.shape[0] === module.out && size === module.in
      : shape?.every((n, i) => n === expected[i]);
    if (fits) return parameter;
    throw shapeMismatch(module, name, expected, shape ?? parameter.shape);
  }

  #weight(module: string): OnnxParameter {
    const byHand = this.#options.names?.get(module);
    const held =
      byHand === undefined ? [] : [...this.#parameters.values()].filter(({ initializer }) => initializer === byHand);
    if (held.length === 1) return held[0]!;
    try {
      return this.#parameters.get(findWeight(this.#names, module, this.#options.names))!;
    } catch (error) {
      const fused = fusedNode(this.#file.model);
      if (!fused || !(error instanceof BaseMismatchError)) throw error;
      const what = `the model is fused already (${fused.opType} "${fused.name}"): pass the unoptimised export`;
      throw new BaseMismatchError(`${what}; ${error.message}`, { module, candidates: error.candidates ?? [] });
    }
  }

  async #check(module: PackModule, parameter: OnnxParameter): Promise<void> {
    if (module.fingerprint === undefined || (parameter.shape.length !== 2 && parameter.dtype !== "other")) return;
    const { at, quantized } = await readLinearWeight(this.#file, parameter, this.#options);
    const turned = parameter.layout === "embedding" || module.layout === "embedding";
    const value = turned ? (o: number, n: number): number => at(n, o) : at;
    checkFingerprint(module, parameter.name, value, this.#bases, quantized ? SAME_QUANTIZED : SAME_FLOAT);
  }

  /** What the tasks change beside their terms. */
  async #brought(): Promise<Brought[]> {
    const all = new Set<string>();
    const { head } = this.#options;
    if (head !== undefined) {
      all.add(`saved ${head}.weight`);
      if ("name" in this.#names.find(`${head}.bias`)) all.add(`saved ${head}.bias`);
    }
    for (const { id, brings } of this.#pack.tasks.values()) {
      for (const one of brings ?? broughtBy(await this.#pack.load(id, this.#options), this.#pack.modules)) all.add(one);
    }
    return [...all].map((one) => ({ role: one.slice(0, one.indexOf(" ")), name: one.slice(one.indexOf(" ") + 1) }));
  }

  #isIgnored(name: string): boolean {
    return (this.#options.ignore ?? []).some((ignored) => name === ignored || moduleOf(name) === ignored);
  }

  #parameter(name: string, role: string): OnnxParameter {
    const found = this.#names.find(name);
    if ("name" in found) return this.#parameters.get(found.name)!;
    throw new BaseMismatchError(
      `tasks change "${name}" (${role}), which ${found.ambiguous ? "several parameters of the model match" : "is not in the model"}; ` +
        `candidates: ${found.candidates.join(", ") || "none"}. To use the tasks without it, pass ignore: ["${moduleOf(name)}"]`,
      { module: name, candidates: found.candidates },
    );
  }

  /** Saved linear layers: the weight and, where there is one, the bias behind it. */
  #heads(brought: readonly Brought[]): Head[] {
    const saved = new Set(brought.filter(({ role }) => role === "saved").map(({ name }) => name));
    const heads = [];
    for (const weight of saved) {
      if (!weight.endsWith(".weight")) continue;
      const parameter = this.#parameter(weight, "saved");
      const shape = matrixShape(parameter);
      const linears = linearsOf(this.#file.model, parameter);
      if (!shape || linears instanceof NotLinear) continue;
      const bias = saved.has(`${moduleOf(weight)}.bias`) ? `${moduleOf(weight)}.bias` : undefined;
      const places = linears.map((linear) => ({
        linear,
        end: (bias && biasAdd(this.#file.model, linear)) || linear.node,
      }));
      // A bias that is added somewhere else would be added to the task's own.
      if (bias && places.some(({ linear, end }) => !linear.addsBias && end === linear.node)) continue;
      heads.push({
        graft: { name: moduleOf(weight), in: shape[1], out: shape[0], bias: bias !== undefined, places },
        weight,
        bias,
        parameter,
      });
    }
    return heads;
  }

  async #baseHead({ graft, bias, parameter }: Head): Promise<BaseHead> {
    const { at } = await readLinearWeight(this.#file, parameter, this.#options);
    const weight = new Float32Array(graft.in * graft.out);
    for (let n = 0; n < graft.in; n++) for (let o = 0; o < graft.out; o++) weight[n * graft.out + o] = at(o, n);
    return {
      weight,
      bias:
        bias === undefined ? undefined : await readVector(this.#file, this.#parameter(bias, "saved"), this.#options),
      labels: graft.out,
    };
  }

  #bias(name: string, parameter: OnnxParameter): GraftBias | undefined {
    const [size] = parameter.shape;
    if (parameter.shape.length !== 1 || size === undefined) return undefined;
    const places = parameter.uses.filter(addsLastDimension);
    if (places.length === 0 || places.length < parameter.uses.length) return undefined;
    return { name, size, type: typeWhereUsed(parameter), places };
  }

  #table(name: string, parameter: OnnxParameter): GraftRows | undefined {
    const places = parameter.uses.filter(({ node, input }) => node.opType === "Gather" && input === 0);
    if (parameter.layout !== "embedding" || places.length === 0 || places.length < parameter.uses.length)
      return undefined;
    return { name, width: parameter.shape[1]!, type: typeWhereUsed(parameter), places };
  }

  #graftModule(module: PackModule, parameter: OnnxParameter, rowScale: boolean): GraftModule | undefined {
    if (parameter.dtype === "other") {
      this.#notFolded.push({ module: module.name, why: `the weight of "${module.name}" is quantised` });
    }
    const linears = linearsOf(this.#file.model, parameter);
    if (linears instanceof NotLinear) {
      this.#notUnfolded.push({ module: module.name, why: `"${module.name}" cannot be added to: ${linears.reason}` });
      return undefined;
    }
    if (rowScale && parameter.dtype === "other") {
      const why = `"${module.name}" has DoRA tasks, which need the float weight, and the model's is quantised`;
      this.#notUnfolded.push({ module: module.name, why });
    }
    return { name: module.name, in: module.in, out: module.out, linears, factors: true, rowScale };
  }

  #choose(): { mode: Mode; reason: string } {
    const { mode = "auto" } = this.#options;
    const refuse = (obstacles: readonly Obstacle[], before: string, after: string): BaseMismatchError => {
      const more = obstacles.length > 1 ? ` (and ${obstacles.length - 1} more)` : "";
      return new BaseMismatchError(`${before}: ${obstacles[0]!.why}${more}${after}`, { module: obstacles[0]!.module });
    };
    const [unfolded, folded] = [this.#notUnfolded.length === 0, this.#notFolded.length === 0];
    if (!unfolded && !folded) {
      const neither = `; nor can they be folded: ${this.#notFolded[0]!.why}. Pass a float export of the model`;
      throw refuse(this.#notUnfolded, "no mode can bring these tasks to this model", neither);
    }
    if (mode === "folded" && !folded) throw refuse(this.#notFolded, 'mode "folded"', '; use mode "core" or "factors"');
    if (mode !== "auto" && mode !== "folded" && !unfolded)
      throw refuse(this.#notUnfolded, `mode "${mode}"`, '; use mode "folded"');
    if (mode !== "auto") return { mode, reason: "asked for" };
    if (!unfolded) return { mode: "folded", reason: this.#notUnfolded[0]!.why };
    const why = folded ? "" : `; ${this.#notFolded[0]!.why}, which rules folding out`;
    const columns = this.#pack.modules.filter((m) => m.A?.kind === "column" && m.B?.kind === "column");
    if (columns.length === 0)
      return { mode: "factors", reason: `the pack has no components that a core could go between${why}` };
    const K = Math.max(...columns.map((m) => Math.max(m.A!.tensor.rows, m.B!.tensor.rows)));
    // Up to here a run costs 5 % more at most, beyond it more than factors do (`bench switch --live`).
    const most = 48;
    if (K > most)
      return { mode: "factors", reason: `up to ${K} components a side make the core dearer than factors${why}` };
    return { mode: "core", reason: `${K} components a side at most: a switch moves the core alone${why}` };
  }

  #components(name: string): Components | undefined {
    const { A, B, in: inputs, out } = this.#pack.modules.find((m) => m.name === name)!;
    if (A?.kind !== "column" || B?.kind !== "column") return undefined;
    const [KA, KB] = [A.tensor.rows, B.tensor.rows];
    if (KA === 0 || KB === 0) return undefined;
    return {
      At: turn(readTensor(this.#bases, A.tensor), KA, inputs),
      B: readTensor(this.#bases, B.tensor).subarray(0, KB * out),
      KA,
      KB,
    };
  }

  async #matrix(parameter: OnnxParameter): Promise<Float32Array> {
    const [out, inputs] = matrixShape(parameter)!;
    const { at } = await readLinearWeight(this.#file, parameter, this.#options);
    return Float32Array.from({ length: out * inputs }, (_, i) => at(Math.floor(i / inputs), i % inputs));
  }
}

/** What a blob brings beside its low-rank terms, as the pack's directory says it (SPEC.md, section 4.3). */
export function broughtBy({ terms, parameters }: TaskBlob, modules: readonly PackModule[]): string[] {
  const named = (role: string, which: readonly TaskTerm[]): string[] =>
    which.map(({ module }) => `${role} ${modules[module]!.name}`);
  return [
    ...parameters.map(({ role, name }) => `${role} ${name}`),
    ...named(
      "magnitude",
      terms.filter((term) => term.magnitude),
    ),
    ...named(
      "private",
      terms.filter((term) => term.privateRank > 0),
    ),
  ];
}

/** "classifier" of "classifier.weight". */
export function moduleOf(parameter: string): string {
  return parameter.replace(/\.[^.]*$/, "");
}

/** [rows, columns] → [columns, rows] */
export function turn(values: Float32Array, rows: number, columns: number): Float32Array {
  const turned = new Float32Array(rows * columns);
  for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) turned[c * rows + r] = values[r * columns + c]!;
  return turned;
}

/** Whether a vector is added to the last dimension of what the node makes. */
function addsLastDimension({ node, input }: Use): boolean {
  if (node.opType === "Add") return true;
  const at = new Map([
    ["Gemm", 2],
    ["LayerNormalization", 2],
    ["MatMulNBits", 5],
  ]).get(node.opType);
  return at === input;
}

/** Of the values around a vector or table: its own, or f32 where it is stored as f16 behind a Cast. */
function typeWhereUsed({ dtype, uses, initializer }: OnnxParameter): number {
  return dtype === "f16" && uses.every(({ node, input }) => node.input[input] === initializer) ? FLOAT16 : FLOAT;
}
