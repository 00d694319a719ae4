/**
 * The weights of a base model in its folder, as transformers saves them: one file, or several with an index.
 */
import { join } from "node:path";
import { kind } from "../adapters/find.ts";
import { readJson } from "../adapters/json-file.ts";
import type { WeightHost } from "../core/base.ts";
import { openHost } from "../core/open-base.ts";

/** Paths of the files with a model's weights; none where the folder has no safetensors of a model. */
export async function weightFiles(folder: string): Promise<string[]> {
  const whole = join(folder, "model.safetensors");
  if ((await kind(whole)) === "file") return [whole];
  const index = join(folder, "model.safetensors.index.json");
  if ((await kind(index)) !== "file") return [];
  const { weight_map: map } = (await readJson(index)) as { weight_map?: Readonly<Record<string, string>> };
  return [...new Set(Object.values(map ?? {}))].map((file) => join(folder, file));
}

/** Opens the files of one model as one base, which is only read. */
export async function openHosts(files: readonly string[]): Promise<WeightHost> {
  const hosts: WeightHost[] = [];
  const close = async (): Promise<void> => {
    for (const host of hosts) await host.close?.();
  };
  try {
    for (const file of files) hosts.push(await openHost(file));
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
