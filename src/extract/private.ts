/**
 * Private terms: rank-1 terms of a task's own beside its shared part (paper, section 5). They are what the shared
 * components leave of ΔW, cut by its own SVD, so the two take turns: without its private terms a task has more in common with the
 * others, and the shared components are found again for what is left. No components at all and only private terms is each adapter
 * cut by its own SVD: the other end of the scale.
 */
import { type Dtype, isQuantized, type QuantizedDtype } from "../tensor/dtypes.ts";
import { narrowed, storing } from "../tensor/encode.ts";
import type { PrivateChoice } from "./allocation.ts";
import { deltaError, relative, stackedPairs } from "./error.ts";
import { extractModule, type ModuleExtraction, type ModuleStack } from "./extract.ts";
import { balance, leadingRows, mix, type Pair, pairOf, singularValues } from "./gauge.ts";
import type { Products } from "./linalg.ts";
import type { ExtractOptions, ProjectOptions } from "./options.ts";
import {
  type ModuleMember,
  type ModuleSpace,
  openModule,
  type ProjectedTask,
  projectModule,
  storedPair,
} from "./project.ts";
import { rowSteps, worthRows } from "./row-steps.ts";
import { rounded } from "./subspace.ts";

/** How often components are found again. The first time gains most, the third next to nothing. */
const ROUNDS = 3;

/** Private terms, encoded: A [q, in], Bᵀ [q, out]. */
export interface PrivateTerms {
  readonly rank: number;
  readonly dtype: Dtype;
  readonly A: Uint8Array;
  readonly Bt: Uint8Array;
}

/** The same integers in the smallest type that they fit. @param widths of the module */
export function narrowPrivate(
  { rank: rows, dtype, A, Bt }: PrivateTerms,
  widths: { readonly in: number; readonly out: number },
): PrivateTerms {
  const side = (encoded: Uint8Array, width: number): Parameters<typeof narrowed>[0][number] => {
    return { dtype: dtype as QuantizedDtype, encoded, rows, width };
  };
  const { dtype: least, encoded } = narrowed([side(A, widths.in), side(Bt, widths.out)]);
  return { rank: rows, dtype: least, A: encoded[0]!, Bt: encoded[1]! };
}

export interface PrivateOptions extends ExtractOptions {
  /** Rank of the private part of every task; or what each member of the stack has, in its order, in a number format of its own. */
  readonly privateTerms: number | readonly (PrivateChoice | undefined)[];
}

/** A task with what it keeps for itself. */
export interface MixedTask extends ProjectedTask {
  privateTerms?: PrivateTerms | undefined;
}

export interface MixedExtraction extends ModuleExtraction {
  tasks: MixedTask[];
}

/**
 * Extracts one module, private terms beside shared ones.
 * @throws RangeError as `extractModule`; also for another gauge than balanced
 */
export function extractMixed(stack: ModuleStack, options: PrivateOptions): MixedExtraction {
  const { gauge, privateTerms: terms } = options;
  if (typeof terms === "number" && !(Number.isInteger(terms) && terms >= 1))
    throw new RangeError(`privateTerms must be a whole number from 1, got ${terms}`);
  if (gauge !== "balanced") throw new RangeError("private terms need gauge balanced");
  if (options.mode === "flat") throw new RangeError("private terms stand beside shared rows; take column mode");
  return alternate(stack, stack.members.map(pairOf), options);
}

/** What one member may have for itself. */
function choiceOf({ privateTerms, coefficientDtype: dtype }: PrivateOptions, member: number): PrivateChoice {
  return typeof privateTerms === "number"
    ? { rank: privateTerms, dtype }
    : (privateTerms[member] ?? { rank: 0, dtype });
}

/** Takes turns until a round loses no less of the tasks' ΔW. */
function alternate(stack: ModuleStack, given: readonly Pair[], options: PrivateOptions): MixedExtraction {
  let best: { found: MixedExtraction; bytes: number; lost: number } | undefined;
  let members = stack.members;
  for (let round = 0; round < ROUNDS; round++) {
    const shared = extractShared(
      { ...stack, members },
      { ...options, rank: options.rank ?? Math.max(...given.map(({ rank }) => rank)) },
    );
    const parts = expanded(shared, options);
    const tasks = shared.tasks.map((task, i) =>
      storing(`a private term of "${stack.name}"`, task.id, () =>
        withPrivate({ task, given: given[i]!, shared: parts[i]! }, choiceOf(options, i), {
          products: options.products,
          step: options.steps?.[i],
        }),
      ),
    );
    const found = { ...shared, tasks: tasks.map(({ task }) => task) };
    const [bytes, lost] = [bytesOf(found), tasks.reduce((sum, { lost }) => sum + lost, 0)];
    if (best && (bytes !== best.bytes ? bytes > best.bytes : lost >= best.lost)) break;
    best = { found, bytes, lost };
    const none = options.select.kind === "k" && options.select.k === 0;
    if (none || tasks.every(({ terms }) => terms.rank === 0)) break;
    members = stack.members.map((member, i) => without(member, tasks[i]!.terms));
  }
  return best!.found;
}

