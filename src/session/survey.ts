/**
 * Foretells without a runtime what a session on a model and a pack would be: which modules are found and where, and which modes work.
 * It plans as a session does, so that the two cannot disagree. Where a session stops at the first obstacle, this lists all of them.
 */

import type { Pack } from "../core/pack.ts";
import { type PackView, partOf } from "../core/part.ts";
import { BaseMismatchError, type EigenLoraError, FormatError } from "../errors.ts";
import { isOfModule } from "../format/format.ts";
import { fusedNode } from "../onnx/linear.ts";
import type { OnnxParameter } from "../onnx/modules.ts";
import type { ModelFile } from "../onnx/read.ts";
import { Residence } from "./group.ts";
import { ModelMatcher } from "./match.ts";
import type { Mode, SessionOptions } from "./options.ts";
import { broughtBy, planSession } from "./prepare.ts";

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

/** A parameter that tasks bring next to their terms, and is not left out. */
export interface SurveyedParameter {
  readonly name: string;
  readonly role: string;
  /** The reason why it is not found. */
  readonly why: string | null;
}

/** True if a mode works; the obstacle if not. */
export interface SurveyedMode {
  readonly works: boolean;
  readonly why: string | null;
}

export interface Survey {
  /** The mode that "auto" takes, and the reason; null where no mode works. */
  readonly mode: Mode | null;
  readonly reason: string;
  readonly opset: number;
  /** The operator that holds several layers in one, where an optimiser has fused them. */
  readonly fused: string | null;
  /** Which half of an encoder-decoder it may be. */
  readonly half: "encoder" | "decoder" | null;
  readonly modules: readonly SurveyedModule[];
  readonly parameters: readonly SurveyedParameter[];
  readonly modes: Readonly<Record<Mode, SurveyedMode>>;
  /** True if it can be made to learn, as far as can be told without a run. */
  readonly learning: SurveyedMode;
}

/** Closes the file; a plan changes nothing of it. @throws SourceError, FormatError when the pack cannot be read */
export async function surveyModel(file: ModelFile, pack: Pack, options: SessionOptions = {}): Promise<Survey> {
  let section: Awaited<ReturnType<Pack["bases"]>> | undefined;
  try {
    section = await pack.bases();
    const { bytes: bases } = section;
    const { modules } = options;
    const { model } = file;
    const view = modules === undefined ? pack : partOf(pack, modules);
    const planned = await attempt(() => planSession(file, view, bases, options));
    const plan = planned.made;
    const survey = async (mode: Mode): Promise<SurveyedMode> => {
      const { why } = await attempt(() => planSession(file, view, bases, { ...options, mode }));
      return { works: why === null, why };
    };
    const modes = { core: await survey("core"), factors: await survey("factors"), folded: await survey("folded") };
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
      fused: fusedNode(model)?.opType ?? null,
      half: halfOf(file) ?? null,
      modules: await surveyModules(file, view, bases, options),
      parameters: await surveyParameters(file, view, options),
      modes,
      learning: { works: why === null, why },
    };
  } finally {
    section?.close();
    await file.close();
  }
}

/**
 * Surveys the files of one model, an encoder and a decoder, say. @param open reads each anew
 * @returns the survey of each file with the part of the pack that lives there, or the reason why none does, and why parts live in none
 * @throws as `surveyModel`
 */
export async function surveyFiles(
  open: ReadonlyMap<string, () => Promise<ModelFile>>,
  pack: Pack,
  options: SessionOptions = {},
): Promise<{ readonly files: ReadonlyMap<string, Survey | string>; readonly unmatched: string | null }> {
  const residence = new Residence(pack, "refuse");
  const files = new Map<string, Survey | string>();
  for (const [name, read] of open) {
    const file = await read();
    const { made: modules, why } = await attempt(() =>
      residence.in(file, name, options).catch(async (error: unknown) => {
        await file.close();
        throw error;
      }),
    );
    files.set(name, why ?? (await surveyModel(file, pack, { ...options, modules })));
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
): Promise<SurveyedParameter[]> {
  const matcher = new ModelMatcher(file, options);
  const found: SurveyedParameter[] = [];
  for (const { role, name } of await broughtBy(pack, options)) {
    if (isOfModule(role) || matcher.ignores(name)) continue;
    const { why } = await attempt(async () => (await matcher.dropped(name)) ?? matcher.parameter(name, role));
    found.push({ name, role, why });
  }
  return found;
}
