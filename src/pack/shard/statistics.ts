/**
 * Statistics of adapters: for each module and side a summary of its rows, and whose rows they are. Made of adapters,
 * read from a part or merged from several; one shape for all three, computed one module at a time when it is asked for.
 * From them comes a basis (`basis.ts`); adapters cannot be reconstructed.
 *
 * A part is one machine's share of a pack that is too large for it, as a file (SPEC.md, appendix B): a safetensors file
 * with a description and a checksum of its header and of every tensor, so that any safetensors reader can look into it.
 * It is not a cache: a part says what it was made from, and its owner decides what to make again.
 */

import {
  type Adapter,
  compare,
  type ModuleShape,
  refuseBases,
  type SharedModule,
  sharedModules,
} from "../../adapters/adapter.ts";
import { AdapterError, FormatError, TaskError } from "../../errors.ts";
import {
  type Components,
  checkRank,
  fixSigns,
  type Gauge,
  orthonormalize,
  reciprocal,
} from "../../extract/components.ts";
import { balance, leadingRows, pairOf } from "../../extract/factors.ts";
import { addScaled, dot, PLAIN, type Products, symmetricEigen, transpose } from "../../extract/linalg.ts";
import { fastProducts } from "../../extract/wasm-products.ts";
import { isTaskId } from "../../format/directory.ts";
import { crc32c, decode, type Value } from "../../format/fields.ts";
import { LAYOUTS, MOST_TASKS } from "../../format/format.ts";
import { kindOfSource } from "../../format/kind.ts";
import { pack } from "../../format/msgpackr.ts";
import { openSource } from "../../open-source.ts";
import { atOnce } from "../../pace.ts";
import type { SourceInput } from "../../source.ts";
import { sum } from "../../tensor/dtypes.ts";
import {
  openSafetensors,
  parseJson,
  type SafetensorsEntry,
  type SafetensorsFile,
  writeSafetensors,
} from "../../tensor/safetensors.ts";
import type { OnWork } from "../../work.ts";
import type { BuildOptions } from "../recipe.ts";

/** An adapted module, and the rows that each of its factors has over all adapters. */
interface StatisticsModule extends ModuleShape {
  readonly rows: number;
}

interface CountedAdapter {
  readonly id: string;
  readonly baseModel: string | undefined;
}

/** Sufficient statistics of adapters: components follow from these alone, as from the adapters themselves. */
export interface Statistics {
  /** File that they were made of, for messages. */
  readonly file: string;
  readonly gauge: Gauge;
  /** The most rows that were taken of an adapter's module, its strongest; undefined for all. */
  readonly rank: number | undefined;
  /**
   * Every adapter's factor counts alike, however large it is. Rows are kept as they are, Gram matrices are of scaled
   * rows.
   */
  readonly normalize: boolean;
  /** Sorted by id. */
  readonly adapters: readonly CountedAdapter[];
  /** Modules by name, sorted. */
  readonly modules: ReadonlyMap<string, StatisticsModule>;
  /** Rows of each adapter in a module, 0 for one that does not adapt it. */
  ranks(module: string): Promise<Uint32Array>;
  /**
   * The stack of a side, adapter by adapter. In the balanced gauge rows that were trimmed are zero, behind an adapter's
   * others.
   */
  side(module: string, side: "A" | "B"): Promise<Summary>;
}

/**
 * Statistics of adapters.
 * @param adapters one or more
 * @param options as of `buildPack`
 * @throws RangeError for a rank in another gauge than balanced
 * @throws AdapterError when two adapters do not agree about a module or the base model; TaskError when two have one id
 */
