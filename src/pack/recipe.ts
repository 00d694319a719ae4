/**
 * The recipe of a pack: what is stored, for whom, and in which numbers. Plain data, made of options before any adapter is read;
 * `encode.ts` makes sections of it, `write.ts` a pack.
 */
import { checkChoice, checkOptions } from "../arguments.ts";
import type { BaseInput } from "../core/base.ts";
import type { Allocation } from "../extract/allocation.ts";
import type { BasisMode, ComponentSelection, ExtractOptions } from "../extract/options.ts";
import type { SharedSides } from "../extract/sides.ts";
import type { Dtypes } from "../tensor/dtypes.ts";
import type { OnWork } from "../work.ts";

/** How adapters are packed. */
export interface BuildOptions {
  // What is shared.
  /**
   * "column": every row of a factor has coefficients of its own. "flat": one vector of coefficients for each factor, so
   * that a task is much smaller and the components are larger; there are fewer components than tasks. Default: "column".
   */
  readonly mode?: "column" | "flat" | undefined;
  /**
   * Whether factors are taken as they come or rewritten as B = U·√S, A = √S·Vᵀ first. Flat mode also turns balanced pairs towards
   * their mean, where it is kept. Default: "as-trained".
   */
  readonly gauge?: "as-trained" | "balanced" | undefined;
  /** Whether the mean of the rows is subtracted and stored, or not used at all. Default: "keep". */
  readonly centering?: "keep" | "none" | undefined;
  /** How many components. Default: those with 90 % of the squared singular values, by module and side. */
  readonly select?: ComponentSelection | undefined;
  /** Every task counts alike when components are sought, however large its update is. Default: false. */
  readonly normalize?: boolean | undefined;

  // What each task has.
  /** The most rank that a task keeps of each module, with gauge "balanced": the weakest directions of an adapter are noise. Default: all. */
  readonly rank?: number | undefined;
  /**
   * Rank-1 terms that each task has to itself in every module, with gauge "balanced", beside the components or, with `select` k 0,
   * instead of them. Or how many, and their number format, by task and module (`searchPack` finds that). Default: 0.
   */
  readonly privateTerms?: number | Allocation | undefined;

  // How it is written.
  /** Default: f16 for each. */
  readonly dtype?: Partial<Dtypes> | undefined;
  /**
   * Entropy-coded integers for coefficients, components and private terms. When an integer goes up by one, ΔW of its module changes by
   * this share of the typical norm of the adapter's ΔW. A step of 0.1 takes about two bits a number, half of it one more. Needs column
   * mode. Default: the number formats of `dtype`.
   */
  readonly step?: number | undefined;
  /**
   * The same for heads: the step between their integers, as a share of the root mean square of the head's values. Default: with a
   * step 0.5, unless `dtype.head` is given.
   */
  readonly headStep?: number | undefined;
  /** The base model, for fingerprints and an early check of names and shapes. Default: none, with a note in the report. */
  readonly base?: BaseInput | undefined;
  /** Take adapters that name different base models: other names for one, which do not share the end of. Default: false. */
  readonly anyBase?: boolean | undefined;

  /**
   * Threads that extract modules beside each other, with the same result. Each holds one module's stack, and they take a tenth of a
   * second to start: for adapters of 100 MB and more. One where the platform starts none: they need Node, Deno or Bun. Default: 1.
   */
  readonly workers?: number | undefined;
  /** Called as the work goes on, with the share that is done, in percent. */
  readonly onProgress?: OnWork | undefined;
  readonly signal?: AbortSignal | undefined;
}

const OPTIONS = [
  "mode",
  "gauge",
  "centering",
  "select",
  "normalize",
  "rank",
  "privateTerms",
  "dtype",
  "step",
  "headStep",
  "base",
  "anyBase",
  "workers",
  "onProgress",
  "signal",
] as const;

/** What is stored of each module, and of each task. */
export interface Recipe {
  /** How the components of each module are found, and in which numbers they and coefficients are stored. */
  readonly extraction: Omit<ExtractOptions, "steps" | "products"> & { readonly mode: BasisMode };
  readonly privateTerms: number | Allocation;
  /** Bases that are made already, and who takes which, by module. Default: none. */
  readonly sides?: ReadonlyMap<string, SharedSides> | undefined;
  readonly head: HeadFormat;
  /** Share of the typical norm of ΔW, which the pack says; undefined where number formats say how numbers are stored. */
  readonly step?: number | undefined;
  /** Steps of ΔW by task id. Default: as `step` says. */
  readonly steps?: ReadonlyMap<string, number> | undefined;
  /** The share of ΔW that no task may lose. The pack says it, for tasks that come later. */
  readonly error?: number | undefined;
}

/** How saved matrices are stored. */
export interface HeadFormat {
  readonly type: Dtypes["head"];
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
export function recipeOf(adapters: readonly unknown[], options: BuildOptions): Recipe {
  checkOptions("buildPack", options, OPTIONS);
  const { mode = "column", gauge = "as-trained", select = { kind: "energy", share: 0.9 }, dtype, step } = options;
  const { centering = "keep", rank, normalize, privateTerms = 0 } = options;
  const { headStep = step === undefined || dtype?.head ? undefined : HEAD_STEP } = options;
  checkStep("step", step);
  checkStep("headStep", options.headStep);
  checkChoice("buildPack: mode", mode, ["column", "flat"]);
  if (mode === "flat") checkFlat(select, adapters.length, centering);
  // Coefficients with a step are integers, made smaller later where they fit.
  const { basis, coefficients, head }: Dtypes = step
    ? { head: "int4", ...dtype, basis: "int8", coefficients: "int8" }
    : completeDtypes(dtype);
  const dtypes = { basisDtype: basis, coefficientDtype: coefficients };
  const extraction = { mode, gauge, rank, centering, normalize, select, ...dtypes };
  return { extraction, privateTerms, head: { type: head, step: headStep }, step };
}

/** @throws RangeError for a step that is no share */
function checkStep(name: string, step: number | undefined): void {
  if (step === undefined || (step > 0 && step <= MOST_STEP)) return;
  throw new RangeError(`${name} must be above 0 and at most ${MOST_STEP}, got ${step}`);
}

/** N tasks are N vectors in flat mode, and one dimension of them is the mean. */
function checkFlat(select: ComponentSelection, tasks: number, centering: "keep" | "none"): void {
  const most = tasks - (centering === "keep" ? 1 : 0);
  if (select.kind !== "k" || select.k <= most) return;
  const beside = centering === "keep" ? " beside the mean" : "";
  throw new RangeError(
    `${select.k} components: flat mode has at most ${most}${beside} for ${tasks} adapters; ask for fewer, or take mode "column"`,
  );
}
