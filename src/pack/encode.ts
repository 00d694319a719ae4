/**
 * Encodes a recipe: module after module is read, extracted and encoded. Holds one stack for each thread, and one that
 * is read meanwhile; never all adapters.
 */

import type { Adapter, ModuleShape } from "../adapters/adapter.ts";
import {
  checkAdapters,
  refuseBases,
  refuseBoth,
  refuseTwins,
  type SharedModule,
  sharedModules,
} from "../adapters/adapter.ts";
import { inBase } from "../adapters/start.ts";
import { type BaseInput, WeightResolver } from "../core/base.ts";
import { AliasMatcher, fingerprint, weightAt } from "../core/mismatch.ts";
import { openHost } from "../core/open-base.ts";
import { AdapterError } from "../errors.ts";
import type { PrivateChoice } from "../extract/allocation.ts";
import { pairNorm } from "../extract/error.ts";
import type { ModuleStack } from "../extract/extract.ts";
import { type Extractor, inOrder } from "../extract/extractor.ts";
import { pairOf } from "../extract/gauge.ts";
import type { Gauge } from "../extract/options.ts";
import type { MixedExtraction } from "../extract/private.ts";
import type { SideBasis } from "../extract/side.ts";
import { APART, type SharedSides } from "../extract/sides.ts";
import { encodeBasis, type ModuleInput, type SideInput, type TermInput } from "../format/encode.ts";
import { throwIfAborted } from "../pace.ts";
import { UnstorableError } from "../tensor/encode.ts";
import type { Term } from "../tensor/term.ts";
import { Meter } from "../work.ts";
import type { BuildOptions, Recipe } from "./recipe.ts";
import type { ModuleError } from "./report.ts";
import { changes, encodeTerm, sidesTerm, stepsOf } from "./tasks.ts";

/** Adapters to be packed, and what works on them. */
export interface Adapters {
  readonly adapters: readonly Adapter[];
  /** Modules sorted by name, with the adapters that have them. */
  readonly shared: readonly SharedModule<Adapter>[];
  /** Samples of the base model's weights, by module; undefined where no base was given. */
  readonly fingerprints: ReadonlyMap<string, Float32Array> | undefined;
  readonly extractor: Extractor;
  /** Is told what is done. */
  readonly meter: Meter;
  readonly signal?: AbortSignal | undefined;
}

/** The same, with the next part of the work to tell of. @param share of what is left */
export function partOf(opened: Adapters, share: number): Adapters {
  return { ...opened, meter: opened.meter.part(share) };
}

/** What a pack stores: all modules, and what each adapter has of them. */
export interface Encoded {
  readonly modules: ModuleInput[];
  readonly terms: Map<Adapter, TermInput[]>;
  readonly errors: ModuleError[];
}

/** One module, extracted. */
interface Extracted extends Pick<ModuleInput, "A" | "B"> {
  readonly tasks: readonly ExtractedTask[];
}

/** A task of a module, with what it was extracted with. */
interface ExtractedTask extends Wanted {
  readonly id: string;
  readonly error: number;
  readonly norm: number;
  readonly term: Omit<TermInput, "module">;
}

/** What a recipe says of a task's private terms in a module, and of its step. */
interface Wanted {
  readonly choice: PrivateChoice | undefined;
  readonly step: number | undefined;
}

/** What modules came to, by name: with another recipe only tasks with other private terms or steps are extracted again. */
export type Known = Map<string, Extracted>;

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

/**
 * Extracts and encodes all modules.
 * @param known with it a recipe that differs in private terms or steps alone is encoded again for less; it is brought up to date
 */
