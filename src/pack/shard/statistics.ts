/**
 * Statistics of adapters: for each module and side the summary of its rows (`extract/summary.ts`), and whose rows they are.
 * Made of adapters, read from a part or merged from several; one shape for all three, computed one module at a time when it is
 * asked for. From them comes a basis (`basis.ts`), and no adapter can be had back.
 */
import type { Adapter, AdapterModule } from "../../adapters/adapter.ts";
import { AdapterError, FormatError, TaskError } from "../../errors.ts";
import { checkRank, type Gauge, reciprocal } from "../../extract/extract.ts";
import { balance, leadingRows } from "../../extract/gauge.ts";
import type { Products } from "../../extract/linalg.ts";
import { type Summary, SummaryBuilder, summaryKind, triangle } from "../../extract/summary.ts";
import { isTaskId, LAYOUTS } from "../../format/format.ts";
import type { Value } from "../../format/messagepack.ts";
import type { SourceInput } from "../../source.ts";
import type { SafetensorsEntry } from "../../tensor/safetensors-writer.ts";
import { type BuildOptions, checkSame, fastProducts } from "../build.ts";
import { oneOf, openPart, toBytes, toF64, writePart } from "./part.ts";

/** One adapted module, and how many rows each of its sides has over all adapters. */
export interface StatisticsModule extends Pick<AdapterModule, "name" | "out" | "in" | "layout" | "kernel"> {
  readonly rows: number;
}

/** An adapter that was counted. */
export interface CountedAdapter {
  readonly id: string;
  /** The base model that it names. */
  readonly baseModel: string | undefined;
}

export interface Statistics {
  /** What they were made of, for messages. */
  readonly file: string;
  readonly gauge: Gauge;
  /** The most rows that were taken of an adapter's module, its strongest; undefined for all. */
  readonly rank: number | undefined;
  /** Whether every adapter's factor counts alike, however large it is. Rows are kept as they are, Gram matrices are of scaled rows. */
  readonly normalize: boolean;
  /** Sorted by id. */
  readonly adapters: readonly CountedAdapter[];
  /** By name, sorted. */
  readonly modules: ReadonlyMap<string, StatisticsModule>;
  /** Rows of each adapter in a module, 0 for one that does not adapt it. */
  ranks(module: string): Promise<Uint32Array>;
  /** The stack of a side, adapter by adapter. In the balanced gauge rows that were trimmed are zero, behind an adapter's others. */
  side(module: string, side: "A" | "B"): Promise<Summary>;
}

/** Statistics that hold a file open. */
export interface StatisticsPart extends Statistics {
  /** As given to `writeStatistics`. */
  readonly made: string;
  close(): Promise<void>;
}

const SIDES = ["A", "B"] as const;
const LIMIT = 2 ** 31 - 1;

/** By code units, so that the order is the same on every machine. */
export function compare(a: string, b: string): number {
  return a < b ? -1 : a > b ? 1 : 0;
}

/**
 * Statistics of adapters.
 * @param options as of `buildPack`
 * @throws RangeError for a rank in another gauge than balanced
 * @throws AdapterError when two adapters do not agree about a module; TaskError when two have one id
 */
export async function adapterStatistics(
  adapters: readonly Adapter[],
  { gauge = "as-trained", rank, normalize = false }: Pick<BuildOptions, "gauge" | "rank" | "normalize"> = {},
): Promise<Statistics> {
  if (adapters.length === 0) throw new RangeError("adapterStatistics: no adapters");
  checkRank({ gauge, rank });
  const most = rank ?? Infinity;
  const sorted = [...adapters].sort((a, b) => compare(a.id, b.id));
  refuseTwice(sorted.map(({ id, file }) => ({ id, file })));
  const names = [...new Set(sorted.flatMap((adapter) => [...adapter.modules.keys()]))].sort();
  const modules = new Map<string, StatisticsModule>();
  for (const name of names) {
    const owners = sorted.filter((adapter) => adapter.modules.has(name));
    const module = owners[0]!.modules.get(name)!;
    for (const owner of owners) checkSame(module, owners[0]!.file, owner.modules.get(name)!, owner.file);
    const rows = owners.reduce((sum, owner) => sum + Math.min(owner.modules.get(name)!.rank, most), 0);
    const { out, in: inputs, layout, kernel } = module;
    modules.set(name, { name, out, in: inputs, layout, ...(kernel ? { kernel } : {}), rows });
  }
  const { products } = await fastProducts();
  // Both sides come of one reading, and are asked for one after the other.
  let last: { name: string; sides: Promise<Record<"A" | "B", Summary>> } | undefined;
  return {
    file: sorted[0]!.file,
    gauge,
    rank,
    normalize,
    adapters: sorted.map(({ id, baseModel }) => ({ id, baseModel })),
    modules,
    ranks: async (name) => Uint32Array.from(sorted, (adapter) => Math.min(adapter.modules.get(name)?.rank ?? 0, most)),
    async side(name, side) {
      if (last?.name !== name)
        last = { name, sides: summarise(sorted, modules.get(name)!, { gauge, most, normalize, products }) };
      return (await last.sides)[side];
    },
  };
}

