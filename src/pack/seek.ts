/**
 * Searches along one number that bytes, errors and behaviour mostly grow with: components, rungs of a ladder, steps. They know nothing of
 * packs.
 */
import { byTask, type Spectrum } from "../extract/allocation.ts";
import { roundingLoss } from "../extract/row-steps.ts";
import type { TaskLoss } from "./report.ts";

/** A goal that one way of packing does not reach. */
export class Unreachable extends RangeError {
  /** Bytes of the smallest pack, where those allowed are too few. */
  readonly least: number | undefined;

  constructor(message: string, { least, cause }: { least?: number | undefined; cause?: unknown } = {}) {
    super(message, { cause });
    this.least = least;
  }
}

export function tooFew(max: number, least: number): Unreachable {
  return new Unreachable(`${max} bytes are too few: the least is ${least}`, { least });
}

/** The most of something whose bytes stay within `max`; they grow with it nearly in a line. */
export async function grow<T>(
  build: (n: number) => Promise<T>,
  sizeOf: (made: T) => number,
  max: number,
  most: number,
): Promise<T> {
  let low = { n: 1, made: await build(1) };
  const least = sizeOf(low.made);
  if (least > max) throw tooFew(max, least);
  let high = most + 1;
  let slope = 0;
  for (let guess = Math.min(8, most); low.n + 1 < high; ) {
    const n = Math.min(Math.max(guess, low.n + 1), high - 1);
    const made = await build(n);
    const bytes = sizeOf(made);
    slope = (bytes - sizeOf(low.made)) / (n - low.n);
    if (bytes <= max) low = { n, made };
    else high = n;
    // Nothing more to take.
    if (slope <= 0) break;
    guess = low.n + Math.floor((max - sizeOf(low.made)) / slope);
  }
  return low.made;
}

/** How far a search goes on when it knows one side only. */
const STRIDE = 48;
/** A pack that fills this share of its bytes is full enough. */
const FULL = 0.99;

/** The same for finer and finer steps: bytes grow in no line, and may stay as they are for a while. */
export async function refine<T>(
  build: (n: number) => Promise<T>,
  sizeOf: (made: T) => number,
  max: number,
  most: number,
): Promise<T> {
  let low: { n: number; bytes: number; made?: T } = { n: 0, bytes: 0 };
  let high = { n: most + 1, bytes: Infinity };
  let guess = Math.round(most / 3);
  for (let round = 1; high.n - low.n > 1 && !(low.made && low.bytes >= FULL * max); round++) {
    const n = Math.min(Math.max(guess, low.n + 1), high.n - 1);
    const made = await build(n);
    const bytes = sizeOf(made);
    if (bytes <= max) low = { n, bytes, made };
    else high = { n, bytes };
    if (high.bytes === Infinity) guess = n + STRIDE;
    else if (!low.made) guess = n - STRIDE;
    else {
      const share = round % 3 ? (max - low.bytes) / (high.bytes - low.bytes) : 0.5;
      guess = low.n + Math.floor(share * (high.n - low.n));
    }
  }
  // The least with which a task still does something is not known.
  if (low.made === undefined) throw new Unreachable(`${max} bytes are too few`);
  return low.made;
}

/**
 * The lowest rung below `limit` that passes together with the one above it, if any; there is none above the last of `count`. Takes
 * it that what is above a passing rung mostly passes; where the one right above fails, goes on above both.
 */
export async function lowestPassing(
  count: number,
  limit: number,
  passes: (rung: number) => Promise<boolean>,
): Promise<number | undefined> {
  if (limit === 0 || !(await passes(limit - 1))) return undefined;
  for (let from = 0; from < limit; ) {
    const rung = from + (await partition(limit - 1 - from, (i) => passes(from + i)));
    if (rung + 1 >= count || (await passes(rung + 1))) return rung;
    from = rung + 2;
  }
  return undefined;
}

/** Number of indexes below `count` before the first for which `holds` is true; it must stay true from there on. */
export async function partition(count: number, holds: (i: number) => Promise<boolean>): Promise<number> {
  let [low, high] = [0, count];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (await holds(middle)) high = middle;
    else low = middle + 1;
  }
  return low;
}

/** Steps of ΔW by task id. */
export type Steps = ReadonlyMap<string, number>;

