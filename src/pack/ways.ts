/**
 * Ways of packing: everything that a search varies but how many components there are, or private terms where nothing is shared.
 */
import type { Adapter } from "../adapters/adapter.ts";
import type { ComponentSelection } from "../extract/options.ts";
import type { Dtype, Dtypes } from "../tensor/dtypes.ts";
import type { Shared } from "./allocate.ts";
import type { BuildOptions } from "./build.ts";

/** A way of packing. Its bytes grow with one number: of components, or of private terms. */
export interface Way extends Omit<BuildOptions, "select" | "base" | "anyBase" | "workers" | "onProgress" | "signal"> {
  /** For reports. Default: what sets it apart. */
  readonly name?: string;
  /**
   * So many components are shared, 0 for none, and private terms grow: as many, in as many bits, as each task and module is worth.
   * Gauge "balanced". Default: components grow.
   */
  readonly allocateBeside?: number;
  /**
   * So many components are shared, 0 for none, beside private terms, and steps get finer: every number has as many bits as it is worth.
   * Gauge "balanced". Default: components grow.
   */
  readonly refineBeside?: number;
  /** It is tried only if none before it reached the goal. Default: false. */
  readonly fallback?: boolean;
}

/** What a way is called in reports. */
export function nameOf({ name, mode = "column", gauge = "as-trained", rank, step, dtype, ...way }: Way): string {
  if (name !== undefined) return name;
  const { allocateBeside: k, refineBeside: coded } = way;
  if (coded !== undefined)
    return coded === 0 ? "private terms alone, coded" : `${coded} components and private terms, coded`;
  if (k !== undefined) return k === 0 ? "private terms alone" : `${k} components and private terms`;
  return [mode, gauge, rank && `rank ${rank}`, step ? `step ${step}` : dtype?.basis].filter(Boolean).join(", ");
}

const MOST_COMPONENTS = 65_535;

/** Steps from coarse to fine: of each, the next is a thirty-second of an octave finer. */
const STEPS = 384;
/** Private terms that a step may find worth their bytes. */
const MOST_PRIVATE = 255;

/** A pack with private terms beside so many components, of the n-th step. */
export function refined(options: BuildOptions, shared: number, n: number): BuildOptions & CodedTerms {
  return codedOptions(options, shared, 2 ** (-n / 32));
}

/** Of a step. */
export function codedOptions(options: BuildOptions, shared: number, step: number): BuildOptions & CodedTerms {
  return { ...options, normalize: undefined, step, privateTerms: MOST_PRIVATE, select: { kind: "k", k: shared } };
}

interface CodedTerms {
  readonly step: number;
  readonly privateTerms: number;
}

/** Components, or steps, that there can be at most. */
export function limitOf(
  adapters: readonly Adapter[],
  { mode, centering, rank: kept = Infinity, refineBeside }: Way,
): number {
  if (refineBeside !== undefined) return STEPS;
  const modules = adapters.flatMap(({ modules }) => [...modules.values()]);
  if (mode === "flat") return Math.max(1, adapters.length - (centering === "none" ? 0 : 1));
  const rows = new Map<string, number>();
  for (const { name, rank } of modules) rows.set(name, (rows.get(name) ?? 0) + Math.min(rank, kept));
  const least = modules.map((module) => Math.min(rows.get(module.name)!, Math.max(module.in, module.out)));
  return Math.min(MOST_COMPONENTS, Math.max(...least));
}

/** 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, … and the most that there can be. */
export function ladderOf(most: number): ComponentSelection[] {
  const steps: number[] = [];
  for (let k = 1; k < most; k += Math.max(1, 2 ** (Math.floor(Math.log2(k)) - 2))) steps.push(k);
  return [...steps, most].map((k) => ({ kind: "k", k }));
}

/** One number format for everything. */
export function allOf(dtype: Dtype): Dtypes {
  return { basis: dtype, coefficients: dtype, head: dtype };
}

/** Private terms in the number formats that each task and module is worth, beside shared components or alone. */
export function allocatedWay(head: Dtype, shared?: Shared): Way {
  const { k, dtype } = shared ?? { k: 0, dtype: "int4" };
  return { gauge: "balanced", allocateBeside: k, dtype: { basis: dtype, coefficients: dtype, head } };
}

