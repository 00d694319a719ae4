/**
 * A pack as one file of a model sees it: only the modules that live there, and of each task only what concerns them.
 */
import { described } from "../arguments.ts";
import { isOfModule, moduleOf, type PackModule, parseBrought, type TaskBlob } from "../format/format.ts";
import type { ReadOptions } from "../source.ts";
import type { Pack, TaskInfo } from "./pack.ts";

/** Interface of a pack for runtimes and sessions. */
export type PackView = Pick<Pack, "name" | "modules" | "tasks" | "load" | "bases" | "reads" | "residentBytes">;

/** True if a module of a pack, or of its tasks' parameters, is wanted: "encoder.layer.0.attention.query", "classifier". */
export type ModuleFilter = (module: string) => boolean;

class PackPart implements PackView {
  readonly name: string;
  readonly modules: readonly PackModule[];
  readonly reads: Pack["reads"];
  readonly #pack: Pack;
  readonly #keep: ModuleFilter;
  /** Where a module of the pack is in the part, by its index. */
  readonly #places = new Map<number, number>();
  /** Blobs are shared by all who load a task: one part of each will do. */
  readonly #parts = new WeakMap<TaskBlob, TaskBlob>();

  #of: ReadonlyMap<string, TaskInfo> | undefined;
  #tasks: ReadonlyMap<string, TaskInfo> = new Map();

  constructor(pack: Pack, keep: ModuleFilter) {
    this.name = pack.name;
    this.reads = pack.reads;
    this.#pack = pack;
    this.#keep = keep;
    this.modules = pack.modules.filter(({ name }, index) => {
      if (!keep(name)) return false;
      this.#places.set(index, this.#places.size);
      return true;
    });
  }

  get tasks(): ReadonlyMap<string, TaskInfo> {
    const { tasks } = this.#pack;
    if (tasks !== this.#of) {
      this.#of = tasks;
      this.#tasks = new Map([...tasks].map(([id, info]) => [id, this.#info(info)]));
    }
    return this.#tasks;
  }

  #info(info: TaskInfo): TaskInfo {
    const brings = info.brings?.filter((entry) => {
      const { role, name } = parseBrought(entry);
      return this.#keep(isOfModule(role) ? name : moduleOf(name));
    });
    return {
      ...info,
      brings,
      get resident() {
        return info.resident;
      },
    };
  }

  get residentBytes(): Pack["residentBytes"] {
    return this.#pack.residentBytes;
  }

  bases(options?: ReadOptions): ReturnType<Pack["bases"]> {
    return this.#pack.bases(options);
  }

  async load(id: string, options?: ReadOptions): Promise<TaskBlob> {
    const blob = await this.#pack.load(id, options);
    const known = this.#parts.get(blob);
    if (known) return known;
    const terms = blob.terms.flatMap((term) => {
      const module = this.#places.get(term.module);
      return module === undefined ? [] : [{ ...term, module }];
    });
    const parameters = blob.parameters.filter(({ name }) => this.#keep(moduleOf(name)));
    const part = { ...blob, terms, parameters };
    this.#parts.set(blob, part);
    return part;
  }
}

/**
 * The part of a pack that has these modules, and what its tasks bring of modules for which `keep` is true.
 * @throws TypeError when `keep` is no function, RangeError when it keeps no module
 */
export function partOf(pack: Pack, keep: ModuleFilter): PackView {
  if (typeof keep !== "function") throw new TypeError(`modules: expected a function of names, got ${described(keep)}`);
  const part = new PackPart(pack, keep);
  const [first] = pack.modules;
  if (part.modules.length > 0 || !first) return part;
  throw new RangeError(
    `modules: keeps none of the ${pack.modules.length} modules of ${pack.name}, such as "${first.name}"`,
  );
}
