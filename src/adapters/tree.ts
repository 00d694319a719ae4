/**
 * Where adapters and bases are looked for: folders on the disk, or a repository of the Hugging Face Hub. Paths are
 * absolute ones on the disk in both: those of a repository are where its files lie once they are downloaded.
 */

import { readdir, readFile, stat } from "node:fs/promises";
import { dirname, extname, join, relative, resolve, sep } from "node:path";
import type { WeightHost } from "../core/base.ts";
import { openHost } from "../core/open-base.ts";
import { AdapterError, described } from "../errors.ts";
import { openPath, refuseOtherKinds } from "../files-node.ts";
import type { HubOptions, SnapshotOptions } from "../http/hub.ts";
import { type HubName, isInside } from "../http/hub-name.ts";
import { hubName } from "../http/hub-page.ts";
import type { ByteSource } from "../source.ts";
import { openGguf } from "../tensor/gguf.ts";
import { parseJson } from "../tensor/safetensors.ts";
import { type BaseFacts, openSafetensors } from "./adapter.ts";
import { MODELS } from "./diffusers.ts";

type PathKind = "file" | "folder" | undefined;

/** Files and folders, which are named by absolute paths. */
export interface Tree {
  /** Undefined where nothing is there, or nothing that may be seen. */
  kind(path: string): Promise<PathKind>;
  names(folder: string): Promise<string[]>;
  /** Opens a file for reads of parts, which is all that is read of it. */
  open(path: string): Promise<ByteSource>;
  /** Sees to it that files lie on the disk under their paths. */
  get(paths: readonly string[]): Promise<void>;
  nameOf(path: string): string;
  /** Where the tree lies on the Hub. */
  readonly hub?: { readonly name: HubName; readonly root: string } | undefined;
}

const DISK: Tree = {
  async kind(path) {
    const found = await stat(path).catch(() => undefined);
    return found?.isDirectory() ? "folder" : found?.isFile() ? "file" : undefined;
  },
  names: (folder) => readdir(folder),
  open: (path) => openPath(path),
  get: async () => {},
  nameOf: (path) => path,
};

export const kind: Tree["kind"] = DISK.kind;

/**
 * Finds what a path or a name of the Hub leads to.
 * @throws AdapterError when there is nothing, SourceError for a pipe, a device, or what the Hub refuses
 */
export async function treeAt(given: string, options: SnapshotOptions = {}): Promise<{ tree: Tree; path: string }> {
  const name = hubName(given);
  if (name) return treeOnHub(name, options);
  if (/^https?:/i.test(given)) {
    const message =
      "is an address, and folders are searched on the disk and on the Hugging Face Hub (hf:org/name) alone; download it";
    throw new AdapterError(message, { file: given });
  }
  const path = resolve(given);
  if ((await kind(path)) !== undefined) return { tree: DISK, path };
  await refuseOtherKinds(path, "a file or a folder");
  throw new AdapterError("does not exist or cannot be read; check the path", { file: path });
}

async function treeOnHub(name: HubName, options: SnapshotOptions): Promise<{ tree: Tree; path: string }> {
  const { openSnapshot } = await import("../http/hub.ts");
  const snapshot = await openSnapshot(name, options);
  const { folder: root, files } = snapshot;
  const within = (path: string): string => relative(root, path).split(sep).join("/");
  const below = (path: string): string[] => {
    const start = path === root ? "" : `${within(path)}/`;
    return [...files.keys()].filter((file) => file.startsWith(start)).map((file) => file.slice(start.length));
  };
  const tree: Tree = {
    async kind(path) {
      return files.has(within(path)) ? "file" : below(path).length > 0 ? "folder" : undefined;
    },
    names: async (folder) => [...new Set(below(folder).map((file) => file.replace(/\/.*/, "")))],
    open: (path) => snapshot.open(within(path)),
    get: async (paths) => void (await snapshot.get(paths.map(within))),
    nameOf: (path) => snapshot.nameOf(within(path)),
    hub: { name, root },
  };
  const path = join(root, name.path);
  if ((await tree.kind(path)) !== undefined) return { tree, path };
  const has = (await tree.names(root)).join(", ") || "nothing";
  throw new AdapterError(`there is no such file or folder; the repository has ${has}`, { file: tree.nameOf(path) });
}

// Reads JSON files of adapters and models.

