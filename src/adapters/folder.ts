/**
 * Adapters on disk: finds the PEFT adapters under the paths a person names and opens them in the order of their ids.
 * The only adapter code that needs a file system.
 */
import { readdir, readFile, stat } from "node:fs/promises";
import { basename, dirname, join, resolve } from "node:path";
import { openPath } from "#platform";
import { checkList, checkOptions, nearest } from "../arguments.ts";
import { AdapterError, TaskError } from "../errors.ts";
import { isTaskId } from "../format/directory.ts";
import type { ByteSource } from "../source.ts";
import { parseJson } from "../tensor/json.ts";
import type { Adapter } from "./adapter.ts";
import { compare } from "./modules.ts";
import { readPeft } from "./peft.ts";

const CONFIG = "adapter_config.json";
const TENSORS = "adapter_model.safetensors";
const PICKLE = "adapter_model.bin";
const TASK = "task.json";

/** More than a pattern for each of 100 000 modules; a larger file is no configuration, and would fill the memory. */
const MAX_JSON_BYTES = 16 * 1024 * 1024;

/** Files kept open between reads, which is twice as fast. Any further file is opened for each read. */
const MAX_HELD = 64;

/** An adapter found on disk. */
export interface AdapterLocation {
  /** Name of the folder. */
  readonly id: string;
  /** Absolute path of the folder that holds adapter_config.json and adapter_model.safetensors. */
  readonly folder: string;
}

/**
 * The adapters under some paths, sorted by id, each folder once. A path is an adapter's folder, a file in it, or a
 * folder of adapters. In the latter, a sub-folder without adapter_config.json may hold adapters of other names than
 * `default`, which PEFT saves one folder deeper; checkpoints inside an adapter's own folder are left alone.
 * @throws AdapterError when a path is missing or holds no adapter, or an adapter's files are incomplete or a pickle
 */
export async function findAdapters(paths: readonly string[]): Promise<AdapterLocation[]> {
  checkList("findAdapters", paths, "paths");
  const folders = new Set<string>();
  for (const path of paths) for (const folder of await adapterFolders(resolve(path))) folders.add(folder);
  const found = [...folders].map((folder) => ({ id: basename(folder), folder }));
  return found.sort((a, b) => compare(a.id, b.id) || compare(a.folder, b.folder));
}

/**
 * Opens the adapters under some paths, sorted by id. Close each when it is no longer needed: it may hold a file open.
 * @param options.rename new ids, by old id or by path of the folder
 * @throws AdapterError as `findAdapters` and `readPeft`; FormatError and SourceError as `readPeft`
 * @throws TaskError when two adapters have one id, an id is not allowed, or a rename means none or several
 */
export async function readAdapters(
  paths: readonly string[],
  options: { rename?: ReadonlyMap<string, string> } = {},
): Promise<Adapter[]> {
  checkOptions("readAdapters", options, ["rename"]);
  checkList("readAdapters", paths, "paths");
  const locations = rename(await findAdapters(paths), options.rename ?? new Map());
  const adapters: Adapter[] = [];
  const sources: ByteSource[] = [];
  try {
    for (const { id, folder } of locations) {
      const config = await readJson(join(folder, CONFIG));
      const task = (await kind(join(folder, TASK))) === "file" ? await readJson(join(folder, TASK)) : undefined;
      const path = join(folder, TENSORS);
      const tensors = sources.length < MAX_HELD ? await openFile(path) : await openOnDemand(path);
      sources.push(tensors);
      adapters.push(await readPeft({ id, file: folder, config, tensors, task }));
    }
  } catch (error) {
    for (const source of sources) await source.close?.();
    throw error;
  }
  return adapters;
}

async function kind(path: string): Promise<"file" | "folder" | undefined> {
  const found = await stat(path).catch(() => undefined);
  return found?.isDirectory() ? "folder" : found?.isFile() ? "file" : undefined;
}

