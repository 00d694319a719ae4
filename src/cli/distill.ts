/**
 * The command distill: a pack whose tasks answer plain text more like the adapters they were made of (src/train/distill.ts).
 * Finished tasks are kept beside the target until all are done, so that a run which was cut off goes on.
 */
import { createHash } from "node:crypto";
import { readdir, readFile, rm, rmdir, stat } from "node:fs/promises";
import { join, resolve } from "node:path";
import { createEigenSession } from "../../bindings/onnxruntime.ts";
import type { Adapter } from "../adapters/adapter.ts";
import { encodeTaskFile } from "../format/encode.ts";
import { parseTaskFile } from "../format/task-file.ts";
import { projectAdapters } from "../pack/build.ts";
import { openPack, type Pack } from "../pack/pack.ts";
import { type Distilled, distill as distillTask } from "../train/distill.ts";
import { type Attach, command, type Result } from "./command.ts";
import { readLines } from "./examples.ts";
import { makeFolder, writeWhole } from "./files.ts";
import { openModel, tokenizer, tokens } from "./model.ts";
import { openAdapters, packWith, storedDtypes, taskOf } from "./open.ts";
import { as, byDefault, from, group, number, output, required, text } from "./options.ts";
import { bytes, type Output, resources, table, timeLeft } from "./output.ts";

/** What the outcome depends on beside pack and adapter. */
interface Settings {
  readonly model: string;
  readonly steps: number;
  readonly batch: number;
  readonly tokens: number;
  readonly texts: readonly string[];
}

type Done = Distilled & { readonly resumed: boolean };

export const distill: Attach = command({
  usage: "distill <PACK> <ADAPTER_OR_FOLDER...>",
  does: "train coefficients until tasks answer plain text as their adapters do",
  details: "Adapters that are no tasks yet are added first. The bytes of other tasks stay.",
  options: {
    output: output("OUT.eigen", "The pack to write; finished tasks wait in OUT.eigen.partial."),
    text: required(
      text("LINES.txt", "Plain text of the tasks' kind, one on each line; some hundreds, never what you test on."),
    ),
    steps: byDefault(240, number("N", "Steps for each task.", from(1))),
    batch: byDefault(8, number("N", "Texts of a step.", from(1))),
    as,
    ...group("The model", {
      model: required(text("MODEL.onnx", "The model that tasks and adapters belong to. Needs onnxruntime-node.")),
      tokens,
      tokenizer,
    }),
  },
  async run([packPath, ...paths]: [string, ...string[]], options, run) {
    const { output: target, model, steps, batch, tokens = 128, tokenizer } = options;
    const texts = await readLines(options.text);
    const { ort, encodeFor } = await openModel("distill", model, { tokens, tokenizer });
    const adapters = await openAdapters(paths, options.as, run);
    const pack = run.closing(await openPack(packPath));
    const before = [...pack.tasks.keys()];
    await addMissing(pack, adapters);
    const session = await createEigenSession(ort, model, pack, { trainable: true });
    run.closing({ close: () => session.release() });
    const encode = encodeFor(session.inputNames);
    const settings = { model: resolve(model), steps, batch, tokens, texts };
    const finished = new Finished(`${target}.partial`);
    const done: Done[] = [];
    const showStep = progressOf(adapters, done, steps, run);
    for (const adapter of adapters) {
      const key = await keyOf(pack, adapter, settings);
      const earlier = await finished.read(key);
      const onStep = ({ step }: { step: number }): void => showStep(step);
      const made = earlier ?? (await distillTask(session, { adapter, texts, encode, steps, batch, onStep }));
      if (!earlier) await finished.write(key, made);
      done.push({ ...made, resumed: earlier !== undefined });
    }
    const size = await writeWhole(target, await withDistilled(pack, done));
    await finished.remove();
    return report(target, size, done, before);
  },
});

