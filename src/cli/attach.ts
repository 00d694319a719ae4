/**
 * The command attach: an ONNX model that carries a pack's components and takes a task as small inputs, for runtimes
 * that this package has no binding for (docs/attach.md). It prepares files and runs nothing. Tasks that need the
 * weights themselves changed are refused.
 */
import { basename, join } from "node:path";
import type { Pack } from "../core/pack.ts";
import { createUnfolding } from "../core/session-runtime.ts";
import { BaseMismatchError, FormatError } from "../errors.ts";
import type { Grafted, TaskInput } from "../onnx/adapted.ts";
import { PREFIX } from "../onnx/nodes.ts";
import { type ModelFile, readModel } from "../onnx/read.ts";
import { embedWeights } from "../onnx/write.ts";
import { type PreparedModel, prepareModel } from "../session/prepare.ts";
import { stackValues, TaskEvaluator } from "../session/values.ts";
import { type SafetensorsEntry, writeSafetensors } from "../tensor/safetensors-writer.ts";
import { type Attach, command } from "./command.ts";
import { copyAll, placesOf } from "./external.ts";
import { writeTogether } from "./files.ts";
import { match, refuseSwapped, refuseUnknown } from "./matching.ts";
import { byDefault, choice, force, list, output, revoked, UsageError } from "./options.ts";
import { bytes, count, type Output } from "./output.ts";
import type { Run } from "./run.ts";
import { checkTarget } from "./target.ts";

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
  does: "Write an ONNX model with the components inside.",
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
    task: list("ID", "Write the inputs of this task only. May be given again."),
    revoked,
    ...match,
  },
  reads: ["model", "file"],
  async run([modelPath, packPath]: [string, string], { output: target, force, mode, task, ...options }, run, out) {
    await refuseSwapped(modelPath, packPath, run);
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
