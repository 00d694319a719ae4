/**
 * The command distill: a pack whose tasks answer plain text more like the adapters they were made of (src/train/distill.ts).
 * Finished tasks are kept beside the target until all are done, so that a run which was cut off goes on.
 */
import type { Adapter } from "../adapters/adapter.ts";
import type { Pack } from "../core/pack.ts";
import { parseTaskFile } from "../core/task-file.ts";
import { SourceError, TaskError } from "../errors.ts";
import type { Sign } from "../format/layout.ts";
import { storedDtypes } from "../pack/add.ts";
import { completeDtypes } from "../pack/recipe.ts";
import { byId, openTasks, writeTasks } from "../pack/shard/basis.ts";
import { freshPack, tasksOf } from "../pack/write.ts";
import type { DistillOptions } from "../train/distill.ts";
import { refuseOtherBase, signerOf, warnUnsigned } from "./change.ts";
import { type Attach, command, type Result } from "./command.ts";
import { asksPrompts, readQuestions } from "./examples.ts";
import { writeWhole } from "./files.ts";
import { addProjected, type Done, distilEach, figuresOf, removeFinished, tableOf } from "./finished.ts";
import { contents, digest, facts, fileDigest, makePart, modelDigest } from "./hub-part.ts";
import { realTarget } from "./lock.ts";
import { match } from "./matching.ts";
import { openTrainable, runsOn, tokenizer, tokenizerOf, tokens } from "./model.ts";
import * as option from "./options.ts";
import { bytes, count, type Output, resources, warnOf } from "./output.ts";
import type { Run } from "./run.ts";
import { checkTarget, filesOf } from "./target.ts";

const OPTIONS = {
  output: option.output(
    "OUT.eigen",
    "The pack to write, or with --part the part; finished tasks wait in OUT.eigen.partial.",
  ),
  force: option.force,
  part: option.toggle("Write a part with tasks on a basis instead of a pack, for assemble."),
  dtype: { ...option.dtype, help: `With --part. ${option.dtype.help}` },
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
  key: option.key,
  revoked: option.revoked,
  ...option.group("The model", {
    model: option.required(
      option.reading(
        "model",
        option.text("MODEL.onnx", "The model that tasks and adapters belong to. Needs onnxruntime-node."),
      ),
    ),
    tokens,
    tokenizer,
    ...runsOn,
    ...match,
    anyBase: option.toggle(
      "Accept a model whose weights do not match the pack's fingerprints, and adapters that name another base model.",
    ),
  }),
};

export const distill: Attach = command({
  usage: "distill <PACK> <ADAPTER_OR_FOLDER...>",
  does: "Train the tasks of a pack to answer plain text as their adapters do.",
  details: "Adapters that are not in the pack yet are added first. Other tasks are not changed.",
  example: "distill tasks.eigen my-adapters/ --model model.onnx -o new.eigen",
  options: OPTIONS,
  reads: ["file", "repository"],
  async run([packPath, ...paths]: [string, ...string[]], options, run, out) {
    const { output: file, force, model, steps, batch, tokens = 128, tokenizer = tokenizerOf(model) } = options;
    const [foreign] = options.part ? option.given(options, "key") : option.given(options, "dtype");
    if (foreign !== undefined)
      throw new option.UsageError(
        options.part
          ? `${foreign} is for a pack: parts are not signed; sign what assemble writes`
          : `${foreign} is for --part: tasks of a pack keep their number formats`,
      );
    if (options.part) return distilPart([packPath, ...paths], options, run, out);
    const sign = await signerOf(options.key);
    const target = await run.target(file, { force, inputs: [model, options.text, tokenizer] });
    const questions = await askedIn(options.text);
    const adapters = await run.adapters(paths, options.as, options.base);
    target.refuse(adapters.flatMap(filesOf));
    const pack = await run.pack(packPath);
    const before = new Set(pack.tasks.keys());
    refuseOtherBase(pack, adapters, options.anyBase);
    const missing = adapters.filter(({ id }) => !pack.tasks.has(id));
    await addProjected(pack, missing, await storedDtypes(pack), out);
    out.phase("loading the model");
    const { session, encode } = await openTrainable(
      "distill",
      model,
      pack,
      options,
      run,
      asksPrompts(questions, adapters),
    );
    // Files count by their content: another model or adapter may have come to lie at the same place.
    const files = { model: await modelDigest(model), tokenizer: await fileDigest(tokenizer) };
    const matching = { names: [...options.names], ignore: options.ignore };
    const settings = { ...files, steps, batch, tokens, ...questions, ...matching };
    const finished = `${file}.partial`;
    // Two runs of one target would do the same work, and the first to end would remove what the second has finished.
    await run.lock(finished);
    run.folder(finished);
    const how = { session, encode, questions, steps, batch, settings, finished };
    const done = await distilEach(pack, adapters, how, out);
    await run.lock(file);
    const now = realTarget(file) === realTarget(packPath) ? await reread(pack, before, done, run) : pack;
    const size = await writeWhole(file, await withDistilled(now, done, sign), force);
    warnUnsigned(now, sign, out);
    await removeFinished(finished);
    return report(file, size, done, before);
  },
});

