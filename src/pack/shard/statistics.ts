/**
 * Statistics of adapters: for each module and side the summary of its rows (`extract/summary.ts`), and whose rows they are.
 * Made of adapters, read from a part (`statistics-part.ts`) or merged from several; one shape for all three, computed one module
 * at a time when it is asked for. From them comes a basis (`basis.ts`); adapters cannot be reconstructed.
 */
import type { Adapter, ModuleShape } from "../../adapters/adapter.ts";
import { compare, refuseBases, type SharedModule, sharedModules } from "../../adapters/modules.ts";
import { AdapterError, TaskError } from "../../errors.ts";
import { balance, leadingRows, pairOf } from "../../extract/gauge.ts";
import { checkRank, type Gauge } from "../../extract/options.ts";
import { reciprocal } from "../../extract/side.ts";
import { collectSummary, type Summary, summaryKind } from "../../extract/summary.ts";
import { fastProducts } from "../../extract/wasm-products.ts";
import type { BuildOptions } from "../recipe.ts";

/** One adapted module, and how many rows each of its sides has over all adapters. */
export interface StatisticsModule extends ModuleShape {
  readonly rows: number;
}

/** An adapter that was counted. */
export interface CountedAdapter {
  readonly id: string;
  /** The base model that it names. */
  readonly baseModel: string | undefined;
}

/** What adapters are counted for: from these alone components are found, as from the adapters themselves. */
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
  /** Modules by name, sorted. */
  readonly modules: ReadonlyMap<string, StatisticsModule>;
  /** Rows of each adapter in a module, 0 for one that does not adapt it. */
  ranks(module: string): Promise<Uint32Array>;
  /** The stack of a side, adapter by adapter. In the balanced gauge rows that were trimmed are zero, behind an adapter's others. */
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
  const sorted = [...adapters].sort((a, b) => compare(a.id, b.id));
  refuseTwice(sorted);
  refuseBases(sorted, anyBase);
  const shared = sharedModules(sorted);
  const rowsOf = (adapter: Adapter, name: string): number => Math.min(adapter.modules.get(name)?.rank ?? 0, most);
  const products = await fastProducts();
  const summarise = async ({ shape, owners }: SharedModule<Adapter>): Promise<Record<"A" | "B", Summary>> => {
    const { name, out, in: inputs } = shape;
    const rows = owners.reduce((sum, owner) => sum + rowsOf(owner, name), 0);
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

/** Modules with their rows. */
function counted<O>(
  shared: ReadonlyMap<string, SharedModule<O>>,
  rowsOf: (owner: O, name: string) => number,
): Map<string, StatisticsModule> {
  return new Map(
    [...shared].map(([name, { shape, owners }]) => {
      return [name, { ...shape, rows: owners.reduce((sum, owner) => sum + rowsOf(owner, name), 0) }];
    }),
  );
}

/**
 * Statistics of all adapters of several parts. The order of the parts makes no difference, nor does who merged which before,
 * beyond rounding in f64; while a side is kept as rows, none at all.
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
  const members = parts
    .flatMap((part) => part.adapters.map((adapter, index) => ({ ...adapter, file: part.file, part, index })))
    .sort((a, b) => compare(a.id, b.id) || compare(a.file, b.file));
  refuseTwice(members);
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

/** @throws AdapterError for parts of other settings */
function refuseOther(a: Statistics, b: Statistics): void {
  const refuse = (field: string, message: string): AdapterError => new AdapterError(message, { file: b.file, field });
  for (const setting of ["gauge", "rank", "normalize"] as const) {
    const [ours, theirs] = [a[setting] ?? "whole", b[setting] ?? "whole"];
    if (ours !== theirs)
      throw refuse(setting, `${setting} is ${theirs}, but ${ours} in ${a.file}: make one of them again with the same`);
  }
}
