/**
 * Statistics as a part: written and read one module at a time.
 */

import { compare } from "../../adapters/modules.ts";
import { FormatError } from "../../errors.ts";
import { type Summary, summaryKind, triangle } from "../../extract/summary.ts";
import { isTaskId } from "../../format/directory.ts";
import type { Value } from "../../format/fields.ts";
import { LAYOUTS } from "../../format/format.ts";
import type { SourceInput } from "../../source.ts";
import type { SafetensorsEntry } from "../../tensor/safetensors-writer.ts";
import type { OnWork } from "../../work.ts";
import { oneOf, type Part, readPart, toBytes, toF64, writePart } from "./part.ts";
import type { CountedAdapter, Statistics, StatisticsModule } from "./statistics.ts";

/** Statistics that hold a file open. */
export interface StatisticsPart extends Statistics {
  /** The digest given to `writeStatistics`. */
  readonly made: string;
  close(): Promise<void>;
}

const SIDES = ["A", "B"] as const;
const LIMIT = 2 ** 31 - 1;

/**
 * The bytes of a part, module by module.
 * @param made a digest of what the statistics were made of
 */
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
  const adapters = about.get("adapters").array(1_048_576).map(parseAdapter);
  about.check(adapters.length > 0, () => "it has no adapters");
  about.check(
    adapters.every(({ id }, i) => i === 0 || compare(adapters[i - 1]!.id, id) < 0),
    () => "its adapters are not sorted, or one is there twice",
  );
  const modules = new Map<string, StatisticsModule>();
  const described: readonly Value[] = about.get("modules").array(65_536);
  for (const value of described) {
    const module = parseModule(value, part, adapters.length);
    value.check(!modules.has(module.name), () => `two modules are named "${module.name}"`);
    modules.set(module.name, module);
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
    gauge: oneOf(about.get("gauge"), ["as-trained", "balanced"]),
    rank: about.get("rank").absent ? undefined : about.get("rank").integer(1, LIMIT),
    normalize: about.get("normalize").boolean(),
    adapters,
    modules,
    async ranks(name) {
      const bytes = await part.read(`${name}.ranks`);
      const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
      const ranks = Uint32Array.from(adapters, (_, i) => view.getUint32(4 * i, true));
      const rows = ranks.reduce((sum, rank) => sum + rank, 0);
      const expected = modules.get(name)!.rows;
      about.check(rows === expected, () => `the ranks of ${name} add up to ${rows}, expected ${expected}`);
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
  value.check(isTaskId(id), () => `${JSON.stringify(id)} cannot name a task`);
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
  const place = ({ name, shape }: { name: string; shape: readonly number[] }, dtype: string): void => {
    const found = tensors.get(name);
    const is = found && `${found.dtype} [${found.shape}]`;
    const expected = `${dtype} [${shape}]`;
    value.check(is === expected, () => `${name} is ${is ?? "missing"}, expected ${expected}`);
  };
  for (const side of SIDES) for (const tensor of tensorsOf(module, side)) place(tensor, "F64");
  place({ name: `${module.name}.ranks`, shape: [adapters] }, "U32");
  return module;
}
