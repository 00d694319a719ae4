/**
 * Opens adapters under given paths, in the order of their ids, each with the reader of its format. This file and
 * tree.ts are the only adapter code that needs a file system.
 */

import { basename, dirname, extname, join, relative, resolve, sep } from "node:path";
import type { WeightHost } from "../core/base.ts";
import { AdapterError, checkList, checkOptions, nearest, TaskError } from "../errors.ts";
import { openPath } from "../files-node.ts";
import { isTaskId } from "../format/directory.ts";
import type { TaskMetadata } from "../format/format.ts";
import type { HubOptions } from "../http/hub.ts";
import { localSource } from "../open-source.ts";
import { type ByteSource, FETCH_OPTIONS } from "../source.ts";
import { sum } from "../tensor/dtypes.ts";
import { type Adapter, type AdapterModule, type BaseFacts, compare, readTaskMetadata } from "./adapter.ts";
import { foreignName, holdsLora, MODELS, withTextModel } from "./diffusers.ts";
import { type AdapterFolder, type AdapterFormat, CONFIG, FORMATS, folderFiles, TASK } from "./formats.ts";
import { describeBase, kind, namesIn, openWeights, readJson, type Tree, treeAt } from "./tree.ts";

/** Files kept open between reads, which is twice as fast. Any further file is opened for each read. */
const MAX_HELD = 64;

/** Options of `readAdapters`. Those of `HubOptions` are for names of the Hugging Face Hub. */
export interface ReadAdaptersOptions extends HubOptions {
  /** New ids, by old id, or by path or name of the Hub. */
  readonly rename?: ReadonlyMap<string, string> | undefined;
  /**
   * Path of a file that names the base's modules (for files of kohya) or its heads (for GGUF files): its folder,
   * config.json, safetensors file or index, list of names in JSON, or GGUF file; or a name of the Hub. An adapter that
   * began as PiSSA or OLoRA needs its weights: its folder or safetensors file. Read when an adapter needs it. Default:
   * none.
   */
  readonly base?: string | undefined;
}

/**
 * Opens the adapters under some paths, sorted by id. Close each when it is no longer needed: it may hold a file open. A
 * path may be a name of the Hugging Face Hub, as `findAdapters` takes it.
 * @throws AdapterError as `findAdapters`, `readPeft` and the readers of other formats; FormatError and SourceError as
 *   these
 * @throws TaskError when two adapters have one id, an id is not allowed, or a rename matches none or several
 */
export async function readAdapters(paths: readonly string[], options: ReadAdaptersOptions = {}): Promise<Adapter[]> {
  checkOptions("readAdapters", options, ["rename", "base", "onProgress", "signal", ...FETCH_OPTIONS]);
  checkList("readAdapters", paths, "paths");
  const locations = rename(await findAdapters(paths, options), options.rename ?? new Map());
  /** Sources that stay open, or open for each read. */
  const sources: ByteSource[] = [];
  let facts: Promise<BaseFacts> | undefined;
  /** The base's weights, opened for the first adapter that needs them and closed with the last. */
  let weights: Promise<WeightHost | undefined> | undefined;
  let users = 0;
  const adapters: Adapter[] = [];
  try {
    for (const location of locations) adapters.push(await openAdapter(location));
  } catch (error) {
    for (const source of sources) await source.close?.();
    await (await weights)?.close?.();
    throw error;
  }
  return adapters;

  async function openAdapter(location: AdapterLocation): Promise<Adapter> {
    const { id, path, tensors: file, format: name, models } = location;
    const about = join(path, TASK);
    const task = (await kind(about)) === "file" ? await readJson(about) : undefined;
    if (models) {
      const parts = new Map<string, Adapter>();
      for (const [model, part] of models) parts.set(model, await openAdapter(part));
      return joinModels({ id, file: path }, parts, readTaskMetadata(task, about));
    }
    const { base } = options;
    const format = FORMATS.find((one) => one.name === name)!;
    let usesWeights = false;
    const adapter = await format.read(
      { id, file: path, tensors: await open(file), task },
      {
        config: () => readJson(join(path, format.folder!.config!)),
        async facts() {
          if (base !== undefined) facts ??= describeBase(base, options);
          return facts;
        },
        async weights() {
          if (base !== undefined) weights ??= openWeights(base, options);
          usesWeights = true;
          return weights;
        },
      },
    );
    if (!usesWeights) return adapter;
    users++;
    const close = async (): Promise<void> => {
      await adapter.close();
      if (--users === 0) await (await weights)?.close?.();
    };
    return { ...adapter, close };
  }

  async function open(path: string): Promise<ByteSource> {
    const source = sources.length < MAX_HELD ? await openPath(path) : await openOnDemand(path);
    sources.push(source);
    return source;
  }
}

