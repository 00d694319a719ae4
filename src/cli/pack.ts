/**
 * The command pack: makes a pack from adapters, with a number of components or by a criterion: a budget of bytes, an error, or the
 * answers of adapters and pack.
 */

import { rmdir } from "node:fs/promises";
import { availableParallelism } from "node:os";
import { type Adapter, commonBase } from "../adapters/adapter.ts";
import { nearest } from "../arguments.ts";
import { AdapterError } from "../errors.ts";
import type { BasisMode } from "../extract/options.ts";
import { DEFAULT_ERROR } from "../pack/allocate.ts";
import { type Built, buildStreamed, type Streamed } from "../pack/build.ts";
import type { BuildReport } from "../pack/report.ts";
import { buildWithin, type SearchOptions, type SearchReport, searchStreamed } from "../pack/search.ts";
import { Unreachable } from "../pack/seek.ts";
import type { Engine } from "../session/engine.ts";
import type { Tokenizer } from "../session/tokens.ts";
import type { Dtypes } from "../tensor/dtypes.ts";
import { show } from "../tensor/tensor-file.ts";
import type { ByAnswersReport } from "../train/pack-by-answers.ts";
import { agreementText, byAnswersText, judged, OUT_OF_TIME, packedByAnswers } from "./by-answers.ts";
import { type Attach, command } from "./command.ts";
import { type Asked, asksPrompts, readQuestions } from "./examples.ts";
import { openScratch, readJson } from "./files.ts";
import { removeFinished } from "./finished.ts";
import { contents, fileDigest, modelDigest } from "./hub-part.ts";
import { inFlags, names, refuseUnknown } from "./matching.ts";
import { engineOf, openModel, tokenizerOf } from "./model.ts";
import * as option from "./options.ts";
import { type Output, resources, sum } from "./output.ts";
import { autoText, cardText, reportText } from "./pack-text.ts";
import type { Run } from "./run.ts";
import { filesOf } from "./target.ts";

/** Units of a size, without their "B". */
const UNITS: Readonly<Record<string, number>> = {
  "": 1,
  k: 1e3,
  m: 1e6,
  g: 1e9,
  ki: 2 ** 10,
  mi: 2 ** 20,
  gi: 2 ** 30,
};

const size: option.OptionSpec<number | undefined> = {
  value: "SIZE",
  help: "The best pack of at most this size: 300000, 300kB or 1.5MB.",
  parse(given, flag) {
    const [, digits = "", unit = ""] = /^([\d.]+) ?([kmg]?i?)b?$/i.exec(given) ?? [];
    const found = Math.floor(Number(digits) * (UNITS[unit.toLowerCase()] ?? NaN));
    if (digits !== "" && found > 0) return found;
    throw new option.UsageError(`${flag} ${given}: expected a size such as 300000, 300kB or 1.5MB`);
  },
};

const OPTIONS = {
  output: option.output("PACK", "The pack to write."),
  force: option.force,
  ...option.group(`How much to keep, one of these. Default: --error ${DEFAULT_ERROR}`, {
    error: option.amount.error,
    bytes: size,
    ratio: option.number("R", "The best pack that is R times smaller than the adapters.", {
      ...option.POSITIVE,
      expected: "how many times smaller than the adapters",
    }),
    k: option.amount.k,
    ...option.rarely({
      energy: {
        ...option.amount.energy,
        help: "As many components as keep this share of the squared singular values.",
      },
    }),
  }),
  ...option.group("How", {
    base: option.base,
    ...option.rarely({
      mode: option.choice(
        ["auto", "column", "flat"],
        "Auto: the best for --bytes, --ratio or --error. Column: coefficients for every row of a factor. Flat: one vector for a whole " +
          "factor. Default: auto; column with --k, --energy, --gauge, --rank or --step.",
      ),
      dtype: option.dtypeOrChosen,
      gauge: option.gauge,
      rank: option.rank,
      step: option.number(
        "S",
        "Store terms as entropy-coded integers. When one goes up by 1, its module's ΔW changes by S times the typical norm of ΔW. " +
          "0.05 takes about three bits a number, 0.1 two. Balanced gauge. Default: as --dtype says; mode auto tries some.",
        { ...option.POSITIVE, expected: "a share of the norm of ΔW, such as 0.07" },
      ),
      names,
      workers: option.number(
        "N",
        "Threads that extract modules; the pack is the same. Default: one for each core and 10 MB of adapters, 8 at most.",
        option.from(1),
      ),
    }),
  }),
  ...option.group("Judged by answers", {
    model: option.reading(
      "model",
      option.text(
        "MODEL.onnx",
        "The smallest pack whose tasks answer as their adapters do; with a size, the one whose tasks do so most. Needs onnxruntime-node.",
      ),
    ),
    ...judged,
    ...option.rarely({
      distill: option.number(
        "STEPS",
        "With --model: most training steps of a task, which end earlier where they gain no more; 0 for none. Default: 240; 24 of a language model.",
        option.from(0),
      ),
    }),
  }),
  ...option.group("Which adapters", {
    as: option.as,
    ...option.rarely({
      scores: option.text(
        "SCORES.json",
        "accuracy and accuracy_head_only of each adapter, from 0 to 1; adapters that add little are left out.",
      ),
      minGain: option.number(
        "X",
        "With --scores: the least that an adapter must add to the accuracy of its head. Default: 0.02.",
        { expected: "a difference of shares, from -1 to 1", holds: (n) => n >= -1 && n <= 1 },
      ),
      anyBase: option.anyBase,
    }),
  }),
};

