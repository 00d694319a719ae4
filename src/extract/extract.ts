/**
 * Extraction: the adapters of one module become two bases, stored once, and coefficients per task (paper, Algorithm 1).
 * Column mode gives each row of a factor coefficients of its own. Flat mode takes the whole factor as one vector.
 * Works on one module at a time, on arrays only: no files, no pack.
 */
import { storing } from "../tensor/encode.ts";
import { alignSigns, balance, leadingRows, mirror, type Pair, turnTogether } from "./gauge.ts";
import { scale } from "./linalg.ts";
import { checkRank, checkSelection, checkSteps, type ExtractOptions } from "./options.ts";
import {
  type ModuleMember,
  mirrors,
  openModule,
  type ProjectedTask,
  padded,
  projectTargets,
  toPairs,
} from "./project.ts";
import { componentSteps, type RowSteps, rowSteps } from "./row-steps.ts";
import { decompose, encodeSide, meanWeights, type Side, type SideBasis } from "./side.ts";
import { targetsOf } from "./subspace.ts";

/** All adapters that adapt one module. Ranks may differ. */
export interface ModuleStack {
  name: string;
  out: number;
  in: number;
  members: readonly ModuleMember[];
}

/** Everything a pack stores of one module, and its errors. */
export interface ModuleExtraction {
  A: SideBasis;
  B: SideBasis;
  /** Projected tasks, in the order of the stack. */
  tasks: ProjectedTask[];
}

/** A module on its way to being stored. */
interface Found {
  stack: ModuleStack;
  options: ExtractOptions;
  /** Vectors of each task: its rank in the gauge asked for, or 1 in flat mode. */
  ranks: readonly number[];
  A: Side;
  B: Side;
  /** Steps of each task's coefficients. */
  steps?: readonly RowSteps[] | undefined;
}

/**
 * Extracts one module.
 * @throws RangeError for wrong shapes, NaN or infinity, options out of range, and values that do not fit the stored types
 */
export function extractModule(stack: ModuleStack, options: ExtractOptions): ModuleExtraction {
  checkSelection(options.select);
  checkRank(options);
  checkSteps(options);
  if (stack.members.length === 0) throw new RangeError(`${stack.name}: no adapter adapts this module`);
  const { pairs, kept, rank } = gaugedPairs(stack, options);
  const side = (which: "A" | "Bt", width: number): Side =>
    decompose(
      pairs.map((pair) => pair[which]),
      kept.map((pair) => pair[which]),
      width,
      rank,
      options,
    );
  const ranks = pairs.map((pair) => (rank === undefined ? pair.rank : 1));
  const [A, B] = [side("A", stack.in), side("Bt", stack.out)];
  const steps = options.steps && kept.map((pair, i) => rowSteps(pair, options.steps![i]!));
  const found: Found = { stack, options, ranks, A, B, steps };
  if (rank === undefined && !steps && mirrors(options)) {
    mirror(A.rows, ranks, stack.in, options.rank);
    mirror(B.rows, ranks, stack.out, options.rank);
  }
  return store(found, A.components.count, B.components.count);
}

/** The pairs of a stack in the gauge asked for, and what is kept of them as views; in flat mode all of one `rank`. */
function gaugedPairs(
  stack: ModuleStack,
  { mode, gauge, centering, normalize, rank: most = Infinity, products }: ExtractOptions,
): { pairs: Pair[]; kept: Pair[]; rank: number | undefined } {
  const given = toPairs(stack.members, stack.out, stack.in);
  const own = gauge === "balanced" ? given.map((pair) => balance(pair, stack.out, stack.in, products)) : given;
  const rank = mode === "flat" ? Math.max(...own.map((pair) => pair.rank)) : undefined;
  const pairs = rank === undefined ? own : own.map((pair) => padded(pair, rank));
  const kept = pairs.map((pair) => leadingRows(pair, most));
  // A sign cancels between component and coefficient unless a mean is kept, which depends on it.
  if (gauge === "balanced" && centering === "keep") {
    const factors = kept.map(({ A }) => A);
    const weights = meanWeights(factors, stack.in * (rank ?? 1), normalize);
    // Turned towards the mean that is stored, in which rows count by weights.
    for (const [i, pair] of kept.entries()) scalePair(pair, weights?.[i] || 1);
    (rank === undefined ? alignSigns : turnTogether)(kept, stack.out, stack.in);
    for (const [i, pair] of kept.entries()) scalePair(pair, 1 / (weights?.[i] || 1));
  }
  return { pairs, kept, rank };
}

function scalePair({ A, Bt }: Pair, factor: number): void {
  for (const side of factor === 1 ? [] : [A, Bt]) scale(factor, side, 0, side.length);
}

function encodeModule(found: Found, kA: number, kB: number): { A: SideBasis; B: SideBasis } {
  const { stack, A, B, options } = found;
  const { basisDtype: type, products } = options;
  const encoded = (which: "A" | "B", side: Side, k: number): SideBasis => {
    const steps = stepsOf(found, which === "A" ? "A" : "Bt", side, k);
    return storing(
      `basis ${which} of "${stack.name}"`,
      () => largestOf(found, side),
      () => encodeSide(side, k, { type, steps }, products),
    );
  };
  return { A: encoded("A", A, kA), B: encoded("B", B, kB) };
}

/** Whose rows are the largest. */
function largestOf({ stack, ranks }: Found, { rows, width }: Side): string {
  let at = 0;
  const peaks = ranks.map((rank) => {
    const own = rows.subarray(at * width, (at += rank) * width);
    return own.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  });
  return stack.members[peaks.indexOf(Math.max(...peaks))]!.id;
}

/** Steps of the first `k` components of one side, and of its mean. */
function stepsOf(
  { steps, ranks, options: { products } }: Found,
  which: "A" | "Bt",
  side: Side,
  k: number,
): Float64Array | undefined {
  if (!steps) return undefined;
  const own = new Float64Array(ranks.reduce((a, b) => a + b, 0));
  let at = 0;
  for (const [i, rank] of ranks.entries()) {
    own.set(steps[i]![which].subarray(0, rank), at);
    at += rank;
  }
  const { width, components } = side;
  return componentSteps(side, components.vectors.subarray(0, k * width), own, products);
}

function store(found: Found, kA: number, kB: number): ModuleExtraction {
  const { stack, options, ranks } = found;
  const basis = encodeModule(found, kA, kB);
  const space = openModule(basis, options.products);
  const a = targetsOf(space.A, found.A.rows, ranks, options.rank);
  const b = targetsOf(space.B, found.B.rows, ranks, options.rank);
  const tasks = stack.members.map(({ id }, i) => ({
    id,
    ...storing(`coefficients of "${stack.name}"`, id, () =>
      projectTargets(space, a[i]!, b[i]!, options.coefficientDtype, found.steps?.[i]),
    ),
  }));
  return { ...basis, tasks };
}
