/**
 * Module after module as it is stored: read, extracted, encoded. Holds one stack for each thread, and one that is read meanwhile; never all
 * adapters.
 */
import type { Adapter } from "../adapters/adapter.ts";
import type { SharedModule } from "../adapters/modules.ts";
import type { Allocation, PrivateChoice } from "../extract/allocation.ts";
import { type Extractor, inOrder } from "../extract/extractor.ts";
import type { ExtractOptions } from "../extract/options.ts";
import type { MixedExtraction } from "../extract/private.ts";
import type { SideBasis } from "../extract/side.ts";
import type { ModuleInput, SideInput, TermInput } from "../format/encode.ts";
import type { Dtypes } from "../tensor/dtypes.ts";
import type { ModuleError } from "./report.ts";
import { piecesOf, readStack } from "./stack.ts";
import { stepsOf } from "./steps.ts";
import { encodeTerm } from "./tasks.ts";
import { checkBasis, naming } from "./unstorable.ts";

/** All modules, and what each adapter has of them. */
export interface Encoded {
  readonly modules: ModuleInput[];
  readonly terms: Map<Adapter, TermInput[]>;
  readonly errors: ModuleError[];
}

/** One module, extracted. */
interface Extracted {
  readonly module: MixedExtraction;
  /** Of each owner. */
  readonly magnitudes: readonly (Float32Array | undefined)[];
}

/** As of `BuildOptions`. */
interface EncodeOptions {
  readonly moments?: ReadonlyMap<string, Float64Array> | undefined;
  readonly privateTerms?: number | Allocation | undefined;
  readonly step?: number | undefined;
  /** Of ΔW, by adapter. Default: as `step` says. */
  readonly steps?: ReadonlyMap<Adapter, number> | undefined;
  readonly onProgress?: ((done: number, of: number) => void) | undefined;
  readonly signal?: AbortSignal | undefined;
}

type Choices = readonly (PrivateChoice | undefined)[];

/** What modules came to with these private terms and steps of their owners. */
export type Known = Map<
  string,
  Extracted & { readonly choices: Choices; readonly steps: readonly number[] | undefined }
>;

/**
 * Extracts and encodes all modules.
 * @param known what was extracted with other private terms, and is used again where they are the same; it is brought up to date
 */
export async function encodeModules(
  extractor: Extractor,
  shared: readonly SharedModule<Adapter>[],
  extraction: ExtractOptions,
  dtype: Dtypes,
  { moments: all, privateTerms = 0, step, steps: given, onProgress, signal }: EncodeOptions,
  known?: Known,
): Promise<Encoded> {
  const modules: ModuleInput[] = [];
  const terms = new Map<Adapter, TermInput[]>();
  const errors: ModuleError[] = [];
  const owners = shared.flatMap(({ owners }) => owners);
  const steps = given ?? (step === undefined ? undefined : await stepsOf(owners, step));
  const extract = async (module: SharedModule<Adapter>): Promise<Extracted> => {
    signal?.throwIfAborted();
    const { name } = module.shape;
    const moments = all?.get(name);
    if (all && !moments)
      throw new RangeError(
        `there are no moments of "${name}"; collect them for all adapted modules, or leave them out`,
      );
    const own = steps && module.owners.map((owner) => steps.get(owner)!);
    const options = { ...extraction, moments, steps: own };
    const choices = typeof privateTerms === "object" ? choicesOf(module, privateTerms) : privateTerms;
    return known && choices !== 0
      ? extractAgain(extractor, module, options, choices, known)
      : extractFrom(extractor, module, options, choices);
  };
  let index = 0;
  // One more than are worked on: it is read meanwhile.
  for await (const { module, magnitudes } of inOrder(shared, extractor.size + 1, extract)) {
    signal?.throwIfAborted();
    const { shape, owners } = shared[index]!;
    const { name } = shape;
    for (const [i, task] of module.tasks.entries()) {
      const owner = owners[i]!;
      errors.push({ task: task.id, module: name, error: task.error, norm: task.norm });
      const term = encodeTerm({ index, name }, task, module, magnitudes[i], owner, dtype);
      if (!(term.A || term.privateTerms || term.magnitude)) continue;
      if (!terms.has(owner)) terms.set(owner, []);
      terms.get(owner)!.push(term);
    }
    modules.push({ ...shape, ...basesOf(module) });
    index++;
    onProgress?.(index, shared.length);
  }
  return { modules, terms, errors };
}

