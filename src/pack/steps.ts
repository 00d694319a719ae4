/**
 * Steps of integers as packs are made with them: a share of what an adapter typically does to a module.
 */
import type { Adapter } from "../adapters/adapter.ts";
import { pairNorm } from "../extract/error.ts";
import { pairOf } from "../extract/gauge.ts";
import type { TermInput } from "../format/encode.ts";
import { decode, type Value } from "../format/messagepack.ts";
import { narrowed } from "../tensor/encode.ts";
import type { Pack } from "./pack.ts";

const MOST_STEP = 16;

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

/** The step that a pack was made with; undefined where it does not say. @throws FormatError when it is no number above 0 */
export function stepOf({ name, directory }: Pick<Pack, "name" | "directory">): number | undefined {
  const root: Value = decode(directory.basisBytes, name, "basis description", "basis");
  return root.get("step").maybe((step: Value) => {
    const found = step.number(0, MOST_STEP);
    step.check(found > 0, () => `step is ${found}`);
    return found;
  });
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

/** Terms of one task, whose integers are int8, in the smallest types that they fit: of coefficients, and of private terms. */
export function narrowTerms(terms: readonly TermInput[], modules: readonly Widths[]): TermInput[] {
  const shared = narrowed(
    terms.flatMap(({ module, rank, A, B }) => {
      const { A: a, B: b } = modules[module]!;
      return A && B
        ? [
            { ...A, rows: rank, width: a!.K },
            { ...B, rows: rank, width: b!.K },
          ]
        : [];
    }),
  );
  const own = narrowed(
    terms.flatMap(({ module, privateTerms }) => {
      if (!privateTerms) return [];
      const { rank: rows, A, Bt } = privateTerms;
      return [
        { rows, width: modules[module]!.in, encoded: A },
        { rows, width: modules[module]!.out, encoded: Bt },
      ];
    }),
  );
  const [nextShared, nextOwn] = [shared.encoded.values(), own.encoded.values()];
  const next = (from: IterableIterator<Uint8Array>): Uint8Array => from.next().value!;
  return terms.map(({ A, B, privateTerms, ...term }) => ({
    ...term,
    ...(A && { A: { ...A, dtype: shared.dtype, encoded: next(nextShared) } }),
    ...(B && { B: { ...B, dtype: shared.dtype, encoded: next(nextShared) } }),
    ...(privateTerms && {
      privateTerms: { ...privateTerms, dtype: own.dtype, A: next(nextOwn), Bt: next(nextOwn) },
    }),
  }));
}