function rename(found: readonly AdapterLocation[], names: ReadonlyMap<string, string>): AdapterLocation[] {
  const ids = new Map(found.map((location) => [location, location.id]));
  for (const [old, id] of names) {
    const at = resolve(old);
    const onHub = old.replace(/^hf:(\/\/)?/, "").replace(/@[^/]*/, "");
    const byPath = found.filter(({ path, tensors, hub }) => path === at || tensors === at || hub === onHub);
    const meant = byPath.length > 0 ? byPath : found.filter((location) => location.id === old);
    if (meant.length !== 1) {
      const paths = meant.map(({ path }) => path).join(", ");
      const why = paths === "" ? "no adapter has this id or path" : `means several; use a path: ${paths}`;
      const known = found.map((location) => location.id);
      throw new TaskError(`rename ${old} to ${id}: ${why}`, { task: old, nearest: nearest(old, known) });
    }
    ids.set(meant[0]!, id);
  }
  const owners = new Map<string, AdapterLocation>();
  for (const [location, id] of ids) {
    const { path } = location;
    if (!isTaskId(id)) {
      throw new TaskError(
        `${path}: ${JSON.stringify(id)} cannot be a task's id, which has 1 to 255 bytes and no control characters; ` +
          `give it a new one with \`rename\``,
        { task: id },
      );
    }
    const other = owners.get(id)?.path;
    if (other !== undefined) {
      throw new TaskError(`${other} and ${path} are both called ${id}; give one a new id with \`rename\``, {
        task: id,
      });
    }
    owners.set(id, location);
  }
  return [...owners].map(([id, location]) => ({ ...location, id })).sort((a, b) => compare(a.id, b.id));
}

/** Opens a file anew for every read. */
async function openOnDemand(path: string): Promise<ByteSource> {
  const probe = await openPath(path);
  await probe.close?.();
  return localSource(path, probe.byteLength!, async (start, end) => {
    const source = await openPath(path);
    try {
      return await source.read(start, end - start);
    } finally {
      await source.close?.();
    }
  });
}

/**
 * Joins the adapters of a pipeline's models to one, with names from the pipeline down, as in the files of diffusers.
 * @param models by the name of the model ("unet", "text_encoder"). Closed by the adapter's `close`
 * @param metadata of the task
 */
function joinModels(
  { id, file }: Pick<Adapter, "id" | "file">,
  models: ReadonlyMap<string, Adapter>,
  metadata: TaskMetadata,
): Adapter {
  const all = [...models];
  const modules = all.flatMap(([model, adapter]) =>
    [...adapter.modules.values()].map((module): AdapterModule => {
      return { ...module, name: `${model}.${withTextModel(module.name, model)}`, read: () => module.read() };
    }),
  );
  const saved = all.flatMap(([model, adapter]) =>
    adapter.saved.map((one) => ({ ...one, name: `${model}.${one.name}` })),
  );
  const bases = new Set(all.map(([, { baseModel }]) => baseModel));
  return {
    id,
    file,
    byteLength: sum(all, ([, { byteLength }]) => byteLength),
    baseModel: bases.size === 1 ? [...bases][0] : undefined,
    modules: new Map(modules.map((module) => [module.name, module] as const).sort(([a], [b]) => compare(a, b))),
    saved: saved.sort((a, b) => compare(a.name, b.name)),
    metadata,
    warnings: all.flatMap(([model, { warnings }]) => warnings.map((text) => `${model}: ${text}`)),
    async close() {
      for (const adapter of models.values()) await adapter.close();
    },
  };
}

// Finds adapters under given paths and recognises their formats: by the names of files, by their endings, and for other
// safetensors files by the names of the tensors inside. Reads headers, no values.

/** A pipeline has a PEFT folder for each of its models. */
const PIPELINE = "pipeline";
const FOLDERS = FORMATS.filter((format) => format.folder);
const PEFT = FOLDERS[0]!.folder!;

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
  /** "peft", "mlx", "kohya", "diffusers", "gguf", "onnx_adapter" or "pipeline". */
  readonly format: string;
  /** Adapters of a pipeline's models, by the name of the model ("unet"). */
  readonly models?: ReadonlyMap<string, AdapterLocation>;
  /** Where it comes from on the Hugging Face Hub: "org/name", with the path in the repository. */
  readonly hub?: string;
}

