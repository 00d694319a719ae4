/**
 * What sessions ask of the runtime. `load` reads a selection once and puts its tasks together; all that carries them to a model starts
 * from that: `parameters` and `terms` give values for inputs of a graph, `fold` writes weights.
 */

import type { DeviceHandle } from "../backends/backend.ts";
import { createBackend } from "../backends/select.ts";
import type { BaseInput, View } from "./base.ts";
import type { Pack } from "./pack.ts";
import type { ModuleFilter, PackView } from "./part.ts";
import { hasCore, writeCore } from "./stage.ts";
import type { PristineWeight } from "./terms.ts";

export { type MemoryReport, memoryReport, type SwitchReport } from "./selection.ts";

import { pacer } from "../pace.ts";
import { Queue } from "../queue.ts";
import type { Term } from "../tensor/term.ts";
import { type Merged, mergeAll } from "./merge.ts";
import type { Runtime } from "./runtime.ts";
import { loadParts, type Selection, type SwitchOptions } from "./selection.ts";
import { type ActiveTask, type ModulePlan, stage } from "./stage.ts";
import { Workbench } from "./workbench.ts";

export type { Merged } from "./merge.ts";
export { copySelection, type Selection, type SwitchOptions } from "./selection.ts";
export type { ActiveTask } from "./stage.ts";

/** A selection as it was when it was read. */
export interface LoadedTasks {
  readonly selection: Selection;
  readonly head: string | undefined;
  /** With strengths; none for the base. */
  readonly tasks: readonly ActiveTask[];
}

/** Where a core [K_A, K_B] goes: its first number, and the distance of its rows. */
export interface CoreTarget {
  readonly out: Float32Array;
  readonly at: number;
  readonly stride: number;
}

/** How terms are wanted. */
export interface TermOptions {
  /** By module name. */
  readonly cores: ReadonlyMap<string, CoreTarget>;
  /** Arrays of factors that nothing reads any more, by module name: used again where they fit. */
  readonly old?: ReadonlyMap<string, Pick<Term, "A" | "Bt">> | undefined;
  readonly signal?: AbortSignal | undefined;
}

/** The terms of a selection. */
export interface UnfoldedTerms {
  /** Names of the modules whose cores were written. */
  readonly cores: ReadonlySet<string>;
  /** What there is beside cores, by module name. A is [in, rank], as models take it. */
  readonly factors: ReadonlyMap<string, Term>;
}

interface Parts {
  /** Parameters that are left out of the tasks, by the pack's names. */
  readonly ignored: ReadonlySet<string>;
  /** Modes "core" and "factors": the workbench, and pristine weights f32 [out, in] of modules with DoRA by name. */
  readonly unfolding?: {
    readonly mode: "core" | "factors";
    readonly bench: Workbench;
    readonly weights: ReadonlyMap<string, Float32Array>;
  };
  /** Mode "folded": what writes weights, and names of the parameters that come as inputs instead. */
  readonly folding?: { readonly runtime: Runtime; readonly inputs: ReadonlySet<string> };
}

/** The runtime of one session. Made by `createUnfolding` or `createFolding`; without either it gives parameters only. */
export class SessionRuntime {
  readonly #view: PackView;
  readonly #parts: Parts;
  /** The workbench serves one selection at a time, and long work has pauses. */
  readonly #queue = new Queue();

  constructor(view: PackView, parts: Parts) {
    this.#view = view;
    this.#parts = parts;
  }