/** Room for a pattern for each of 100 000 modules; a larger file is no configuration, and would fill the memory. */
const MAX_JSON_BYTES = 16 * 1024 * 1024;

/**
 * @throws SourceError for a pipe or a device; AdapterError when there is no such file, it is too large, or holds what
 *   `parseJson` refuses
 */
export async function readJson(path: string): Promise<unknown> {
  await refuseOtherKinds(path, "a file");
  const bytes = (await stat(path).catch(() => undefined))?.size ?? 0;
  if (bytes > MAX_JSON_BYTES) {
    throw new AdapterError(`has ${bytes} bytes, ${MAX_JSON_BYTES} at most are read; shorten it`, { file: path });
  }
  const text = await readFile(path, "utf8").catch((cause: unknown) => {
    throw new AdapterError(`cannot be read: ${(cause as Error).message}`, { file: path, cause });
  });
  try {
    return parseJson(text);
  } catch (cause) {
    throw new AdapterError(`${(cause as Error).message}; correct it or save it again`, { file: path, cause });
  }
}

// The weights of a base model in its folder, as transformers saves them: one file, or several with an index.

/**
 * Opens a base model's weights, which are only read. On the Hub their files are downloaded.
 * @returns undefined where names are all there is: a folder without safetensors of a model, a list in JSON, a GGUF file
 * @throws AdapterError, SourceError, FormatError when they cannot be read
 */
export async function openWeights(given: string, options: HubOptions): Promise<WeightHost | undefined> {
  // An address is read by ranges; what is missing is refused where it is opened.
  if (!hubName(given) && (await kind(given)) === undefined) return namesAlone(given) ? undefined : openHost(given);
  const { tree, path } = await treeAt(given, { ...options, stage: "model" });
  const files = (await tree.kind(path)) === "folder" ? await weightFiles(path, tree) : namesAlone(path) ? [] : [path];
  await tree.get(files);
  return files.length === 0 ? undefined : openHosts(files, tree);
}

const namesAlone = (path: string): boolean => [".json", ".gguf"].includes(extname(path));

/** Paths of the files with a model's weights; none where the folder has no safetensors of a model. */
async function weightFiles(folder: string, tree: Tree): Promise<string[]> {
  const whole = join(folder, "model.safetensors");
  if ((await tree.kind(whole)) === "file") return [whole];
  const index = join(folder, "model.safetensors.index.json");
  if ((await tree.kind(index)) !== "file") return [];
  await tree.get([index]);
  const { weight_map: map } = ((await readJson(index)) ?? {}) as { weight_map?: Readonly<Record<string, unknown>> };
  return [...new Set(Object.values(map ?? {}))].map((file) => {
    if (typeof file === "string" && isInside(file)) return join(folder, file);
    throw new AdapterError(`"weight_map" names ${described(file)}, expected a file of its folder`, {
      file: tree.nameOf(index),
    });
  });
}

async function openHosts(files: readonly string[], tree: Tree): Promise<WeightHost> {
  const hosts: WeightHost[] = [];
  const close = async (): Promise<void> => {
    for (const host of hosts) await host.close?.();
  };
  try {
    for (const file of files) hosts.push(await openHost(await tree.open(file)));
  } catch (error) {
    await close();
    throw error;
  }
  if (hosts.length === 1) return hosts[0]!;
  const owners = new Map(hosts.flatMap((host) => [...host.list()].map(({ name }) => [name, host] as const)));
  return {
    *list() {
      for (const host of hosts) yield* host.list();
    },
    read: (name, into, options) => (owners.get(name) ?? hosts[0]!).read(name, into, options),
    close,
  };
}

// Facts of a base model, from its folder, config.json, a safetensors file or its index, a list of names, or a GGUF
// file. Reads headers, no weights.

const CONFIG = "config.json";

/**
 * Reads names, heads and architecture of a base model, for formats that leave them to it.
 * @param given path of its folder, config.json, a list of names in JSON, a safetensors file or index, or a GGUF file;
 *   or a name of the Hub
 * @throws AdapterError for other files; FormatError and SourceError for files that cannot be read
 */
