/**
 * Private terms for a goal: reads what every adapter's modules hold, lets `allocation.ts` choose, and makes packs until what was
 * measured keeps to the goal too. Estimates are good to a few percent, so that takes two or three packs.
 */
import type { Adapter } from "../adapters/adapter.ts";
import type { SharedModule } from "../adapters/modules.ts";
import {
  type Allocated,
  type Allocation,
  allocateBytes,
  allocateError,
  costAt,
  type Spectrum,
} from "../extract/allocation.ts";
import type { ModuleStack } from "../extract/extract.ts";
import { type Extractor, inOrder } from "../extract/extractor.ts";
import type { ExtractOptions } from "../extract/options.ts";
import type { Dtype } from "../tensor/dtypes.ts";
import { UnstorableError } from "../tensor/encode.ts";
import type { Built } from "./build.ts";
import { type Adapters, naming, piecesOf, readStack } from "./encode.ts";
import type { TaskLoss } from "./report.ts";
import { tooFew, Unreachable } from "./seek.ts";

/** Components that all tasks share beside their private terms, on each side of every module. */
export interface Shared {
  readonly k: number;
  readonly dtype: Dtype;
}

/** What adapters hold, and how private terms of it may be stored. */
export interface Survey {
  readonly spectra: readonly Spectrum[];
  /** Number formats of private terms. Default: all. */
  readonly only?: readonly Dtype[] | undefined;
}

/** What a task may lose of its ΔW where nobody says so: docs/packing.md has what that costs and saves. */
export const DEFAULT_ERROR = 0.15;

const ROUNDS = 8;
/** A task that is still above what is allowed is held further below it from round to round, until it takes one step more. */
const CAREFUL = 0.004;
/** A pack within so much of its goal is good enough. */
const CLOSE = 0.99;

/** Reads the spectra of all adapters. */
export async function survey(opened: Adapters, only: readonly Dtype[] | undefined): Promise<Survey> {
  const spectra = await eachMember(opened, opened.shared.flatMap(piecesOf), async (stack) => {
    const { name: module, out, in: inputs } = stack;
    const all = await opened.extractor.ask("spectra", stack, undefined);
    return all.map((singular, i) => {
      const square = singular.reduce((sum, value) => sum + value ** 2, 0);
      return { task: stack.members[i]!.id, module, out, in: inputs, singular, square };
    });
  });
  return { spectra, only };
}

/** What shared components leave of what a survey found. */
export async function surveyBeside(opened: Adapters, { spectra, only }: Survey, shared: Shared): Promise<Survey> {
  const ask = async (stack: ModuleStack): Promise<number[][]> =>
    (await opened.extractor.ask("remainders", stack, sharedOptions(shared))).singular;
  const rests = await eachMember(opened, opened.shared, (stack, module) => naming(module, () => ask(stack)));
  return { spectra: spectra.map((spectrum, i) => ({ ...spectrum, singular: rests[i]! })), only };
}

/** What `work` finds of each member of each module, modules and members in their order. */
async function eachMember<T>(
  { extractor, signal }: Adapters,
  modules: readonly SharedModule<Adapter>[],
  work: (stack: ModuleStack, module: SharedModule<Adapter>) => Promise<T[]>,
): Promise<T[]> {
  const found: T[] = [];
  const read = async (module: SharedModule<Adapter>): Promise<T[]> => {
    signal?.throwIfAborted();
    return work((await readStack(module)).stack, module);
  };
  for await (const members of inOrder(modules, extractor.size + 1, read)) {
    signal?.throwIfAborted();
    for (const one of members) found.push(one);
  }
  return found;
}

/** How shared components beside private terms are found. */
function sharedOptions({ k, dtype }: Shared): ExtractOptions {
  return {
    mode: "column",
    gauge: "balanced",
    centering: "keep",
    select: { kind: "k", k },
    basisDtype: dtype,
    coefficientDtype: dtype,
  };
}

/**
 * Finds the fewest private terms with which no task loses more than `max` of its ΔW.
 * @param make makes tasks with these private terms
 * @param lossesOf what they lost
 * @throws Unreachable
 */
export async function withinError<T>(
  { spectra, only }: Survey,
  max: number,
  make: (allocation: Allocation) => Promise<T>,
  lossesOf: (made: T) => readonly TaskLoss[],
): Promise<T> {
  const allowed = new Map(spectra.map(({ task }) => [task, max]));
  for (let round = 0; round < ROUNDS; round++) {
    const { allocation, short } = allocateError(spectra, (task) => allowed.get(task)!, only);
    if (short.length > 0)
      throw new Unreachable(
        `task "${short[0]}" loses more than ${max} of its ΔW${only ? ` in ${only.join(" or ")}: allow more, or other number formats` : ": allow more"}`,
      );
    const made = await make(allocation);
    let done = true;
    for (const { id, total } of lossesOf(made)) {
      // What was estimated too high is taken back once, what was too low until it fits.
      if (total <= max && (round > 0 || total > CLOSE * max || total === 0)) continue;
      allowed.set(id, (allowed.get(id)! * max * (1 - CAREFUL * (round + 1))) / total);
      done = false;
    }
    if (done) return made;
  }
  throw new Unreachable(`an error of ${max} is just out of reach; allow more`);
}