/** What a file of text asks; nothing without one: questions are made then. */
async function askedIn(path: string | undefined): Promise<Pick<DistillOptions, "texts" | "examples">> {
  return path === undefined ? {} : readQuestions(path);
}

/**
 * The pack as it is by now, where it is to be replaced: others may have written while tasks were trained.
 * @param before ids of its tasks at the start
 * @throws SourceError, TaskError when the basis or a distilled task is not what it was
 */
async function reread(pack: Pack, before: ReadonlySet<string>, done: readonly Done[], run: Run): Promise<Pack> {
  const now = await run.pack(pack.name);
  if (now.basisId !== pack.basisId)
    throw new SourceError("has become a pack of another basis in the meantime: run the command again", {
      file: pack.name,
    });
  const sums = ({ directory }: Pack): Map<string, string> =>
    new Map(directory.tasks.map(({ id, section }) => [id, `${section.length} ${section.crc}`]));
  const [then, current] = [sums(pack), sums(now)];
  for (const { id, file } of done) {
    if (then.get(id) !== current.get(id)) {
      const what = before.has(id) ? (current.has(id) ? "replaced in" : "removed from") : "added to";
      throw new TaskError(`"${id}" was ${what} ${pack.name} in the meantime: run the command again`, { task: id });
    }
    if (!current.has(id)) await now.addTask(id, file);
  }
  return now;
}

/** The pack with other blobs for those of its tasks that were distilled. */
async function withDistilled(
  pack: Pack,
  done: readonly Done[],
  sign: Sign | undefined,
): Promise<AsyncIterable<Uint8Array>> {
  const blobs = new Map(done.map(({ id, file }) => [id, parseTaskFile(file, `task "${id}"`).blob]));
  return (await freshPack(pack, await tasksOf(pack, blobs), sign)).chunks;
}

function report(file: string, size: number, done: readonly Done[], before: ReadonlySet<string>): Result {
  const { seconds } = resources();
  const tasks = figuresOf(done, before);
  return {
    json: { file, bytes: size, tasks, seconds },
    text: [
      `${file}: ${count(tasks.length, "task")} distilled, ${bytes(size)}`,
      ...tableOf(done),
      `${seconds.toFixed(2)} s`,
    ],
  };
}

/** Runs distill --part: tasks on a basis, distilled on one machine of many, as a part for assemble (docs/hub.md). */
async function distilPart(
  [basisPath, ...paths]: [string, ...string[]],
  options: option.Values<typeof OPTIONS>,
  run: Run,
  out: Output,
): Promise<Result> {
  const { output: file, force, model, steps, batch, tokens = 128, tokenizer = tokenizerOf(model) } = options;
  const questions = await askedIn(options.text);
  checkTarget(file, { force: true, inputs: [basisPath, model, options.text, tokenizer] });
  const adapters = byId(await run.adapters(paths, options.as, options.base));
  checkTarget(file, { force: true, inputs: adapters.flatMap(filesOf) });
  const basis = await run.pack(basisPath);
  refuseInBasis(basis, adapters);
  refuseOtherBase(basis, adapters, options.anyBase);
  const types = completeDtypes(options.dtype);
  const { coefficients, head } = types;
  const matching = { names: [...options.names], ignore: options.ignore };
  // Files count by their content: other machines may have them elsewhere.
  const asked = { model: await modelDigest(model), tokenizer: await fileDigest(tokenizer), steps, batch, tokens };
  const settings = { ...asked, ...questions, ...matching };
  const of = [basis.basisId, coefficients, head, await facts(options.base), await contents(adapters, out)];
  const made = digest("distill", ...of, settings);
  const finished = `${file}.partial`;
  let done: readonly Done[] | undefined;
  const figures = { adapters: adapters.length, modules: basis.modules.length, warnings: warnOf(adapters, out) };
  const { json, text } = await makePart({ file, force, kind: "tasks", made }, figures, async () => {
    const losses = (await addProjected(basis, adapters, types, out)).map(({ residual }) => residual);
    const whole = asksPrompts(questions, adapters);
    const { session, encode } = await openTrainable("distill", model, basis, options, run, whole);
    run.folder(finished);
    done = await distilEach(basis, adapters, { session, encode, questions, steps, batch, settings, finished }, out);
    return writeTasks(
      basis,
      made,
      types,
      losses,
      done.map((one) => one.file),
    );
  });
  await removeFinished(finished);
  const { tasks: residual } = run.closing(await openTasks(file));
  if (!done) return { json: { ...json, residual }, text };
  return { json: { ...json, residual, tasks: figuresOf(done, new Set()) }, text: [...text, ...tableOf(done)] };
}

/** @throws TaskError for a task that the basis has: assemble would refuse it, when all is done */
function refuseInBasis({ tasks, name }: Pack, adapters: readonly Adapter[]): void {
  const taken = adapters.find(({ id }) => tasks.has(id));
  if (!taken) return;
  const message = `${name} has a task "${taken.id}" already, which a part cannot replace; rename the new one: --as ${taken.id}=NEW`;
  throw new TaskError(message, { task: taken.id });
}
