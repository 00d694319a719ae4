/**
 * The command check: whether a pack works on a model, which modes do, what a session costs, and what to do where it does not. It
 * plans as a session does (src/session/survey.ts); where onnxruntime-node is installed it makes one, too, and runs it.
 */
import { createEigenSession, type EigenSession } from "../../bindings/onnxruntime.ts";
import type { Ort } from "../../bindings/ort.ts";
import { createEngine } from "../../bindings/ort-engine.ts";
import { BackendError } from "../errors.ts";
import { feedsOfRows, knownSizes, plainInputs, tableRows } from "../onnx/feeds.ts";
import { readModel } from "../onnx/read.ts";
import type { Pack } from "../pack/pack.ts";
import type { MatchOptions } from "../session/match.ts";
import { toTensors } from "../session/probe.ts";
import { type Survey, surveyModel } from "../session/survey.ts";
import { type Attach, command } from "./command.ts";
import { inFlags, match, refuseSwapped, refuseUnknown } from "./matching.ts";
import { toggle } from "./options.ts";
import { bytes, count, table } from "./output.ts";

/** Modules that text tells of; `--json` has all. */
const MOST_TOLD = 12;

const OPTIONS = {
  ...match,
  filesOnly: toggle("Look at the files only, even if onnxruntime-node is installed."),
};

/** Something that was tried; null where it could not be. */
interface Tried {
  readonly works: boolean | null;
  readonly says: string;
}

/** What a session on onnxruntime-node showed. */
interface Ran {
  readonly session: Tried;
  /** What the parity probe found. */
  readonly probe: string | null;
  /** One task per row of a batch. */
  readonly rows: Tried;
  readonly learning: Tried;
}

