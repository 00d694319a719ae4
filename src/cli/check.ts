/**
 * The command check: whether a pack works on a model, which modes do, what a session costs, and what to do where it does not. It
 * plans as a session does (src/session/survey.ts); where onnxruntime-node is installed it makes one, too, and runs it.
 */
import { basename, extname } from "node:path";
import { createEigenSession, createEigenSessions, type EigenSession } from "../../bindings/onnxruntime.ts";
import { createEngine, type Ort } from "../../bindings/ort-engine.ts";
import type { Pack } from "../core/pack.ts";
import { BackendError } from "../errors.ts";
import { feedsOfRows, knownSizes, plainInputs, tableRows } from "../onnx/feeds.ts";
import { readModel } from "../onnx/read.ts";
import { toTensors } from "../session/engine.ts";
import type { SessionOptions } from "../session/options.ts";
import { type Survey, surveyFiles, surveyModel } from "../session/survey.ts";
import { type Attach, command, type Result } from "./command.ts";
import { inFlags, match, refuseSwapped, refuseUnknown } from "./matching.ts";
import { WITHOUT_NUGET } from "./model.ts";
import { list, reading, toggle, UsageError } from "./options.ts";
import { bytes, count, table } from "./output.ts";

const OPTIONS = {
  ...match,
  beside: reading(
    "model",
    list(
      "OTHER.onnx",
      "Another file of the same model: the decoder of an encoder, a text encoder of a UNet. May be given again.",
    ),
  ),
  filesOnly: toggle("Look at the files only, even if onnxruntime-node is installed."),
};

export const check: Attach = command({
  usage: "check <MODEL.onnx> <PACK>",
  does: "Say whether a pack works on a model, in which modes, and what it costs.",
  details:
    "Exit code 0 if a session works. If onnxruntime-node is installed, a session is made and run on made-up inputs.",
  example: "check model.onnx tasks.eigen",
  options: OPTIONS,
  reads: ["model", "file"],
  async run([modelPath, packPath]: [string, string], { filesOnly, beside, ...options }, run) {
    await refuseSwapped(modelPath, packPath, run);
    const pack = await run.pack(packPath);
    refuseUnknown(options.names, pack.modules, packPath);
    const shown = (path: string): string => run.shown(path);
    const named = { ...options, filesOnly, packPath, shown };
    return beside.length === 0
      ? checkOne(modelPath, pack, named)
      : checkFiles(namesOf([modelPath, ...beside]), pack, named);
  },
});

interface CheckOptions extends Omit<SessionOptions, "probe"> {
  readonly filesOnly: boolean;
  readonly packPath: string;
  /** How people know a path. */
  readonly shown: (path: string) => string;
}

async function checkOne(
  model: string,
  pack: Pack,
  { filesOnly, packPath, shown, ...options }: CheckOptions,
): Promise<Result> {
  const survey = inWords(await surveyModel(() => readModel(model), pack, options));
  const ran = filesOnly || survey.mode === null ? undefined : runInWords(await tryOut(model, pack, options));
  const works = survey.mode !== null && ran?.session.works !== false;
  const next = works ? callOf(shown(model), packPath, options) : adviceOf(survey, ran, await strangersOf(pack, survey));
  const verdict = works
    ? `It works, in mode "${survey.mode}" (${survey.reason}).`
    : `It does not work: ${whyNot(survey, ran)}`;
  return {
    json: { model: shown(model), pack: packPath, works, ...survey, run: ran ?? null, next },
    text: [
      modelText(shown(model), survey),
      packText(packPath, pack, survey.largestTask),
      "",
      ...modulesText(survey),
      ...parametersText(survey),
      "",
      ...modesText(survey, ran),
      ...runText(ran, filesOnly || survey.mode === null),
      "",
      verdict,
      `Next: ${next}`,
    ],
    exitCode: works ? 0 : 1,
  };
}

/**
 * Files by what they are called, without the ending; by their paths where two are called alike.
 * @throws UsageError for one that is given twice
 */
function namesOf(paths: readonly string[]): Map<string, string> {
  const twice = paths.find((path, i) => paths.indexOf(path) < i);
  if (twice !== undefined) throw new UsageError(`--beside ${twice}: this file is given twice`);
  const names = paths.map((path) => basename(path, extname(path)));
  const alike = new Set(names).size < names.length;
  return new Map(paths.map((path, i) => [alike ? path : names[i]!, path]));
}

