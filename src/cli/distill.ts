/**
 * The command distill: trains the tasks of a pack to answer plain text more like the adapters they were made of, or with `--part` those of
 * one machine of many (docs/hub.md). Finished tasks are kept in a folder until all are done, so that a run which was stopped goes on.
 */
import { resolve } from "node:path";
import type { EigenSession } from "../../bindings/onnxruntime.ts";
import type { Adapter } from "../adapters/adapter.ts";
import type { Pack } from "../core/pack.ts";
import { parseTaskFile } from "../core/task-file.ts";
import { FormatError, SourceError, TaskError } from "../errors.ts";
import { encodeTaskFile } from "../format/encode.ts";
import { sha256 } from "../format/fields.ts";
import { type ProjectedAdapter, projectAdapters, storedDtypes } from "../pack/add.ts";
import { completeDtypes } from "../pack/recipe.ts";
import { byId, openTasks, writeTasks } from "../pack/shard/basis.ts";
import { freshPack, tasksOf } from "../pack/write.ts";
import type { Tokenizer } from "../session/tokens.ts";
import type { Dtypes } from "../tensor/dtypes.ts";
import { toHex } from "../text.ts";
import { type Distilled, type DistillOptions, distill as distilTask } from "../train/distill.ts";
import { refuseOtherBase, signerOf, warnUnsigned } from "./change.ts";
import { type Attach, command, type Result, type Run } from "./command.ts";
import { checkTarget, filesOf, realTarget, writeWhole } from "./files.ts";
import { digest, facts, makePart } from "./hub.ts";
import {
  asksPrompts,
  contents,
  finishedIn,
  modelDigests,
  openTrainable,
  readQuestions,
  removeFinished,
  tokenizerOf,
} from "./model.ts";
import * as option from "./options.ts";
import { bytes, count, type Output, resources, table, warnOf } from "./output.ts";

const OPTIONS = {
  output: option.output(
    "OUT.eigen",
    "The pack to write, or with --part the part; finished tasks wait in OUT.eigen.partial.",
  ),
  force: option.force,
  part: option.toggle("Write a part with tasks on a basis instead of a pack, for assemble."),
  dtype: { ...option.dtype, needs: "part" },
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
  run: ([pack, ...adapters]: [string, ...string[]], options, run, out) =>
    (options.part ? distilPart : distilPack)(pack, adapters, options, run, out),
});