export async function adapterStatistics(
  adapters: readonly Adapter[],
  {
    gauge = "as-trained",
    rank,
    normalize = false,
    anyBase,
  }: Pick<BuildOptions, "gauge" | "rank" | "normalize" | "anyBase"> = {},
): Promise<Statistics> {
  checkRank({ gauge, rank });
  const most = rank ?? Infinity;
  const sorted = byId(adapters);
  refuseBases(sorted, anyBase);
  const shared = sharedModules(sorted);
  const rowsOf = (adapter: Adapter, name: string): number => Math.min(adapter.modules.get(name)?.rank ?? 0, most);
  const products = await fastProducts();
  const summarise = async ({ shape, owners }: SharedModule<Adapter>): Promise<Record<"A" | "B", Summary>> => {
    const { name, out, in: inputs } = shape;
    const rows = sum(owners, (owner) => rowsOf(owner, name));
    const sides = { A: collectSummary(rows, inputs, products), B: collectSummary(rows, out, products) };
    for (const owner of owners) {
      const given = pairOf(await owner.modules.get(name)!.read());
      const pair = gauge === "balanced" ? leadingRows(balance(given, out, inputs, products), most) : given;
      sides.A.add(pair.A, rowsOf(owner, name), normalize ? reciprocal(pair.A) : 1);
      sides.B.add(pair.Bt, rowsOf(owner, name), normalize ? reciprocal(pair.Bt) : 1);
    }
    return { A: sides.A.finish(), B: sides.B.finish() };
  };
  // Both sides come of one reading, and are asked for one after the other.
  let last: { name: string; sides: ReturnType<typeof summarise> } | undefined;
  return {
    file: sorted[0]!.file,
    gauge,
    rank,
    normalize,
    adapters: sorted.map(({ id, baseModel }) => ({ id, baseModel })),
    modules: counted(shared, rowsOf),
    ranks: async (name) => Uint32Array.from(sorted, (adapter) => rowsOf(adapter, name)),
    async side(name, side) {
      if (last?.name !== name) last = { name, sides: summarise(shared.get(name)!) };
      return (await last.sides)[side];
    },
  };
}

function counted<O>(
  shared: ReadonlyMap<string, SharedModule<O>>,
  rowsOf: (owner: O, name: string) => number,
): Map<string, StatisticsModule> {
  return new Map(
    [...shared].map(([name, { shape, owners }]) => {
      return [name, { ...shape, rows: sum(owners, (owner) => rowsOf(owner, name)) }];
    }),
  );
}

/**
 * Statistics of all adapters of several parts. The order of the parts makes no difference, nor does who merged which
 * before, beyond rounding in f64; while a side is kept as rows, none at all.
 * @param given one or more
 * @param options.anyBase as of `buildPack`
 * @throws TaskError for an adapter in two parts; AdapterError for parts of another gauge, base model or shapes
 */
export async function mergeStatistics(
  given: readonly Statistics[],
  options: { readonly anyBase?: boolean } = {},
): Promise<Statistics> {
  const parts = [...given].sort((a, b) => compare(a.adapters[0]!.id, b.adapters[0]!.id));
  const { file, gauge, rank, normalize } = parts[0]!;
  const members = byId(
    parts.flatMap((part) => part.adapters.map((adapter, index) => ({ ...adapter, file: part.file, part, index }))),
  );
  for (const part of parts) refuseOther(parts[0]!, part);
  refuseBases(members, options.anyBase);
  const shared = sharedModules(parts);
  const modules = counted(shared, (part, name) => part.modules.get(name)!.rows);
  const products = await fastProducts();
  const ranksOf = async (name: string): Promise<Map<Statistics, Uint32Array>> => {
    const { owners } = shared.get(name)!;
    return new Map(await Promise.all(owners.map(async (part) => [part, await part.ranks(name)] as const)));
  };
  return {
    file,
    gauge,
    rank,
    normalize,
    adapters: members.map(({ id, baseModel }) => ({ id, baseModel })),
    modules,
    async ranks(name) {
      const ranks = await ranksOf(name);
      return Uint32Array.from(members, ({ part, index }) => ranks.get(part)?.[index] ?? 0);
    },
    async side(name, side) {
      const { rows, out, in: inputs } = modules.get(name)!;
      const width = side === "A" ? inputs : out;
      const builder = collectSummary(rows, width, products);
      const add = ({ factor, rank }: Stacked): void => builder.add(factor, rank, normalize ? reciprocal(factor) : 1);
      const kind = summaryKind(rows, width);
      const stacks = new Map<Statistics, Stacked[]>();
      for (const [part, ranks] of await ranksOf(name)) {
        const summary = await part.side(name, side);
        if (summary.kind === "gram") builder.merge(summary);
        // Rows that are kept go adapter by adapter; for a Gram matrix their order does not count.
        else if (kind === "gram") factorsOf(summary.values, ranks, width).forEach(add);
        else stacks.set(part, factorsOf(summary.values, ranks, width));
      }
      for (const { part, index } of members) {
        const stacked = stacks.get(part)?.[index];
        if (stacked) add(stacked);
      }
      return builder.finish();
    },
  };
}

