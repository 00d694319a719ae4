/**
 * Makes a pack of adapters: a recipe, what it encodes to, the chunks of a file. Holds one module's stack and what goes into the pack,
 * never all adapters. No file system: adapters are read through their sources, the result is a list of chunks.
 */
import type { Adapter } from "../adapters/adapter.ts";
import { commonBase, type SharedModule } from "../adapters/adapter.ts";
import { createExtractor, type Extractor } from "../extract/extractor.ts";
import type { TermInput } from "../format/encode.ts";
import { ROUND } from "../work.ts";
import { type Adapters, type Encoded, encode, type Known, openAdapters, partOf, sideInput } from "./encode.ts";
import { type BuildOptions, type Recipe, recipeOf } from "./recipe.ts";
import {
  type BuildReport,
  buildReport,
  componentsOf,
  lossesOf,
  type ModuleError,
  type TaskLoss,
  type TermSummary,
  termSummary,
} from "./report.ts";
import { encodeAdapter, narrowTerms } from "./tasks.ts";
import { allOf, newPack, type Scratch } from "./write.ts";

/** A pack that was made: its consecutive chunks. */
export interface Built<Report = BuildReport, Chunks = Uint8Array[]> {
  readonly chunks: Chunks;
  readonly report: Report;
}

/** A pack whose chunks are asked for once, and may lie elsewhere until then. */
export type Streamed<Report = BuildReport> = Built<Report, AsyncIterable<Uint8Array>>;

/** The pack with all its chunks in memory. */
export async function gathered<Report>({ chunks, report }: Streamed<Report>): Promise<Built<Report>> {
  return { chunks: await allOf(chunks), report };
}

/**
 * Packs adapters.
 * @throws AdapterError when adapters do not agree about a module, name different base models, or have a tensor that cannot be stored
 * @throws BaseMismatchError when the base given does not have the adapted modules
 * @throws RangeError for options that do not go together, or an error that is out of reach; TypeError for an unknown option
 * @returns the pack, and what became of the adapters
 * @example
 * const { chunks, report } = await buildPack(adapters, { select: { kind: "k", k: 16 } });
 */
export async function buildPack(adapters: readonly Adapter[], options: BuildOptions = {}): Promise<Built> {
  return gathered(await buildStreamed(adapters, options));
}

/** `buildPack` for callers that write the pack and are done with it. @param scratch takes blobs. Default: memory */
export async function buildStreamed(
  adapters: readonly Adapter[],
  options: BuildOptions,
  scratch?: Scratch,
): Promise<Streamed> {
  return withExtractor("buildPack", options.workers, async (extractor) => {
    const opened = await openAdapters("buildPack", adapters, options, extractor);
    const recipe = recipeOf(adapters, options);
    const encoded = await encode(partOf(opened, EXTRACTING), recipe);
    // What is left to do needs memory, which threads would hold.
    await extractor.rest();
    return write(opened, recipe, encoded, scratch);
  });
}

/** The share of the work that extraction is; coding tasks is the rest. About: it depends on how many there are. */
export const EXTRACTING = 0.8;

/** Does work that extracts, in this number of threads. @throws RangeError for a number that is none */
export async function withExtractor<T>(
  who: string,
  workers: number = 1,
  work: (extractor: Extractor) => Promise<T>,
): Promise<T> {
  if (!(Number.isInteger(workers) && workers >= 1))
    throw new RangeError(`${who}: workers: expected a whole number from 1, got ${workers}`);
  const extractor = await createExtractor(workers);
  try {
    return await work(extractor);
  } finally {
    await extractor.close();
  }
}

/** The pack of what was encoded, which is used up. */
export function write(opened: Adapters, recipe: Recipe, encoded: Encoded, scratch?: Scratch): Promise<Streamed> {
  const { adapters, meter } = opened;
  const rest = meter.part(1);
  let count = 0;
  const termsOf = async (adapter: Adapter): Promise<TermInput[]> => {
    rest.reach(count++ / adapters.length);
    return taken(encoded, adapter);
  };
  return writeTasks(opened, recipe, encoded, termsOf, { scratch });
}

/** What was encoded of an adapter, which is let go of. */
function taken({ terms }: Pick<Encoded, "terms">, adapter: Adapter): TermInput[] {
  const own = terms.get(adapter) ?? [];
  terms.delete(adapter);
  return own;
}

/** A recipe whose private terms or steps are still sought: it is encoded again and again, for less where little of it changes. */
export class Draft {
  readonly #opened: Adapters;
  readonly #recipe: Recipe;
  readonly #known: Known = new Map();
  #encoded: Encoded | undefined;

  constructor(opened: Adapters, recipe: Recipe) {
    this.#opened = opened;
    this.#recipe = recipe;
  }

  /** What it was encoded to last. */
  get encoded(): Encoded {
    return this.#encoded!;
  }

