/**
 * Steps of integers as packs are made with them: a share of what an adapter typically does to a module.
 */
import type { Adapter } from "../adapters/adapter.ts";
import type { Pack } from "../core/pack.ts";
import { pairNorm } from "../extract/error.ts";
import { pairOf } from "../extract/gauge.ts";
import { narrowPrivate } from "../extract/private.ts";
import type { TermInput } from "../format/encode.ts";
import { type PackModule, sharedBases } from "../format/format.ts";
import type { Dtype, QuantizedDtype } from "../tensor/dtypes.ts";
import { narrowed } from "../tensor/encode.ts";

/** The largest that a pack may say. */
export const MOST_STEP = 16;

/** A search makes many packs of the same adapters, and each norm takes reading all of one. */
const norms = new WeakMap<Adapter, Promise<number>>();

/** The root of the mean of ‖ΔW‖² over the modules of an adapter; 1 where nothing changes. */
async function typicalNorm({ modules }: Adapter): Promise<number> {
  let sum = 0;
  for (const module of modules.values()) sum += pairNorm(pairOf(await module.read())) ** 2;
  return Math.sqrt(sum / modules.size) || 1;
}

/** What a step is for ΔW of each adapter, those that are named several times once. */
export async function stepsOf(adapters: readonly Adapter[], step: number): Promise<Map<Adapter, number>> {
  const steps = new Map<Adapter, number>();
  for (const adapter of new Set(adapters)) {
    if (!norms.has(adapter)) norms.set(adapter, typicalNorm(adapter));
    steps.set(adapter, step * (await norms.get(adapter)!));
  }
  return steps;
}

/** The step that a pack was made with; undefined where it does not say. */
export function stepOf({ directory }: Made): number | undefined {
  return directory.basis.step;
}

/** The error that each task of a pack with a step was made to keep to; undefined where it does not say. */
export function errorOf({ directory }: Made): number | undefined {
  return directory.basis.error;
}

type Made = Pick<Pack, "directory">;

/** A module of a pack as `narrowTerms` takes it. */
export function widthsOf(module: PackModule): Widths {
  return { in: module.in, out: module.out, ...sharedBases(module) };
}

/** @throws RangeError for a step that is no share */
export function checkStep(name: string, step: number | undefined): void {
  if (step === undefined || (step > 0 && step <= MOST_STEP)) return;
  throw new RangeError(`${name} must be above 0 and at most ${MOST_STEP}, got ${step}`);
}

/** Widths of the tensors of a module's terms. */
interface Widths {
  readonly in: number;
  readonly out: number;
  readonly A?: { readonly K: number } | undefined;
  readonly B?: { readonly K: number } | undefined;
}

/** Terms of one task in the smallest integers that they fit: all coefficients, and the private terms of each module. */
export function narrowTerms(terms: readonly TermInput[], modules: readonly Widths[]): TermInput[] {
  const shared = narrowed(
    terms.flatMap(({ module, rank: rows, A, B }) => {
      const { A: a, B: b } = modules[module]!;
      return A && B ? [integersOf(A, rows, a!.K), integersOf(B, rows, b!.K)] : [];
    }),
  );
  const next = shared.encoded.values();
  const coefficients = <T extends Encoded>(side: T): T => ({
    ...side,
    dtype: shared.dtype,
    encoded: next.next().value!,
  });
  return terms.map(({ A, B, privateTerms, ...term }) => ({
    ...term,
    ...(A && B && { A: coefficients(A), B: coefficients(B) }),
    ...(privateTerms && { privateTerms: narrowPrivate(privateTerms, modules[term.module]!) }),
  }));
}

/** Integers as they are stored. */
interface Encoded {
  readonly dtype: Dtype;
  readonly encoded: Uint8Array;
}

function integersOf({ dtype, encoded }: Encoded, rows: number, width: number): Parameters<typeof narrowed>[0][number] {
  return { dtype: dtype as QuantizedDtype, encoded, rows, width };
}