interface Stacked {
  factor: Float64Array;
  rank: number;
}

/** A stack cut into the rows of each adapter, as views; those without any too. */
export function factorsOf(rows: Float64Array, ranks: Uint32Array, width: number): Stacked[] {
  let start = 0;
  return Array.from(ranks, (rank) => ({ factor: rows.subarray(start * width, (start += rank) * width), rank }));
}

/** Adapters in the order of parts. @throws TaskError for two of one id */
export function byId<T extends { readonly id: string; readonly file: string }>(adapters: readonly T[]): T[] {
  const sorted = [...adapters].sort((a, b) => compare(a.id, b.id) || compare(a.file, b.file));
  const twice = sorted.findIndex(({ id }, i) => sorted[i - 1]?.id === id);
  if (twice < 0) return sorted;
  const { id, file } = sorted[twice]!;
  const message = `${sorted[twice - 1]!.file} and ${file} both hold "${id}": an adapter counts once; leave it out of one of them`;
  throw new TaskError(message, { task: id });
}

/** @throws AdapterError for parts of other settings */
function refuseOther(a: Statistics, b: Statistics): void {
  for (const setting of ["gauge", "rank", "normalize"] as const) {
    const ours = a[setting] ?? "whole";
    const theirs = b[setting] ?? "whole";
    if (ours === theirs) continue;
    const message = `${setting} is ${theirs}, but ${ours} in ${a.file}: make one of them again with the same`;
    throw new AdapterError(message, { file: b.file, field: setting });
  }
}

// A summary of a stack of rows for its principal components, small enough to travel: the rows themselves while they are
// few, else their Gram matrix and sum. Summaries of stacks that never meet in one memory add up to that of the whole
// stack, exactly for rows and up to rounding for Gram matrices, in any order and any grouping. In f64. The mean is
// taken off at the end, since it is known only there. For column mode: every other way of extraction needs all adapters
// at once.

/** The summary of a stack [count, width]. */
export type Summary = { readonly width: number; readonly count: number } & (
  | { readonly kind: "rows"; readonly values: Float64Array }
  | {
      readonly kind: "gram";
      /**
       * The lower triangle of YᵀY, row by row: entry (i, j) at i·(i + 1)/2 + j. Rows of Y are those of X times their
       * weights w.
       */
      readonly gram: Float64Array;
      /** Sums for the mean and its subtraction [width + 1]: Σ w·y, Σ w². */
      readonly sums: Float64Array;
    }
);

export function triangle(width: number): number {
  return (width * (width + 1)) / 2;
}

/** The smaller kind for a stack [count, width]. */
export function summaryKind(count: number, width: number): Summary["kind"] {
  return count * width <= triangle(width) ? "rows" : "gram";
}

/** Rows that are multiplied at once, in values of one side; a Gram matrix is updated by so much. */
const BLOCK_VALUES = 2 ** 22;
/** Rows and columns of a Gram matrix that are computed at once: what a product takes and gives stays small. */
const PANEL = 512;

interface SummaryCollector {
  /**
   * Adds rows [rows, width]; `values` may end early, the rest is zero.
   * @param weight of the rows in a Gram matrix; kept rows are weighed when components are taken of them. Default: 1
   */
  add(values: Float64Array, rows: number, weight?: number): void;
  merge(other: Summary & { kind: "gram" }): void;
  finish(): Summary;
}

