/**
 * Mode "folded": W0 + ΔW of the plans goes where the weights are, and W0 where the task before had changed a weight and the
 * new one does not. Weights that the backend holds are folded in place; those of a host in the CPU's memory pass through it.
 */
import { at, type Slice } from "../backends/backend.ts";
import type { Transaction, View } from "../base/host.ts";
import type { Slot } from "./slots.ts";
import type { ModulePlan } from "./stage.ts";
import type { Workbench } from "./workbench.ts";

/** A switch whose memory is there. Nothing is changed yet. */
export interface Fold {
  readonly bench: Workbench;
  readonly slots: readonly Slot[];
  /** Modules, by index, whose weights the backend holds, and whose pass through it. */
  readonly held: readonly number[];
  readonly passing: readonly number[];
  /** Where the folded weight is; of `passing` valid until the next one. */
  weight(index: number): Slice;
}

/**
 * @param touched modules that change
 * @param read pristine weights of those of which no copy stays in memory
 * @throws BackendError when there is not enough memory
 */
export function prepareFold(
  bench: Workbench,
  slots: readonly Slot[],
  plans: readonly ModulePlan[],
  touched: ReadonlySet<number>,
  read: ReadonlyMap<number, Uint8Array>,
): Fold {
  bench.prepare(plans);
  const passing = [...touched].filter((index) => !slots[index]!.active);
  const passage = bench.reserve("weight", Math.max(0, ...passing.map((index) => slots[index]!.weight.byteLength)));
  const planOf = new Map(plans.map((plan) => [plan.module, plan]));
  return {
    ...{ bench, slots, passing, held: [...touched].filter((index) => slots[index]!.active) },
    weight(index) {
      const { weight, pristine, active: out = passage } = slots[index]!;
      const fresh = read.get(index);
      if (fresh) bench.backend.upload(out, fresh);
      const base = fresh ? out : at(pristine!);
      const plan = planOf.get(index);
      if (plan) bench.fold(plan, weight, base, out);
      else if (!fresh) bench.copy(base, out, weight.byteLength);
      return out;
    },
  };
}

/** The passing weights from a device, which is waited for before a host changes; undefined on a backend of the CPU. */
export async function fetchFolded({
  bench,
  slots,
  passing,
  weight,
}: Fold): Promise<Map<number, Uint8Array> | undefined> {
  const { backend } = bench;
  if (!backend.read) return undefined;
  const fetched = new Map<number, Uint8Array>();
  for (const index of passing) fetched.set(index, await backend.read(weight(index), slots[index]!.weight.byteLength));
  await backend.finish();
  return fetched;
}

/**
 * Passing weights and other parameters into the host: all of them or, where one fails, none. Without a pause between weights
 * where the host makes none.
 * @param parameters by name; null removes one
 */
export async function writeFolded(
  { bench, slots, passing, weight }: Fold,
  fetched: ReadonlyMap<number, Uint8Array> | undefined,
  transaction: Transaction,
  parameters: Iterable<readonly [string, View | null]>,
): Promise<void> {
  try {
    for (const index of passing) {
      const { name, dtype, shape, byteLength } = slots[index]!.weight;
      const data = fetched?.get(index) ?? bench.backend.view!(weight(index), byteLength);
      const written = transaction.write(name, { dtype, shape, data, byteOffset: 0 });
      if (written) await written;
    }
    for (const [name, view] of parameters) await transaction.write(name, view);
    await transaction.commit();
  } catch (error) {
    await transaction.rollback();
    throw error;
  }
}