  /**
   * Reads the tasks of a selection and settles what they may do together.
   * @throws TaskError for an unknown id, a blend that cannot be; SourceError, FormatError when a task cannot be read
   */
  async load(selection: Selection, options: SwitchOptions = {}): Promise<LoadedTasks> {
    const tasks = await loadParts(this.#view, selection, options, this.#parts.ignored);
    return { selection, head: options.head, tasks };
  }

  /**
   * Parameters that the tasks bring and that come as inputs, by the pack's names.
   * @param base the base's value; undefined for a parameter that is not wanted
   * @throws TaskError for heads that cannot be blended, BaseMismatchError for values that do not fit the base's
   */
  parameters({ tasks }: LoadedTasks, base: (name: string) => Merged | undefined): ReadonlyMap<string, Merged> {
    const inputs = this.#parts.folding?.inputs;
    return mergeAll(inputs ? withParameters(tasks, (name) => inputs.has(name)) : tasks, this.#view, base);
  }

  /**
   * Writes cores to where they are wanted and makes the other factors. Mode "folded" has no terms.
   * @throws the reason of `signal`, once it is aborted
   */
  terms({ tasks }: LoadedTasks, options: TermOptions): Promise<UnfoldedTerms> {
    return this.#queue.change(() => this.#terms(tasks, options));
  }

  async #terms(tasks: readonly ActiveTask[], { cores, old, signal }: TermOptions): Promise<UnfoldedTerms> {
    const written = new Set<string>();
    const factors = new Map<string, Term>();
    const { unfolding } = this.#parts;
    if (!unfolding) return { cores: written, factors };
    const { mode, bench, weights } = unfolding;
    const { modules, staging } = bench;
    const pause = pacer(signal);
    const others: ModulePlan[] = [];
    for (const plan of stage(tasks, modules, staging)) {
      const { name } = modules[plan.module]!;
      const core = hasCore(plan, mode);
      const target = cores.get(name);
      if (core && target) {
        writeCore(plan, staging.values, target.out, target.at, target.stride);
        written.add(name);
        const turn = pause();
        if (turn) await turn;
      }
      if (!core || plan.A.private.length > 0 || plan.magnitude !== undefined) others.push(plan);
    }
    if (others.length === 0) return { cores: written, factors };
    const weightOf = (index: number): PristineWeight => {
      const { name, in: inputs, out } = modules[index]!;
      const { buffer, byteOffset, byteLength } = weights.get(name)!;
      const data = new Uint8Array(buffer as ArrayBuffer, byteOffset, byteLength);
      return { dtype: "f32", shape: [out, inputs], data, byteOffset: 0 };
    };
    const { unfold } = await import("./terms.ts");
    const spare = new Map(others.flatMap(({ module }) => pair(module, old?.get(modules[module]!.name))));
    for (const [index, term] of await unfold(others, bench, mode, weightOf, { old: spare, turned: true, signal }))
      factors.set(modules[index]!.name, term);
    return { cores: written, factors };
  }

  /**
   * Makes the weights those of the tasks. When it fails, they are put back.
   * @returns all parameters that differ from the base, by the base's names; valid until the next fold
   * @throws as `Runtime.switchTask`
   */
  async fold({ selection, head, tasks }: LoadedTasks, signal?: AbortSignal): Promise<ReadonlyMap<string, View>> {
    const { runtime, inputs } = this.#parts.folding!;
    await runtime.activate(
      selection,
      { head, signal },
      withParameters(tasks, (name) => !inputs.has(name)),
    );
    return runtime.changes();
  }

  /** @throws BackendError while the weights are no task's */
  check(): void {
    this.#parts.folding?.runtime.check();
  }

  /** Resident bytes: of what expands or folds, and of pristine weights. */
  memory(): { readonly scratch: number; readonly pristine: number } {
    const { unfolding, folding } = this.#parts;
    if (folding) {
      const { total, coefficients, pristine } = folding.runtime.memory();
      return { scratch: total - coefficients - pristine, pristine };
    }
    if (!unfolding) return { scratch: 0, pristine: 0 };
    const { backend, staging } = unfolding.bench;
    const held = Object.values(backend.memory()).reduce((a, b) => a + b, 0);
    return { scratch: held + staging.values.byteLength, pristine: 0 };
  }

  async close(): Promise<void> {
    this.#parts.unfolding?.bench.backend.close();
    await this.#parts.folding?.runtime.close();
  }
}

function pair<T>(key: number, value: T | undefined): [number, T][] {
  return value ? [[key, value]] : [];
}

function withParameters(tasks: readonly ActiveTask[], keep: (name: string) => boolean): ActiveTask[] {
  return tasks.map(({ blob, ...task }) => {
    return { ...task, blob: { ...blob, parameters: blob.parameters.filter(({ name }) => keep(name)) } };
  });
}

/**
 * For modes "core" and "factors".
 * @param bases of the pack; undefined where cores are all that is made: these consist of coefficients alone
 * @param weights pristine weights of modules with DoRA, f32 [out, in], by module name
 */
export async function createUnfolding(
  view: PackView,
  mode: "core" | "factors",
  bases: Uint8Array | undefined,
  { ignored, weights }: { readonly ignored: ReadonlySet<string>; readonly weights: ReadonlyMap<string, Float32Array> },
): Promise<SessionRuntime> {
  const { backend } = await createBackend(bases ? { webgpu: false } : { backend: "js" });
  try {
    const bench = new Workbench(backend, view.modules, bases ?? new Uint8Array(0));
    return new SessionRuntime(view, { ignored, unfolding: { mode, bench, weights } });
  } catch (error) {
    backend.close();
    throw error;
  }
}

/** What is folded into which weights. */
export interface FoldingOptions {
  readonly base: BaseInput;
  /** Where the weights lie, for those on a device. */
  readonly device?: DeviceHandle | undefined;
  /** Names of weights in the base, by module name of the pack. */
  readonly names: ReadonlyMap<string, string>;
  readonly modules: ModuleFilter | undefined;
  readonly ignored: ReadonlySet<string>;
  /** Parameters that come as inputs instead, by the pack's names. */
  readonly inputs: ReadonlySet<string>;
}

/**
 * For mode "folded".
 * @throws as `createRuntime`
 */
export async function createFolding(
  pack: Pack,
  view: PackView,
  { base, device, names, modules, ignored, inputs }: FoldingOptions,
): Promise<SessionRuntime> {
  const { createRuntime } = await import("./create.ts");
  const runtime = await createRuntime(pack, {
    ...{ base, names, anyBase: true, ignore: [...ignored, ...inputs] },
    ...(modules && { modules }),
    // Without a device the weights come from a file in memory: no second copy of them.
    ...(device
      ? { backend: "webgpu" as const, webgpu: { device } }
      : { webgpu: false as const, policy: "reload" as const }),
  });
  return new SessionRuntime(view, { ignored, folding: { runtime, inputs } });
}
