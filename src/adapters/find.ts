/**
 * Finds adapters under given paths and tells their formats apart: by the names that PEFT, diffusers and MLX LM give to files, by the
 * endings of others, and for other safetensors files by the names of the tensors inside. Reads headers, no values.
 */
import { readdir, stat } from "node:fs/promises";
import { basename, dirname, extname, join, resolve } from "node:path";
import { checkList } from "../arguments.ts";
import { AdapterError } from "../errors.ts";
import { refuseOtherKinds } from "../files-node.ts";
import { openSource } from "../open-source.ts";
import { openGguf } from "../tensor/gguf.ts";
import { holdsLora, MODELS } from "./diffusers-keys.ts";
import { isKohyaName } from "./kohya.ts";
import { compare } from "./modules.ts";
import { openSafetensors } from "./safetensors.ts";

/** Files of PEFT, of MLX LM and of diffusers, in the folder of one adapter. */
export const CONFIG = "adapter_config.json";
const MLX = "adapters.safetensors";
const PEFT = "adapter_model.safetensors";
const PEFT_PICKLE = "adapter_model.bin";
const DIFFUSERS = "pytorch_lora_weights.safetensors";
const DIFFUSERS_PICKLE = "pytorch_lora_weights.bin";

/** Format of an adapter's files, which decides their reader. A pipeline has a PEFT folder for each of its models. */
export type AdapterFormat = "peft" | "mlx" | "diffusers" | "kohya" | "gguf" | "onnx_adapter" | "pipeline";

/** Formats of single-file adapters, by ending. */
const ENDINGS: ReadonlyMap<string, AdapterFormat> = new Map([
  [".gguf", "gguf"],
  [".onnx_adapter", "onnx_adapter"],
]);

/** An adapter found on disk. */
export interface AdapterLocation {
  /** Name of the folder; for a single-file adapter its name without the ending. */
  readonly id: string;
  /** Absolute path of the adapter: its folder, or its single file. */
  readonly path: string;
  /** Absolute path of the file with its tensors; in a pipeline that of the first model. */
  readonly tensors: string;
  readonly format: AdapterFormat;
  /** Adapters of a pipeline's models, by the name of the model ("unet"). */
  readonly models?: ReadonlyMap<string, AdapterLocation>;
}

/**
 * Finds the adapters under some paths, sorted by id, each once. A path is an adapter's folder, a file of it, or a folder of adapters. An
 * adapter's folder has PEFT's adapter_config.json and adapter_model.safetensors, MLX LM's adapter_config.json and adapters.safetensors,
 * or diffusers' pytorch_lora_weights.safetensors; in a pipeline it has PEFT folders with the names of its models (`unet`,
 * `text_encoder`). Any other safetensors file that holds a LoRA, and any .gguf or .onnx_adapter file that does, is an adapter by itself.
 * A sub-folder that is no adapter is searched one level deeper: PEFT saves adapters with names other than `default` there. Checkpoints inside an adapter's own folder are left alone.
 * @throws AdapterError when a path is missing or holds no adapter, or an adapter's files are incomplete or a pickle
 * @throws SourceError when one is a pipe or a device
 * @throws FormatError when a safetensors file in a folder of adapters is damaged
 */
export async function findAdapters(paths: readonly string[]): Promise<AdapterLocation[]> {
  checkList("findAdapters", paths, "paths");
  const found = new Map<string, AdapterLocation>();
  for (const path of paths)
    for (const location of await adaptersAt(resolve(path))) found.set(location.tensors, location);
  return [...found.values()].sort((a, b) => compare(a.id, b.id) || compare(a.tensors, b.tensors));
}

/** Kind of a path; undefined where nothing is there, or nothing that may be seen. */
export async function kind(path: string): Promise<"file" | "folder" | undefined> {
  const found = await stat(path).catch(() => undefined);
  return found?.isDirectory() ? "folder" : found?.isFile() ? "file" : undefined;
}

async function adaptersAt(path: string): Promise<AdapterLocation[]> {
  const found = await kind(path);
  if (found === undefined) await refuseOtherKinds(path, "a file or a folder");
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
    const looked =
      `holds no adapter; looked for ${CONFIG} and ${PEFT}, ${DIFFUSERS} and other LoRAs in safetensors, gguf and ` +
      "onnx_adapter files, in it and in its sub-folders";
    throw new AdapterError([looked, ...(await foundInstead(path))].join(". "), { file: path });
  }
  return adapters;
}

const ARCHIVE = /\.(zip|7z|rar|tar|tgz|(tar\.)?(gz|xz|zst|bz2))$/i;
const WHOLE_MODEL = /^(pytorch_model|model|diffusion_pytorch_model)\b.*\.(bin|safetensors|onnx)$/;
const NO_MODEL =
  "A whole model is no adapter: give what PEFT's save_pretrained leaves of a LoRA, or take the LoRA out of a fine-tuned model first";

/** What a folder without adapters holds, and what to do with that. */
async function foundInstead(folder: string): Promise<string[]> {
  const names = (await visible(folder)).map((path) => basename(path));
  const archive = names.find((name) => ARCHIVE.test(name));
  if (archive !== undefined) return [`It holds ${archive}: unpack that`];
  const model = names.find((name) => WHOLE_MODEL.test(name));
  return model === undefined ? [] : [`It holds ${model}. ${NO_MODEL}`];
}