/** @param models paths by name */
async function checkFiles(
  models: ReadonlyMap<string, string>,
  pack: Pack,
  { filesOnly, packPath, shown, ...options }: CheckOptions,
): Promise<Result> {
  const known = new Map([...models].map(([name, path]) => [name, shown(path)]));
  const reads = [...models].map(([name, path]) => [name, () => readModel(path)] as const);
  const survey = await surveyFiles(new Map(reads), pack, options);
  const files = [...survey.files].map(
    ([name, one]) => [name, typeof one === "string" ? inFlags(one, OPTIONS) : inWords(one)] as const,
  );
  const stopped = files.map(([name, one]) =>
    typeof one === "string" ? one : one.mode === null && `${name}: ${one.reason}`,
  );
  const planned = survey.unmatched === null ? stopped.find((why) => why !== false) : inFlags(survey.unmatched, OPTIONS);
  const ran = filesOnly || planned !== undefined ? undefined : runInWords(await tryFiles(models, pack, options));
  const why = planned ?? (ran?.session.works === false ? ran.session.says : undefined);
  const next = why === undefined ? callOf(known, packPath, options) : filesAdvice(files, survey.unmatched, ran);
  const largest = Math.max(0, ...[...pack.tasks.values()].map((task) => task.bytes));
  return {
    json: {
      models: Object.fromEntries(known),
      pack: packPath,
      works: why === undefined,
      files: Object.fromEntries(files),
      run: ran ?? null,
      next,
    },
    text: [
      packText(packPath, pack, largest),
      ...files.flatMap(([name, one]) => fileText(known.get(name)!, one)),
      "",
      ...runText(ran, filesOnly || planned !== undefined),
      why === undefined ? "It works." : `It does not work: ${why}`,
      `Next: ${next}`,
    ],
    exitCode: why === undefined ? 0 : 1,
  };
}

/** What the library says, in flags. */
function inWords(survey: Survey): Survey {
  const words = <T extends { readonly why: string | null }>(one: T): T => ({
    ...one,
    why: one.why === null ? null : inFlags(one.why, OPTIONS),
  });
  const { core, factors, folded } = survey.modes;
  return {
    ...survey,
    reason: inFlags(survey.reason, OPTIONS),
    modules: survey.modules.map(words),
    parameters: survey.parameters.map(words),
    modes: { core: words(core), factors: words(factors), folded: words(folded) },
    learning: words(survey.learning),
  };
}

/** The same of what was run. */
function runInWords<T extends { readonly session: Tried; readonly learning: Tried }>(
  ran: T | undefined,
): T | undefined {
  const words = (one: Tried): Tried => ({ ...one, says: inFlags(one.says, OPTIONS) });
  return ran && { ...ran, session: words(ran.session), learning: words(ran.learning) };
}

// What the command check tries out where onnxruntime-node is installed.

/** Something that was tried; null where it could not be. */
export interface Tried {
  readonly works: boolean | null;
  readonly says: string;
}

/** What a session on onnxruntime-node showed. */
export interface Ran {
  readonly session: Tried;
  /** What the parity probe found. */
  readonly probe: string | null;
  /** One task per row of a batch. */
  readonly rows: Tried;
  readonly learning: Tried;
}

/** The same of several files. */
export interface RanFiles extends Pick<Ran, "session" | "learning"> {
  /** What the parity probe found, by file. */
  readonly probes: Readonly<Record<string, string>>;
}

const NEVER: Tried = { works: null, says: "no session could be made" };

/** @returns undefined where onnxruntime-node is not installed */
async function tryOut(model: string, pack: Pack, options: Omit<SessionOptions, "probe">): Promise<Ran | undefined> {
  const ort = await runtime();
  if (!ort) return undefined;
  let session: EigenSession;
  try {
    session = await createEigenSession(ort, model, pack, options);
  } catch (error) {
    const says = (error as Error).message;
    return { session: { works: false, says }, probe: null, rows: NEVER, learning: NEVER };
  }
  const probe = session.probe.result;
  const rows = await tryRows(ort, model, session).finally(() => session.close());
  return {
    session: { works: true, says: "made and run" },
    probe,
    rows,
    learning: await tryLearning(ort, model, pack, options),
  };
}

