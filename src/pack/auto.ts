/**
 * The smallest pack for a criterion, or the best of a size. One way of packing has one number that bytes grow with: components, or
 * the private terms of tasks that share nothing. This file finds that number for a budget, and tries several ways.
 */
import type { Adapter } from "../adapters/adapter.ts";
import { type BuildOptions, type BuildReport, buildPack, type Dtypes } from "./build.ts";

/** What a pack must keep to. */
export type Criterion =
  /** Of the whole file, at most. */
  | { readonly kind: "bytes"; readonly max: number }
  /** ‖ΔW − ΔW'‖ / ‖ΔW‖ of every task and module, at most. */
  | { readonly kind: "error"; readonly max: number }
  /** Mean over tasks of what `judge` says, at most. */
  | { readonly kind: "divergence"; readonly max: number };

/** A pack as it is built. */
export interface Built {
  readonly chunks: Uint8Array[];
  readonly report: BuildReport;
}

/** How much a pack's behaviour differs from its adapters', mean over tasks: 0 is alike. */
export type Judge = (pack: Blob) => Promise<number>;

export interface AutoOptions
  extends Omit<BuildOptions, "mode" | "gauge" | "select" | "rank" | "privateTerms" | "onProgress"> {
  readonly criterion: Criterion;
  /** Which of two packs is better is decided by this where it is there, by the mean ΔW error otherwise. `createJudge` of `eigenlora/train` makes one. */
  readonly judge?: Judge | undefined;
  /** Called when a way has been tried. */
  readonly onProgress?: ((done: number, of: number, tried: Tried) => void) | undefined;
}

/** A way of packing and what came of it. */
export interface Tried {
  readonly name: string;
  /** Undefined where the criterion is out of its reach. */
  readonly bytes?: number;
  /** Mean ΔW error. */
  readonly error?: number;
  readonly divergence?: number;
  /** Why there is no pack. */
  readonly reason?: string;
}

export interface AutoReport extends BuildReport {
  readonly judgedBy: "divergence" | "error";
  /** What `judge` says of the pack. */
  readonly divergence?: number;
  readonly tried: Tried[];
}

interface Judged extends Built {
  readonly divergence?: number | undefined;
}

/** Everything but how many components. */
interface Way extends Pick<BuildOptions, "mode" | "gauge" | "rank" | "privateTerms" | "moments" | "dtype"> {
  readonly name: string;
  /** No components: what grows is the number of private terms. */
  readonly k?: 0 | undefined;
}

const MOST_COMPONENTS = 65_535;

/**
 * The largest pack of one way that is no larger than `max` bytes: of as many components on every side as there is room for, or,
 * with `k` 0, of those private terms that hold most of their ΔW.
 * @throws RangeError naming the least that this way can do
 */
export async function packWithin(
  adapters: readonly Adapter[],
  options: Omit<BuildOptions, "select">,
  max: number,
  k?: 0,
): Promise<Built> {
  const sizeOf = ({ report: { bytes } }: Built): number => bytes;
  if (k === undefined)
    return grow(
      (n) => buildPack(adapters, { ...options, select: { kind: "k", k: n } }),
      sizeOf,
      max,
      limitOf(adapters, options),
    );
  const build = (privateShare: number): Promise<Built> =>
    buildPack(adapters, {
      ...options,
      privateTerms: limitOf(adapters, options, k),
      privateShare,
      select: { kind: "k", k },
    });
  return sharpen(build, sizeOf, max);
}

/** Shares of ‖ΔW‖² below which a private term is noise, and above which few are left. */
const [LEAST_SHARE, MOST_SHARE] = [2 ** -24, 0.999];

/** The smallest share whose bytes stay within `max`, to half a percent of them; bytes shrink as it grows. */
async function sharpen<T>(build: (share: number) => Promise<T>, sizeOf: (made: T) => number, max: number): Promise<T> {
  const all = await build(LEAST_SHARE);
  if (sizeOf(all) <= max) return all;
  let found = await build(MOST_SHARE);
  if (sizeOf(found) > max) throw new RangeError(`${max} bytes are too few: the least is ${sizeOf(found)}`);
  let [low, high] = [LEAST_SHARE, MOST_SHARE];
  while (sizeOf(found) < 0.995 * max && high > 1.001 * low) {
    const middle = Math.sqrt(low * high);
    const made = await build(middle);
    if (sizeOf(made) <= max) [high, found] = [middle, made];
    else low = middle;
  }
  return found;
}