/** Takes a named file as an adapter; its reader reports what it lacks. */
async function adapterFile(path: string): Promise<AdapterLocation> {
  const name = basename(path);
  if (/\.(bin|pt|pth|ckpt)$/.test(name)) throw pickleError(path);
  if (name === PEFT || name === CONFIG) return configuredFolder(dirname(path));
  if (name === MLX && (await kind(join(dirname(path), CONFIG))) === "file") return mlxFolder(dirname(path));
  if (name === DIFFUSERS) return { ...loraFile(path, "diffusers"), id: basename(dirname(path)), path: dirname(path) };
  const format = ENDINGS.get(extname(path));
  if (format) return loraFile(path, format);
  if (ARCHIVE.test(name)) throw new AdapterError("is an archive; unpack it, and give its folder", { file: path });
  if (extname(path) === ".safetensors") {
    const names = await namesIn(path);
    if (!names.some((one) => /lora|lokr|hada|alpha|oft|dora|diff/i.test(one))) {
      const holds = `holds no LoRA, but ${names.length} tensors such as ${names[0] ?? "none"}`;
      throw new AdapterError(`${holds}. ${NO_MODEL}`, { file: path });
    }
    return loraFile(path, formatOf(names));
  }
  const expected = `expected ${PEFT} with ${CONFIG} beside it, their folder, or a LoRA in a safetensors, gguf or onnx_adapter file`;
  throw new AdapterError(`is not an adapter; ${expected}`, { file: path });
}

function loraFile(path: string, format: AdapterFormat): AdapterLocation {
  return { id: basename(path, extname(path)), path, tensors: path, format };
}

/** Tells the format of a safetensors file by the names of its tensors. */
function formatOf(names: readonly string[]): "diffusers" | "kohya" {
  return names.some(isKohyaName) ? "kohya" : "diffusers";
}

async function namesIn(path: string): Promise<string[]> {
  const file = await openSafetensors(path);
  await file.close();
  return [...file.tensors.keys()];
}

async function adaptersIn(folder: string): Promise<AdapterLocation[]> {
  const own = await adapterFolder(folder);
  return own === undefined ? looseFiles(folder) : [own];
}

/** Takes a folder as an adapter if any of an adapter's files is in it, so that missing files are reported instead of passed over. */
async function adapterFolder(folder: string): Promise<AdapterLocation | undefined> {
  const has = async (name: string): Promise<boolean> => (await kind(join(folder, name))) === "file";
  const peft = (await has(CONFIG)) || (await has(PEFT)) || (await has(PEFT_PICKLE));
  const diffusers = await has(DIFFUSERS);
  if (peft && diffusers) {
    const message = `holds files of PEFT and ${DIFFUSERS}: which adapter is meant? Give the path of its tensor file`;
    throw new AdapterError(message, { file: folder });
  }
  if (peft) return configuredFolder(folder);
  if (diffusers) return adapterFile(join(folder, DIFFUSERS));
  if (await has(DIFFUSERS_PICKLE)) throw pickleError(join(folder, DIFFUSERS_PICKLE));
  return pipelineFolder(folder);
}

/** Takes a folder of PEFT, or of MLX LM, whose configuration has the same name. */
async function configuredFolder(folder: string): Promise<AdapterLocation> {
  const has = async (name: string): Promise<boolean> => (await kind(join(folder, name))) === "file";
  return (await has(MLX)) && (await has(CONFIG)) && !(await has(PEFT)) ? mlxFolder(folder) : peftFolder(folder);
}

function mlxFolder(folder: string): AdapterLocation {
  return { id: basename(folder), path: folder, tensors: join(folder, MLX), format: "mlx" };
}

/** Takes PEFT folders with the names of a pipeline's models as one adapter. */
async function pipelineFolder(folder: string): Promise<AdapterLocation | undefined> {
  const models = new Map<string, AdapterLocation>();
  for (const model of MODELS) {
    const path = join(folder, model);
    if ((await kind(join(path, CONFIG))) === "file") models.set(model, await peftFolder(path));
  }
  const [first] = models.values();
  return first && { id: basename(folder), path: folder, tensors: first.tensors, format: "pipeline", models };
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
    await refuseOtherKinds(join(folder, name), "a file");
    throw new AdapterError(`has no ${name} beside ${other}; copy it from where the adapter was saved`, {
      file: folder,
    });
  }
  return { id: basename(folder), path: folder, tensors: join(folder, PEFT), format: "peft" };
}

/** Finds files in a folder that hold a LoRA, and not a model or something else. */
async function looseFiles(folder: string): Promise<AdapterLocation[]> {
  const found: AdapterLocation[] = [];
  for (const path of await visible(folder)) {
    if ((await kind(path)) !== "file") continue;
    const format = ENDINGS.get(extname(path));
    if (format === "onnx_adapter" || (format === "gguf" && (await isGgufAdapter(path))))
      found.push(loraFile(path, format));
    if (extname(path) !== ".safetensors") continue;
    const names = await namesIn(path);
    if (holdsLora(names)) found.push(loraFile(path, formatOf(names)));
  }
  return found;
}

/** Whether a GGUF file holds an adapter; models are GGUF files too. */
async function isGgufAdapter(path: string): Promise<boolean> {
  const source = await openSource(path);
  try {
    return (await openGguf(source)).fields.get("general.type") === "adapter";
  } finally {
    await source.close?.();
  }
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
