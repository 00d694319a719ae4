/**
 * The adapted weights of a base model: found, held against the pack's fingerprints, and folded. Every one has a pristine value, its slot's,
 * and one writer, `FoldedWeights`: it becomes what the task puts in its place, or the pristine value, plus ΔW. Weights that the backend holds
 * are folded in place; those of a host in the CPU's memory pass through it.
 */
import { at, type Block, type Slice } from "../backends/backend.ts";
import { BackendError, BaseMismatchError } from "../errors.ts";
import type { PackModule } from "../format/format.ts";
import { atOnce, type Pause, paced, pacer } from "../pace.ts";
import type { ReadOptions } from "../source.ts";
import {
  type CpuView,
  type Located,
  type Locator,
  onDevice,
  type Transaction,
  type View,
  type WeightHost,
} from "./base.ts";
import { cannotPutBack } from "./selection.ts";
import type { ModulePlan } from "./stage.ts";
import type { Workbench } from "./workbench.ts";

/** An adapted weight of the base. */
export interface Slot {
  readonly module: PackModule;
  readonly weight: Located;
  /** The weight as loaded, with policy "copy". */
  pristine: Block | undefined;
  /** The weight as the active task has it: where the host has it on the device, or where it cannot be written. */
  active: Slice | undefined;
}

/** @throws BaseMismatchError when a module is missing, ambiguous or of another shape, or two match one weight */
export async function findSlots(modules: readonly PackModule[], locator: Locator): Promise<Slot[]> {
  let weights = modules.flatMap((module) => locator.weight(module) ?? []);
  const names = new Set(weights.map(({ name }) => name));
  if (names.size < modules.length) weights = (await import("./mismatch.ts")).locateModules(locator, modules);
  return modules.map((module, i) => ({ module, weight: weights[i]!, pristine: undefined, active: undefined }));
}

/**
 * Reads the adapted weights, checks that they are the right model's and makes the copies that stay.
 * @param keep which copies: none when nothing is folded; `active` where the host has the weight in the CPU's memory
 * @throws BaseMismatchError when a fingerprint differs
 */
export async function loadSlots(
  slots: readonly Slot[],
  host: WeightHost,
  bench: Workbench,
  bases: Uint8Array,
  keep: { pristine: boolean; active: boolean },
  options: ReadOptions & { anyBase?: boolean | undefined },
): Promise<void> {
  for (const slot of slots) {
    const { byteLength } = slot.weight;
    const check = !options.anyBase && slot.module.fingerprint !== undefined;
    if (!check && !keep.pristine && !keep.active) continue;
    const { backend } = bench;
    // Allocated first: memory that grows would detach the view that is read into.
    if (keep.pristine) slot.pristine = bench.allocate(byteLength, "pristine");
    const placed = placeOf(host, slot, bench);
    slot.active = placed ?? (keep.active ? at(bench.allocate(byteLength, "active")) : undefined);
    let bytes: Uint8Array | undefined;
    if (placed) {
      if (slot.pristine) backend.copy(placed, at(slot.pristine), byteLength);
      if (check) bytes = await backend.read!(placed, byteLength);
    } else {
      const into = slot.pristine && backend.view?.(at(slot.pristine), byteLength);
      bytes = await readWeight(host, slot, into, options);
      // A host need not read into what it is offered.
      if (slot.pristine && bytes.buffer !== into?.buffer) backend.upload(at(slot.pristine), bytes);
      if (slot.active) backend.upload(slot.active, bytes);
    }
    if (!check) continue;
    // Packs that were made without a base have no fingerprints.
    const { checkFingerprint, SAME_FLOAT, weightAt } = await import("./mismatch.ts");
    const { name, dtype, transposed } = slot.weight;
    const values = weightAt(bytes!, dtype, slot.module.out, slot.module.in, transposed);
    checkFingerprint(slot.module, name, values, bases, SAME_FLOAT);
  }
}

/** Finds the weight in the host's own memory on the backend's device; undefined where it lies elsewhere. */
export function placeOf(host: WeightHost, { weight }: Slot, { backend }: Workbench): Slice | undefined {
  const view = host.view?.(weight.name);
  return view && onDevice(view.data) ? { block: backend.adopt!(view.data), byteOffset: view.byteOffset } : undefined;
}

/**
 * Lets a host make its weights ready to be folded in place, which may move them.
 * @param slots whose weights lie on the device
 */
async function settleWeights(host: WeightHost, slots: readonly Slot[], bench: Workbench): Promise<void> {
  await host.settle!(slots.map(({ weight }) => weight.name));
  for (const slot of slots) {
    const [before, place] = [slot.active!.block, placeOf(host, slot, bench)];
    if (!place) throw new TypeError(`the host's "${slot.weight.name}" lies on no device any more`);
    slot.active = place;
    if (place.block !== before) bench.backend.free(before);
  }
}

