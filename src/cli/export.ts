/**
 * The commands export and fold: a task of a pack as an adapter that other tools load, the pack's components for those who train, or the
 * weights of a base model with a task merged into them.
 */

import { readdir, rm } from "node:fs/promises";
import { dirname, extname, join } from "node:path";
import type { Exportable } from "../adapters/adapter.ts";
import { diffusersFile } from "../adapters/diffusers.ts";
import { ggufFile } from "../adapters/gguf.ts";
import { kohyaFile } from "../adapters/kohya.ts";
import { onnxAdapterFile } from "../adapters/onnx-adapter.ts";
import { peftFiles } from "../adapters/peft.ts";
import { describeBase } from "../adapters/tree.ts";
import { safetensorsHost } from "../core/open-base.ts";
import { createRuntime } from "../core/runtime.ts";
import { wrongKind } from "../format/kind.ts";
import { openSource } from "../open-source.ts";
import { COMPONENTS, componentsFile, taskAdapter } from "../pack/expand.ts";
import { openGguf } from "../tensor/gguf.ts";
import { openSafetensors, type SafetensorsEntry, writeSafetensors } from "../tensor/safetensors.ts";
import { type Attach, command, type Result, type Run } from "./command.ts";
import { checkTarget, isLink, jsonFile, stat, writeTogether, writeWhole } from "./files.ts";
import {
  byDefault,
  choice,
  force,
  match,
  maxExpansion,
  output,
  refuseUnknown,
  required,
  revoked,
  task,
  text,
  toggle,
  UsageError,
} from "./options.ts";
import { bytes, count } from "./output.ts";

/** The key in a file's metadata by which an exported adapter is known; its value is the id of the task. */
const EXPORTED = "eigenlora.task";

/** Destination of an adapter. */
interface ExportTarget {
  readonly path: string;
  readonly force: boolean;
  readonly run: Run;
  /** Files that the command reads. */
  readonly inputs: readonly (string | undefined)[];
}

/** Bytes of formats that are one file. */
const FILES = {
  diffusers: async (adapter: Exportable) => writeSafetensors(await diffusersFile(adapter), marksOf(adapter)),
  kohya: async (adapter: Exportable) => writeSafetensors(await kohyaFile(adapter), marksOf(adapter)),
  gguf: async (adapter: Exportable, base: string | undefined) =>
    ggufFile(adapter, base === undefined ? {} : await describeBase(base), new Map([[EXPORTED, adapter.id]])),
  onnx_adapter: (adapter: Exportable) => onnxAdapterFile(adapter),
};

const FORMATS = ["peft", "diffusers", "kohya", "gguf", "onnx_adapter"] as const;
const OF_ALL = "components are of all tasks";

const exportTask: Attach = command({
  usage: "export <PACK>",
  example: "export tasks.eigen --task reviews -o adapters/reviews",
  options: {
    output: output(
      "PATH",
      "The folder to write for PEFT, a new or an empty one; the file for other formats. Folders on the way are made.",
    ),
    force: toggle("Replace an earlier export. An adapter that was trained is never replaced."),
    task,
    components: {
      ...toggle("Write the components of all tasks instead, to train a new one in PyTorch: one safetensors file."),
      excludes: { task: OF_ALL, format: OF_ALL, base: OF_ALL },
    },
    format: byDefault("peft", {
      ...choice(FORMATS, `Layout of the files: ${FORMATS.join(", ")}.`),
      value: "FORMAT",
    }),
    base: text(
      "MODEL",
      "For gguf: the base model's folder, config.json or GGUF file, for its architecture and heads.",
      "repository",
    ),
    revoked,
    maxExpansion,
  },
  reads: ["file"],
  async run([path]: [string], { output: to, force, components, task, format, base }, run) {
    const target = { path: to, force, run, inputs: [path, base] };
    if (components) return writeComponents(path, target);
    if (task === undefined) throw new UsageError("missing --task; or --components");
    if (format === "peft") {
      await checkFolder(to, force);
      return writeFolder(await taskAdapter(await run.pack(path), task), target);
    }
    await checkFile(target);
    const adapter = await taskAdapter(await run.pack(path), task);
    return resultOf({ file: to }, adapter, await writeFile(await FILES[format](adapter, base), target));
  },
});

/** @returns the size of the file in bytes */
async function writeFile(chunks: Parameters<typeof writeWhole>[1], target: ExportTarget): Promise<number> {
  const { path, force, run } = target;
  run.folder(dirname(path));
  await run.lock(path);
  await checkFile(target);
  return writeWhole(path, chunks, force);
}

