/**
 * Packing to a criterion: a budget of bytes, an error, or a divergence between the answers of adapters and pack.
 */
import { readFile } from "node:fs/promises";
import { createEngine } from "../../bindings/ort-engine.ts";
import type { Adapter } from "../adapters/adapter.ts";
import { SourceError } from "../errors.ts";
import { type BuildOptions, type Built, buildPack } from "../pack/build.ts";
import type { Goal } from "../pack/goal.ts";
import type { BuildReport } from "../pack/report.ts";
import { type SearchReport, searchPack } from "../pack/search.ts";
import type { Engine } from "../session/engine.ts";
import { createJudge, type JudgeOptions } from "../train/judge.ts";
import { inputMoments, type MomentsOptions } from "../train/moments.ts";
import { type Arguments, choice, number, required, selection, UsageError, wholeNumber } from "./args.ts";
import { type Encode, loadRuntime, loadTokenizer } from "./model.ts";
import { bytes, type Output, percent, table } from "./output.ts";

type Common = Pick<BuildOptions, "dtype" | "base" | "normalize">;

/** What `pack` was asked for, read before anything else is. */
export interface PackPlan {
  run(adapters: readonly Adapter[], common: Common, out: Output): Promise<Built<BuildReport | SearchReport>>;
}

const UNITS: Readonly<Record<string, number>> = { "": 1, B: 1, kB: 1e3, MB: 1e6, GB: 1e9 };

/** @throws UsageError for options that do not go together */
export function planOf(args: Arguments): PackPlan {
  const asked = (...names: string[]): string[] => names.filter((name) => args.text(name) !== undefined);
  const mode = choice(args, "mode", ["column", "flat", "joint", "auto"] as const, "column");
  const budgets = asked("bytes", "ratio", "error", "divergence", "k", "energy");
  if (budgets.length > 1) throw new UsageError(`--${budgets.join(" and --")} exclude each other`);
  const calibrate = args.flag("calibrate");
  if (mode === "auto") {
    const own = asked("gauge", "rank", "private-terms", "centering", "k", "energy");
    if (own.length > 0) throw new UsageError(`--mode auto chooses --${own[0]} itself; leave it out, or name a mode`);
    if (budgets.length === 0)
      throw new UsageError("--mode auto needs to know what for: --bytes, --ratio, --error or --divergence");
    if (asked("model", "text").length === 1)
      throw new UsageError("--model and --text go together: answers to the text are what packs are judged by");
    if (calibrate && asked("model").length === 0) throw new UsageError("--calibrate needs --model and --text");
    if (budgets[0] === "divergence" && asked("model").length === 0)
      throw new UsageError("--divergence needs --model and --text");
    return { run: (adapters, common, out) => runAuto(args, adapters, common, out) };
  }
  const foreign = asked("divergence", ...(calibrate ? [] : ["model", "text", "tokenizer", "tokens"]));
  if (foreign.length > 0)
    throw new UsageError(`--${foreign[0]} is for --mode auto${foreign[0] === "divergence" ? "" : " and --calibrate"}`);
  if (calibrate && asked("model", "text").length < 2) throw new UsageError("--calibrate needs --model and --text");
  const gauge = asked("rank", "private-terms").length > 0 ? "balanced" : "as-trained";
  const options = {
    mode,
    gauge: choice(args, "gauge", ["as-trained", "balanced"] as const, gauge),
    ...(asked("rank").length > 0 ? { rank: wholeNumber(args, "rank", 1) } : {}),
    ...(asked("private-terms").length > 0 ? { privateTerms: wholeNumber(args, "private-terms", 1) } : {}),
    ...(args.text("centering") === undefined
      ? {}
      : { centering: choice(args, "centering", ["keep", "none"] as const, "keep") }),
  };
  const size = asked("bytes", "ratio").length > 0;
  const select = size ? undefined : selection(args);
  return {
    run: async (adapters, common, out) => {
      const moments = calibrate ? await inputMoments(...(await textsOf(args, adapters))) : undefined;
      const all = { ...options, ...common, moments };
      if (!select) {
        const goal = { kind: "bytes", max: sizeOf(args, adapters) } as const;
        const { chunks, report } = await searchPack(adapters, { goal, ways: [all] });
        const { name: _, way: __, judgedBy: ___, tried: ____, ...plain } = report;
        return { chunks, report: plain };
      }
      return buildPack(adapters, { ...all, select, onProgress: (done, of) => out.progress("module", done, of) });
    },
  };
}

