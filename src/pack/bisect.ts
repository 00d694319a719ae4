/**
 * Searches along one number that bytes and behaviour mostly grow with. They know nothing of packs.
 */

/** A goal that one way of packing does not reach. */
export class Unreachable extends RangeError {
  /** Bytes of the smallest pack, where those allowed are too few. */
  readonly least: number | undefined;

  constructor(message: string, { least, cause }: { least?: number | undefined; cause?: unknown } = {}) {
    super(message, { cause });
    this.least = least;
  }
}

function tooFew(max: number, least: number): Unreachable {
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
/** So full is full enough. */
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

/** How many of `count` come before the first of which `holds` is true, if it holds for all behind that one too. */
export async function partition(count: number, holds: (i: number) => Promise<boolean>): Promise<number> {
  let [low, high] = [0, count];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (await holds(middle)) high = middle;
    else low = middle + 1;
  }
  return low;
}
