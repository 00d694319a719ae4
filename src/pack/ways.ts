/**
 * Ways of packing: everything that a search varies but how many components there are, or private terms where nothing is shared.
 */
import type { Adapter } from "../adapters/adapter.ts";
import type { Dtype, Dtypes } from "../tensor/dtypes.ts";
import type { BuildOptions } from "./build.ts";

/** A way of packing. Its bytes grow with one number: of components, or of private terms. */
export interface Way extends Omit<BuildOptions, "select" | "base" | "anyBase" | "onProgress" | "signal"> {
  /** For reports. Default: what sets it apart. */
  readonly name?: string;
  /** Nothing is shared: what grows is the number of private terms. Takes gauge "balanced". Default: false. */
  readonly privateOnly?: boolean;
}

/** What a way is called in reports. */
export function nameOf({ name, mode = "column", gauge = "as-trained", rank, privateOnly, dtype }: Way): string {
  if (name !== undefined) return name;
  const kind = privateOnly ? "private terms alone" : mode;
  return [kind, gauge, rank && `rank ${rank}`, dtype?.basis].filter(Boolean).join(", ");
}

const MOST_COMPONENTS = 65_535;

/** Components or private terms that there can be at most. */
export function limitOf(
  adapters: readonly Adapter[],
  { mode, centering, rank: kept = Infinity, privateOnly }: Way,
): number {
  const modules = adapters.flatMap(({ modules }) => [...modules.values()]);
  if (privateOnly) return Math.max(...modules.map(({ rank }) => rank));
  if (mode === "flat") return Math.max(1, adapters.length - (centering === "none" ? 0 : 1));
  const rows = new Map<string, number>();
  for (const { name, rank } of modules) rows.set(name, (rows.get(name) ?? 0) + Math.min(rank, kept));
  const least = modules.map((module) => Math.min(rows.get(module.name)!, Math.max(module.in, module.out)));
  return Math.min(MOST_COMPONENTS, Math.max(...least));
}

/** One number format for everything. */
export function allOf(dtype: Dtype): Dtypes {
  return { basis: dtype, coefficients: dtype, head: dtype };
}

/** A head needs more bits than what it reads. */
const HEADS = { int3: "int4", int4: "int4", int8: "int8", f16: "f16" } as const;

/**
 * Which ways are worth trying: of each shape the number formats, fewest bits first.
 * @param fixed number formats that are not to be varied
 * @param moments adds a calibrated way
 */
export function waysFor(
  adapters: readonly Adapter[],
  fixed: Partial<Dtypes>,
  moments: Way["moments"],
  goal: "bytes" | "error" | "divergence" | "score",
): Way[][] {
  if (goal === "score")
    return (["int4", "int8", "f16"] as const).map((dtype) => [{ dtype: { ...allOf(dtype), ...fixed } }]);
  const error = goal === "error";
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
  const alone = shape("private terms alone", { gauge, privateOnly: true });
  if (adapters.length === 1) return [alone];
  return [
    shape("column, as trained", {}),
    ...[...new Set([whole, half, Math.ceil((3 * whole) / 8)])].map((rank) =>
      shape(`column, balanced, rank ${rank}`, { gauge, rank }),
    ),
    // With moments an error is another one, which does not compare.
    ...(moments && !error ? [shape(`column, balanced, rank ${half}, calibrated`, { gauge, rank: half, moments })] : []),
    shape(`joint, rank ${half}`, { mode: "joint", gauge, rank: half }),
    ...(adapters.length > 2 ? [shape("flat, balanced", { mode: "flat", gauge })] : []),
    shape(`column, balanced, rank ${half}, private terms`, { gauge, rank: half, privateTerms: error ? whole : 1 }),
    alone,
  ];
}