/** The pack of at most `max` bytes that loses least. @throws Unreachable */
export async function withinBytes(
  { spectra, only }: Survey,
  max: number,
  build: (allocation: Allocation) => Promise<Built>,
): Promise<Built> {
  const tasks = tasksOf(spectra);
  let best: Built | undefined;
  // What a pack takes beside private terms is known when one has been made.
  let [room, spare] = [max, 0];
  for (let round = 0; round < ROUNDS; round++) {
    const plan = allocateBytes(spectra, room, only);
    const built = await build(plan.allocation);
    const { bytes } = built.report;
    const beside = bytes - plan.bytes;
    const fits = bytes <= max;
    if (plan.allocation.size < tasks.size && (fits || room < max))
      throw tooFew(max, beside + firstBytes(spectra, only));
    if (fits && !(best && best.report.bytes >= bytes)) best = built;
    if (fits && (bytes >= CLOSE * max || max - beside - spare <= room)) break;
    if (!fits && room < max) spare += (bytes - max) * 1.1;
    room = max - beside - spare;
    if (room <= 0) throw tooFew(max, beside + firstBytes(spectra, only));
  }
  if (!best) throw new Unreachable(`${max} bytes are just out of reach; allow more`);
  return best;
}

/** Tasks that change something. */
function tasksOf(spectra: readonly Spectrum[]): Set<string> {
  return new Set(spectra.filter(({ square }) => square > 0).map(({ task }) => task));
}

/** Bytes of the fewest private terms with which every task has one. */
function firstBytes(spectra: readonly Spectrum[], only: readonly Dtype[] | undefined): number {
  const tasks = tasksOf(spectra);
  let most = 1024;
  while (most < 2 ** 40 && allocateBytes(spectra, most, only).allocation.size < tasks.size) most *= 1.25;
  return Math.ceil(most);
}

/** Numbers of components that are tried: where few pay, more are tried. */
const TRIED = [2, 4, 8, 16, 32, 64, 128, 256];
/** Modules that are looked at: adapters share in all their modules, or in none. */
const SAMPLE = 4;
/** What sharing must save to be worth a search of its own. */
const WORTH = 0.97;

/**
 * Whether shared components beside private terms take fewer bytes than private terms alone, at what the allocation pays for errors,
 * and how many; of a few modules, spread over the model.
 */
export async function sharingThatPays(
  { shared, extractor }: Adapters,
  { spectra, only }: Survey,
  { slopes }: Allocated,
): Promise<Shared | undefined> {
  const squares = new Map<string, number>();
  for (const { task, square } of spectra) squares.set(task, (squares.get(task) ?? 0) + square);
  const priceOf = (task: string): number => 1 / (slopes.get(task)! * squares.get(task)!);
  const all = shared.filter(({ owners }) => owners.length > 1);
  const step = Math.max(1, Math.floor(all.length / SAMPLE));
  const chosen = all.filter((_, i) => i % step === step >> 1).slice(0, SAMPLE);
  const sample = await Promise.all(
    chosen.map(async (module) => {
      const { stack } = await readStack(module);
      const own = new Map(spectra.filter((one) => one.module === stack.name).map((one) => [one.task, one]));
      return { stack, own: stack.members.map(({ id }) => own.get(id)!) };
    }),
  );
  const cost = async (shared?: Shared): Promise<number> => {
    let total = 0;
    const rests = shared && (await remaindersOf(extractor, sample, shared));
    if (rests?.includes(undefined)) return Infinity;
    for (const [at, { own }] of sample.entries()) {
      const rest = rests?.[at];
      total += rest?.bytes ?? 0;
      for (const [i, spectrum] of own.entries()) {
        if (!slopes.has(spectrum.task)) continue;
        total += costAt(
          { ...spectrum, singular: rest?.singular[i] ?? spectrum.singular },
          priceOf(spectrum.task),
          only,
        );
      }
    }
    return total;
  };
  const alone = await cost();
  const most = Math.min(...sample.map(({ stack }) => Math.min(stack.in, stack.out, rowsOf(stack))));
  let [best, least]: [Shared | undefined, number] = [undefined, alone * WORTH];
  for (const dtype of only ?? (["int4", "int8"] as const)) {
    let before = Infinity;
    for (const k of TRIED) {
      if (2 * k > most) break;
      const found = await cost({ k, dtype });
      if (found < least) [best, least] = [{ k, dtype }, found];
      if (found > 1.1 * alone && found > before) break;
      before = found;
    }
  }
  return best;
}

/** What shared components leave of some modules; undefined where these cannot be stored. */
function remaindersOf(extractor: Extractor, sample: readonly { readonly stack: ModuleStack }[], shared: Shared) {
  const asked = sample.map(({ stack }) => extractor.ask("remainders", stack, sharedOptions(shared)));
  const unlessUnstorable = (error: unknown): undefined => {
    if (!(error instanceof UnstorableError)) throw error;
  };
  return Promise.all(asked.map((one) => one.catch(unlessUnstorable)));
}

/** Rows of all members. */
function rowsOf({ members }: ModuleStack): number {
  return members.reduce((sum, { rank }) => sum + rank, 0);
}
