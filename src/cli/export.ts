/**
 * The commands export and fold: a task of a pack as an adapter that other tools load, the pack's components for those
 * who train, or the weights of a base model with a task merged into them.
 */

import { readdir } from "node:fs/promises";
import { dirname, join } from "node:path";
import { FORMATS } from "../adapters/formats.ts";
import { describeBase } from "../adapters/tree.ts";
import { safetensorsHost } from "../core/open-base.ts";
import { startRuntime } from "../core/runtime.ts";
import { wrongKind } from "../format/kind.ts";
import { openSource } from "../open-source.ts";
import { componentsFile, taskAdapter } from "../pack/expand.ts";
import { openSafetensors, type SafetensorsEntry, writeSafetensors } from "../tensor/safetensors.ts";
import { type Attach, command } from "./command.ts";
import { type Chunks, checkTarget, makeFolder, stat, writeTogether } from "./files.ts";
import * as option from "./options.ts";
import { bytes, count } from "./output.ts";

/** Formats that are written. */
const WRITTEN = new Map(
  FORMATS.filter(({ writeFile, writeFolder }) => writeFile ?? writeFolder).map((format) => [format.name, format]),
);
const OF_ALL = "components are of all tasks";

const exportTask: Attach = command({
  usage: "export <PACK>",
  details: "What is there already is never replaced.",
  example: "export tasks.eigen --task reviews -o adapters/reviews",
  options: {
    output: option.output(
      "PATH",
      "The folder to write for PEFT, a new or an empty one; the file for other formats. Folders on the way are made.",
    ),
    task: option.task,
    components: {
      ...option.toggle(
        "Write the components of all tasks instead, to train a new one in PyTorch: one safetensors file.",
      ),
      excludes: { task: OF_ALL, format: OF_ALL, base: OF_ALL },
    },
    format: option.byDefault("peft", {
      ...option.choice([...WRITTEN.keys()], `Layout of the files: ${[...WRITTEN.keys()].join(", ")}.`),
      value: "FORMAT",
    }),
    base: option.text(
      "MODEL",
      "For gguf: the base model's folder, config.json or GGUF file, for its architecture and heads.",
      "repository",
    ),
    revoked: option.revoked,
    maxExpansion: option.maxExpansion,
  },
  reads: ["file"],
  async run([path]: [string], { output: to, components, task, format, base }, run) {
    if (!components && task === undefined) throw new option.UsageError("missing --task; or --components");
    const { writeFolder, writeFile } = WRITTEN.get(format)!;
    const isFolder = !components && writeFolder !== undefined;
    const check = async (): Promise<void> =>
      isFolder ? checkFolder(to) : checkTarget(to, { inputs: [path, base], makesFolders: true });
    await check();
    const pack = await run.pack(path);
    const write = async (...files: (readonly [path: string, chunks: Chunks])[]): Promise<number> => {
      makeFolder(isFolder ? to : dirname(to));
      await run.lock(files[0]![0]);
      // Another command may have written there while the adapter was made.
      await check();
      const [size] = await writeTogether(files, false);
      return size!;
    };
    if (task === undefined) {
      const { tensors, metadata, modules, sides } = run.closing(await componentsFile(pack));
      if (sides === 0)
        throw new option.UsageError(
          `--components: the tasks of ${path} share none. Pack their adapters again with --k 32, or train a plain LoRA, which add takes as it is`,
        );
      const size = await write([to, writeSafetensors(tensors, metadata)]);
      const part = sides < 2 * modules ? `, on ${sides} of ${2 * modules} sides` : "";
      return {
        json: { file: to, modules, sides, bytes: size },
        text: [`${to}: components of ${count(modules, "module")}${part}, ${bytes(size)}`],
      };
    }
    const adapter = await taskAdapter(pack, task);
    const files = writeFolder
      ? [...(await writeFolder(adapter))].map(([name, chunks]) => [join(to, name), chunks] as const)
      : [[to, await writeFile!(adapter, base === undefined ? {} : await describeBase(base))] as const];
    const size = await write(...files);
    const modules = adapter.modules.size;
    return {
      json: { [isFolder ? "directory" : "file"]: to, task, modules, bytes: size },
      text: [`${to}: task "${task}", ${count(modules, "module")}, ${bytes(size)}`],
    };
  },
});

/** @throws UsageError unless a folder is new or empty: an adapter in it would be replaced, or hide what is below */
async function checkFolder(folder: string): Promise<void> {
  const refuse = (problem: string): never => {
    throw new option.UsageError(`--output ${folder}: ${problem}`);
  };
  if (folder === "-") refuse("an adapter is a folder of files; name one");
  const there = stat(folder);
  if (there && !there.isDirectory()) refuse("is a file; name a folder");
  const names = there ? await readdir(folder) : [];
  if (names.some((name) => !/^\.|\.(lock|tmp)$/.test(name)))
    refuse("is not empty, and nothing in it is replaced; name a new folder");
}

export { exportTask as export };

const DTYPES = { f32: "F32", f16: "F16", bf16: "BF16" } as const;

export const fold: Attach = command({
  usage: "fold <PACK>",
  example: "fold tasks.eigen --task qa --base base.safetensors -o qa.safetensors",
  options: {
    output: option.output("OUT.safetensors", "The file to write."),
    force: option.force,
    task: option.required(option.task),
    base: option.required(option.text("MODEL.safetensors", "The base model.", "weights")),
    ...option.match,
  },
  reads: ["file"],
  async run([path]: [string], { output: file, force, task, base: basePath, ...options }, run) {
    const target = await run.target(file, { force, inputs: [path, basePath] });
    const pack = await run.pack(path);
    option.refuseUnknown(options.names, pack.modules, path);
    const source = run.closing(await openSource(basePath));
    const base = await openSafetensors(source).catch(async (error: unknown) => {
      throw await wrongKind(error, source, "a safetensors file");
    });
    const runtime = run.closing(await startRuntime(pack, { ...options, base: safetensorsHost(base) }));
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
