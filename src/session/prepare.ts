/**
 * Makes a model ready for the tasks of a pack, before any engine has seen it. A plan says which layers get a term, which parameters tasks
 * change next to them, and whether that can be done without touching the weights; it checks that the model is the right one and changes
 * nothing. Then the graph is changed by it.
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
import { type Feed, feedsOfRows, knownSizes, plainInputs, tableRows, tinyFeeds } from "../onnx/feeds.ts";
import { type Injected, type IntegerProducts, inject } from "../onnx/inject.ts";
import {
  type AdaptedBias,
  type AdaptedHead,
  type AdaptedLayer,
  type AdaptedRows,
  type AdaptedVector,
  biasOf,
  type ComponentRows,
  type Components,
  endOf,
  type GraphChanges,
  linearsOf,
  rowsOf,
  type Site,
} from "../onnx/linear.ts";
import { asMatrix, matrixShape, type OnnxParameter } from "../onnx/modules.ts";
import { checkInjectable } from "../onnx/nodes.ts";
import type { ModelFile } from "../onnx/read.ts";
import type { WeightFile, WeightInput } from "../onnx/replaceable.ts";
import { readLinearWeight } from "../onnx/weights.ts";
import { BITS, isQuantized } from "../tensor/dtypes.ts";
import { decodeIntegers, decodeScales } from "../tensor/encode.ts";
import { transpose } from "../tensor/term.ts";
import { ModelMatcher } from "./match.ts";
import type { Mode, SessionOptions } from "./options.ts";
import type { BaseHead, BaseValues } from "./values.ts";

/** A model with the inputs of a mode. Only `modules` refer to the model's file: objects that outlive creation must not hold those. */
export interface PreparedModel extends Injected, Omit<Plan, "changes" | "folded"> {
  readonly pack: Pack;
  /** The part of the pack that is used here, and the filter that it was made by. */
  readonly view: PackView;
  readonly keep: ModuleFilter | undefined;
  /** The model's own. */
  readonly inputNames: readonly string[];
  readonly outputNames: readonly string[];
  /** The layers that get a term. Empty in mode "folded". */
  readonly modules: readonly AdaptedLayer[];
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

export interface PrepareOptions extends SessionOptions {
  /** Mode "folded": the weights that change become inputs, which an engine can take from a device. Default: false. */
  readonly foldedInputs?: boolean | undefined;
  /** Operators of the model's runtime for integers: components that are integers stay so. Default: they become floats. */
  readonly integers?: IntegerProducts | undefined;
  /** Joins cores to as few inputs as can be. Default: one for each layer, or layers with one x. */
  readonly joinCores?: boolean | undefined;
  /** Gives the graph outputs for the parity probe. Default: true. */
  readonly probeOutputs?: boolean | undefined;
}

/**
 * GraphChanges `file.model`.
 * @param bases of the pack, as `pack.bases()` gives them
 * @throws BaseMismatchError, FormatError as `planSession`
 */
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
  const known = knownSizes(file.model, own);
  const rows = rowMaker(plainInputs(own), tableRows(file.model, own), known);
  const outputNames = proto.output.map(({ name }) => name);
  let folded: PreparedModel["folded"];
  if (plan.mode === "folded") {
    const { replaceByFile, replaceByInputs } = await import("../onnx/replaceable.ts");
    folded = (options.foldedInputs ? replaceByInputs : replaceByFile)(file.model, parameters);
  }
  const sites = changes.modules.flatMap((module): readonly Pick<Site, "slice" | "joined">[] => module.sites);
  const packed = changes.biases.some(({ slice }) => slice) || sites.some(({ slice, joined }) => slice ?? joined);
  const { takeApart } = packed ? await import("../onnx/packed.ts") : {};
  const forms = new Map([
    ...changes.modules.flatMap(({ name, kind }) => (kind === "linear" ? [] : [[name, kind] as const])),
    ...changes.vectors.map(({ name }) => [name, "vector"] as const),
  ]);
  const injected = inject(
    file.model,
    { ...changes, ...takeApart?.(file.model, changes.modules, changes.biases) },
    {
      probe: options.probeOutputs,
      integers: options.integers,
      join: options.joinCores,
      forms: forms.size > 0 ? await import("../onnx/forms.ts") : undefined,
    },
  );
  return {
    ...{ ...plan, ...injected, pack, view, keep, outputNames, folded, forms },
    inputNames: own.map(({ name }) => name),
    modules: changes.modules,
    sharesRanges: graphs.some(({ node }) => node.some(({ opType }) => opType.startsWith("DynamicQuantize"))),
    feeds: tinyFeeds(own, known),
    feedsOfRows: rows,
  };
}