/** Shows a step of the adapter that comes after those that are done. */
function progressOf(
  adapters: readonly Adapter[],
  done: readonly Done[],
  steps: number,
  out: Output,
): (step: number) => void {
  const started = performance.now();
  return (step) => {
    const i = done.length;
    const gone = i + step / steps;
    const own = gone - done.filter(({ resumed }) => resumed).length;
    const seconds = ((performance.now() - started) / 1000 / own) * (adapters.length - gone);
    const { id } = adapters[i]!;
    out.progress(`task ${i + 1} of ${adapters.length}, ${id}, ${timeLeft(seconds)}: step`, step, steps);
  };
}

/** Projects adapters that are no tasks yet, as `add` does. */
async function addMissing(pack: Pack, adapters: readonly Adapter[]): Promise<void> {
  const missing = adapters.filter(({ id }) => !pack.tasks.has(id));
  if (missing.length === 0) return;
  for (const { entry, blob } of await projectAdapters(pack, missing, await storedDtypes(pack)))
    await pack.addTask(entry.id, encodeTaskFile(entry, pack.basisId, blob));
}

/** A name for one task's outcome: of all it depends on. */
async function keyOf(pack: Pack, { id, file, byteLength }: Adapter, { model, ...settings }: Settings): Promise<string> {
  const { bytes: blob } = await pack.load(id);
  const of = {
    basis: pack.basisId,
    id,
    file: resolve(file),
    byteLength,
    model,
    modelBytes: (await stat(model)).size,
    ...settings,
  };
  return createHash("sha256").update(JSON.stringify(of)).update(blob).digest("hex");
}

/** Outcomes in a folder beside the target, one file each. */
class Finished {
  readonly #folder: string;

  constructor(folder: string) {
    this.#folder = folder;
  }

  /** Undefined when there is none. */
  async read(key: string): Promise<Distilled | undefined> {
    const text = await readFile(join(this.#folder, key), "utf8").catch(() => undefined);
    if (text === undefined) return undefined;
    const { file, ...figures } = JSON.parse(text) as Omit<Distilled, "file"> & { file: string };
    return { ...figures, file: new Uint8Array(Buffer.from(file, "base64")) };
  }

  async write(key: string, { file, ...figures }: Distilled): Promise<void> {
    await makeFolder(this.#folder);
    const text = JSON.stringify({ ...figures, file: Buffer.from(file).toString("base64") });
    await writeWhole(join(this.#folder, key), [new TextEncoder().encode(text)]);
  }

  /** Those of earlier settings too, and nothing that is not ours. */
  async remove(): Promise<void> {
    for (const name of await readdir(this.#folder).catch(() => []))
      if (/^[0-9a-f]{64}(\.[0-9a-f]{8}\.tmp)?$/.test(name)) await rm(join(this.#folder, name));
    await rmdir(this.#folder).catch(() => undefined);
  }
}

/** The pack with other blobs for those of its tasks that were distilled. */
async function withDistilled(pack: Pack, done: readonly Done[]): Promise<Uint8Array[]> {
  const files = new Map(done.map(({ id, file }) => [id, file]));
  const tasks = [];
  for (const [id, entry] of pack.tasks) {
    const file = files.get(id);
    tasks.push(file ? { entry, blob: parseTaskFile(file, `task "${id}"`).blob } : await taskOf(pack, id));
  }
  return packWith(pack, tasks);
}

function report(file: string, size: number, done: readonly Done[], before: readonly string[]): Result {
  const { seconds } = resources();
  const tasks = done.map(({ id, divergenceBefore, divergenceAfter, kept, resumed }) => {
    const divergence = { before: divergenceBefore, after: divergenceAfter };
    return { id, divergence, kept, added: !before.includes(id), resumed };
  });
  const rows = tasks.map(({ id, divergence, kept }) => [
    id,
    divergence.before.toFixed(4),
    divergence.after.toFixed(4),
    kept,
  ]);
  return {
    json: { file, bytes: size, tasks, seconds },
    text: [
      `${file}: ${tasks.length} tasks distilled, ${bytes(size)}`,
      table([["task", "KL projected", "KL distilled", "kept"], ...rows]),
      `${seconds.toFixed(2)} s`,
    ],
  };
}
