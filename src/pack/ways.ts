/**
 * Ways of packing: everything that a search varies but how much is stored. Each is of a kind (`KINDS`), which makes its packs; a new kind
 * is added here and nowhere else.
 */
import type { Adapter } from "../adapters/adapter.ts";
import { type Allocation, byTask, type Spectrum } from "../extract/allocation.ts";
import type { ComponentSelection } from "../extract/options.ts";
import type { Dtype, Dtypes } from "../tensor/dtypes.ts";
import { ROUND } from "../work.ts";
import { type Survey, withinBytes, withinError } from "./allocate.ts";
import { Draft, EXTRACTING, type Seek, type Streamed, write, writeApart } from "./build.ts";
import { type Adapters, encode, partOf } from "./encode.ts";
import { type BuildOptions, MOST_STEP, type Recipe, recipeOf } from "./recipe.ts";
import type { TaskLoss } from "./report.ts";
import { grow, refine, type Steps, startSteps, stepsWithin, Unreachable } from "./seek.ts";
import { findSharing } from "./sharing.ts";
import { stepsOf } from "./tasks.ts";
import type { Scratch } from "./write.ts";

/** A way of packing. Its bytes grow with one number: of components, or of private terms. */
export interface Way extends Omit<BuildOptions, "select" | "base" | "anyBase" | "workers" | "onProgress" | "signal"> {
  /** Its name in reports. Default: what sets it apart. */
  readonly name?: string;
  /**
   * What grows with its bytes. "terms": private terms, as many and in as many bits as each task and module is worth. "steps": steps get
   * finer, every number has as many bits as it is worth, and what tasks share of a side is stored once where that saves bytes. Both in
   * gauge "balanced". Default: components.
   */
  readonly grows?: "terms" | "steps";
  /** It is tried only if none before it reached the goal. Default: false. */
  readonly fallback?: boolean;
}

/** What a search lends to ways of packing. */
export interface Lent extends Pick<BuildOptions, "dtype" | "centering" | "normalize"> {
  readonly opened: Adapters;
  /** Takes blobs of the pack that is wanted. Default: memory. */
  readonly scratch?: Scratch | undefined;
  /** What private terms are to hold. @param opened the adapters of the search, with what is told of them by now */
  survey(opened: Adapters): Promise<Survey>;
}

/** Lends the next share of the work to one of the packs that are made to find the best. @param share of what is left to do */
export function trying<L extends Lent>(lent: L, share: number = ROUND): L {
  return { ...lent, opened: partOf(lent.opened, share) };
}

/** How long a way takes, with private terms alone as 1, where a search has several; fallbacks are seldom needed. */
export function costOf({ grows, fallback }: Way): number {
  return fallback ? 0 : grows === "steps" ? 8 : 1;
}

/** A kind of way: how packs of it are made, and what their bytes grow with. */
interface Kind {
  is(way: Way): boolean;
  nameOf(way: Way): string;
  /** Amounts to show to a judge of scores. @param given what the search says of it */
  ladder(
    adapters: readonly Adapter[],
    way: Way,
    given: readonly ComponentSelection[] | undefined,
  ): readonly ComponentSelection[];
  /** @throws Unreachable */
  make(lent: Lent, way: Way, amount: ComponentSelection): Promise<Streamed>;
  /** The best pack of at most `max` bytes. @throws Unreachable */
  within(lent: Lent, way: Way, max: number): Promise<Streamed>;
}

const sizeOf = ({ report: { bytes } }: Streamed): number => bytes;

/** A recipe's options of a way. */
function optionsOf({ name, fallback, grows, ...options }: Way): BuildOptions {
  return options;
}

/** Components grow. */
const COMPONENTS: Kind = {
  is: () => true,
  nameOf: ({ mode = "column", gauge = "as-trained", rank, step, dtype }) =>
    [mode, gauge, rank && `rank ${rank}`, step ? `step ${step}` : dtype?.basis].filter(Boolean).join(", "),
  ladder: (adapters, way, given) => given ?? ladderOf(mostComponents(adapters, way)),
  make: (lent, way, select) => plainPack(lent, { ...lentOptions(lent), ...optionsOf(way), select }),
  within(lent, way, max) {
    const made = (k: number): Promise<Streamed> => this.make(trying(lent), way, { kind: "k", k });
    return grow(made, sizeOf, max, mostComponents(lent.opened.adapters, way));
  },
};

const MOST_COMPONENTS = 65_535;

function mostComponents(adapters: readonly Adapter[], { mode, centering, rank: kept = Infinity }: Way): number {
  const modules = adapters.flatMap((adapter) => [...adapter.modules.values()]);
  if (mode === "flat") return Math.max(1, adapters.length - (centering === "none" ? 0 : 1));
  const rows = new Map<string, number>();
  for (const { name, rank } of modules) rows.set(name, (rows.get(name) ?? 0) + Math.min(rank, kept));
  const least = modules.map((module) => Math.min(rows.get(module.name)!, Math.max(module.in, module.out)));
  return least.reduce((most, count) => Math.min(MOST_COMPONENTS, Math.max(most, count)), 0);
}

