/**
 * Choosing K_A and K_B of a module by an allowed ΔW error (`--error`): the pair of fewest stored
 * bytes. Everything is computed in coordinates of the components, where one more component of one side changes the r×r
 * matrices of `error.ts` by products of two vectors, so that thousands of pairs cost less than one expansion.
 */
import { type Dtype, tensorBytes } from "../tensor/dtypes.ts";
import { pairError, relative, type SideError } from "./error.ts";
import { fewBits, mixColumns } from "./gauge.ts";
import { leaveOut, lossOf, rounded, type Subspace, solve, type Target } from "./subspace.ts";

/** One side of a module with all its components as stored, before any is cut. */
export interface SearchSide {
  space: Subspace;
  /** One per task. */
  targets: readonly Target[];
  /** Says in errors whose coefficients they are that cannot be stored. @param task its number */
  named<T>(task: number, encode: () => T): T;
}

/** The types whose bytes are counted and whose rounding is allowed for. */
export interface StoredDtypes {
  basisDtype: Dtype;
  coefficientDtype: Dtype;
}

/**
 * Pairs this far above the allowed error before coefficients are rounded are still tried: rounding can help a little.
 */
const SLACK = 1 + 1 / 256;

/**
 * Pairs [K_A, K_B] in the order of their stored bytes, the smaller K_A first among equals, whose largest error over all
 * tasks is at most `allowed` with everything rounded to the stored types.
 *
 * Before coefficients are rounded, the least K_B for each K_A is found on a staircase: it falls as K_A grows. From
 * there on pairs are tried in byte order with coefficients rounded.
 *
 * @throws RangeError when all components together miss the allowed error
 */
export function* pairsWithin(
  allowed: number,
  a: SearchSide,
  b: SearchSide,
  types: StoredDtypes,
): Generator<[kA: number, kB: number]> {
  const limitA = a.space.components;
  const limitB = b.space.components;
  const errorA = roundedErrors(a, types);
  const errorB = roundedErrors(b, types);
  const floor = Math.max(...a.targets.map((_, task) => share(errorA(task, limitA), errorB(task, limitB))));
  if (floor > allowed) {
    throw new RangeError(
      `an error of ${allowed} cannot be reached: all components together leave ${floor.toPrecision(4)} after ` +
        `rounding to ${types.basisDtype} components and ${types.coefficientDtype} coefficients; allow that much or store f32`,
    );
  }
  const least = staircase(allowed * SLACK, a, b);
  const bytesA = sideBytes(a, types);
  const bytesB = sideBytes(b, types);
  const fits = judge(a.targets.length, allowed);
  for (;;) {
    let kA = -1;
    let fewest = Infinity;
    least.forEach((kB, k) => {
      if (kB > limitB || bytesA[k]! + bytesB[kB]! >= fewest) return;
      kA = k;
      fewest = bytesA[k]! + bytesB[kB]!;
    });
    if (kA < 0) return;
    const kB = least[kA]!++;
    const within = fits(
      (task) => errorA(task, kA),
      (task) => errorB(task, kB),
    );
    if (within) yield [kA, kB];
  }
}

function share(a: SideError, b: SideError): number {
  const { difference, norm } = pairError(a, b);
  return relative(difference, norm);
}

type TaskErrors = (task: number) => SideError;

/** Whether all tasks are within `allowed`. The task that failed last is asked first: mostly it fails again. */
function judge(tasks: number, allowed: number): (a: TaskErrors, b: TaskErrors) => boolean {
  let suspect = 0;
  return (a, b) => {
    for (let i = 0; i < tasks; i++) {
      const task = (suspect + i) % tasks;
      if (share(a(task), b(task)) <= allowed) continue;
      suspect = task;
      return false;
    }
    return true;
  };
}

/** Bytes of one side by its number of components: basis, mean, and the coefficients of every task. */
function sideBytes(side: SearchSide, types: StoredDtypes): number[] {
  const { components, width, mean } = side.space;
  return Array.from({ length: components + 1 }, (_, k) =>
    side.targets.reduce(
      (sum, { kept }) => sum + tensorBytes(types.coefficientDtype, kept, k),
      tensorBytes(types.basisDtype, k + (mean ? 1 : 0), width),
    ),
  );
}

