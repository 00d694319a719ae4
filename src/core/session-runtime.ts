/**
 * The runtime as sessions use it. `load` reads a selection once and puts its tasks together; every delivery to a model
 * starts from that: `parameters` and `terms` give values for inputs of a graph, `fold` writes weights.
 */

import { paced, pacer } from "../pace.ts";
import { Changes } from "../queue.ts";
import type { Term } from "../tensor/term.ts";
import type { View } from "./base.ts";
import {
  type ActiveTask,
  createBackend,
  hasCore,
  KernelSession,
  type ModulePlan,
  planTasks,
  writeCore,
} from "./kernel-session.ts";
import { addDifferences, blendHeads, changesOf, decode, type Merged, type ParameterChange } from "./merge.ts";
import type { Pack } from "./pack.ts";
import type { PackView } from "./part.ts";
import type { Runtime, RuntimeOptions } from "./runtime.ts";
import { type LoadedTasks, loadParts, memoryReport, type Selection, type SwitchOptions } from "./selection.ts";
import type { PristineWeight } from "./terms.ts";

/** Memory for a core [K_A, K_B]: the index of its first number, and the distance of its rows. */
export interface CoreTarget {
  readonly out: Float32Array;
  readonly at: number;
  readonly stride: number;
}

/** Options of `terms`. */
export interface TermOptions {
  /** Targets of cores by module name. */
  readonly cores: ReadonlyMap<string, CoreTarget>;
  /** Sides of modules whose factors are wanted as coefficients over all their components, by module name. Default: none. */
  readonly over?: ReadonlyMap<string, ReadonlySet<"A" | "B">> | undefined;
  /** Arrays of factors that nothing reads any more, by module name: used again where they fit. */
  readonly old?: ReadonlyMap<string, Pick<Term, "A" | "Bt">> | undefined;
  readonly signal?: AbortSignal | undefined;
}

/** The terms of a selection. */
export interface UnfoldedTerms {
  /** Names of the modules whose cores were written. */
  readonly cores: ReadonlySet<string>;
  /** Factors apart from cores, by module name. A is [in, rank], as models take it. */
  readonly factors: ReadonlyMap<string, Term>;
}

interface Parts {
  /** Parameters that are left out of the tasks, by the pack's names. */
  readonly ignored: ReadonlySet<string>;
  /** Modes "core" and "factors". */
  readonly unfolding?: Unfolding;
  /** Mode "folded": the runtime that writes weights, and names of the parameters that come as inputs instead. */
  readonly folding?: { readonly runtime: Runtime; readonly inputs: ReadonlySet<string> };
}

interface Unfolding {
  readonly mode: "core" | "factors";
  readonly kernels: KernelSession;
  /** Pristine weights of modules with DoRA, f32 [out, in], by module name. */
  readonly weights: ReadonlyMap<string, Float32Array>;
}

/** The runtime of one session. Made by `createUnfolding` or `createFolding`; without either it gives parameters only. */
export class SessionRuntime {
  readonly #view: PackView;
  readonly #parts: Parts;
  /** The kernel session serves one selection at a time, and long work has pauses. */
  readonly #queue = new Changes();

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
  async terms({ tasks }: LoadedTasks, options: TermOptions): Promise<UnfoldedTerms> {
    const { unfolding } = this.#parts;
    if (!unfolding) return { cores: new Set(), factors: new Map() };
    return this.#queue.change(() => makeTerms(tasks, unfolding, options));
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
    const { backend, buffer } = unfolding?.kernels ?? {};
    const scratch = backend ? memoryReport(backend.memory()).total + buffer!.values.byteLength : 0;
    return { scratch, pristine: 0 };
  }

  async close(): Promise<void> {
    this.#parts.unfolding?.kernels.backend.close();
    await this.#parts.folding?.runtime.close();
  }
}

function withParameters(tasks: readonly ActiveTask[], keep: (name: string) => boolean): ActiveTask[] {
  return tasks.map(({ blob, ...task }) => {
    return { ...task, blob: { ...blob, parameters: blob.parameters.filter(({ name }) => keep(name)) } };
  });
}

/**
 * What tasks bring, by the pack's names, without the base: saved modules as they are. Of the others the caller has the base's
 * values.
 * @throws TaskError when saved modules cannot be blended
 */
function mergeAll(
  parts: readonly ActiveTask[],
  pack: PackView,
  base: (name: string) => Merged | undefined,
): Map<string, Merged> {
  const merged = new Map<string, Merged>();
  for (const [name, changes] of changesOf(parts, ({ parameter }) => parameter.name)) {
    const [{ parameter }] = changes as [ParameterChange];
    if (parameter.role === "saved")
      merged.set(name, { shape: parameter.shape, values: blendHeads(name, decode(changes[0]!), changes, pack) });
    else {
      const original = base(name);
      if (original) merged.set(name, addDifferences(name, changes, original));
    }
  }
  return merged;
}

async function makeTerms(
  tasks: readonly ActiveTask[],
  { mode, kernels, weights }: Unfolding,
  { cores, over, old, signal }: TermOptions,
): Promise<UnfoldedTerms> {
  const { modules, buffer } = kernels;
  const nameOf = (module: number): string => modules[module]!.name;
  const written = new Set<string>();
  const others: ModulePlan[] = [];
  const pause = pacer(signal);
  buffer.used = 0;
  for (const plan of planTasks(tasks, modules, buffer, true)) {
    const core = hasCore(plan, mode);
    const target = core && cores.get(nameOf(plan.module));
    if (target) {
      const turn = paced(writeCore(plan, buffer.values, target.out, target.at, target.stride), pause);
      if (turn) await turn;
      written.add(nameOf(plan.module));
    }
    if (!core || plan.A.residual.length > 0 || plan.magnitude !== undefined) others.push(plan);
  }
  if (others.length === 0) return { cores: written, factors: new Map() };
  const weightOf = (module: number): PristineWeight => {
    const { name, in: inputs, out } = modules[module]!;
    const { buffer, byteOffset, byteLength } = weights.get(name)!;
    const data = new Uint8Array(buffer as ArrayBuffer, byteOffset, byteLength);
    return { dtype: "f32", shape: [out, inputs], data, byteOffset: 0 };
  };
  const { unfold } = await import("./terms.ts");
  const terms = await unfold(others, kernels, mode, weightOf, {
    old: (module) => old?.get(nameOf(module)),
    over: (module) => over?.get(nameOf(module)),
    turned: true,
    signal,
  });
  return { cores: written, factors: new Map([...terms].map(([module, term]) => [nameOf(module), term])) };
}

/**
 * Makes the runtime of modes "core" and "factors".
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
    const kernels = new KernelSession(backend, view.modules, bases ?? new Uint8Array(0));
    return new SessionRuntime(view, { ignored, unfolding: { mode, kernels, weights } });
  } catch (error) {
    backend.close();
    throw error;
  }
}

/**
 * Makes the runtime of mode "folded".
 * @param ignored parameters that are left out of the tasks, by the pack's names
 * @param inputs parameters that come as inputs of the model instead
 * @param options base, names, modules and device
 * @throws as `createRuntime`
 */
export async function createFolding(
  pack: Pack,
  view: PackView,
  ignored: ReadonlySet<string>,
  inputs: ReadonlySet<string>,
  options: RuntimeOptions,
): Promise<SessionRuntime> {
  const { createRuntime } = await import("./runtime.ts");
  const runtime = await createRuntime(pack, { ...options, anyBase: true, ignore: [...ignored, ...inputs] });
  return new SessionRuntime(view, { ignored, folding: { runtime, inputs } });
}