function lentOptions({ dtype, centering, normalize }: Lent): BuildOptions {
  return { dtype, centering, normalize };
}

/** The pack of a recipe, at once. @throws Unreachable for one that cannot be made */
async function plainPack({ opened }: Lent, options: BuildOptions): Promise<Streamed> {
  try {
    const recipe = recipeOf(opened.adapters, options);
    return await write(opened, recipe, await encode(partOf(opened, EXTRACTING), recipe));
  } catch (cause) {
    throw cause instanceof RangeError ? new Unreachable(cause.message, { cause }) : cause;
  }
}

/** Errors that are tried where scores decide how much private terms hold. */
const ERRORS: readonly ComponentSelection[] = Array.from({ length: 12 }, (_, i) => ({
  kind: "error",
  max: 0.6 * 0.75 ** i,
}));

/** Private terms grow, in the number formats that each task and module is worth. */
const ALLOCATED: Kind = {
  is: ({ grows }) => grows === "terms",
  nameOf: () => "private terms alone",
  ladder: () => ERRORS,
  async make(lent, way, amount) {
    if (amount.kind !== "error")
      throw new Unreachable(`private terms are allocated for an error or a size, not for ${amount.kind}`);
    const { found, draft } = await allocating(lent, way, Math.min(1, amount.max));
    const encoded = (privateTerms: Allocation): Promise<readonly TaskLoss[]> => draft.encode({ privateTerms });
    await withinError(found, amount.max, encoded, (losses) => losses);
    await lent.opened.extractor.rest();
    return draft.write(lent.scratch);
  },
  async within(lent, way, max) {
    const { found, draft } = await allocating(lent, way);
    return withinBytes(found, max, async (privateTerms) => {
      await draft.encode({ privateTerms });
      return draft.write();
    });
  },
};

/** @param error that the pack's tasks keep to, and those added later */
async function allocating(lent: Lent, way: Way, error?: number): Promise<{ found: Survey; draft: Draft }> {
  const found = await lent.survey(lent.opened);
  const options: BuildOptions = {
    ...optionsOf(way),
    dtype: { ...way.dtype, ...lent.dtype },
    select: { kind: "k", k: 0 },
  };
  return { found, draft: new Draft(lent.opened, { ...recipeOf(lent.opened.adapters, options), error }) };
}

/** Steps get finer: every number has as many bits as it is worth, and what is shared is stored once. */
const CODED: Kind = {
  is: ({ grows }) => grows === "steps",
  nameOf: () => "each side shared where that pays, coded",
  ladder: (_, __, given) => given ?? ladderOf(STEPS),
  async make(lent, way, amount) {
    if (amount.kind === "error") return codedWithin(lent, way, amount.max);
    if (amount.kind !== "k") throw new Unreachable(`steps are sought for an error or a size, not for ${amount.kind}`);
    const { opened } = lent;
    // Each step is a thirty-second of an octave finer than the one before.
    const step = 2 ** (-amount.k / 32);
    const recipe = recipeOf(opened.adapters, codedOptions({ ...lentOptions(lent), ...optionsOf(way) }, step));
    const { spectra } = await lent.survey(opened);
    const { sides } = await findSharing(partOf(opened, SHARING), spectra, await stepsOf(opened.adapters, step));
    const whole = { ...recipe, sides };
    return write(opened, whole, await encode(partOf(opened, EXTRACTING), whole));
  },
  async within(lent, way, max) {
    const made = (k: number): Promise<Streamed> => this.make(trying(lent, 0.15), way, { kind: "k", k });
    const finest = await refine(made, sizeOf, max, STEPS);
    // A step so coarse that nothing is left of a task.
    const idle = finest.report.errors.find(({ total }) => total >= 1);
    if (idle) throw new Unreachable(`${max} bytes are too few: "${idle.id}" would do nothing`);
    return finest;
  },
};

/** Steps that are tried, from coarse to fine. */
const STEPS = 384;
/** The share of what is left that finding out what is shared takes. */
const SHARING = 0.4;
/** Private terms that a step may find worth their bytes. */
const MOST_PRIVATE = 255;

/** Options of a coded pack without components of all tasks. */
export function codedOptions(options: BuildOptions, step: number): BuildOptions {
  return { ...options, normalize: undefined, step, privateTerms: MOST_PRIVATE, select: { kind: "k", k: 0 } };
}

/** How far steps of earlier adapters move the first ones of later adapters, at most. */
const MOST_MOVED = 1.25;

