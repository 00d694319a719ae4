/**
 * The command check: whether a pack works on a model, which modes do, what a session costs, and what to do where it does not. It
 * plans as a session does (src/session/survey.ts); where onnxruntime-node is installed it makes one, too, and runs it.
 */
import { basename, extname } from "node:path";
import type { Pack } from "../core/pack.ts";
import { readModel } from "../onnx/read.ts";
import type { SessionOptions } from "../session/options.ts";
import { type Survey, surveyFiles, surveyModel } from "../session/survey.ts";
import { type Tried, tryFiles, tryOut } from "./check-run.ts";
import {
  adviceOf,
  callOf,
  filesAdvice,
  fileText,
  modelText,
  modesText,
  modulesText,
  packText,
  parametersText,
  runText,
  strangersOf,
  whyNot,
} from "./check-text.ts";
import { type Attach, command, type Result } from "./command.ts";
import { inFlags, match, refuseSwapped, refuseUnknown } from "./matching.ts";
import { list, reading, toggle, UsageError } from "./options.ts";

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
  const planned = survey.homeless === null ? stopped.find((why) => why !== false) : inFlags(survey.homeless, OPTIONS);
  const ran = filesOnly || planned !== undefined ? undefined : runInWords(await tryFiles(models, pack, options));
  const why = planned ?? (ran?.session.works === false ? ran.session.says : undefined);
  const next = why === undefined ? callOf(known, packPath, options) : filesAdvice(files, survey.homeless, ran);
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