/** Collects the summary of a stack [count, width]. Their number is said first, because it decides what is kept. */
function collectSummary(count: number, width: number, products: Products = PLAIN): SummaryCollector {
  const kind = summaryKind(count, width);
  const held = kind === "rows" ? count : Math.min(count, Math.max(1, Math.floor(BLOCK_VALUES / width)));
  /** All rows, or those that wait for the next product. */
  const values = new Float64Array(held * width);
  const gram = new Float64Array(kind === "gram" ? triangle(width) : 0);
  const sums = new Float64Array(kind === "gram" ? width + 1 : 0);
  let waiting = 0;
  const multiplyWaiting = (): void => {
    if (waiting > 0) addGram(gram, values.subarray(0, waiting * width), waiting, width, products);
    waiting = 0;
  };
  return {
    add(given, rows, weight = 1) {
      if (kind === "rows") {
        values.set(given, waiting * width);
        waiting += rows;
        return;
      }
      for (let at = 0; at < rows * width; at += width) {
        sums[width]! += weight ** 2;
        // A row of zeros counts in the mean and changes nothing else.
        if (at >= given.length) continue;
        const row = waiting * width;
        for (let j = 0; j < width; j++) values[row + j] = weight * given[at + j]!;
        addScaled(weight, values, row, sums, 0, width);
        if (++waiting === held) multiplyWaiting();
      }
    },
    merge(other) {
      addScaled(1, other.gram, 0, gram, 0, other.gram.length);
      addScaled(1, other.sums, 0, sums, 0, other.sums.length);
    },
    finish() {
      if (kind === "rows") return { width, count, kind, values };
      multiplyWaiting();
      return { width, count, kind, gram, sums };
    },
  };
}

/** Brings rows [count, width] into the triangle of a Gram matrix. */
function addGram(gram: Float64Array, rows: Float64Array, count: number, width: number, products: Products): void {
  const columns = transpose(rows, count, width);
  for (let i = 0; i < width; i += PANEL) {
    const m = Math.min(PANEL, width - i);
    const left = columns.subarray(i * count, (i + m) * count);
    for (let j = 0; j <= i; j += PANEL) {
      const n = Math.min(PANEL, width - j);
      const right = columns.subarray(j * count, (j + n) * count);
      const block = j === i ? products.gram(left, m, count) : products.multiplyTransposed(left, right, m, n, count);
      for (let row = 0; row < m; row++)
        addScaled(1, block, row * n, gram, triangle(i + row) + j, j === i ? row + 1 : n);
    }
  }
}

/**
 * A component is taken from a Gram matrix where its squared singular value is above this share of the largest, as in
 * `components.ts`; here there are no rows left to find weaker ones in.
 */
const RESOLVED = 2 ** -33;

/**
 * Finds mean and components of a stack from its Gram matrix.
 * @param choose see `principalComponents`
 * @returns components weaker than 1e-5 of the strongest, or of the mean, cannot be told from rounding and are left out
 */
export function gramComponents(
  { gram, sums, count: rows, width }: Summary & { kind: "gram" },
  centering: "keep" | "none",
  choose: number | ((singular: Float64Array, total: number) => number),
  products: Products = PLAIN,
): { mean: Float64Array | undefined; components: Components } {
  // Rounded as `columnMeans` does: a pack in f32 stores exactly the mean that was taken off.
  const turned = sums.subarray(0, width);
  const squares = sums[width]!;
  const mean = centering === "keep" ? turned.map((value) => Math.fround(value / (squares || 1))) : undefined;
  const square = new Float64Array(width * width);
  let total = 0;
  for (let i = 0; i < width; i++) {
    for (let j = 0; j <= i; j++) {
      let value = gram[triangle(i) + j]!;
      if (mean) value += squares * mean[i]! * mean[j]! - mean[i]! * turned[j]! - turned[i]! * mean[j]!;
      square[i * width + j] = square[j * width + i] = value;
    }
    total += square[i * width + i]!;
  }
  const limit = Math.min(rows, width);
  const least = RESOLVED * (mean ? squares * dot(mean, 0, mean, 0, width) : 0);
  const eigen = symmetricEigen(square, width, products.tridiagonalize);
  const singular = eigen.values.slice(0, limit).map((value) => Math.sqrt(Math.max(0, value)));
  let resolved = 0;
  while (resolved < singular.length && eigen.values[resolved]! > Math.max(least, RESOLVED * eigen.values[0]!))
    resolved++;
  if (resolved === 0) return { mean, components: { count: 0, vectors: new Float64Array(0), singular, total: 0 } };
  const count = Math.min(typeof choose === "number" ? choose : choose(singular, total), resolved);
  const vectors = eigen.vectors(count);
  orthonormalize(vectors, 0, count, width, singular);
  fixSigns(vectors, count, width);
  return { mean, components: { count, vectors, singular, total } };
}