export async function encode(
  { shared, fingerprints, extractor, meter, signal }: Omit<Adapters, "adapters">,
  recipe: Recipe,
  known?: Known,
): Promise<Encoded> {
  const encoded: Encoded = { modules: [], terms: new Map(), errors: [] };
  const { modules, terms, errors } = encoded;
  const owners = shared.flatMap((module) => module.owners);
  const steps = recipe.steps ?? (recipe.step === undefined ? undefined : await stepsOf(owners, recipe.step));
  const extracted = (module: SharedModule<Adapter>): Promise<Extracted> => {
    throwIfAborted(signal);
    return extract(extractor, { ...recipe, steps }, module, known);
  };
  // One more than are worked on: it is read meanwhile.
  for await (const found of inOrder(shared, extractor.size + 1, extracted)) {
    throwIfAborted(signal);
    const index = modules.length;
    const { shape, owners } = shared[index]!;
    const { name } = shape;
    for (const [i, { id, error, norm, term }] of found.tasks.entries()) {
      const owner = owners[i]!;
      errors.push({ task: id, module: name, error, norm });
      if (!changes(term)) continue;
      if (!terms.has(owner)) terms.set(owner, []);
      terms.get(owner)!.push({ module: index, ...term });
    }
    modules.push({ ...shape, A: found.A, B: found.B, fingerprint: fingerprints?.get(name) });
    meter.reach(modules.length / shared.length);
  }
  return encoded;
}

/** One module with a recipe, or what is known of it. Where nothing is shared, only tasks that have changed are asked for. */
async function extract(
  extractor: Extractor,
  recipe: Recipe,
  module: SharedModule<Adapter>,
  known: Known | undefined,
): Promise<Extracted> {
  const { shape, owners } = module;
  const before = known?.get(shape.name);
  const wanted = owners.map((owner) => wantedOf(recipe, shape.name, owner));
  const all = [...owners.keys()];
  const changed = before ? all.filter((i) => !alike(wanted[i]!, before.tasks[i]!)) : all;
  if (before && changed.length === 0) return before;
  const { select } = recipe.extraction;
  const sides = recipe.sides?.get(shape.name);
  // Bases that are made already, and none, leave each task by itself.
  const alone = sides !== undefined || (select.kind === "k" && select.k === 0);
  const asked = alone ? changed : all;
  const found: Extracted[] = [];
  let at = 0;
  // A few are read at a time.
  for (const piece of alone ? piecesOf({ shape, owners: asked.map((i) => owners[i]!) }) : [module]) {
    const own = asked.slice(at, (at += piece.owners.length)).map((i) => wanted[i]!);
    found.push(await (sides ? piecePlaced(extractor, sides, piece, own) : extractPiece(extractor, recipe, piece, own)));
  }
  const tasks = found.flatMap((piece) => piece.tasks);
  const whole = before && asked.length < all.length ? before.tasks.slice() : tasks;
  if (whole !== tasks) for (const [i, place] of asked.entries()) whole[place] = tasks[i]!;
  const extracted = { ...found[0]!, tasks: whole };
  known?.set(shape.name, extracted);
  return extracted;
}

function wantedOf({ privateTerms, extraction, steps }: Recipe, module: string, { id }: Adapter): Wanted {
  const all = { rank: privateTerms as number, dtype: extraction.coefficientDtype };
  const choice = typeof privateTerms === "number" ? all : privateTerms.get(id)?.get(module);
  return { choice, step: steps?.get(id) };
}

function alike(one: Wanted, other: Wanted): boolean {
  const { rank, dtype } = one.choice ?? {};
  return rank === other.choice?.rank && dtype === other.choice?.dtype && one.step === other.step;
}

async function extractPiece(
  extractor: Extractor,
  { extraction, privateTerms, steps }: Recipe,
  module: SharedModule<Adapter>,
  wanted: readonly Wanted[],
): Promise<Extracted> {
  const { stack, terms } = await readStack(module);
  return naming(module, async () => {
    const found = await extractor.ask("extract", stack, {
      ...extraction,
      steps: steps && wanted.map(({ step }) => step!),
      privateTerms: typeof privateTerms === "number" ? privateTerms : wanted.map(({ choice }) => choice),
    });
    const bases = basesOf(found);
    checkBasis({ ...module.shape, ...bases }, stack, extraction.gauge);
    const tasks = found.tasks.map(({ id, error, norm, ...task }, i): ExtractedTask => {
      const { name } = module.shape;
      const magnitude = terms[i]!.magnitude;
      const term = encodeTerm(name, { ...task, magnitude }, found, module.owners[i]!, extraction.coefficientDtype);
      return { id, error, norm, term, ...wanted[i]! };
    });
    return { ...bases, tasks };
  });
}

