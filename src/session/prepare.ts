/**
 * A model made ready for the tasks of a pack, before any engine has seen it: planned, its graph changed, its own inputs told
 * from those that carry a task.
 */

import type { Pack } from "../core/pack.ts";
import type { ModuleFilter, PackView } from "../core/part.ts";
import type { Grafted, GraftModule } from "../onnx/adapted.ts";
import type { IntegerProducts } from "../onnx/components.ts";
import { type Feed, feedsOfRows, knownSizes, plainInputs, tableRows, tinyFeeds } from "../onnx/feeds.ts";
import type { Form } from "../onnx/forms.ts";
import { graft } from "../onnx/graft.ts";
import type { OnnxParameter } from "../onnx/modules.ts";
import type { ModelFile } from "../onnx/read.ts";
import type { BaseValues, Mode } from "./base-values.ts";
import type { FoldedInput, FoldedLayout } from "./fold.ts";
import { type PlanOptions, planSession } from "./plan.ts";

/** A layer that gets a term: what is known of it without its graph. */
export type AdaptedLayer = Pick<GraftModule, "name" | "in" | "out" | "components" | "factors"> & {
  /** Where it is no linear layer. */
  readonly form?: Form["kind"] | undefined;
};

/** Holds nothing of the model's file. */
export interface PreparedModel extends Grafted {
  readonly pack: Pack;
  /** What of it is used here, and by which filter. */
  readonly view: PackView;
  readonly keep: ModuleFilter | undefined;
  readonly mode: Mode;
  /** Why this mode, for people. */
  readonly reason: string;
  /** The model's own. */
  readonly inputNames: readonly string[];
  readonly outputNames: readonly string[];
  /** The layers that get a term. Empty in mode "folded". */
  readonly modules: readonly AdaptedLayer[];
  /** Whether some layer's input is quantised by a range that all rows of a batch share. */
  readonly sharesRanges: boolean;
  /** What the model's own inputs can be fed with to see it run; undefined where they are of kinds that cannot be made up. */
  readonly feeds: ReadonlyMap<string, Feed> | undefined;
  /** The same with rows that differ, made when they are needed. */
  readonly feedsOfRows: () => ReadonlyMap<string, Feed> | undefined;
  readonly base: BaseValues;
  /** The model's names of the adapted weights, by module name of the pack. */
  readonly names: ReadonlyMap<string, string>;
  /** Modules of the pack whose weights were found by their names alone: no fingerprint was held against them. */
  readonly unconfirmed: readonly string[];
  /** Biases that the exporter has dropped and tasks bring, by the pack's names: inputs in every mode. */
  readonly dropped: readonly string[];
  /** Mode "folded": where the weights that tasks change lie in a file of their own, or which inputs they are. */
  readonly folded: FoldedLayout | readonly FoldedInput[] | undefined;
}

export interface PrepareOptions extends PlanOptions {
  /** Mode "folded": the weights that change become inputs, which an engine can take from a device. Default: false. */
  readonly foldedInputs?: boolean | undefined;
  /** How the model's runtime multiplies by integers: components that are integers stay so. Default: they become floats. */
  readonly integers?: IntegerProducts | undefined;
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
  const {
    mode,
    reason,
    base,
    names,
    unconfirmed,
    dropped,
    folded,
    graft: wanted,
  } = await planSession(file, view, bases, options);
  const { proto, initializers, scopes } = file.model.graph;
  const graphs = [...scopes.keys()];
  const own = proto.input.filter(({ name }) => !initializers.has(name));
  const [inputs, tables, known] = [plainInputs(own), tableRows(file.model, own), knownSizes(file.model, own)];
  const outputNames = proto.output.map(({ name }) => name);
  const placed = mode === "folded" ? await placeFolded(file, folded, options) : undefined;
  const packed =
    wanted.biases.some(({ slice }) => slice) ||
    wanted.modules.some(({ linears }) => linears.some(({ slice, joined }) => slice ?? joined));
  const { takeApart } = packed ? await import("../onnx/packed.ts") : {};
  const apart = takeApart?.(file.model, wanted.modules, wanted.biases);
  const hasForms = wanted.modules.some(({ form }) => form) || wanted.vectors.length > 0;
  const forms = hasForms ? await import("../onnx/graft-forms.ts") : undefined;
  const { probeOutputs: probe = true, integers } = options;
  const grafted = graft(file.model, { ...wanted, ...apart }, { probe, integers, forms });
  return {
    ...{ pack, view, keep, mode, reason, base, names, unconfirmed, dropped, outputNames, folded: placed },
    inputNames: own.map(({ name }) => name),
    ...grafted,
    modules: wanted.modules.map(({ linears, form, ...layer }) => ({ ...layer, form: form?.kind })),
    sharesRanges: graphs.some(({ node }) => node.some(({ opType }) => opType.startsWith("DynamicQuantize"))),
    feeds: tinyFeeds(own, known),
    feedsOfRows: rowMaker(inputs, tables, known),
  };
}

async function placeFolded(
  { model }: ModelFile,
  parameters: readonly OnnxParameter[],
  { foldedInputs }: PrepareOptions,
): Promise<PreparedModel["folded"]> {
  const { feedFolded, layoutFolded } = await import("./fold.ts");
  return foldedInputs ? feedFolded(model, parameters) : layoutFolded(model, parameters);
}

// Made here, by a closure that knows the little it needs: not the file.
function rowMaker(...of: Parameters<typeof feedsOfRows>): PreparedModel["feedsOfRows"] {
  return () => feedsOfRows(...of);
}
