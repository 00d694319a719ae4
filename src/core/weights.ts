/**
 * The adapted weights of a base model, folded. Each has a pristine value in its binding, and one writer,
 * `FoldedWeights`, which stores the task's replacement or the pristine value, plus ΔW. Weights that the backend holds
 * are folded in place; those of a host in the CPU's memory pass through it.
 */
import { at, type Block, type Slice } from "../backends/backend.ts";
import { BackendError, BaseMismatchError } from "../errors.ts";
import type { PackModule } from "../format/format.ts";
import { atOnce, paced, pacer } from "../pace.ts";
import type { ReadOptions } from "../source.ts";
import { type CpuView, type Located, onDevice, type WeightHost } from "./base.ts";
import { type ActiveTask, isScaled, type KernelSession, type ModulePlan } from "./kernel-session.ts";
import { scalesOf, type WeightResolver } from "./mismatch.ts";
import type { PackView } from "./part.ts";
import { cannotPutBack } from "./selection.ts";

/** An adapted weight of the base. */
export interface WeightBinding {
  readonly module: PackModule;
  readonly weight: Located;
  /** The weight as loaded, with policy "copy". */
  pristine: Block | undefined;
  /** The weight as the active task has it: where the host has it on the device, or where it cannot be written. */
  active: Slice | undefined;
}

/** Parts of a runtime that its weights, terms and parameters share. */
export interface RuntimeContext {
  /** The modules of the pack that are used. */
  readonly view: PackView;
  readonly mode: "folded" | "factors" | "core";
  readonly kernels: KernelSession;
  readonly host: WeightHost | undefined;
  /** Undefined where there is no base. */
  readonly resolver: WeightResolver | undefined;
  readonly bindings: readonly WeightBinding[];
  /** Parameters that are left out of the tasks, by the pack's names. */
  readonly ignored: ReadonlySet<string>;
}

/** Finds the weight in the host's own memory on the backend's device; undefined where it lies elsewhere. */
export function placeOf(host: WeightHost, { weight }: WeightBinding, { backend }: KernelSession): Slice | undefined {
  const view = host.view?.(weight.name);
  return view && onDevice(view.data) ? { block: backend.adopt!(view.data), byteOffset: view.byteOffset } : undefined;
}

/** @throws BaseMismatchError when the host gives fewer bytes than the weight has */
export async function readWeight(
  host: WeightHost,
  { module, weight }: WeightBinding,
  into: Uint8Array | undefined,
  { signal }: ReadOptions,
): Promise<Uint8Array> {
  const view = await host.read(weight.name, into, { signal });
  const bytes = (view.data as Uint8Array).subarray(view.byteOffset, view.byteOffset + weight.byteLength);
  if (bytes.length === weight.byteLength) return bytes;
  const message = `the base gave ${bytes.length} bytes for "${weight.name}", which has ${weight.byteLength}`;
  throw new BaseMismatchError(message, { module: module.name, expected: weight.byteLength, found: bytes.length });
}

/** Parameters of a selection's tasks that replace those of the base. */
export interface Resolved {
  /** Changed parameters, by the base's names. */
  readonly parameters: ReadonlyMap<string, CpuView>;
  /** Bytes of adapted weights, by module, where they are folded. Where they are not, they are among `parameters`. */
  readonly weights: ReadonlyMap<number, Uint8Array>;
  /** Names of embeddings whose rows change: whatever lies in the same memory is tied to them, and changes as well. */
  readonly tables: ReadonlySet<string>;
  /** Names of all of them that the base lacks, and of the others. */
  readonly added: readonly string[];
  readonly replaced: readonly string[];
}

/** A change to a selection, read: nothing is changed yet. */
export interface TaskChange {
  readonly tasks: readonly ActiveTask[];
  readonly plans: readonly ModulePlan[];
  /** Parameters that the tasks override. */
  readonly resolved: Resolved;
  /**
   * All adapted weights that are written, by module, and the bytes that ΔW is added to where these are not the pristine
   * copy.
   */
  readonly weights: ReadonlyMap<number, Uint8Array | undefined>;
}

