/**
 * One search: the coarsest steps with which errors or scores stay within their limits, or the finest with which a size
 * does. It knows nothing of packs.
 */
import { byTask, roundingLoss, type Spectrum } from "../extract/factors.ts";

/** Steps of ΔW, by task id or another key. */
export type Steps = ReadonlyMap<string, number>;

/** A goal that is out of reach. */
export class Unreachable extends RangeError {
  /** Bytes of the smallest pack, where those allowed are too few. */
  readonly least: number | undefined;

  constructor(message: string, least?: number) {
    super(message);
    this.least = least;
  }
}

/** A figure with the step of a key, compared with its limit. */
interface Figure {
  readonly key: string;
  /** The figure as a share of its limit: at most 1 fits. */
  readonly ratio: number;
  /** Nothing is left of a task, so that the step must be finer whatever the ratio is. */
  readonly isLost?: boolean;
}

/** A question to each thing that is made. */
interface Fits<T> {
  /** Figures grow nearly by this power of steps; it is negative for those that fall. */
  readonly slope: number;
  figuresOf(made: T): readonly Figure[] | Promise<readonly Figure[]>;
  refusal(key: string): Unreachable;
}

const ROUNDS = 10;
/** A figure of this share of its limit is close enough; and the share that is aimed at. */
const CLOSE = 0.985;
const AIM = 0.99;
/** Share by which a target falls each round. */
const CAREFUL = 0.004;
/** Rounds after which any error within its limit will do, and a size that fills this share of it. */
const LATE = 4;
const FILLED = 0.9;
/** The most that a step changes in a round. */
const STRIDE = 4;
/** A key is stuck after more than MOST_STUCK finer steps (below FINER) left its figure above STUCK of the least. */
const FINER = 0.9;
const STUCK = 0.97;
const MOST_STUCK = 2;
/** Steps as near as this to each other should lose the same. */
const NEAR = 0.99;

/** Errors grow nearly as steps do: by this power of them. */
export const SLOPE = 0.85;

/**
 * Looks for steps with which every figure is within its limit, and close to it.
 * @param start expected steps
 * @param make is called up to ten times
 * @throws Unreachable
 */
export async function search<T>(start: Steps, make: (steps: Steps) => Promise<T>, fits: Fits<T>): Promise<T> {
  const { slope } = fits;
  const seekers = new Map([...start].map(([key, step]) => [key, new Seeker(step, slope)]));
  let best: { readonly made: T; readonly sum: number } | undefined;
  let failing = "";
  for (let round = 0; round < ROUNDS; round++) {
    const made = await make(new Map([...seekers].map(([key, { step }]) => [key, step])));
    let isDone = true;
    let passes = true;
    let sum = 0;
    let stuck: string | undefined;
    for (const { key, ratio, isLost = false } of await fits.figuresOf(made)) {
      // A task without modules has nothing to round.
      const seeker = seekers.get(key);
      if (!seeker) continue;
      if (!seeker.tell(ratio, isLost, round)) isDone = false;
      if (!seeker.passes) {
        passes = false;
        failing = key;
      }
      if (seeker.isStuck) stuck ??= key;
      sum += ratio;
    }
    if (passes && !(best && best.sum > sum)) best = { made, sum };
    if (isDone) return made;
    if (stuck !== undefined && !best) throw fits.refusal(stuck);
  }
  if (!best) throw fits.refusal(failing);
  return best.made;
}

/** Searches the step of one key by its slope, between the largest that passed and the smallest that failed. */
class Seeker {
  passes = false;
  /** The step, or its reciprocal where figures fall as steps grow: figures grow with it. */
  #at: number;
  readonly #slope: number;
  #stuck = 0;
  /** The largest that passed, the smallest that did not. */
  #good = 0;
  #bad = Infinity;
  /** The smallest ratio that failed. */
  #least = Infinity;

  constructor(step: number, slope: number) {
    this.#slope = slope;
    this.#at = slope > 0 ? step : 1 / step;
  }

  get step(): number {
    return this.#slope > 0 ? this.#at : 1 / this.#at;
  }