export async function describeBase(given: string, options: HubOptions = {}): Promise<BaseFacts> {
  const { tree, path } = await treeAt(given, { ...options, stage: "model" });
  const ending = extname(path);
  if ((await tree.kind(path)) === "folder") return describeFolder(path, tree);
  if (ending === ".gguf") return describeGguf(path, tree);
  if (ending === ".safetensors") return { names: await namesIn(path, tree), ...(await factsIn(dirname(path), tree)) };
  if (ending === ".json") {
    const json = await jsonAt(path, tree);
    if (Array.isArray(json) && json.every((name) => typeof name === "string")) return { names: json };
    const map = (json as { weight_map?: unknown } | null)?.weight_map;
    if (typeof map === "object" && map) return { names: Object.keys(map), ...(await factsIn(dirname(path), tree)) };
    const facts = factsOfConfig(json);
    if (facts) return facts;
  }
  const expected =
    "expected its folder, a config.json with num_attention_heads, a list of names in JSON, a safetensors file, its index, or a GGUF file";
  throw new AdapterError(`says nothing of a base model; ${expected}`, { file: tree.nameOf(path) });
}

/** Describes a model, or a pipeline, whose models lie in folders of their own. */
async function describeFolder(folder: string, tree: Tree): Promise<BaseFacts> {
  const names = await namesInFolder(folder, tree);
  for (const model of MODELS)
    for (const name of await namesInFolder(join(folder, model), tree)) names.push(`${model}.${name}`);
  const facts = await factsIn(folder, tree);
  if (names.length === 0 && facts === undefined) {
    const message = `holds neither ${CONFIG} nor safetensors files of a model`;
    throw new AdapterError(message, { file: tree.nameOf(folder) });
  }
  return { names: names.length > 0 ? names : undefined, ...facts };
}

async function namesInFolder(folder: string, tree: Tree): Promise<string[]> {
  if ((await tree.kind(folder)) !== "folder") return [];
  const files = (await tree.names(folder)).filter((name) => extname(name) === ".safetensors").sort();
  return (await Promise.all(files.map((name) => namesIn(join(folder, name), tree)))).flat();
}

/** Names of the tensors in a safetensors file. */
export async function namesIn(path: string, tree: Tree): Promise<string[]> {
  const file = await openSafetensors(await tree.open(path));
  await file.close();
  return [...file.tensors.keys()];
}

async function factsIn(folder: string, tree: Tree): Promise<BaseFacts | undefined> {
  const config = join(folder, CONFIG);
  return (await tree.kind(config)) === "file" ? factsOfConfig(await jsonAt(config, tree)) : undefined;
}

async function jsonAt(path: string, tree: Tree): Promise<unknown> {
  await tree.get([path]);
  return readJson(path);
}

async function describeGguf(path: string, tree: Tree): Promise<BaseFacts> {
  const source = await tree.open(path);
  try {
    const { fields } = await openGguf(source);
    const architecture = String(fields.get("general.architecture"));
    const heads = fields.get(`${architecture}.attention.head_count`);
    const kvHeads = fields.get(`${architecture}.attention.head_count_kv`) ?? heads;
    if (isCount(heads) && isCount(kvHeads)) return { heads, kvHeads, architecture };
    throw new AdapterError(`has no ${architecture}.attention.head_count that is one number`, {
      file: tree.nameOf(path),
    });
  } finally {
    await source.close?.();
  }
}

/** llama.cpp's names of architectures that transformers calls otherwise (`model_type`). */
const ARCHITECTURES: ReadonlyMap<unknown, string> = new Map([
  ["mistral", "llama"],
  ["gemma3_text", "gemma3"],
]);

/** Reads architecture and heads from a parsed config.json of transformers. Undefined where it has neither. */
function factsOfConfig(config: unknown): BaseFacts | undefined {
  if (typeof config !== "object" || config === null) return undefined;
  const fields = config as Record<string, unknown>;
  // Models that also see or hear keep their language model's configuration one level deeper.
  const text = fields["text_config"];
  const heads = fields["num_attention_heads"] ?? fields["n_head"];
  if (heads === undefined && text !== undefined) return factsOfConfig(text);
  const kvHeads = fields["num_key_value_heads"] ?? heads;
  if (!isCount(heads) || !isCount(kvHeads)) return undefined;
  const type = fields["model_type"];
  return { heads, kvHeads, architecture: ARCHITECTURES.get(type) ?? (typeof type === "string" ? type : undefined) };
}

function isCount(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 1;
}
