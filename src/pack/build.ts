/**
 * Makes a pack of adapters: a recipe, what it encodes to, the chunks of a file. Module after module is read, extracted
 * and encoded: in memory are one stack for each thread, one that is read meanwhile, and what goes into the pack; never
 * all adapters. No file system: adapters are read through their sources, the result is a list of chunks.
 */

import {
  type Adapter,
  checkAdapters,
  commonBase,
  type ModuleShape,
  refuseBases,
  refuseBoth,
  refuseTwins,
  type SharedModule,
  sharedModules,
} from "../adapters/adapter.ts";
import { inBase } from "../adapters/start.ts";
import type { BaseInput, WeightHost } from "../core/base.ts";
import { fingerprint, WeightResolver, weightAt } from "../core/mismatch.ts";
import { openHost } from "../core/open-base.ts";
import { AdapterError, BaseMismatchError, nearest } from "../errors.ts";
import type { ModuleExtraction, ModuleStack, SideBasis } from "../extract/components.ts";
import { createExtractor, type Extractor } from "../extract/extractor.ts";
import { type SharedSides, UNSHARED } from "../extract/sides.ts";
import type { ModuleInput, SideInput, TermInput } from "../format/encode.ts";
import { throwIfAborted } from "../pace.ts";
import { sum } from "../tensor/dtypes.ts";
import { UnstorableError } from "../tensor/encode.ts";
import type { Term } from "../tensor/term.ts";
import { Meter, ROUND } from "../work.ts";
import { type BuildOptions, type Recipe, recipeOf } from "./recipe.ts";
import { type BuildReport, buildReport, componentsOf, type ModuleError } from "./report.ts";
import type { Steps } from "./seek.ts";
import { add, type Encoded, type EncodedTask, encodeAdapter, encodedTask, narrowTerms, stepsOf } from "./tasks.ts";
import { allOf, inOrder, newPack, type Scratch } from "./write.ts";

/** A pack that was made: its consecutive chunks. */
export interface Built<Report = BuildReport, Chunks = Uint8Array[]> {
  readonly chunks: Chunks;
  readonly report: Report;
}

/** A pack whose chunks are asked for once, and may lie elsewhere until then. */
export type Streamed<Report = BuildReport> = Built<Report, Iterable<Uint8Array> | AsyncIterable<Uint8Array>>;

/** The pack with all its chunks in memory. */
export async function gathered<Report>({ chunks, report }: Streamed<Report>): Promise<Built<Report>> {
  return { chunks: await allOf(chunks), report };
}

/**
 * Packs adapters.
 * @throws AdapterError when adapters do not agree about a module, name different base models, or have a tensor that
 *   cannot be stored
 * @throws BaseMismatchError when the base given does not have the adapted modules
 * @throws RangeError for options that do not go together, or an error that is out of reach; TypeError for an unknown
 *   option
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
  const recipe = recipeOf(options);
  return withExtractor("buildPack", options.workers, async (extractor) => {
    const opened = await openAdapters("buildPack", adapters, options, extractor);
    if (recipe.extraction.select) return packComponents(opened, recipe, scratch);
    const steps = recipe.step === undefined ? new Map<string, number>() : await stepsOf(adapters, recipe.step);
    return packRows(opened, recipe, { choose: (_, encode) => encode(steps) }, scratch);
  });
}

/** The share of the work that extraction is; coding tasks is the rest. About: it depends on how many there are. */
const EXTRACTING = 0.8;

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