/** Both sides as they are written; none where no task has coefficients. */
function basesOf({ tasks, A, B }: MixedExtraction): Pick<ModuleInput, "A" | "B"> {
  return tasks.some(({ rank }) => rank > 0) ? { A: [sideInput(A)], B: [sideInput(B)] } : {};
}

/** Tasks of a module on bases that are made. */
async function piecePlaced(
  extractor: Extractor,
  { bases, choices }: SharedSides,
  module: SharedModule<Adapter>,
  wanted: readonly Wanted[],
): Promise<Extracted> {
  const { stack, terms } = await readStack(module);
  const how = {
    bases,
    choices: stack.members.map(({ id }) => choices.get(id) ?? APART),
    steps: wanted.map(({ step }) => step!),
  };
  const found = await naming(module, () => extractor.ask("takeSides", stack, how));
  const tasks = found.map((task, i): ExtractedTask => {
    const { id, error, norm } = task;
    const term = sidesTerm(module.shape.name, { ...task, magnitude: terms[i]!.magnitude }, module.owners[i]!);
    return { id, error, norm, term, ...wanted[i]! };
  });
  return { A: bases.A.map(sideInput), B: bases.B.map(sideInput), tasks };
}

/** One side as it is written. */
export function sideInput({ components: K, rank, mean, dtype, explained, encoded }: SideBasis): SideInput {
  const kind = rank === undefined ? { kind: "column" as const } : { kind: "flat" as const, rank };
  return { ...kind, K, mean, dtype, explained, encoded };
}

/** Adapters that are read at a time. */
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

/** What is read of a module at once where its owners need not meet. */
const PIECE_BYTES = 2 ** 21;

/** The module in pieces of a few owners each, in their order. */
export function piecesOf({ shape, owners }: SharedModule<Adapter>): SharedModule<Adapter>[] {
  const rank = Math.max(...owners.map(({ modules }) => modules.get(shape.name)!.rank), 1);
  const count = Math.max(1, Math.floor(PIECE_BYTES / (4 * rank * (shape.in + shape.out))));
  const pieces: SharedModule<Adapter>[] = [];
  for (let at = 0; at < owners.length; at += count) pieces.push({ shape, owners: owners.slice(at, at + count) });
  return pieces;
}

/** Whether an adapter has a value that cannot be stored as it was tried; in another way it may be. */
export function isUnstorable(error: unknown): error is AdapterError {
  return error instanceof AdapterError && error.cause instanceof UnstorableError;
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
 * Checks a basis against the limit that values in a pack have whatever their format is.
 * @param stack that it was made of
 * @throws UnstorableError of the adapter with the largest values: components are too large because of one of them
 */
function checkBasis({ A, B, ...shape }: ModuleInput, { members }: ModuleStack, gauge: Gauge): void {
  for (const [side, bases, dtype] of [
    ["A", { A }, A?.[0]?.dtype],
    ["Bt", { B }, B?.[0]?.dtype],
  ] as const) {
    // f16 holds no such values.
    if (dtype === undefined || dtype === "f16") continue;
    try {
      refuseLarge({ ...shape, ...bases });
    } catch (cause) {
      if (!(cause instanceof UnstorableError)) throw cause;
      // Both balanced factors are as large as ΔW makes them.
      const sizes = members.map((one) => (gauge === "balanced" ? pairNorm(pairOf(one)) : peakOf(one[side])));
      throw new UnstorableError(cause.message, cause, members[sizes.indexOf(Math.max(...sizes))]!.id);
    }
  }
}

/** @throws UnstorableError for a basis with values that no pack can hold */
export function refuseLarge(module: ModuleInput): void {
  encodeBasis({ producer: "", mode: "column", gauge: "as-trained", centering: "none", modules: [module] });
}

/** The largest magnitude. */
export function peakOf(values: Float32Array | Float64Array): number {
  let peak = 0;
  for (const value of values) peak = Math.max(peak, Math.abs(value));
  return peak;
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
    const resolver = new WeightResolver(host);
    resolver.names = new AliasMatcher(resolver.parameters.keys());
    const prints = new Map<string, Float32Array>();
    for (const module of modules) {
      const located = inBase(resolver, module);
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