/**
 * Finds the adapters under some paths, sorted by id, each once. A path is an adapter's folder, a file of it, or a
 * folder of adapters. An adapter's folder has PEFT's adapter_config.json and adapter_model.safetensors, MLX LM's
 * adapter_config.json and adapters.safetensors, or diffusers' pytorch_lora_weights.safetensors; in a pipeline it has
 * PEFT folders with the names of its models (`unet`, `text_encoder`). Any other safetensors file that holds a LoRA, and
 * any .gguf or .onnx_adapter file that does, is an adapter by itself. A sub-folder that is no adapter is searched one
 * level deeper: PEFT saves adapters with names other than `default` there. Checkpoints inside an adapter's own folder
 * are left alone.
 *
 * A name of the Hugging Face Hub stands for the same: `hf:org/name`, `hf:org/name@revision/folder`. What belongs to
 * adapters is downloaded into the Hub's cache, and nothing else.
 * @throws AdapterError when a path is missing or holds no adapter, or an adapter's files are incomplete or a pickle
 * @throws SourceError when one is a pipe or a device, or the Hub refuses it
 * @throws FormatError when a safetensors file in a folder of adapters is damaged
 */
export async function findAdapters(paths: readonly string[], options: HubOptions = {}): Promise<AdapterLocation[]> {
  checkList("findAdapters", paths, "paths");
  const found = new Map<string, AdapterLocation>();
  for (const given of paths) {
    const { tree, path } = await treeAt(given, options);
    const locations = await searchTree(tree, path);
    await tree.get(await filesOf(locations, tree));
    for (const location of locations) found.set(location.tensors, onHub(location, tree));
  }
  return [...found.values()].sort((a, b) => compare(a.id, b.id) || compare(a.tensors, b.tensors));
}