/** --bytes 300kB, or --ratio 60. */
function sizeOf(args: Arguments, adapters: readonly Adapter[]): number {
  const text = args.text("bytes");
  if (text === undefined) {
    const ratio = number(args, "ratio", NaN, (n) => n > 0 && n < Infinity, "how many times smaller than the adapters");
    return Math.floor(adapters.reduce((sum, { byteLength }) => sum + byteLength, 0) / ratio);
  }
  const [, digits = "", unit = ""] = /^([\d.]+) ?([a-zA-Z]*)$/.exec(text) ?? [];
  const size = Math.floor(Number(digits) * (UNITS[unit] ?? NaN));
  if (!(digits !== "" && size > 0))
    throw new UsageError(`--bytes ${text}: expected a size such as 300000, 300kB or 1.5MB`);
  return size;
}

function goalOf(args: Arguments, adapters: readonly Adapter[]): Goal {
  if (args.text("divergence") !== undefined) {
    return { kind: "divergence", max: number(args, "divergence", NaN, (n) => n > 0 && n < Infinity, "nats above 0") };
  }
  if (args.text("error") === undefined) return { kind: "bytes", max: sizeOf(args, adapters) };
  return { kind: "error", max: number(args, "error", NaN, (n) => n > 0 && n < 1, "a share between 0 and 1") };
}

async function runAuto(
  args: Arguments,
  adapters: readonly Adapter[],
  common: Common,
  out: Output,
): Promise<Built<SearchReport>> {
  const asked = args.text("model") === undefined ? undefined : await textsOf(args, adapters);
  const judge = asked && createJudge(...asked);
  const moments = args.flag("calibrate") ? asked && (await inputMoments(...asked)) : undefined;
  try {
    return await searchPack(adapters, {
      ...common,
      goal: goalOf(args, adapters),
      judge: judge?.judge,
      moments,
      onTry: ({ name }, done, of) => out.progress(`tried ${name}:`, done, of),
    });
  } finally {
    await judge?.close();
  }
}

/** A runtime, the model, and what it is asked. */
async function textsOf(
  args: Arguments,
  adapters: readonly Adapter[],
): Promise<[Engine, string, MomentsOptions & JudgeOptions]> {
  const model = required(args, "model");
  const texts = await readLines(required(args, "text"));
  const ort = await loadRuntime("pack");
  const tokenizer = await loadTokenizer("pack", ort, model, args.text("tokenizer"), wholeNumber(args, "tokens", 128));
  let encode: Encode | undefined;
  return [
    createEngine(ort),
    model,
    { adapters, texts, encode: (some, inputs) => (encode ??= tokenizer(inputs))(some) },
  ];
}

/** Texts, one on each line, without what is there twice. @throws SourceError when there is none */
export async function readLines(path: string): Promise<string[]> {
  const text = await readFile(path, "utf8").catch((cause: Error) => {
    throw new SourceError(`cannot be read: ${cause.message}`, { file: path, cause });
  });
  const lines = [...new Set(text.split(/\r?\n/).map((line) => line.trim()))].filter((line) => line !== "");
  if (lines.length === 0) throw new SourceError("has no text; expected one on each line", { file: path });
  return lines;
}

/** What was tried, the best last. */
export function autoText({ judgedBy, divergence, tried }: SearchReport): string {
  const rows = tried.map(({ name, bytes: size, error, divergence: kl }) => [
    name,
    size === undefined ? "out of reach" : bytes(size),
    error === undefined ? "" : percent(error),
    ...(judgedBy === "divergence" ? [kl === undefined ? "" : kl.toFixed(4)] : []),
  ]);
  const head = ["tried", "size", "ΔW error", ...(judgedBy === "divergence" ? ["KL"] : [])];
  const verdict =
    judgedBy === "divergence"
      ? `Chosen by answers to the text: mean KL(adapter ‖ pack) ${divergence?.toFixed(4)}. eigenlora distill may win more of it back.`
      : "Chosen by ΔW error, which is a proxy: with --model and --text answers decide.";
  return [table([head, ...rows]), verdict].join("\n");
}