type PackOptions = option.Values<typeof OPTIONS>;

export const pack: Attach = command({
  usage: "pack <ADAPTER_OR_FOLDER...>",
  does: "Make a pack of adapters.",
  details: "The report says what the tasks lost, and how much smaller the pack is than the adapters.",
  example: "pack my-adapters/ -o tasks.eigen --base my-base/",
  options: OPTIONS,
  reads: ["repository"],
  async run(paths, options, run, out) {
    checkOptions(options);
    const { output: file, force, scores, minGain, base, model, text, tokenizer } = options;
    const target = await run.target(file, { force, inputs: [scores, base, model, text, tokenizer] });
    // Read before any adapter is.
    const known = scores === undefined ? undefined : readScores(await readJson(scores), scores);
    const adapters = await run.adapters(paths, options.as, base);
    target.refuse(adapters.flatMap(filesOf));
    const modules = adapters.flatMap((adapter) => [...adapter.modules.values()]);
    refuseUnknown(options.names, modules, paths.join(", "));
    const { kept, dropped } = known
      ? partByGain(adapters, known, minGain ?? 0.02, scores!)
      : { kept: adapters, dropped: [] };
    const adapterBytes = sum(kept.map(({ byteLength }) => byteLength));
    const { chunks, report, finished } = await build(kept, options, run, out).catch(addWaysOut(options, adapterBytes));
    await target.write(chunks);
    const byAnswers = "answers" in report;
    const left = byAnswers && report.left.length > 0;
    if (finished !== undefined) await (left ? rmdir(finished).catch(() => undefined) : removeFinished(finished));
    for (const warning of report.warnings) out.warn(warning);
    const took = resources();
    // A base without weights was warned of.
    const notes = base === undefined ? report.notes.map((note) => inFlags(note, OPTIONS)) : [];
    // A card that names a base speaks for all adapters.
    const cardBase = kept.every(({ baseModel }) => baseModel !== undefined) ? commonBase(kept) : undefined;
    return {
      json: { file, ...report, notes, dtype: nameOf(report.dtype), dropped, ...took },
      text: [
        ...dropped.map(({ id, gain }) => `left out ${id}: ${points(gain)} over its head`),
        ...(byAnswers ? byAnswersText(file, report) : reportText(file, report)),
        ...("tried" in report ? autoText(report) : []),
        ...(byAnswers ? [] : ["ΔW error is a proxy: with --model answers decide."]),
        ...notes,
        cardText(report, cardBase, byAnswers ? agreementText(report) : undefined),
        `${took.seconds.toFixed(2)} s`,
      ],
      ...(left && { exitCode: OUT_OF_TIME }),
    };
  },
});

/** What --mode auto would choose; who names one of them has settled for a mode. */
const SETTLED = ["k", "energy", "gauge", "rank", "step"] as const;

/** What asks a model; other modes than auto know none. */
const BY_ANSWERS = [
  "model",
  "text",
  "tokenizer",
  "tokens",
  "minutes",
  "agreement",
  "distill",
  "provider",
  "threads",
] as const;

