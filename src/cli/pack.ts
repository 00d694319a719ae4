/**
 * The command pack: makes a pack from adapters, with a number of components or by a criterion: a budget of bytes, an error, or the
 * answers of adapters and pack.
 */

import { rmdir } from "node:fs/promises";
import { availableParallelism } from "node:os";
import { type Adapter, commonBase } from "../adapters/adapter.ts";
import { type Built, buildStreamed, type Streamed } from "../pack/build.ts";
import type { BuildReport } from "../pack/report.ts";
import { type SearchOptions, type SearchReport, searchStreamed } from "../pack/search.ts";
import { Unreachable } from "../pack/seek.ts";
import { DEFAULT_ERROR } from "../pack/tasks.ts";
import type { Engine } from "../session/engine.ts";
import type { Tokenizer } from "../session/tokens.ts";
import type { Dtypes } from "../tensor/dtypes.ts";
import type { ByAnswersReport } from "../train/pack-by-answers.ts";
import { agreementText, byAnswersText, judged, OUT_OF_TIME, packedByAnswers } from "./by-answers.ts";
import { type Attach, command } from "./command.ts";
import { type Asked, asksPrompts, readQuestions } from "./examples.ts";
import { openScratch } from "./files.ts";
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

/** A size in bytes, or the adapters' divided by a number. */
type Size = number | { readonly ratio: number };

const size: option.OptionSpec<Size | undefined> = {
  value: "SIZE",
  help: "The best pack of at most this size: 300kB, 1.5MB, or 1/60 of the adapters' files.",
  parse(given, flag) {
    const [, divisor = ""] = /^1\/([\d.]+)$/.exec(given) ?? [];
    if (Number(divisor) > 0) return { ratio: Number(divisor) };
    const [, digits = "", unit = ""] = /^([\d.]+) ?([kmg]?i?)b?$/i.exec(given) ?? [];
    const found = Math.floor(Number(digits) * (UNITS[unit.toLowerCase()] ?? NaN));
    if (digits !== "" && found > 0) return found;
    throw new option.UsageError(`${flag} ${given}: expected a size such as 300000, 300kB, 1.5MB or 1/60`);
  },
};

/** Options of packs that a model judges; it runs in as many threads as there are cores. */
const { threads: _, ...answers } = judged;

