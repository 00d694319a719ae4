/** The command export: from a task of a pack back to an adapter that other tools load, or the pack's components for those who train. */
import { rm } from "node:fs/promises";
import { dirname, join } from "node:path";
import type { Exportable } from "../adapters/adapter.ts";
import { describeBase } from "../adapters/describe-base.ts";
import { diffusersFile, ggufFile, kohyaFile, onnxAdapterFile, peftFiles } from "../adapters/export.ts";
import { componentsFile, taskAdapter } from "../pack/expand.ts";
import { writeSafetensors } from "../tensor/safetensors-writer.ts";
import { type Attach, command, type Result } from "./command.ts";
import { jsonFile, writeTogether, writeWhole } from "./files.ts";
import {
  byDefault,
  choice,
  given,
  maxExpansion,
  output,
  reading,
  revoked,
  text,
  toggle,
  UsageError,
} from "./options.ts";
import { bytes, count } from "./output.ts";
import type { Run } from "./run.ts";
import { checkExport, checkExportFile, EXPORTED } from "./target.ts";

/** Where an adapter is written to. */
interface ExportTarget {
  readonly path: string;
  readonly force: boolean;
  readonly run: Run;
  /** What the command reads. */
  readonly inputs: readonly (string | undefined)[];
}

/** Formats of one file: its bytes. */
const FILES = {
  diffusers: async (adapter: Exportable) => writeSafetensors(await diffusersFile(adapter), marksOf(adapter)),
  kohya: async (adapter: Exportable) => writeSafetensors(await kohyaFile(adapter), marksOf(adapter)),
  gguf: async (adapter: Exportable, base: string | undefined) =>
    ggufFile(adapter, base === undefined ? {} : await describeBase(base), new Map([[EXPORTED, adapter.id]])),
  onnx_adapter: (adapter: Exportable) => onnxAdapterFile(adapter),
};

const FORMATS = ["peft", "diffusers", "kohya", "gguf", "onnx_adapter"] as const;

export const exportTask: Attach = command({
  usage: "export <PACK>",
  does: "Write a task as an adapter that PEFT, diffusers, llama.cpp or ONNX Runtime loads.",
  example: "export tasks.eigen --task reviews -o adapters/reviews",
  options: {
    output: output(
      "PATH",
      "The folder to write for PEFT, a new or an empty one; the file for other formats. Folders on the way are made.",
    ),
    force: toggle("Replace an earlier export. An adapter that was trained is never replaced."),
    task: text("ID", "The task."),
    components: toggle(
      "Write the components of all tasks instead, to train a new one in PyTorch: one safetensors file.",
    ),
    format: byDefault("peft", {
      ...choice(FORMATS, `Layout of the files: ${FORMATS.join(", ")}.`),
      value: "FORMAT",
    }),
    base: reading(
      "repository",
      text("MODEL", "For gguf: the base model's folder, config.json or GGUF file, for its architecture and heads."),
    ),
    revoked,
    maxExpansion,
  },
  reads: ["file"],
  async run([path]: [string], { output: to, force, components, ...asked }, run) {
    const { task, format, base } = asked;
    const target = { path: to, force, run, inputs: [path, base] };
    if (components) {
      const [other = format === "peft" ? undefined : "--format"] = given(asked, "task", "base");
      if (other) throw new UsageError(`${other} is of one task, --components are of all: leave out one of them`);
      return writeComponents(path, target);
    }
    if (task === undefined) throw new UsageError("missing --task; or --components");
    if (format === "peft") {
      await checkExport(to, force);
      return writeFolder(await taskAdapter(await run.pack(path), task), target);
    }
    await checkExportFile(to, force, target.inputs);
    const adapter = await taskAdapter(await run.pack(path), task);
    return said({ file: to }, adapter, await writeFile(await FILES[format](adapter, base), target));
  },
});

/** @returns the size of the file in bytes */
async function writeFile(
  chunks: Parameters<typeof writeWhole>[1],
  { path, force, run, inputs }: ExportTarget,
): Promise<number> {
  run.folder(dirname(path));
  await run.lock(path);
  await checkExportFile(path, force, inputs);
  return writeWhole(path, chunks, force);
}

/** @throws UsageError when tasks share no components */
async function writeComponents(pack: string, target: ExportTarget): Promise<Result> {
  const { path, force, inputs, run } = target;
  await checkExportFile(path, force, inputs);
  const { tensors, metadata, modules, sides } = run.closing(await componentsFile(await run.pack(pack)));
  if (sides === 0)
    throw new UsageError(
      `--components: the tasks of ${pack} share none. Pack their adapters again with --k 32, or train a plain LoRA, which add takes as it is`,
    );
  const size = await writeFile(writeSafetensors(tensors, metadata), target);
  const some = sides < 2 * modules ? `, on ${sides} of ${2 * modules} sides` : "";
  return {
    json: { file: path, modules, sides, bytes: size },
    text: [`${path}: components of ${count(modules, "module")}${some}, ${bytes(size)}`],
  };
}

function marksOf({ id }: Exportable): Map<string, string> {
  return new Map([
    ["format", "pt"],
    [EXPORTED, id],
  ]);
}

async function writeFolder(adapter: Exportable, { path, force, run }: ExportTarget): Promise<Result> {
  const { config, tensors } = await peftFiles(adapter);
  const weights = join(path, "adapter_model.safetensors");
  const about = join(path, "task.json");
  const hasAbout = Object.keys(adapter.metadata).length > 0;
  run.folder(path);
  await run.lock(weights);
  await checkExport(path, force);
  const [size] = await writeTogether(
    [
      [weights, writeSafetensors(tensors, marksOf(adapter))],
      [join(path, "adapter_config.json"), jsonFile(config)],
      ...(hasAbout ? [[about, jsonFile(adapter.metadata)] as const] : []),
    ],
    force,
  );
  // An earlier export left it: it describes another task.
  if (!hasAbout) await rm(about, { force: true });
  return said({ directory: path }, adapter, size!);
}

function said(where: { file: string } | { directory: string }, { id, modules }: Exportable, size: number): Result {
  const [path] = Object.values(where) as [string];
  return {
    json: { ...where, task: id, modules: modules.size, bytes: size },
    text: [`${path}: task "${id}", ${count(modules.size, "module")}, ${bytes(size)}`],
  };
}
