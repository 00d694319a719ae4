/**
 * Bit allocation: how many private terms every task has in every module, and of how many bits, so that the fewest bytes lose the
 * least. Each task and module has a few choices (rank × number format) with known bytes and an error that follows from the singular
 * values. On the lower convex hull of those, steps of the steepest descent are taken one after another, of a task or of all: the
 * method of Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", 1988. Arrays only: no files, no pack.
 */
import { type Dtype, tensorBytes } from "../tensor/dtypes.ts";

/** Private terms of one task in one module. */
export interface PrivateChoice {
  readonly rank: number;
  readonly dtype: Dtype;
}

/** Private terms by task id and module name; none where there is no entry. */
export type Allocation = ReadonlyMap<string, ReadonlyMap<string, PrivateChoice>>;

/** What private terms of one task in one module could hold. */
export interface Spectrum {
  readonly task: string;
  readonly module: string;
  readonly out: number;
  readonly in: number;
  /** Singular values of what private terms are to hold, descending: of ΔW, or of what shared components leave of it. */
  readonly singular: readonly number[];
  /** ‖ΔW‖². */
  readonly square: number;
}

/** An allocation and what it is expected to cost. */
export interface Allocated {
  readonly allocation: Allocation;
  /** Bytes of all private terms, their scales included. */
  readonly bytes: number;
  /** Tasks that all choices together do not bring within their error. */
  readonly short: readonly string[];
}

/**
 * The squared error of rounding a long row, as a share of its square: measured on real adapters. One even mix of rows, as stored, has
 * rows of about equal length, so a pair loses 2·share·(Σ s)² / rank.
 */
const ROUNDED: readonly (readonly [Dtype, number])[] = [
  ["int3", 0.04],
  ["int4", 0.0105],
  ["int8", 4.3e-5],
  ["f16", 4.3e-8],
  ["f32", 0],
];

/** What a term takes in its task's table beside its values. */
const ENTRY_BYTES = 8;

/** One step along the hull of a spectrum. */
interface Step {
  readonly spectrum: Spectrum;
  readonly choice: PrivateChoice;
  readonly bytes: number;
  /** Decrease of the squared error. */
  readonly gain: number;
  /** Gain per byte, as a share of the task's ‖ΔW‖². */
  readonly slope: number;
}

/**
 * The fewest bytes with which the error of each task, ‖ΔW − ΔW'‖ / ‖ΔW‖ over all its modules together, is at most as large as asked.
 * @param allowed by task id
 * @param only number formats to choose from. Default: all
 */
export function allocateError(
  spectra: readonly Spectrum[],
  allowed: (task: string) => number,
  only?: readonly Dtype[],
): Allocated {
  const plan = new Plan();
  const short: string[] = [];
  for (const [task, { own, square }] of byTask(spectra)) {
    let left = sum(own.map(({ singular }) => squares(singular)));
    const most = allowed(task) ** 2 * square;
    for (const step of descent(own, () => square, only)) {
      if (left <= most) break;
      plan.take(step);
      left -= step.gain;
    }
    if (left > most) short.push(task);
  }
  return { ...plan, short };
}

/** The least mean squared error of the tasks with private terms of at most `most` bytes. @param only as of `allocateError` */
export function allocateBytes(spectra: readonly Spectrum[], most: number, only?: readonly Dtype[]): Allocated {
  const plan = new Plan();
  const tasks = byTask(spectra);
  for (const step of descent(spectra, ({ task }) => tasks.get(task)!.square, only)) {
    if (plan.bytes + step.bytes > most) break;
    plan.take(step);
  }
  return { ...plan, short: [] };
}

class Plan {
  readonly allocation = new Map<string, Map<string, PrivateChoice>>();
  bytes = 0;

  take({ spectrum: { task, module }, choice, bytes }: Step): void {
    const own = this.allocation.get(task) ?? new Map<string, PrivateChoice>();
    this.allocation.set(task, own.set(module, choice));
    this.bytes += bytes;
  }
}

/** Spectra of each task, and its ‖ΔW‖². */
export function byTask(spectra: readonly Spectrum[]): Map<string, { own: Spectrum[]; square: number }> {
  const tasks = new Map<string, { own: Spectrum[]; square: number }>();
  for (const spectrum of spectra) {
    const task = tasks.get(spectrum.task) ?? { own: [], square: 0 };
    task.own.push(spectrum);
    task.square += spectrum.square;
    tasks.set(spectrum.task, task);
  }
  return tasks;
}

/** Steps of all spectra, the steepest first; those of one spectrum stay in their order, since hulls are convex. */
function descent(spectra: readonly Spectrum[], square: (of: Spectrum) => number, only?: readonly Dtype[]): Step[] {
  const steps = spectra.flatMap((spectrum) => hull(spectrum, square(spectrum), only));
  return steps.sort((a, b) => b.slope - a.slope);
}

/** The lower convex hull of the choices of one spectrum, from no term at all on. */
function hull(spectrum: Spectrum, square: number, only?: readonly Dtype[]): Step[] {
  const points: Point[] = [{ bytes: 0, lost: squares(spectrum.singular) }];
  for (const point of choices(spectrum, only)) {
    if (point.lost >= points.at(-1)!.lost) continue;
    while (points.length > 1 && steepness(points.at(-1)!, point) >= steepness(points.at(-2)!, points.at(-1)!))
      points.pop();
    points.push(point);
  }
  return points.slice(1).map((point, i) => {
    const before = points[i]!;
    const slope = steepness(before, point) / square;
    return {
      spectrum,
      choice: point.choice!,
      bytes: point.bytes - before.bytes,
      gain: before.lost - point.lost,
      slope,
    };
  });
}

/** What a choice takes, and the squared error that it leaves. */
interface Point {
  readonly choice?: PrivateChoice;
  readonly bytes: number;
  readonly lost: number;
}

/** Every rank in every number format, fewest bytes first. */
function choices({ singular, out, in: inputs }: Spectrum, only: readonly Dtype[] | undefined): Point[] {
  const points: Point[] = [];
  for (const [dtype, share] of ROUNDED) {
    if (only && !only.includes(dtype)) continue;
    let [left, along] = [squares(singular), 0];
    for (const [i, value] of singular.entries()) {
      if (!(value > 0)) break;
      left -= value ** 2;
      along += value;
      const rank = i + 1;
      const bytes = tensorBytes(dtype, rank, inputs) + tensorBytes(dtype, rank, out) + ENTRY_BYTES;
      points.push({ choice: { rank, dtype }, bytes, lost: Math.max(0, left) + (2 * share * along ** 2) / rank });
    }
  }
  return points.sort((a, b) => a.bytes - b.bytes || a.lost - b.lost);
}

/** Squared error saved per byte. */
function steepness(from: Point, to: Point): number {
  return (from.lost - to.lost) / (to.bytes - from.bytes);
}

function squares(values: readonly number[]): number {
  return values.reduce((total, value) => total + value ** 2, 0);
}

function sum(values: readonly number[]): number {
  return values.reduce((a, b) => a + b, 0);
}