/** The flag that says how much is kept. */
function budgetOf(options: PackOptions): string | undefined {
  return option.exclusive(options, "bytes", "ratio", "error", "k", "energy");
}

function modeOf(options: PackOptions): BasisMode | "auto" {
  return options.mode ?? (option.given(options, ...SETTLED).length > 0 ? "column" : "auto");
}

/** @throws UsageError for options that do not go together */
function checkOptions(options: PackOptions): void {
  const budget = budgetOf(options);
  const asked = option.given(options, "model", "text").length;
  if (modeOf(options) === "auto") {
    const [own] = option.given(options, ...SETTLED);
    if (own !== undefined)
      throw new option.UsageError(`--mode auto chooses ${own} itself; leave it out, or name a mode`);
    if (asked === 1 && options.model === undefined)
      throw new option.UsageError("--text needs --model: answers to the text are what packs are judged by");
    if (asked > 0 && budget === "--error")
      throw new option.UsageError(
        "--error is about ΔW, with --model answers decide: leave it out, or take --agreement",
      );
    if (asked > 0 && options.dtype)
      throw new option.UsageError(
        "--dtype is for packs without --model: with it, numbers are as coarse as answers allow",
      );
  } else {
    if (budget === "--error")
      throw new option.UsageError(
        "--error is for --mode auto, which holds every task to it; leave --mode out, or say --k, --energy, --bytes or --ratio",
      );
    const [own] = option.given(options, ...BY_ANSWERS);
    if (own !== undefined) throw new option.UsageError(`${own} is for --mode auto`);
  }
  const [needs] = option.given(options, "distill", "minutes", "agreement", "provider", "threads");
  if (needs !== undefined && options.model === undefined) throw new option.UsageError(`${needs} needs --model`);
  if (options.agreement !== undefined && budget !== undefined)
    throw new option.UsageError(`--agreement is for packs without a size: leave ${budget} out`);
  if (options.minGain !== undefined && options.scores === undefined)
    throw new option.UsageError("--min-gain needs --scores SCORES.json");
  if (options.step !== undefined && (options.dtype?.basis ?? options.dtype?.coefficients) !== undefined)
    throw new option.UsageError(
      "--step decides how many bits components and coefficients have; leave them out of --dtype",
    );
}

async function build(
  adapters: readonly Adapter[],
  options: PackOptions,
  run: Run,
  out: Output,
): Promise<(Streamed<BuildReport | SearchReport> | Built<ByAnswersReport>) & { readonly finished?: string }> {
  const { rank, step, ratio, error = DEFAULT_ERROR, dtype = {} } = options;
  const mode = modeOf(options);
  const adapterBytes = sum(adapters.map(({ byteLength }) => byteLength));
  const bytes = ratio === undefined ? options.bytes : Math.floor(adapterBytes / ratio);
  const { workers = workersFor(adapterBytes) } = options;
  const scratch = run.closing(openScratch(options.output));
  const common = { workers, anyBase: options.anyBase, ...(await run.base(options.base, options.names)) };
  if (mode === "auto" && options.model !== undefined) {
    const { model, questions } = await askedOf(options, adapters);
    const { minutes, agreement, distill: steps, names, output: file, tokenizer, tokens } = options;
    const inputs = [
      await modelDigest(options.model),
      await fileDigest(tokenizer ?? tokenizerOf(options.model)),
      await contents(adapters, out),
    ];
    const how = { adapters, ...questions, names, minutes, agreement, bytes, steps, tokens };
    return packedByAnswers({ ...model, build: common, file, inputs, ...how }, run, out);
  }
  if (mode === "auto") {
    const goal: SearchOptions["goal"] =
      bytes === undefined ? { kind: "error", max: error } : { kind: "bytes", max: bytes };
    return searchStreamed(adapters, { ...common, dtype, goal, onProgress: out.progress }, scratch);
  }
  const { gauge = (rank ?? step) === undefined ? "as-trained" : "balanced" } = options;
  const how = { ...common, onProgress: out.progress, mode, gauge, rank, step, dtype };
  if (bytes !== undefined) return buildWithin(adapters, how, bytes);
  return buildStreamed(adapters, { ...how, select: option.selection(options) }, scratch);
}

