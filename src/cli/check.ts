/**
 * The command check: whether a pack works on a model, which modes do, what a session costs, and what to do where it
 * does not. It plans as a session does, and lists all obstacles; where onnxruntime-node is installed it makes one, too,
 * and runs it.
 */
import { basename, extname } from "node:path";
import { createEigenSession, createEigenSessions } from "../../bindings/onnxruntime.ts";
import type { Ort } from "../../bindings/ort-engine.ts";
import type { Pack } from "../core/pack.ts";
import { type PackView, partOf } from "../core/part.ts";
import { BaseMismatchError, type EigenLoraError, FormatError } from "../errors.ts";
import { isOfModule } from "../format/format.ts";
import { fusedNode } from "../onnx/linear.ts";
import type { OnnxParameter } from "../onnx/modules.ts";
import { type ModelFile, readModel } from "../onnx/read.ts";
import { Residence } from "../session/group.ts";
import { ModelMatcher } from "../session/match.ts";
import type { Mode, SessionOptions } from "../session/options.ts";
import { broughtBy, planSession } from "../session/prepare.ts";
import { type Attach, command } from "./command.ts";
import { openRuntime, WITHOUT_NUGET } from "./model.ts";
import { inFlags, list, match, refuseUnknown, toggle, UsageError } from "./options.ts";
import { bytes, count, table, warnOfNames } from "./output.ts";

const OPTIONS = {
  ...match,
  beside: {
    ...list("OTHER.onnx", "Another file of the same model: the decoder of an encoder, a text encoder of a UNet."),
    reads: "model" as const,
  },
  filesOnly: toggle("Look at the files only, even if onnxruntime-node is installed."),
};

export const check: Attach = command({
  usage: "check <MODEL.onnx> <PACK>",
  details:
    "Exit code 0 if a session works. If onnxruntime-node is installed, a session is made and run on synthetic inputs.",
  example: "check model.onnx tasks.eigen",
  options: OPTIONS,
  reads: ["model", "file"],
  async run([modelPath, packPath]: [string, string], { filesOnly, beside, ...options }, run, out) {
    const pack = await run.pack(packPath);
    refuseUnknown(options.names, pack.modules, packPath);
    const models = namesOf([modelPath, ...beside]);
    const shown = new Map([...models].map(([name, path]) => [name, run.shown(path)]));
    const isAlone = models.size === 1;
    const { files, lost } = await survey(models, pack, options);
    const stopped = files.flatMap(([name, found]) => {
      if (typeof found === "string") return found;
      return found.mode === null ? `${isAlone ? "" : `${name}: `}${found.reason}` : [];
    });
    const surveyed = files.flatMap(([, found]) => (typeof found === "string" ? [] : found.modules));
    const unconfirmed = surveyed.filter(({ weight, confirmed }) => weight !== null && confirmed === null);
    warnOfNames(
      options.names,
      unconfirmed.map(({ module }) => module),
      out,
    );
    const planned = lost ?? stopped[0];
    const isRun = !filesOnly && planned === undefined;
    const ran = isRun ? inWords(await tryOut(models, pack, options)) : null;
    const why = planned ?? (ran?.session.works === false ? ran.session.says : undefined);
    const works = why === undefined;
    const next = works ? callOf(shown, packPath, options) : await adviceOf(files, lost, ran, pack);
    const [[name, only]] = files as [[string, Survey]];
    const largest = Math.max(0, ...[...pack.tasks.values()].map((task) => task.bytes));
    const about = isAlone
      ? { model: shown.get(name), ...only }
      : { models: Object.fromEntries(shown), files: Object.fromEntries(files) };
    return {
      json: { ...about, pack: packPath, works, run: ran, next },
      text: [
        `${packPath}: ${count(pack.tasks.size, "task")}, ${count(pack.modules.length, "module")}, ${bytes(largest)} a task at most`,
        ...files.flatMap(([name, found]) => fileText(shown.get(name)!, found)),
        "",
        ...(isRun ? runText(ran) : []),
        works ? `It works${isAlone ? `, in mode "${only.mode}" (${only.reason})` : ""}.` : `It does not work: ${why}`,
        `Next: ${next}`,
      ],
      exitCode: works ? 0 : 1,
    };
  },
});

type CheckOptions = Omit<SessionOptions, "probe">;

type Surveyed = readonly [name: string, survey: Survey | string];

/**
 * Files by name without the ending; by path where two names are alike.
 * @throws UsageError for one that is given twice
 */
