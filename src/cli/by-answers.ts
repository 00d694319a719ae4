/**
 * Packing with a model: the smallest pack whose tasks still answer as their adapters do, or the one of a size whose tasks answer most like
 * them (src/train/pack-by-answers.ts).
 * What is finished is kept beside the target, so that a command which was stopped goes on.
 */
import { createHash } from "node:crypto";
import { existsSync } from "node:fs";
import { join } from "node:path";
import type { Adapter } from "../adapters/adapter.ts";
import type { Pack } from "../core/pack.ts";
import { parseTaskFile } from "../core/task-file.ts";
import type { TaskToWrite } from "../format/encode.ts";
import type { Built } from "../pack/build.ts";
import type { BuildOptions } from "../pack/recipe.ts";
import type { Engine } from "../session/engine.ts";
import { toUtf8 } from "../text.ts";
import type { AnsweringTask, ByAnswersOptions, FinishedOutcomes } from "../train/answering.ts";
import { type ByAnswersReport, packByAnswers, tasksByAnswers } from "../train/pack-by-answers.ts";
import { asksPrompts, readQuestions } from "./examples.ts";
import { readText, writeWhole } from "./files.ts";
import { engineOf, openModel, runsOn, tokenizer, tokens } from "./model.ts";
import { number, type OptionSpec, POSITIVE, rarely, SHARE, text, type Values } from "./options.ts";
import { bytes, count, mean, type Output, percent, smaller, table } from "./output.ts";
import { reportText, sharedText } from "./pack-text.ts";
import type { Run } from "./run.ts";

/** Options of commands that judge tasks by answers. */
export const judged: {
  minutes: OptionSpec<number | undefined>;
  text: OptionSpec<string | undefined>;
  agreement: OptionSpec<number | undefined>;
  provider: OptionSpec<string | undefined>;
  threads: OptionSpec<number | undefined>;
  tokens: OptionSpec<number | undefined>;
  tokenizer: OptionSpec<string | undefined>;
} = {
  minutes: number(
    "N",
    "With --model: begin no further task after so many minutes. Tasks that are left are stored as without a model, and the exit code is 3. " +
      "Default: no limit.",
    POSITIVE,
  ),
  text: text(
    "LINES.txt",
    "Text like that of the tasks, one on each line, or JSON lines as learn takes them; never your test data. Default: made of the " +
      "words of the model's tokenizer.",
  ),
  ...rarely({
    agreement: number(
      "P",
      "With --model: the least agreement of a task's answers with its adapter's; others are stored closer. Default: 0.96 of labels, 0.98 of a language model's answers, 0.99 of all tokens of texts.",
      SHARE,
    ),
    ...runsOn,
    tokens,
    tokenizer,
  }),
};

/** What is packed by answers. */
export interface ByAnswers extends Omit<ByAnswersOptions, "signal" | "onProgress" | "finished" | keyof BuildOptions> {
  readonly engine: Engine;
  readonly model: string;
  readonly build: Pick<BuildOptions, "base" | "anyBase" | "workers">;
  /** The pack to write, and what the files hold that outcomes depend on. */
  readonly file: string;
  readonly inputs: readonly unknown[];
  /** Most tokens of a text. */
  readonly tokens: number | undefined;
}

/** @returns the pack, and the folder of what is finished, which is to be removed when the pack is written unless it was stopped */
export async function packedByAnswers(
  { engine, model, build, file, inputs, tokens, ...options }: ByAnswers,
  run: Run,
  out: Output,
): Promise<Built<ByAnswersReport> & { readonly finished: string }> {
  const finished = `${file}.partial`;
  await run.lock(finished);
  run.folder(finished);
  const signal = run.interrupts();
  signal.addEventListener("abort", () =>
    out.phase("stopping: what is finished is written, the rest as without a model; Ctrl-C again ends it at once"),
  );
  const { texts, examples, agreement, bytes, steps, names = [] } = options;
  const settings = JSON.stringify({ inputs, tokens, names: [...names], texts, examples, agreement, bytes, steps });
  out.phase("packing, loading the model");
  const built = await packByAnswers(engine, model, {
    ...options,
    ...build,
    signal,
    finished: finishedIn(finished, settings),
    onProgress: out.progress,
  });
  return { ...built, finished };
}

