/**
 * Finds adapters under given paths and tells their formats apart: by the names that PEFT, diffusers and MLX LM give to files, by the
 * endings of others, and for other safetensors files by the names of the tensors inside. Reads headers, no values.
 */
import { basename, dirname, extname, join, relative, sep } from "node:path";
import { checkList } from "../arguments.ts";
import { refuseOtherKinds } from "../disk.ts";
import { AdapterError } from "../errors.ts";
import type { HubOptions } from "../http/hub.ts";
import { openGguf } from "../tensor/gguf.ts";
import { foreignName, holdsLora, MODELS } from "./diffusers-keys.ts";
import { isKohyaName } from "./kohya.ts";
import { compare } from "./modules.ts";
import { openSafetensors } from "./safetensors.ts";
import { type Tree, treeAt } from "./tree.ts";

/** Files of PEFT, of MLX LM and of diffusers, in the folder of one adapter, and the one with what tensors do not tell. */
export const CONFIG = "adapter_config.json";
export const TASK = "task.json";
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

const ARCHIVE = /\.(zip|7z|rar|tar|tgz|(tar\.)?(gz|xz|zst|bz2))$/i;
const WHOLE_MODEL =
  /^(model|pytorch_model|consolidated|diffusion_pytorch_model|tf_model|flax_model)\b.*\.(safetensors|bin|h5|msgpack)$|\.onnx$/;
const NO_MODEL =
  "A whole model is no adapter: give what PEFT's save_pretrained leaves of a LoRA, or take the LoRA out of a fine-tuned model first";

/** An adapter found on disk. */
export interface AdapterLocation {
  /** Name of the folder, or of the repository; for a single-file adapter its name without the ending. */
  readonly id: string;
  /** Absolute path of the adapter: its folder, or its single file. */
  readonly path: string;
  /** Absolute path of the file with its tensors; in a pipeline that of the first model. */
  readonly tensors: string;
  readonly format: AdapterFormat;
  /** Adapters of a pipeline's models, by the name of the model ("unet"). */
  readonly models?: ReadonlyMap<string, AdapterLocation>;
  /** Where it comes from on the Hugging Face Hub: "org/name", with the path in the repository. */
  readonly hub?: string;
}

/**
 * Finds the adapters under some paths, sorted by id, each once. A path is an adapter's folder, a file of it, or a folder of adapters. An
 * adapter's folder has PEFT's adapter_config.json and adapter_model.safetensors, MLX LM's adapter_config.json and adapters.safetensors,
 * or diffusers' pytorch_lora_weights.safetensors; in a pipeline it has PEFT folders with the names of its models (`unet`,
 * `text_encoder`). Any other safetensors file that holds a LoRA, and any .gguf or .onnx_adapter file that does, is an adapter by itself.
 * A sub-folder that is no adapter is searched one level deeper: PEFT saves adapters with names other than `default` there. Checkpoints inside an adapter's own folder are left alone.
 *
 * A name of the Hugging Face Hub stands for the same: `hf:org/name`, `hf:org/name@revision/folder`. What belongs to adapters is downloaded
 * into the Hub's cache, and nothing else.
 * @throws AdapterError when a path is missing or holds no adapter, or an adapter's files are incomplete or a pickle
 * @throws SourceError when one is a pipe or a device, or the Hub refuses it
 * @throws FormatError when a safetensors file in a folder of adapters is damaged
 */
export async function findAdapters(paths: readonly string[], options: HubOptions = {}): Promise<AdapterLocation[]> {
  checkList("findAdapters", paths, "paths");
  const found = new Map<string, AdapterLocation>();
  for (const given of paths) {
    const { tree, path } = await treeAt(given, options);
    const locations = await new Search(tree).at(path);
    await tree.get(await filesOf(locations, tree));
    for (const location of locations) found.set(location.tensors, onHub(location, tree));
  }
  return [...found.values()].sort((a, b) => compare(a.id, b.id) || compare(a.tensors, b.tensors));
}

/** The files that adapters are read from. */
async function filesOf(locations: Iterable<AdapterLocation>, tree: Tree): Promise<string[]> {
  const files: string[] = [];
  for (const { path, tensors, models } of locations) {
    const beside = [CONFIG, TASK].map((name) => join(path, name));
    for (const file of [tensors, ...beside]) if ((await tree.kind(file)) === "file") files.push(file);
    if (models) files.push(...(await filesOf(models.values(), tree)));
  }
  return files;
}