/** Modules, by index, and other parameters, by the base's names, that may differ from the base. */
interface Changed {
  readonly modules: ReadonlySet<number>;
  readonly names: ReadonlySet<string>;
}

/**
 * The adapted weights: those of one task, or inconsistent while a change is made and after one that could not be
 * undone.
 */
export class FoldedWeights {
  readonly #context: RuntimeContext;
  readonly #pristine: (name: string) => CpuView | undefined;
  #changed: Changed = { modules: new Set(), names: new Set() };
  /** Thrown at readers while the weights are not those of one task. */
  #inconsistent: Error | undefined;

  /** @param pristine gives the base's value of another parameter; undefined where it has none */
  constructor(context: RuntimeContext, pristine: (name: string) => CpuView | undefined) {
    this.#context = context;
    this.#pristine = pristine;
  }

  /** @throws BackendError while the weights are not those of one task */
  check(): void {
    if (this.#inconsistent) throw this.#inconsistent;
  }

  /** Modules that the active task changes. @throws BackendError as `check` */
  get modules(): ReadonlySet<number> {
    this.check();
    return this.#changed.modules;
  }

  /** Reads the weights that a change needs, before anything is changed. */
  async read(
    plans: readonly ModulePlan[],
    { weights: replaced }: Resolved,
    signal: AbortSignal | undefined,
  ): Promise<TaskChange["weights"]> {
    const { bindings, host } = this.#context;
    const weights = new Map<number, Uint8Array | undefined>();
    for (const index of new Set([...this.#changed.modules, ...modulesOf(plans, replaced)])) {
      const binding = bindings[index]!;
      const known = replaced.has(index) || binding.pristine;
      weights.set(index, known ? replaced.get(index) : await readWeight(host!, binding, undefined, { signal }));
    }
    return weights;
  }

  /**
   * Makes a change. Where it fails, or is aborted in a pause of long work, the task from before stays or is put back.
   * @param former gives the change that made it
   * @returns marks what was written as the new task's: call it together with what else the task changes
   * @throws BackendError when the former task cannot be put back
   */
  async write(
    change: TaskChange,
    former: () => Promise<TaskChange>,
    signal: AbortSignal | undefined,
  ): Promise<() => void> {
    const changed = this.#changed;
    const inconsistent = this.#inconsistent;
    const { host, kernels } = this.#context;
    try {
      return await this.#apply(change, signal);
    } catch (error) {
      // Nothing was written yet, or a rollback has failed; or there was nothing consistent to go back to.
      if (inconsistent || !this.#inconsistent || error === this.#inconsistent) throw error;
      try {
        // A transaction puts back what it was given; what was written in place is written again.
        if (host!.view || !host!.begin) (await this.#apply(await former()))();
      } catch (second) {
        throw (this.#inconsistent = cannotPutBack(error, second, kernels.backend.name));
      }
      this.#changed = changed;
      this.#inconsistent = undefined;
      throw error;
    }
  }

  async #apply({ plans, resolved, weights }: TaskChange, signal?: AbortSignal): Promise<() => void> {
    const { bindings, kernels } = this.#context;
    const host = this.#context.host!;
    const { backend } = kernels;
    const { parameters, tables } = resolved;
    const modules = modulesOf(plans, resolved.weights);
    // All that can fail before something is changed: memory, the upload of coefficients, the host's consent.
    kernels.prepare(plans);
    const planOf = new Map(plans.map((plan) => [plan.module, plan]));
    const jobs = Array.from(weights, ([index, fresh]): WeightJob => {
      return { binding: bindings[index]!, plan: planOf.get(index), fresh, changes: modules.has(index) };
    });
    const held = jobs.filter(({ binding }) => binding.active);
    const passing = jobs.filter(({ binding }) => !binding.active);
    const passage = kernels.reserve("weight", Math.max(0, ...passing.map(({ binding }) => binding.weight.byteLength)));
    const names = new Set([...this.#changed.names, ...parameters.keys()]);
    // A parameter that returns to the base's value returns for all parameters in the same memory.
    const alone = [...namesOf(jobs.filter(({ changes }) => changes)), ...parameters.keys()];
    const transaction = host.begin?.(
      [...namesOf(jobs), ...names],
      [...namesOf(jobs.filter(({ plan }) => plan)), ...alone.filter((name) => !tables.has(name))],
    );
    this.#changed = { modules: new Set(weights.keys()), names };
    this.#inconsistent ??= new BackendError("the weights are between two tasks: wait for a switch that succeeds", {
      backend: backend.name,
    });
    const pause = pacer(signal);
    try {
      if (held.length > 0) await host.flush?.(namesOf(held));
      for (const job of held) {
        if (host.flush) follow(host, job.binding, kernels);
        const turn = paced(fold(job, passage, kernels), pause);
        if (turn) await turn;
      }
      // A device gives all weights first, since a host takes them without a pause once the device is waited for.
      const fetched = new Map<WeightJob, Uint8Array>();
      for (const job of backend.read ? passing : []) {
        atOnce(fold(job, passage, kernels));
        fetched.set(job, await backend.read!(passage, job.binding.weight.byteLength));
      }
      if (backend.read) await backend.finish();
      for (const job of passing) {
        const { name, dtype, shape, byteLength } = job.binding.weight;
        // Await only what pauses: short work in the caller's own memory is done in one go.
        const turn = backend.view && paced(fold(job, passage, kernels), pause);
        if (turn) await turn;
        const data = fetched.get(job) ?? backend.view!(passage, byteLength);
        const written = transaction!.write(name, { dtype, shape, data, byteOffset: 0 });
        if (written) await written;
      }
      for (const name of transaction ? names : [])
        await transaction!.write(name, parameters.get(name) ?? this.#pristine(name) ?? null);
      await backend.finish();
      await scalesOf(plans.filter(isScaled), kernels);
      await transaction?.commit();
    } catch (error) {
      try {
        await transaction?.rollback();
      } catch (second) {
        throw (this.#inconsistent = cannotPutBack(error, second, backend.name));
      }
      throw error;
    }
    return () => {
      this.#changed = { modules, names: new Set(parameters.keys()) };
      this.#inconsistent = undefined;
    };
  }
}

/** Modules whose weights differ from the base then. */
function modulesOf(plans: readonly ModulePlan[], replaced: Resolved["weights"]): Set<number> {
  return new Set([...plans.map(({ module }) => module), ...replaced.keys()]);
}

/** A weight that a change writes. */
interface WeightJob {
  readonly binding: WeightBinding;
  readonly plan: ModulePlan | undefined;
  /** The bytes that ΔW is added to, where that is not the pristine copy. */
  readonly fresh: Uint8Array | undefined;
  /** True if it differs from the base then. */
  readonly changes: boolean;
}

function namesOf(jobs: readonly WeightJob[]): string[] {
  return jobs.map(({ binding }) => binding.weight.name);
}

/** Folds a weight where it is held, or into the passage. Yields between pieces of work. */
function* fold({ binding, plan, fresh }: WeightJob, passage: Slice, kernels: KernelSession): Generator<void> {
  const { weight, pristine, active: to = passage } = binding;
  if (fresh) kernels.backend.upload(to, fresh);
  const base = fresh ? to : at(pristine!);
  if (plan) yield* kernels.fold(plan, weight, base, to);
  else if (!fresh) kernels.copy(base, to, weight.byteLength);
  // A pause may follow.
  yield;
}

/** Finds a weight on the device again, where the host may have moved it. */
function follow(host: WeightHost, binding: WeightBinding, kernels: KernelSession): void {
  const former = binding.active!.block;
  const place = placeOf(host, binding, kernels);
  if (!place) throw new TypeError(`the host's "${binding.weight.name}" lies on no device any more`);
  binding.active = place;
  if (place.block !== former) kernels.backend.free(former);
}
