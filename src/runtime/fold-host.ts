/**
 * A fold whose weights pass into a host that is written in place: all that changes, or nothing. Loaded for such hosts.
 */
import type { Slice } from "../backends/backend.ts";
import type { Transaction, View } from "../base/host.ts";
import type { Slot } from "./slots.ts";
import type { Workbench } from "./workbench.ts";

/** A fold whose memory is there. */
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
 * @param parameters beside the adapted weights; null removes one
 * @param pause between two weights: what to wait for
 * @param doubt what to throw for an error after which the rollback failed as well
 */
export async function transact(
  fold: Fold,
  transaction: Transaction,
  parameters: Iterable<readonly [string, View | null]>,
  pause: () => Promise<void> | undefined,
  doubt: (error: unknown, second: unknown) => Error,
): Promise<void> {
  try {
    await pass(fold, transaction, pause);
    for (const [name, view] of parameters) await transaction.write(name, view);
    await fold.bench.backend.finish();
    await transaction.commit();
  } catch (error) {
    try {
      await transaction.rollback();
    } catch (second) {
      throw doubt(error, second);
    }
    throw error;
  }
}

/** Passing weights, one by one. */
async function pass(fold: Fold, transaction: Transaction, pause: () => Promise<void> | undefined): Promise<void> {
  const { bench, slots, passing, weight } = fold;
  const { backend } = bench;
  const sizes = new Map(passing.map((index) => [index, slots[index]!.weight.byteLength]));
  const fetched = backend.read && (await (await import("./device-host.ts")).fetchFolded(backend, sizes, weight));
  for (const index of passing) {
    const { name, dtype, shape, byteLength } = slots[index]!.weight;
    const data = fetched?.get(index) ?? backend.view!(weight(index), byteLength);
    // No wait that is not needed: short work in the caller's own memory is done in one go.
    const turn = transaction.write(name, { dtype, shape, data, byteOffset: 0 }) ?? pause();
    if (turn) await turn;
  }
}
