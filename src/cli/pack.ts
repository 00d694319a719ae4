/**
 * The command pack: makes a pack from adapters, with a number of components or by a criterion: a size, an error, or,
 * with a model, the answers of adapters and pack. Without a model no session, ONNX or trainer is loaded.
 */
import { existsSync } from "node:fs";
import { availableParallelism } from "node:os";
import type { Adapter } from "../adapters/adapter.ts";
import { filesOf } from "../adapters/formats.ts";
import { listed } from "../errors.ts";
import { type Built, buildStreamed, type Streamed } from "../pack/build.ts";
import type { BuildReport, SharedReport } from "../pack/report.ts";
import { type SearchOptions, type SearchReport, searchStreamed } from "../pack/search.ts";
import { Unreachable } from "../pack/seek.ts";
import { DEFAULT_ERROR } from "../pack/tasks.ts";
import { type Dtypes, mean, sum } from "../tensor/dtypes.ts";
import type { ByAnswersReport } from "../train/pack-by-answers.ts";
import { type Attach, command, OUT_OF_TIME, type Run } from "./command.ts";
import { openScratch } from "./files.ts";
import * as option from "./options.ts";
import { bytes, count, type Output, percent, range, resources, sharing, smaller, table } from "./output.ts";

/** Units of a size, without their "B". */
const UNITS: Readonly<Record<string, number>> = { "": 1, k: 1e3, m: 1e6, g: 1e9 };

type Size = number | { readonly ratio: number };

const size: option.Maybe<Size> = {
  value: "SIZE",
  help: "The best pack of at most this size: 300kB, 1.5MB, or 1/60 of the adapters' files.",
  parse(given, flag) {
    const [, divisor = ""] = /^1\/([\d.]+)$/.exec(given) ?? [];
    if (Number(divisor) > 0) return { ratio: Number(divisor) };
    const [, digits = "", unit = ""] = /^([\d.]+) ?([kmg]?)b?$/i.exec(given) ?? [];
    const found = Math.floor(Number(digits) * UNITS[unit.toLowerCase()]!);
    if (digits !== "" && found > 0) return found;
    throw new option.UsageError(`${flag} ${given}: expected a size such as 300000, 300kB, 1.5MB or 1/60`);
  },
};

/** Options that settle how terms are stored. Otherwise the packer tries all ways. */
const settled = option.each(
  {
    excludes: {
      model: "with a model, answers decide how tasks are stored",
      error: "an error decides what is stored",
      bytes: "a size decides what is stored",
    },
  },
  {
    k: option.k,
    energy: {
      ...option.energy,
      rare: true,
      help: "As many components as keep this share of the squared singular values.",
    },
    ...option.each(
      { rare: true, needs: ["k", "energy"] },
      {
        rank: option.rank,
        step: option.number(
          "S",
          "Store terms as entropy-coded integers. When one goes up by 1, its module's ΔW changes by S times the typical norm of ΔW. " +
            "0.05 takes about three bits a number, 0.1 two. Default: as --dtype says.",
          { ...option.POSITIVE, expected: "a share of the norm of ΔW, such as 0.07" },
        ),
      },
    ),
  },
);
const { k, energy, ...how } = settled;
const ofNumbers = option.dtype("basis", "coefficients", "head");

const OPTIONS = {
  output: option.output("PACK", "The pack to write."),
  force: option.force,
  ...option.group(
    `How much to keep, one of these. Default: --error ${DEFAULT_ERROR}`,
    option.oneOf({
      error: {
        ...option.number("E", "Fewest bytes for which no task's ΔW error exceeds E.", option.SHARE),
        excludes: { model: "with a model, answers decide: take --agreement" },
      },
      bytes: size,
      k,
      energy,
    }),
  ),
  ...option.group("How", {
    base: option.base,
    ...how,
    dtype: {
      ...ofNumbers,
      rare: true,
      help: `${ofNumbers.help} Without --k or --energy: those that lose least for their bytes, and only head= may be given.`,
      excludes: { model: "with a model, numbers are as coarse as answers allow" },
    },
    ...option.each(
      { rare: true },
      {
        names: option.names,
        workers: option.number(
          "N",
          "Threads that extract modules; the pack is the same. Default: one for each core and 10 MB of adapters, 8 at most.",
          option.from(1),
        ),
      },
    ),
  }),
  ...option.group("Judged by answers", {
    model: option.text(
      "MODEL.onnx",
      "The smallest pack whose tasks answer as their adapters do; with a size, the one whose tasks do so most. Needs onnxruntime-node.",
      "model",
    ),
    ...option.judged,
    agreement: {
      ...option.judged.agreement,
      excludes: { bytes: "it is for packs without a size" },
    },
    distill: {
      ...option.number(
        "STEPS",
        "Most training steps of a task, which end earlier where they gain no more; 0 for none. Default: 240; 24 of a language model.",
        option.from(0),
      ),
      ...{ needs: ["model"], rare: true },
    },
  }),
  ...option.group("Which adapters", { as: option.as, anyBase: { ...option.anyBase, rare: true } }),
};