async function adapterFolders(path: string): Promise<string[]> {
  const found = await kind(path);
  if (found === undefined) throw new AdapterError("does not exist or cannot be read; check the path", { file: path });
  if (found === "file") {
    const name = basename(path);
    if (/\.(bin|pt|pth|ckpt)$/.test(name)) throw pickleError(path);
    if (name === TENSORS || name === CONFIG) return [await checkAdapter(dirname(path))];
    throw new AdapterError(`is not an adapter; expected ${TENSORS} with ${CONFIG} beside it, or their folder`, {
      file: path,
    });
  }
  if (await isAdapter(path)) return [await checkAdapter(path)];
  const adapters: string[] = [];
  for (const child of await subFolders(path)) {
    if (await isAdapter(child)) adapters.push(await checkAdapter(child));
    else {
      for (const inner of await subFolders(child)) if (await isAdapter(inner)) adapters.push(await checkAdapter(inner));
    }
  }
  if (adapters.length === 0) {
    throw new AdapterError(`holds no adapter; looked for ${CONFIG} and ${TENSORS} in it and in its sub-folders`, {
      file: path,
    });
  }
  return adapters;
}

/** Any of an adapter's files makes it one: what is missing or wrong beside it should be said, not passed over. */
async function isAdapter(folder: string): Promise<boolean> {
  for (const name of [CONFIG, TENSORS, PICKLE]) if ((await kind(join(folder, name))) === "file") return true;
  return false;
}

async function subFolders(folder: string): Promise<string[]> {
  const names = (await readdir(folder)).filter((name) => !name.startsWith(".")).sort();
  const paths = names.map((name) => join(folder, name));
  const kinds = await Promise.all(paths.map(kind));
  return paths.filter((_, i) => kinds[i] === "folder");
}

/** The folder, when both of an adapter's files are in it. */
async function checkAdapter(folder: string): Promise<string> {
  for (const [name, other] of [
    [TENSORS, CONFIG],
    [CONFIG, TENSORS],
  ] as const) {
    if ((await kind(join(folder, name))) === "file") continue;
    if (name === TENSORS && (await kind(join(folder, PICKLE))) === "file") throw pickleError(join(folder, PICKLE));
    throw new AdapterError(`has no ${name} beside ${other}; copy it from where the adapter was saved`, {
      file: folder,
    });
  }
  return folder;
}

function pickleError(path: string): AdapterError {
  return new AdapterError(
    "is a Python pickle, which can run any program when it is read. Convert it: load it with PEFT where you trust it " +
      "(PeftModel.from_pretrained) and call save_pretrained(folder, safe_serialization=True)",
    { file: path },
  );
}

function rename(found: readonly AdapterLocation[], names: ReadonlyMap<string, string>): AdapterLocation[] {
  const ids = new Map(found.map(({ id, folder }) => [folder, id]));
  for (const [old, id] of names) {
    const byPath = found.filter(({ folder }) => folder === resolve(old));
    const meant = byPath.length > 0 ? byPath : found.filter((location) => location.id === old);
    if (meant.length !== 1) {
      const folders = meant.map((location) => location.folder).join(", ");
      const why = folders === "" ? "no adapter has this id or path" : `means several; use a path: ${folders}`;
      throw new TaskError(`rename ${old} to ${id}: ${why}`, {
        task: old,
        nearest: nearest(
          old,
          found.map((location) => location.id),
        ),
      });
    }
    ids.set(meant[0]!.folder, id);
  }
  const owners = new Map<string, string>();
  for (const [folder, id] of ids) {
    if (!isTaskId(id)) {
      throw new TaskError(
        `${folder}: ${JSON.stringify(id)} cannot be a task's id, which has 1 to 255 bytes and no control characters; ` +
          `give it a new one with rename`,
        { task: id },
      );
    }
    const other = owners.get(id);
    if (other !== undefined) {
      throw new TaskError(`${other} and ${folder} are both called ${id}; give one a new id with rename`, {
        task: id,
      });
    }
    owners.set(id, folder);
  }
  return [...owners].map(([id, folder]) => ({ id, folder })).sort((a, b) => compare(a.id, b.id));
}

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

/** Defined wherever node:fs is. */
const openFile = openPath!;

/** A file that is opened anew for every read. */
async function openOnDemand(path: string): Promise<ByteSource> {
  const probe = await openFile(path);
  await probe.close?.();
  return {
    name: path,
    byteLength: probe.byteLength,
    async read(offset, length, options) {
      const source = await openFile(path);
      try {
        return await source.read(offset, length, options);
      } finally {
        await source.close?.();
      }
    },
  };
}
