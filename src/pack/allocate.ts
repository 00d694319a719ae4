/**
 * Private terms for a goal: reads what every adapter's modules hold, lets `allocation.ts` choose, and makes packs until what was
 * measured keeps to the goal too. Estimates are good to a few percent, so that takes two or three packs.
 */

import type { Adapter, SharedModule } from "../adapters/adapter.ts";
import { type Allocation, allocateBytes, allocateError, type Spectrum } from "../extract/allocation.ts";
import { inOrder } from "../extract/extractor.ts";
import { throwIfAborted } from "../pace.ts";
import type { Dtype } from "../tensor/dtypes.ts";
import type { Streamed } from "./build.ts";
import { type Adapters, piecesOf, readStack } from "./encode.ts";
import type { TaskLoss } from "./report.ts";
import { tooFew, Unreachable } from "./seek.ts";

/** What adapters hold, and how private terms of it may be stored. */
export interface Survey {
  readonly spectra: readonly Spectrum[];
  /** Number formats of private terms. Default: all. */
  readonly only?: readonly Dtype[] | undefined;
}

/** What a task may lose of its ΔW where nobody says so: docs/pack.md has what that costs and saves. */
export const DEFAULT_ERROR = 0.15;

const ROUNDS = 8;
/** A task that is still above what is allowed is held further below it from round to round, until it takes one step more. */
const CAREFUL = 0.004;
/** A pack within so much of its goal is good enough. */
const CLOSE = 0.99;

/** Reads the spectra of all adapters. */
export async function survey(
  { shared, extractor, meter, signal }: Adapters,
  only: readonly Dtype[] | undefined,
): Promise<Survey> {
  const read = async (piece: SharedModule<Adapter>): Promise<Spectrum[]> => {
    throwIfAborted(signal);
    const { stack } = await readStack(piece);
    const { name: module, out, in: inputs, members } = stack;
    const all = await extractor.ask("spectra", stack, undefined);
    return all.map((singular, i) => {
      const square = singular.reduce((sum, value) => sum + value ** 2, 0);
      return { task: members[i]!.id, module, out, in: inputs, singular, square };
    });
  };
  const spectra: Spectrum[] = [];
  const pieces = shared.flatMap(piecesOf);
  let done = 0;
  for await (const found of inOrder(pieces, extractor.size + 1, read)) {
    throwIfAborted(signal);
    for (const one of found) spectra.push(one);
    meter.reach(++done / pieces.length);
  }
  return { spectra, only };
}

/**
 * Finds the fewest private terms with which no task loses more than `max` of its ΔW.
 * @param make makes tasks with these private terms
 * @param lossesOf what they lost
 * @throws Unreachable
 */
export async function withinError<T>(
  { spectra, only }: Survey,
  max: number,
  make: (allocation: Allocation) => Promise<T>,
  lossesOf: (made: T) => readonly TaskLoss[],
): Promise<T> {
  const allowed = new Map(spectra.map(({ task }) => [task, max]));
  for (let round = 0; round < ROUNDS; round++) {
    const { allocation, short } = allocateError(spectra, (task) => allowed.get(task)!, only);
    if (short.length > 0)
      throw new Unreachable(
        `task "${short[0]}" loses more than ${max} of its ΔW${only ? ` in ${only.join(" or ")}: allow more, or other number formats` : ": allow more"}`,
      );
    const made = await make(allocation);
    let done = true;
    for (const { id, total } of lossesOf(made)) {
      // What was estimated too high is taken back once, what was too low until it fits.
      if (total <= max && (round > 0 || total > CLOSE * max || total === 0)) continue;
      allowed.set(id, Math.min(1, (allowed.get(id)! * max * (1 - CAREFUL * (round + 1))) / total));
      done = false;
    }
    if (done) return made;
  }
  throw new Unreachable(`an error of ${max} is just out of reach; allow more`);
}

/** The pack of at most `max` bytes that loses least. @throws Unreachable */
export async function withinBytes(
  { spectra, only }: Survey,
  max: number,
  build: (allocation: Allocation) => Promise<Streamed>,
): Promise<Streamed> {
  const tasks = tasksOf(spectra);
  let best: Streamed | undefined;
  // What a pack takes beside private terms is known when one has been made.
  let [room, spare] = [max, 0];
  for (let round = 0; round < ROUNDS; round++) {
    const plan = allocateBytes(spectra, room, only);
    const built = await build(plan.allocation);
    const { bytes } = built.report;
    const beside = bytes - plan.bytes;
    const fits = bytes <= max;
    if (plan.allocation.size < tasks.size && (fits || room < max))
      throw tooFew(max, beside + firstBytes(spectra, only));
    if (fits && !(best && best.report.bytes >= bytes)) best = built;
    if (fits && (bytes >= CLOSE * max || max - beside - spare <= room)) break;
    if (!fits && room < max) spare += (bytes - max) * 1.1;
    room = max - beside - spare;
    if (room <= 0) throw tooFew(max, beside + firstBytes(spectra, only));
  }
  if (!best) throw new Unreachable(`${max} bytes are just out of reach; allow more`);
  return best;
}

/** Tasks that change something. */
function tasksOf(spectra: readonly Spectrum[]): Set<string> {
  return new Set(spectra.filter(({ square }) => square > 0).map(({ task }) => task));
}

/** Bytes of the fewest private terms with which every task has one. */
function firstBytes(spectra: readonly Spectrum[], only: readonly Dtype[] | undefined): number {
  const tasks = tasksOf(spectra);
  let most = 1024;
  while (most < 2 ** 40 && allocateBytes(spectra, most, only).allocation.size < tasks.size) most *= 1.25;
  return Math.ceil(most);
}