type PackOptions = option.Values<typeof OPTIONS>;

export const pack: Attach = command({
  usage: "pack <ADAPTER_OR_FOLDER...>",
  details: "The report says what the tasks lost, and how much smaller the pack is than the adapters.",
  example: "pack my-adapters/ -o tasks.eigen --base my-base/",
  options: OPTIONS,
  reads: ["repository"],
  async run(paths, options, run, out) {
    const { output: file, force, base, model, text, tokenizer, step, dtype, k, energy } = options;
    const numbers = dtype?.basis ?? dtype?.coefficients;
    if (numbers && step !== undefined)
      throw new option.UsageError("--step decides the bits of components and coefficients: give only head= of --dtype");
    if (numbers && (k ?? energy) === undefined)
      throw new option.UsageError(
        "--dtype needs --k or --energy: otherwise a size or an error decides; only head= may be given",
      );
    const target = await run.target(file, { force, inputs: [base, model, text, tokenizer] });
    const adapters = await run.adapters(paths, options.as, base);
    target.refuse(adapters.flatMap(filesOf));
    const modules = adapters.flatMap((adapter) => [...adapter.modules.values()]);
    option.refuseUnknown(options.names, modules, paths.join(", "));
    const { chunks, report, finish } = await build(adapters, options, run, out);
    await target.write(chunks);
    const byAnswers = "answers" in report;
    const left = byAnswers && report.left.length > 0;
    await finish?.(left);
    for (const warning of report.warnings) out.warn(warning);
    const took = resources();
    // A base without weights was warned of.
    const notes = base === undefined ? report.notes.map((note) => option.inFlags(note, OPTIONS)) : [];
    return {
      json: { file, ...report, notes, dtype: nameOf(report.dtype), ...took },
      text: [
        ...(byAnswers ? byAnswersText(file, report) : reportText(file, report)),
        ...("tried" in report ? triedText(report) : []),
        ...(byAnswers ? [] : ["ΔW error is a proxy: with --model answers decide."]),
        ...notes,
        `${took.seconds.toFixed(2)} s`,
      ],
      ...(left && { exitCode: OUT_OF_TIME }),
    };
  },
});

type Packed = (Streamed<BuildReport | SearchReport> | Built<ByAnswersReport>) & {
  /** Removes what was kept to go on from; `left` says that tasks are left. */
  readonly finish?: (left: boolean) => Promise<void>;
};

async function build(adapters: readonly Adapter[], options: PackOptions, run: Run, out: Output): Promise<Packed> {
  const { rank, step, bytes: size, error = DEFAULT_ERROR, dtype, k, energy } = options;
  const adapterBytes = sum(adapters.map(({ byteLength }) => byteLength));
  const most = typeof size === "object" ? Math.floor(adapterBytes / size.ratio) : size;
  // Small packs are made before threads have started, and each thread holds memory.
  const { workers = Math.min(availableParallelism(), 8, 1 + Math.floor(adapterBytes / 10e6)) } = options;
  const common = { workers, anyBase: options.anyBase, ...(await run.base(options.base, options.names)) };
  const fail = (cause: unknown): never => {
    throw cause instanceof Unreachable ? withWayOut(cause, size, adapterBytes) : cause;
  };
  if (options.model !== undefined) {
    const { packedByAnswers } = await import("./by-answers.ts");
    const asked = { ...options, model: options.model, bytes: most };
    return packedByAnswers(adapters, asked, common, run, out).catch(fail);
  }
  const scratch = run.closing(openScratch(options.output));
  const { progress: onProgress } = out;
  if (k !== undefined || energy !== undefined) {
    const select = option.selection({ k, energy });
    return buildStreamed(adapters, { ...common, onProgress, rank, step, dtype, select }, scratch);
  }
  const goal: SearchOptions["goal"] = most === undefined ? { kind: "error", max: error } : { kind: "bytes", max: most };
  return searchStreamed(adapters, { ...common, head: dtype?.head, goal, onProgress }, scratch).catch(fail);
}

/** Adds to an error about too few bytes how many are enough. @param adapterBytes of all adapters together */
function withWayOut(error: Unreachable, size: Size | undefined, adapterBytes: number): Error {
  if (error.least === undefined) return error;
  if (typeof size !== "object")
    return new RangeError(`${error.message}: ask for --bytes ${error.least} or more`, { cause: error });
  // Rounded down, so that it can be reached.
  const most = Math.floor((10 * adapterBytes) / error.least) / 10;
  const problem = `--bytes 1/${size.ratio}: a pack of these adapters can be at most ${most.toFixed(1)}× smaller than they are`;
  return new RangeError(`${problem}: ask for --bytes 1/${most} or more`, { cause: error });
}

function nameOf({ basis, coefficients, head }: Dtypes): string {
  if (basis === coefficients && basis === head) return basis;
  return `basis=${basis},coefficients=${coefficients},head=${head}`;
}

// Reports for people.