const EMPTY = new Uint8Array(0);
/** What a task that shares nothing has. */
const NOTHING = { rank: 0, alphaA: EMPTY, alphaB: EMPTY, error: 1, norm: 0 };
const NO_PAIR: Pair = { rank: 0, A: new Float64Array(0), Bt: new Float64Array(0) };

/** One more adapter on a stored basis, or on none, and what that leaves of it. */
export interface Begun {
  readonly task: ProjectedTask;
  /** The adapter, and what is shared of it as stored. */
  readonly given: Pair;
  readonly shared: Pair;
}

/** Projects an adapter that is to have private terms. @throws RangeError as `projectModule` */
export function beginMixed(space: ModuleSpace | undefined, member: ModuleMember, options: ProjectOptions): Begun {
  const given = pairOf(member);
  if (!space) return { task: { id: member.id, ...NOTHING }, given, shared: NO_PAIR };
  const task = projectModule(space, member, options);
  return { task, given, shared: storedPair(space, task, options.coefficientDtype) };
}

/** Singular values of what is not shared of it. @param out of the module; `inputs` as well */
export function remainderOf({ given, shared }: Begun, out: number, inputs: number): number[] {
  return singularValues(stackedPairs(given, shared, -1), out, inputs);
}

/** The task with its private terms. @param step as of `projectModule` */
export function finishMixed(begun: Begun, choice: PrivateChoice, step?: number): MixedTask {
  return withPrivate(begun, choice, { step }).task;
}

/** Column mode, or nothing shared at all. */
function extractShared(stack: ModuleStack, options: ExtractOptions): ModuleExtraction {
  if (options.select.kind !== "k" || options.select.k > 0) return extractModule(stack, options);
  const none = { dtype: options.basisDtype, components: 0, mean: false, encoded: new Uint8Array(0), explained: 0 };
  const singular = new Float64Array(0);
  return {
    A: { ...none, width: stack.in, singular },
    B: { ...none, width: stack.out, singular },
    tasks: stack.members.map(({ id }) => ({ id, ...NOTHING })),
  };
}

/** The shared factors of every task, as stored. */
function expanded({ A, B, tasks }: ModuleExtraction, { coefficientDtype, products }: ExtractOptions): Pair[] {
  if (A.components + B.components === 0 && !A.mean) return tasks.map(() => NO_PAIR);
  const space = openModule({ A, B }, products);
  return tasks.map((task) => storedPair(space, task, coefficientDtype));
}

/** The strongest private terms, as many as are allowed and worth their bits. */
function withPrivate(
  { task, given, shared }: Begun,
  { rank: limit, dtype }: PrivateChoice,
  { products, step }: { products?: Products | undefined; step?: number | undefined },
): { task: MixedTask; terms: Pair; lost: number } {
  const width = given.A.length / given.rank;
  const height = given.Bt.length / given.rank;
  const rest = balance(stackedPairs(given, shared, -1), height, width, products);
  const most = Math.min(limit, rest.rank);
  const q = step === undefined ? most : Math.min(most, worthRows(rest, step, (width + height) / 2));
  const leading = leadingRows(rest, q);
  const steps = step === undefined ? undefined : rowSteps(leading, step);
  const mixed = !steps && isQuantized(dtype);
  const even = mixed ? { A: mix(leading.A, q, width), Bt: mix(leading.Bt, q, height) } : leading;
  const find = products?.findScale;
  const A = rounded(dtype, even.A, q, width, steps?.A, find);
  const Bt = rounded(dtype, even.Bt, q, height, steps?.Bt, find);
  const rows = { rank: q, A: A.values, Bt: Bt.values };
  const stored = stackedPairs(shared, rows, 1);
  const nothing = { rank: 1, A: new Float64Array(width), Bt: new Float64Array(height) };
  const approximation = stored.rank > 0 ? stored : nothing;
  // Where nothing is shared, what is stored is in the gauge of what is left.
  const differenceOf = shared.rank > 0 ? undefined : () => deltaError(rest, approximation, products).difference;
  const { difference, norm } = deltaError(given, approximation, products, differenceOf);
  const whole = q > 0 ? { rank: q, dtype, A: A.encoded, Bt: Bt.encoded } : undefined;
  const terms = whole && steps ? narrowPrivate(whole, { in: width, out: height }) : whole;
  return {
    task: { ...task, error: relative(difference, norm), norm, privateTerms: terms },
    terms: rows,
    lost: difference ** 2,
  };
}

/** The member without a part of it. */
function without(member: ModuleMember, part: Pair): ModuleMember {
  const pair = stackedPairs(pairOf(member), part, -1);
  return { id: member.id, rank: pair.rank, A: Float32Array.from(pair.A), Bt: Float32Array.from(pair.Bt) };
}

function bytesOf({ A, B, tasks }: MixedExtraction): number {
  const stored = tasks.flatMap(({ alphaA, alphaB, privateTerms: terms }) => [alphaA, alphaB, terms?.A, terms?.Bt]);
  return [A.encoded, B.encoded, ...stored].reduce((sum, bytes) => sum + (bytes?.length ?? 0), 0);
}
