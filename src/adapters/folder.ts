/**
 * Opens adapters under given paths, in the order of their ids, each with the reader of its format. This file, find.ts and tree.ts are the
 * only adapter code that needs a file system.
 */
import { join, resolve } from "node:path";
import { checkList, checkOptions, nearest } from "../arguments.ts";
import type { WeightHost } from "../core/base.ts";
import { openDisk } from "../disk.ts";
import { TaskError } from "../errors.ts";
import { isTaskId } from "../format/directory.ts";
import type { TaskMetadata } from "../format/format.ts";
import type { HubOptions } from "../http/hub.ts";
import { type ByteSource, FETCH_OPTIONS } from "../source.ts";
import type { Adapter, AdapterModule } from "./adapter.ts";
import type { BaseFacts } from "./base-facts.ts";
import { openWeights } from "./base-files.ts";
import { describeBase } from "./describe-base.ts";
import { readDiffusers } from "./diffusers.ts";
import { withTextModel } from "./diffusers-keys.ts";
import { type AdapterLocation, CONFIG, findAdapters, TASK } from "./find.ts";
import { readGguf } from "./gguf.ts";
import { readJson } from "./json-file.ts";
import { readKohya } from "./kohya.ts";
import { readTaskMetadata } from "./metadata.ts";
import { readMlx } from "./mlx.ts";
import { compare } from "./modules.ts";
import { readOnnxAdapter } from "./onnx-adapter.ts";
import { type PeftFiles, readPeft } from "./peft.ts";
import { readPeftConfig } from "./peft-config.ts";
import { kind } from "./tree.ts";

/** Files kept open between reads, which is twice as fast. Any further file is opened for each read. */
const MAX_HELD = 64;

/** Options of `readAdapters`. Those of `HubOptions` are for names of the Hugging Face Hub. */
export interface ReadAdaptersOptions extends HubOptions {
  /** New ids, by old id, or by path or name of the Hub. */
  readonly rename?: ReadonlyMap<string, string> | undefined;
  /**
   * Path of a file that names the base's modules (for files of kohya) or its heads (for GGUF files): its folder, config.json, safetensors
   * file or index, list of names in JSON, or GGUF file; or a name of the Hub. An adapter that began as PiSSA or OLoRA needs its weights:
   * its folder or safetensors file. Read when an adapter needs it. Default: none.
   */
  readonly base?: string | undefined;
}

/**
 * Opens the adapters under some paths, sorted by id. Close each when it is no longer needed: it may hold a file open. A path may be a name
 * of the Hugging Face Hub, as `findAdapters` takes it.
 * @throws AdapterError as `findAdapters`, `readPeft` and the readers of other formats; FormatError and SourceError as these
 * @throws TaskError when two adapters have one id, an id is not allowed, or a rename matches none or several
 */
export async function readAdapters(paths: readonly string[], options: ReadAdaptersOptions = {}): Promise<Adapter[]> {
  checkOptions("readAdapters", options, ["rename", "base", "onProgress", "signal", ...FETCH_OPTIONS]);
  checkList("readAdapters", paths, "paths");
  const { base } = options;
  const locations = rename(await findAdapters(paths, options), options.rename ?? new Map());
  let facts: Promise<BaseFacts> | undefined;
  const files = new Files(
    async () => (base === undefined ? {} : (facts ??= describeBase(base, options))),
    async () => (base === undefined ? undefined : openWeights(base, options)),
  );
  const adapters: Adapter[] = [];
  try {
    for (const location of locations) adapters.push(await files.read(location));
  } catch (error) {
    await files.close();
    throw error;
  }
  return adapters;
}

/** Opens the files of adapters, and keeps some open. */
class Files {
  readonly #sources: ByteSource[] = [];
  readonly #base: () => Promise<BaseFacts>;
  readonly #openWeights: () => Promise<WeightHost | undefined>;
  /** The base's weights, opened for the first adapter that needs them and closed with the last. */
  #weights: Promise<WeightHost | undefined> | undefined;
  #users = 0;

  constructor(base: () => Promise<BaseFacts>, openWeights: () => Promise<WeightHost | undefined>) {
    this.#base = base;
    this.#openWeights = openWeights;
  }

  async read(location: AdapterLocation): Promise<Adapter> {
    const { id, path, tensors: file, format, models } = location;
    const about = join(path, TASK);
    const task = (await kind(about)) === "file" ? await readJson(about) : undefined;
    if (models) {
      const read = new Map<string, Adapter>();
      for (const [model, one] of models) read.set(model, await this.read(one));
      return joinModels({ id, file: path }, read, readTaskMetadata(task, about));
    }
    const files = { id, file: path, tensors: await this.#open(file), task };
    if (format === "peft") return this.#peft({ ...files, config: await readJson(join(path, CONFIG)) });
    if (format === "mlx") return readMlx({ ...files, config: await readJson(join(path, CONFIG)) });
    if (format === "kohya") return readKohya({ ...files, base: await this.#base() });
    if (format === "gguf") return readGguf({ ...files, base: await this.#base() });
    return format === "onnx_adapter" ? readOnnxAdapter(files) : readDiffusers(files);
  }

  async #peft(files: PeftFiles): Promise<Adapter> {
    if (readPeftConfig(files.config, `${files.file}/${CONFIG}`).start === undefined) return readPeft(files);
    const base = await (this.#weights ??= this.#openWeights());
    const adapter = await readPeft({ ...files, base });
    this.#users++;
    const close = async (): Promise<void> => {
      await adapter.close();
      if (--this.#users === 0) await base?.close?.();
    };
    return { ...adapter, close };
  }

  async #open(path: string): Promise<ByteSource> {
    const source = this.#sources.length < MAX_HELD ? await openDisk(path) : await openOnDemand(path);
    this.#sources.push(source);
    return source;
  }

  async close(): Promise<void> {
    for (const source of this.#sources) await source.close?.();
    await (await this.#weights)?.close?.();
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
      throw new TaskError(`rename ${old} to ${id}: ${why}`, {
        task: old,
        nearest: nearest(
          old,
          found.map((location) => location.id),
        ),
      });
    }
    ids.set(meant[0]!, id);
  }
  const owners = new Map<string, AdapterLocation>();
  for (const [location, id] of ids) {
    const { path } = location;
    if (!isTaskId(id)) {
      throw new TaskError(
        `${path}: ${JSON.stringify(id)} cannot be a task's id, which has 1 to 255 bytes and no control characters; ` +
          `give it a new one with rename`,
        { task: id },
      );
    }
    const other = owners.get(id)?.path;
    if (other !== undefined) {
      throw new TaskError(`${other} and ${path} are both called ${id}; give one a new id with rename`, { task: id });
    }
    owners.set(id, location);
  }
  return [...owners].map(([id, location]) => ({ ...location, id })).sort((a, b) => compare(a.id, b.id));
}

/** Opens a file anew for every read. */
async function openOnDemand(path: string): Promise<ByteSource> {
  const probe = await openDisk(path);
  await probe.close?.();
  return {
    name: path,
    byteLength: probe.byteLength,
    async read(offset, length, options) {
      const source = await openDisk(path);
      try {
        return await source.read(offset, length, options);
      } finally {
        await source.close?.();
      }
    },
  };
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
    byteLength: all.reduce((sum, [, { byteLength }]) => sum + byteLength, 0),
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
