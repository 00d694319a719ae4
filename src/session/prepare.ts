/**
 * Makes a model ready for the tasks of a pack, before any engine has seen it. A plan says which layers get a term,
 * which parameters tasks change next to them, and whether that can be done without touching the weights; it checks that
 * the model is the right one and changes nothing. Then the graph is changed by it.
 */

import { refuseShared } from "../core/mismatch.ts";
import type { Pack } from "../core/pack.ts";
import type { ModuleFilter, PackView } from "../core/part.ts";
import { BaseMismatchError } from "../errors.ts";
import {
  type Brought,
  bringsOf,
  encodedTensor,
  isOfModule,
  moduleOf,
  needsFactors,
  type PackModule,
  parseBrought,
  readTensor,
  sharedBases,
  type TensorRef,
} from "../format/format.ts";
import { type Feed, syntheticFeeds } from "../onnx/feeds.ts";
import { type Injected, type InjectOptions, inject } from "../onnx/inject.ts";
import type * as linear from "../onnx/linear.ts";
import { biasOf, endOf, joinedRows, linearsOf, rowsOf } from "../onnx/linear.ts";
import { asMatrix, matrixShape, type OnnxParameter } from "../onnx/modules.ts";
import { checkInjectable } from "../onnx/nodes.ts";
import type { ModelFile } from "../onnx/read.ts";
import type { WeightFile, WeightInput } from "../onnx/replaceable.ts";
import { readLinearWeight } from "../onnx/weights.ts";
import { BITS, decodeIntegers, decodeScales, isQuantized, sum } from "../tensor/dtypes.ts";
import { transpose } from "../tensor/term.ts";
import { ModelMatcher } from "./match.ts";
import type { Mode, SessionOptions } from "./options.ts";

/**
 * A model with the inputs of a mode. Only `modules` refer to the model's file: objects that outlive creation must not
 * hold those.
 */
export interface PreparedModel extends Injected, Omit<Plan, "changes" | "folded"> {
  readonly pack: Pack;
  /** The part of the pack that is used here, and the filter that it was made by. */
  readonly view: PackView;
  readonly keep: ModuleFilter | undefined;
  /** The model's own. */
  readonly inputNames: readonly string[];
  readonly outputNames: readonly string[];
  /** The layers that get a term. Empty in mode "folded". */
  readonly modules: readonly linear.AdaptedLayer[];
  /** Kinds of adapted modules and vectors that are no linear layer, by name. */
  readonly forms: ReadonlyMap<string, string>;
  /** True if some layer's input is quantised by a range that all rows of a batch share. */
  readonly sharesRanges: boolean;
  /** Synthetic values of the model's own inputs, for a run; undefined where there are none for their kinds. */
  readonly feeds: ReadonlyMap<string, Feed> | undefined;
  /** The same with rows that differ, made when they are needed. */
  readonly feedsOfRows: () => ReadonlyMap<string, Feed> | undefined;
  /** Mode "folded": the weights that tasks change, in a file of their own or as inputs. */
  readonly folded: WeightFile | readonly WeightInput[] | undefined;
}

interface PrepareOptions extends SessionOptions, Omit<InjectOptions, "forms"> {
  /** Mode "folded": the weights that change become inputs, which an engine can take from a device. Default: false. */
  readonly foldedInputs?: boolean | undefined;
}