/** The pack whose tasks are coefficients over components of all of them. */
async function packComponents(opened: Adapters, recipe: Recipe, scratch: Scratch | undefined): Promise<Streamed> {
  const { adapters, shared, fingerprints, extractor, meter } = opened;
  const { extraction } = recipe;
  const steps = recipe.step === undefined ? undefined : await stepsOf(adapters, recipe.step);
  const encoded: Encoded = { terms: new Map(), errors: [] };
  const modules: ModuleInput[] = [];
  const work = async (module: SharedModule<Adapter>): Promise<ModuleExtraction & { terms: readonly Term[] }> => {
    const { stack, terms } = await readStack(module);
    const stepped = steps && module.owners.map(({ id }) => steps.get(id)!);
    return naming(module, async () => {
      return { ...(await extractor.ask("extract", stack, { ...extraction, steps: stepped })), terms };
    });
  };
  for await (const { A, B, tasks, terms } of eachModule(partOf(opened, EXTRACTING), shared, work)) {
    const index = modules.length;
    const { shape, owners } = shared[index]!;
    const { name } = shape;
    modules.push({ ...shape, A: [sideInput(A)], B: [sideInput(B)], fingerprint: fingerprints?.get(name) });
    for (const [i, owner] of owners.entries())
      add(encoded, index, owner, encodedTask(name, tasks[i]!, terms[i]!.magnitude, owner));
  }
  // The rest of the work needs memory, which threads would hold.
  await extractor.rest();
  const rest = meter.part(1);
  let count = 0;
  const termsOf = async (adapter: Adapter): Promise<TermInput[]> => {
    rest.reach(count++ / adapters.length);
    return taken(encoded, adapter);
  };
  return writeTasks(opened, recipe, { modules, errors: encoded.errors }, termsOf, { scratch });
}

/** Takes the terms of an adapter, so that their memory is free once they are written. */
function taken({ terms }: Pick<Encoded, "terms">, adapter: Adapter): TermInput[] {
  const taken = terms.get(adapter) ?? [];
  terms.delete(adapter);
  return taken;
}

/** Tasks that share each side by itself, or nothing. */
export interface Rows {
  /**
   * Bases that are made already, and the tasks' choices, by module. Default: none, and the pack's report does not
   * mention them.
   */
  readonly sides?: ReadonlyMap<string, SharedSides> | undefined;
  /** Encodes a group of adapters with steps of ΔW, by id, until they fit. */
  choose(adapters: readonly Adapter[], encode: (steps: Steps) => Promise<Encoded>): Promise<Encoded>;
}

/**
 * Makes a pack without components of all tasks, one group of adapters at a time; of the earlier groups only the encoded
 * tasks are kept.
 * @param most numbers of the adapters that are worked on at a time
 */
export function packRows(
  opened: Adapters,
  recipe: Recipe,
  { sides, choose }: Rows,
  scratch: Scratch | undefined,
  most: number = GROUP,
): Promise<Streamed> {
  const { adapters, shared, fingerprints, extractor } = opened;
  const modules = shared.map(({ shape }) => {
    const { A = [], B = [] } = sides?.get(shape.name)?.bases ?? {};
    return { ...shape, A: A.map(sideInput), B: B.map(sideInput), fingerprint: fingerprints?.get(shape.name) };
  });
  const places = new Map(modules.map(({ name }, index) => [name, index]));
  const errors: ModuleError[] = [];
  const encodeGroup = async (group: readonly Adapter[], part: Adapters): Promise<Encoded["terms"]> => {
    const members = onlyOf(shared, group);
    const extracting = partOf(part, EXTRACTING);
    const known: Known = new Map();
    const encoded = await choose(group, (steps) =>
      encodeRows({ ...partOf(extracting, ROUND), shared: members }, recipe, sides ?? new Map(), steps, known, places),
    );
    for (const error of encoded.errors) errors.push(error);
    return encoded.terms;
  };
  const groups = groupsOf(adapters, most);
  let at = -1;
  let part = opened;
  let terms: Encoded["terms"] = new Map();
  const termsOf = async (adapter: Adapter): Promise<TermInput[]> => {
    if (!groups[at]?.includes(adapter)) {
      // The previous group is released first.
      terms = new Map();
      part = partOf(opened, 1 / (groups.length - ++at));
      terms = await encodeGroup(groups[at]!, part);
      part.meter.reach(EXTRACTING);
    }
    part.meter.reach(1 - (1 - EXTRACTING) * (terms.size / groups[at]!.length));
    return taken({ terms }, adapter);
  };
  return writeTasks(opened, recipe, { modules, errors, sides }, termsOf, { scratch, extractor });
}

