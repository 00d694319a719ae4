/** Factors of a module in the shapes of LoRA files, for the writers of all formats. */
import { AdapterError } from "../errors.ts";
import { pacer } from "../pace.ts";
import { encodeTensor } from "../tensor/encode.ts";
import type { Adapter, AdapterModule } from "./adapter.ts";

/** The parts of an adapter that are needed to write it. A task of a pack can be given in this form. */
export type Exportable = Pick<Adapter, "id" | "baseModel" | "modules" | "saved" | "metadata">;

/** A tensor, row-major. */
export interface FactorMatrix {
  readonly shape: readonly number[];
  readonly values: Float32Array;
}

/** The factors of one module, scale in B. */
export interface AdapterFactors {
  /** A [r, in], or [r, in, k…] of a convolution. */
  readonly A: FactorMatrix;
  /** B [out, r], or [out, r, 1…]. */
  readonly B: FactorMatrix;
  /** DoRA magnitude [out]. */
  readonly magnitude: Float32Array | undefined;
}

/** Rank to write. No format has a rank of 0: a module whose update is zero gets one component of zeros. */
export function rankOf({ rank }: AdapterModule): number {
  return Math.max(1, rank);
}

/** Reads the factors of a module. @throws as the module's `read` */
export async function factorsOf(module: AdapterModule): Promise<AdapterFactors> {
  const { out, in: inputs, kernel = [] } = module;
  const { A, Bt, magnitude } = await module.read();
  const rank = rankOf(module);
  const b = new Float32Array(out * rank);
  const pause = pacer();
  for (let k = 0; k < module.rank; k++) {
    for (let i = 0; i < out; i++) b[i * rank + k] = Bt[k * out + i]!;
    const turn = pause();
    if (turn) await turn;
  }
  const channels = inputs / kernel.reduce((product, size) => product * size, 1);
  return {
    A: { shape: [rank, channels, ...kernel], values: module.rank === 0 ? new Float32Array(inputs) : A },
    B: { shape: [out, rank, ...kernel.map(() => 1)], values: b },
    magnitude,
  };
}

export function f32Bytes(values: Float32Array): Uint8Array {
  return encodeTensor("f32", values, 1, values.length);
}

/** @throws AdapterError when an adapter brings more than factors, which the format cannot hold */
export function refuseSaved({ id, saved }: Exportable, format: string): void {
  const [first] = saved;
  if (first === undefined) return;
  const message =
    `${first.name} (${first.role}) has no place in ${format}, which holds factors of LoRA alone: export as PEFT, or fold the task ` +
    "into its base";
  throw new AdapterError(message, { file: id, field: first.name });
}

/** Makes the error for a module that the format cannot hold. */
export function refuseModule({ id }: Exportable, name: string, why: string): AdapterError {
  return new AdapterError(`${name} ${why}: export as PEFT, or fold the task into its base`, { file: id, field: name });
}
