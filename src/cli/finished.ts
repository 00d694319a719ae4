/**
 * Tasks distilled one after the other, for the command distill: what is finished is kept in a folder until all are, so that a run which
 * was cut off goes on.
 */
import { createHash } from "node:crypto";
import { existsSync } from "node:fs";
import { readdir, rm, rmdir } from "node:fs/promises";
import { join, resolve } from "node:path";
import type { EigenSession } from "../../bindings/onnxruntime.ts";
import type { Adapter } from "../adapters/adapter.ts";
import type { Pack } from "../core/pack.ts";
import { parseTaskFile } from "../core/task-file.ts";
import { FormatError } from "../errors.ts";
import { encodeTaskFile } from "../format/encode.ts";
import { type ProjectedAdapter, projectAdapters } from "../pack/add.ts";
import type { Tokenizer } from "../session/tokens.ts";
import type { Dtypes } from "../tensor/dtypes.ts";
import { type Distilled, type DistillOptions, distill } from "../train/distill.ts";
import { jsonFile, readJson, writeWhole } from "./files.ts";
import { adapterDigest } from "./hub-part.ts";
import { type Output, table } from "./output.ts";

export type Done = Distilled & { readonly resumed: boolean };

/** How tasks are distilled. */
export interface Distilling {
  readonly encode: Tokenizer;
  readonly steps: number;
  readonly batch: number;
  readonly session: EigenSession;
  readonly questions: Pick<DistillOptions, "texts" | "examples">;
  /** All that an outcome depends on beside the task. */
  readonly settings: object;
  /** A folder. */
  readonly finished: string;
}

/** Projects adapters and gives the pack in memory their tasks. */
export async function addProjected(
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

/** Distils the task of every adapter, in order, but for those that are finished. */
export async function distilEach(
  pack: Pack,
  adapters: readonly Adapter[],
  { session, encode, questions, steps, batch, settings, finished }: Distilling,
  out: Output,
): Promise<Done[]> {
  const earlier = new Map<Adapter, Distilled>();
  const paths: string[] = [];
  for (const adapter of adapters) {
    const path = join(finished, await keyOf(pack, adapter, settings));
    const found = await readFinished(path);
    if (found) earlier.set(adapter, found);
    paths.push(path);
  }
  const done: Done[] = [];
  // Where nothing is trained, tasks are counted.
  const [each, unit] = steps > 0 ? [steps, "steps"] : [1, "tasks"];
  const total = each * (adapters.length - earlier.size);
  let before = 0;
  for (const [i, adapter] of adapters.entries()) {
    const there = earlier.get(adapter);
    if (there) {
      done.push({ ...there, resumed: true });
      continue;
    }
    const tell = (step: number): void =>
      out.progress({ stage: "distilling", done: before + step, total, unit, detail: adapter.id });
    // Asking the adapter and solving coefficients come before the first step.
    tell(0);
    const onStep = ({ step }: { step: number }): void => tell(step);
    const made = await distill(session, { adapter, ...questions, encode, steps, batch, onStep });
    await writeWhole(paths[i]!, jsonFile({ ...made, file: Buffer.from(made.file).toString("base64") }));
    done.push({ ...made, resumed: false });
    tell(each);
    before += each;
  }
  if (done.every(({ kept }) => kept === "projected"))
    out.warn(`no task got better than it was, so all stay as projected: try more than --steps ${steps}, or more text`);
  return done;
}

/** A name for one task's outcome: of all it depends on. */
async function keyOf(pack: Pack, adapter: Adapter, settings: object): Promise<string> {
  const { id, file, metadata } = adapter;
  const content = await adapterDigest(adapter);
  const of = { basis: pack.basisId, id, file: resolve(file), content, metadata, ...settings };
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

/** Removes finished tasks, those of earlier settings too, and their folder, unless something that is not ours is in it. */
export async function removeFinished(folder: string): Promise<void> {
  for (const name of await readdir(folder).catch(() => []))
    if (/^[0-9a-f]{64}(\.[0-9a-f]{8}\.tmp)?$/.test(name)) await rm(join(folder, name));
  await rmdir(folder).catch(() => undefined);
}

/** Figures of each task, for `--json`. @param before ids of the tasks that there were */
export function figuresOf(done: readonly Done[], before: ReadonlySet<string>): object[] {
  return done.map(({ id, divergenceBefore, divergenceAfter, kept, resumed }) => {
    const divergence = { before: divergenceBefore, after: divergenceAfter };
    return { id, divergence, kept, added: !before.has(id), resumed };
  });
}

/** The same for people. */
export function tableOf(done: readonly Done[]): string[] {
  const rows = done.map(({ id, divergenceBefore, divergenceAfter, kept }) => [
    id,
    divergenceBefore.toFixed(4),
    divergenceAfter.toFixed(4),
    kept,
  ]);
  return table([["task", "KL projected", "KL distilled", "kept"], ...rows]);
}