function namesOf(paths: readonly string[]): Map<string, string> {
  const twice = paths.find((path, i) => paths.indexOf(path) < i);
  if (twice !== undefined) throw new UsageError(`--beside ${twice}: this file is given twice`);
  const names = paths.map((path) => basename(path, extname(path)));
  const alike = new Set(names).size < names.length;
  return new Map(paths.map((path, i) => [alike ? path : names[i]!, path]));
}

/** @returns `lost`: parts of the pack that live in no file, and why */
async function survey(
  models: ReadonlyMap<string, string>,
  pack: Pack,
  options: CheckOptions,
): Promise<{ files: Surveyed[]; lost: string | undefined }> {
  const residence = models.size > 1 ? new Residence(pack, "refuse") : undefined;
  const files: Surveyed[] = [];
  for (const [name, path] of models) {
    const file = await readModel(path);
    const { made: modules, why } = await attempt(
      async () =>
        await residence?.in(file, name, options).catch(async (error: unknown) => {
          await file.close();
          throw error;
        }),
    );
    files.push([name, inWords(why ?? (await surveyModel(file, pack, modules ? { ...options, modules } : options)))]);
  }
  const { why } = await attempt(async () => residence?.refuseUnmatched());
  return { files, lost: inWords(why ?? undefined) };
}

function inWords<T>(value: T): T {
  if (value === undefined) return value;
  // No command trains a part of a model.
  const words = (text: string): string =>
    inFlags(text, OPTIONS).replace(", or train this file's layers alone, with the option `modules`", "");
  return JSON.parse(JSON.stringify(value), (_, field) => (typeof field === "string" ? words(field) : field));
}

interface Tried {
  readonly works: boolean | null;
  readonly says: string;
}

interface Ran {
  readonly session: Tried;
  readonly learning: Tried;
  /** Results of the parity probe, by file. */
  readonly probes: Readonly<Record<string, string>>;
}

/** @returns null where onnxruntime-node is not installed */
async function tryOut(models: ReadonlyMap<string, string>, pack: Pack, options: CheckOptions): Promise<Ran | null> {
  const ort = await openRuntime("check").catch(() => null);
  if (!ort) return null;
  const [[name, model]] = models as Iterable<[string, string]> as [[string, string]];
  const isAlone = models.size === 1;
  const probes: Record<string, string> = {};
  try {
    const group = isAlone ? undefined : await createEigenSessions(ort, Object.fromEntries(models), pack, options);
    const sessions = group?.sessions ?? { [name]: await createEigenSession(ort, model, pack, options) };
    for (const [name, { probe }] of Object.entries(sessions)) probes[name] = probe.result;
    await (group ?? sessions[name]!).close();
  } catch (error) {
    const learning = { works: null, says: "no session could be made" };
    return { session: { works: false, says: (error as Error).message }, probes, learning };
  }
  const learning = isAlone
    ? await tryLearning(ort, model, pack, options)
    : { works: false, says: "gradients do not pass from file to file: one graph can learn" };
  return { session: { works: true, says: "made and run" }, probes, learning };
}

async function tryLearning(ort: Ort, model: string, pack: Pack, options: CheckOptions): Promise<Tried> {
  try {
    await (await createEigenSession(ort, model, pack, { ...options, trainable: true })).close();
    return { works: true, says: "gradients pass the whole model" };
  } catch (error) {
    return { works: false, says: (error as Error).message };
  }
}

// The survey of a file.

interface SurveyedModule {
  readonly module: string;
  /** The model's name of its weight; null where it is not found or does not fit. */
  readonly weight: string | null;
  /** The initializer that holds it, and its type there: "quantised" for integers. */
  readonly initializer: string | null;
  readonly type: string | null;
  readonly nodes: readonly string[];
  /** True if the pack's fingerprint is the weight's. Null: there is none, or it was not asked for. */
  readonly confirmed: boolean | null;
  readonly why: string | null;
  readonly misfit: boolean;
  /** Names in the model that are like it. */
  readonly candidates: readonly string[];
}

/** A parameter that tasks bring next to their terms, and is not left out. */
interface SurveyedParameter {
  readonly name: string;
  readonly role: string;
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
  /** A weight by another name whose values a module's fingerprint confirms: "MODULE=WEIGHT". */
  readonly proposal: string | null;
  /** The obstacle where a mode does not work. */
  readonly modes: Readonly<Record<Mode, { readonly works: boolean; readonly why: string | null }>>;
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
    const survey = async (mode: Mode) => {
      const { why } = await attempt(() => planSession(file, view, bases, { ...options, mode }));
      return { works: why === null, why };
    };
    const modes = { core: await survey("core"), factors: await survey("factors"), folded: await survey("folded") };
    const { halfOf } = await import("../session/training.ts");
    const modulesFound = await surveyModules(file, view, bases, options);
    return {
      mode: plan?.mode ?? null,
      reason: plan?.reason ?? planned.why!,
      opset: model.opset,
      fused: fusedNode(model)?.opType ?? null,
      half: halfOf(file) ?? null,
      modules: modulesFound,
      proposal: await propose(file, view, bases, options, modulesFound),
      parameters: await surveyParameters(file, view, options),
      modes,
    };
  } finally {
    section?.close();
    await file.close();
  }
}

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