/** @param termsOf is asked for the terms of each adapter in their order */
async function writeTasks(
  { adapters, fingerprints, meter }: Adapters,
  recipe: Recipe,
  {
    modules,
    errors,
    sides,
  }: { readonly modules: ModuleInput[]; readonly errors: readonly ModuleError[] } & Pick<Rows, "sides">,
  termsOf: (adapter: Adapter) => Promise<readonly TermInput[]>,
  how: Parameters<typeof newPack>[2],
): Promise<Streamed> {
  const { extraction, step, error, head } = recipe;
  const names = modules.map(({ name }) => name);
  const components = componentsOf(modules);
  const widths = modules.slice();
  const rescaled = new Set<string>();
  const tasks = adapters.map((adapter) => async () => {
    const own = await termsOf(adapter);
    if (own.some(({ magnitude }) => magnitude)) rescaled.add(adapter.id);
    // Integers with a step are stored in the smallest type that they fit.
    return encodeAdapter(adapter, step === undefined ? own : narrowTerms(own, widths), names, head);
  });
  const { gauge, centering, rank } = extraction;
  const baseModel = commonBase(adapters);
  // Handed over: the encoded components are in the chunks afterwards, and need not be held twice.
  const basis = { gauge, centering, rank, step, error, baseModel, modules: modules.splice(0) };
  const { bytes, chunks, blobs } = await newPack(basis, tasks, how);
  meter.reach(1);
  const made = { bytes, blobs, modules: names.length, components, errors, rescaled, sides };
  return { chunks, report: buildReport(adapters, recipe, { ...made, based: fingerprints !== undefined }) };
}

/** An adapter of rank 16 on all layers of half a billion numbers has half of it. */
const GROUP = 2 ** 24;

/** Adapters in their order, in groups of at most `most` numbers, or of one. */
function groupsOf(adapters: readonly Adapter[], most: number): Adapter[][] {
  const groups: Adapter[][] = [];
  let numbers = Infinity;
  for (const adapter of adapters) {
    const own = sum(adapter.modules.values(), ({ rank, in: i, out }) => rank * (i + out));
    if (numbers + own > most) {
      groups.push([]);
      numbers = 0;
    }
    numbers += own;
    groups.at(-1)!.push(adapter);
  }
  return groups;
}

function onlyOf(shared: readonly SharedModule<Adapter>[], group: readonly Adapter[]): SharedModule<Adapter>[] {
  const members = new Set(group);
  return shared
    .map(({ shape, owners }) => ({ shape, owners: owners.filter((owner) => members.has(owner)) }))
    .filter(({ owners }) => owners.length > 0);
}

// Adapters, read and encoded.

/** Adapters to be packed, and what works on them. */
export interface Adapters {
  readonly adapters: readonly Adapter[];
  /** Modules sorted by name, with the adapters that have them. */
  readonly shared: readonly SharedModule<Adapter>[];
  /** Samples of the base model's weights, by module; undefined where no base was given. */
  readonly fingerprints: ReadonlyMap<string, Float32Array> | undefined;
  readonly extractor: Extractor;
  readonly meter: Meter;
  readonly signal?: AbortSignal | undefined;
}

/** The same, with the next part of the work to tell of. @param share of what is left */
export function partOf(opened: Adapters, share: number): Adapters {
  return { ...opened, meter: opened.meter.part(share) };
}

/**
 * @throws AdapterError when adapters do not agree about a module or name different base models
 * @throws BaseMismatchError when the base given does not have the adapted modules
 */