export const check: Attach = command({
  usage: "check <MODEL.onnx> <PACK>",
  does: "Say whether a pack works on a model, in which modes, and what it costs.",
  details:
    "Exit code 0 if a session works. If onnxruntime-node is installed, a session is made and run on made-up inputs.",
  options: OPTIONS,
  async run([modelPath, packPath]: [string, string], { filesOnly, ...options }, run) {
    await refuseSwapped(modelPath, packPath, run);
    const pack = await run.pack(packPath);
    refuseUnknown(options.names, pack.modules, packPath);
    const survey = inWords(await surveyModel(() => readModel(modelPath), pack, options));
    const ran = filesOnly || survey.mode === null ? undefined : await tryOut(modelPath, pack, options);
    const works = survey.mode !== null && ran?.session.works !== false;
    const next = works ? callOf(modelPath, packPath, options) : adviceOf(survey, ran, await strangersOf(pack, survey));
    const verdict = works
      ? `It works, in mode "${survey.mode}" (${survey.reason}).`
      : `It does not work: ${whyNot(survey, ran)}`;
    return {
      json: { model: modelPath, pack: packPath, works, ...survey, run: ran ?? null, next },
      text: [
        `${modelPath}: opset ${survey.opset}, ${count(survey.nodes, "node")}`,
        `${packPath}: ${count(pack.tasks.size, "task")}, ${count(pack.modules.length, "module")}, coefficients of ${bytes(survey.largestTask)} a task at most`,
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
  },
});

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

/** @returns undefined where onnxruntime-node is not installed */
async function tryOut(model: string, pack: Pack, options: MatchOptions): Promise<Ran | undefined> {
  const found = await import("onnxruntime-node").catch(() => undefined);
  if (!found) return undefined;
  const ort = found as unknown as Ort;
  // It warns of initializers that nothing uses.
  (ort.env as { logLevel?: string }).logLevel = "error";
  const never = { works: null, says: "no session could be made" };
  let session: EigenSession;
  try {
    session = await createEigenSession(ort, model, pack, options);
  } catch (error) {
    const says = inFlags((error as Error).message, OPTIONS);
    return { session: { works: false, says }, probe: null, rows: never, learning: never };
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

async function tryLearning(ort: Ort, model: string, pack: Pack, options: MatchOptions): Promise<Tried> {
  try {
    await (await createEigenSession(ort, model, pack, { ...options, trainable: true })).close();
    return { works: true, says: "gradients pass the whole model" };
  } catch (error) {
    return { works: false, says: inFlags((error as Error).message, OPTIONS) };
  }
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

function modesText({ modes, learning }: Survey, ran: Ran | undefined): string[] {
  const size = (n: number): string => (n === 0 ? "" : bytes(n));
  const all = Object.entries(modes);
  const rows = all.map(([name, { works, nodes, inputs, componentBytes, pristineBytes, fedBytes, writtenBytes }]) =>
    works
      ? [name, "yes", nodes, inputs, size(componentBytes), size(pristineBytes), size(fedBytes), size(writtenBytes)]
      : [name, "no", "", "", "", "", "", ""],
  );
  // What is in the way of all modes is said at the end.
  const some = all.some(([, { works }]) => works);
  return [
    ...table([["mode", "works", "nodes", "inputs", "components", "kept to fold", "fed to a run", "written"], ...rows]),
    ...all.flatMap(([name, { why }]) => (why === null || !some ? [] : [`  ${name}: ${why}`])),
    ...(learning.why === null || ran || !some ? [] : [`learning: no, ${learning.why}`]),
  ];
}

function runText(ran: Ran | undefined, asked: boolean): string[] {
  if (!ran) return asked ? [] : ["Not run: onnxruntime-node is not installed (npm install onnxruntime-node)."];
  if (ran.session.works === false) return [`onnxruntime-node: ${ran.session.says}`];
  const line = (what: string, { works, says }: Tried): string =>
    `${what}: ${works === null ? "unknown" : works ? "yes" : "no"}, ${says}`;
  return [
    `run on onnxruntime-node: parity probe ${ran.probe}`,
    line("one task per row", ran.rows),
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

/** What a session is made with. */
function callOf(model: string, pack: string, { names, ignore = [], anyBase }: MatchOptions): string {
  const mapped = [...(names ?? [])].map((pair) => JSON.stringify(pair)).join(", ");
  const options = [
    ...(mapped === "" ? [] : [`names: new Map([${mapped}])`]),
    ...(ignore.length > 0 ? [`ignore: ${JSON.stringify(ignore)}`] : []),
    ...(anyBase ? ["anyBase: true"] : []),
  ].join(", ");
  const third = options === "" ? "" : `, { ${options} }`;
  return `createEigenSession(ort, ${JSON.stringify(model)}, await openPack(${JSON.stringify(pack)})${third})`;
}

/** Tasks none of whose modules is in the model. */
async function strangersOf(pack: Pack, { modules }: Survey): Promise<string[]> {
  // By the name alone: a module of another shape is another model's, too, but that is said of the module.
  const lost = new Set(modules.filter(({ weight }) => weight === null).map(({ module }) => module));
  if (lost.size === 0) return [];
  const strangers: string[] = [];
  for (const id of pack.tasks.keys()) {
    const { terms } = await pack.load(id);
    if (terms.length > 0 && terms.every(({ module }) => lost.has(pack.modules[module]!.name))) strangers.push(id);
  }
  return strangers;
}

/** What onnxruntime says of a model of which some parts were exported in f16 and others in f32. */
const MIXED = /bound to different types \(tensor\(float(16)?\) and tensor\(float(16)?\)/;

/** How refusals of a layer of another shape end. */
const OF_ANOTHER = "it is of another model";

/**
 * What to do about a pack that does not work.
 * @param strangers tasks none of whose modules is in the model
 */
function adviceOf({ mode, fused, modules, parameters }: Survey, ran: Ran | undefined, strangers: string[]): string {
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
  if (lost.some(({ why }) => why?.endsWith(OF_ANOTHER)))
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