async function summarise(
  adapters: readonly Adapter[],
  { name, out, in: inputs, rows }: StatisticsModule,
  {
    gauge,
    most,
    normalize,
    products,
  }: { gauge: Gauge; most: number; normalize: boolean; products: Products | undefined },
): Promise<Record<"A" | "B", Summary>> {
  const sides = { A: new SummaryBuilder(rows, inputs, products), B: new SummaryBuilder(rows, out, products) };
  for (const adapter of adapters) {
    const module = adapter.modules.get(name);
    if (!module) continue;
    const { A, Bt } = await module.read();
    const given = { rank: module.rank, A: Float64Array.from(A), Bt: Float64Array.from(Bt) };
    const pair = gauge === "balanced" ? leadingRows(balance(given, out, inputs), most) : given;
    const taken = Math.min(module.rank, most);
    sides.A.add(pair.A, taken, normalize ? reciprocal(pair.A) : 1);
    sides.B.add(pair.Bt, taken, normalize ? reciprocal(pair.Bt) : 1);
  }
  return { A: sides.A.finish(), B: sides.B.finish() };
}

/**
 * Statistics of all adapters of several parts. The order of the parts makes no difference, nor does who merged which before,
 * beyond rounding in f64; while a side is kept as rows, none at all.
 * @param options.anyBase take parts whose adapters name different base models
 * @throws TaskError for an adapter in two parts; AdapterError for parts of another gauge, base model or shapes
 */
export async function mergeStatistics(
  given: readonly Statistics[],
  options: { anyBase?: boolean } = {},
): Promise<Statistics> {
  if (given.length === 0) throw new RangeError("mergeStatistics: no parts");
  const parts = [...given].sort((a, b) => compare(a.adapters[0]!.id, b.adapters[0]!.id));
  const first = parts[0]!;
  const members = parts
    .flatMap((part) => part.adapters.map((adapter, index) => ({ ...adapter, file: part.file, part, index })))
    .sort((a, b) => compare(a.id, b.id) || compare(a.file, b.file));
  refuseTwice(members);
  for (const part of parts) {
    for (const setting of ["gauge", "rank", "normalize"] as const) {
      const [ours, theirs] = [first[setting] ?? "whole", part[setting] ?? "whole"];
      if (ours === theirs) continue;
      throw new AdapterError(
        `${setting} is ${theirs}, but ${ours} in ${first.file}: shard one of them again, with the same --${setting}`,
        {
          file: part.file,
          field: setting,
        },
      );
    }
    if (!options.anyBase) refuseOtherBase(first, part);
  }
  const modules = new Map<string, StatisticsModule>();
  for (const name of [...new Set(parts.flatMap((part) => [...part.modules.keys()]))].sort()) {
    const owners = parts.filter((part) => part.modules.has(name));
    const module = owners[0]!.modules.get(name)!;
    for (const owner of owners) checkSame(module, owners[0]!.file, owner.modules.get(name)!, owner.file);
    modules.set(name, { ...module, rows: owners.reduce((sum, owner) => sum + owner.modules.get(name)!.rows, 0) });
  }
  const { products } = await fastProducts();
  const ranksOf = async (name: string): Promise<Map<Statistics, Uint32Array>> => {
    const owners = parts.filter((part) => part.modules.has(name));
    return new Map(await Promise.all(owners.map(async (part) => [part, await part.ranks(name)] as const)));
  };
  return {
    file: first.file,
    gauge: first.gauge,
    rank: first.rank,
    normalize: first.normalize,
    adapters: members.map(({ id, baseModel }) => ({ id, baseModel })),
    modules,
    async ranks(name) {
      const ranks = await ranksOf(name);
      return Uint32Array.from(members, ({ part, index }) => ranks.get(part)?.[index] ?? 0);
    },
    async side(name, side) {
      const { rows, out, in: inputs } = modules.get(name)!;
      const width = side === "A" ? inputs : out;
      const builder = new SummaryBuilder(rows, width, products);
      const add = (factor: Float64Array, rank: number): void =>
        builder.add(factor, rank, first.normalize ? reciprocal(factor) : 1);
      if (summaryKind(rows, width) === "gram") {
        for (const part of parts.filter((part) => part.modules.has(name))) {
          const summary = await part.side(name, side);
          if (summary.kind === "gram") builder.merge(summary);
          else
            for (const { factor, rank } of factorsOf(summary.values, await part.ranks(name), width)) add(factor, rank);
        }
        return builder.finish();
      }
      const stacks = new Map<Statistics, Stacked[]>();
      for (const [part, ranks] of await ranksOf(name))
        stacks.set(part, factorsOf(rowsOf(await part.side(name, side)), ranks, width));
      for (const { part, index } of members) {
        const { factor, rank } = stacks.get(part)?.[index] ?? { factor: new Float64Array(0), rank: 0 };
        add(factor, rank);
      }
      return builder.finish();
    },
  };
}