/** Plans, and changes `file.model`. @throws BaseMismatchError, FormatError as `planSession` */
export async function prepareModel(
  file: ModelFile,
  pack: Pack,
  bases: Uint8Array,
  options: PrepareOptions = {},
): Promise<PreparedModel> {
  const keep = options.modules;
  const view = keep === undefined ? pack : (await import("../core/part.ts")).partOf(pack, keep);
  const { changes, folded: parameters, ...plan } = await planSession(file, view, bases, options);
  const { proto, initializers, scopes } = file.model.graph;
  const graphs = [...scopes.keys()];
  const own = proto.input.filter(({ name }) => !initializers.has(name));
  const feeds = syntheticFeeds(file.model, own);
  const outputNames = proto.output.map(({ name }) => name);
  let folded: PreparedModel["folded"];
  if (plan.mode === "folded") {
    const { replaceByFile, replaceByInputs } = await import("../onnx/replaceable.ts");
    folded = (options.foldedInputs ? replaceByInputs : replaceByFile)(file.model, parameters);
  }
  const sites = changes.modules.flatMap((module): readonly Pick<linear.Site, "slice" | "joined">[] => module.sites);
  const packed = changes.biases.some(({ slice }) => slice) || sites.some(({ slice, joined }) => slice ?? joined);
  const { takeApart } = packed ? await import("../onnx/packed.ts") : {};
  const forms = new Map([
    ...changes.modules.flatMap(({ name, kind }) => (kind === "linear" ? [] : [[name, kind] as const])),
    ...changes.vectors.map(({ name }) => [name, "vector"] as const),
  ]);
  const apart = { ...changes, ...takeApart?.(file.model, changes.modules, changes.biases) };
  const surgery = forms.size > 0 ? await import("../onnx/forms.ts") : undefined;
  const injected = inject(file.model, apart, { ...options, forms: surgery });
  return {
    ...{ ...plan, ...injected, ...feeds, pack, view, keep, outputNames, folded, forms },
    inputNames: own.map(({ name }) => name),
    modules: changes.modules,
    sharesRanges: graphs.some(({ node }) => node.some(({ opType }) => opType.startsWith("DynamicQuantize"))),
  };
}

export interface Plan {
  readonly mode: Mode;
  /** Why this mode, for people. */
  readonly reason: string;
  readonly base: BaseValues;
  readonly changes: linear.GraphChanges;
  /** The model's names of the adapted weights, by module name of the pack, and of weights that are mapped by hand. */
  readonly names: ReadonlyMap<string, string>;
  /** Modules of the pack whose weights were found by their names alone: no fingerprint was held against them. */
  readonly unconfirmed: readonly string[];
  /** Biases that the exporter has dropped and tasks bring, by the pack's names: inputs in every mode. */
  readonly dropped: readonly string[];
  /** Mode "folded": parameters that change inside the weights. */
  readonly folded: readonly OnnxParameter[];
}

/** A head as the base has it. */
interface BaseHead {
  /** [in, labels]. */
  readonly weight: Float32Array;
  /** [labels]. */
  readonly bias: Float32Array | undefined;
  readonly labels: number;
  /** True if other tasks adapt the layer: no task may give it another number of labels then. */
  readonly adapted: boolean;
}

/**
 * The model's own values, from which values of tasks are computed once it is loaded. Holds nothing of the graph or the
 * file.
 */
interface BaseValues {
  readonly heads: ReadonlyMap<string, BaseHead>;
  /** Values of the biases that tasks change, by the pack's name of the parameter. */
  readonly biases: ReadonlyMap<string, Float32Array>;
  /** Float weights of modules with DoRA, f32 [out, in], by module name. */
  readonly weights: ReadonlyMap<string, Float32Array>;
  /** The pack's names of embeddings, by the parameters with inputs of their own that take their rows too. */
  readonly tied: ReadonlyMap<string, string>;
  /** Parameters that tasks may bring, by the pack's names: for these the model is prepared. */
  readonly wanted: ReadonlySet<string>;
  /** Parameters of tasks that are left out. */
  readonly ignored: ReadonlySet<string>;
}

/** A task that a mode cannot bring. */
interface Obstacle {
  readonly module: string;
  readonly why: string;
}

/** A linear layer that tasks bring whole, and its weight. */
interface SavedHead {
  readonly layer: linear.AdaptedHead;
  readonly parameter: OnnxParameter;
  /** Its parameters, where other tasks adapt it: an input takes the weight's place, and terms are added behind it. */
  readonly adapted: readonly OnnxParameter[] | undefined;
}