// A part.

/** Contents of a part: statistics of adapters, or tasks on a basis. */
export type PartKind = "statistics" | "tasks";

/** A part may list as many tasks as a pack, each with a tensor of its own. */
const MOST_HEADER = 100_000_000;
const ABOUT = "eigenlora part";
/**
 * The last tensor, whatever the others are called: CRC-32C of the header, then of each tensor in the order of the file.
 */
const CHECKSUMS = "~checksums";

/** Commands that write a kind of part, and that take it. */
const USES = {
  statistics: "sharding and merging write it, merging takes it",
  tasks: "projecting or distilling writes it, assembling takes it",
} as const;

/** The bytes of a part, one tensor at a time. @param made a digest of all that the part depends on */
export async function* writePart(
  kind: PartKind,
  made: string,
  about: Readonly<Record<string, unknown>>,
  entries: readonly SafetensorsEntry[],
): AsyncGenerator<Uint8Array, void> {
  const checksums: number[] = [];
  const last: SafetensorsEntry = {
    name: CHECKSUMS,
    dtype: "U8",
    shape: [4 * (entries.length + 1)],
    read() {
      const view = new DataView(new ArrayBuffer(4 * checksums.length));
      checksums.forEach((crc, i) => view.setUint32(4 * i, crc, true));
      return new Uint8Array(view.buffer);
    },
  };
  const description = JSON.stringify({ kind, version: 1, made, ...about });
  for await (const chunk of writeSafetensors([...entries, last], new Map([[ABOUT, description]]))) {
    checksums.push(crc32c(chunk));
    yield chunk;
  }
}

/** An open part. Tensors are checked whenever they are read. */
export interface Part {
  /** Path, for messages. */
  readonly file: string;
  /** The digest given to `writePart`. */
  readonly made: string;
  readonly about: Value;
  readonly tensors: SafetensorsFile["tensors"];
  readonly byteLength: number;
  /** @throws FormatError for a tensor that is missing or damaged */
  read(name: string): Promise<Uint8Array>;
  /** Reads everything. @throws FormatError when something is damaged */
  verify(): Promise<void>;
  close(): Promise<void>;
}

/**
 * Opens a part and checks its description.
 * @param kind refuses the other kind, where it is given
 * @throws FormatError when the file is no part, of the other kind, truncated or damaged; SourceError when it cannot be
 *   read
 */
export async function openPart(input: SourceInput, kind?: PartKind): Promise<Part> {
  const source = await openSource(input, {}, "part");
  const file = source.name;
  const fail = (part: string, message: string): never => {
    throw new FormatError(message, { file, part });
  };
  const damaged = (part: string): never =>
    fail(part, "its checksum does not match: the part is damaged, make it again");
  try {
    const found = await kindOfSource(source);
    if (found === "an EigenLoRA task file") fail("header", "this is a task file, not a part: add it to a pack");
    if (found !== undefined && found !== "a safetensors file")
      fail("header", `this is ${found}, not a part${kind ? `: ${USES[kind]}` : ""}`);
    const tensors = await openSafetensors(source, { maxHeaderBytes: MOST_HEADER });
    const text = tensors.metadata.get(ABOUT);
    if (text === undefined) fail("header", `this is not a part${kind ? `: ${USES[kind]}` : ""}`);
    const places = [...tensors.tensors].sort(
      ([, a], [, b]) => a.byteOffset - b.byteOffset || a.byteLength - b.byteLength,
    );
    const [name, { byteLength }] = places.pop() ?? ["", { byteLength: 0 }];
    if (name !== CHECKSUMS || byteLength !== 4 * (places.length + 1))
      fail("checksums", "they are missing: the part is damaged, make it again");
    const sums = await tensors.read(CHECKSUMS);
    const view = new DataView(sums.buffer, sums.byteOffset, sums.length);
    const start = places[0]?.[1].byteOffset ?? tensors.tensors.get(CHECKSUMS)!.byteOffset;
    if (crc32c(await source.read(0, start)) !== view.getUint32(0, true)) damaged("header");
    const checksums = new Map(places.map(([tensor], i) => [tensor, view.getUint32(4 * (i + 1), true)]));
    const about: Value = describe(text!, file);
    const holds = oneOf(about.get("kind"), ["statistics", "tasks"]);
    const version = about.get("version").integer(1, Number.MAX_SAFE_INTEGER);
    if (version !== 1) about.fail(`version ${version}, but this reader knows version 1; update eigenlora`);
    if (kind && kind !== holds) fail("header", `it holds ${holds} (${USES[holds]}), expected ${kind}: ${USES[kind]}`);
    const read = async (tensor: string): Promise<Uint8Array> => {
      const bytes = await tensors.read(tensor);
      if (crc32c(bytes) !== checksums.get(tensor)) damaged(`tensor ${tensor}`);
      return bytes;
    };
    return {
      file,
      made: about.get("made").string(64),
      about,
      tensors: tensors.tensors,
      byteLength: tensors.byteLength,
      read,
      async verify() {
        for (const tensor of checksums.keys()) await read(tensor);
      },
      close: async () => source.close?.(),
    };
  } catch (error) {
    await source.close?.();
    throw error;
  }
}