const OPTIONS = {
  output: option.output("PACK", "The pack to write."),
  force: option.force,
  ...option.group(`How much to keep, one of these. Default: --error ${DEFAULT_ERROR}`, {
    error: option.amount.error,
    bytes: size,
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
      dtype: option.dtypeOrChosen,
      rank: option.rank,
      step: option.number(
        "S",
        "Store terms as entropy-coded integers. When one goes up by 1, its module's ΔW changes by S times the typical norm of ΔW. " +
          "0.05 takes about three bits a number, 0.1 two. With --k or --energy. Default: as --dtype says.",
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
    ...answers,
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
    const { output: file, force, base, model, text, tokenizer } = options;
    const target = await run.target(file, { force, inputs: [base, model, text, tokenizer] });
    const adapters = await run.adapters(paths, options.as, base);
    target.refuse(adapters.flatMap(filesOf));
    const modules = adapters.flatMap((adapter) => [...adapter.modules.values()]);
    refuseUnknown(options.names, modules, paths.join(", "));
    const adapterBytes = sum(adapters.map(({ byteLength }) => byteLength));
    const built = build(adapters, options, run, out).catch(addWaysOut(options, adapterBytes));
    const { chunks, report, finished } = await built;
    await target.write(chunks);
    const byAnswers = "answers" in report;
    const left = byAnswers && report.left.length > 0;
    if (finished !== undefined) await (left ? rmdir(finished).catch(() => undefined) : removeFinished(finished));
    for (const warning of report.warnings) out.warn(warning);
    const took = resources();
    // A base without weights was warned of.
    const notes = base === undefined ? report.notes.map((note) => inFlags(note, OPTIONS)) : [];
    // A card that names a base speaks for all adapters.
    const cardBase = adapters.every(({ baseModel }) => baseModel !== undefined) ? commonBase(adapters) : undefined;
    return {
      json: { file, ...report, notes, dtype: nameOf(report.dtype), ...took },
      text: [
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

/** Options of components that all tasks share; the others choose by themselves. */
const COMPONENTS = ["k", "energy", "rank", "step"] as const;

/** Options of packs that a model judges. */
const BY_ANSWERS = ["text", "tokenizer", "tokens", "minutes", "agreement", "distill", "provider"] as const;

/** Whether all tasks share components. */
function sharesComponents(options: PackOptions): boolean {
  const { basis, coefficients } = options.dtype ?? {};
  return option.given(options, ...COMPONENTS).length > 0 || basis !== undefined || coefficients !== undefined;
}

/** @throws UsageError for options that do not go together */
function checkOptions(options: PackOptions): void {
  const budget = option.exclusive(options, "bytes", "error", "k", "energy");
  const { model, dtype } = options;
  if (model !== undefined && dtype)
    throw new option.UsageError(
      "--dtype is for packs without --model: with it, numbers are as coarse as answers allow",
    );
  if (sharesComponents(options)) {
    if (budget !== undefined && budget !== "--k" && budget !== "--energy")
      throw new option.UsageError(
        `${budget} chooses what is stored: leave out --rank, --step, and the basis and coefficients of --dtype; or say --k or --energy`,
      );
    const [other] = option.given(options, "model", ...BY_ANSWERS);
    if (other !== undefined)
      throw new option.UsageError(
        `${other} chooses what is stored: leave out --k, --energy, --rank, --step and --dtype`,
      );
  }
  const [needs] = model === undefined ? option.given(options, ...BY_ANSWERS) : [];
  if (needs !== undefined)
    throw new option.UsageError(`${needs} needs --model: its answers are what packs are judged by`);
  if (model !== undefined && budget === "--error")
    throw new option.UsageError("--error is about ΔW, with --model answers decide: leave it out, or take --agreement");
  if (options.agreement !== undefined && budget !== undefined)
    throw new option.UsageError(`--agreement is for packs without a size: leave ${budget} out`);
  if (options.step !== undefined && (dtype?.basis ?? dtype?.coefficients) !== undefined)
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
  const { rank, step, bytes: size, error = DEFAULT_ERROR, dtype } = options;
  const adapterBytes = sum(adapters.map(({ byteLength }) => byteLength));
  const bytes = typeof size === "object" ? Math.floor(adapterBytes / size.ratio) : size;
  const { workers = workersFor(adapterBytes) } = options;
  const scratch = run.closing(openScratch(options.output));
  const common = { workers, anyBase: options.anyBase, ...(await run.base(options.base, options.names)) };
  if (options.model !== undefined) {
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
  const { progress: onProgress } = out;
  if (sharesComponents(options))
    return buildStreamed(
      adapters,
      { ...common, onProgress, rank, step, dtype, select: option.selection(options) },
      scratch,
    );
  const goal: SearchOptions["goal"] =
    bytes === undefined ? { kind: "error", max: error } : { kind: "bytes", max: bytes };
  return searchStreamed(adapters, { ...common, head: dtype?.head, goal, onProgress }, scratch);
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
    model: { engine: engineOf(ort, { ...runtime, threads: undefined }), model: model! },
    questions: { ...asked, encode },
  };
}

function nameOf({ basis, coefficients, head }: Dtypes): string {
  if (basis === coefficients && basis === head) return basis;
  return `basis=${basis},coefficients=${coefficients},head=${head}`;
}

/**
 * Handles errors of making a pack: adds to one about too few bytes what else to ask for.
 * @param adapterBytes of all adapters together
 */
function addWaysOut({ bytes }: PackOptions, adapterBytes: number): (error: unknown) => never {
  return (error) => {
    if (!(error instanceof Unreachable) || error.least === undefined) throw error;
    if (typeof bytes !== "object")
      throw new RangeError(`${error.message}: ask for --bytes ${error.least} or more`, { cause: error });
    // Rounded down: this one can be had.
    const most = Math.floor((10 * adapterBytes) / error.least) / 10;
    const message = `--bytes 1/${bytes.ratio}: a pack of these adapters can be at most ${most.toFixed(1)}× smaller than they are`;
    throw new RangeError(`${message}: ask for --bytes 1/${most} or more`, { cause: error });
  };
}