/** Small packs are made before threads have started, and each thread holds memory. */
function workersFor(adapterBytes: number): number {
  return Math.min(availableParallelism(), 8, 1 + Math.floor(adapterBytes / 10e6));
}

/** A runtime and the model, and what it is asked. */
async function askedOf(
  { model, text, tokenizer, tokens, ...runtime }: PackOptions,
  adapters: readonly Adapter[],
): Promise<{
  readonly model: { readonly engine: Engine; readonly model: string };
  readonly questions: Partial<Asked> & { readonly encode: Tokenizer };
}> {
  const asked = text === undefined ? {} : await readQuestions(text);
  const { ort, encode } = await openModel("pack", model!, { tokenizer, tokens }, asksPrompts(asked, adapters));
  return {
    model: { engine: engineOf(ort, runtime), model: model! },
    questions: { ...asked, encode },
  };
}

function nameOf({ basis, coefficients, head }: Dtypes): string {
  if (basis === coefficients && basis === head) return basis;
  return `basis=${basis},coefficients=${coefficients},head=${head}`;
}

function points(gain: number): string {
  const tenths = Math.round(1000 * gain);
  return `${tenths > 0 ? "+" : ""}${((tenths || 0) / 10).toFixed(1)} points`;
}

/**
 * Handles errors of making a pack: adds to one about too few bytes what else to ask for.
 * @param adapterBytes of all adapters together
 */
function addWaysOut(options: PackOptions, adapterBytes: number): (error: unknown) => never {
  const { ratio, dtype, rank } = options;
  return (error) => {
    if (!(error instanceof Unreachable) || error.least === undefined) throw error;
    const auto = modeOf(options) === "auto";
    // Rounded down: this one can be had.
    const most = Math.floor((10 * adapterBytes) / error.least) / 10;
    const what =
      ratio === undefined
        ? error.message
        : `--ratio ${ratio}: a pack of these adapters can be at most ${most.toFixed(1)}× smaller than they are`;
    const ways = [
      ...(auto && dtype ? ["leave out --dtype, so that fewer bits are tried"] : []),
      ...(!auto && !dtype?.basis?.startsWith("int") ? ["--dtype int4"] : []),
      ...(!auto && rank === undefined ? ["--gauge balanced --rank N, which keeps less of each adapter"] : []),
      ...(auto ? [] : ["--mode auto, which tries all ways of packing"]),
      ratio === undefined ? `--bytes ${error.least} or more` : `--ratio ${most} or less`,
    ];
    throw new RangeError(`${what}. Ways out: ${ways.join("; ")}`, { cause: error });
  };
}

// Accuracies of adapters beside those of their heads alone: the paper leaves out adapters that add little to their head. Callers with
// test rows measure the scores; this file reads them and splits the adapters.

/** Accuracy of an adapter with its head, and of that head alone with ΔW at zero; shares from 0 to 1. */
interface AdapterScore {
  readonly accuracy: number;
  readonly headOnly: number;
}

/** Scores by the name of an adapter's folder, in groups; a file without groups is one. */
type Scores = ReadonlyMap<string, ReadonlyMap<string, AdapterScore>>;

/** Tolerance for shares that are equal but for rounding: 0.12 − 0.1 is a little less than 0.02. */
const ROUNDING = 1e-9;

/**
 * Reads scores.json: `{ "folder": { "accuracy": 0.91, "accuracy_head_only": 0.62 }, … }`, or several of these by the name of a group, for
 * collections with adapters of the same names. Other fields are ignored.
 * @param json parsed
 * @param file its name, for messages
 * @throws AdapterError naming the entry and the field that is missing or no share
 */
export function readScores(json: unknown, file: string): Scores {
  const entries = fieldsOf(json, "", file);
  const flat = entries.every(([, entry]) => isObject(entry) && Object.values(entry).some((value) => !isObject(value)));
  const groups = flat ? [["", json] as const] : entries;
  return new Map(
    groups.map(([group, scores]) => [
      group,
      new Map(fieldsOf(scores, group, file).map(([name, entry]) => [name, scoreOf(entry, name, file)])),
    ]),
  );
}

