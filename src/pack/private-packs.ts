/**
 * Packs with private terms for a goal: in the number formats that each task and module is worth, or entropy-coded.
 */
import type { Adapter } from "../adapters/adapter.ts";
import { type Allocation, byTask, type Spectrum } from "../extract/allocation.ts";
import type { Extractor } from "../extract/extractor.ts";
import type { ComponentSelection } from "../extract/options.ts";
import { type Shared, type Survey, withinBytes, withinError } from "./allocate.ts";
import { buildApart, type Seek } from "./apart.ts";
import { Unreachable } from "./bisect.ts";
import { type Built, gathered, type Packed, startBuild } from "./build.ts";
import type { Scratch } from "./fresh.ts";
import type { Goal, Judge } from "./goal.ts";
import { type Steps, startSteps, stepsWithin } from "./refine.ts";
import type { TaskLoss } from "./report.ts";
import type { SearchOptions } from "./search-options.ts";
import { MOST_STEP } from "./steps.ts";
import { codedOptions, type Way } from "./ways.ts";

/** What it takes of a search. */
interface Making extends Pick<SearchOptions, "dtype" | "base" | "anyBase" | "signal"> {
  readonly extractor: Extractor;
  readonly adapters: readonly Adapter[];
  /** As of `buildWith`. */
  readonly held: boolean;
  readonly scratch?: Scratch | undefined;
  readonly judge?: Judge | undefined;
  survey(shared?: Shared): Promise<Survey>;
}

/** Of `allocateBeside`. @throws Unreachable */
export async function allocatedPack(
  { extractor, adapters, dtype, base, anyBase, signal, survey, held, judge }: Making,
  { name: _, fallback: __, allocateBeside: k = 0, ...options }: Way,
  goal: ComponentSelection | Goal,
): Promise<Packed> {
  const common = { dtype, base, anyBase, signal };
  const found = await survey(k > 0 ? { k, dtype: options.dtype?.basis ?? "f16" } : undefined);
  if (goal.kind !== "error" && goal.kind !== "bytes")
    throw new Unreachable(`private terms are allocated for an error or a size, not for ${goal.kind}`);
  const draft = await startBuild(adapters, { ...common, ...options, select: { kind: "k", k } }, { again: true });
  const extract = (privateTerms: Allocation): Promise<readonly TaskLoss[]> => draft.extract(extractor, privateTerms);
  if (goal.kind === "error") {
    await withinError(found, goal.max, extract, (losses) => losses);
    // What is left to do needs memory.
    await extractor.rest();
    return draft.finish(held || judge !== undefined);
  }
  const whole = async (privateTerms: Allocation): Promise<Built> => {
    await extract(privateTerms);
    return gathered(await draft.finish(true));
  };
  return withinBytes(found, goal.max, whole);
}

/** Of `refineBeside`, with the coarsest steps that keep every task within an error. @throws Unreachable */
export async function codedPack(
  { extractor, adapters, dtype, base, anyBase, signal, survey, held, scratch, judge }: Making,
  { name: _, fallback: __, refineBeside: k = 0, ...options }: Way,
  error: number,
): Promise<Packed> {
  const { spectra } = await survey();
  const start = startSteps(spectra, error);
  const all = codedOptions({ dtype, base, anyBase, signal, ...options }, k, typicalStep(spectra, start));
  const seek: Seek = async (some, make) => {
    const own = new Map(some.map(({ id }) => [id, start.get(id) ?? 1]));
    const extract = (steps: Steps): Promise<readonly TaskLoss[]> =>
      make(new Map(some.map((adapter) => [adapter, steps.get(adapter.id)!])));
    await stepsWithin(own, error, extract, (losses) => losses);
  };
  const said = Math.min(1, error);
  const whole = held || judge !== undefined;
  if (k === 0) return buildApart(extractor, adapters, all, said, seek, { held: whole, scratch });
  const draft = await startBuild(adapters, all, { again: true, error: said });
  await seek(adapters, (steps) => draft.extract(extractor, all.privateTerms, steps));
  await extractor.rest();
  return draft.finish(whole);
}

/** What steps are, in geometric mean, of the norm that ΔW of an adapter's modules typically has. */
function typicalStep(spectra: readonly Spectrum[], steps: Steps): number {
  const logs = [...byTask(spectra)].flatMap(([task, { own, square }]) =>
    square > 0 ? Math.log(steps.get(task)! / Math.sqrt(square / own.length)) : [],
  );
  return Math.min(MOST_STEP, Math.exp(logs.reduce((a, b) => a + b, 0) / (logs.length || 1)));
}