export async function openAdapters(
  who: string,
  adapters: readonly Adapter[],
  { base, anyBase, onProgress, signal }: Pick<BuildOptions, "base" | "anyBase" | "onProgress" | "signal">,
  extractor: Extractor,
): Promise<Adapters> {
  checkAdapters(who, adapters);
  if (adapters.length === 0) throw new RangeError(`${who}: no adapters`);
  for (const adapter of adapters) refuseBoth(adapter);
  refuseTwins(adapters);
  refuseBases(adapters, anyBase);
  const shared = [...sharedModules(adapters).values()];
  const shapes = shared.map(({ shape }) => shape);
  const fingerprints = base === undefined ? undefined : await readFingerprints(base, shapes);
  return { adapters, shared, fingerprints, extractor, meter: Meter.of("packing", onProgress), signal };
}

/** Works on modules in their order. One more than are worked on is read meanwhile. */
export async function* eachModule<T>(
  { extractor, meter, signal }: Omit<Adapters, "adapters">,
  modules: readonly SharedModule<Adapter>[],
  work: (module: SharedModule<Adapter>) => Promise<T>,
): AsyncGenerator<T, void> {
  let done = 0;
  const unlessAborted = (module: SharedModule<Adapter>): Promise<T> => {
    throwIfAborted(signal);
    return work(module);
  };
  for await (const found of inOrder(modules, extractor.size + 1, unlessAborted)) {
    throwIfAborted(signal);
    meter.reach(++done / modules.length);
    yield found;
  }
}

/** Tasks by module that are encoded already, with the step that they were encoded with. */
type Known = Map<string, Map<string, EncodedTask & { readonly step: number }>>;

/**
 * Encodes tasks with residual rows, over what they share of each side.
 * @param steps of ΔW by id; 0 where there is none
 * @param known is brought up to date: only tasks with other steps are encoded again
 * @param places numbers of modules, by name
 */
async function encodeRows(
  opened: Omit<Adapters, "adapters">,
  { rows: dtype, extraction: { rank } }: Recipe,
  sides: ReadonlyMap<string, SharedSides>,
  steps: Steps,
  known: Known,
  places: ReadonlyMap<string, number>,
): Promise<Encoded> {
  const encoded: Encoded = { terms: new Map(), errors: [] };
  const stepFor = ({ id }: Adapter): number => steps.get(id) ?? 0;
  const work = async ({ shape, owners }: SharedModule<Adapter>): Promise<readonly EncodedTask[]> => {
    const tasks: NonNullable<ReturnType<Known["get"]>> = known.get(shape.name) ?? new Map();
    known.set(shape.name, tasks);
    const { bases = { A: [], B: [] }, choices } = sides.get(shape.name) ?? {};
    const changed = owners.filter((owner) => tasks.get(owner.id)?.step !== stepFor(owner));
    for (const piece of piecesOf({ shape, owners: changed })) {
      const { stack, terms } = await readStack(piece);
      const updates = await naming(piece, () =>
        opened.extractor.ask("takeSides", stack, {
          bases,
          choices: piece.owners.map(({ id }) => choices?.get(id) ?? UNSHARED),
          formats: piece.owners.map((owner) => ({ step: stepFor(owner), dtype })),
          rank,
        }),
      );
      for (const [i, update] of updates.entries()) {
        const owner = piece.owners[i]!;
        const task = encodedTask(shape.name, update, terms[i]!.magnitude, owner);
        tasks.set(owner.id, { ...task, step: stepFor(owner) });
      }
    }
    return owners.map(({ id }) => tasks.get(id)!);
  };
  let at = 0;
  for await (const tasks of eachModule(opened, opened.shared, work)) {
    const { shape, owners } = opened.shared[at++]!;
    for (const [i, owner] of owners.entries()) add(encoded, places.get(shape.name)!, owner, tasks[i]!);
  }
  return encoded;
}

/** One side as it is written. */
export function sideInput({ components: K, mean, dtype, explained, encoded }: SideBasis): SideInput {
  return { K, mean, dtype, explained, encoded };
}

const TOGETHER = 8;

