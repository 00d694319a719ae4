/**
 * The command distill: trains the tasks of a pack to answer plain text more like the adapters they were made of, or
 * with `--part` those of one machine of many (docs/hub.md). Finished tasks are kept in a folder until all are done, so
 * that a run which was stopped goes on.
 */
import { resolve } from "node:path";
import type { EigenSession } from "../../bindings/onnxruntime.ts";
import type { Adapter } from "../adapters/adapter.ts";
import { filesOf } from "../adapters/formats.ts";
import type { Pack } from "../core/pack.ts";
import { parseTaskFile } from "../core/read-task-file.ts";
import { TaskError } from "../errors.ts";
import { encodeTaskFile } from "../format/encode.ts";
import { sha256 } from "../format/fields.ts";
import { projectAdapters, storedDtypes } from "../pack/add.ts";
import { completeDtypes } from "../pack/recipe.ts";
import { writeTasks } from "../pack/shard/basis.ts";
import { byId } from "../pack/shard/statistics.ts";
import { freshPack, tasksOf } from "../pack/write.ts";
import type { Tokenizer } from "../session/tokens.ts";
import { toHex } from "../text.ts";
import {
  type Distilled,
  type DistillOptions,
  distill as distilTask,
  finishedText,
  readFinished,
} from "../train/distill.ts";
import { refuseOtherBase, signerOf, warnUnsigned } from "./change.ts";
import { type Attach, command, type Result } from "./command.ts";
import { checkTarget, makeFolder } from "./files.ts";
import { tasksPart } from "./hub.ts";
import {
  asksPrompts,
  contents,
  finishedIn,
  modelDigest,
  openTrainable,
  readQuestions,
  removeFinished,
  tokenizerOf,
} from "./model.ts";
import * as option from "./options.ts";
import { bytes, count, type Output, resources, table } from "./output.ts";

const OPTIONS = {
  output: option.output(
    "OUT.eigen",
    "The pack to write, or with --part the part; finished tasks wait in OUT.eigen.partial.",
  ),
  force: option.force,
  part: option.toggle("Write a part with tasks on a basis instead of a pack, for assemble."),
  dtype: { ...option.dtype("coefficients", "head"), needs: ["part"] },
  text: option.text(
    "LINES.txt",
    "Text like that of the tasks, one on each line, or JSON lines as learn takes them: a few hundred, never your test data. Default: made " +
      "of the words of the model's tokenizer.",
  ),
  steps: option.byDefault(
    240,
    option.number("N", "Steps per task; 0 solves coefficients once, and trains nothing.", option.from(0)),
  ),
  batch: option.byDefault(8, option.number("N", "Texts per step.", option.from(1))),
  as: option.as,
  base: option.readFor,
  key: { ...option.key, excludes: { part: "parts are not signed; sign what assemble writes" } },
  revoked: option.revoked,
  ...option.group("The model", {
    model: option.required(
      option.text("MODEL.onnx", "The model that tasks and adapters belong to. Needs onnxruntime-node.", "model"),
    ),
    ...option.runsOn,
    ...option.match,
    anyBase: option.toggle(
      "Accept a model whose weights do not match the pack's fingerprints, and adapters that name another base model.",
    ),
  }),
};

type DistillCommand = option.Values<typeof OPTIONS>;