/** The location with its place on the Hub, and a repository's name in the place of a commit's. */
function onHub(location: AdapterLocation, { hub }: Tree): AdapterLocation {
  if (!hub) return location;
  const inside = relative(hub.root, location.path).split(sep);
  const [, name = ""] = hub.name.repository.split("/");
  const id = location.path === hub.root ? name : location.id;
  return { ...location, id, hub: [hub.name.repository, ...inside].filter(Boolean).join("/") };
}

/** Looks for adapters in a tree. */
class Search {
  readonly #tree: Tree;

  constructor(tree: Tree) {
    this.#tree = tree;
  }

  async at(path: string): Promise<AdapterLocation[]> {
    if ((await this.#tree.kind(path)) === "file") return [await this.#file(path)];
    const own = await this.#folder(path);
    if (own !== undefined) return [own];
    const adapters = await this.#looseFiles(path);
    for (const child of await this.#subFolders(path)) {
      const inside = await this.#in(child);
      if (inside.length > 0) adapters.push(...inside);
      else for (const inner of await this.#subFolders(child)) adapters.push(...(await this.#in(inner)));
    }
    if (adapters.length === 0) throw await this.#nothing(path);
    return adapters;
  }

  async #nothing(folder: string): Promise<AdapterError> {
    const looked =
      `holds no adapter; looked for ${CONFIG} and ${PEFT}, ${DIFFUSERS} and other LoRAs in safetensors, gguf and ` +
      "onnx_adapter files, in it and in its sub-folders";
    return this.#error([looked, ...(await this.#foundInstead(folder))].join(". "), folder);
  }

  /** What a folder without adapters holds, and what to do with that. */
  async #foundInstead(folder: string): Promise<string[]> {
    const names = (await this.#visible(folder)).map((path) => basename(path));
    const archive = names.find((name) => ARCHIVE.test(name));
    if (archive !== undefined) return [`It holds ${archive}: unpack that`];
    const model = names.find((name) => WHOLE_MODEL.test(name));
    return model === undefined ? [] : [`It holds ${model}. ${NO_MODEL}`];
  }

  #error(message: string, path: string): AdapterError {
    return new AdapterError(message, { file: this.#tree.nameOf(path) });
  }

  async #has(folder: string, name: string): Promise<boolean> {
    return (await this.#tree.kind(join(folder, name))) === "file";
  }

  /** Takes a named file as an adapter; its reader reports what it lacks. */
  async #file(path: string): Promise<AdapterLocation> {
    const name = basename(path);
    const folder = dirname(path);
    if (/\.(bin|pt|pth|ckpt)$/.test(name)) throw this.#pickle(path);
    if (name === PEFT || name === CONFIG) return this.#configured(folder);
    if (name === MLX && (await this.#has(folder, CONFIG))) return mlxFolder(folder);
    if (name === DIFFUSERS) return { ...loraFile(path, "diffusers"), id: basename(folder), path: folder };
    const format = ENDINGS.get(extname(path));
    if (format) return loraFile(path, format);
    if (ARCHIVE.test(name)) throw this.#error("is an archive; unpack it, and give its folder", path);
    if (extname(path) === ".safetensors") {
      const names = await this.#namesIn(path);
      // Names that its reader has advice about are left to it.
      if (holdsLora(names) || foreignName(names)) return loraFile(path, formatOf(names));
      const holds = `holds no LoRA, but ${names.length} tensors such as ${names[0] ?? "none"}`;
      throw this.#error(`${holds}. ${NO_MODEL}`, path);
    }
    const expected = `expected ${PEFT} with ${CONFIG} beside it, their folder, or a LoRA in a safetensors, gguf or onnx_adapter file`;
    throw this.#error(`is not an adapter; ${expected}`, path);
  }

  async #namesIn(path: string): Promise<string[]> {
    const file = await openSafetensors(await this.#tree.open(path));
    await file.close();
    return [...file.tensors.keys()];
  }

  async #in(folder: string): Promise<AdapterLocation[]> {
    const own = await this.#folder(folder);
    return own === undefined ? this.#looseFiles(folder) : [own];
  }

  /** Takes a folder as an adapter if any of an adapter's files is in it, so that missing files are reported instead of passed over. */
  async #folder(folder: string): Promise<AdapterLocation | undefined> {
    const has = (name: string): Promise<boolean> => this.#has(folder, name);
    const peft = (await has(CONFIG)) || (await has(PEFT)) || (await has(PEFT_PICKLE));
    const diffusers = await has(DIFFUSERS);
    if (peft && diffusers) {
      const message = `holds files of PEFT and ${DIFFUSERS}: which adapter is meant? Give the path of its tensor file`;
      throw this.#error(message, folder);
    }
    if (peft) return this.#configured(folder);
    if (diffusers) return this.#file(join(folder, DIFFUSERS));
    if (await has(DIFFUSERS_PICKLE)) throw this.#pickle(join(folder, DIFFUSERS_PICKLE));
    return this.#pipeline(folder);
  }

  /** Takes a folder of PEFT, or of MLX LM, whose configuration has the same name. */
  async #configured(folder: string): Promise<AdapterLocation> {
    const has = (name: string): Promise<boolean> => this.#has(folder, name);
    return (await has(MLX)) && (await has(CONFIG)) && !(await has(PEFT)) ? mlxFolder(folder) : this.#peft(folder);
  }

  /** Takes PEFT folders with the names of a pipeline's models as one adapter. */
  async #pipeline(folder: string): Promise<AdapterLocation | undefined> {
    const models = new Map<string, AdapterLocation>();
    for (const model of MODELS) {
      const path = join(folder, model);
      if (await this.#has(path, CONFIG)) models.set(model, await this.#peft(path));
    }
    const [first] = models.values();
    return first && { id: basename(folder), path: folder, tensors: first.tensors, format: "pipeline", models };
  }

  /** @throws AdapterError unless both of an adapter's files are in the folder */
  async #peft(folder: string): Promise<AdapterLocation> {
    for (const [name, other] of [
      [PEFT, CONFIG],
      [CONFIG, PEFT],
    ] as const) {
      if (await this.#has(folder, name)) continue;
      if (name === PEFT && (await this.#has(folder, PEFT_PICKLE))) throw this.#pickle(join(folder, PEFT_PICKLE));
      await refuseOtherKinds(join(folder, name), "a file");
      throw this.#error(`has no ${name} beside ${other}; copy it from where the adapter was saved`, folder);
    }
    return { id: basename(folder), path: folder, tensors: join(folder, PEFT), format: "peft" };
  }

  /** Finds files in a folder that hold a LoRA, and not a model or something else. */
  async #looseFiles(folder: string): Promise<AdapterLocation[]> {
    const found: AdapterLocation[] = [];
    for (const path of await this.#visible(folder)) {
      if ((await this.#tree.kind(path)) !== "file") continue;
      const format = ENDINGS.get(extname(path));
      if (format === "onnx_adapter" || (format === "gguf" && (await this.#isGgufAdapter(path))))
        found.push(loraFile(path, format));
      const names = extname(path) === ".safetensors" ? await this.#namesIn(path) : [];
      if (holdsLora(names)) found.push(loraFile(path, formatOf(names)));
    }
    return found;
  }

  /** Whether a GGUF file holds an adapter; models are GGUF files too. */
  async #isGgufAdapter(path: string): Promise<boolean> {
    const source = await this.#tree.open(path);
    try {
      return (await openGguf(source)).fields.get("general.type") === "adapter";
    } finally {
      await source.close?.();
    }
  }

  async #visible(folder: string): Promise<string[]> {
    const names = (await this.#tree.names(folder)).filter((name) => !name.startsWith(".")).sort();
    return names.map((name) => join(folder, name));
  }

  async #subFolders(folder: string): Promise<string[]> {
    const paths = await this.#visible(folder);
    const kinds = await Promise.all(paths.map((path) => this.#tree.kind(path)));
    return paths.filter((_, i) => kinds[i] === "folder");
  }

  #pickle(path: string): AdapterError {
    const how =
      basename(path) === DIFFUSERS_PICKLE
        ? `load it where you trust it (torch.load(file, weights_only=True)) and save what it holds as ${DIFFUSERS} ` +
          "(safetensors.torch.save_file)"
        : "load it with PEFT where you trust it (PeftModel.from_pretrained) and call save_pretrained(folder, " +
          "safe_serialization=True)";
    return this.#error(`is a Python pickle, which can run any program when it is read. Convert it: ${how}`, path);
  }
}

/** Tells the format of a safetensors file by the names of its tensors. */
function formatOf(names: readonly string[]): "diffusers" | "kohya" {
  return names.some(isKohyaName) ? "kohya" : "diffusers";
}

function loraFile(path: string, format: AdapterFormat): AdapterLocation {
  return { id: basename(path, extname(path)), path, tensors: path, format };
}

function mlxFolder(folder: string): AdapterLocation {
  return { id: basename(folder), path: folder, tensors: join(folder, MLX), format: "mlx" };
}
