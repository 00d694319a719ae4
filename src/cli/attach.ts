/**
 * The command attach: an ONNX model that carries a pack's components and takes a task as small inputs, for runtimes
 * that this package has no binding for (docs/attach.md). It prepares files and runs nothing. Tasks that need the
 * weights themselves changed are refused.
 */

import { existsSync, rmSync } from "node:fs";
import { realpath } from "node:fs/promises";
import { basename, dirname, isAbsolute, join, relative, resolve, sep } from "node:path";
import type { Pack } from "../core/pack.ts";
import { createUnfolding } from "../core/session-runtime.ts";
import { BaseMismatchError, FormatError, SourceError } from "../errors.ts";
import type { Injected, TaskInput } from "../onnx/inject.ts";
import { PREFIX } from "../onnx/nodes.ts";
import { type ModelFile, readModel } from "../onnx/read.ts";
import { externalFiles } from "../onnx/tensors.ts";
import { embedWeights } from "../onnx/write.ts";
import { openSource } from "../open-source.ts";
import { type PreparedModel, prepareModel } from "../session/prepare.ts";
import { stackValues, TaskEvaluator } from "../session/values.ts";
import type { ByteSource } from "../source.ts";
import { type SafetensorsEntry, writeSafetensors } from "../tensor/safetensors-writer.ts";
import { type Attach, command, type Run } from "./command.ts";
import { checkTarget, writeTogether, writeWhole } from "./files.ts";
import { byDefault, choice, force, list, match, output, refuseUnknown, revoked, UsageError } from "./options.ts";
import { bytes, count, type Output } from "./output.ts";

/** The most that protobuf allows, and so the most that runtimes load. */
const MOST_MODEL_BYTES = 2 ** 31 - 1;

/** Marks from which a program tells whether a model and the inputs of a task belong together. */
type Marks = ReadonlyMap<string, string>;

const modes = choice(
  ["auto", "core", "factors"],
  "What the inputs are: cores between the components, or expanded factors.",
);

export const attach: Attach = command({
  usage: "attach <MODEL.onnx> <PACK>",
  details: "Tasks become small input files beside it. For runtimes that this package has no binding for.",
  example: "attach model.onnx tasks.eigen -o attached.onnx",
  options: {
    output: output("OUT.onnx", "The model to write, with OUT.base.safetensors and OUT.tasks/ID.safetensors beside it."),
    force,
    mode: byDefault("auto", {
      ...modes,
      parse(given, flag, before) {
        if (given !== "folded") return modes.parse(given, flag, before);
        const others = 'use eigenlora fold, or createEigenSession with mode "folded"';
        throw new UsageError(`--mode folded: an ONNX file cannot take weights as inputs; ${others}`);
      },
    }),
    task: list("ID", "Write the inputs of this task only."),
    revoked,
    ...match,
  },
  reads: ["model", "file"],
  async run([modelPath, packPath]: [string, string], { output: target, force, mode, task, ...options }, run, out) {
    await run.refuseSwapped(modelPath, packPath);
    checkTarget(target, { force, inputs: [modelPath, packPath] });
    checkTarget(baseFile(target), { force, output: target });
    const pack = await run.pack(packPath);
    refuseUnknown(options.names, pack.modules, packPath);
    const file = run.closing(await readModel(modelPath));
    const places = await placesOf(file, modelPath, target, [baseFile(target)], [tasksFolder(target)]);
    const bases = (await pack.bases()).bytes;
    const prepared = await prepareModel(file, pack, bases, { ...options, mode, probeOutputs: false });
    refuseFolded(prepared, pack);
    const ids = task.length > 0 ? [...new Set(task)] : [...pack.tasks.keys()];
    // An unknown or damaged task is found before anything is written.
    await pack.prefetch(ids);
    refuseNames(target, ids);
    for (const id of ids) checkTarget(taskFile(target, id), { force, output: target });
    const { mode: chosen, reason, inputs, modules, unconfirmed } = prepared;
    const marks: Marks = new Map([
      [`${PREFIX}.basis`, pack.basisId],
      [`${PREFIX}.mode`, chosen],
    ]);
    const model = serialise(file, prepared, marks, target);
    await run.lock(target);
    const external = await copyAll(file, places, run);
    const unfolding = await createUnfolding(pack, prepared.mode as "core" | "factors", bases, prepared.base);
    const evaluator = new TaskEvaluator(prepared, run.closing(unfolding));
    const attached = { pack, inputs, evaluator, marks };
    const { base, tasks, folder, size } = await writeAll(attached, ids, { target, force, model }, run, out);
    const largest = tasks.reduce((most, one) => Math.max(most, one.bytes), 0);
    return {
      json: {
        file: target,
        mode: chosen,
        reason,
        modules: modules.length,
        unconfirmed,
        bytes: size,
        external,
        inputs,
        base,
        tasks,
      },
      text: [
        `${target}: ${count(modules.length, "module")}, ${bytes(size)}, mode ${chosen} (${reason})`,
        ...external.map((path) => `  weights in ${path}`),
        `${count(inputs.length, "input")} ${inputs.length === 1 ? "carries" : "carry"} a task: without one, ${base.file}, ${bytes(base.bytes)}`,
        `  ${count(tasks.length, "task")} in ${folder}, ${bytes(largest)} at most`,
        ...(unconfirmed.length > 0
          ? [
              `the weights of ${count(unconfirmed.length, "module")} could not be confirmed: the pack has no fingerprints of them`,
            ]
          : []),
      ],
    };
  },
});