export const distill: Attach = command({
  usage: "distill <PACK> <ADAPTER_OR_FOLDER...>",
  details: "Adapters that are not in the pack yet are added first. Other tasks are not changed.",
  example: "distill tasks.eigen my-adapters/ --model model.onnx -o new.eigen",
  options: OPTIONS,
  reads: ["file", "repository"],
  async run([packPath, ...paths]: [string, ...string[]], options, run, out): Promise<Result> {
    const { output: file, part: isPart, force, model, tokenizer = tokenizerOf(model) } = options;
    const sign = await signerOf(options.key);
    const inputs = [model, options.text, tokenizer];
    // A part may be there already, made of the same.
    const refuse = (read: readonly (string | undefined)[]): void => checkTarget(file, { force: true, inputs: read });
    if (isPart) refuse([packPath, ...inputs]);
    const target = isPart ? { refuse } : await run.target(file, { force, inputs });
    const questions = options.text === undefined ? {} : await readQuestions(options.text);
    const adapters = byId(await run.adapters(paths, options.as, options.base));
    target.refuse(adapters.flatMap(filesOf));
    const pack = await run.pack(packPath);
    const before = new Set(pack.tasks.keys());
    // assemble would refuse it, when all is done.
    const taken = isPart ? adapters.find(({ id }) => before.has(id)) : undefined;
    if (taken) {
      const message = `${pack.name} has a task "${taken.id}" already, which a part cannot replace; rename the new one: --as ${taken.id}=NEW`;
      throw new TaskError(message, { task: taken.id });
    }
    refuseOtherBase(pack, adapters, options.anyBase);
    const settings = await settingsOf(options, questions);
    const types = isPart ? completeDtypes(options.dtype) : await storedDtypes(pack);
    // Gives the pack in memory the tasks that it lacks, and distils all.
    const distilAll = async () => {
      const missing = adapters.filter(({ id }) => !before.has(id));
      const projected =
        missing.length > 0 ? await projectAdapters(pack, missing, types, { onProgress: out.progress, maxLoss: 1 }) : [];
      for (const { entry, blob } of projected) await pack.addTask(entry.id, encodeTaskFile(entry, pack.basisId, blob));
      out.phase("loading the model");
      const opened = await openTrainable("distill", model, pack, options, run, asksPrompts(questions, adapters));
      makeFolder(`${file}.partial`);
      const done = await distilEach(pack, adapters, { ...opened, questions, settings }, options, out);
      return { done, losses: projected.map(({ residual }) => residual) };
    };
    if ("write" in target) {
      const { done } = await distilAll();
      const blobs = new Map(done.map(({ id, file }) => [id, parseTaskFile(file, `task "${id}"`).blob]));
      const size = await target.write((await freshPack(pack, await tasksOf(pack, blobs), sign)).chunks);
      warnUnsigned(pack, sign, out);
      await removeFinished(`${file}.partial`);
      const { seconds } = resources();
      return {
        json: { file, bytes: size, tasks: figuresOf(done, before), seconds },
        text: [
          `${file}: ${count(done.length, "task")} distilled, ${bytes(size)}`,
          ...tableOf(done),
          `${seconds.toFixed(2)} s`,
        ],
      };
    }
    let done: readonly Done[] = [];
    const part = { file, force, types, base: options.base, settings };
    const { json, text } = await tasksPart("distill", pack, adapters, part, run, out, async (made) => {
      const outcome = await distilAll();
      done = outcome.done;
      const files = done.map((task) => task.file);
      return writeTasks(pack, made, types, outcome.losses, files);
    });
    await removeFinished(`${file}.partial`);
    // The part was there.
    if (done.length === 0) return { json, text };
    return { json: { ...json, tasks: figuresOf(done, new Set()) }, text: [...text, ...tableOf(done)] };
  },
});

type Questions = Pick<DistillOptions, "texts" | "examples">;

async function settingsOf(options: DistillCommand, questions: Questions): Promise<object> {
  const { model, tokenizer, tokens = 128, steps, batch, names, ignore } = options;
  return { model: await modelDigest(model, tokenizer), steps, batch, tokens, ...questions, names: [...names], ignore };
}

interface Distilling {
  readonly session: EigenSession;
  readonly encode: Tokenizer;
  readonly questions: Questions;
  readonly settings: object;
}

type Done = Distilled & { readonly resumed: boolean };

/** Distils the task of every adapter, in order, except those that are finished. */
async function distilEach(
  pack: Pack,
  adapters: readonly Adapter[],
  { session, encode, questions, settings }: Distilling,
  { output: file, steps, batch }: DistillCommand,
  out: Output,
): Promise<Done[]> {
  const finished = finishedIn(`${file}.partial`, { basis: pack.basisId, settings });
  const digests = new Map(await contents(adapters, out));
  const tasks = [];
  for (const adapter of adapters) {
    const { id, metadata } = adapter;
    const blob = toHex(await sha256((await pack.load(id)).bytes));
    const key = JSON.stringify({ id, file: resolve(adapter.file), content: digests.get(id), metadata, blob });
    tasks.push({ adapter, key, earlier: await readFinished<Distilled>(finished, key) });
  }
  // The unit is a task where nothing is trained.
  const each = Math.max(steps, 1);
  const unit = steps > 0 ? "steps" : "tasks";
  const total = each * tasks.filter(({ earlier }) => !earlier).length;
  let before = 0;
  const done: Done[] = [];
  for (const { adapter, key, earlier } of tasks) {
    if (earlier) {
      done.push({ ...earlier, resumed: true });
      continue;
    }
    const report = (step: number): void =>
      out.progress({ stage: "distilling", done: before + step, total, unit, detail: adapter.id });
    // Asking the adapter and solving coefficients come before the first step.
    report(0);
    const onStep = ({ step }: { step: number }): void => report(step);
    const outcome = await distilTask(session, { adapter, ...questions, encode, steps, batch, onStep });
    await finished.write(key, finishedText(outcome));
    done.push({ ...outcome, resumed: false });
    report(each);
    before += each;
  }
  if (done.every(({ kept }) => kept === "projected"))
    out.warn(`no task got better than it was, so all stay as projected: try more than --steps ${steps}, or more text`);
  return done;
}

/** Figures of each task, for `--json`. @param before ids of the tasks that there were */
function figuresOf(done: readonly Done[], before: ReadonlySet<string>): object[] {
  return done.map(({ id, divergenceBefore, divergenceAfter, kept, resumed }) => {
    const divergence = { before: divergenceBefore, after: divergenceAfter };
    return { id, divergence, kept, added: !before.has(id), resumed };
  });
}

function tableOf(done: readonly Done[]): string[] {
  const rows = done.map(({ id, divergenceBefore, divergenceAfter, kept }) => [
    id,
    divergenceBefore.toFixed(4),
    divergenceAfter.toFixed(4),
    kept,
  ]);
  return table([["task", "KL projected", "KL distilled", "kept"], ...rows]);
}