const ROUNDS = 10;
/** An error of this share of the one allowed is close enough; and the share that is aimed at. */
const CLOSE = 0.985;
const AIM = 0.99;
/** Share by which a task's target falls each round. */
const CAREFUL = 0.004;
/** Rounds after which any error below the limit will do. */
const LATE = 4;
/** Errors grow nearly as steps do: by this power of them. */
export const SLOPE = 0.85;
/** Where steps of this share make errors no smaller than that share of what they were, so often, integers are at their end. */
const FINER = 0.9;
const STUCK = 0.97;
const MOST_STUCK = 2;
/** Steps as near as this to each other should lose the same. */
const NEAR = 0.99;

/** Steps with which each task is expected to lose nearly `max` of its ΔW. */
export function startSteps(spectra: readonly Spectrum[], max: number): Steps {
  return new Map([...byTask(spectra)].map(([task, { own, square }]) => [task, estimate(own, square, max)]));
}

/**
 * The coarsest steps with which no task loses more than `max` of its ΔW, about.
 * @param make makes tasks with these steps
 * @param lossesOf what they lose
 * @throws Unreachable
 */
export async function stepsWithin<T>(
  start: Steps,
  max: number,
  make: (steps: Steps) => Promise<T>,
  lossesOf: (made: T) => readonly TaskLoss[],
): Promise<T> {
  const found = new Map([...start].map(([task, step]) => [task, new Seeker(step, max)]));
  let losses: readonly TaskLoss[] = [];
  for (let round = 0; round < ROUNDS; round++) {
    const made = await make(new Map([...found].map(([task, { step }]) => [task, step])));
    let done = true;
    losses = lossesOf(made);
    for (const { id, total } of losses) {
      // A task without modules has nothing to round.
      const seeker = found.get(id);
      if (!seeker) continue;
      if (!seeker.isDone(total, round)) done = false;
      if (seeker.isStuck) throw tooFine(id, max);
    }
    if (done) return made;
  }
  throw tooFine(losses.find(({ id }) => found.get(id)?.passes === false)!.id, max);
}

function tooFine(task: string, max: number): Unreachable {
  return new Unreachable(`task "${task}" loses more than ${max} of its ΔW in integers: allow more`);
}

/** The step with which a task is expected to lose so much. */
function estimate(spectra: readonly Spectrum[], square: number, max: number): number {
  if (square === 0) return 1;
  // Beyond the largest step everything is lost; halved in octaves, far finer than it needs to be.
  let [low, high] = [Math.sqrt(square) * 1e-9, Math.sqrt(square)];
  while (high > 1.001 * low) {
    const middle = Math.sqrt(low * high);
    if (roundingLoss(spectra, middle) > (AIM * max) ** 2 * square) high = middle;
    else low = middle;
  }
  return low;
}

/** Looks for the step of one task. */
class Seeker {
  step: number;
  passes = false;
  #stuck = 0;
  readonly #max: number;
  /** The coarsest step that passed, the finest that did not. */
  #good = 0;
  #bad = Infinity;
  /** What was lost with that. */
  #least = Infinity;

  constructor(step: number, max: number) {
    this.step = step;
    this.#max = max;
  }

  get isStuck(): boolean {
    return this.#stuck > MOST_STUCK;
  }

  /** @param total what the task lost with its step, which changes where that is not good enough */
  isDone(total: number, round: number): boolean {
    const max = this.#max;
    this.passes = total <= max;
    if (total === 0 || (this.passes && (total >= CLOSE * max || round >= LATE))) return true;
    if (this.passes) this.#good = Math.max(this.#good, this.step);
    else {
      if (total < 1 && this.step < FINER * this.#bad && total > STUCK * this.#least) this.#stuck++;
      // What passed before does so no more where others' steps have changed what is shared.
      if (this.#good > NEAR * this.step) this.#good = 0;
      [this.#bad, this.#least] = [Math.min(this.#bad, this.step), Math.min(this.#least, total)];
    }
    const aim = (AIM - CAREFUL * round) * max;
    // Where nothing is left of a task, its loss says nothing about the step.
    const next = total < 1 ? this.step * (aim / total) ** (1 / SLOPE) : this.step / 2;
    const between = this.#good > 0 && this.#bad < Infinity;
    const outside = !(next > this.#good && next < this.#bad);
    this.step = between && outside ? Math.sqrt(this.#good * this.#bad) : next;
    return false;
  }
}