  get isStuck(): boolean {
    return this.#stuck > MOST_STUCK;
  }

  /** Moves the step where the ratio is not good enough; returns whether it is. */
  tell(ratio: number, isLost: boolean, round: number): boolean {
    const at = this.#at;
    const grows = this.#slope > 0;
    this.passes = !isLost && ratio <= 1;
    if (ratio === 0 || (this.passes && (ratio >= CLOSE || (round >= LATE && (grows || ratio >= FILLED))))) return true;
    if (isLost ? !grows : this.passes) this.#good = Math.max(this.#good, at);
    else {
      if (!isLost && at < FINER * this.#bad && ratio > STUCK * this.#least) this.#stuck++;
      // A step that passed once may fail later, where others' steps have changed what is shared.
      if (this.#good > NEAR * at) this.#good = 0;
      this.#bad = Math.min(this.#bad, at);
      this.#least = Math.min(this.#least, ratio);
    }
    const wanted = ((AIM - CAREFUL * round) / ratio) ** (1 / Math.abs(this.#slope));
    const factor = isLost ? (grows ? 0.5 : 2) : Math.min(STRIDE, Math.max(1 / STRIDE, wanted));
    const next = at * factor;
    const isBetween = this.#good > 0 && this.#bad < Infinity;
    const isOutside = !(next > this.#good && next < this.#bad);
    this.#at = isBetween && isOutside ? Math.sqrt(this.#good * this.#bad) : next;
    return false;
  }
}

/**
 * Steps with which each task is expected to lose nearly `max` of its ΔW.
 * @param isRounded true for numbers that are rounded to steps. Else terms that are not worth their bits are left out,
 *   and no more is lost
 */
export function startSteps(spectra: readonly Spectrum[], max: number, isRounded: boolean): Steps {
  const steps = [...byTask(spectra)].map(([task, { spectra, square }]): [string, number] => {
    if (square === 0) return [task, 1];
    const most = Math.sqrt(square);
    const limit = (AIM * max) ** 2 * square;
    // Beyond the largest step everything is lost; far finer than it needs to be is the smallest.
    return [task, bisect(most * 1e-9, most, (step) => roundingLoss(spectra, step, isRounded) > limit)];
  });
  return new Map(steps);
}

/** The largest number without `exceeds`, within 0.1 %, by geometric bisection. */
export function bisect(low: number, high: number, exceeds: (middle: number) => boolean): number {
  let least = low;
  let most = high;
  while (most > 1.001 * least) {
    const middle = Math.sqrt(least * most);
    if (exceeds(middle)) most = middle;
    else least = middle;
  }
  return least;
}

/** The error of a size that no pack of a kind has. @param least bytes of the smallest pack, where one is known */
export function tooFew(max: number, least?: number): Unreachable {
  return new Unreachable(`${max} bytes are too few${least ? `: the least is ${least}` : ""}`, least);
}

/**
 * Asks for the most bytes of at most `max`.
 * @param isLost true where nothing is left of a task: its step is too coarse
 */
export function withinBytes<T>(
  max: number,
  bytesOf: (made: T) => number,
  isLost: (made: T) => boolean = () => false,
): Fits<T> {
  let least: number | undefined;
  return {
    slope: -SLOPE,
    figuresOf(made) {
      const bytes = bytesOf(made);
      const lost = isLost(made);
      if (!lost) least = Math.min(least ?? Infinity, bytes);
      return [{ key: "", ratio: bytes / max, isLost: lost }];
    },
    refusal: () => tooFew(max, least),
  };
}

/** Asks that no task loses more than `max` of its ΔW. @param lossesOf the result */
export function withinError<T>(
  max: number,
  lossesOf: (made: T) => readonly { readonly id: string; readonly total: number }[],
): Fits<T> {
  return {
    slope: SLOPE,
    // Where nothing is left of a task, its loss says nothing about the step.
    figuresOf: (made) =>
      lossesOf(made).map(({ id, total }) => ({ key: id, ratio: total / max, isLost: total >= 1 && max < 1 })),
    refusal: (task) => new Unreachable(`task "${task}" loses more than ${max} of its ΔW: allow more`),
  };
}
