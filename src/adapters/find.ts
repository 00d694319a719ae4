/**
 * Finds adapters under the paths that a person names, and tells their formats apart: by the names of files that PEFT and diffusers
 * give them, and for other safetensors files by the names of the tensors inside. Reads headers, no values.
 */
import { readdir, stat } from "node:fs/promises";
import { basename, dirname, extname, join, resolve } from "node:path";
import { checkList } from "../arguments.ts";
import { AdapterError } from "../errors.ts";
import { holdsLora } from "./diffusers-keys.ts";
import { compare } from "./modules.ts";
import { openSafetensors } from "./safetensors.ts";

/** Files of PEFT, and of diffusers, in the folder of one adapter. */
export const CONFIG = "adapter_config.json";
const PEFT = "adapter_model.safetensors";
const PEFT_PICKLE = "adapter_model.bin";
const DIFFUSERS = "pytorch_lora_weights.safetensors";
const DIFFUSERS_PICKLE = "pytorch_lora_weights.bin";

/** An adapter found on disk. */
export interface AdapterLocation {
  /** Name of the folder; of a file that is an adapter by itself, its name without `.safetensors`. */
  readonly id: string;
  /** Absolute path of the adapter: its folder, or the file that is an adapter by itself. */
  readonly path: string;
  /** Absolute path of the file with its tensors. */
  readonly tensors: string;
  /** What reads it. */
  readonly format: "peft" | "diffusers";
}

/**
 * The adapters under some paths, sorted by id, each once. A path is an adapter's folder, a file of it, or a folder of adapters. An
 * adapter's folder has PEFT's adapter_config.json and adapter_model.safetensors, or diffusers' pytorch_lora_weights.safetensors;
 * any other safetensors file that holds a LoRA is an adapter by itself. In a folder of adapters, a sub-folder that is none may hold
 * some, such as adapters of other names than `default`, which PEFT saves one folder deeper; checkpoints inside an adapter's own
 * folder are left alone.
 * @throws AdapterError when a path is missing or holds no adapter, or an adapter's files are incomplete or a pickle
 * @throws FormatError when a safetensors file in a folder of adapters is damaged
 */
export async function findAdapters(paths: readonly string[]): Promise<AdapterLocation[]> {
  checkList("findAdapters", paths, "paths");
  const found = new Map<string, AdapterLocation>();
  for (const path of paths)
    for (const location of await adaptersAt(resolve(path))) found.set(location.tensors, location);
  return [...found.values()].sort((a, b) => compare(a.id, b.id) || compare(a.tensors, b.tensors));
}

/** What a path is; undefined where there is nothing, or nothing that may be seen. */
export async function kind(path: string): Promise<"file" | "folder" | undefined> {
  const found = await stat(path).catch(() => undefined);
  return found?.isDirectory() ? "folder" : found?.isFile() ? "file" : undefined;
}

async function adaptersAt(path: string): Promise<AdapterLocation[]> {
  const found = await kind(path);
  if (found === undefined) throw new AdapterError("does not exist or cannot be read; check the path", { file: path });
  if (found === "file") return [await adapterFile(path)];
  const own = await adapterFolder(path);
  if (own !== undefined) return [own];
  const adapters = await looseFiles(path);
  for (const child of await subFolders(path)) {
    const inside = await adaptersIn(child);
    if (inside.length > 0) adapters.push(...inside);
    else for (const inner of await subFolders(child)) adapters.push(...(await adaptersIn(inner)));
  }
  if (adapters.length === 0) {
    throw new AdapterError(
      `holds no adapter; looked for ${CONFIG} and ${PEFT}, ${DIFFUSERS} and other LoRAs in safetensors files, in it and ` +
        "in its sub-folders",
      { file: path },
    );
  }
  return adapters;
}