// Made here, by a closure that knows the little it needs: not the file.
function rowMaker(...of: Parameters<typeof feedsOfRows>): PreparedModel["feedsOfRows"] {
  return () => feedsOfRows(...of);
}

export interface Plan {
  readonly mode: Mode;
  /** Why this mode, for people. */
  readonly reason: string;
  readonly base: BaseValues;
  readonly changes: GraphChanges;
  /** The model's names of the adapted weights, by module name of the pack, and of weights that are mapped by hand. */
  readonly names: ReadonlyMap<string, string>;
  /** Modules of the pack whose weights were found by their names alone: no fingerprint was held against them. */
  readonly unconfirmed: readonly string[];
  /** Biases that the exporter has dropped and tasks bring, by the pack's names: inputs in every mode. */
  readonly dropped: readonly string[];
  /** Mode "folded": parameters that change inside the weights. */
  readonly folded: readonly OnnxParameter[];
}

/** A task that a mode cannot bring. */
interface Obstacle {
  readonly module: string;
  readonly why: string;
}

/** A linear layer that tasks bring whole, and the pack's names of its parameters. */
interface SavedHead {
  readonly layer: AdaptedHead;
  readonly weight: string;
  readonly bias: string | undefined;
  readonly parameter: OnnxParameter;
  /** Its parameters, where other tasks adapt it: an input takes the weight's place, and terms are added behind it. */
  readonly adapted: readonly OnnxParameter[] | undefined;
}