/** @throws UsageError when tasks share no components */
async function writeComponents(pack: string, target: ExportTarget): Promise<Result> {
  const { path, run } = target;
  await checkFile(target);
  const { tensors, metadata, modules, sides } = run.closing(await componentsFile(await run.pack(pack)));
  if (sides === 0)
    throw new UsageError(
      `--components: the tasks of ${pack} share none. Pack their adapters again with --k 32, or train a plain LoRA, which add takes as it is`,
    );
  const size = await writeFile(writeSafetensors(tensors, metadata), target);
  const part = sides < 2 * modules ? `, on ${sides} of ${2 * modules} sides` : "";
  return {
    json: { file: path, modules, sides, bytes: size },
    text: [`${path}: components of ${count(modules, "module")}${part}, ${bytes(size)}`],
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
  await checkFolder(path, force);
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
  return resultOf({ directory: path }, adapter, size!);
}

function resultOf(where: { file: string } | { directory: string }, { id, modules }: Exportable, size: number): Result {
  const [path] = Object.values(where) as [string];
  return {
    json: { ...where, task: id, modules: modules.size, bytes: size },
    text: [`${path}: task "${id}", ${count(modules.size, "module")}, ${bytes(size)}`],
  };
}

/**
 * Allows a new folder or an empty one, or with `force` that of an earlier export. An adapter that was trained is never replaced, and a
 * folder of adapters never becomes one.
 * @throws UsageError for any other
 */
async function checkFolder(folder: string, force: boolean): Promise<void> {
  const refuse = (problem: string): never => {
    throw new UsageError(`--output ${folder}: ${problem}`);
  };
  if (folder === "-") refuse("an adapter is a folder of files; name one");
  const there = stat(folder);
  if (!there && isLink(folder)) refuse("is a link to a folder that is not there; remove it, or name that folder");
  if (!there) return;
  if (!there.isDirectory()) refuse("is a file; name a folder");
  const names = (await readdir(folder)).filter((name) => !/^\.|\.(lock|tmp)$/.test(name));
  if (names.length === 0) return;
  if (!names.some((name) => name.startsWith("adapter_")))
    refuse("is not empty, and an adapter in it would hide what is below; name a new folder in it");
  if (!(await isExport(join(folder, "adapter_model.safetensors"))))
    refuse("holds an adapter that export did not write, which is never replaced; name a new folder");
  if (!force) refuse("holds an earlier export; name another folder, or replace it with --force");
}

/**
 * Allows a new file, or with `force` that of an earlier export.
 * @throws UsageError for any other
 */
async function checkFile({ path, force, inputs }: ExportTarget): Promise<void> {
  checkTarget(path, { force, inputs, makesFolders: true });
  if (!stat(path) || (await isExport(path))) return;
  throw new UsageError(
    `--output ${path}: was not written by export as far as can be told, and is not replaced; name a new file`,
  );
}

/** True for an adapter that `export` wrote, and that no other tool has changed since. */
async function isExport(path: string): Promise<boolean> {
  try {
    const source = await openSource(path);
    try {
      if (extname(path) === ".gguf") return (await openGguf(source)).fields.has(EXPORTED);
      const { metadata } = await openSafetensors(source);
      return metadata.has(EXPORTED) || metadata.has(COMPONENTS);
    } finally {
      await source.close?.();
    }
  } catch {
    return false;
  }
}

export { exportTask as export };

const DTYPES = { f32: "F32", f16: "F16", bf16: "BF16" } as const;

export const fold: Attach = command({
  usage: "fold <PACK>",
  example: "fold tasks.eigen --task qa --base base.safetensors -o qa.safetensors",
  options: {
    output: output("OUT.safetensors", "The file to write."),
    force,
    task: required(task),
    base: required(text("MODEL.safetensors", "The base model.", "weights")),
    ...match,
  },
  reads: ["file"],
  async run([path]: [string], { output: file, force, task, base: basePath, ...options }, run) {
    const target = await run.target(file, { force, inputs: [path, basePath] });
    const pack = await run.pack(path);
    refuseUnknown(options.names, pack.modules, path);
    const source = run.closing(await openSource(basePath));
    const base = await openSafetensors(source).catch(async (error: unknown) => {
      throw await wrongKind(error, source, "a safetensors file");
    });
    const runtime = run.closing(await createRuntime(pack, { ...options, base: safetensorsHost(base), webgpu: false }));
    const { modules, added } = await runtime.switchTask(task);
    const folded = runtime.changes();
    const entries: SafetensorsEntry[] = [];
    for (const [name, { dtype, shape }] of base.tensors) {
      if (!folded.has(name)) entries.push({ name, dtype, shape, read: () => base.read(name) });
    }
    for (const [name, { dtype, shape, data, byteOffset }] of folded) {
      const read = (): Uint8Array => (data as Uint8Array).subarray(byteOffset);
      entries.push({ name, dtype: DTYPES[dtype], shape, read });
    }
    const size = await target.write(writeSafetensors(entries, base.metadata));
    return {
      json: { file, task, modules, added, bytes: size },
      text: [`${file}: task "${task}" in ${count(modules, "module")}, ${bytes(size)}`],
    };
  },
});
