/**
 * Packing and adding with a model: the smallest tasks that still answer as their adapters do, or those of a size that
 * answer most like them. Loaded by `--model` alone. Outcomes are kept in a folder until the pack is written, so that a
 * command which was stopped goes on.
 */
import { rmdir } from "node:fs/promises";
import { createEngine } from "../../bindings/ort-engine.ts";
import type { Adapter } from "../adapters/adapter.ts";
import type { Pack } from "../core/pack.ts";
import { taskIn } from "../core/read-task-file.ts";
import type { TaskToWrite } from "../format/encode.ts";
import type { Built } from "../pack/build.ts";
import type { BuildOptions } from "../pack/recipe.ts";
import { type AnsweringTask, type ByAnswersReport, packByAnswers, tasksByAnswers } from "../train/pack-by-answers.ts";
import type { Run } from "./command.ts";
import { makeFolder } from "./files.ts";
import { asksPrompts, contents, finishedIn, modelDigest, openModel, readQuestions, removeFinished } from "./model.ts";
import type { judged, Values } from "./options.ts";
import type { Output } from "./output.ts";

type JudgedOptions = Values<typeof judged> & { readonly model: string };

interface PackOptions extends JudgedOptions {
  readonly output: string;
  readonly names: ReadonlyMap<string, string>;
  readonly bytes: number | undefined;
  readonly distill: number | undefined;
}

export async function packedByAnswers(
  adapters: readonly Adapter[],
  options: PackOptions,
  build: Pick<BuildOptions, "base" | "anyBase" | "workers">,
  run: Run,
  out: Output,
): Promise<Built<ByAnswersReport> & { finish(left: boolean): Promise<void> }> {
  const { output, model, tokenizer, tokens, names, minutes, agreement, bytes, distill: steps } = options;
  const { ort, encode, asked } = await opened("pack", options, adapters);
  const inputs = { model: await modelDigest(model, tokenizer), adapters: await contents(adapters, out) };
  const folder = `${output}.partial`;
  makeFolder(folder);
  const signal = run.interrupts();
  signal.addEventListener("abort", () =>
    out.phase("stopping: what is finished is written, the rest as without a model; Ctrl-C again ends it at once"),
  );
  out.phase("packing, loading the model");
  const built = await packByAnswers(createEngine(ort), model, {
    ...{ adapters, encode, ...asked, names, minutes, agreement, bytes, steps, ...build, signal },
    finished: finishedIn(folder, { inputs, tokens, names: [...names], ...asked, agreement, bytes, steps }),
    onProgress: out.progress,
  });
  return {
    ...built,
    finish: (left) => (left ? rmdir(folder).catch(() => undefined) : removeFinished(folder)),
  };
}

/** Adapters as tasks of a pack that exists, distilled onto what its tasks share. */
export async function addedByAnswers(
  pack: Pack,
  adapters: readonly Adapter[],
  options: JudgedOptions,
  run: Run,
  out: Output,
): Promise<(TaskToWrite & Pick<AnsweringTask, "agreement" | "reason">)[]> {
  const { model, minutes, agreement } = options;
  out.phase("loading the model");
  const { ort, encode, asked } = await opened("add", options, adapters);
  const how = { adapters, encode, ...asked, minutes, agreement, signal: run.interrupts(), onProgress: out.progress };
  const outcomes = await tasksByAnswers(createEngine(ort), model, pack, how);
  return outcomes.map(({ file, agreement, reason }) => ({ ...taskIn(file, "a distilled task"), agreement, reason }));
}

async function opened(command: string, options: JudgedOptions, adapters: readonly Adapter[]) {
  const asked = options.text === undefined ? {} : await readQuestions(options.text);
  return { ...(await openModel(command, options.model, options, asksPrompts(asked, adapters))), asked };
}
