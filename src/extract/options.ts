/**
 * How one module is extracted: what the caller chooses, and the checks of it.
 */
import type { Dtype } from "../tensor/dtypes.ts";
import type { Products } from "./linalg.ts";

/** What has coefficients of its own: a row of a factor, or a whole factor. */
export type BasisMode = "column" | "flat";

/**
 * Whether factors are taken as they come or rewritten as B = U·√S, A = √S·Vᵀ first. Flat mode also turns
 * balanced pairs towards their mean, where it is kept.
 */
export type Gauge = "as-trained" | "balanced";

/** Whether the mean of the rows is subtracted and stored, or not used at all. */
export type Centering = "keep" | "none";

/** How many components a side keeps, never more than its numerical rank: `k` that many; `energy` the fewest with that share of the squared singular values, 1 for all of them. */
export type ComponentSelection =
  | { readonly kind: "k"; readonly k: number }
  | { readonly kind: "energy"; readonly share: number };

/** How the components of one module are found. */
export interface ExtractOptions {
  /** Default: "column". */
  readonly mode?: BasisMode;
  readonly gauge: Gauge;
  /** The most rows that a task keeps of each module, its strongest directions: balanced gauge only, not in flat mode. Default: all. */
  readonly rank?: number | undefined;
  readonly centering: Centering;
  /**
   * Whether every task counts alike when components are sought, however large its update is: one a thousand times larger than the
   * others would have them to itself. Default: false.
   */
  readonly normalize?: boolean | undefined;
  readonly select: ComponentSelection;
  readonly basisDtype: Dtype;
  readonly coefficientDtype: Dtype;
  /**
   * Steps, one for each member of a stack: how much ΔW changes from one integer of a coefficient, a component or a private term to
   * the next. All are then integers with steps that make them equally coarse for ΔW, whatever the types say: coefficients int8, components
   * as many bits as they need. Column mode.
   */
  readonly steps?: readonly number[] | undefined;
  /** What multiplies large matrices: half the time of an extraction is spent there. Default: the plain loops. */
  readonly products?: Products | undefined;
}

/** How an adapter is brought onto a basis. */
export interface ProjectOptions extends Pick<ExtractOptions, "gauge" | "coefficientDtype" | "rank"> {
  /** The adapter's step, see `steps`. */
  readonly step?: number | undefined;
}

/** How many components a selection asks for, or what says so, given the singular values. */
export function wanted({
  select,
}: Pick<ExtractOptions, "select">): number | ((singular: Float64Array, total: number) => number) {
  if (select.kind === "k") return select.k;
  if (select.share === 1) return (singular) => singular.length;
  return (singular, total) => {
    let held = 0;
    let k = 0;
    while (k < singular.length && held < select.share * total) held += singular[k++]! ** 2;
    return k;
  };
}

/** @throws RangeError for a rank that cannot be kept */
export function checkRank({ rank, gauge, mode }: Pick<ExtractOptions, "rank" | "gauge" | "mode">): void {
  if (rank === undefined) return;
  if (!(Number.isInteger(rank) && rank >= 1 && rank <= 65_535))
    throw new RangeError(`rank must be a whole number from 1 to 65535, got ${rank}`);
  if (gauge !== "balanced")
    throw new RangeError("rank: only a balanced pair has its strongest directions first; take gauge balanced");
  if (mode === "flat") throw new RangeError("rank: flat mode keeps whole factors; take column mode");
}

/** @throws RangeError for steps where they mean nothing */
export function checkSteps({ steps, mode }: Pick<ExtractOptions, "steps" | "mode">): void {
  if (!steps) return;
  if (mode === "flat") throw new RangeError("step: flat mode has one vector of coefficients; take column mode");
}

/** @throws RangeError for a number out of range */
export function checkSelection(select: ComponentSelection): void {
  const { kind }: { readonly kind: string } = select;
  if (kind !== "k" && kind !== "energy")
    throw new RangeError(`select.kind must be "k" or "energy", got "${kind}"; for an error or a size take searchPack`);
  if (select.kind === "k" && !(Number.isInteger(select.k) && select.k >= 1)) {
    throw new RangeError(`select.k must be a whole number from 1, got ${select.k}`);
  }
  if (select.kind === "energy" && !(select.share > 0 && select.share <= 1)) {
    throw new RangeError(`select.share must be above 0 and at most 1, got ${select.share}`);
  }
}