/** @throws BaseMismatchError when the tasks need other weights */
function refuseFolded({ mode, reason }: PreparedModel, { name }: Pack): void {
  if (mode !== "folded") return;
  throw new BaseMismatchError(
    `the tasks of ${name} cannot come as inputs: ${reason}. Merge one into the checkpoint with eigenlora fold, ` +
      'or use createEigenSession, whose mode "folded" changes weights',
    { module: reason },
  );
}

/** @throws FormatError when it becomes too large for a single file */
function serialise(file: ModelFile, { initializers }: Injected, marks: Marks, target: string): Uint8Array {
  const { metadataProps } = file.model.proto;
  for (const [key, value] of marks) metadataProps.push({ key, value });
  const model = embedWeights(file, initializers);
  if (model.length <= MOST_MODEL_BYTES) return model;
  throw new FormatError(
    `needs ${model.length} bytes with the components inside, at most ${MOST_MODEL_BYTES} are allowed; ` +
      "save the model with its weights in a file beside it (onnx.save, save_as_external_data)",
    { file: target, part: "model" },
  );
}

/** What there is to say about the inputs of tasks. */
interface Attached {
  readonly pack: Pack;
  readonly inputs: readonly TaskInput[];
  readonly evaluator: TaskEvaluator;
  readonly marks: Marks;
}

function baseFile(target: string): string {
  return `${target.replace(/\.onnx$/i, "")}.base.safetensors`;
}

function tasksFolder(target: string): string {
  return `${target.replace(/\.onnx$/i, "")}.tasks`;
}

function taskFile(target: string, id: string): string {
  // An id may hold any character; a file's name may not. What this leaves as it is may stand in names everywhere.
  return join(tasksFolder(target), `${encodeURIComponent(id).replaceAll("*", "%2A")}.safetensors`);
}

/** Most bytes of a file's name, less what is written beside it. */
const MOST_NAME = 230;

/** @throws UsageError for ids that make one file on disks that ignore case, or a name that is too long */
function refuseNames(target: string, ids: readonly string[]): void {
  const seen = new Map<string, string>();
  for (const id of ids) {
    const name = basename(taskFile(target, id)).toLowerCase();
    const other = seen.get(name);
    if (other !== undefined)
      throw new UsageError(
        `the tasks "${other}" and "${id}" would be one file on disks that ignore case: name others with --task`,
      );
    if (name.length > MOST_NAME)
      throw new UsageError(
        `the name of task "${id}" is too long for a file: leave it out by naming the others with --task`,
      );
    seen.set(name, id);
  }
}

/** The model with the components inside, and where it goes. */
interface Model {
  readonly target: string;
  readonly force: boolean;
  readonly model: Uint8Array;
}

/** The inputs of the base and of each task, one file each, beside the model: what belongs together is there together. */
async function writeAll(
  attached: Attached,
  ids: readonly string[],
  { target, force, model }: Model,
  run: Run,
  out: Output,
) {
  const folder = tasksFolder(target);
  run.folder(folder);
  const base = baseFile(target);
  const files = ids.map((id, i) => {
    const done = (): void => out.progress({ stage: "writing", done: i + 1, total: ids.length, unit: "tasks" });
    return { id, file: taskFile(target, id), chunks: valuesOf(attached, id, done) };
  });
  const [baseSize, ...sizes] = await writeTogether(
    [
      [base, valuesOf(attached, null)],
      ...files.map(({ file, chunks }) => [file, chunks] as const),
      // Last: a model that is there has all that belongs to it, even after a power cut.
      [target, [model]],
    ],
    force,
  );
  const tasks = files.map(({ id, file }, i) => ({ id, file, bytes: sizes[i]! }));
  return { base: { file: base, bytes: baseSize! }, folder, tasks, size: sizes.at(-1)! };
}

/** @param id of a task; null for the base */
async function* valuesOf({ pack, inputs, evaluator, marks }: Attached, id: string | null, done?: () => void) {
  const values = await evaluator.read(id);
  const entries = inputs.map((input): SafetensorsEntry => {
    const { dims, data } = stackValues(input, [values.inputs.get(input.name)!]);
    const dtype = data instanceof BigInt64Array ? "I64" : "F32";
    const read = (): Uint8Array => new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    return { name: input.name, dtype, shape: dims, read };
  });
  // Metadata of a safetensors file are text: each value as JSON.
  const own = Object.entries(id === null ? {} : pack.tasks.get(id)!.metadata);
  const metadata = new Map([...own.map(([key, value]) => [key, JSON.stringify(value)] as const), ...marks]);
  if (id !== null) metadata.set(`${PREFIX}.task`, id);
  yield* writeSafetensors(entries, metadata);
  done?.();
}