/** Reads a module of its owners, in their order. @throws AdapterError for a value that is no number */
export async function readStack({
  shape,
  owners,
}: SharedModule<Adapter>): Promise<{ stack: ModuleStack; terms: readonly Term[] }> {
  const terms: Term[] = [];
  // Each that is read has several copies for a while.
  for (let at = 0; at < owners.length; at += TOGETHER) {
    const some = owners.slice(at, at + TOGETHER);
    terms.push(...(await Promise.all(some.map(({ modules }) => modules.get(shape.name)!.read()))));
  }
  const members = terms.map((term, i) => ({ ...term, id: owners[i]!.id }));
  return { stack: { ...shape, members }, terms };
}

/** Bytes of a module that are read at once where its owners need not meet. */
const PIECE_BYTES = 2 ** 21;

/** The module in pieces of a few owners each, in their order. */
export function piecesOf({ shape, owners }: SharedModule<Adapter>): SharedModule<Adapter>[] {
  const rank = Math.max(...owners.map(({ modules }) => modules.get(shape.name)!.rank), 1);
  const count = Math.max(1, Math.floor(PIECE_BYTES / (4 * rank * (shape.in + shape.out))));
  const pieces: SharedModule<Adapter>[] = [];
  for (let at = 0; at < owners.length; at += count) pieces.push({ shape, owners: owners.slice(at, at + count) });
  return pieces;
}

/** @throws AdapterError naming adapter and module, in place of an UnstorableError of `work` */
export async function naming<T>({ shape, owners }: SharedModule<Adapter>, work: () => Promise<T>): Promise<T> {
  try {
    return await work();
  } catch (cause) {
    if (!(cause instanceof UnstorableError)) throw cause;
    const { file } = owners.find(({ id }) => id === cause.owner) ?? owners[0]!;
    throw new AdapterError(cause.message, { file, field: shape.name, cause });
  }
}

/**
 * 64 weights of the base for each module (SPEC.md, section 4.4).
 * @throws BaseMismatchError when it does not have one
 */
export async function readFingerprints(
  base: BaseInput,
  modules: Iterable<ModuleShape>,
): Promise<Map<string, Float32Array>> {
  const host = await openHost(base);
  try {
    const locator = new WeightResolver(host);
    const prints = new Map<string, Float32Array>();
    for (const module of modules) {
      const located = inBase(locator, module);
      const view = await host.read(located.name);
      const bytes = (view.data as Uint8Array).subarray(view.byteOffset);
      const values = weightAt(bytes, located.dtype, module.out, module.in, located.transposed);
      prints.set(module.name, fingerprint(module.name, module.out, module.in, values));
    }
    return prints;
  } finally {
    // The caller's own source may be read again.
    if (typeof base === "string" || base instanceof URL) await host.close?.();
  }
}

/**
 * The same base with some weights under the names of the modules that they are. Read-only.
 * @param names the base's names of weights, by module name
 * @throws BaseMismatchError when the base has no such weight
 */
export function renamedHost(host: WeightHost, names: ReadonlyMap<string, string>): WeightHost {
  const known = new Map([...host.list()].map((parameter) => [parameter.name, parameter]));
  const weights = new Map<string, string>();
  for (const [module, weight] of names) {
    if (!known.has(weight)) {
      const candidates = nearest(weight, known.keys());
      throw new BaseMismatchError(
        `the base has no "${weight}", which "${module}" is said to be; candidates: ${candidates.join(", ") || "none"}`,
        { module, candidates },
      );
    }
    weights.set(`${module}.weight`, weight);
  }
  const renamed = [...weights].map(([name, weight]) => ({ ...known.get(weight)!, name }));
  for (const weight of weights.values()) known.delete(weight);
  return {
    list: () => [...known.values(), ...renamed],
    read: (name, into, options) => host.read(weights.get(name) ?? name, into, options),
    ...(host.close && { close: () => host.close!() }),
  };
}
