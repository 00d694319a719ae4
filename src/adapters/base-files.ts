/**
 * The weights of a base model in its folder, as transformers saves them: one file, or several with an index.
 */
import { extname, join } from "node:path";
import { described } from "../arguments.ts";
import type { WeightHost } from "../core/base.ts";
import { openHost } from "../core/open-base.ts";
import { AdapterError } from "../errors.ts";
import type { HubOptions } from "../http/hub.ts";
import { hubName, isInside } from "../http/hub-name.ts";
import { readJson } from "./json-file.ts";
import { kind, type Tree, treeAt } from "./tree.ts";

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