/** The coded pack with the coarsest steps that keep every task within an error. @throws Unreachable */
async function codedWithin({ opened, dtype, scratch, survey }: Lent, way: Way, error: number): Promise<Streamed> {
  const { spectra } = await survey(opened);
  const { sides, steps: start } = await findSharing(partOf(opened, SHARING), spectra, startSteps(spectra, error), true);
  // What follows takes less at a time, and the pack grows beside it.
  await opened.extractor.rest();
  const options = codedOptions({ dtype, ...optionsOf(way) }, typicalStep(spectra, start));
  const recipe: Recipe = { ...recipeOf(opened.adapters, options), sides, error: Math.min(1, error) };
  // Adapters of one model are alike. Mean of the logarithm of found ÷ expected steps; later adapters begin at what they expect times that.
  let [moved, count] = [0, 0];
  const seek: Seek = async (some, encode) => {
    let last: Steps = new Map();
    const from = (factor: number): Promise<unknown> =>
      stepsWithin(
        new Map(some.map(({ id }) => [id, factor * (start.get(id) ?? 1)])),
        error,
        (steps) => encode((last = steps)),
        (losses) => losses,
      );
    const factor = Math.min(MOST_MOVED, Math.max(1 / MOST_MOVED, Math.exp(moved / (count || 1))));
    await from(factor).catch((failure) => {
      if (factor === 1 || !(failure instanceof Unreachable)) throw failure;
      return from(1);
    });
    for (const [id, step] of last) {
      const expected = start.get(id);
      if (expected === undefined) continue;
      moved += Math.log(step / expected);
      count++;
    }
  };
  return writeApart(opened, recipe, seek, scratch);
}

/** What steps are, in geometric mean, of the norm that ΔW of an adapter's modules typically has. */
function typicalStep(spectra: readonly Spectrum[], steps: ReadonlyMap<string, number>): number {
  const logs = [...byTask(spectra)].flatMap(([task, { own, square }]) =>
    square > 0 ? Math.log(steps.get(task)! / Math.sqrt(square / own.length)) : [],
  );
  return Math.min(MOST_STEP, Math.exp(logs.reduce((a, b) => a + b, 0) / (logs.length || 1)));
}

/** Each way is of the first kind that it is of. */
const KINDS: readonly Kind[] = [ALLOCATED, CODED, COMPONENTS];

export function kindOf(way: Way): Kind {
  return KINDS.find((kind) => kind.is(way))!;
}

/** What a way is called in reports. */
export function nameOf(way: Way): string {
  return way.name ?? kindOf(way).nameOf(way);
}

/** 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, … and the most that there can be. */
function ladderOf(most: number): ComponentSelection[] {
  const steps: number[] = [];
  for (let k = 1; k < most; k += Math.max(1, 2 ** (Math.floor(Math.log2(k)) - 2))) steps.push(k);
  return [...steps, most].map((k) => ({ kind: "k", k }));
}

/** One number format for everything. */
export function allOf(dtype: Dtype): Dtypes {
  return { basis: dtype, coefficients: dtype, head: dtype };
}

/** Private terms in the number formats that each task and module is worth. */
function allocatedWay(head: Dtype): Way {
  return { gauge: "balanced", grows: "terms", dtype: { ...allOf("int4"), head } };
}

/** Everything entropy-coded. @param head its number format. Default: coded as well */
function codedWay(head?: Dtype): Way {
  return { gauge: "balanced", grows: "steps", ...(head ? { dtype: { head } } : {}) };
}

/** The ways where scores decide. @param fixed number formats that are not to be varied */
export function scoredWays(fixed: Partial<Dtypes>): Way[] {
  return (["int4", "int8", "f16"] as const).map((dtype) => ({ dtype: { ...allOf(dtype), ...fixed } }));
}

/**
 * The ways where ΔW errors decide.
 * @param decisions takes what was decided, a sentence each
 */
export function defaultWays(
  { opened: { adapters }, dtype = {} }: Pick<Lent, "opened" | "dtype">,
  goal: { readonly kind: "error" | "bytes"; readonly max: number },
  decisions: string[],
): Way[] {
  const exact = goal.kind === "error";
  const head = dtype.head ?? (exact ? headWithin(goal.max) : headFor(adapters, goal.max));
  const coded = dtype.coefficients === undefined;
  if (adapters.some(({ saved }) => saved.some(({ shape }) => shape.length > 1)))
    decisions.push(`heads are stored in ${head}${exact || dtype.head || !coded ? "" : ", where they are not coded"}`);
  const alone = allocatedWay(head);
  if (!coded) return [alone];
  // Within an error integers with a step take fewer bytes wherever they reach it.
  return exact ? [codedWay(head), { ...alone, fallback: true }] : [alone, codedWay(dtype.head)];
}

/** Number format of heads that loses far less than `error` of them. */
function headWithin(error: number): Dtype {
  return error >= 0.01 ? "int8" : error >= 1e-3 ? "f16" : "f32";
}

/** The share of a file's bytes that heads may take in int8. */
const HEADS_SHARE = 0.1;

/** Number format of heads for a file of `max` bytes: int8 where they hardly count. */
function headFor(adapters: readonly Adapter[], max: number): Dtype {
  const matrices = adapters.flatMap(({ saved }) => saved.filter(({ shape }) => shape.length > 1));
  const bytes = matrices.reduce(
    (sum, { shape: [rows = 1, ...rest] }) => sum + rows * rest.reduce((a, b) => a * b, 1),
    0,
  );
  return bytes <= HEADS_SHARE * max ? "int8" : "int4";
}