/**
 * Finds the least K_B within `allowed` for each K_A, before coefficients are rounded; one more than there are where none is.
 */
function staircase(allowed: number, a: SearchSide, b: SearchSide): number[] {
  const limitB = b.space.components;
  const walkA = walk(a);
  const walkB = walk(b);
  const fits = judge(a.targets.length, allowed);
  const within = (): boolean =>
    fits(
      (task) => walkA.error(task),
      (task) => walkB.error(task),
    );
  while (walkB.count < limitB) walkB.add();
  const least: number[] = [];
  for (let kA = 0; kA <= a.space.components; kA++) {
    if (kA > 0) walkA.add();
    while (!within() && walkB.count < limitB) walkB.add();
    if (!within()) {
      least.push(limitB + 1);
      continue;
    }
    while (walkB.count > 0 && within()) walkB.remove();
    if (!within()) walkB.add();
    least.push(walkB.count);
  }
  return least;
}

/**
 * The errors of one side with exact coefficients, at a number of components that goes up and down by one, from zero.
 */
interface Walk {
  count: number;
  error(task: number): SideError;
  add(): void;
  remove(): void;
}

function walk({ space, targets }: Omit<SearchSide, "named">): Walk {
  const { components, meanAt } = space;
  if (space.rank !== undefined) return expandingWalk({ space, targets });
  const errors = targets.map(({ rank, kept, rows, squares, alongMean }): SideError => {
    const error = {
      rank,
      rows,
      lost: squares.slice(),
      cross: squares.map((value, ij) => value + alongMean[ij % rank]!),
    };
    leaveOut(error, kept);
    return error;
  });
  // D loses exactly its part along coordinate k when component k is added.
  const move = (k: number, sign: number): void => {
    targets.forEach(({ rank, kept, at }, task) => {
      const { lost, cross } = errors[task]!;
      for (let j = 0; j < kept; j++) {
        const part = sign * at[j * components + k]!;
        for (let i = 0; i < rank; i++) {
          lost[i * rank + j]! += at[i * components + k]! * part;
          cross[i * rank + j]! += (at[i * components + k]! + meanAt[k]!) * part;
        }
      }
      leaveOut(errors[task]!, kept);
    });
  };
  return {
    count: 0,
    error: (task) => errors[task]!,
    add() {
      move(this.count++, -1);
    },
    remove() {
      move(--this.count, 1);
    },
  };
}

/** The same in flat mode, where no error follows from the one before. */
function expandingWalk({ space, targets }: Omit<SearchSide, "named">): Walk {
  return {
    count: 0,
    error(task) {
      return lossOf(space, targets[task]!, solve(space, targets[task]!, this.count), this.count);
    },
    add() {
      this.count++;
    },
    remove() {
      this.count--;
    },
  };
}

/** The errors of one side with the first k components and rounded coefficients. Each is computed once. */
function roundedErrors(
  { space, targets, named }: SearchSide,
  { basisDtype, coefficientDtype }: StoredDtypes,
): (task: number, k: number) => SideError {
  // Components of few bits are stored mixed, and coefficients are rounded as they are of those.
  const toStored = (values: Float64Array, rows: number, k: number): Float64Array =>
    rounded(coefficientDtype, values, rows, k, undefined, space.products.findScale).values;
  const asStored = (coefficients: Float64Array, rows: number, k: number): Float64Array => {
    if (!fewBits(basisDtype)) return toStored(coefficients, rows, k);
    return mixColumns(toStored(mixColumns(coefficients, rows, k), rows, k), rows, k);
  };
  const known = targets.map(() => new Map<number, SideError>());
  return (task, k) => {
    const target = targets[task]!;
    let error = known[task]!.get(k);
    if (!error) {
      const stored = named(task, () => asStored(solve(space, target, k), target.kept, k));
      error = lossOf(space, target, stored, k);
      known[task]!.set(k, error);
    }
    return error;
  };
}
