/**
 * Where adapters and bases are looked for: folders on the disk, or a repository of the Hugging Face Hub. Paths are absolute ones on the
 * disk in both: those of a repository are where its files lie once they are downloaded.
 */
import { readdir, stat } from "node:fs/promises";
import { join, relative, resolve, sep } from "node:path";
import { openDisk, refuseOtherKinds } from "../disk.ts";
import { AdapterError } from "../errors.ts";
import { openSnapshot, type Snapshot, type SnapshotOptions } from "../http/hub.ts";
import { type HubName, hubName } from "../http/hub-name.ts";
import type { ByteSource } from "../source.ts";

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
