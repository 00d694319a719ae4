/**
 * Modules that several adapters, or parts made of adapters, have in common: a layer must be the same in all of them.
 */
import { checkArgument, checkList } from "../arguments.ts";
import { AdapterError } from "../errors.ts";
import type { Adapter, ModuleShape } from "./adapter.ts";

/** Compares by code units, so that the order is the same on every machine. */
export function compare(a: string, b: string): number {
  return a < b ? -1 : a > b ? 1 : 0;
}

/** An owner of modules, and its file. */
interface Owner<M extends ModuleShape> {
  readonly file: string;
  readonly modules: ReadonlyMap<string, M>;
}

/** A module with all its owners. */
export interface SharedModule<O> {
  readonly shape: ModuleShape;
  readonly owners: readonly O[];
}

/**
 * All modules that occur, sorted by name.
 * @throws AdapterError naming the second file when two mean different modules by one name
 */
export function sharedModules<M extends ModuleShape, O extends Owner<M>>(
  all: readonly (O & Owner<M>)[],
): Map<string, SharedModule<O>> {
  const names = [...new Set(all.flatMap(({ modules }) => [...modules.keys()]))].sort();
  return new Map(
    names.map((name) => {
      const owners = all.filter(({ modules }) => modules.has(name));
      const { out, in: inputs, layout, kernel } = owners[0]!.modules.get(name)!;
      const shape = { name, out, in: inputs, layout, kernel };
      for (const { file, modules } of owners) checkSame(shape, owners[0]!.file, modules.get(name)!, file);
      return [name, { shape, owners }];
    }),
  );
}

/** @throws AdapterError when an adapter both replaces a weight (or rows of it) and adapts it; PEFT makes no such adapter */
export function refuseBoth({ file, modules, saved }: Pick<Adapter, "file" | "modules" | "saved">): void {
  const adapted = new Set([...modules.keys()].map((name) => `${name}.weight`));
  const both = saved.find(({ name, role }) => adapted.has(name) && (role === "saved" || role === "rows"));
  if (!both) return;
  const message = `it brings "${both.name}" (${both.role}) and adapts it as well: which of the two is meant? Leave one out`;
  throw new AdapterError(message, { file, field: both.name });
}

/** @throws AdapterError when two adapters have one id */
export function refuseTwins(adapters: readonly Pick<Adapter, "id" | "file">[]): void {
  const files = new Map<string, string>();
  for (const { id, file } of adapters) {
    const other = files.get(id);
    if (other !== undefined) throw new AdapterError(`it has the id "${id}", as ${other}: give it another`, { file });
    files.set(id, file);
  }
}

function checkSame(x: ModuleShape, file: string, y: ModuleShape, other: string): void {
  if (x.out === y.out && x.in === y.in && x.layout === y.layout && String(x.kernel) === String(y.kernel)) return;
  throw new AdapterError(
    `"${y.name}" is [${y.out}, ${y.in}] ${y.layout} here, but [${x.out}, ${x.in}] ${x.layout} in ${file}: adapters of ` +
      "different base models cannot share a pack",
    { file: other, field: y.name },
  );
}

/** @throws TypeError when `value` is no adapter */
export function checkAdapter(where: string, value: unknown): void {
  checkArgument(where, value, "an adapter (readAdapters of eigenlora/node, or readPeft)", "saved");
}

/** @throws TypeError when `value` is no list of adapters */
export function checkAdapters(where: string, value: unknown): void {
  checkList(where, value, "adapters (await readAdapters(…))");
  for (const one of value as unknown[]) checkAdapter(where, one);
}

/** What an adapter says of its base model. */
interface Based {
  readonly id: string;
  readonly file: string;
  readonly baseModel: string | undefined;
}

/** Adapters of one base model that a message lists. */
const LISTED = 3;

/**
 * Refuses adapters of different base models, which cannot share a pack. One model goes by several names, as a hub's id and as a folder,
 * so names with the same end count as one. An adapter without a name fits any.
 * @param anyBase accept them all the same
 * @throws AdapterError when adapters name different base models, listing them
 */
export function refuseBases(adapters: readonly Based[], anyBase = false): void {
  const byEnd = new Map<string, Based[]>();
  for (const adapter of adapters) {
    if (adapter.baseModel === undefined) continue;
    const end = lastPart(adapter.baseModel);
    byEnd.set(end, [...(byEnd.get(end) ?? []), adapter]);
  }
  if (anyBase || byEnd.size < 2) return;
  const groups = [...byEnd.values()].sort((a, b) => b.length - a.length);
  const listed = groups.map((group) => {
    const ids = group.slice(0, LISTED).map(({ id }) => id);
    const more = group.length > LISTED ? ` and ${group.length - LISTED} more` : "";
    return `${group[0]!.baseModel} (${ids.join(", ")}${more})`;
  });
  throw new AdapterError(
    `the adapters name different base models: ${listed.join("; ")}. Take those of one model; if these are names of one, pass ` +
      "anyBase: true",
    { file: groups.at(-1)![0]!.file, field: "base_model_name_or_path" },
  );
}

/** The end of a base model's name: of a hub's id, of a path, or of a folder in the hub's cache. */
function lastPart(name: string): string {
  const cached = /models--(?:[^/\\]+?--)?([^/\\]+)[/\\]snapshots[/\\]/.exec(name)?.[1];
  return (cached ?? name.split(/[/\\]/).findLast(Boolean) ?? "").toLowerCase();
}

/** The base model that all adapters name that name one; undefined where there is none, or they name different ones. */
export function commonBase(adapters: readonly { readonly baseModel: string | undefined }[]): string | undefined {
  const named = baseModels(adapters);
  return new Set(named.map(lastPart)).size === 1 ? named[0] : undefined;
}

/** Base models that adapters name, in the order of the adapters. */
export function baseModels(adapters: readonly { readonly baseModel: string | undefined }[]): string[] {
  return [...new Set(adapters.map(({ baseModel }) => baseModel).filter((name) => name !== undefined))];
}
