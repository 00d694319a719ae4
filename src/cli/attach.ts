/**
 * The command attach: an ONNX model that carries a pack's components and takes a task as small inputs, for runtimes
 * that this package has no binding for (docs/attach.md). It prepares files and runs nothing. Tasks that need the
 * weights themselves changed are refused.
 */

import { basename, dirname, join } from "node:path";
import type { Pack } from "../core/pack.ts";
import { BaseMismatchError, FormatError, SourceError } from "../errors.ts";
import type { TaskInput } from "../onnx/inject.ts";
import { PREFIX } from "../onnx/nodes.ts";
import { toBinary } from "../onnx/protobuf.ts";
import { type ModelFile, readModel } from "../onnx/read.ts";
import { externalFiles } from "../onnx/tensors.ts";
import { prepareModel } from "../session/prepare.ts";
import { stackValues, type TaskEvaluator, unfoldingEvaluator } from "../session/values.ts";
import { type SafetensorsEntry, writeSafetensors } from "../tensor/safetensors.ts";
import { type Attach, command } from "./command.ts";
import { checkTarget, makeFolder, realTarget, stat, writeTogether } from "./files.ts";
import { byDefault, choice, force, list, match, output, refuseUnknown, revoked, UsageError } from "./options.ts";
import { bytes, count, warnOfNames } from "./output.ts";

/** The most that protobuf allows, and so the most that runtimes load. */
const MOST_MODEL_BYTES = 2 ** 31 - 1;

/** Marks from which a program tells whether a model and the inputs of a task belong together. */
type Marks = ReadonlyMap<string, string>;

export const attach: Attach = command({
  usage: "attach <MODEL.onnx> <PACK>",
  details: "Tasks become small input files beside it. For runtimes that this package has no binding for.",
  example: "attach model.onnx tasks.eigen -o attached.onnx",
  options: {
    output: output("OUT.onnx", "The model to write, with OUT.base.safetensors and OUT.tasks/ID.safetensors beside it."),
    force,
    mode: byDefault(
      "auto",
      choice(["auto", "core", "factors"], "What the inputs are: cores between the components, or expanded factors."),
    ),
    task: list("ID", "Write the inputs of this task only."),
    revoked,
    ...match,
  },
  reads: ["model", "file"],
  async run([modelPath, packPath]: [string, string], { output: target, force, mode, task, ...options }, run, out) {
    const { refuse } = await run.target(target, { force, inputs: [modelPath, packPath] });
    const pack = await run.pack(packPath);
    refuseUnknown(options.names, pack.modules, packPath);
    const file = run.closing(await readModel(modelPath));
    const folder = dirname(modelPath);
    const external = [...externalFiles(file.model).keys()].map((location) => join(folder, location));
    if (external.length > 0 && realTarget(folder) !== realTarget(dirname(target))) {
      const advice = `write it into the model's folder ${folder}, or copy that folder first`;
      throw new UsageError(`--output ${target}: the model has weights in ${external.join(", ")}; ${advice}`);
    }
    const missing = external.find((path) => !stat(path));
    if (missing) throw new SourceError("cannot be read: there is no such file (ENOENT)", { file: missing });
    const inputs = [modelPath, packPath, ...external];
    refuse(inputs);
    checkTarget(baseFile(target), { force, inputs, output: target });
    const bases = (await pack.bases()).bytes;
    const prepared = await prepareModel(file, pack, bases, { ...options, mode, probeOutputs: false });
    if (prepared.mode === "folded")
      throw new BaseMismatchError(
        `the tasks of ${pack.name} cannot come as inputs: ${prepared.reason}. Merge one into the checkpoint with eigenlora fold, ` +
          'or use createEigenSession, whose mode "folded" changes weights',
        { module: prepared.reason },
      );
    const ids = task.length > 0 ? [...new Set(task)] : [...pack.tasks.keys()];
    // An unknown or damaged task is found before anything is written.
    await pack.prefetch(ids);
    refuseNames(target, ids);
    for (const id of ids) checkTarget(taskFile(target, id), { force, inputs, output: target });
    const { mode: chosen, reason, modules, unconfirmed } = prepared;
    warnOfNames(options.names, unconfirmed, out);
    const marks: Marks = new Map([
      [`${PREFIX}.basis`, pack.basisId],
      [`${PREFIX}.mode`, chosen],
    ]);
    const model = serialise(file, marks, target);
    const evaluator = run.closing(await unfoldingEvaluator(prepared, bases));
    const values = (id: string | null) => valuesOf(pack, prepared.inputs, evaluator, marks, id);
    async function* reported(id: string, done: number) {
      yield* values(id);
      out.progress({ stage: "writing", done, total: ids.length, unit: "tasks" });
    }
    makeFolder(tasksFolder(target));
    const [baseSize, ...sizes] = await writeTogether(
      [
        [baseFile(target), values(null)],
        ...ids.map((id, i) => [taskFile(target, id), reported(id, i + 1)] as const),
        // Last: a model that is there has all that belongs to it, even after a power cut.
        [target, [model]],
      ],
      force,
    );
    const size = sizes.pop()!;
    const base = { file: baseFile(target), bytes: baseSize! };
    const tasks = ids.map((id, i) => ({ id, file: taskFile(target, id), bytes: sizes[i]! }));
    return {
      json: {
        file: target,
        mode: chosen,
        reason,
        modules: modules.length,
        unconfirmed,
        bytes: size,
        external,
        inputs: prepared.inputs,
        base,
        tasks,
      },
      text: [
        `${target}: ${count(modules.length, "module")}, ${bytes(size)}, mode ${chosen} (${reason})`,
        ...external.map((path) => `  weights in ${path}`),
        `${count(prepared.inputs.length, "input")} ${prepared.inputs.length === 1 ? "carries" : "carry"} a task: without one, ${base.file}, ${bytes(base.bytes)}`,
        `  ${count(tasks.length, "task")} in ${tasksFolder(target)}, ${bytes(Math.max(0, ...sizes))} at most`,
        ...(unconfirmed.length > 0
          ? [
              `the weights of ${count(unconfirmed.length, "module")} could not be confirmed: the pack has no fingerprints of them`,
            ]
          : []),
      ],
    };
  },
});

