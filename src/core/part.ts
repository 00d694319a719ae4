/**
 * A pack as one file of a model sees it: only the modules that live there, and of each task only what concerns them.
 */
import { described } from "../errors.ts";
import { isOfModule, moduleOf, parseBrought, type TaskBlob } from "../format/format.ts";
import type { Pack, TaskInfo } from "./pack.ts";

/** Interface of a pack for runtimes and sessions. */
export type PackView = Pick<Pack, "name" | "modules" | "tasks" | "load" | "bases" | "reads" | "residentBytes">;

/**
 * True if a module of a pack, or of its tasks' parameters, is wanted: "encoder.layer.0.attention.query", "classifier".
 */
export type ModuleFilter = (module: string) => boolean;

/**
 * The part of a pack that has these modules, and what its tasks bring of modules for which `keep` is true.
 * @throws TypeError when `keep` is no function, RangeError when it keeps no module
 */
export function partOf(pack: Pack, keep: ModuleFilter): PackView {
  if (typeof keep !== "function") throw new TypeError(`modules: expected a function of names, got ${described(keep)}`);
  /** Where a module of the pack is in the part, by its index. */
  const places = new Map<number, number>();
  const modules = pack.modules.filter(({ name }, index) => keep(name) && places.set(index, places.size));
  const [first] = pack.modules;
  if (modules.length === 0 && first) {
    throw new RangeError(
      `modules: keeps none of the ${pack.modules.length} modules of ${pack.name}, such as "${first.name}"`,
    );
  }
  const infoOf = (info: TaskInfo): TaskInfo => ({
    ...info,
    brings: info.brings?.filter((entry) => {
      const { role, name } = parseBrought(entry);
      return keep(isOfModule(role) ? name : moduleOf(name));
    }),
    get resident() {
      return info.resident;
    },
  });
  let whole: Pack["tasks"] | undefined;
  let tasks: Pack["tasks"] = new Map();
  /** Blobs are shared by all who load a task: one part of each will do. */
  const parts = new WeakMap<TaskBlob, TaskBlob>();
  return {
    name: pack.name,
    modules,
    reads: pack.reads,
    get tasks() {
      if (pack.tasks !== whole) tasks = new Map(Array.from((whole = pack.tasks), ([id, info]) => [id, infoOf(info)]));
      return tasks;
    },
    get residentBytes() {
      return pack.residentBytes;
    },
    bases: (options) => pack.bases(options),
    async load(id, options) {
      const blob = await pack.load(id, options);
      const known = parts.get(blob);
      if (known) return known;
      const terms = blob.terms.flatMap((term) => {
        const module = places.get(term.module);
        return module === undefined ? [] : [{ ...term, module }];
      });
      const part = { ...blob, terms, parameters: blob.parameters.filter(({ name }) => keep(moduleOf(name))) };
      parts.set(blob, part);
      return part;
    },
  };
}