/** One adapter's rows in a stack. */
interface Stacked {
  factor: Float64Array;
  rank: number;
}

/** A stack cut into the rows of each adapter, as views; those without any too. */
export function factorsOf(rows: Float64Array, ranks: Uint32Array, width: number): Stacked[] {
  let start = 0;
  return Array.from(ranks, (rank) => ({ factor: rows.subarray(start * width, (start += rank) * width), rank }));
}

function rowsOf(summary: Summary): Float64Array {
  if (summary.kind === "rows") return summary.values;
  throw new RangeError(`a Gram matrix of ${summary.count} rows of width ${summary.width}, where rows are smaller`);
}

function refuseTwice(sorted: readonly { id: string; file: string }[]): void {
  sorted.forEach(({ id, file }, i) => {
    const before = sorted[i - 1];
    if (before?.id !== id) return;
    throw new TaskError(
      `${before.file} and ${file} both hold "${id}": an adapter counts once; leave it out of one of them`,
      { task: id },
    );
  });
}

/** Parts whose adapters have no base model in common; within one part, and in `pack`, that is a warning. */
function refuseOtherBase(a: Statistics, b: Statistics): void {
  const [ours, theirs] = [baseModels(a), baseModels(b)];
  if (ours.length === 0 || theirs.length === 0 || ours.some((name) => theirs.includes(name))) return;
  throw new AdapterError(
    `its adapters are of ${theirs.join(", ")}, those of ${a.file} of ${ours.join(", ")}; if these are one model, say --any-base`,
    { file: b.file, field: "base model" },
  );
}

/** The base models that the adapters name, in the order of the adapters. */
export function baseModels({ adapters }: Pick<Statistics, "adapters">): string[] {
  return [...new Set(adapters.map(({ baseModel }) => baseModel).filter((name) => name !== undefined))];
}

/**
 * The bytes of a part, module by module.
 * @param made a digest of what the statistics were made of
 */
