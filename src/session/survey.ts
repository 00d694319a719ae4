/**
 * Foretells without a runtime what a session on a model and a pack would be: which modules are found and where, what each mode does and costs.
 * Made by the same planning and surgery as a session, so that the two cannot disagree. Where a session stops at the first thing
 * that is wrong, this goes on and tells all.
 */

import type { Pack, TaskInfo } from "../core/pack.ts";
import { type PackView, partOf } from "../core/part.ts";
import { createUnfolding, SessionRuntime } from "../core/session-runtime.ts";
import { BaseMismatchError, type EigenLoraError, FormatError } from "../errors.ts";
import { isOfModule } from "../format/format.ts";
import { fusedNode } from "../onnx/linear.ts";
import { nestedGraphs } from "../onnx/model.ts";
import type { OnnxParameter } from "../onnx/modules.ts";
import type { GraphProto } from "../onnx/protobuf.ts";
import type { ModelFile } from "../onnx/read.ts";
import { Residence } from "./group.ts";
import { ModelMatcher } from "./match.ts";
import type { Mode, SessionOptions } from "./options.ts";
import { broughtBy, type Plan, type PreparedModel, planSession, prepareModel } from "./prepare.ts";
import { stackValues, TaskEvaluator } from "./values.ts";

export interface SurveyedModule {
  readonly module: string;
  /** The model's name of its weight; null where it is not found or does not fit. */
  readonly weight: string | null;
  /** The initializer that holds it, and its type there: "quantised" for integers. */
  readonly initializer: string | null;
  readonly type: string | null;
  readonly nodes: readonly string[];
  /** True if the pack's fingerprint is the weight's. Null: there is none, or it was not asked for. */
  readonly confirmed: boolean | null;
  /** The fault, if there is one. */
  readonly why: string | null;
  readonly misfit: boolean;
  /** Names in the model that are like it. */
  readonly candidates: readonly string[];
}

/** A parameter that tasks bring next to their terms. */
export interface SurveyedParameter {
  readonly name: string;
  readonly role: string;
  /** "input": a run is fed with it; "folded": it is written into the weights; "found", where no mode works. */
  readonly becomes: "input" | "folded" | "found" | "ignored" | "missing";
  /** True if the exporter has dropped it, since it was zero. */
  readonly dropped: boolean;
  readonly why: string | null;
}

/** A mode that works, and what it costs. */
export interface SurveyedMode {
  readonly works: boolean;
  readonly why: string | null;
  /** Nodes and inputs that a session adds to the model. */
  readonly nodes: number;
  readonly inputs: number;
  /** Bytes of the components: inside the model (core), or held to expand (factors) or fold from (folded). */
  readonly componentBytes: number;
  /** Bytes of the model's file that are kept to fold from. */
  readonly pristineBytes: number;
  /** Bytes that a run is fed with for the largest task. */
  readonly fedBytes: number;
  /** Bytes of weights that a switch writes. */
  readonly writtenBytes: number;
}

export interface Survey {
  /** The mode that "auto" takes, and the reason; null where no mode works. */
  readonly mode: Mode | null;
  readonly reason: string;
  readonly opset: number;
  readonly nodes: number;
  /** The operator that holds several layers in one, where an optimiser has fused them. */
  readonly fused: string | null;
  /** Which half of an encoder-decoder it may be. */
  readonly half: "encoder" | "decoder" | null;
  readonly modules: readonly SurveyedModule[];
  readonly parameters: readonly SurveyedParameter[];
  readonly modes: Readonly<Record<Mode, SurveyedMode>>;
  /** True if it can be made to learn, as far as can be told without a run. */
  readonly learning: { readonly works: boolean; readonly why: string | null };
  /** Bytes of the largest task's coefficients. */
  readonly largestTask: number;
}

export interface FilesSurvey {
  /** The survey of each file with the part of the pack that lives there, by name; a reason where none does. */
  readonly files: ReadonlyMap<string, Survey | string>;
  /** The reason for parts of the pack that live in none of them. */
  readonly unmatched: string | null;
}