function reportText(file: string, report: BuildReport): string[] {
  const { errors, components, breakEvenTasks, shared, tasks } = report;
  const totals = errors.map(({ total }) => total);
  return [
    `${file}: ${count(tasks, "task")}, ${count(report.modules, "module")}, ${bytes(report.bytes)}`,
    ...table([
      ["", "adapters", "pack"],
      ...sizeRows(report),
      ["ΔW error of a task, mean / largest", "0", `${percent(mean(totals))} / ${percent(Math.max(0, ...totals))}`],
      ...(shared
        ? [["one task, on average", bytes(report.adapterBytes / tasks), bytes((report.bytes - shared.bytes) / tasks)]]
        : [["components per side", "", components.max > 0 ? range(components.min, components.max) : "none"]]),
    ]),
    ...(shared ? sharedText(shared, report) : components.max > 0 ? [sharing(breakEvenTasks)] : []),
  ];
}

/** Fingerprints have a row of their own: in the pack of one small adapter they can be a fifth of it. */
function sizeRows({ adapterBytes, bytes: whole, ratio, fingerprints }: BuildReport): string[][] {
  const rows = [["size", bytes(adapterBytes), `${bytes(whole)} (${smaller(ratio)})`]];
  return fingerprints > 0 ? [...rows, ["of it, fingerprints of the base", "", bytes(fingerprints)]] : rows;
}

/** Factors that tasks share, and the bytes that this saves. */
function sharedText({ A, B, bytes: stored, saved }: SharedReport, { tasks, modules }: BuildReport): string[] {
  if (tasks === 1) return [];
  const factor = (name: string, one: SharedReport["A"]): string[] =>
    one.tasks > 0 ? [`${name}, by ${one.tasks} of ${tasks} tasks in ${one.modules} of ${modules} modules`] : [];
  const factors = [...factor("what layers read (A)", A), ...factor("what they write (B)", B)];
  if (factors.length === 0)
    return ["Nothing is shared: no adapters are alike enough for that to save bytes. Each task is stored by itself."];
  return [`Shared: ${factors.join("; ")}. Stored once, that takes ${bytes(stored)} and saves ${bytes(saved)}.`];
}

function triedText({ tried }: SearchReport): string[] {
  const rows = tried.map(({ name, bytes: size, error }) => [
    name,
    size === undefined ? "out of reach" : bytes(size),
    error === undefined ? "" : percent(error),
  ]);
  return tried.length > 1 ? table([["tried", "size", "ΔW error"], ...rows]) : [];
}

function byAnswersText(file: string, report: ByAnswersReport): string[] {
  const { tasks, adapterBytes, answers, components, shared, steps, left } = report;
  const goesOn = existsSync(`${file}.partial`) ? ", and it goes on from there" : "";
  const again = `Run the same command again with --force${goesOn}`;
  if (answers.length === 0)
    return [
      ...reportText(file, report),
      left.length > 0
        ? `Stopped before enough tasks were distilled: the pack is as without a model. ${again}.`
        : "By answers, it would take no fewer bytes: the pack is as without a model.",
    ];
  const asked = answers.flatMap(({ agreement }) => agreement ?? []);
  const least = answers.reduce((a, b) => ((b.agreement ?? 2) < (a.agreement ?? 2) ? b : a));
  const unlike = answers.filter(({ agreement = 1, wanted = 0 }) => agreement < wanted);
  const stored = (...names: string[]): number => answers.filter(({ kept }) => names.includes(kept)).length;
  const agreement = ["answers like the adapter's, mean / least", "100.0 %"];
  return [
    `${file}: ${count(tasks, "task")}, ${bytes(report.bytes)}`,
    ...table([
      ["", "adapters", "pack"],
      ...sizeRows(report),
      ["one task, on average", bytes(adapterBytes / tasks), bytes(mean(answers.map(({ bytes }) => bytes)))],
      ...(asked.length > 0
        ? [[...agreement, `${percent(mean(asked))} / ${percent(least.agreement!)} (${least.id})`]]
        : []),
    ]),
    ...(shared
      ? sharedText(shared, report)
      : [
          `All tasks share ${count(components.max, "component")} of what each layer reads and writes, stored once; a task is how it mixes them.`,
        ]),
    `${count(stored("distilled", "projected"), "task")} ${steps > 0 ? `distilled, in ${count(steps, "training step")} at most` : "solved for answers, without training"}` +
      `${stored("closer") > 0 ? `; ${stored("closer")} with numbers of their own, since their answers differed too much` : ""}.`,
    ...answers.flatMap(({ reason }) => (reason === undefined ? [] : [`${reason}. It is stored by its ΔW alone.`])),
    ...(unlike.length > 0
      ? [
          `Less alike than asked (${percent(unlike[0]!.wanted!)}): ${listed(unlike.map(({ id }) => id))}. ` +
            "Without --model, --error 0.05 keeps more.",
        ]
      : []),
    ...(left.length > 0
      ? [`${count(left.length, "task")} not distilled, since the command was stopped: ${left.join(", ")}. ${again}.`]
      : []),
    "Answers are those to questions held back. What they cost you in right answers, your own test data tells.",
  ];
}