/** @throws BaseMismatchError when the host gives fewer bytes than the weight has */
export async function readWeight(
  host: WeightHost,
  { module, weight }: Slot,
  into: Uint8Array | undefined,
  { signal }: ReadOptions,
): Promise<Uint8Array> {
  const view = await host.read(weight.name, into, { signal });
  const bytes = (view.data as Uint8Array).subarray(view.byteOffset, view.byteOffset + weight.byteLength);
  if (bytes.length === weight.byteLength) return bytes;
  throw new BaseMismatchError(
    `the base gave ${bytes.length} bytes for "${weight.name}", which has ${weight.byteLength}`,
    {
      module: module.name,
      expected: weight.byteLength,
      found: bytes.length,
    },
  );
}

/** A change from one selection to the next. */
export interface WeightChange {
  readonly plans: readonly ModulePlan[];
  /** Modules, by index, that differ from the base then. */
  readonly modules: ReadonlySet<number>;
  /** All adapted weights that are written, and what ΔW is added to where that is not the pristine copy in memory. */
  readonly weights: ReadonlyMap<number, Uint8Array | undefined>;
  /** Other parameters, by the base's names. */
  readonly parameters: ReadonlyMap<string, { readonly view: View }>;
  /** Names of those that change together with whatever lies in the same memory. */
  readonly tables: ReadonlySet<string>;
}

/** The backend and host that a change is made in. */
export interface FoldContext {
  readonly bench: Workbench;
  readonly host: WeightHost;
  /** The base's value of another parameter; undefined where it has none. */
  pristine(name: string): CpuView | undefined;
}

/** A change whose memory is there, and that the host agrees to. */
interface Fold {
  /** Modules, by index, whose weights the backend holds, and whose pass through it. */
  readonly held: readonly number[];
  readonly passing: readonly number[];
  /** Other parameters that are written. */
  readonly names: ReadonlySet<string>;
  readonly transaction: Transaction | undefined;
  /** Folds a weight. Yields between pieces of work. */
  weight(index: number): Generator<void>;
  /** The place of a weight that is folded; valid until the next one for those of `passing`. */
  place(index: number): Slice;
}

/** Modules and other parameters that may differ from the base. */
interface Touched {
  readonly modules: ReadonlySet<number>;
  readonly names: ReadonlySet<string>;
}

const NOTHING: Touched = { modules: new Set(), names: new Set() };

/** The weights, and whether they are one task's. */
export class FoldedWeights {
  readonly #slots: readonly Slot[];
  #touched = NOTHING;
  /** Why they are no task's; undefined where they are. */
  #torn: Error | undefined;

  constructor(slots: readonly Slot[]) {
    this.#slots = slots;
  }

