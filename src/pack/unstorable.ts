/** Values that cannot be stored, and whose they are. Components are of all adapters together: too large because of one of them. */
import type { Adapter } from "../adapters/adapter.ts";
import type { SharedModule } from "../adapters/modules.ts";
import { AdapterError } from "../errors.ts";
import { pairNorm } from "../extract/error.ts";
import type { ModuleStack } from "../extract/extract.ts";
import { pairOf } from "../extract/gauge.ts";
import type { Gauge } from "../extract/options.ts";
import { encodeBasis, type ModuleInput } from "../format/encode.ts";
import { UnstorableError } from "../tensor/encode.ts";

/** Whether an adapter has a value that cannot be stored as it was tried; in another way it may be. */
export function isUnstorable(error: unknown): error is AdapterError {
  return error instanceof AdapterError && error.cause instanceof UnstorableError;
}

/** @throws AdapterError naming adapter and module, in place of an UnstorableError of `work` */
export async function naming<T>({ shape, owners }: SharedModule<Adapter>, work: () => Promise<T>): Promise<T> {
  try {
    return await work();
  } catch (cause) {
    if (!(cause instanceof UnstorableError)) throw cause;
    const { file } = owners.find(({ id }) => id === cause.owner) ?? owners[0]!;
    throw new AdapterError(cause.message, { file, field: shape.name, cause });
  }
}

/**
 * The limit that values in a pack have whatever their format is, of a basis.
 * @param stack that it was made of
 * @throws UnstorableError of the adapter with the largest values
 */
export function checkBasis({ A, B, ...shape }: ModuleInput, { members }: ModuleStack, gauge: Gauge): void {
  for (const [side, bases, dtype] of [
    ["A", { A }, A?.dtype],
    ["Bt", { B }, B?.dtype],
  ] as const) {
    // Which holds no such values.
    if (dtype === undefined || dtype === "f16") continue;
    try {
      refuseLarge({ ...shape, ...bases });
    } catch (cause) {
      if (!(cause instanceof UnstorableError)) throw cause;
      // Of balanced factors both are as large as ΔW makes them.
      const sizes = members.map((one) => (gauge === "balanced" ? pairNorm(pairOf(one)) : peakOf(one[side])));
      throw new UnstorableError(cause.message, cause, members[sizes.indexOf(Math.max(...sizes))]!.id);
    }
  }
}

/** @throws UnstorableError for a basis with values that no pack can hold */
export function refuseLarge(module: ModuleInput): void {
  encodeBasis({ producer: "", mode: "column", gauge: "as-trained", centering: "none", modules: [module] });
}

/** The largest magnitude. */
export function peakOf(values: Float32Array | Float64Array): number {
  let peak = 0;
  for (const value of values) peak = Math.max(peak, Math.abs(value));
  return peak;
}