function choicesOf({ shape, owners }: SharedModule<Adapter>, allocation: Allocation): Choices {
  return owners.map(({ id }) => allocation.get(id)?.get(shape.name));
}

/** What is known of a module, or that with other private terms: where nothing is shared, only tasks whose own have changed are asked for. */
async function extractAgain(
  extractor: Extractor,
  module: SharedModule<Adapter>,
  options: ExtractOptions,
  privateTerms: number | Choices,
  known: Known,
): Promise<Extracted> {
  const { shape, owners } = module;
  const { steps, coefficientDtype: dtype } = options;
  const before = known.get(shape.name);
  const all = [...owners.keys()];
  const choices = typeof privateTerms === "number" ? owners.map(() => ({ rank: privateTerms, dtype })) : privateTerms;
  const isChanged = (i: number): boolean => !alike(choices[i], before!.choices[i]) || steps?.[i] !== before!.steps?.[i];
  const changed = before ? all.filter(isChanged) : all;
  if (before && changed.length === 0) return before;
  const asked = sharesNothing(options) ? changed : all;
  const made = await extractFrom(
    extractor,
    { shape, owners: asked.map((i) => owners[i]!) },
    { ...options, steps: steps && asked.map((i) => steps[i]!) },
    asked.map((i) => choices[i]),
  );
  const found = before && asked.length < all.length ? replaced(before, made, asked) : made;
  known.set(shape.name, { ...found, choices, steps });
  return found;
}

function alike(one: PrivateChoice | undefined, other: PrivateChoice | undefined): boolean {
  return one?.rank === other?.rank && one?.dtype === other?.dtype;
}

/** What was known, with others in these places. */
function replaced(before: Extracted, made: Extracted, places: readonly number[]): Extracted {
  const [tasks, magnitudes] = [before.module.tasks.slice(), before.magnitudes.slice()];
  for (const [at, place] of places.entries()) {
    tasks[place] = made.module.tasks[at]!;
    magnitudes[place] = made.magnitudes[at];
  }
  return { module: { ...before.module, tasks }, magnitudes };
}

function sharesNothing({ select }: ExtractOptions): boolean {
  return select.kind === "k" && select.k === 0;
}

/** Reads a module and extracts it; where nothing is shared a few of its owners at a time, since each is by itself. */
async function extractFrom(
  extractor: Extractor,
  module: SharedModule<Adapter>,
  options: ExtractOptions,
  privateTerms: number | Choices,
): Promise<Extracted> {
  const parts: Extracted[] = [];
  let at = 0;
  for (const piece of sharesNothing(options) ? piecesOf(module) : [module]) {
    const end = at + piece.owners.length;
    const own = typeof privateTerms === "number" ? privateTerms : privateTerms.slice(at, end);
    parts.push(await extractPiece(extractor, piece, { ...options, steps: options.steps?.slice(at, end) }, own));
    at = end;
  }
  const [first] = parts as [Extracted, ...Extracted[]];
  const tasks = parts.flatMap(({ module }) => module.tasks);
  return { module: { ...first.module, tasks }, magnitudes: parts.flatMap(({ magnitudes }) => magnitudes) };
}

async function extractPiece(
  extractor: Extractor,
  module: SharedModule<Adapter>,
  options: ExtractOptions,
  privateTerms: number | Choices,
): Promise<Extracted> {
  const { stack, terms } = await readStack(module);
  const magnitudes = terms.map(({ magnitude }) => magnitude);
  return naming(module, async () => {
    const made = await extractor.ask("extract", stack, { ...options, privateTerms });
    checkBasis({ ...module.shape, ...basesOf(made) }, stack, options.gauge);
    return { module: made, magnitudes };
  });
}

/** Both sides as they are written; none where no task has coefficients. */
function basesOf({ tasks, A, B }: MixedExtraction): Pick<ModuleInput, "A" | "B"> {
  return tasks.some(({ rank }) => rank > 0) ? { A: sideInput(A), B: sideInput(B) } : {};
}

/** One side as it is written. */
export function sideInput({ components: K, rank, mean, dtype, explained, encoded }: SideBasis): SideInput {
  const kind = rank === undefined ? { kind: "column" as const } : { kind: "flat" as const, rank };
  return { ...kind, K, mean, dtype, explained, encoded };
}