/** A file that somebody names is meant to be an adapter: what it lacks is said by its reader. */
async function adapterFile(path: string): Promise<AdapterLocation> {
  const name = basename(path);
  if (/\.(bin|pt|pth|ckpt)$/.test(name)) throw pickleError(path);
  if (name === PEFT || name === CONFIG) return peftFolder(dirname(path));
  if (name === DIFFUSERS) return { ...diffusersFile(path), id: basename(dirname(path)), path: dirname(path) };
  if (extname(path) === ".safetensors") return diffusersFile(path);
  const expected = `expected ${PEFT} with ${CONFIG} beside it, their folder, or a safetensors file of diffusers`;
  throw new AdapterError(`is not an adapter; ${expected}`, { file: path });
}

function diffusersFile(path: string): AdapterLocation {
  return { id: basename(path, extname(path)), path, tensors: path, format: "diffusers" };
}

async function adaptersIn(folder: string): Promise<AdapterLocation[]> {
  const own = await adapterFolder(folder);
  return own === undefined ? looseFiles(folder) : [own];
}

/** Any of an adapter's files makes a folder one: what is missing or wrong beside it should be said, not passed over. */
async function adapterFolder(folder: string): Promise<AdapterLocation | undefined> {
  const has = async (name: string): Promise<boolean> => (await kind(join(folder, name))) === "file";
  const peft = (await has(CONFIG)) || (await has(PEFT)) || (await has(PEFT_PICKLE));
  const diffusers = await has(DIFFUSERS);
  if (peft && diffusers) {
    const message = `holds files of PEFT and ${DIFFUSERS}: which adapter is meant? Give the path of its tensor file`;
    throw new AdapterError(message, { file: folder });
  }
  if (peft) return peftFolder(folder);
  if (diffusers) return adapterFile(join(folder, DIFFUSERS));
  if (await has(DIFFUSERS_PICKLE)) throw pickleError(join(folder, DIFFUSERS_PICKLE));
  return undefined;
}

/** @throws AdapterError unless both of an adapter's files are in the folder */
async function peftFolder(folder: string): Promise<AdapterLocation> {
  for (const [name, other] of [
    [PEFT, CONFIG],
    [CONFIG, PEFT],
  ] as const) {
    if ((await kind(join(folder, name))) === "file") continue;
    if (name === PEFT && (await kind(join(folder, PEFT_PICKLE))) === "file")
      throw pickleError(join(folder, PEFT_PICKLE));
    throw new AdapterError(`has no ${name} beside ${other}; copy it from where the adapter was saved`, {
      file: folder,
    });
  }
  return { id: basename(folder), path: folder, tensors: join(folder, PEFT), format: "peft" };
}

/** Safetensors files in a folder that hold a LoRA, and not a model or something else. */
async function looseFiles(folder: string): Promise<AdapterLocation[]> {
  const found: AdapterLocation[] = [];
  for (const path of await visible(folder)) {
    if (extname(path) !== ".safetensors" || (await kind(path)) !== "file") continue;
    const file = await openSafetensors(path);
    await file.close();
    if (holdsLora(file.tensors.keys())) found.push(diffusersFile(path));
  }
  return found;
}

async function visible(folder: string): Promise<string[]> {
  const names = (await readdir(folder)).filter((name) => !name.startsWith(".")).sort();
  return names.map((name) => join(folder, name));
}

async function subFolders(folder: string): Promise<string[]> {
  const paths = await visible(folder);
  const kinds = await Promise.all(paths.map(kind));
  return paths.filter((_, i) => kinds[i] === "folder");
}

function pickleError(path: string): AdapterError {
  const how =
    basename(path) === DIFFUSERS_PICKLE
      ? `load it where you trust it (torch.load(file, weights_only=True)) and save what it holds as ${DIFFUSERS} ` +
        "(safetensors.torch.save_file)"
      : "load it with PEFT where you trust it (PeftModel.from_pretrained) and call save_pretrained(folder, " +
        "safe_serialization=True)";
  return new AdapterError(`is a Python pickle, which can run any program when it is read. Convert it: ${how}`, {
    file: path,
  });
}