/**
 * Splits adapters by what they gain over their own heads.
 * @param file of the scores, for messages
 * @returns those to keep, and those that gain less than `minGain`, with their gain; in the order of `adapters`
 * @throws AdapterError when an adapter has no score, or several groups have one and its folder names none of them
 * @throws RangeError when none is left
 * @example
 * const { kept } = partByGain(await readAdapters(["hub"]), readScores(JSON.parse(text), "scores.json"), 0.02, "scores.json");
 */
export function partByGain(
  adapters: readonly Adapter[],
  scores: Scores,
  minGain: number,
  file: string,
): { kept: Adapter[]; dropped: { id: string; gain: number }[] } {
  const unknown = adapters.filter((adapter) => groupsOf(adapter, scores).length === 0).map(describedName);
  if (unknown.length > 0) {
    const close = nearest(
      unknown[0]!,
      [...scores.values()].flatMap((group) => [...group.keys()]),
    );
    throw new AdapterError(
      `no scores of ${unknown.length} of ${adapters.length} adapters: ${unknown.slice(0, 5).join(", ")}${unknown.length > 5 ? ", …" : ""}` +
        `${close.length > 0 ? ` (nearest: ${close[0]})` : ""}; add them by the names of their folders, or pack without these adapters`,
      { file, field: unknown[0]! },
    );
  }
  const kept: Adapter[] = [];
  const dropped: { id: string; gain: number }[] = [];
  for (const adapter of adapters) {
    const { accuracy, headOnly } = scoreFor(adapter, scores, file);
    const gain = accuracy - headOnly;
    if (gain < minGain - ROUNDING) dropped.push({ id: adapter.id, gain });
    else kept.push(adapter);
  }
  if (kept.length === 0) {
    const most = Math.max(...dropped.map(({ gain }) => gain));
    throw new RangeError(
      `none of ${adapters.length} adapters gains ${minGain} over its head; the most is ${most.toPrecision(3)}`,
    );
  }
  return { kept, dropped };
}

/** Name in the scores: that of the folder or file, since scores were measured before a task is renamed. */
const describedName = ({ file }: Adapter): string => (segmentsOf(file).at(-1) ?? file).replace(/\.safetensors$/, "");

/** Segments of a path or address; a slash at the end is ignored. */
const segmentsOf = (file: string): string[] => file.split(/[/\\]/).filter((segment) => segment !== "");

const groupsOf = (adapter: Adapter, scores: Scores): string[] =>
  [...scores].filter(([, group]) => group.has(describedName(adapter))).map(([name]) => name);

function scoreFor(adapter: Adapter, scores: Scores, file: string): AdapterScore {
  const groups = groupsOf(adapter, scores);
  const folder = segmentsOf(adapter.file).at(-2) ?? "";
  const group = groups.length === 1 ? groups[0]! : groups.find((name) => name === folder);
  if (group === undefined) {
    throw new AdapterError(
      `"${describedName(adapter)}" is in the groups ${groups.join(", ")}, and its folder lies in "${folder}": give a file of one group, or call ` +
        "the folder like its group",
      { file, field: describedName(adapter) },
    );
  }
  return scores.get(group)!.get(describedName(adapter))!;
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function fieldsOf(value: unknown, name: string, file: string): [string, unknown][] {
  if (isObject(value) && Object.keys(value).length > 0) return Object.entries(value);
  const where = name === "" ? "it" : `"${name}"`;
  throw new AdapterError(
    `${where} is not an object of scores; expected { "adapter": { "accuracy": …, "accuracy_head_only": … } }`,
    {
      file,
      ...(name === "" ? {} : { field: name }),
    },
  );
}

function scoreOf(entry: unknown, name: string, file: string): AdapterScore {
  const share = (field: string, how: string): number => {
    const value = isObject(entry) ? entry[field] : undefined;
    if (value === undefined) throw new AdapterError(`"${name}" has no ${field}${how}`, { file, field: name });
    if (typeof value === "number" && value >= 0 && value <= 1) return value;
    throw new AdapterError(`${field} of "${name}" is ${show(value)}; expected a share from 0 to 1`, {
      file,
      field: name,
    });
  };
  return {
    accuracy: share("accuracy", ", the accuracy of the adapter with its head, from 0 to 1"),
    headOnly: share(
      "accuracy_head_only",
      ", the accuracy of its own head with LoRA off; measure it with switchTask({ TASK: 0 }), which brings the head and none of ΔW",
    ),
  };
}