/** Adapters as tasks of a pack that exists, distilled onto what its tasks share. */
export async function addedByAnswers(
  pack: Pack,
  adapters: readonly Adapter[],
  { model, text, tokens, tokenizer, minutes, agreement, ...on }: Values<typeof judged> & { model: string },
  run: Run,
  out: Output,
): Promise<(TaskToWrite & Pick<AnsweringTask, "agreement" | "reason">)[]> {
  const asked = text === undefined ? {} : await readQuestions(text);
  out.phase("loading the model");
  const { ort, encode } = await openModel("add", model, { tokens, tokenizer }, asksPrompts(asked, adapters));
  const signal = run.interrupts();
  const how = { adapters, encode, ...asked, minutes, agreement, signal, onProgress: out.progress };
  const made = await tasksByAnswers(engineOf(ort, on), model, pack, how);
  return made.map(({ file, agreement, reason }) => {
    const { id, adapterBytes, metadata, brings, blob } = parseTaskFile(file, "a distilled task");
    return { entry: { id, adapterBytes, metadata, brings }, blob, agreement, reason };
  });
}

/** Outcomes as files of a folder. */
function finishedIn(folder: string, settings: string): FinishedOutcomes {
  const nameOf = (key: string): string => join(folder, createHash("sha256").update(settings).update(key).digest("hex"));
  return {
    nameOf,
    async read(key) {
      const path = nameOf(key);
      return existsSync(path) ? readText(path) : undefined;
    },
    write: async (key, json) => void (await writeWhole(nameOf(key), [toUtf8(json)])),
  };
}

/** How many answers are the adapters' own; undefined where tasks were not distilled. */
export function agreementText({ answers }: ByAnswersReport): string | undefined {
  const asked = answers.flatMap(({ agreement }) => agreement ?? []);
  return asked.length === 0 ? undefined : `on average ${percent(mean(asked))} of their answers are the adapters'`;
}

/** Exit code where `--minutes` left tasks without a turn. */
export const OUT_OF_TIME = 3;

const AGAIN = "Run the same command again with --force, and it goes on from there";

/** The report for people. */
export function byAnswersText(file: string, report: ByAnswersReport): string[] {
  const { tasks, adapterBytes, answers, ratio, components, shared, steps, left } = report;
  if (answers.length === 0)
    return [
      ...reportText(file, report),
      left.length > 0
        ? `Stopped before enough tasks were distilled: the pack is as without a model. ${AGAIN}.`
        : "By answers, it would take no fewer bytes: the pack is as without a model.",
    ];
  const asked = answers.flatMap(({ agreement }) => agreement ?? []);
  const least = answers.reduce((a, b) => ((b.agreement ?? 2) < (a.agreement ?? 2) ? b : a));
  const kept = (...names: string[]): number => answers.filter((one) => names.includes(one.kept)).length;
  const blobs = mean(answers.map((one) => one.bytes));
  const refused = answers.filter(({ reason }) => reason !== undefined);
  return [
    `${file}: ${count(tasks, "task")}, ${bytes(report.bytes)}`,
    ...table([
      ["", "adapters", "pack"],
      ["size", bytes(adapterBytes), `${bytes(report.bytes)} (${smaller(ratio)})`],
      ["one task, on average", bytes(adapterBytes / tasks), bytes(blobs)],
      ...(asked.length > 0
        ? [
            [
              "answers like the adapter's, mean / least",
              "100.0 %",
              `${percent(mean(asked))} / ${percent(least.agreement!)} (${least.id})`,
            ],
          ]
        : []),
    ]),
    ...(shared
      ? sharedText(shared, report)
      : [
          `All tasks share ${count(components.max, "component")} of what each layer reads and writes, stored once; a task is how it mixes them.`,
        ]),
    `${count(kept("distilled", "projected"), "task")} ${steps > 0 ? `distilled, in ${count(steps, "training step")} at most` : "solved for answers, without training"}` +
      `${kept("closer") > 0 ? `; ${kept("closer")} with numbers of their own, since their answers differed too much` : ""}.`,
    ...refused.map(({ reason }) => `${reason}. It is stored by its ΔW alone.`),
    ...(left.length > 0
      ? [`${count(left.length, "task")} not distilled, since the command was stopped: ${left.join(", ")}. ${AGAIN}.`]
      : []),
    "Answers are those to questions held back. What they cost you in right answers, your own test data tells.",
  ];
}
