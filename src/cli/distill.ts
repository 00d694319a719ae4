/**
 * The command distill: a pack whose tasks answer plain text more like the adapters they were made of (src/train/distill.ts).
 * Finished tasks are kept beside the target until all are done, so that a run which was cut off goes on.
 */
import { createHash } from "node:crypto";
import { existsSync } from "node:fs";
import { readdir, rm, rmdir, stat } from "node:fs/promises";
import { join, resolve } from "node:path";
import type { Adapter } from "../adapters/adapter.ts";
import { FormatError, SourceError, TaskError } from "../errors.ts";
import { encodeTaskFile } from "../format/encode.ts";
import type { Sign } from "../format/layout.ts";
import { parseTaskFile } from "../format/task-file.ts";
import { freshPack, tasksOf } from "../pack/fresh.ts";
import type { Pack } from "../pack/pack.ts";
import { projectAdapters } from "../pack/project.ts";
import { type Distilled, distill as distillTask } from "../train/distill.ts";
import { type Attach, command, type Result } from "./command.ts";
import { readQuestions } from "./examples.ts";
import { jsonFile, makeFolder, readJson, writeWhole } from "./files.ts";
import { realTarget } from "./lock.ts";
import { match } from "./matching.ts";
import { openTrainable, tokenizer, tokens } from "./model.ts";
import { as, byDefault, force, from, group, key, number, output, readFor, required, text, toggle } from "./options.ts";
import { bytes, count, resources, table } from "./output.ts";
import type { Run } from "./run.ts";
import { signerOf, warnUnsigned } from "./signer.ts";
import { filesOf } from "./target.ts";
import { refuseOtherBase, storedDtypes } from "./tasks.ts";

type Done = Distilled & { readonly resumed: boolean };

export const distill: Attach = command({
  usage: "distill <PACK> <ADAPTER_OR_FOLDER...>",
  does: "Train the tasks of a pack to answer plain text as their adapters do.",
  details: "Adapters that are not in the pack yet are added first. Other tasks are not changed.",
  options: {
    output: output("OUT.eigen", "The pack to write; finished tasks wait in OUT.eigen.partial."),
    force,
    text: required(
      text("LINES.txt", "Plain text like that of the tasks, one per line: a few hundred lines, never your test data."),
    ),
    steps: byDefault(240, number("N", "Steps per task.", from(1))),
    batch: byDefault(8, number("N", "Texts per step.", from(1))),
    as,
    base: readFor,
    key,
    ...group("The model", {
      model: required(text("MODEL.onnx", "The model that tasks and adapters belong to. Needs onnxruntime-node.")),
      tokens,
      tokenizer,
      ...match,
      anyBase: toggle(
        "Accept a model whose weights do not match the pack's fingerprints, and adapters that name another base model.",
      ),
    }),
  },
  async run([packPath, ...paths]: [string, ...string[]], options, run, out) {
    const { output: file, force, model, steps, batch, tokens = 128, tokenizer } = options;
    const sign = await signerOf(options.key);
    const questions = await readQuestions(options.text);
    const target = await run.target(file, { force, inputs: [model, options.text, tokenizer] });
    const adapters = await run.adapters(paths, options.as, options.base);
    target.refuse(adapters.flatMap(filesOf));
    const pack = await run.pack(packPath);
    const before = new Set(pack.tasks.keys());
    refuseOtherBase(pack, adapters, options.anyBase);
    await addMissing(pack, adapters);
    const { session, encode } = await openTrainable(
      "distill",
      model,
      pack,
      options,
      run,
      questions.examples !== undefined,
    );
    const modelBytes = (await stat(model)).size;
    const matching = { names: [...options.names], ignore: options.ignore };
    const settings = { model: resolve(model), modelBytes, steps, batch, tokens, ...questions, ...matching };
    const finished = `${file}.partial`;
    // Two runs of one target would do the same work, and the first to end would remove what the second has finished.
    await run.lock(finished);
    await makeFolder(finished);
    run.closing({ close: () => rmdir(finished).catch(() => undefined) });
    const done: Done[] = [];
    let resumed = 0;
    for (const [i, adapter] of adapters.entries()) {
      const path = join(finished, await keyOf(pack, adapter, settings));
      const earlier = await readFinished(path);
      if (earlier) resumed++;
      const onStep = ({ step }: { step: number }): void => {
        const [gone, of] = [(i - resumed) * steps + step, (adapters.length - resumed) * steps];
        out.progress("step", gone, of, `task ${i + 1} of ${adapters.length}, ${adapter.id}`);
      };
      const made = earlier ?? (await distillTask(session, { adapter, ...questions, encode, steps, batch, onStep }));
      if (!earlier) await writeWhole(path, jsonFile({ ...made, file: Buffer.from(made.file).toString("base64") }));
      done.push({ ...made, resumed: earlier !== undefined });
    }
    await run.lock(file);
    const now = realTarget(file) === realTarget(packPath) ? await reread(pack, before, done, run) : pack;
    const size = await writeWhole(file, await withDistilled(now, done, sign), force);
    warnUnsigned(now, sign, out);
    await removeFinished(finished);
    if (done.every(({ kept }) => kept === "projected"))
      out.warn(
        `no task got better than it was, so all stay as projected: try more than --steps ${steps}, or more text`,
      );
    return report(file, size, done, before);
  },
});

/** Projects adapters that are no tasks yet, as `add` does. */
async function addMissing(pack: Pack, adapters: readonly Adapter[]): Promise<void> {
  const missing = adapters.filter(({ id }) => !pack.tasks.has(id));
  if (missing.length === 0) return;
  for (const { entry, blob } of await projectAdapters(pack, missing, await storedDtypes(pack)))
    await pack.addTask(entry.id, encodeTaskFile(entry, pack.basisId, blob));
}

/** A name for one task's outcome: of all it depends on. */
async function keyOf(pack: Pack, { id, file, byteLength }: Adapter, settings: object): Promise<string> {
  const of = { basis: pack.basisId, id, file: resolve(file), byteLength, ...settings };
  const { bytes: blob } = await pack.load(id);
  return createHash("sha256").update(JSON.stringify(of)).update(blob).digest("hex");
}

/**
 * An outcome of before in the folder beside the target; undefined when there is none.
 * @throws FormatError when it is damaged
 */
async function readFinished(path: string): Promise<Distilled | undefined> {
  if (!existsSync(path)) return undefined;
  try {
    const { file, ...figures } = (await readJson(path)) as Omit<Distilled, "file"> & { file: string };
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

/** Those of earlier settings too, and nothing that is not ours. */
async function removeFinished(folder: string): Promise<void> {
  for (const name of await readdir(folder).catch(() => []))
    if (/^[0-9a-f]{64}(\.[0-9a-f]{8}\.tmp)?$/.test(name)) await rm(join(folder, name));
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
  const tasks = done.map(({ id, divergenceBefore, divergenceAfter, kept, resumed }) => {
    const divergence = { before: divergenceBefore, after: divergenceAfter };
    return { id, divergence, kept, added: !before.has(id), resumed };
  });
  const rows = tasks.map(({ id, divergence, kept }) => [
    id,
    ...Object.values(divergence).map((nats) => nats.toFixed(4)),
    kept,
  ]);
  return {
    json: { file, bytes: size, tasks, seconds },
    text: [
      `${file}: ${count(tasks.length, "task")} distilled, ${bytes(size)}`,
      ...table([["task", "KL projected", "KL distilled", "kept"], ...rows]),
      `${seconds.toFixed(2)} s`,
    ],
  };
}
