/**
 * What commands open and read: adapters, base models, and tasks of a pack as they are written again.
 */
import type { Adapter } from "../adapters/adapter.ts";
import { readAdapters } from "../adapters/folder.ts";
import { openHost } from "../base/host.ts";
import { layoutFresh, type TaskToWrite } from "../format/layout.ts";
import type { BuildOptions } from "../pack/build.ts";
import { completeDtypes, type Dtypes } from "../pack/build.ts";
import type { Pack } from "../pack/pack.ts";
import type { Run } from "./command.ts";
import type { Output } from "./output.ts";

/** The adapters under some paths, open until the command ends. */
export async function openAdapters(
  paths: readonly string[],
  rename: ReadonlyMap<string, string>,
  run: Run,
): Promise<Adapter[]> {
  return (await readAdapters(paths, { rename })).map((adapter) => run.closing(adapter));
}

/** Warns of what adapters' files say. @returns the warnings */
export function warnings(adapters: readonly Adapter[], out: Output): string[] {
  const all = adapters.flatMap(({ id, warnings }) => warnings.map((warning) => `${id}: ${warning}`));
  for (const warning of all) out.warn(warning);
  return all;
}

/** The base model, where one was named. */
export async function openBase(path: string | undefined, run: Run): Promise<Pick<BuildOptions, "base">> {
  return path === undefined ? {} : { base: run.closing(await openHost(path)) };
}

/** A task of the pack as it is. */
export async function taskOf(pack: Pack, id: string): Promise<TaskToWrite> {
  return { entry: pack.tasks.get(id)!, blob: (await pack.load(id)).bytes };
}

/** A pack of the same basis and other tasks. */
export async function packWith(pack: Pack, tasks: readonly TaskToWrite[]): Promise<Uint8Array[]> {
  const { basisId, directory } = pack;
  return layoutFresh({ description: directory.basisBytes, bases: (await pack.bases()).bytes, basisId, tasks });
}

/** The number formats that a pack's tasks are stored in, so that new ones are stored alike. */
export async function storedDtypes(pack: Pack): Promise<Dtypes> {
  const first = pack.tasks.keys().next().value;
  if (first === undefined) return completeDtypes();
  const { terms, parameters } = await pack.load(first);
  const coefficients = terms.find((term) => term.A)?.A?.tensor.dtype;
  const head = parameters.find(({ shape }) => shape.length > 1)?.tensor.dtype;
  return completeDtypes({ ...(coefficients ? { coefficients } : {}), ...(head ? { head } : {}) });
}