  /** @returns what each task loses */
  async encode(change: Pick<Partial<Recipe>, "privateTerms" | "steps">): Promise<readonly TaskLoss[]> {
    // What was made before is let go of first.
    this.#encoded = undefined;
    this.#encoded = await encode(partOf(this.#opened, ROUND), { ...this.#recipe, ...change }, this.#known);
    return lossesOf(this.#encoded.errors);
  }

  /** The pack, once after each time that it was encoded. */
  write(scratch?: Scratch): Promise<Streamed> {
    return write(this.#opened, this.#recipe, this.encoded, scratch);
  }
}

/** Looks for steps of ΔW: encodes tasks with some, by id, as often as it takes, the right ones last. */
export type Seek = (
  adapters: readonly Adapter[],
  encode: (steps: ReadonlyMap<string, number>) => Promise<readonly TaskLoss[]>,
) => Promise<void>;

/**
 * The pack of a recipe with a step and no components: encoded some adapters at a time, so that of all others only what they were coded to
 * is in memory.
 * @param most numbers of the adapters that are worked on at a time
 */
export function writeApart(
  opened: Adapters,
  recipe: Recipe,
  seek: Seek,
  scratch: Scratch | undefined,
  most: number = GROUP,
): Promise<Streamed> {
  const { adapters, shared, fingerprints, extractor } = opened;
  const modules = shared.map(({ shape }) => {
    const { A = [], B = [] } = recipe.sides?.get(shape.name)?.bases ?? {};
    return { ...shape, A: A.map(sideInput), B: B.map(sideInput), fingerprint: fingerprints?.get(shape.name) };
  });
  const places = new Map(modules.map(({ name }, index) => [name, index]));
  const errors: ModuleError[] = [];
  const encodeGroup = async (group: readonly Adapter[]): Promise<Encoded["terms"]> => {
    const own = onlyOf(shared, group);
    const draft = new Draft({ ...partOf(part, EXTRACTING), shared: own }, recipe);
    await seek(group, (steps) => draft.encode({ steps }));
    const found = draft.encoded;
    for (const error of found.errors) errors.push(error);
    for (const terms of found.terms.values())
      for (const [i, term] of terms.entries())
        terms[i] = { ...term, module: places.get(own[term.module]!.shape.name)! };
    return found.terms;
  };
  const groups = groupsOf(adapters, most);
  let at = -1;
  let part = opened;
  let encoded: Encoded["terms"] = new Map();
  const termsOf = async (adapter: Adapter): Promise<TermInput[]> => {
    if (!groups[at]?.includes(adapter)) {
      // What was encoded before is let go of first.
      encoded = new Map();
      part = partOf(opened, 1 / (groups.length - ++at));
      encoded = await encodeGroup(groups[at]!);
      part.meter.reach(EXTRACTING);
    }
    part.meter.reach(1 - (1 - EXTRACTING) * (encoded.size / groups[at]!.length));
    return taken({ terms: encoded }, adapter);
  };
  return writeTasks(opened, recipe, { modules, errors }, termsOf, { scratch, extractor });
}

/** @param termsOf is asked for the terms of each adapter in their order */
async function writeTasks(
  { adapters, fingerprints, meter }: Adapters,
  recipe: Recipe,
  { modules, errors }: Pick<Encoded, "modules" | "errors">,
  termsOf: (adapter: Adapter) => Promise<readonly TermInput[]>,
  how: Parameters<typeof newPack>[2],
): Promise<Streamed> {
  const { extraction, step, error, head } = recipe;
  const names = modules.map(({ name }) => name);
  const components = componentsOf(modules);
  const widths = modules.slice();
  const terms = new Map<Adapter, TermSummary[]>();
  const tasks = adapters.map((adapter) => async () => {
    const own = await termsOf(adapter);
    terms.set(adapter, own.map(termSummary));
    // Private terms are as narrow as they can be.
    const narrow = step !== undefined && (recipe.sides || own.some(({ rank }) => rank > 0));
    return encodeAdapter(adapter, narrow ? narrowTerms(own, widths) : own, names, head);
  });
  const { mode, gauge, centering, rank } = extraction;
  const baseModel = commonBase(adapters);
  // Handed over: the encoded components are in the chunks afterwards, and need not be held twice.
  const basis = { mode, gauge, centering, rank, step, error, baseModel, modules: modules.splice(0) };
  const { bytes, chunks, blobs } = await newPack(basis, tasks, how);
  meter.reach(1);
  const sized = { bytes, blobs, modules: names.length, components };
  return { chunks, report: buildReport(adapters, recipe, sized, { errors, terms }, fingerprints !== undefined) };
}

/** An adapter of rank 16 on all layers of half a billion numbers has half of it. */
const GROUP = 2 ** 24;

/** Adapters in their order, in groups of at most `most` numbers, or of one. */
function groupsOf(adapters: readonly Adapter[], most: number): Adapter[][] {
  const groups: Adapter[][] = [];
  let numbers = Infinity;
  for (const adapter of adapters) {
    const own = [...adapter.modules.values()].reduce((sum, { rank, in: i, out }) => sum + rank * (i + out), 0);
    if (numbers + own > most) {
      groups.push([]);
      numbers = 0;
    }
    numbers += own;
    groups.at(-1)!.push(adapter);
  }
  return groups;
}

/** Modules of some owners. */
function onlyOf(shared: readonly SharedModule<Adapter>[], some: readonly Adapter[]): SharedModule<Adapter>[] {
  const those = new Set(some);
  return shared
    .map(({ shape, owners }) => ({ shape, owners: owners.filter((owner) => those.has(owner)) }))
    .filter(({ owners }) => owners.length > 0);
}
