/**
 * Packs whose tasks share nothing and are entropy-coded: made some at a time, so that of all others only what they were coded to is in
 * memory.
 */
import type { Adapter } from "../adapters/adapter.ts";
import type { SharedModule } from "../adapters/modules.ts";
import type { Extractor } from "../extract/extractor.ts";
import { letGo } from "../extract/garbage.ts";
import type { TermInput } from "../format/encode.ts";
import { type BuildOptions, basisOf, describe, headOf, type MadeTerm, type Packed, prepare, sizesOf } from "./build.ts";
import { encodeModules, type Known } from "./encode-modules.ts";
import { newPack, type Scratch } from "./fresh.ts";
import { lossesOf, type ModuleError, type TaskLoss } from "./report.ts";
import { encodeAdapter } from "./tasks.ts";

/** Looks for steps of ΔW: makes tasks with some, as often as it takes, the right ones last. */
export type Seek = (
  adapters: readonly Adapter[],
  make: (steps: ReadonlyMap<Adapter, number>) => Promise<readonly TaskLoss[]>,
) => Promise<void>;

interface Apart {
  /** As of `buildWith`. */
  readonly held: boolean;
  /** For what is made, where it is not held. Default: memory. */
  readonly scratch?: Scratch | undefined;
  /** Numbers of the adapters that are worked on at a time. Default: 2²⁶. */
  readonly most?: number;
}

/**
 * `buildWith` of no components and a step.
 * @param error that steps keep to, which the pack then says
 */
export async function buildApart(
  extractor: Extractor,
  adapters: readonly Adapter[],
  options: BuildOptions,
  error: number,
  seek: Seek,
  { held, scratch, most = GROUP }: Apart,
): Promise<Packed> {
  const { extraction, dtype, shared, fingerprints } = await prepare(adapters, options);
  const modules = shared.map(({ shape }) => ({ ...shape, fingerprint: fingerprints?.get(shape.name) }));
  const [names, head] = [modules.map(({ name }) => name), headOf(options)];
  const errors: ModuleError[] = [];
  const terms = new Map<Adapter, MadeTerm[]>();
  const extract = async (some: readonly Adapter[]): Promise<Map<Adapter, TermInput[]>> => {
    const [own, known]: [SharedModule<Adapter>[], Known] = [onlyOf(shared, some), new Map()];
    let found: Awaited<ReturnType<typeof encodeModules>> | undefined;
    await seek(some, async (steps) => {
      found = await encodeModules(extractor, own, extraction, dtype, { ...options, steps }, known);
      return lossesOf(found.errors);
    });
    for (const one of found!.errors) errors.push(one);
    const places = own.map(({ shape }) => names.indexOf(shape.name));
    for (const all of found!.terms.values())
      for (const [i, term] of all.entries()) all[i] = { ...term, module: places[term.module]! };
    return found!.terms;
  };
  const tasks = groupsOf(adapters, most).flatMap((group) => {
    let extracted: Promise<Map<Adapter, TermInput[]>> | undefined;
    return group.map((adapter) => async () => {
      extracted ??= extract(group);
      const own = (await extracted).get(adapter) ?? [];
      (await extracted).delete(adapter);
      terms.set(adapter, own.map(said));
      const task = await encodeAdapter(adapter, own, names, head);
      letGo(PASSING * task.blob.length);
      return task;
    });
  });
  const basis = basisOf(adapters, { ...options, error }, extraction, modules);
  const { bytes, chunks, blobs } = await newPack(basis, tasks, { held, scratch, extractor });
  const components = { min: 0, mean: 0, max: 0 };
  const report = describe(adapters, options, extraction, { names, components, terms, errors });
  return { chunks, report: { ...sizesOf(bytes, blobs, adapters), ...report } };
}

/** How often the bytes of a blob are in arrays that are of no use once it is made. */
const PASSING = 2;

/** An adapter of rank 32 for SDXL has two thirds of it. */
const GROUP = 2 ** 26;

/** In their order, of at most so many numbers unless there is only one. */
function groupsOf(adapters: readonly Adapter[], most: number): Adapter[][] {
  const groups: Adapter[][] = [];
  let numbers = Infinity;
  for (const adapter of adapters) {
    const own = [...adapter.modules.values()].reduce((sum, { rank, in: i, out }) => sum + rank * (i + out), 0);
    if (numbers + own > most) {
      groups.push([]);
      numbers = 0;
    }
    numbers += own;
    groups.at(-1)!.push(adapter);
  }
  return groups;
}

/** Modules of some owners. */
function onlyOf(shared: readonly SharedModule<Adapter>[], some: readonly Adapter[]): SharedModule<Adapter>[] {
  const those = new Set(some);
  return shared
    .map(({ shape, owners }) => ({ shape, owners: owners.filter((owner) => those.has(owner)) }))
    .filter(({ owners }) => owners.length > 0);
}

/** What a report says of a term. */
function said({ magnitude, privateTerms }: TermInput): MadeTerm {
  return { magnitude, privateTerms: privateTerms && { rank: privateTerms.rank, dtype: privateTerms.dtype } };
}