/** Names alone lead to wrong weights: those of two layers have one shape. */
async function propose(
  file: ModelFile,
  pack: PackView,
  bases: Uint8Array,
  options: SessionOptions,
  found: readonly SurveyedModule[],
): Promise<string | null> {
  for (const [i, module] of pack.modules.entries()) {
    const { weight, candidates } = found[i]!;
    if (weight !== null || module.fingerprint === undefined) continue;
    // The name that a user gave in its place may be the wrong one.
    for (const name of [`${module.name}.weight`, ...candidates]) {
      const matcher = new ModelMatcher(file, { ...options, names: new Map([[module.name, name]]) });
      const tried = await attempt(async () => matcher.confirms(module, (await matcher.weights([module]))[0]!, bases));
      if (tried.made) return `${module.name}=${name}`;
    }
  }
  return null;
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

// Text.

/** Modules and parameters that text lists; `--json` has all. */
const LISTED = 12;

function fileText(model: string, survey: Survey | string): string[] {
  if (typeof survey === "string") return ["", model, `  ${survey}`];
  return [
    "",
    `${model}: opset ${survey.opset}`,
    ...modulesText(survey),
    ...parametersText(survey),
    "",
    ...modesText(survey),
  ];
}

function modulesText({ modules }: Survey): string[] {
  const found = modules.filter(({ why }) => why === null);
  const lost = modules.filter(({ why }) => why !== null);
  const rows = found
    .slice(0, LISTED)
    .map(({ module, initializer, nodes, type, confirmed }) => [
      module,
      initializer ?? "",
      nodes.join(", "),
      type ?? "",
      confirmed === true ? "the same" : "none",
    ]);
  return [
    `${found.length} of ${count(modules.length, "module")} found, ${found.filter(({ confirmed }) => confirmed).length} confirmed by fingerprints`,
    ...(rows.length > 0 ? table([["module", "held in", "node", "type", "fingerprint"], ...rows]) : []),
    ...more(found),
    ...lost.slice(0, 1).map(({ why }) => `  ${why}`),
    ...lost.slice(1, LISTED).map(({ module, weight }) => `  ${weight === null ? "nor" : "the same of"} "${module}"`),
    ...more(lost),
  ];
}

function more(all: readonly unknown[]): string[] {
  return all.length > LISTED ? [`  … and ${all.length - LISTED} more; --json lists all`] : [];
}

function parametersText({ parameters }: Survey): string[] {
  if (parameters.length === 0) return ["Tasks change nothing else."];
  return [
    "",
    "What else tasks change",
    ...parameters.slice(0, LISTED).map(({ name, role, why }) => `  ${name} (${role}): ${why ?? "found"}`),
    ...more(parameters),
  ];
}

function modesText({ modes }: Survey): string[] {
  const all = Object.entries(modes);
  // The obstacle to all modes is reported at the end.
  const some = all.some(([, { works }]) => works);
  return all.map(([name, { works, why }]) => `mode ${name}: ${works ? "yes" : some ? `no, ${why}` : "no"}`);
}

function runText(ran: Ran | null): string[] {
  if (!ran) return [`Not run: onnxruntime-node is not installed (npm install onnxruntime-node; ${WITHOUT_NUGET}).`];
  const { session, learning, probes } = ran;
  if (session.works === false) return [`onnxruntime-node: ${session.says}`];
  const all = Object.entries(probes);
  const results = all.map(([file, result]) => (all.length > 1 ? `${result} (${file})` : result));
  // The first of many operators that stand in the way stands for the others.
  const [first, second, ...others] = learning.says.split("; ");
  const says =
    others.length === 0
      ? learning.says
      : `${first}; ${second}; and ${others.length} more kinds of operators (--json lists all)`;
  return [
    `run on onnxruntime-node: parity probe ${results.join(", ")}`,
    `learning: ${learning.works === null ? "unknown" : learning.works ? "yes" : "no"}, ${says}`,
  ];
}

/** A call that makes the session. @param models paths by name */
function callOf(
  models: ReadonlyMap<string, string>,
  pack: string,
  { names, ignore = [], anyBase }: CheckOptions,
): string {
  const mapped = [...(names ?? [])].map((pair) => JSON.stringify(pair)).join(", ");
  const options = [
    ...(mapped === "" ? [] : [`names: new Map([${mapped}])`]),
    ...(ignore.length > 0 ? [`ignore: ${JSON.stringify(ignore)}`] : []),
    ...(anyBase ? ["anyBase: true"] : []),
  ].join(", ");
  const third = options === "" ? "" : `, { ${options} }`;
  const alone = models.size === 1;
  const first = JSON.stringify(alone ? [...models.values()][0] : Object.fromEntries(models));
  return `createEigenSession${alone ? "" : "s"}(ort, ${first}, await openPack(${JSON.stringify(pack)})${third})`;
}

/** Tasks none of whose modules is in the model. */
async function foreignOf(pack: Pack, { modules }: Survey): Promise<string[]> {
  // A module of another shape was found by its name, and has a report of its own.
  const lost = new Set(modules.filter(({ weight }) => weight === null).map(({ module }) => module));
  if (lost.size === 0) return [];
  const foreign: string[] = [];
  for (const id of pack.tasks.keys()) {
    const { terms } = await pack.load(id);
    if (terms.length > 0 && terms.every(({ module }) => lost.has(pack.modules[module]!.name))) foreign.push(id);
  }
  return foreign;
}

/** onnxruntime's message for a model with some parts in f16 and others in f32. */
const MIXED = /bound to different types \(tensor\(float(16)?\) and tensor\(float(16)?\)/;

async function adviceOf(
  files: readonly Surveyed[],
  lostPart: string | undefined,
  ran: Ran | null,
  pack: Pack,
): Promise<string> {
  if (lostPart !== undefined)
    return "give the file that has it with --beside, or use the model that the adapters are for.";
  const unused = files.find(([, found]) => typeof found === "string");
  if (unused) return `leave ${unused[0]} out: the pack changes nothing there.`;
  const surveys = files.map(([, found]) => found as Survey);
  const survey = surveys.find(({ mode }) => mode === null) ?? surveys[0]!;
  const foreign = files.length === 1 ? await foreignOf(pack, survey) : [];
  const { mode, fused, half, modules, parameters, proposal } = survey;
  if (mode !== null) {
    if (MIXED.test(ran?.session.says ?? ""))
      return "export the model in float32: load the checkpoint with dtype=torch.float32 before the export (docs/export.md).";
    return "update onnxruntime-node, or export the model for the opset that it knows (docs/export.md).";
  }
  const lost = modules.filter(({ weight }) => weight === null);
  const [first] = lost;
  if (first && fused !== null)
    return `export the model again, without onnxruntime's transformer optimiser, which has fused layers into ${fused} (docs/export.md).`;
  const [stranger] = foreign;
  if (stranger !== undefined && lost.length < modules.length) {
    const others = foreign.length > 1 ? `, nor of ${foreign.length - 1} other tasks` : "";
    return `pack the tasks of one model only: none of the modules of task "${stranger}" is in this model${others}; it belongs to another model.`;
  }
  const other = half === "encoder" ? "decoder" : "encoder";
  if (
    first &&
    half !== null &&
    lost.length < modules.length &&
    lost.every(({ module }) => module.split(".").includes(other))
  )
    return `give the ${other} of the model, too: --beside ${other}${half === "encoder" ? "_model_merged" : "_model"}.onnx`;
  if (lost.some(({ misfit }) => misfit))
    return "use the model that the adapters were trained on: in this one a layer has another shape.";
  if (proposal !== null)
    return `map each module whose name differs: --names ${proposal} has the values of its fingerprint.`;
  // Some weights, or biases of the same layers, have kept their names: it is the right architecture.
  const known = lost.length < modules.length || lost.some(({ candidates }) => candidates.length > 0);
  if (first && known && pack.modules.every(({ fingerprint }) => fingerprint === undefined))
    return `make the pack with --base: without fingerprints, nothing tells which weight "${first.module}" is in this model.`;
  if (first && known)
    return `export the model with "${first.module}" under its name (docs/export.md): quantisers lose the names of torch's newer exporter.`;
  if (first) {
    const whose = stranger === undefined ? "the pack" : `task "${stranger}"`;
    return `use a model of the architecture that the adapters were trained on, exported with its names (docs/export.md): none of the modules of ${whose} is in this model.`;
  }
  if (modules.some(({ confirmed }) => confirmed === false))
    return "export the base that the adapters were trained on; or, if the model was trained further on purpose, --any-base.";
  const head = parameters.find(({ why }) => why !== null);
  if (head) {
    const layer = head.name.replace(/\.[^.]*$/, "");
    return `export the model with "${layer}" (docs/export.md), or use the tasks without it: --ignore ${layer}`;
  }
  return "pass a float export of the model (docs/export.md).";
}