/** The files of one model. @returns undefined where onnxruntime-node is not installed */
async function tryFiles(
  models: ReadonlyMap<string, string>,
  pack: Pack,
  options: Omit<SessionOptions, "probe">,
): Promise<RanFiles | undefined> {
  const ort = await runtime();
  if (!ort) return undefined;
  try {
    const group = await createEigenSessions(ort, Object.fromEntries(models), pack, options);
    const probes = Object.entries(group.sessions).map(([name, session]) => [name, session.probe.result] as const);
    await group.close();
    const learning = { works: false, says: "gradients do not pass from file to file: one graph can learn" };
    return { session: { works: true, says: "made and run" }, probes: Object.fromEntries(probes), learning };
  } catch (error) {
    const says = (error as Error).message;
    return { session: { works: false, says }, probes: {}, learning: NEVER };
  }
}

async function runtime(): Promise<Ort | undefined> {
  const found = await import("onnxruntime-node").catch(() => undefined);
  if (!found) return undefined;
  const ort = found as unknown as Ort;
  // It warns of initializers that nothing uses.
  (ort.env as { logLevel?: string }).logLevel = "error";
  return ort;
}

/** A batch whose rows differ, with a task in every second. */
async function tryRows(ort: Ort, model: string, session: EigenSession): Promise<Tried> {
  if (session.mode === "folded") return { works: false, says: 'mode "folded" has one task at a time' };
  const [task] = session.tasks.keys();
  const file = await readModel(model);
  try {
    const { proto, initializers } = file.model.graph;
    const own = proto.input.filter(({ name }) => !initializers.has(name));
    const made = feedsOfRows(plainInputs(own), tableRows(file.model, own), knownSizes(file.model, own));
    if (!made || task === undefined)
      return { works: null, says: made ? "the pack has no task" : "its inputs cannot be made up" };
    const feeds = toTensors(createEngine(ort), made);
    const rows = Object.values(feeds)[0]?.dims[0] ?? 0;
    const tasks = Array.from({ length: rows }, (_, row) => (row % 2 === 0 ? task : null));
    await session.run(feeds as never, { tasks });
    return { works: true, says: "a run on rows that differ keeps tasks apart" };
  } catch (error) {
    const says = (error as Error).message.trim();
    if (error instanceof BackendError && error.backend === "session") return { works: false, says };
    return { works: null, says: `the model does not run on made-up inputs (${says})` };
  } finally {
    await file.close();
  }
}

async function tryLearning(
  ort: Ort,
  model: string,
  pack: Pack,
  options: Omit<SessionOptions, "probe">,
): Promise<Tried> {
  try {
    await (await createEigenSession(ort, model, pack, { ...options, trainable: true })).close();
    return { works: true, says: "gradients pass the whole model" };
  } catch (error) {
    return { works: false, says: (error as Error).message };
  }
}

// What the command check says of a model and a pack, in words.

/** Modules that text tells of; `--json` has all. */
const MOST_TOLD = 12;

function modelText(model: string, { opset, nodes }: Survey): string {
  return `${model}: opset ${opset}, ${count(nodes, "node")}`;
}

function packText(path: string, { tasks, modules }: Pack, largestTask: number): string {
  return `${path}: ${count(tasks.size, "task")}, ${count(modules.length, "module")}, ${bytes(largestTask)} a task at most`;
}

/** One of several files. @param survey a reason where nothing of the pack lives in it */
function fileText(model: string, survey: Survey | string): string[] {
  if (typeof survey === "string") return ["", model, `  ${survey}`];
  return [
    "",
    modelText(model, survey),
    ...modulesText(survey),
    ...parametersText(survey),
    "",
    ...modesText(survey, undefined, false),
  ];
}