/** The pack's name of a head's bias; undefined where tasks bring none. */
function biasName({ name, bias }: linear.AdaptedHead): string | undefined {
  return bias ? `${name}.bias` : undefined;
}

/** Parameters and modules that tasks bring in a role. */
function namesIn(brought: readonly Brought[], role: Brought["role"]): Set<string> {
  return new Set(brought.filter((entry) => entry.role === role).map(({ name }) => name));
}

/**
 * @param bases of the pack, as `pack.bases()` gives them
 * @throws BaseMismatchError when a module is missing, ambiguous, of another shape or of another model, or when the mode
 *   asked for cannot do what the tasks bring; the message names another that can
 * @throws FormatError when the model's opset is too old, or it has task inputs already
 */
export async function planSession(
  file: ModelFile,
  pack: PackView,
  bases: Uint8Array,
  options: SessionOptions,
): Promise<Plan> {
  // First: what an injection has taken out of a model would be missed by another name.
  checkInjectable(file.model);
  const matcher = new ModelMatcher(file, options);
  /** Obstacles to a task unfolded, and folded. */
  const notUnfolded: Obstacle[] = [];
  const notFolded: Obstacle[] = [];
  /** Biases that the exporter has dropped, by the pack's name. */
  const droppedBiases = new Map<string, linear.AdaptedBias>();
  const { modules } = pack;
  const weights = await matcher.weights(modules);
  const allBrought = await broughtAndReserved();
  /** Modules with DoRA tasks. */
  const scaledModules = namesIn(allBrought, "magnitude");
  const parameters = allBrought.filter(({ role }) => !isOfModule(role));
  const wanted = parameters.filter(({ name }) => !matcher.ignores(name));
  for (const { name } of wanted) {
    const bias = await matcher.dropped(name);
    if (bias) droppedBiases.set(name, bias);
  }
  const heads = await savedHeads();
  const singles = await singleParameters(heads);
  const layers: linear.AdaptedLayer[] = [];
  for (const [i, module] of modules.entries()) layers.push(...(await layersOf(module, weights[i]!)));
  const choice = choose();
  const unconfirmed = await matcher.check(modules, weights, bases);
  const names = modules.map(({ name }, i) => [name, weights[i]!.name] as const);
  const isFolded = choice.mode === "folded";
  // An adapted weight is always folded: an input in its place would not get the terms of other tasks.
  const fed = isFolded ? heads.filter(({ adapted }) => !adapted) : heads;
  const { biases, rows, vectors } = singles;
  const ofFed = new Set(fed.map(({ layer }) => biasName(layer)));
  // Folding leaves the biases that no weight of the model holds.
  const left = [...droppedBiases.values()].filter(({ name }) => !ofFed.has(name));
  const changes: linear.GraphChanges = {
    ...(isFolded
      ? { modules: [], biases: left, rows: [], vectors: [] }
      : { modules: layers.map((layer) => withComponents(layer, choice.mode)), biases, rows, vectors }),
    heads: fed.map(({ layer }) => layer),
  };
  const inWeights = [...weights, ...singles.parameters, ...heads.flatMap(({ adapted }) => adapted ?? [])];
  return {
    ...choice,
    ...{ unconfirmed, changes },
    names: new Map([...matcher.byHand(), ...names]),
    dropped: [...droppedBiases.keys()],
    folded: isFolded ? [...new Map(inWeights.map((parameter) => [parameter.name, parameter])).values()] : [],
    base: {
      ...(await baseValues(fed, changes, isFolded)),
      wanted: new Set(wanted.map(({ name }) => name)),
      ignored: new Set(parameters.map(({ name }) => name).filter((name) => matcher.ignores(name))),
    },
  };

  /** Everything that the tasks change, and the heads that are reserved. */
  async function broughtAndReserved(): Promise<Brought[]> {
    const brought = await broughtBy(pack, options);
    const reserved = [options.reserve?.head ?? []]
      .flat()
      .flatMap((head) => [`${head}.weight`, ...(matcher.has(`${head}.bias`) ? [`${head}.bias`] : [])]);
    const others = brought.filter(({ role, name }) => role !== "saved" || !reserved.includes(name));
    return [...reserved.map((name): Brought => ({ role: "saved", name })), ...others];
  }

  /** Saved linear layers: the weight and, where there is one, the bias behind it. */
  async function savedHeads(): Promise<SavedHead[]> {
    const saved = namesIn(wanted, "saved");
    const rows = namesIn(wanted, "rows");
    const heads: SavedHead[] = [];
    for (const weight of saved) {
      if (!weight.endsWith(".weight") || rows.has(weight)) continue;
      const parameter = await matcher.parameter(weight, "saved");
      const shape = matrixShape(parameter);
      const sites = linearsOf(file.model, parameter);
      if (!shape || typeof sites === "string" || sites.some(({ slice, joined }) => slice ?? joined)) continue;
      const name = moduleOf(weight);
      const bias = saved.has(`${name}.bias`) ? `${name}.bias` : undefined;
      const places = sites.map((site) => ({ site, end: bias ? endOf(file.model, site) : site.node }));
      // A bias that is added somewhere else would be added to the task's own.
      const elsewhere = places.some(({ site, end }) => site.bias === undefined && end === site.node);
      if (bias && !droppedBiases.has(bias) && elsewhere) continue;
      const layer = { name, in: shape[1], out: shape[0], bias: bias !== undefined, places };
      heads.push({ layer, parameter, adapted: await adaptedParameters(layer, parameter) });
    }
    const others = heads.filter(({ layer }) => modules.every(({ name }) => name !== layer.name));
    refuseShared(
      [...modules, ...others.map(({ layer }) => layer)],
      [...weights, ...others.map(({ parameter }) => parameter)].map(({ name }) => name),
    );
    return heads;
  }

  /** The parameters of a head that other tasks adapt; undefined where none does. */
  async function adaptedParameters(
    layer: linear.AdaptedHead,
    parameter: OnnxParameter,
  ): Promise<OnnxParameter[] | undefined> {
    const { name } = layer;
    const bias = biasName(layer);
    if (weights.every((weight) => weight.name !== parameter.name)) return undefined;
    const held = bias !== undefined && !droppedBiases.has(bias);
    const biases = held ? [await matcher.parameter(bias, "saved")] : [];
    if (biases.some(({ dtype }) => dtype === "other"))
      notFolded.push({ module: name, why: `the bias of "${name}" is quantised` });
    if (scaledModules.has(name))
      notUnfolded.push({ module: name, why: `one task brings "${name}" whole, and another adapts it by DoRA` });
    return [parameter, ...biases];
  }

  /**
   * Parameters that are neither terms nor heads, by how they can be added to; `parameters` are those that the model
   * has.
   */
  async function singleParameters(heads: readonly SavedHead[]) {
    const headNames = new Set(heads.flatMap(({ layer }) => [`${layer.name}.weight`, biasName(layer)]));
    const biases = new Map<string, linear.AdaptedBias>();
    const rows = new Map<OnnxParameter, linear.AdaptedRows | undefined>();
    const vectors: linear.AdaptedVector[] = [];
    const parameters: OnnxParameter[] = [];
    for (const { role, name } of wanted) {
      if (headNames.has(name)) continue;
      const dropped = droppedBiases.get(name);
      if (dropped) {
        biases.set(name, dropped);
        continue;
      }
      const parameter = await matcher.parameter(name, role);
      parameters.push(parameter);
      checkFoldable(name, `"${name}"`, parameter);
      if (role === "rows") {
        rows.set(parameter, rowsOfTable(name, parameter));
        continue;
      }
      const quantised = parameter.dtype === "other";
      const isBias = !quantised && (role !== "saved" || name.endsWith(".bias"));
      const bias = isBias ? biasOf(file.model, name, parameter) : undefined;
      const vector = bias ? undefined : (await import("../onnx/forms.ts")).vectorOf(file.model, name, parameter);
      const why = quantised ? "which is quantised here" : "no linear layer's head, bias or weight of a normalisation";
      if (bias) biases.set(name, bias);
      else if (vector) vectors.push(vector);
      else notUnfolded.push({ module: name, why: `tasks bring "${name}" (${role}), ${why}` });
    }
    for (const [table, found] of [...rows]) {
      if (table.layout !== "embedding") continue;
      const name = found?.name ?? "";
      for (const tied of await matcher.tiedTo(table)) {
        const own = rows.has(tied) ? rows.get(tied) : rowsOfTable(tied.name, tied);
        if (!rows.has(tied)) checkFoldable(name, `"${tied.name}", which is tied to "${name}",`, tied);
        rows.set(tied, own && { ...own, follows: name });
        parameters.push(tied);
        const why = `tasks bring rows of "${name}", which "${tied.name}" is tied to, and others bring that whole`;
        if (heads.some(({ parameter }) => parameter.name === tied.name)) notUnfolded.push({ module: name, why });
      }
    }
    return {
      biases: [...biases.values()],
      rows: [...rows.values()].flatMap((table) => table ?? []),
      vectors,
      parameters,
    };
  }

  function rowsOfTable(name: string, parameter: OnnxParameter): linear.AdaptedRows | undefined {
    const rows = rowsOf(file.model, name, parameter);
    if (typeof rows !== "string") return rows;
    notUnfolded.push({ module: name, why: `tasks bring rows of "${name}", ${rows}` });
    return undefined;
  }

  /** The layer that a module adapts; none where nothing can be added to it. */
  async function layersOf(
    { name, in: inputs, out, layout }: PackModule,
    parameter: OnnxParameter,
  ): Promise<linear.AdaptedLayer[]> {
    const { model } = file;
    const rowScale = scaledModules.has(name);
    const refuse = (why: string): linear.AdaptedLayer[] => {
      notUnfolded.push({ module: name, why });
      return [];
    };
    checkFoldable(name, `the weight of "${name}"`, parameter);
    if (rowScale && parameter.dtype === "other")
      refuse(`"${name}" has DoRA tasks, which need the float weight, and the model's is quantised`);
    const layer = { name, in: inputs, out, factors: true, rowScale };
    const sites = linearsOf(model, parameter);
    if (typeof sites !== "string") {
      const biased = rowScale ? sites.filter(({ bias }) => bias !== undefined) : [];
      if (biased.length > 0 && (parameter.slice ?? parameter.joined))
        return refuse(`"${name}" has DoRA tasks, and its layer is packed or divided together with its bias`);
      if (biased.some(({ node }) => node.opType !== "Gemm"))
        return refuse(`"${name}" has DoRA tasks, and its layer's result is quantised together with its bias`);
      return [{ ...layer, kind: "linear", sites }];
    }
    const isForm = layout === "conv" || layout === "embedding";
    const form = isForm ? (await import("../onnx/forms.ts")).formOf(model, parameter) : sites;
    if (typeof form === "string") return refuse(`"${name}" cannot be added to: ${form}`);
    if (rowScale && form.sites.some(({ product, node }) => product !== node))
      return refuse(`"${name}" has DoRA tasks, and what its layer makes is quantised`);
    return [{ ...layer, ...form }];
  }

  function withComponents(layer: linear.AdaptedLayer, mode: Mode): linear.AdaptedLayer {
    const module = modules.find(({ name }) => name === layer.name)!;
    const brings = new Set(allBrought.flatMap(({ role, name }) => (name === layer.name ? role : [])));
    const components = mode === "core" ? componentsOf(module, bases) : undefined;
    const { privateTerms: reserved = false } = options.reserve ?? {};
    if (components) {
      const factors = reserved || [...brings].some(needsFactors);
      const expands = reserved || brings.has("own-A") || brings.has("own-B");
      return { ...layer, components, factors, expands };
    }
    const over = layer.kind !== "linear" ? undefined : componentsUnder(module, brings, bases, options);
    // Components that no coefficients stand for.
    const expands = (module.A.length > 0 && !over?.A) || (module.B.length > 0 && !over?.B);
    return { ...layer, over, expands };
  }

  function checkFoldable(module: string, what: string, { dtype, copies, joined }: OnnxParameter): void {
    if (joined) {
      for (const part of joined) checkFoldable(module, `${what}, as "${part.name}",`, part);
      if (new Set(joined.map(({ layout }) => layout)).size > 1)
        notFolded.push({ module, why: `${what} is divided into parts that lie in different ways` });
      return;
    }
    const other = copies.find((copy) => copy.dtype !== dtype);
    if (dtype === "other" || other?.dtype === "other") notFolded.push({ module, why: `${what} is quantised` });
    else if (other) notFolded.push({ module, why: `${what} is there in ${dtype} and in ${other.dtype}` });
  }

  function choose(): { mode: Mode; reason: string } {
    const { mode = "auto" } = options;
    const [inGraph] = notUnfolded;
    const [inWeights] = notFolded;
    const refuse = (what: string, obstacles: readonly Obstacle[], advice: string): never => {
      const [{ module, why }, ...others] = obstacles as [Obstacle, ...Obstacle[]];
      const more = others.length > 0 ? ` (and ${others.length} more)` : "";
      throw new BaseMismatchError(`${what}: ${why}${more}; ${advice}`, { module });
    };
    if (inGraph && inWeights) {
      const neither = `nor can they be folded: ${inWeights.why}. Pass a float export of the model`;
      refuse("no mode can bring these tasks to this model", notUnfolded, neither);
    }
    if (mode === "folded" && inWeights) refuse('mode "folded"', notFolded, 'use mode "core" or "factors"');
    if (mode !== "auto" && mode !== "folded" && inGraph) refuse(`mode "${mode}"`, notUnfolded, 'use mode "folded"');
    const K = modules.flatMap((module) => {
      const { A, B } = sharedBases(module) ?? {};
      return A?.kind === "column" && B?.kind === "column" ? [A.tensor.rows, B.tensor.rows] : [];
    });
    if (mode === "core" && K.length === 0) {
      const why = "tasks share no components on both sides of a layer";
      refuse('mode "core"', [{ module: "", why }], 'use mode "factors"');
    }
    if (mode !== "auto") return { mode, reason: "asked for" };
    if (inGraph) return { mode: "folded", reason: inGraph.why };
    const folding = inWeights ? `; ${inWeights.why}, which rules folding out` : "";
    const none = "tasks share no components on both factors of a layer: a switch hands over the rest";
    if (K.length === 0) return { mode: "factors", reason: none + folding };
    const most = Math.max(...K);
    const shared = `tasks share up to ${most} components a side`;
    return most > MOST_COMPONENTS
      ? { mode: "factors", reason: `${shared}, too many to mix in each run${folding}` }
      : { mode: "core", reason: `${shared}: a switch hands over how one mixes them${folding}` };
  }

  async function baseValues(
    fed: readonly SavedHead[],
    { biases, vectors, rows }: linear.GraphChanges,
    isFolded: boolean,
  ): Promise<Omit<BaseValues, "wanted" | "ignored">> {
    const heads = new Map<string, BaseHead>();
    for (const { layer, parameter, adapted } of fed) {
      const bias = biasName(layer);
      heads.set(layer.name, {
        weight: transpose(await matrixValues(parameter), layer.out, layer.in),
        bias: bias === undefined ? undefined : await vectorValues(bias, "saved", layer.out),
        labels: layer.out,
        adapted: adapted !== undefined,
      });
    }
    const values = new Map<string, Float32Array>();
    for (const { name, size } of [...biases, ...vectors]) values.set(name, await vectorValues(name, "bias", size));
    const matrices = new Map<string, Float32Array>();
    for (const [i, { name }] of modules.entries())
      if (scaledModules.has(name) && !isFolded) matrices.set(name, await matrixValues(weights[i]!));
    const tied = rows.flatMap(({ name, follows }) => (follows === undefined ? [] : [[name, follows] as const]));
    return { heads, biases: values, weights: matrices, tied: new Map(tied) };
  }

  async function vectorValues(name: string, role: string, size: number): Promise<Float32Array> {
    if (droppedBiases.has(name)) return new Float32Array(size);
    const { readVector } = await import("../onnx/dequantize.ts");
    return readVector(file, await matcher.parameter(name, role), options);
  }

  async function matrixValues(parameter: OnnxParameter): Promise<Float32Array> {
    const weight = asMatrix(parameter);
    const [out, inputs] = matrixShape(weight)!;
    const at = await readLinearWeight(file, weight, options);
    return Float32Array.from({ length: out * inputs }, (_, i) => at(Math.floor(i / inputs), i % inputs));
  }
}

