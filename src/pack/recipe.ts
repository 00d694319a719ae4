/**
 * The recipe of a pack: what is stored, for whom, and in which numbers. Plain data, made of options before any adapter
 * is read; `tasks.ts` makes task blobs of it, `build.ts` a pack.
 */

import type { BaseInput } from "../core/base.ts";
import { checkOptions } from "../errors.ts";
import { type ComponentSelection, checkRank, checkSelection, type ExtractOptions } from "../extract/components.ts";
import type { Dtype, Dtypes } from "../tensor/dtypes.ts";
import type { OnWork } from "../work.ts";

/** Options of packing. */
export interface BuildOptions {
  // Shared by all tasks.
  /**
   * Number of components; with k 0 each task is stored by itself. Default: those with 90 % of the squared singular
   * values, by module and side.
   */
  readonly select?: ComponentSelection | undefined;
  /**
   * Factorisation: factors are taken as they come, or rewritten as B = U·√S, A = √S·Vᵀ first. Default: "as-trained";
   * "balanced" with a rank, a step or k 0, which need it.
   */
  readonly gauge?: "as-trained" | "balanced" | undefined;
  /** "keep" subtracts the mean of the rows and stores it, "none" uses none. Default: "keep". */
  readonly centering?: "keep" | "none" | undefined;
  /** Every task counts alike when components are sought, however large its update is. Default: false. */
  readonly normalize?: boolean | undefined;

  // Stored for each task.
  /**
   * The most rank that a task keeps of each module, with gauge "balanced": the weakest directions of an adapter are
   * noise. Default: all.
   */
  readonly rank?: number | undefined;

  // Number formats, and the work itself.
  /** Default: f16 for each; with a `step` int8, and int4 for heads. */
  readonly dtype?: Partial<Dtypes> | undefined;
  /**
   * Entropy-coded integers for coefficients, components and residual rows. When an integer goes up by one, ΔW of its
   * module changes by this share of the typical norm of the adapter's ΔW. A step of 0.1 takes about two bits a number,
   * half of it one more. Default: the number formats of `dtype`.
   */
  readonly step?: number | undefined;
  /**
   * The same for heads: the step between their integers, as a share of the root mean square of the head's values.
   * Default: with a step 0.5, unless `dtype.head` is given.
   */
  readonly headStep?: number | undefined;
  /**
   * The base model, for fingerprints and an early check of names and shapes. Default: none, with a note in the report.
   */
  readonly base?: BaseInput | undefined;
  /** Accepts adapters that name different base models, for one model whose names end differently. Default: false. */
  readonly anyBase?: boolean | undefined;

  /**
   * Threads that extract modules in parallel, with the same result. Each holds one module's stack, and they take a
   * tenth of a second to start: for adapters of 100 MB and more. One where the platform starts none: they need Node,
   * Deno or Bun. Default: 1.
   */
  readonly workers?: number | undefined;
  /** Called as the work goes on, with the share that is done, in percent. */
  readonly onProgress?: OnWork | undefined;
  readonly signal?: AbortSignal | undefined;
}

const OPTIONS = [
  ...(["select", "gauge", "centering", "normalize", "rank", "dtype", "step", "headStep"] as const),
  ...(["base", "anyBase", "workers", "onProgress", "signal"] as const),
] as const;

/** Contents of a pack: of each module, and of each task. */
export interface Recipe {
  /**
   * Extraction of components, and the number formats of both; without `select` there are no components of all tasks.
   */
  readonly extraction: Omit<ExtractOptions, "steps" | "products">;
  /** Number format of residual rows. Default: integers with a step. */
  readonly rows?: Dtype | undefined;
  readonly head: HeadFormat;
  /**
   * Share of the typical norm of ΔW, which the pack says; undefined where number formats say how numbers are stored.
   */
  readonly step?: number | undefined;
  /** The largest share of ΔW that a task may lose, stored in the pack for later tasks. */
  readonly error?: number | undefined;
}

/** Number format of saved matrices. */
export interface HeadFormat {
  readonly type: Dtype;
  /** Step between integers, as a share of a matrix's root mean square. Default: as `type` says. */
  readonly step?: number | undefined;
}

/** The largest step that a pack may say. */
export const MOST_STEP = 16;
/** Step of heads, in the unit of `headStep`: about three bits a number. */
const HEAD_STEP = 0.5;

/** f16 where nothing else is asked for. */
export function completeDtypes({ basis = "f16", coefficients = "f16", head = "f16" }: Partial<Dtypes> = {}): Dtypes {
  return { basis, coefficients, head };
}

/** @throws RangeError for options that do not go together; TypeError for one that is not known */
export function recipeOf(options: BuildOptions): Recipe {
  checkOptions("buildPack", options, OPTIONS);
  const { select = { kind: "energy", share: 0.9 }, centering = "keep", rank, normalize, dtype, step } = options;
  const isAlone = select.kind === "k" && select.k === 0;
  const needsBalance = rank !== undefined || step !== undefined || isAlone;
  const { gauge = needsBalance ? "balanced" : "as-trained" } = options;
  const { headStep = step === undefined || dtype?.head ? undefined : HEAD_STEP } = options;
  checkStep("step", step);
  checkStep("headStep", options.headStep);
  checkRank({ gauge, rank });
  if (!isAlone) checkSelection(select);
  if (isAlone && gauge !== "balanced") throw new RangeError("k 0: tasks without components need gauge balanced");
  // Coefficients with a step are integers, made smaller later where they fit.
  const { basis, coefficients, head }: Dtypes = step
    ? { head: "int4", ...dtype, basis: "int8", coefficients: "int8" }
    : completeDtypes(dtype);
  const extraction = { gauge, rank, centering, normalize, basisDtype: basis, coefficientDtype: coefficients };
  const rows = step === undefined ? coefficients : undefined;
  return {
    extraction: isAlone ? extraction : { ...extraction, select },
    rows,
    head: { type: head, step: headStep },
    step,
  };
}

/** @throws RangeError for a step that is no share */
function checkStep(name: string, step: number | undefined): void {
  if (step === undefined || (step > 0 && step <= MOST_STEP)) return;
  throw new RangeError(`${name} must be above 0 and at most ${MOST_STEP}, got ${step}`);
}