const NO_COST = { nodes: 0, inputs: 0, componentBytes: 0, pristineBytes: 0, fedBytes: 0, writtenBytes: 0 };

/**
 * @param open reads the model anew each time: surgery changes it
 * @throws SourceError, FormatError when model or pack cannot be read
 */
export async function surveyModel(
  open: () => Promise<ModelFile>,
  pack: Pack,
  options: SessionOptions = {},
): Promise<Survey> {
  const file = await open();
  const section = await pack.bases().catch(async (error: unknown) => {
    await file.close();
    throw error;
  });
  try {
    const [{ bytes: bases }, { modules }, { model }] = [section, options, file];
    const view = modules === undefined ? pack : partOf(pack, modules);
    // A plan changes nothing.
    const planned = await attempt(() => planSession(file, view, bases, options));
    const plan = planned.made;
    const task = [...pack.tasks.values()].reduce<TaskInfo | undefined>(
      (most, one) => (one.bytes > (most?.bytes ?? 0) ? one : most),
      undefined,
    );
    const mode = (one: Mode) => surveyMode(open, pack, bases, { ...options, mode: one }, task?.id ?? null);
    const modes = { core: await mode("core"), factors: await mode("factors"), folded: await mode("folded") };
    const both = [...(plan?.base.heads ?? [])].find(([, { adapted }]) => adapted)?.[0];
    const { halfOf, refuseParts } = await import("./training.ts");
    const parts = await attempt(async () => refuseParts(file, pack, modules));
    const form = plan?.changes.modules.find(({ kind }) => kind !== "linear");
    const why =
      parts.why ??
      (both === undefined ? modes.factors.why : `tasks bring "${both}" whole and others adapt it`) ??
      (form ? `"${form.name}" is no linear layer (${form.kind})` : null);
    return {
      mode: plan?.mode ?? null,
      reason: plan?.reason ?? planned.why!,
      opset: model.opset,
      nodes: nodesOf(model.graph.proto),
      fused: fusedNode(model)?.opType ?? null,
      half: halfOf(file) ?? null,
      modules: await surveyModules(file, view, bases, options),
      parameters: await surveyParameters(file, view, options, plan),
      modes,
      learning: { works: why === null, why },
      largestTask: task?.bytes ?? 0,
    };
  } finally {
    section.close();
    await file.close();
  }
}

/**
 * The same of the files of one model, an encoder and a decoder, say.
 * @param open reads each anew, as above, by names of your own
 * @throws as `surveyModel`
 */
export async function surveyFiles(
  open: ReadonlyMap<string, () => Promise<ModelFile>>,
  pack: Pack,
  options: SessionOptions = {},
): Promise<FilesSurvey> {
  const residence = new Residence(pack, "refuse");
  const files = new Map<string, Survey | string>();
  for (const [name, read] of open) {
    const file = await read();
    const { made: modules, why } = await attempt(() => residence.in(file, name, options).finally(() => file.close()));
    files.set(name, why ?? (await surveyModel(read, pack, { ...options, modules })));
  }
  const { why: unmatched } = await attempt(async () => residence.refuseUnmatched());
  return { files, unmatched };
}

/** Makes something, or gives the reason why it is refused. */
async function attempt<T>(make: () => Promise<T>): Promise<{ made?: T; why: string | null; error?: EigenLoraError }> {
  try {
    return { made: await make(), why: null };
  } catch (error) {
    if (!(error instanceof BaseMismatchError || error instanceof FormatError)) throw error;
    return { why: error.message, error };
  }
}

/** Each by itself, so that one that is missing hides no other. */
async function surveyModules(
  file: ModelFile,
  pack: PackView,
  bases: Uint8Array,
  options: SessionOptions,
): Promise<SurveyedModule[]> {
  const matcher = new ModelMatcher(file, options);
  const found: SurveyedModule[] = [];
  for (const module of pack.modules) {
    const { made, why, error } = await attempt(() => matcher.weights([module]));
    const [weight] = made ?? [];
    const checked =
      weight && options.anyBase !== true ? await attempt(() => matcher.confirms(module, weight, bases)) : undefined;
    found.push({
      module: module.name,
      weight: weight?.name ?? null,
      initializer: weight?.initializer ?? null,
      type: weight ? (weight.dtype === "other" ? "quantised" : weight.dtype) : null,
      nodes: weight ? nodesThatUse(weight) : [],
      confirmed: checked?.made === true ? true : checked?.why ? false : null,
      why: why ?? checked?.why ?? null,
      misfit: error instanceof BaseMismatchError && error.expected !== undefined,
      candidates: error instanceof BaseMismatchError ? (error.candidates ?? []) : [],
    });
  }
  return found;
}