// The files that hold weights of an ONNX model, on their way to where a new one looks for them. The model's author has named them:
// nothing is read or written outside the folders that the user has named, links included.

/** Weights beside a model may be larger than memory: so much of them is copied at a time. */
const CHUNK_BYTES = 2 ** 24;

/** A file beside the model, by the model's name for it, and where it goes. */
interface Placed {
  readonly location: string;
  readonly path: string;
}

/**
 * Where the files beside a model go: nothing is read or written yet.
 * @param model path or URL
 * @param target of the new model
 * @param files and `folders` that are written too
 * @throws FormatError when one has a name outside the model's folder
 * @throws UsageError when one would lie where something else is written
 * @throws SourceError when a link leads out of the model's folder, or out of the target's
 */
async function placesOf(
  file: ModelFile,
  model: string,
  target: string,
  files: readonly string[],
  folders: readonly string[],
): Promise<Placed[]> {
  for (const folder of folders) await refuseLeaving(dirname(target), folder);
  const places: Placed[] = [];
  for (const location of externalFiles(file.model.graph.proto).keys()) {
    // Refuses, in its own words, what is outside by its name.
    if (isAbsolute(location) || !isInside(resolve("."), resolve(location))) await file.external!(location);
    const path = join(dirname(target), location);
    checkTarget(target, { force: true, inputs: [path] });
    const taken =
      files.find((own) => resolve(own) === resolve(path)) ??
      folders.find((own) => isInside(resolve(own), resolve(path)));
    if (taken !== undefined) {
      throw new UsageError(`--output ${target}: ${taken} is where weights of the model go; choose another name`);
    }
    if (!/^https?:/i.test(model)) await refuseStraying(model, location);
    await refuseLeaving(dirname(target), path);
    places.push({ location, path });
  }
  return places;
}

/**
 * Copies what does not lie there already; a copy goes again when the command fails.
 * @returns the paths
 * @throws SourceError when another file lies there
 */
async function copyAll(file: ModelFile, places: readonly Placed[], run: Run): Promise<string[]> {
  for (const { location, path } of places) {
    // The model was given as a path or URL, so there is telling where these files lie.
    const source = await file.external!(location);
    if (resolve(source.name) !== resolve(path)) await copyTo(path, source, run);
  }
  return places.map(({ path }) => path);
}

/**
 * The caches of hubs keep all files of a model in one folder and link to them from another: so a file may lie where the model's
 * own file does.
 * @throws SourceError when a file beside the model is a link to elsewhere
 */
async function refuseStraying(model: string, location: string): Promise<void> {
  const path = join(dirname(model), location);
  // What is not there is missed in better words when it is read.
  const real = await realpath(path).catch(() => undefined);
  if (real === undefined) return;
  const folders = [await realpath(dirname(model)), dirname(await realpath(model))];
  if (folders.some((folder) => isInside(folder, real))) return;
  const message = `leads by a link to ${real}, outside the model's folder; put the file itself there`;
  throw new SourceError(message, { file: path });
}

/** @throws SourceError when a path in a folder leads out of it by a link */
async function refuseLeaving(folder: string, path: string): Promise<void> {
  const real = await realpath(folder).catch(() => undefined);
  let there = path;
  while (!existsSync(there) && resolve(there) !== resolve(folder)) there = dirname(there);
  const found = await realpath(there).catch(() => undefined);
  if (real === undefined || found === undefined || isInside(real, found)) return;
  throw new SourceError(`leads by a link to ${found}, outside ${folder}; remove it, or choose another --output`, {
    file: there,
  });
}

function isInside(folder: string, path: string): boolean {
  const way = relative(folder, path);
  return way !== ".." && !way.startsWith(`..${sep}`) && !isAbsolute(way);
}

async function copyTo(path: string, source: ByteSource, run: Run): Promise<void> {
  // A URL's size is known after the first read.
  if (source.byteLength === undefined) await source.read(0, 1);
  if (existsSync(path)) {
    if (await isSame(path, source)) return;
    const message = `already exists and differs from the model's ${source.name}; choose another folder`;
    throw new SourceError(message, { file: path });
  }
  run.folder(dirname(path));
  await writeWhole(path, chunksOf(source), false);
  run.undoing(() => rmSync(path, { force: true }));
}

async function* chunksOf(source: ByteSource): AsyncGenerator<Uint8Array, void> {
  const size = source.byteLength!;
  for (let at = 0; at < size; at += CHUNK_BYTES) yield await source.read(at, Math.min(CHUNK_BYTES, size - at));
}

async function isSame(path: string, source: ByteSource): Promise<boolean> {
  const there = await openSource(path);
  try {
    if (there.byteLength !== source.byteLength) return false;
    let at = 0;
    for await (const chunk of chunksOf(source)) {
      if (Buffer.compare(chunk, await there.read(at, chunk.length)) !== 0) return false;
      at += chunk.length;
    }
    return true;
  } finally {
    await there.close?.();
  }
}