/** Private terms beside so many components, entropy-coded. @param head its number format. Default: coded as well */
export function codedWay(head?: Dtype, shared: number = 0): Way {
  return { gauge: "balanced", refineBeside: shared, ...(head ? { dtype: { head } } : {}) };
}

/** Number format of heads that loses far less than `error` of them. */
export function headWithin(error: number): Dtype {
  return error >= 0.01 ? "int8" : error >= 1e-3 ? "f16" : "f32";
}

/** Of a file of `max` bytes, what heads may take in int8. */
const HEADS_SHARE = 0.1;

/** The number format of heads for a file of so many bytes: int8 where they hardly count. */
export function headFor(adapters: readonly Adapter[], max: number): Dtype {
  const matrices = adapters.flatMap(({ saved }) => saved.filter(({ shape }) => shape.length > 1));
  const bytes = matrices.reduce(
    (sum, { shape: [rows = 1, ...rest] }) => sum + rows * rest.reduce((a, b) => a * b, 1),
    0,
  );
  return bytes <= HEADS_SHARE * max ? "int8" : "int4";
}

/** From few bits to many: more bits leave room for fewer components. */
const CODED_STEPS = [0.1, 0.07, 0.05, 0.035, 0.025, 0.017] as const;

/** A head needs more bits than what it reads. */
const HEADS = { int3: "int4", int4: "int4", int8: "int8", f16: "f16" } as const;

/**
 * Which ways are worth asking a judge about: of each shape the number formats, fewest bits first.
 * @param fixed number formats that are not to be varied
 * @param moments adds a calibrated way
 */
export function judgedWays(
  adapters: readonly Adapter[],
  fixed: Partial<Dtypes>,
  moments: Way["moments"],
  goal: "bytes" | "divergence" | "score",
): Way[][] {
  if (goal === "score")
    return (["int4", "int8", "f16"] as const).map((dtype) => [{ dtype: { ...allOf(dtype), ...fixed } }]);
  const whole = Math.max(...adapters.flatMap(({ modules }) => [...modules.values()].map(({ rank }) => rank)));
  const half = Math.ceil(whole / 2);
  const shape = (name: string, way: Way): Way[] => {
    if (fixed.basis || fixed.coefficients) return [{ name, ...way, dtype: fixed }];
    return (Object.keys(HEADS) as (keyof typeof HEADS)[]).map((basis) => ({
      name: `${name}, ${basis}`,
      ...way,
      dtype: { basis, coefficients: basis, head: fixed.head ?? HEADS[basis] },
    }));
  };
  const gauge = "balanced";
  const heads = fixed.head ? [fixed.head] : (["int4", "int8"] as const);
  const alone = heads.map((head) => ({ ...allocatedWay(head), name: `private terms alone, heads ${head}` }));
  const free = !fixed.basis && !fixed.coefficients;
  const head = fixed.head ? { dtype: { head: fixed.head } } : {};
  const coded: Way[] = free ? [codedWay(fixed.head)] : [];
  if (adapters.length === 1) return [alone, coded];
  const stepped = (rank: number): Way[] =>
    free
      ? CODED_STEPS.map((step) => ({
          name: `column, balanced, rank ${rank}, step ${step}`,
          gauge,
          rank,
          step,
          ...head,
        }))
      : [];
  return [
    alone,
    coded,
    stepped(half),
    stepped(Math.ceil((3 * whole) / 8)),
    shape("column, as trained", {}),
    ...[...new Set([whole, half, Math.ceil((3 * whole) / 8)])].map((rank) =>
      shape(`column, balanced, rank ${rank}`, { gauge, rank }),
    ),
    ...(moments ? [shape(`column, balanced, rank ${half}, calibrated`, { gauge, rank: half, moments })] : []),
    shape(`joint, rank ${half}`, { mode: "joint", gauge, rank: half }),
    ...(adapters.length > 2 ? [shape("flat, balanced", { mode: "flat", gauge })] : []),
  ];
}