async function distilPack(
  packPath: string,
  paths: readonly string[],
  options: DistillCommand,
  run: Run,
  out: Output,
): Promise<Result> {
  const { output: file, force, model, tokenizer = tokenizerOf(model) } = options;
  const sign = await signerOf(options.key);
  const target = await run.target(file, { force, inputs: [model, options.text, tokenizer] });
  const questions = options.text === undefined ? {} : await readQuestions(options.text);
  const adapters = await run.adapters(paths, options.as, options.base);
  target.refuse(adapters.flatMap(filesOf));
  const pack = await run.pack(packPath);
  const before = new Set(pack.tasks.keys());
  refuseOtherBase(pack, adapters, options.anyBase);
  const missing = adapters.filter(({ id }) => !pack.tasks.has(id));
  await addProjected(pack, missing, await storedDtypes(pack), out);
  const settings = await settingsOf(options, questions);
  out.phase("loading the model");
  const whole = asksPrompts(questions, adapters);
  const opened = await openTrainable("distill", model, pack, options, run, whole);
  // Two runs of one target would do the same work, and the first to end would remove what the second has finished.
  await run.lock(`${file}.partial`);
  run.folder(`${file}.partial`);
  const done = await distilEach(pack, adapters, { ...opened, questions, settings }, options, out);
  await run.lock(file);
  const now = realTarget(file) === realTarget(packPath) ? await reread(pack, before, done, run) : pack;
  const blobs = new Map(done.map(({ id, file }) => [id, parseTaskFile(file, `task "${id}"`).blob]));
  const size = await writeWhole(file, (await freshPack(now, await tasksOf(now, blobs), sign)).chunks, force);
  warnUnsigned(now, sign, out);
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

async function distilPart(
  basisPath: string,
  paths: readonly string[],
  options: DistillCommand,
  run: Run,
  out: Output,
): Promise<Result> {
  const { output: file, force, model, tokenizer = tokenizerOf(model) } = options;
  const questions = options.text === undefined ? {} : await readQuestions(options.text);
  checkTarget(file, { force: true, inputs: [basisPath, model, options.text, tokenizer] });
  const adapters = byId(await run.adapters(paths, options.as, options.base));
  checkTarget(file, { force: true, inputs: adapters.flatMap(filesOf) });
  const basis = await run.pack(basisPath);
  // assemble would refuse it, when all is done.
  const taken = adapters.find(({ id }) => basis.tasks.has(id));
  if (taken) {
    const message = `${basis.name} has a task "${taken.id}" already, which a part cannot replace; rename the new one: --as ${taken.id}=NEW`;
    throw new TaskError(message, { task: taken.id });
  }
  refuseOtherBase(basis, adapters, options.anyBase);
  const types = completeDtypes(options.dtype);
  const settings = await settingsOf(options, questions);
  const { coefficients, head } = types;
  const of = [basis.basisId, coefficients, head, await facts(options.base), await contents(adapters, out)];
  const made = digest("distill", ...of, settings);
  let done: readonly Done[] | undefined;
  const figures = { adapters: adapters.length, modules: basis.modules.length, warnings: warnOf(adapters, out) };
  const { json, text } = await makePart({ file, force, kind: "tasks", made }, figures, async () => {
    const losses = (await addProjected(basis, adapters, types, out)).map(({ residual }) => residual);
    const whole = asksPrompts(questions, adapters);
    const opened = await openTrainable("distill", model, basis, options, run, whole);
    run.folder(`${file}.partial`);
    done = await distilEach(basis, adapters, { ...opened, questions, settings }, options, out);
    const files = done.map((task) => task.file);
    return writeTasks(basis, made, types, losses, files);
  });
  await removeFinished(`${file}.partial`);
  const { tasks: residual } = run.closing(await openTasks(file));
  if (!done) return { json: { ...json, residual }, text };
  return { json: { ...json, residual, tasks: figuresOf(done, new Set()) }, text: [...text, ...tableOf(done)] };
}

type Questions = Pick<DistillOptions, "texts" | "examples">;

/** All that an outcome depends on except the task. */
async function settingsOf(options: DistillCommand, questions: Questions): Promise<object> {
  const { model, tokenizer, tokens = 128, steps, batch, names, ignore } = options;
  return { ...(await modelDigests(model, tokenizer)), steps, batch, tokens, ...questions, names: [...names], ignore };
}

/** Projects adapters and gives the pack in memory their tasks. */
async function addProjected(
  pack: Pack,
  adapters: readonly Adapter[],
  formats: Dtypes,
  { progress: onProgress }: Output,
): Promise<ProjectedAdapter[]> {
  if (adapters.length === 0) return [];
  const projected = await projectAdapters(pack, adapters, formats, { onProgress, maxLoss: 1 });
  for (const { entry, blob } of projected) await pack.addTask(entry.id, encodeTaskFile(entry, pack.basisId, blob));
  return projected;
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
    const json = await finished.read(key);
    tasks.push({ adapter, key, earlier: json === undefined ? undefined : parseFinished(json, finished.nameOf(key)) });
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
    await finished.write(key, JSON.stringify({ ...outcome, file: Buffer.from(outcome.file).toString("base64") }));
    done.push({ ...outcome, resumed: false });
    report(each);
    before += each;
  }
  if (done.every(({ kept }) => kept === "projected"))
    out.warn(`no task got better than it was, so all stay as projected: try more than --steps ${steps}, or more text`);
  return done;
}

/** @param path for messages @throws FormatError when it is damaged */
function parseFinished(json: string, path: string): Distilled {
  try {
    const { file, ...figures } = JSON.parse(json) as Omit<Distilled, "file"> & { file: string };
    const { id, divergenceBefore, divergenceAfter, kept } = figures;
    const numbers = Number.isFinite(divergenceBefore) && Number.isFinite(divergenceAfter);
    if (typeof id !== "string" || !numbers || (kept !== "projected" && kept !== "distilled"))
      throw new TypeError("it is not what distill writes");
    const bytes = new Uint8Array(Buffer.from(file, "base64"));
    parseTaskFile(bytes, path);
    return { ...figures, file: bytes };
  } catch (cause) {
    const message = `is damaged: delete it, and the task is distilled again (${(cause as Error).message})`;
    throw new FormatError(message, { file: path, part: "finished task", cause });
  }
}

/**
 * The current state of a pack that is to be replaced: another process may have written while tasks were trained.
 * @param before ids of its tasks at the start
 * @throws SourceError, TaskError when the basis or a distilled task is not what it was
 */
async function reread(pack: Pack, before: ReadonlySet<string>, done: readonly Done[], run: Run): Promise<Pack> {
  const now = await run.pack(pack.name);
  if (now.basisId !== pack.basisId) {
    const message = "has become a pack of another basis in the meantime: run the command again";
    throw new SourceError(message, { file: pack.name });
  }
  const sums = ({ directory }: Pack): Map<string, string> =>
    new Map(directory.tasks.map(({ id, section }) => [id, `${section.length} ${section.crc}`]));
  const then = sums(pack);
  const current = sums(now);
  for (const { id, file } of done) {
    if (then.get(id) !== current.get(id)) {
      const change = before.has(id) ? (current.has(id) ? "replaced in" : "removed from") : "added to";
      throw new TaskError(`"${id}" was ${change} ${pack.name} in the meantime: run the command again`, { task: id });
    }
    if (!current.has(id)) await now.addTask(id, file);
  }
  return now;
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
