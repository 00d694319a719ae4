/**
 * Where adapters and bases are looked for: folders on the disk, or a repository of the Hugging Face Hub. Paths are absolute ones on the
 * disk in both: those of a repository are where its files lie once they are downloaded.
 */
import { readdir, readFile, stat } from "node:fs/promises";
import { extname, join, relative, resolve, sep } from "node:path";
import { described } from "../arguments.ts";
import type { WeightHost } from "../core/base.ts";
import { openHost } from "../core/open-base.ts";
import { openDisk, refuseOtherKinds } from "../disk.ts";
import { AdapterError } from "../errors.ts";
import type { HubOptions, Snapshot, SnapshotOptions } from "../http/hub.ts";
import { type HubName, hubName, isInside } from "../http/hub-name.ts";
import type { ByteSource } from "../source.ts";
import { parseJson } from "../tensor/tensor-file.ts";

/** What a path leads to. */
export type PathKind = "file" | "folder" | undefined;

/** Files and folders, which are named by absolute paths. */
export interface Tree {
  /** Undefined where nothing is there, or nothing that may be seen. */
  kind(path: string): Promise<PathKind>;
  /** Names in a folder. */
  names(folder: string): Promise<string[]>;
  /** Opens a file for reads of parts, which is all that is read of it. */
  open(path: string): Promise<ByteSource>;
  /** Sees to it that files lie on the disk under their paths. */
  get(paths: readonly string[]): Promise<void>;
  /** How messages call it. */
  nameOf(path: string): string;
  /** Where the tree lies on the Hub. */
  readonly hub?: { readonly name: HubName; readonly root: string } | undefined;
}

/** The disk. */
const DISK: Tree = {
  async kind(path) {
    const found = await stat(path).catch(() => undefined);
    return found?.isDirectory() ? "folder" : found?.isFile() ? "file" : undefined;
  },
  names: (folder) => readdir(folder),
  open: (path) => openDisk(path),
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
  const tree = treeOf(snapshot, name);
  const path = join(snapshot.folder, name.path);
  if ((await tree.kind(path)) !== undefined) return { tree, path };
  const has = (await tree.names(snapshot.folder)).join(", ") || "nothing";
  throw new AdapterError(`there is no such file or folder; the repository has ${has}`, { file: tree.nameOf(path) });
}

function treeOf(snapshot: Snapshot, name: HubName): Tree {
  const { folder: root, files } = snapshot;
  const within = (path: string): string => relative(root, path).split(sep).join("/");
  const below = (path: string): string[] => {
    const start = path === root ? "" : `${within(path)}/`;
    return [...files.keys()].filter((file) => file.startsWith(start)).map((file) => file.slice(start.length));
  };
  return {
    async kind(path) {
      return files.has(within(path)) ? "file" : below(path).length > 0 ? "folder" : undefined;
    },
    names: async (folder) => [...new Set(below(folder).map((file) => file.replace(/\/.*/, "")))],
    open: (path) => snapshot.open(within(path)),
    get: async (paths) => void (await snapshot.get(paths.map(within))),
    nameOf: (path) => snapshot.nameOf(within(path)),
    hub: { name, root },
  };
}

// Reads JSON files beside adapters and models.

/** Room for a pattern for each of 100 000 modules; a larger file is no configuration, and would fill the memory. */
const MAX_JSON_BYTES = 16 * 1024 * 1024;

/** @throws AdapterError when there is no such file, it is too large, or holds what `parseJson` refuses */
export async function readJson(path: string): Promise<unknown> {
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

/** Opens the files of one model as one base. */
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