/** Opens a part of one kind and reads its description; it is closed where that fails. */
export async function readPart<T>(input: SourceInput, kind: PartKind, read: (part: Part) => T): Promise<T> {
  const part = await openPart(input, kind);
  try {
    return read(part);
  } catch (error) {
    await part.close();
    throw error;
  }
}

/** JSON as a `Value`. A part may list more tasks than a pack. */
function describe(text: string, file: string): Value {
  try {
    return atOnce(decode(pack(parseJson(text)), file, "header", "description", 64, Infinity));
  } catch (cause) {
    throw new FormatError(`its description ${(cause as Error).message}`, { file, part: "header", cause });
  }
}

/** A word of the description. @throws FormatError when it is none of `words` */
export function oneOf<T extends string>(value: Value, words: readonly T[]): T {
  const found = value.string(64);
  const known = words.find((word) => word === found);
  if (known !== undefined) return known;
  return value.fail(`"${found}" is unknown here; update eigenlora`);
}

export function toBytes(values: Float64Array | Uint32Array): Uint8Array {
  return new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
}

// Statistics as a part: written and read one module at a time.

/** Statistics that hold a file open. */
export interface StatisticsPart extends Statistics {
  /** The digest given to `writeStatistics`. */
  readonly made: string;
  close(): Promise<void>;
}

const SIDES = ["A", "B"] as const;
const LIMIT = 2 ** 31 - 1;

/** The bytes of a part, module by module. @param made a digest of all that the statistics depend on */
export function writeStatistics(
  statistics: Statistics,
  made: string,
  onProgress?: OnWork,
): AsyncGenerator<Uint8Array, void> {
  const { gauge, rank, normalize, adapters, modules } = statistics;
  const entries: SafetensorsEntry[] = [];
  let done = 0;
  for (const module of modules.values()) {
    const { name } = module;
    for (const side of SIDES) {
      // Tensors of one side follow each other, so nothing is computed twice.
      let summary: Summary | undefined;
      const tensors = tensorsOf(module, side);
      for (const [i, { name: what, shape }] of tensors.entries()) {
        entries.push({
          name: what,
          dtype: "F64",
          shape,
          async read() {
            summary ??= await statistics.side(name, side);
            const bytes = toBytes(summary.kind === "rows" ? summary.values : i === 0 ? summary.gram : summary.sums);
            if (i === tensors.length - 1) {
              summary = undefined;
              onProgress?.({ stage: "collecting", done: ++done, total: 2 * modules.size, unit: "sides" });
            }
            return bytes;
          },
        });
      }
    }
    entries.push({
      name: `${name}.ranks`,
      dtype: "U32",
      shape: [adapters.length],
      read: async () => toBytes(await statistics.ranks(name)),
    });
  }
  return writePart("statistics", made, { gauge, rank, normalize, adapters, modules: [...modules.values()] }, entries);
}

/** The tensors of a module's side: all rows, or the Gram matrix and the sums. */
function tensorsOf({ name, rows, ...module }: StatisticsModule, side: "A" | "B"): { name: string; shape: number[] }[] {
  const width = side === "A" ? module.in : module.out;
  const tensor = (what: string, ...shape: number[]) => ({ name: `${name}.${side}.${what}`, shape });
  if (summaryKind(rows, width) === "rows") return [tensor("rows", rows, width)];
  return [tensor("gram", triangle(width)), tensor("sums", width + 1)];
}

