/**
 * Adapters on disk: opens those under the paths a person names, in the order of their ids, each with the reader of its format. With
 * find.ts the only adapter code that needs a file system.
 */
import { readFile, stat } from "node:fs/promises";
import { join, resolve } from "node:path";
import { openPath } from "#platform";
import { checkList, checkOptions, nearest } from "../arguments.ts";
import { AdapterError, TaskError } from "../errors.ts";
import { isTaskId } from "../format/directory.ts";
import type { ByteSource } from "../source.ts";
import { parseJson } from "../tensor/json.ts";
import type { Adapter } from "./adapter.ts";
import { readDiffusers } from "./diffusers.ts";
import { type AdapterLocation, CONFIG, findAdapters, kind } from "./find.ts";
import { compare } from "./modules.ts";
import { readPeft } from "./peft.ts";

const TASK = "task.json";

/** More than a pattern for each of 100 000 modules; a larger file is no configuration, and would fill the memory. */
const MAX_JSON_BYTES = 16 * 1024 * 1024;

/** Files kept open between reads, which is twice as fast. Any further file is opened for each read. */
const MAX_HELD = 64;

/**
 * Opens the adapters under some paths, sorted by id. Close each when it is no longer needed: it may hold a file open.
 * @param options.rename new ids, by old id or by path
 * @throws AdapterError as `findAdapters`, `readPeft` and `readDiffusers`; FormatError and SourceError as these
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
    for (const { id, path, tensors: file, format } of locations) {
      const config = format === "peft" ? await readJson(join(path, CONFIG)) : undefined;
      const about = join(path, TASK);
      const task = (await kind(about)) === "file" ? await readJson(about) : undefined;
      const tensors = sources.length < MAX_HELD ? await openFile(file) : await openOnDemand(file);
      sources.push(tensors);
      const files = { id, file: path, tensors, task };
      adapters.push(await (format === "peft" ? readPeft({ ...files, config }) : readDiffusers(files)));
    }
  } catch (error) {
    for (const source of sources) await source.close?.();
    throw error;
  }
  return adapters;
}

function rename(found: readonly AdapterLocation[], names: ReadonlyMap<string, string>): AdapterLocation[] {
  const ids = new Map(found.map((location) => [location, location.id]));
  for (const [old, id] of names) {
    const at = resolve(old);
    const byPath = found.filter(({ path, tensors }) => path === at || tensors === at);
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

/** @throws AdapterError when there is no such file, it is too large, or holds what `parseJson` refuses */
async function readJson(path: string): Promise<unknown> {
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