/** Parameters that tasks bring and that are neither terms nor heads. */
interface SingleParameters {
  readonly biases: readonly AdaptedBias[];
  readonly rows: readonly AdaptedRows[];
  readonly vectors: readonly AdaptedVector[];
  /** The model's parameters for all of it, but for biases that it lacks. */
  readonly parameters: readonly OnnxParameter[];
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
  const droppedBiases = new Map<string, AdaptedBias>();
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
  const layers: AdaptedLayer[] = [];
  for (const [i, module] of modules.entries()) layers.push(...(await layersOf(module, weights[i]!)));
  const choice = choose();
  const unconfirmed = await matcher.check(modules, weights, bases);
  const names = modules.map(({ name }, i) => [name, weights[i]!.name] as const);
  const isFolded = choice.mode === "folded";
  // An adapted weight is always folded: an input in its place would not get the terms of other tasks.
  const fed = isFolded ? heads.filter(({ adapted }) => !adapted) : heads;
  const { biases, rows, vectors } = singles;
  const changes: GraphChanges = {
    ...(isFolded
      ? { modules: [], biases: biasesWithoutWeight(heads, biases), rows: [], vectors: [] }
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

  /** Biases of the model's own that no weight holds. */
  function biasesWithoutWeight(heads: readonly SavedHead[], biases: readonly AdaptedBias[]): AdaptedBias[] {
    const names = [...biases.map(({ name }) => name), ...heads.map(({ adapted, bias = "" }) => (adapted ? bias : ""))];
    return names.flatMap((name) => droppedBiases.get(name) ?? []);
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
      heads.push({ layer, weight, bias, parameter, adapted: await adaptedParameters(name, bias, parameter) });
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
    name: string,
    bias: string | undefined,
    parameter: OnnxParameter,
  ): Promise<OnnxParameter[] | undefined> {
    if (weights.every((weight) => weight.name !== parameter.name)) return undefined;
    const held = bias !== undefined && !droppedBiases.has(bias);
    const biases = held ? [await matcher.parameter(bias, "saved")] : [];
    if (biases.some(({ dtype }) => dtype === "other"))
      notFolded.push({ module: name, why: `the bias of "${name}" is quantised` });
    if (scaledModules.has(name))
      notUnfolded.push({ module: name, why: `one task brings "${name}" whole, and another adapts it by DoRA` });
    return [parameter, ...biases];
  }

  /** Sorts biases, token rows and other vectors by how they can be added to. */
  async function singleParameters(heads: readonly SavedHead[]): Promise<SingleParameters> {
    const headNames = new Set(heads.flatMap(({ weight, bias }) => [weight, bias]));
    const biases = new Map<string, AdaptedBias>();
    const rows = new Map<OnnxParameter, AdaptedRows | undefined>();
    const vectors: AdaptedVector[] = [];
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

  function rowsOfTable(name: string, parameter: OnnxParameter): AdaptedRows | undefined {
    const rows = rowsOf(file.model, name, parameter);
    if (typeof rows !== "string") return rows;
    notUnfolded.push({ module: name, why: `tasks bring rows of "${name}", ${rows}` });
    return undefined;
  }

  /** The layer that a module adapts; none where nothing can be added to it. */
  async function layersOf(
    { name, in: inputs, out, layout }: PackModule,
    parameter: OnnxParameter,
  ): Promise<AdaptedLayer[]> {
    const { model } = file;
    const rowScale = scaledModules.has(name);
    const refuse = (why: string): AdaptedLayer[] => {
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

  function withComponents(layer: AdaptedLayer, mode: Mode): AdaptedLayer {
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
    const [unfoldedObstacle] = notUnfolded;
    const [foldedObstacle] = notFolded;
    const refuse = (obstacles: readonly Obstacle[], before: string, after: string): never => {
      const [{ module, why }, ...others] = obstacles as [Obstacle, ...Obstacle[]];
      const more = others.length > 0 ? ` (and ${others.length} more)` : "";
      throw new BaseMismatchError(`${before}: ${why}${more}${after}`, { module });
    };
    if (unfoldedObstacle && foldedObstacle) {
      const neither = `; nor can they be folded: ${foldedObstacle.why}. Pass a float export of the model`;
      refuse(notUnfolded, "no mode can bring these tasks to this model", neither);
    }
    if (mode === "folded" && foldedObstacle) refuse(notFolded, 'mode "folded"', '; use mode "core" or "factors"');
    if (mode !== "auto" && mode !== "folded" && unfoldedObstacle)
      refuse(notUnfolded, `mode "${mode}"`, '; use mode "folded"');
    const K = modules.flatMap((module) => {
      const { A, B } = sharedBases(module) ?? {};
      return A?.kind === "column" && B?.kind === "column" ? [A.tensor.rows, B.tensor.rows] : [];
    });
    if (mode === "core" && K.length === 0) {
      const why = "tasks share no components on both sides of a layer";
      refuse([{ module: "", why }], 'mode "core"', '; use mode "factors"');
    }
    if (mode !== "auto") return { mode, reason: "asked for" };
    if (unfoldedObstacle) return { mode: "folded", reason: unfoldedObstacle.why };
    const folding = foldedObstacle ? `; ${foldedObstacle.why}, which rules folding out` : "";
    if (K.length === 0)
      return {
        mode: "factors",
        reason: `tasks share no components on both factors of a layer: a switch hands over the rest${folding}`,
      };
    const most = Math.max(...K);
    const [chosen, why] =
      most > MOST_COMPONENTS
        ? (["factors", ", too many to mix in each run"] as const)
        : (["core", ": a switch hands over how one mixes them"] as const);
    return { mode: chosen, reason: `tasks share up to ${most} components a side${why}${folding}` };
  }

  async function baseValues(
    fed: readonly SavedHead[],
    { biases, vectors, rows }: GraphChanges,
    isFolded: boolean,
  ): Promise<Omit<BaseValues, "wanted" | "ignored">> {
    const heads = new Map<string, BaseHead>();
    for (const { layer, bias, parameter, adapted } of fed) {
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
    const { at } = await readLinearWeight(file, weight, options);
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

/** Most components for which mode "core" costs a run at most 5 %; with more, factors are faster (`bench switch --live`). */
const MOST_COMPONENTS = 48;

/**
 * Components of each side that the factors of all tasks of a module can lie over: none brings whole rows of it, and none may later.
 * @param brings roles in which tasks bring the module
 */
function componentsUnder(
  module: PackModule,
  brings: ReadonlySet<string>,
  bases: Uint8Array,
  { trainable, reserve, mode }: SessionOptions,
): AdaptedLayer["over"] {
  // Factors that are asked for where a core would do are whole ones.
  if (trainable || reserve?.privateTerms || (mode === "factors" && sharedBases(module))) return undefined;
  const side = (which: "A" | "B"): ComponentRows | undefined => {
    const K = module[which].reduce((sum, { tensor }) => sum + tensor.rows, 0);
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
 * The components of a module that a core lies between.
 * @param bases of the pack, which are read when the graph is made
 * @returns undefined for a module that no core can lie between
 */
function componentsOf(module: PackModule, bases: Uint8Array): Components | undefined {
  const { A, B } = sharedBases(module) ?? {};
  if (A?.kind !== "column" || B?.kind !== "column") return undefined;
  if (A.tensor.rows === 0 || B.tensor.rows === 0) return undefined;
  return { A: componentRows(A.tensor, bases), B: componentRows(B.tensor, bases) };
}

/** Components one below the other: integers of the widest type among theirs, floats where some are. */
function joinedRows(all: readonly ComponentRows[]): ComponentRows {
  const [first, ...others] = all as [ComponentRows, ...ComponentRows[]];
  if (others.length === 0) return first;
  const { width } = first;
  const rows = all.reduce((sum, part) => sum + part.rows, 0);
  const floats = (): Float32Array => joinedArrays(all.map((part) => part.floats()));
  const integers = all.flatMap((part) => part.integers ?? []);
  if (integers.length < all.length) return { rows, width, floats };
  return {
    ...{ rows, width, floats },
    integers: {
      bits: Math.max(...integers.map(({ bits }) => bits)) as 3 | 4 | 8,
      scales: joinedArrays(integers.map(({ scales }) => scales)),
      values: () => joinedArrays(integers.map((part) => part.values())),
    },
  };
}

function joinedArrays<T extends Float32Array | Int8Array>(parts: readonly T[]): T {
  const Typed = parts[0]!.constructor as new (length: number) => T;
  const joined = new Typed(parts.reduce((sum, { length }) => sum + length, 0));
  let at = 0;
  for (const part of parts) {
    joined.set(part, at);
    at += part.length;
  }
  return joined;
}

function componentRows(tensor: TensorRef, bases: Uint8Array): ComponentRows {
  const { dtype, rows, width } = tensor;
  const floats = (): Float32Array => readTensor(bases, tensor);
  if (!isQuantized(dtype)) return { rows, width, floats };
  const bytes = encodedTensor(bases, tensor);
  const values = (): Int8Array => decodeIntegers(dtype, bytes, rows, width);
  const integers = { bits: BITS[dtype] as 3 | 4 | 8, scales: decodeScales(bytes, rows), values };
  return { rows, width, floats, integers };
}