/** Components or private terms that there can be at most. */
export function limitOf(
  adapters: readonly Adapter[],
  { mode, centering, rank: kept = Infinity }: Omit<BuildOptions, "select">,
  k?: 0,
): number {
  const modules = adapters.flatMap(({ modules }) => [...modules.values()]);
  if (k === 0) return Math.max(...modules.map(({ rank }) => rank));
  if (mode === "flat") return Math.max(1, adapters.length - (centering === "none" ? 0 : 1));
  const rows = new Map<string, number>();
  for (const { name, rank } of modules) rows.set(name, (rows.get(name) ?? 0) + Math.min(rank, kept));
  const least = modules.map((module) => Math.min(rows.get(module.name)!, Math.max(module.in, module.out)));
  return Math.min(MOST_COMPONENTS, Math.max(...least));
}

/** The most of something whose bytes stay within `max`; they grow with it nearly in a line. */
async function grow<T>(
  build: (n: number) => Promise<T>,
  sizeOf: (made: T) => number,
  max: number,
  most: number,
): Promise<T> {
  let low = { n: 1, made: await build(1) };
  const least = sizeOf(low.made);
  if (least > max) throw new RangeError(`${max} bytes are too few: the least is ${least}`);
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

/**
 * Tries column mode as trained and balanced with less and less rank, joint and flat mode, private terms beside components and
 * alone, in several number formats unless `types` says which, and gives the smallest pack that keeps to the criterion; with a
 * budget of bytes the best that fits.
 * @throws RangeError when no way keeps to it, with the least that can be done
 */
export async function buildAuto(
  adapters: readonly Adapter[],
  options: AutoOptions,
): Promise<{ chunks: Uint8Array[]; report: AutoReport }> {
  if (adapters.length === 0) throw new RangeError("buildAuto: no adapters");
  const { criterion, judge, onProgress, ...rest } = options;
  if (!(criterion.max > 0)) throw new RangeError(`${criterion.kind}: expected a number above 0, got ${criterion.max}`);
  if (criterion.kind === "divergence" && !judge) throw new RangeError("divergence: needs a judge, a model and text");
  const { moments, ...common } = rest;
  if (moments && !judge)
    throw new RangeError(
      "moments: errors with and without them do not compare; give a judge, or a mode of its own to buildPack",
    );
  const shapes = shapesFor(adapters, rest.dtype, moments, criterion);
  const of = shapes.reduce((sum, ways) => sum + ways.length, 0);
  const tried: Tried[] = [];
  let done = 0;
  let best: Judged | undefined;
  for (const ways of shapes) {
    let before: Judged | undefined;
    for (const [i, { name, k, ...how }] of ways.entries()) {
      const made = await attempt(() => one(adapters, { ...common, ...how }, k, criterion, judge));
      const note = made instanceof RangeError ? { name, reason: made.message } : noteOf(name, made);
      tried.push(note);
      onProgress?.(++done, of, note);
      if (made instanceof RangeError) continue;
      if (!best || better(made, best, criterion)) best = made;
      // Once more bits have made it worse, still more bits do too.
      if (before && better(before, made, criterion)) {
        done += ways.length - 1 - i;
        break;
      }
      before = made;
    }
  }
  if (!best)
    throw new RangeError(
      `${criterion.kind} ${criterion.max}: out of reach of every way of packing. ${closest(tried, criterion)}`,
    );
  const { divergence, chunks, report } = best;
  return {
    chunks,
    report: {
      ...report,
      judgedBy: judge ? "divergence" : "error",
      ...(divergence === undefined ? {} : { divergence }),
      tried,
    },
  };
}

/** One way at its best. */
async function one(
  adapters: readonly Adapter[],
  options: BuildOptions,
  k: 0 | undefined,
  criterion: Criterion,
  judge: Judge | undefined,
): Promise<Judged> {
  const judged = async (built: Built): Promise<Judged> => {
    return { ...built, divergence: judge && (await judge(new Blob(built.chunks as BlobPart[]))) };
  };
  if (criterion.kind === "bytes") return judged(await packWithin(adapters, options, criterion.max, k));
  if (criterion.kind === "error") {
    const select = { kind: "error", max: criterion.max } as const;
    return judged(await buildPack(adapters, { ...options, select }));
  }
  const most = limitOf(adapters, options, k);
  const build = async (n: number): Promise<Judged> =>
    judged(
      await buildPack(
        adapters,
        k === 0
          ? { ...options, privateTerms: n, select: { kind: "k", k } }
          : { ...options, select: { kind: "k", k: n } },
      ),
    );
  // Behaviour gets better with more of it, but not with every one more: doubled until it is good, then halved.
  let [low, high, found] = [0, 1, await build(1)];
  while (found.divergence! > criterion.max) {
    if (high >= most) throw new RangeError(`a divergence of ${found.divergence!.toPrecision(3)} is the least`);
    [low, high] = [high, Math.min(2 * high, most)];
    found = await build(high);
  }
  while (high - low > Math.max(1, high >> 4)) {
    const middle = (low + high) >> 1;
    const next = await build(middle);
    if (next.divergence! <= criterion.max) [high, found] = [middle, next];
    else low = middle;
  }
  return found;
}

function noteOf(name: string, { report: { bytes, error }, divergence }: Judged): Tried {
  return { name, bytes, error: error.mean, ...(divergence === undefined ? {} : { divergence }) };
}

async function attempt<T>(work: () => Promise<T>): Promise<T | RangeError> {
  try {
    return await work();
  } catch (error) {
    if (error instanceof RangeError) return error;
    throw error;
  }
}

function better(one: Judged, other: Judged, { kind }: Criterion): boolean {
  const cost = ({ report, divergence }: Judged): [number, number] => {
    const loss = divergence ?? report.error.mean;
    return kind === "bytes" ? [loss, report.bytes] : [report.bytes, loss];
  };
  const [a, b] = [cost(one), cost(other)];
  return a[0] !== b[0] ? a[0] < b[0] : a[1] < b[1];
}

function closest(tried: readonly Tried[], { kind }: Criterion): string {
  const reasons = tried.map(({ name, reason }) => ({
    name,
    reason: reason ?? "",
    figure: Number(/least is (\d+)/.exec(reason ?? "")?.[1] ?? NaN),
  }));
  const least =
    reasons.filter(({ figure }) => kind === "bytes" && figure > 0).sort((a, b) => a.figure - b.figure)[0] ??
    reasons[0]!;
  return kind === "bytes" ? `The least is ${least.figure} bytes (${least.name})` : `${least.name}: ${least.reason}`;
}

/** A head needs more bits than what it reads. */
const HEADS = { int3: "int4", int4: "int4", int8: "int8", f16: "f16" } as const;

/** Which ways are worth trying: of each shape the number formats, fewest bits first. */
function shapesFor(
  adapters: readonly Adapter[],
  fixed: Partial<Dtypes> = {},
  moments: BuildOptions["moments"],
  { kind }: Criterion,
): Way[][] {
  const whole = Math.max(...adapters.flatMap(({ modules }) => [...modules.values()].map(({ rank }) => rank)));
  const half = Math.ceil(whole / 2);
  const shape = (name: string, way: Omit<Way, "name" | "dtype">): Way[] => {
    if (fixed.basis || fixed.coefficients) return [{ name, ...way, dtype: fixed }];
    return Object.entries(HEADS).map(([type, head]) => {
      const basis = type as keyof typeof HEADS;
      return { name: `${name}, ${basis}`, ...way, types: { basis, coefficients: basis, head: fixed.head ?? head } };
    });
  };
  const gauge = "balanced";
  const alone = shape("private terms alone", { gauge, privateTerms: whole, k: 0 });
  if (adapters.length === 1) return [alone];
  return [
    shape("column, as trained", {}),
    ...[...new Set([whole, half, Math.ceil((3 * whole) / 8)])].map((rank) =>
      shape(`column, balanced, rank ${rank}`, { gauge, rank }),
    ),
    // With moments an error is another one, which does not compare.
    ...(moments && kind !== "error"
      ? [shape(`column, balanced, rank ${half}, calibrated`, { gauge, rank: half, moments })]
      : []),
    shape(`joint, rank ${half}`, { mode: "joint", gauge, rank: half }),
    ...(adapters.length > 2 ? [shape("flat, balanced", { mode: "flat", gauge })] : []),
    shape(`column, balanced, rank ${half}, private terms`, {
      gauge,
      rank: half,
      privateTerms: kind === "error" ? whole : 1,
    }),
    alone,
  ];
}
