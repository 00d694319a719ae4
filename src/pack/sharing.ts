/**
 * What adapters share, found from their files alone: for each module and side, groups of tasks over components that they share. What
 * pays is kept: the components' bits and those of all tasks with them, as the coder counts them, against the tasks' alone.
 */

import type { Adapter, SharedModule } from "../adapters/adapter.ts";
import type { Spectrum } from "../extract/allocation.ts";
import { inOrder } from "../extract/extractor.ts";
import { encodeSpans, type Spans } from "../extract/groups.ts";
import { roundingLoss, usualBits } from "../extract/row-steps.ts";
import type { SideBasis } from "../extract/side.ts";
import { costOf, type SharedSides, type SideChoice, type SideCost } from "../extract/sides.ts";
import { throwIfAborted } from "../pace.ts";
import { type Adapters, naming, piecesOf, readStack } from "./encode.ts";
import { SLOPE, type Steps } from "./seek.ts";

/** What adapters share. */
export interface Sharing {
  /** Modules by name, without those that share nothing. */
  readonly sides: ReadonlyMap<string, SharedSides>;
  /** Steps with which each task is expected to lose with them what it was to lose alone with those that were given. */
  readonly steps: Steps;
}

/** What a module shares, and what each of its tasks loses of ΔW, squared, alone and with it. */
interface Found extends SharedSides {
  readonly losses: ReadonlyMap<string, { readonly apart: number; readonly shared: number }>;
}

/** Most tasks that are compared with each other. The others are asked what the groups of these would save them. */
const MOST_COMPARED = 64;
/** The share of what all tasks are expected to take that sharing must save: a switch is simpler without. */
const LEAST_SAVED = 0.01;

/**
 * @param spectra of all tasks
 * @param steps of each task's ΔW, by id
 * @param grows whether steps may grow until tasks lose what they would lose alone. Default: they stay
 */
export async function findSharing(
  opened: Adapters,
  spectra: readonly Spectrum[],
  steps: Steps,
  grows: boolean = false,
): Promise<Sharing> {
  const sides = new Map<string, SharedSides>();
  const apart = new Map<string, number>();
  const gains = new Map<string, number>();
  const add = (to: Map<string, number>, task: string, value: number): unknown =>
    to.set(task, (to.get(task) ?? 0) + value);
  for (const spectrum of spectra) add(apart, spectrum.task, roundingLoss([spectrum], steps.get(spectrum.task)!));
  const ask = (module: SharedModule<Adapter>): Promise<Found | undefined> => {
    throwIfAborted(opened.signal);
    return sharingOf(opened, module, steps, grows ? growth : () => 1);
  };
  const shared = opened.shared.filter(({ owners }) => owners.length > 1);
  let at = 0;
  for await (const found of inOrder(shared, opened.extractor.size + 1, ask)) {
    const { name } = shared[at++]!.shape;
    opened.meter.reach(at / shared.length);
    if (!found) continue;
    sides.set(name, found);
    for (const [task, { apart, shared }] of found.losses) add(gains, task, apart - shared);
  }
  const saved = [...sides.values()].reduce((sum, one) => sum + one.saved, 0);
  const all = spectra.reduce((sum, spectrum) => sum + usualBits(spectrum, steps.get(spectrum.task)!), 0);
  if (saved < LEAST_SAVED * all) return { sides: new Map(), steps };
  const expected = [...steps].map(([task, step]): [string, number] => {
    const [before, gain] = [apart.get(task) ?? 0, gains.get(task) ?? 0];
    return [task, gain === 0 ? step : step * growth(before, before - gain)];
  });
  return { sides, steps: new Map(expected) };
}

/** The factor by which steps grow until a squared loss is what it was. */
function growth(before: number, after: number): number {
  return Math.min(2, (before / Math.max(after, before / 8)) ** (0.5 / SLOPE));
}