/** Parameters that the tasks of a pack change next to their terms, each once. */
export async function broughtBy(pack: PackView, options: SessionOptions): Promise<Brought[]> {
  const all = new Set<string>();
  for (const { id, brings } of pack.tasks.values())
    for (const entry of brings ?? bringsOf(await pack.load(id, options), pack.modules)) all.add(entry);
  return [...all].map(parseBrought);
}

// A pack's components as a graph takes them.

/**
 * Most components for which mode "core" costs a run at most 5 %; with more, factors are faster (`bench switch --live`).
 */
const MOST_COMPONENTS = 48;

/**
 * Components of each side that the factors of all tasks of a module can lie over: none brings whole rows of it, and
 * none may later.
 */
function componentsUnder(
  module: PackModule,
  brings: ReadonlySet<string>,
  bases: Uint8Array,
  { trainable, reserve, mode }: SessionOptions,
): linear.AdaptedLayer["over"] {
  // Factors that are asked for where a core would do are whole ones.
  if (trainable || reserve?.privateTerms || (mode === "factors" && sharedBases(module))) return undefined;
  const side = (which: "A" | "B"): linear.ComponentRows | undefined => {
    const K = sum(module[which], ({ tensor }) => tensor.rows);
    const isWhole = brings.has("private") || brings.has(`own-${which}`);
    if (isWhole || K === 0 || K > MOST_COMPONENTS || module[which].some(({ kind }) => kind === "flat"))
      return undefined;
    return joinedRows(module[which].map(({ tensor }) => componentRows(tensor, bases)));
  };
  const A = side("A");
  const B = side("B");
  return A || B ? { ...(A && { A }), ...(B && { B }) } : undefined;
}

/**
 * The components of a module that a core lies between; undefined where none can. Bytes are read when the graph is made.
 */
function componentsOf(module: PackModule, bases: Uint8Array): linear.Components | undefined {
  const { A, B } = sharedBases(module) ?? {};
  if (A?.kind !== "column" || B?.kind !== "column") return undefined;
  if (A.tensor.rows === 0 || B.tensor.rows === 0) return undefined;
  return { A: componentRows(A.tensor, bases), B: componentRows(B.tensor, bases) };
}

function componentRows(tensor: TensorRef, bases: Uint8Array): linear.ComponentRows {
  const { dtype, rows, width } = tensor;
  const floats = (): Float32Array => readTensor(bases, tensor);
  if (!isQuantized(dtype)) return { rows, width, floats };
  const bytes = encodedTensor(bases, tensor);
  const values = (): Int8Array => decodeIntegers(dtype, bytes, rows, width);
  const integers = { bits: BITS[dtype] as 3 | 4 | 8, scales: decodeScales(bytes, rows), values };
  return { rows, width, floats, integers };
}
