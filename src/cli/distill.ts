/**
 * The command distill: a pack whose tasks answer plain text more like the adapters they were made of (src/train/distill.ts).
 * Finished tasks are kept beside the target until all are done, so that a run which was cut off goes on.
 */
import { createHash } from "node:crypto";
import { mkdir, readdir, readFile, rm, rmdir, stat } from "node:fs/promises";
import { join, resolve } from "node:path";
import { createEigenSession } from "../../bindings/onnxruntime.ts";
import type { Adapter } from "../adapters/adapter.ts";
import { readAdapters } from "../adapters/folder.ts";
import { SourceError } from "../errors.ts";
import { encodeTaskFile } from "../format/encode.ts";
import { layoutFresh } from "../format/layout.ts";
import { parseTaskFile } from "../format/task-file.ts";
import { openPack, type Pack } from "../pack/pack.ts";
import { projectAdapters } from "../pack/project.ts";
import { type Distilled, distill } from "../train/distill.ts";
import { type Arguments, renames, required, wholeNumber } from "./args.ts";
import { readLines } from "./auto.ts";
import { writeWhole } from "./files.ts";
import { loadRuntime, loadTokenizer } from "./model.ts";
import { bytes, type Output, table, timeLeft } from "./output.ts";
import { type Result, storedTypes } from "./packs.ts";

/** What the outcome depends on beside pack and adapter. */
interface Settings {
  readonly model: string;
  readonly steps: number;
  readonly batch: number;
  readonly tokens: number;
  readonly texts: readonly string[];
}

/** `distill PACK ADAPTER_OR_FOLDER... --model MODEL.onnx --text LINES.txt -o OUT.eigen` */
export async function distillCommand(args: Arguments, out: Output): Promise<Result> {
  const started = performance.now();
  const [packPath = "", ...paths] = args.positionals;
  const target = required(args, "output");
  const model = required(args, "model");
  const textPath = required(args, "text");
  const [steps, batch, tokens] = [
    wholeNumber(args, "steps", 240),
    wholeNumber(args, "batch", 8),
    wholeNumber(args, "tokens", 128),
  ];
  const settings = { model: resolve(model), steps, batch, tokens, texts: await readLines(textPath) };
  const ort = await loadRuntime("distill");
  const encode = await loadTokenizer("distill", ort, model, args.text("tokenizer"), tokens);
  const adapters = await readAdapters(paths, { rename: renames(args) });
  const pack = await openPack(packPath);
  try {
    const ids = [...pack.tasks.keys()];
    await addMissing(pack, adapters);
    const session = await createEigenSession(ort, model, pack, { trainable: true });
    const done: (Distilled & { resumed: boolean })[] = [];
    try {
      const encodeFor = encode(session.inputNames);
      const finished = new Finished(`${target}.partial`);
      const [from, resumed] = [performance.now(), (): number => done.filter((one) => one.resumed).length];
      for (const [i, adapter] of adapters.entries()) {
        const key = await keyOf(pack, adapter, settings);
        const earlier = await finished.read(key);
        const onStep = ({ step }: { step: number }): void => {
          const gone = i + step / steps;
          const seconds = ((performance.now() - from) / 1000 / (gone - resumed())) * (adapters.length - gone);
          out.progress(`task ${i + 1} of ${adapters.length}, ${adapter.id}, ${timeLeft(seconds)}: step`, step, steps);
        };
        const made =
          earlier ??
          (await distill(session, { adapter, texts: settings.texts, encode: encodeFor, steps, batch, onStep }));
        if (!earlier) await finished.write(key, made);
        done.push({ ...made, resumed: earlier !== undefined });
      }
      const size = await writeWhole(target, await layoutWith(pack, new Map(done.map(({ id, file }) => [id, file]))));
      await finished.remove();
      return report(target, size, done, ids, (performance.now() - started) / 1000);
    } finally {
      await session.close();
    }
  } finally {
    await pack.close();
    for (const adapter of adapters) await adapter.close();
  }
}

/** Projects adapters that are no tasks yet, as `add` does. */
async function addMissing(pack: Pack, adapters: readonly Adapter[]): Promise<void> {
  const missing = adapters.filter(({ id }) => !pack.tasks.has(id));
  if (missing.length === 0) return;
  const types = await storedTypes(pack);
  for (const { entry, blob } of await projectAdapters(pack, missing, types))
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
    await mkdir(this.#folder, { recursive: true }).catch((cause: Error) => {
      throw new SourceError(`cannot be made: ${cause.message}`, { file: this.#folder, cause });
    });
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

/** The pack with other blobs for some of its tasks. */
async function layoutWith(pack: Pack, files: ReadonlyMap<string, Uint8Array>): Promise<Uint8Array[]> {
  const tasks = [];
  for (const { id, adapterBytes, metadata, brings } of pack.tasks.values()) {
    const file = files.get(id);
    const blob = file ? parseTaskFile(file, `task "${id}"`).blob : (await pack.load(id)).bytes;
    tasks.push({ entry: { id, adapterBytes, metadata, brings }, blob });
  }
  return layoutFresh({
    description: pack.directory.basisBytes,
    bases: (await pack.bases()).bytes,
    basisId: pack.basisId,
    tasks,
  });
}

function report(
  file: string,
  size: number,
  done: readonly (Distilled & { resumed: boolean })[],
  before: readonly string[],
  seconds: number,
): Result {
  const tasks = done.map(({ id, divergenceBefore, divergenceAfter, kept, resumed }) => {
    return {
      id,
      divergence: { before: divergenceBefore, after: divergenceAfter },
      kept,
      added: !before.includes(id),
      resumed,
    };
  });
  const text = [
    `${file}: ${tasks.length} tasks distilled, ${bytes(size)}`,
    table([
      ["task", "KL projected", "KL distilled", "kept"],
      ...tasks.map(({ id, divergence, kept }) => [id, divergence.before.toFixed(4), divergence.after.toFixed(4), kept]),
    ]),
    `${seconds.toFixed(2)} s`,
  ].join("\n");
  return { json: { file, bytes: size, tasks, seconds }, text };
}