/** @throws FormatError when it becomes too large for a single file */
function serialise(file: ModelFile, marks: Marks, target: string): Uint8Array {
  const { metadataProps } = file.model.proto;
  for (const [key, value] of marks) metadataProps.push({ key, value });
  const model = toBinary("ModelProto", file.model.proto);
  if (model.length <= MOST_MODEL_BYTES) return model;
  throw new FormatError(
    `needs ${model.length} bytes with the components inside, at most ${MOST_MODEL_BYTES} are allowed; ` +
      "save the model with its weights in a file beside it (onnx.save, save_as_external_data)",
    { file: target, part: "model" },
  );
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

/** @throws UsageError for ids that make one file on disks that ignore case */
function refuseNames(target: string, ids: readonly string[]): void {
  const seen = new Map<string, string>();
  for (const id of ids) {
    const name = basename(taskFile(target, id)).toLowerCase();
    const other = seen.get(name);
    if (other !== undefined)
      throw new UsageError(
        `the tasks "${other}" and "${id}" would be one file on disks that ignore case: name others with --task`,
      );
    seen.set(name, id);
  }
}

/** The inputs of a task as a safetensors file. @param id null for the base */
async function* valuesOf(
  pack: Pack,
  inputs: readonly TaskInput[],
  evaluator: TaskEvaluator,
  marks: Marks,
  id: string | null,
) {
  const values = await evaluator.read(id);
  const entries = inputs.map((input): SafetensorsEntry => {
    const { dims, data } = stackValues(input, [values.inputs.get(input.name)!]);
    const dtype = data instanceof BigInt64Array ? "I64" : "F32";
    const read = (): Uint8Array => new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    return { name: input.name, dtype, shape: dims, read };
  });
  // Metadata of a safetensors file are text: each value as JSON.
  const fields = Object.entries(id === null ? {} : pack.tasks.get(id)!.metadata);
  const metadata = new Map([...fields.map(([key, value]) => [key, JSON.stringify(value)] as const), ...marks]);
  if (id !== null) metadata.set(`${PREFIX}.task`, id);
  yield* writeSafetensors(entries, metadata);
}
