/**
 * A model made ready for the tasks of a pack, before any engine has seen it: planned, its graph changed, its own inputs told
 * from those that carry a task.
 */

import type { Pack } from "../core/pack.ts";
import type { ModuleFilter, PackView } from "../core/part.ts";
import type { AdaptedLayer, Grafted } from "../onnx/adapted.ts";
import type { IntegerProducts } from "../onnx/components.ts";
import { type Feed, feedsOfRows, knownSizes, plainInputs, tableRows, tinyFeeds } from "../onnx/feeds.ts";
import { graft } from "../onnx/graft.ts";
import type { ModelFile } from "../onnx/read.ts";
import type { WeightFile, WeightInput } from "../onnx/replaceable.ts";
import type { SessionOptions } from "./options.ts";
import { type Plan, planSession } from "./plan.ts";

/** A model with the inputs of a mode. Only `modules` refer to the model's file: objects that outlive creation must not hold those. */
export interface PreparedModel extends Grafted, Omit<Plan, "graft" | "folded"> {
  readonly pack: Pack;
  /** The part of the pack that is used here, and the filter that it was made by. */
  readonly view: PackView;
  readonly keep: ModuleFilter | undefined;
  /** The model's own. */
  readonly inputNames: readonly string[];
  readonly outputNames: readonly string[];
  /** The layers that get a term. Empty in mode "folded". */
  readonly modules: readonly AdaptedLayer[];
  /** Whether some layer's input is quantised by a range that all rows of a batch share. */
  readonly sharesRanges: boolean;
  /** Made-up values of the model's own inputs, for a run; undefined where they are of kinds that cannot be made up. */
  readonly feeds: ReadonlyMap<string, Feed> | undefined;
  /** The same with rows that differ, made when they are needed. */
  readonly feedsOfRows: () => ReadonlyMap<string, Feed> | undefined;
  /** Mode "folded": the weights that tasks change, in a file of their own or as inputs. */
  readonly folded: WeightFile | readonly WeightInput[] | undefined;
}

export interface PrepareOptions extends SessionOptions {
  /** Mode "folded": the weights that change become inputs, which an engine can take from a device. Default: false. */
  readonly foldedInputs?: boolean | undefined;
  /** How the model's runtime multiplies by integers: components that are integers stay so. Default: they become floats. */
  readonly integers?: IntegerProducts | undefined;
  /** Whether cores come in as few inputs as can be. Default: one for each layer, or layers with one x. */
  readonly joinCores?: boolean | undefined;
  /** Whether the graph gets outputs for the parity probe. Default: true. */
  readonly probeOutputs?: boolean | undefined;
}

/**
 * Changes `file.model`.
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
  const { graft: wanted, folded: parameters, ...plan } = await planSession(file, view, bases, options);
  const { proto, initializers, scopes } = file.model.graph;
  const graphs = [...scopes.keys()];
  const own = proto.input.filter(({ name }) => !initializers.has(name));
  const [inputs, tables, known] = [plainInputs(own), tableRows(file.model, own), knownSizes(file.model, own)];
  const outputNames = proto.output.map(({ name }) => name);
  let folded: PreparedModel["folded"];
  if (plan.mode === "folded") {
    const { replaceByFile, replaceByInputs } = await import("../onnx/replaceable.ts");
    folded = (options.foldedInputs ? replaceByInputs : replaceByFile)(file.model, parameters);
  }
  const packed =
    wanted.biases.some(({ slice }) => slice) ||
    wanted.modules.some(({ linears }) => linears.some(({ slice, joined }) => slice ?? joined));
  const { takeApart } = packed ? await import("../onnx/packed.ts") : {};
  const apart = takeApart?.(file.model, wanted.modules, wanted.biases);
  const hasForms = wanted.modules.some(({ form }) => form) || wanted.vectors.length > 0;
  const forms = hasForms ? await import("../onnx/graft-forms.ts") : undefined;
  const { probeOutputs: probe = true, integers, joinCores: join } = options;
  const grafted = graft(file.model, { ...wanted, ...apart }, { probe, integers, forms, join });
  return {
    ...{ ...plan, ...grafted, pack, view, keep, outputNames, folded },
    inputNames: own.map(({ name }) => name),
    modules: wanted.modules,
    sharesRanges: graphs.some(({ node }) => node.some(({ opType }) => opType.startsWith("DynamicQuantize"))),
    feeds: tinyFeeds(own, known),
    feedsOfRows: rowMaker(inputs, tables, known),
  };
}

// Made here, by a closure that knows the little it needs: not the file.
function rowMaker(...of: Parameters<typeof feedsOfRows>): PreparedModel["feedsOfRows"] {
  return () => feedsOfRows(...of);
}