  /** @throws BackendError while the weights are no task's */
  check(): void {
    if (this.#torn) throw this.#torn;
  }

  /** Modules that the active task changes. @throws BackendError as `check` */
  get modules(): ReadonlySet<number> {
    this.check();
    return this.#touched.modules;
  }

  /** After a restart the weights are the base's, and another task is to be active. */
  restart(): void {
    this.#touched = NOTHING;
    this.#torn = between("webgpu");
  }

  /**
   * Reads the pristine weights that a change needs and memory does not hold, all of them before anything is changed.
   * @param resolved with the bytes of adapted weights that the tasks bring whole or by rows
   */
  async prepare(
    plans: readonly ModulePlan[],
    {
      weights: replaced,
      parameters,
      tables,
    }: Pick<WeightChange, "parameters" | "tables"> & { readonly weights: ReadonlyMap<number, Uint8Array> },
    host: WeightHost,
    signal: AbortSignal | undefined,
  ): Promise<WeightChange> {
    const modules = new Set([...plans.map(({ module }) => module), ...replaced.keys()]);
    const weights = new Map<number, Uint8Array | undefined>();
    for (const index of new Set([...this.#touched.modules, ...modules])) {
      const slot = this.#slots[index]!;
      const kept = replaced.has(index) || slot.pristine;
      weights.set(index, kept ? replaced.get(index) : await readWeight(host, slot, undefined, { signal }));
    }
    return { plans, modules, weights, parameters, tables };
  }

  /**
   * Makes a change. Where it fails, or is aborted in a pause of long work, the weights from before are put back.
   * @param former gives the change that made them
   * @returns marks the weights as the new task's: call it together with what else the task changes
   * @throws BackendError when they cannot be put back: they are no task's then, until a change is made
   */
  async write(
    change: WeightChange,
    context: FoldContext,
    former: () => Promise<WeightChange>,
    signal: AbortSignal | undefined,
  ): Promise<() => void> {
    const [before, sound] = [this.#touched, !this.#torn];
    const fold = this.#begin(change, context);
    try {
      return await this.#put(change, context, fold, signal);
    } catch (error) {
      // A rollback that failed is told already; and weights that were no task's before have nothing to go back to.
      if (error === this.#torn || !sound) throw error;
      if (context.host.view || fold.held.length > 0) await this.#putBack(error, context, former);
      else this.#touched = before;
      this.#torn = undefined;
      throw error;
    }
  }

  /** Does all that can fail before something is changed: takes memory, uploads coefficients, asks the host. */
  #begin({ plans, modules, weights, parameters, tables }: WeightChange, { bench, host }: FoldContext): Fold {
    const slots = this.#slots;
    bench.prepare(plans);
    const touched = [...weights.keys()];
    const passing = touched.filter((index) => !slots[index]!.active);
    const passage = bench.reserve("weight", Math.max(0, ...passing.map((index) => slots[index]!.weight.byteLength)));
    const planOf = new Map(plans.map((plan) => [plan.module, plan]));
    const names = new Set([...this.#touched.names, ...parameters.keys()]);
    const weightOf = (index: number): string => slots[index]!.weight.name;
    // What goes back to the base's value does so for all that share its memory.
    const changed = [...[...modules].map(weightOf), ...parameters.keys()].filter((name) => !tables.has(name));
    const alone = [...plans.map(({ module }) => weightOf(module)), ...changed];
    return {
      ...{ passing, held: touched.filter((index) => slots[index]!.active), names },
      transaction: host.begin?.([...touched.map(weightOf), ...names], alone),
      place: (index) => slots[index]!.active ?? passage,
      *weight(index) {
        const { weight, pristine, active: out = passage } = slots[index]!;
        const fresh = weights.get(index);
        if (fresh) bench.backend.upload(out, fresh);
        const base = fresh ? out : at(pristine!);
        const plan = planOf.get(index);
        if (plan) yield* bench.fold(plan, weight, base, out);
        else if (!fresh) bench.copy(base, out, weight.byteLength);
        // A pause may follow.
        yield;
      },
    };
  }

  async #put(
    { modules, weights, parameters }: WeightChange,
    { bench, host, pristine }: FoldContext,
    fold: Fold,
    signal?: AbortSignal,
  ): Promise<() => void> {
    const { held, names, transaction } = fold;
    this.#touched = { modules: new Set(weights.keys()), names };
    this.#torn ??= between(bench.backend.name);
    const pause = pacer(signal);
    try {
      if (host.settle && held.length > 0)
        await settleWeights(
          host,
          held.map((index) => this.#slots[index]!),
          bench,
        );
      for (const index of held) {
        const turn = paced(fold.weight(index), pause);
        if (turn) await turn;
      }
      if (transaction) await this.#pass(fold, transaction, bench, pause);
      for (const name of transaction ? names : []) {
        await transaction!.write(name, parameters.get(name)?.view ?? pristine(name) ?? null);
      }
      await bench.backend.finish();
      await transaction?.commit();
    } catch (error) {
      try {
        await transaction?.rollback();
      } catch (second) {
        throw this.#doubt(error, second, bench);
      }
      throw error;
    }
    return () => {
      this.#touched = { modules, names: new Set(parameters.keys()) };
      this.#torn = undefined;
    };
  }

  /** Passes weights into a host, one by one. */
  async #pass(
    { passing, weight, place }: Fold,
    transaction: Transaction,
    { backend }: Workbench,
    pause: Pause,
  ): Promise<void> {
    // A device gives all of them first, since a host takes them without a pause once the device is waited for.
    const fetched = new Map<number, Uint8Array>();
    for (const index of backend.read ? passing : []) {
      atOnce(weight(index));
      fetched.set(index, await backend.read!(place(index), this.#slots[index]!.weight.byteLength));
    }
    if (backend.read) await backend.finish();
    for (const index of passing) {
      const { name, dtype, shape, byteLength } = this.#slots[index]!.weight;
      // Await only what pauses: short work in the caller's own memory is done in one go.
      const turn = fetched.has(index) ? undefined : paced(weight(index), pause);
      if (turn) await turn;
      const data = fetched.get(index) ?? backend.view!(place(index), byteLength);
      const written = transaction.write(name, { dtype, shape, data, byteOffset: 0 });
      if (written) await written;
    }
  }

  /** Writes the weights from before again. @throws BackendError when that fails too */
  async #putBack(error: unknown, context: FoldContext, former: () => Promise<WeightChange>): Promise<void> {
    try {
      const change = await former();
      (await this.#put(change, context, this.#begin(change, context)))();
    } catch (second) {
      throw this.#doubt(error, second, context.bench);
    }
  }

  /** Remembers that the weights are no task's. @param second why they could not be put back */
  #doubt(error: unknown, second: unknown, { backend }: Workbench): Error {
    return (this.#torn = cannotPutBack(error, second, backend.name));
  }
}

function between(backend: string): BackendError {
  return new BackendError("the weights are between two tasks: wait for a switch that succeeds", { backend });
}