function modulesText({ modules }: Survey): string[] {
  const [found, lost] = [modules.filter(({ why }) => why === null), modules.filter(({ why }) => why !== null)];
  const confirmed = found.filter((one) => one.confirmed === true).length;
  const rows = found
    .slice(0, MOST_TOLD)
    .map(({ module, initializer, nodes, type, confirmed }) => [
      module,
      initializer ?? "",
      nodes.join(", "),
      type ?? "",
      confirmed === true ? "the same" : "none",
    ]);
  return [
    `${found.length} of ${count(modules.length, "module")} found, ${confirmed} confirmed by fingerprints`,
    ...(rows.length > 0 ? table([["module", "held in", "node", "type", "fingerprint"], ...rows]) : []),
    ...more(found),
    ...lost.slice(0, 1).map(({ why }) => `  ${why}`),
    ...lost.slice(1, MOST_TOLD).map(({ module, weight }) => `  ${weight === null ? "nor" : "the same of"} "${module}"`),
    ...more(lost),
  ];
}

function more(all: readonly unknown[]): string[] {
  return all.length > MOST_TOLD ? [`  … and ${all.length - MOST_TOLD} more; --json lists all`] : [];
}

const BECOMES = {
  input: "an input of each run",
  folded: "written into the weights",
  found: "found",
  ignored: "left out",
  missing: "missing",
};

function parametersText({ parameters }: Survey): string[] {
  if (parameters.length === 0) return ["Tasks change nothing beside these modules."];
  return [
    "",
    "What else tasks change",
    ...parameters.slice(0, MOST_TOLD).map(({ name, role, becomes, dropped, why }) => {
      const zero = dropped ? "; the export has dropped it, since it was zero" : "";
      return `  ${name} (${role}): ${why ?? `${BECOMES[becomes]}${zero}`}`;
    }),
    ...more(parameters),
  ];
}

/** @param alone whether it is the model's only file */
function modesText({ modes, learning }: Survey, ran: Ran | undefined, alone = true): string[] {
  const size = (n: number): string => (n === 0 ? "" : bytes(n));
  const all = Object.entries(modes);
  // What is in the way of all modes is said at the end.
  const some = all.some(([, { works }]) => works);
  const rows = all.map(([name, { works, nodes, inputs, componentBytes, pristineBytes, fedBytes, writtenBytes }]) =>
    works
      ? [name, "yes", nodes, inputs, size(componentBytes), size(pristineBytes), size(fedBytes), size(writtenBytes)]
      : [name, some ? "not here" : "no", "", "", "", "", "", ""],
  );
  return [
    ...table([["mode", "works", "nodes", "inputs", "components", "kept to fold", "fed to a run", "written"], ...rows]),
    ...all.flatMap(([name, { why }]) => (why === null || !some ? [] : [`  ${name}: ${why}`])),
    ...(learning.why === null || ran || !some || !alone ? [] : [`learning: no, ${learning.why}`]),
  ];
}

/** @param unasked whether nothing was to be run */
function runText(ran: Ran | RanFiles | undefined, unasked: boolean): string[] {
  if (!ran)
    return unasked
      ? []
      : [`Not run: onnxruntime-node is not installed (npm install onnxruntime-node; ${WITHOUT_NUGET}).`];
  if (ran.session.works === false) return [`onnxruntime-node: ${ran.session.says}`];
  const line = (what: string, { works, says }: Tried): string =>
    `${what}: ${works === null ? "unknown" : works ? "yes" : "no"}, ${says}`;
  const probes =
    "probes" in ran ? Object.entries(ran.probes).map(([file, probe]) => `${probe} (${file})`) : [ran.probe];
  return [
    `run on onnxruntime-node: parity probe ${probes.join(", ")}`,
    ...("rows" in ran ? [line("one task per row", ran.rows)] : []),
    line("learning", { ...ran.learning, says: shortened(ran.learning.says) }),
  ];
}

/** The first of many operators that stand in the way stands for the others. */
function shortened(says: string): string {
  const [first, second, ...more] = says.split("; ");
  if (second === undefined || more.length === 0) return says;
  return `${first}; ${second}; and ${more.length} more kinds of operators (--json lists all)`;
}

function whyNot({ reason }: Survey, ran: Ran | undefined): string {
  return ran?.session.says ?? reason;
}

