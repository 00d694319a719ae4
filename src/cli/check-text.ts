/** What the command check says of a model and a pack, in words. */
import type { Pack } from "../core/pack.ts";
import type { SessionOptions } from "../session/options.ts";
import type { Survey } from "../session/survey.ts";
import type { Ran, RanFiles, Tried } from "./check-run.ts";
import { WITHOUT_NUGET } from "./model.ts";
import { bytes, count, table } from "./output.ts";

/** Modules that text tells of; `--json` has all. */
const MOST_TOLD = 12;

export function modelText(model: string, { opset, nodes }: Survey): string {
  return `${model}: opset ${opset}, ${count(nodes, "node")}`;
}

export function packText(path: string, { tasks, modules }: Pack, largestTask: number): string {
  return `${path}: ${count(tasks.size, "task")}, ${count(modules.length, "module")}, ${bytes(largestTask)} a task at most`;
}

/** One of several files. @param survey a reason where nothing of the pack lives in it */
export function fileText(model: string, survey: Survey | string): string[] {
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

export function modulesText({ modules }: Survey): string[] {
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

export function parametersText({ parameters }: Survey): string[] {
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
export function modesText({ modes, learning }: Survey, ran: Ran | undefined, alone = true): string[] {
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
export function runText(ran: Ran | RanFiles | undefined, unasked: boolean): string[] {
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

export function whyNot({ reason }: Survey, ran: Ran | undefined): string {
  return ran?.session.says ?? reason;
}

/** What a session is made with. @param model its path, or those of its files by name */
export function callOf(
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
export async function strangersOf(pack: Pack, { modules }: Survey): Promise<string[]> {
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
export function filesAdvice(
  files: readonly (readonly [name: string, survey: Survey | string])[],
  homeless: string | null,
  ran: Pick<Ran, "session"> | undefined,
): string {
  if (homeless !== null) return "give the file that has it with --beside, or use the model that the adapters are for.";
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
export function adviceOf(
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
