/** The command export: from a task of a pack back to an adapter that other tools load. */
import { rm } from "node:fs/promises";
import { dirname, join } from "node:path";
import { describeBase } from "../adapters/describe-base.ts";
import { peftFiles } from "../adapters/export.ts";
import { ggufFile } from "../adapters/export-gguf.ts";
import { onnxAdapterFile } from "../adapters/export-onnx-adapter.ts";
import { diffusersFile, kohyaFile } from "../adapters/export-pipeline.ts";
import type { Exportable } from "../adapters/factors.ts";
import { taskAdapter } from "../pack/expand.ts";
import { writeSafetensors } from "../tensor/safetensors-writer.ts";
import { type Attach, command, type Result } from "./command.ts";
import { jsonFile, writeTogether, writeWhole } from "./files.ts";
import { byDefault, choice, output, reading, revoked, task, text, toggle } from "./options.ts";
import { bytes, count } from "./output.ts";
import type { Run } from "./run.ts";
import { checkExport, checkExportFile, EXPORTED } from "./target.ts";

/** Where an adapter is written to. */
interface ExportTarget {
  readonly path: string;
  readonly force: boolean;
  readonly run: Run;
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
    task,
    format: byDefault("peft", {
      ...choice(FORMATS, `Layout of the files: ${FORMATS.join(", ")}.`),
      value: "FORMAT",
    }),
    base: reading(
      "repository",
      text("MODEL", "For gguf: the base model's folder, config.json or GGUF file, for its architecture and heads."),
    ),
    revoked,
  },
  reads: ["file"],
  async run([path]: [string], { output: to, force, task, format, base }, run) {
    const target = { path: to, force, run };
    if (format === "peft") {
      await checkExport(to, force);
      return writeFolder(await taskAdapter(await run.pack(path), task), target);
    }
    await checkExportFile(to, force, [path, base]);
    const adapter = await taskAdapter(await run.pack(path), task);
    const chunks = await FILES[format](adapter, base);
    run.folder(dirname(to));
    await run.lock(to);
    await checkExportFile(to, force, [path, base]);
    const size = await writeWhole(to, chunks, force);
    return said({ file: to }, adapter, size);
  },
});

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
