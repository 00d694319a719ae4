/**
 * Where a command may write: what is there already is replaced only by `--force`, and what is no file of its own never is. Checked
 * before the work begins, which may take hours, and again when its result is written.
 */
import { lstatSync, type Stats, statSync } from "node:fs";
import { readdir } from "node:fs/promises";

import { dirname, extname, join } from "node:path";

import type { Adapter } from "../adapters/adapter.ts";
import { MODELS } from "../adapters/diffusers.ts";
import { kindInWords } from "../disk.ts";
import { openSource } from "../open-source.ts";
import { COMPONENTS } from "../pack/expand.ts";
import { openGguf } from "../tensor/gguf.ts";
import { openSafetensors } from "../tensor/safetensors.ts";
import { realTarget } from "./lock.ts";
import { UsageError } from "./options.ts";

/** The key in a file's metadata by which an exported adapter is known; its value is the id of the task. */
export const EXPORTED = "eigenlora.task";

/** What is known of a target beside its path. */
export interface TargetOptions {
  /** Replace a file that is there already. */
  readonly force: boolean;
  /** Paths of what the command reads; undefined for what was not named. */
  readonly inputs?: readonly (string | undefined)[];
  /** Whether folders that are missing on the way are made. Default: false, since a mistyped folder is not made in silence. */
  readonly makesFolders?: boolean;
  /** What `--output` says, where `path` is one of several files that come of it. */
  readonly output?: string;
}

/** @throws UsageError when a file may not be written at `path` */
export function checkTarget(
  path: string,
  { force, inputs = [], makesFolders = false, output = path }: TargetOptions,
): void {
  const refuse = (what: string): never => {
    throw new UsageError(`--output ${output}: ${path === output ? "" : `${path} `}${what}`);
  };
  if (path === "-") refuse("nothing is written to standard output; name a file");
  if (/[/\\]$/.test(path)) refuse("ends like a folder; name a file in it");
  if (!makesFolders) checkParent(output);
  const there = stat(path);
  if (there?.isDirectory()) refuse("is a folder; name a file in it");
  if (there && !there.isFile()) refuse(`is ${kindInWords(there)}; name a file`);
  if (!there && isLink(path)) refuse("is a link to a file that is not there; remove it, or name that file");
  if (inputs.some((input) => input !== undefined && realTarget(input) === realTarget(path)))
    refuse("would overwrite what it is made of; choose another name");
  if (there && !force) refuse("already exists; choose another name, or replace it with --force");
}

/** A mistyped folder is not made in silence. @throws UsageError when the folder of what is to be written is not there */
function checkParent(output: string): void {
  const folder = dirname(output);
  const there = stat(folder);
  if (there?.isDirectory()) return;
  throw new UsageError(
    `--output ${output}: ${there ? `${folder} is not a folder` : `there is no folder ${folder}; make it first`}`,
  );
}

/**
 * The folder that an adapter is exported to: a new or an empty one, or with `force` that of an earlier export. An adapter that was
 * trained is never replaced, and a folder of adapters never becomes one.
 * @throws UsageError for any other
 */
export async function checkExport(folder: string, force: boolean): Promise<void> {
  const refuse = (what: string): never => {
    throw new UsageError(`--output ${folder}: ${what}`);
  };
  if (folder === "-") refuse("an adapter is a folder of files; name one");
  const there = stat(folder);
  if (!there && isLink(folder)) refuse("is a link to a folder that is not there; remove it, or name that folder");
  if (!there) return;
  if (!there.isDirectory()) refuse("is a file; name a folder");
  const names = (await readdir(folder)).filter((name) => !/^\.|\.(lock|tmp)$/.test(name));
  if (names.length === 0) return;
  const holds = names.some((name) => name.startsWith("adapter_"));
  if (holds && !(await isExport(folder)))
    refuse("holds an adapter that export did not write, which is never replaced; name a new folder");
  if (!holds) refuse("is not empty, and an adapter in it would hide what is below; name a new folder in it");
  if (!force) refuse("holds an earlier export; name another folder, or replace it with --force");
}

/**
 * The file that an adapter is exported to: a new one, or with `force` that of an earlier export. An adapter that was trained is never
 * replaced.
 * @param inputs what the command reads
 * @throws UsageError for any other
 */
export async function checkExportFile(
  path: string,
  force: boolean,
  inputs: readonly (string | undefined)[],
): Promise<void> {
  checkTarget(path, { force, inputs, makesFolders: true });
  if (!stat(path) || (await isExport(path))) return;
  throw new UsageError(
    `--output ${path}: was not written by export as far as can be told, and is not replaced; name a new file`,
  );
}

/** Whether an adapter was written by `export`, and not changed by other tools since. */
async function isExport(path: string): Promise<boolean> {
  try {
    const source = await openSource(stat(path)?.isDirectory() ? join(path, "adapter_model.safetensors") : path);
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

/** Names of an adapter's files. */
const NAMES = [
  "adapter_config.json",
  "adapter_model.safetensors",
  "adapters.safetensors",
  "pytorch_lora_weights.safetensors",
  "task.json",
];

/** The files that an adapter is read from. */
export function filesOf({ file }: Pick<Adapter, "file">): string[] {
  return [
    file,
    ...[...NAMES, ...MODELS.flatMap((model) => NAMES.map((name) => join(model, name)))].map((name) => join(file, name)),
  ];
}

/** What a path stands for, through links; undefined when nothing is there. */
export function stat(path: string): Stats | undefined {
  try {
    return statSync(path, { throwIfNoEntry: false });
  } catch {
    // Part of the path is a file, or may not be read: the system says so when something is written there.
    return undefined;
  }
}

function isLink(path: string): boolean {
  try {
    return lstatSync(path).isSymbolicLink();
  } catch {
    return false;
  }
}