function nodesThatUse({ uses, copies }: OnnxParameter): string[] {
  const all = [uses, ...copies.map((copy) => copy.uses)].flat();
  return [...new Set(all.map(({ node }) => node.name || `${node.opType} of ${node.output[0]}`))];
}

async function surveyParameters(
  file: ModelFile,
  pack: PackView,
  options: SessionOptions,
  plan: Plan | undefined,
): Promise<SurveyedParameter[]> {
  const matcher = new ModelMatcher(file, options);
  const { heads = [], biases = [], rows = [], vectors = [] } = plan?.changes ?? {};
  const fed = new Set([
    ...heads.flatMap(({ name }) => [`${name}.weight`, `${name}.bias`]),
    ...[...biases, ...rows, ...vectors].map(({ name }) => name),
  ]);
  const found: SurveyedParameter[] = [];
  for (const { role, name } of await broughtBy(pack, options)) {
    if (isOfModule(role)) continue;
    const ignored = matcher.ignores(name);
    const looked = ignored
      ? undefined
      : await attempt(async () => {
          const dropped = (await matcher.dropped(name)) !== undefined;
          if (!dropped) await matcher.parameter(name, role);
          return dropped;
        });
    const there = plan ? (fed.has(name) ? "input" : "folded") : "found";
    const becomes = ignored ? "ignored" : looked?.why ? "missing" : there;
    found.push({ name, role, becomes, dropped: looked?.made === true, why: looked?.why ?? null });
  }
  return found;
}

/** @param task the one that is fed */
async function surveyMode(
  open: () => Promise<ModelFile>,
  pack: Pack,
  bases: Uint8Array,
  options: SessionOptions & { mode: Mode },
  task: string | null,
): Promise<SurveyedMode> {
  const file = await open();
  try {
    const main = file.model.graph.proto;
    const before = nodesOf(main);
    // Heads that are replaced, and what dies with them, go; and so the count may fall.
    const { made: prepared, why } = await attempt(() =>
      prepareModel(file, pack, bases, { ...options, probeOutputs: false }),
    );
    if (!prepared) return { works: false, why, ...NO_COST };
    const { folded, initializers, inputs } = prepared;
    const own = folded && "places" in folded ? folded.byteLength : 0;
    const inside = initializers.reduce((sum, { data }) => sum + data.byteLength, 0);
    return {
      works: true,
      why: null,
      nodes: nodesOf(main) - before,
      inputs: inputs.length,
      componentBytes: options.mode === "core" ? inside : bases.length,
      pristineBytes: folded ? file.bytes.length : 0,
      fedBytes: await fedBytes(prepared, bases, task),
      writtenBytes: own,
    };
  } finally {
    await file.close();
  }
}

async function fedBytes(prepared: PreparedModel, bases: Uint8Array, task: string | null): Promise<number> {
  const { view, mode, base } = prepared;
  const runtime = mode === "folded" ? new SessionRuntime(view, base) : await createUnfolding(view, mode, bases, base);
  try {
    const values = await new TaskEvaluator(prepared, runtime).read(task);
    const sizes = prepared.inputs.map((input) => stackValues(input, [values.inputs.get(input.name)!]).data.byteLength);
    return sizes.reduce((a, b) => a + b, 0);
  } finally {
    await runtime.close();
  }
}

/** Those of nested graphs too. */
function nodesOf(graph: GraphProto): number {
  return graph.node.reduce((sum, node) => sum + nestedGraphs(node).reduce((a, one) => a + nodesOf(one), 1), 0);
}