async function filesOf(locations: Iterable<AdapterLocation>, tree: Tree): Promise<string[]> {
  const files: string[] = [];
  for (const { path, tensors, models } of locations) {
    const others = [...FOLDERS.flatMap(({ folder }) => folder!.config ?? []), TASK].map((name) => join(path, name));
    for (const file of [tensors, ...others]) if ((await tree.kind(file)) === "file") files.push(file);
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

/** Folders below the given one that are searched. */
const DEPTH = 2;

async function searchTree(tree: Tree, path: string): Promise<AdapterLocation[]> {
  if ((await tree.kind(path)) === "file") return [await adapterFile(path)];
  const adapters = await searchFolder(path, 0);
  if (adapters.length > 0) return adapters;
  const files = FOLDERS.map((format) => folderFiles(format).join(" and "));
  const looked = `holds no adapter; looked for ${files.join(", ")}, and other ${loose()}, in it and in its sub-folders`;
  const names = await visibleNames(path);
  const archive = names.find((name) => ARCHIVE.test(name));
  const model = names.find((name) => WHOLE_MODEL.test(name));
  const instead = archive ? `. It holds ${archive}: unpack that` : model ? `. It holds ${model}. ${NO_MODEL}` : "";
  throw refusal(looked + instead, path);

  /** @param depth of the folder below the one that was given */
  async function searchFolder(folder: string, depth: number): Promise<AdapterLocation[]> {
    const adapter = await adapterFolder(folder);
    if (adapter) return [adapter];
    const names = await visibleNames(folder);
    const adapters: AdapterLocation[] = [];
    for (const name of names) {
      const path = join(folder, name);
      const format = (await tree.kind(path)) === "file" ? await looseFormat(path) : undefined;
      if (format) adapters.push(loraFile(path, format));
    }
    if (depth === DEPTH || (depth > 0 && adapters.length > 0)) return adapters;
    for (const name of names) {
      const path = join(folder, name);
      if ((await tree.kind(path)) === "folder") adapters.push(...(await searchFolder(path, depth + 1)));
    }
    return adapters;
  }

  function refusal(message: string, path: string): AdapterError {
    return new AdapterError(message, { file: tree.nameOf(path) });
  }

  /** Takes a named file as an adapter; its reader reports what it lacks. */
  async function adapterFile(path: string): Promise<AdapterLocation> {
    const name = basename(path);
    const folder = dirname(path);
    if (/\.(bin|pt|pth|ckpt)$/.test(name)) throw pickle(path);
    const files = await namesOf(folder);
    const owners = FOLDERS.filter(
      (format) => format.folder!.marks.includes(name) || (name === format.folder!.tensors && isWhole(format, files)),
    );
    if (owners.length > 0) return inFolder(folder, owners, files);
    const format = FORMATS.find(({ ending }) => ending === extname(path));
    if (format) return loraFile(path, format);
    if (ARCHIVE.test(name)) throw refusal("is an archive; unpack it, and give its folder", path);
    if (extname(path) === ".safetensors") {
      const names = await namesIn(path, tree);
      // Names that its reader has advice about are left to it.
      if (holdsLora(names) || foreignName(names)) return loraFile(path, formatOf(names));
      const holds = `holds no LoRA, but ${names.length} tensors such as ${names[0] ?? "none"}`;
      throw refusal(`${holds}. ${NO_MODEL}`, path);
    }
    const expected = `expected ${PEFT.tensors} with ${PEFT.config} next to it, their folder, or one of ${loose()}`;
    throw refusal(`is not an adapter; ${expected}`, path);
  }

  /**
   * Takes a folder as an adapter if any of an adapter's files is in it, so that missing files are reported instead of
   * passed over.
   */
  async function adapterFolder(folder: string): Promise<AdapterLocation | undefined> {
    const names = await namesOf(folder);
    const marked = FOLDERS.filter((format) => format.folder!.marks.some((mark) => names.has(mark)));
    if (marked.length > 0) {
      const [first, ...others] = marked as [AdapterFormat, ...AdapterFormat[]];
      const another = others.find(({ folder }) => !folder!.marks.some((mark) => first.folder!.marks.includes(mark)));
      if (another) {
        throw refusal(
          `holds files of ${first.name} and of ${another.name}: which adapter is meant? Give the path of its tensor file`,
          folder,
        );
      }
      return inFolder(folder, marked, names);
    }
    // PEFT folders with the names of a pipeline's models are one adapter.
    const models = new Map<string, AdapterLocation>();
    for (const model of MODELS) {
      const path = join(folder, model);
      if (names.has(model) && (await tree.kind(join(path, CONFIG))) === "file")
        models.set(model, await inFolder(path, FOLDERS, await namesOf(path)));
    }
    const [first] = models.values();
    return first && { id: basename(folder), path: folder, tensors: first.tensors, format: PIPELINE, models };
  }

  /**
   * Takes a folder as the first of some formats whose files are all in it.
   * @throws AdapterError where there is none
   */
  function inFolder(folder: string, formats: readonly AdapterFormat[], names: ReadonlySet<string>): AdapterLocation {
    const whole = formats.find((format) => isWhole(format, names));
    if (whole)
      return {
        ...{ id: basename(folder), path: folder, format: whole.name },
        tensors: join(folder, whole.folder!.tensors),
      };
    const [{ tensors, config = "", pickle: pickled }] = formats.map(({ folder }) => folder!) as [AdapterFolder];
    if (!names.has(tensors) && pickled && names.has(pickled.name)) throw pickle(join(folder, pickled.name));
    const [missing, other] = names.has(tensors) ? [config, tensors] : [tensors, config];
    throw refusal(`has no ${missing} beside ${other}; copy it from where the adapter was saved`, folder);
  }

  /** The format of a file in a folder of adapters; undefined for a model or something else. */
  async function looseFormat(path: string): Promise<AdapterFormat | undefined> {
    if (extname(path) === ".safetensors") {
      const names = await namesIn(path, tree);
      return holdsLora(names) ? formatOf(names) : undefined;
    }
    const format = FORMATS.find(({ ending }) => ending === extname(path));
    if (!format?.isAdapter) return format;
    const source = await tree.open(path);
    try {
      return (await format.isAdapter(source)) ? format : undefined;
    } finally {
      await source.close?.();
    }
  }

  async function namesOf(folder: string): Promise<Set<string>> {
    return new Set(await tree.names(folder));
  }

  async function visibleNames(folder: string): Promise<string[]> {
    return (await tree.names(folder)).filter((name) => !name.startsWith(".")).sort();
  }

  function pickle(path: string): AdapterError {
    const pickles = FOLDERS.flatMap(({ folder }) => folder!.pickle ?? []);
    const { convert } = pickles.find(({ name }) => name === basename(path)) ?? pickles[0]!;
    return refusal(`is a Python pickle, which can run any program when it is read. Convert it: ${convert}`, path);
  }
}

function isWhole(format: AdapterFormat, names: ReadonlySet<string>): boolean {
  return folderFiles(format).every((name) => names.has(name));
}

/** The format of a safetensors file with a LoRA. */
function formatOf(names: readonly string[]): AdapterFormat {
  return FORMATS.find((format) => format.hasNames?.(names))!;
}

function loraFile(path: string, { name }: AdapterFormat): AdapterLocation {
  return { id: basename(path, extname(path)), path, tensors: path, format: name };
}

/** Words for adapters of one file. */
function loose(): string {
  return `LoRAs in files .safetensors, ${FORMATS.flatMap(({ ending }) => ending ?? []).join(", ")}`;
}