/** What a session is made with. @param model its path, or those of its files by name */
function callOf(
  model: string | ReadonlyMap<string, string>,
  pack: string,
  { names, ignore = [], anyBase }: SessionOptions,
): string {
  const mapped = [...(names ?? [])].map((pair) => JSON.stringify(pair)).join(", ");
  const options = [
    ...(mapped === "" ? [] : [`names: new Map([${mapped}])`]),
    ...(ignore.length > 0 ? [`ignore: ${JSON.stringify(ignore)}`] : []),
    ...(anyBase ? ["anyBase: true"] : []),
  ].join(", ");
  const third = options === "" ? "" : `, { ${options} }`;
  const [name, first] =
    typeof model === "string"
      ? ["createEigenSession", JSON.stringify(model)]
      : ["createEigenSessions", JSON.stringify(Object.fromEntries(model))];
  return `${name}(ort, ${first}, await openPack(${JSON.stringify(pack)})${third})`;
}

/** Tasks none of whose modules is in the model. */
async function strangersOf(pack: Pack, { modules }: Survey): Promise<string[]> {
  // Names alone decide: the report of the module tells of another shape.
  const lost = new Set(modules.filter(({ weight }) => weight === null).map(({ module }) => module));
  if (lost.size === 0) return [];
  const strangers: string[] = [];
  for (const id of pack.tasks.keys()) {
    const { terms } = await pack.load(id);
    if (terms.length > 0 && terms.every(({ module }) => lost.has(pack.modules[module]!.name))) strangers.push(id);
  }
  return strangers;
}

/** What to do about files that do not work together. @param files as `surveyFiles` found them */
function filesAdvice(
  files: readonly (readonly [name: string, survey: Survey | string])[],
  unmatched: string | null,
  ran: Pick<Ran, "session"> | undefined,
): string {
  if (unmatched !== null) return "give the file that has it with --beside, or use the model that the adapters are for.";
  const idle = files.find(([, one]) => typeof one === "string");
  if (idle) return `leave ${idle[0]} out: the pack changes nothing there.`;
  const surveys = files.flatMap(([, one]) => (typeof one === "string" ? [] : [one]));
  return adviceOf(surveys.find(({ mode }) => mode === null) ?? surveys[0]!, ran, []);
}

/** onnxruntime's message for a model with some parts in f16 and others in f32. */
const MIXED = /bound to different types \(tensor\(float(16)?\) and tensor\(float(16)?\)/;

/**
 * What to do about a pack that does not work.
 * @param strangers tasks none of whose modules is in the model
 */
function adviceOf(
  { mode, fused, half, modules, parameters }: Survey,
  ran: Pick<Ran, "session"> | undefined,
  strangers: readonly string[],
): string {
  if (mode !== null) {
    if (MIXED.test(ran?.session.says ?? ""))
      return "export the model in float32: load the checkpoint with dtype=torch.float32 before the export (docs/export.md).";
    return "update onnxruntime-node, or export the model for the opset that it knows (docs/export.md).";
  }
  const lost = modules.filter(({ weight }) => weight === null);
  const [first] = lost;
  if (first && fused !== null)
    return `export the model again, without onnxruntime's transformer optimiser, which has fused layers into ${fused} (docs/export.md).`;
  const [stranger] = strangers;
  if (stranger !== undefined && lost.length < modules.length) {
    const others = strangers.length > 1 ? `, nor of ${strangers.length - 1} other tasks` : "";
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
  const like = ({ candidates }: Survey["modules"][number]): string | undefined =>
    candidates.find((name) => !name.endsWith(".bias"));
  const guess = lost.find(like);
  if (guess) return `if the names differ, map each module: --names ${guess.module}=${like(guess)}`;
  // Some weights, or the biases beside them, have kept their names: it is the right architecture.
  const known = lost.length < modules.length || lost.some(({ candidates }) => candidates.length > 0);
  if (first && known)
    return `export the model with "${first.module}" under its name (docs/export.md): quantisers lose the names of torch's newer exporter.`;
  if (first) {
    const whose = stranger === undefined ? "the pack" : `task "${stranger}"`;
    return `use a model of the architecture that the adapters were trained on, exported with its names (docs/export.md): none of the modules of ${whose} is in this model.`;
  }
  if (modules.some(({ confirmed }) => confirmed === false))
    return "export the base that the adapters were trained on; or, if the model was trained further on purpose, --any-base.";
  const head = parameters.find(({ becomes }) => becomes === "missing");
  if (head) {
    const layer = head.name.replace(/\.[^.]*$/, "");
    return `export the model with "${layer}" (docs/export.md), or use the tasks without it: --ignore ${layer}`;
  }
  return "pass a float export of the model (docs/export.md).";
}