export function writeStatistics(
  statistics: Statistics,
  made: string,
  onProgress?: (done: number, of: number) => void,
): AsyncGenerator<Uint8Array, void> {
  const { gauge, rank, normalize, adapters, modules } = statistics;
  const entries: SafetensorsEntry[] = [];
  let done = 0;
  for (const { name, rows, out, in: inputs } of modules.values()) {
    for (const side of SIDES) {
      const width = side === "A" ? inputs : out;
      // Of the same side one after the other, so nothing is computed twice.
      let summary: Summary | undefined;
      const part = (what: string, shape: number[], of: (summary: Summary) => Float64Array, last: boolean): void => {
        entries.push({
          name: `${name}.${side}.${what}`,
          dtype: "F64",
          shape,
          async read() {
            summary ??= await statistics.side(name, side);
            const bytes = toBytes(of(summary));
            if (last) {
              summary = undefined;
              onProgress?.(++done, 2 * modules.size);
            }
            return bytes;
          },
        });
      };
      if (summaryKind(rows, width) === "rows") part("rows", [rows, width], rowsOf, true);
      else {
        part("gram", [triangle(width)], (s) => (s as Summary & { kind: "gram" }).gram, false);
        part("sums", [2, width + 1], (s) => (s as Summary & { kind: "gram" }).sums, true);
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

/**
 * Opens a part with statistics.
 * @throws FormatError as `openPart`, and for a description that its tensors do not fit
 */
export async function openStatistics(input: SourceInput): Promise<StatisticsPart> {
  const part = await openPart(input, "statistics");
  const { file, tensors, made } = part;
  const about: Value = part.about;
  try {
    const gauge = oneOf(about.get("gauge"), ["as-trained", "balanced"]);
    const rank = about.get("rank").absent ? undefined : about.get("rank").integer(1, LIMIT);
    const adapters = about.get("adapters").array(1_048_576).map(parseAdapter);
    about.check(adapters.length > 0, () => "it has no adapters");
    about.check(
      adapters.every(({ id }, i) => i === 0 || compare(adapters[i - 1]!.id, id) < 0),
      () => "its adapters are not sorted, or one is there twice",
    );
    const modules = new Map<string, StatisticsModule>();
    const described: readonly Value[] = about.get("modules").array(65_536);
    for (const value of described) {
      const module = parseModule(value);
      value.check(!modules.has(module.name), () => `two modules are named "${module.name}"`);
      modules.set(module.name, module);
      const place = (name: string, dtype: string, ...shape: number[]): void => {
        const found = tensors.get(`${module.name}.${name}`);
        const fits = found?.dtype === dtype && String(found.shape) === String(shape);
        value.check(
          fits,
          () =>
            `${module.name}.${name} is ${found ? `${found.dtype} [${found.shape}]` : "missing"}, expected ${dtype} [${shape}]`,
        );
      };
      for (const side of SIDES) {
        const width = side === "A" ? module.in : module.out;
        if (summaryKind(module.rows, width) === "rows") place(`${side}.rows`, "F64", module.rows, width);
        else {
          place(`${side}.gram`, "F64", triangle(width));
          place(`${side}.sums`, "F64", 2, width + 1);
        }
      }
      place("ranks", "U32", adapters.length);
    }
    const values = async (name: string): Promise<Float64Array> => {
      const found = toF64(await part.read(name));
      const bad = found.findIndex((value) => !Number.isFinite(value));
      if (bad >= 0) throw new FormatError(`value ${bad} is ${found[bad]}`, { file, part: `tensor ${name}` });
      return found;
    };
    return {
      file,
      made,
      gauge,
      rank,
      normalize: about.get("normalize").boolean(),
      adapters,
      modules,
      async ranks(name) {
        const bytes = await part.read(`${name}.ranks`);
        const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
        const ranks = Uint32Array.from(adapters, (_, i) => view.getUint32(4 * i, true));
        const rows = ranks.reduce((sum, rank) => sum + rank, 0);
        about.check(
          rows === modules.get(name)!.rows,
          () => `the ranks of ${name} add up to ${rows}, expected ${modules.get(name)!.rows}`,
        );
        return ranks;
      },
      async side(name, side) {
        const { rows: count, out, in: inputs } = modules.get(name)!;
        const width = side === "A" ? inputs : out;
        const stack = { width, count };
        if (summaryKind(count, width) === "rows")
          return { ...stack, kind: "rows", values: await values(`${name}.${side}.rows`) };
        return {
          ...stack,
          kind: "gram",
          gram: await values(`${name}.${side}.gram`),
          sums: await values(`${name}.${side}.sums`),
        };
      },
      close: () => part.close(),
    };
  } catch (error) {
    await part.close();
    throw error;
  }
}

function parseAdapter(value: Value): CountedAdapter {
  const id = value.get("id").string(255);
  value.check(isTaskId(id), () => `${JSON.stringify(id)} cannot name a task`);
  const baseModel = value.get("baseModel");
  return { id, baseModel: baseModel.absent ? undefined : baseModel.string(4096) };
}

function parseModule(value: Value): StatisticsModule {
  const kernel = value.get("kernel");
  return {
    name: value.get("name").string(1024),
    out: value.get("out").integer(1, LIMIT),
    in: value.get("in").integer(1, LIMIT),
    layout: oneOf(value.get("layout"), LAYOUTS),
    ...(kernel.absent ? {} : { kernel: kernel.array(8).map((size) => size.integer(1, 65_535)) }),
    rows: value.get("rows").integer(1, LIMIT),
  };
}
