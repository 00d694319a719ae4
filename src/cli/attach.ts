/**
 * The command attach: an ONNX model that carries a pack's components and takes a task as small inputs, for runtimes
 * that this package has no binding for (docs/attach.md). It prepares files and runs nothing. Tasks that need the
 * weights themselves changed are refused.
 */
import { existsSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { nearest } from "../arguments.ts";
import { createBackend } from "../backends/select.ts";
import { BaseMismatchError, FormatError, SourceError } from "../errors.ts";
import type { Grafted, TaskInput } from "../onnx/graft.ts";
import { PREFIX } from "../onnx/nodes.ts";
import type { GraphProto } from "../onnx/onnx_pb.ts";
import { type ModelFile, readModel } from "../onnx/read.ts";
import { EXTERNAL } from "../onnx/tensors.ts";
import { embedWeights } from "../onnx/write.ts";
import { openSource } from "../open-source.ts";
import type { Pack } from "../pack/pack.ts";
import { Workbench } from "../runtime/workbench.ts";
import { type PreparedModel, prepareModel } from "../session/prepare.ts";
import { stackValues, TaskEvaluator } from "../session/values.ts";
import type { ByteSource } from "../source.ts";
import { type SafetensorsEntry, writeSafetensors } from "../tensor/safetensors-writer.ts";
import { type Attach, command } from "./command.ts";
import { makeFolder, refuseOverwriting, writeWhole } from "./files.ts";
import { assignments, byDefault, choice, list, output, toggle, UsageError } from "./options.ts";
import { bytes, type Output } from "./output.ts";

/** The most that protobuf allows, and so the most that runtimes load. */
const MOST_MODEL_BYTES = 2 ** 31 - 1;
/** Weights beside a model may be larger than memory: so much of them is copied at a time. */
const CHUNK_BYTES = 2 ** 24;

/** By these a program can tell whether a model and the inputs of a task belong together. */
type Marks = ReadonlyMap<string, string>;

const modes = choice(["auto", "core", "factors"], "Inputs are cores between the components, or expanded factors.");

export const attach: Attach = command({
  usage: "attach <MODEL.onnx> <PACK>",
  does: "Write an ONNX model with the components inside.",
  details: "Tasks come beside it, as small input files. For runtimes that this package has no binding for.",
  options: {
    output: output("OUT.onnx", "The model to write; OUT.base.safetensors and OUT.tasks/ID.safetensors come beside it."),
    mode: byDefault("auto", {
      ...modes,
      parse(given, flag, before) {
        if (given !== "folded") return modes.parse(given, flag, before);
        const others = 'use eigenlora fold, or createEigenSession with mode "folded"';
        throw new UsageError(`--mode folded: weights are no inputs; ${others}`);
      },
    }),
    task: list("ID", "Write the inputs of this task only. May be given again."),
    names: assignments(
      "MODULE=WEIGHT",
      "The model's name for a module, where it is not found. May be given again.",
      "first",
    ),
    ignore: list("NAME", "Leave out a parameter or module of the tasks, as classifier. May be given again."),
    anyBase: toggle("Accept a model whose weights differ from the pack's fingerprints."),
  },
  async run([modelPath, packPath]: [string, string], { output: target, mode, task, ...options }, run, out) {
    refuseOverwriting(target, modelPath, packPath);
    const pack = await run.pack(packPath);
    for (const module of options.names.keys()) refuseUnknown(module, pack);
    const file = run.closing(await readModel(modelPath));
    const bases = (await pack.bases()).bytes;
    const prepared = await prepareModel(file, pack, bases, { ...options, mode, probeOutputs: false });
    refuseFolded(prepared, pack);
    const ids = task.length > 0 ? [...new Set(task)] : [...pack.tasks.keys()];
    // An unknown or damaged task is found before anything is written.
    await pack.prefetch(ids);
    const { mode: chosen, reason, inputs, modules } = prepared;
    const marks: Marks = new Map([
      [`${PREFIX}.basis`, pack.basisId],
      [`${PREFIX}.mode`, chosen],
    ]);
    const model = serialise(file, prepared, marks, target);
    await makeFolder(dirname(target));
    await run.lock(target);
    const external = await writeExternal(file, target);
    const backend = run.closing((await createBackend({ webgpu: false })).backend);
    const evaluator = new TaskEvaluator(prepared, new Workbench(backend, pack.modules, bases));
    const { base, tasks, folder } = await writeInputs({ pack, inputs, evaluator, marks }, ids, target, out);
    // Last: a model that is there has all that belongs to it.
    const size = await writeWhole(target, [model]);
    const largest = tasks.reduce((most, one) => Math.max(most, one.bytes), 0);
    return {
      json: { file: target, mode: chosen, reason, modules: modules.length, bytes: size, external, inputs, base, tasks },
      text: [
        `${target}: ${modules.length} modules, ${bytes(size)}, mode ${chosen} (${reason})`,
        ...external.map((path) => `  weights in ${path}`),
        `${inputs.length} inputs carry a task: without one, ${base.file}, ${bytes(base.bytes)}`,
        `  ${tasks.length} tasks in ${folder}, ${bytes(largest)} at most`,
      ],
    };
  },
});

function refuseUnknown(module: string, { modules, name }: Pack): void {
  const known = modules.map((one) => one.name);
  if (known.includes(module)) return;
  const close = nearest(module, known);
  const found = close.length > 0 ? `; the nearest are ${close.join(", ")}` : "";
  throw new UsageError(`--names ${module}=…: ${name} adapts no such module${found}`);
}

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
function serialise(file: ModelFile, { initializers }: Grafted, marks: Marks, target: string): Uint8Array {
  const { metadataProps } = file.model.proto;
  for (const [key, value] of marks) metadataProps.push({ $typeName: "onnx.StringStringEntryProto", key, value });
  const model = embedWeights(file, initializers);
  if (model.length <= MOST_MODEL_BYTES) return model;
  throw new FormatError(
    `needs ${model.length} bytes with the components inside, at most ${MOST_MODEL_BYTES} are allowed; ` +
      "save the model with its weights in a file beside it (onnx.save, save_as_external_data)",
    { file: target, part: "model" },
  );
}

/**
 * Brings the files that hold weights of the model to where the new one looks for them.
 * @returns their paths
 * @throws SourceError when another file lies there
 */
async function writeExternal(file: ModelFile, target: string): Promise<string[]> {
  const places = [...externalLocations(file.model.graph.proto)].map((location) => {
    const path = join(dirname(target), location);
    refuseOverwriting(target, path);
    return { location, path };
  });
  for (const { location, path } of places) {
    // The model was given as a path or URL, so there is telling where these files lie.
    const source = await file.external!(location);
    if (resolve(source.name) !== resolve(path)) await copyTo(path, source);
  }
  return places.map(({ path }) => path);
}

/** What the model's initializers call the files beside it. */
function externalLocations(graph: GraphProto, found: Set<string> = new Set()): Set<string> {
  for (const { dataLocation, externalData } of graph.initializer) {
    const location = externalData.find(({ key }) => key === "location")?.value;
    if (dataLocation === EXTERNAL && location !== undefined) found.add(location);
  }
  for (const { attribute } of graph.node) {
    for (const { g, graphs } of attribute) {
      for (const nested of g ? [g, ...graphs] : graphs) externalLocations(nested, found);
    }
  }
  return found;
}

async function copyTo(path: string, source: ByteSource): Promise<void> {
  // A URL's size is known after the first read.
  if (source.byteLength === undefined) await source.read(0, 1);
  if (existsSync(path)) {
    if (await isSame(path, source)) return;
    const message = `is there already and differs from the model's ${source.name}; choose another folder`;
    throw new SourceError(message, { file: path });
  }
  await makeFolder(dirname(path));
  await writeWhole(path, chunksOf(source));
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

/** What there is to say about the inputs of tasks. */
interface Attached {
  readonly pack: Pack;
  readonly inputs: readonly TaskInput[];
  readonly evaluator: TaskEvaluator;
  readonly marks: Marks;
}

/** The inputs of the base and of each task, one file each, beside the model. */
async function writeInputs(attached: Attached, ids: readonly string[], target: string, out: Output) {
  const stem = target.replace(/\.onnx$/i, "");
  const folder = `${stem}.tasks`;
  await makeFolder(folder);
  const base = await writeValues(attached, `${stem}.base.safetensors`, null);
  const tasks = [];
  for (const [i, id] of ids.entries()) {
    // An id may hold any character; a file's name may not. What this leaves as it is may stand in names everywhere.
    const name = encodeURIComponent(id).replaceAll("*", "%2A");
    tasks.push({ id, ...(await writeValues(attached, join(folder, `${name}.safetensors`), id)) });
    out.progress("task", i + 1, ids.length);
  }
  return { base, folder, tasks };
}

/** @param id of a task; null for the base */
async function writeValues({ pack, inputs, evaluator, marks }: Attached, file: string, id: string | null) {
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
  return { file, bytes: await writeWhole(file, writeSafetensors(entries, metadata)) };
}