async function sharingOf(
  { extractor }: Adapters,
  module: SharedModule<Adapter>,
  steps: Steps,
  grown: typeof growth,
): Promise<Found | undefined> {
  const { shape, owners } = module;
  const stepsFor = ({ owners }: SharedModule<Adapter>): number[] => owners.map(({ id }) => steps.get(id)!);
  const compared = { shape, owners: spread(owners, MOST_COMPARED) };
  const { stack } = await readStack(compared);
  const found = await naming(compared, () => extractor.ask("spans", stack, { steps: stepsFor(compared) }));
  const { spans, bases, costs } = found;
  if (spans.A.length + spans.B.length === 0) return undefined;
  const others = { shape, owners: owners.filter((owner) => !compared.owners.includes(owner)) };
  for (const piece of piecesOf(others)) {
    const { stack } = await readStack(piece);
    const asked = extractor.ask("sideCosts", stack, { bases, steps: stepsFor(piece) });
    costs.push(...(await naming(piece, () => asked)));
  }
  const costsOf = (which: "A" | "B"): (readonly SideCost[])[] => costs.map((task) => task[which]);
  const chosen = { A: paying(costsOf("A"), bases.A), B: paying(costsOf("B"), bases.B) };
  const used = { A: usedOf(chosen.A), B: usedOf(chosen.B) };
  if (used.A.length + used.B.length === 0) return undefined;
  const losses = new Map(
    costs.map(({ id, left, A, B }, i) => {
      const square = steps.get(id)! ** 2;
      const apart = square * (left + A[0]!.lost + B[0]!.lost);
      return [id, { apart, shared: square * (left + chosen.A[i]!.lost + chosen.B[i]!.lost) }];
    }),
  );
  const sum = (key: "apart" | "shared"): number => [...losses.values()].reduce((all, one) => all + one[key], 0);
  const stored = [...used.A.map((i) => bases.A[i]!), ...used.B.map((i) => bases.B[i]!)];
  const bits = stored.reduce((all, basis) => all + basis.bits, 0);
  const saved = costs.reduce((all, { A, B }, i) => {
    return all + A[0]!.bits + B[0]!.bits - chosen.A[i]!.bits - chosen.B[i]!.bits;
  }, -bits);
  const grownBases = encodeSpans(spans, grown(sum("apart"), sum("shared")));
  // Steps so large that nothing would be left of some stay as they are.
  const made = (which: "A" | "B"): SideBasis[] =>
    used[which].map((i) => (grownBases[which][i]!.components > 0 ? grownBases : bases)[which][i]!);
  const choice = (which: "A" | "B", task: number): SideChoice => {
    const { basis, own } = chosen[which][task]!;
    return basis === undefined ? { own } : { basis: used[which].indexOf(basis), own };
  };
  return {
    bases: { A: made("A"), B: made("B") },
    choices: new Map(costs.map(({ id }, i) => [id, { A: choice("A", i), B: choice("B", i) }])),
    bits,
    saved,
    losses,
  };
}

function usedOf(chosen: readonly SideChoice[]): number[] {
  return [...new Set(chosen.flatMap(({ basis }) => basis ?? []))].sort((a, b) => a - b);
}

/** Takes `most` of them where there are more, spread evenly. */
export function spread<T>(all: readonly T[], most: number): readonly T[] {
  if (all.length <= most) return all;
  return Array.from({ length: most }, (_, i) => all[Math.floor((i * all.length) / most)]!);
}

/** The share of what a side costs its tasks that components must save. */
const WORTH = 0.05;

/** What each task takes of one side: components that save more than they take. */
function paying(costs: readonly (readonly SideCost[])[], bases: Spans["bases"]["A"]): SideCost[] {
  const kept = new Set(bases.keys());
  for (;;) {
    const chosen = costs.map((all) =>
      all.reduce((best, one) => (kept.has(one.basis ?? -1) && costOf(one) < costOf(best) ? one : best)),
    );
    const idle = [...kept].filter((basis) => {
      let [saved, apart] = [0, 0];
      for (const [i, one] of chosen.entries()) {
        if (one.basis !== basis) continue;
        const alone = costOf(costs[i]![0]!);
        saved += alone - costOf(one);
        apart += alone;
      }
      const { components, bits } = bases[basis]!;
      return components === 0 || saved - bits <= WORTH * apart;
    });
    if (idle.length === 0) return chosen;
    for (const basis of idle) kept.delete(basis);
  }
}