/**
 * Opens a part with statistics.
 * @throws FormatError as `openPart`, and for a description that its tensors do not fit
 */
export function openStatistics(input: SourceInput): Promise<StatisticsPart> {
  return readPart(input, "statistics", readStatistics);
}

function readStatistics(part: Part): StatisticsPart {
  const { file, made } = part;
  const about: Value = part.about;
  const adapters = about.get("adapters").array(MOST_TASKS).map(parseAdapter);
  if (adapters.length === 0) about.fail("it has no adapters");
  if (!adapters.every(({ id }, i) => i === 0 || compare(adapters[i - 1]!.id, id) < 0))
    about.fail("its adapters are not sorted, or one is there twice");
  const modules = new Map<string, StatisticsModule>();
  const described: readonly Value[] = about.get("modules").array(65_536);
  for (const value of described) {
    const module = parseModule(value, part, adapters.length);
    if (modules.has(module.name)) value.fail(`two modules are named "${module.name}"`);
    modules.set(module.name, module);
  }
  const values = async (name: string): Promise<Float64Array> => {
    // A copy, since F64 must be aligned.
    const values = new Float64Array(new Uint8Array(await part.read(name)).buffer);
    const bad = values.findIndex((value) => !Number.isFinite(value));
    if (bad >= 0) throw new FormatError(`value ${bad} is ${values[bad]}`, { file, part: `tensor ${name}` });
    return values;
  };
  return {
    file,
    made,
    gauge: oneOf(about.get("gauge"), ["as-trained", "balanced"]),
    rank: about.get("rank").absent ? undefined : about.get("rank").integer(1, LIMIT),
    normalize: about.get("normalize").boolean(),
    adapters,
    modules,
    async ranks(name) {
      const bytes = await part.read(`${name}.ranks`);
      const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
      const ranks = Uint32Array.from(adapters, (_, i) => view.getUint32(4 * i, true));
      const rows = sum(ranks);
      const expected = modules.get(name)!.rows;
      if (rows !== expected) about.fail(`the ranks of ${name} add up to ${rows}, expected ${expected}`);
      return ranks;
    },
    async side(name, side) {
      const module = modules.get(name)!;
      const stack = { width: side === "A" ? module.in : module.out, count: module.rows };
      const [first, sums] = tensorsOf(module, side);
      const found = await values(first!.name);
      if (!sums) return { ...stack, kind: "rows", values: found };
      return { ...stack, kind: "gram", gram: found, sums: await values(sums.name) };
    },
    close: () => part.close(),
  };
}

function parseAdapter(value: Value): CountedAdapter {
  const id = value.get("id").string(255);
  if (!isTaskId(id)) value.fail(`${JSON.stringify(id)} cannot name a task`);
  const baseModel = value.get("baseModel");
  return { id, baseModel: baseModel.absent ? undefined : baseModel.string(4096) };
}

/** @throws FormatError also where the part's tensors are not as it says */
function parseModule(value: Value, { tensors }: Part, adapters: number): StatisticsModule {
  const kernel = value.get("kernel");
  const module = {
    name: value.get("name").string(1024),
    out: value.get("out").integer(1, LIMIT),
    in: value.get("in").integer(1, LIMIT),
    layout: oneOf(value.get("layout"), LAYOUTS),
    kernel: kernel.absent ? undefined : kernel.array(8).map((size) => size.integer(1, 65_535)),
    rows: value.get("rows").integer(1, LIMIT),
  };
  const check = ({ name, shape }: { name: string; shape: readonly number[] }, dtype: string): void => {
    const tensor = tensors.get(name);
    const found = tensor && `${tensor.dtype} [${tensor.shape}]`;
    const expected = `${dtype} [${shape}]`;
    if (found !== expected) value.fail(`${name} is ${found ?? "missing"}, expected ${expected}`);
  };
  for (const side of SIDES) for (const tensor of tensorsOf(module, side)) check(tensor, "F64");
  check({ name: `${module.name}.ranks`, shape: [adapters] }, "U32");
  return module;
}
