/**
 * Packs of parts. A basis is made of statistics: a pack without tasks, onto which adapters are projected wherever they
 * are; what needs all adapters at once is refused by name. Adapters projected on one machine become a part with tasks,
 * and such parts become a pack. A part holds whole task files (SPEC.md, section 7), so that every one of them is bound
 * to its basis and checked like one that came alone.
 */
import { type Adapter, commonBase, compare } from "../../adapters/adapter.ts";
import type { Pack } from "../../core/pack.ts";
import { taskIn } from "../../core/read-task-file.ts";
import { AdapterError, FormatError, TaskError } from "../../errors.ts";
import {
  checkSelection,
  decompose,
  type ExtractOptions,
  encodeSide,
  type SideBasis,
  wanted,
} from "../../extract/components.ts";
import { dominant } from "../../extract/linalg.ts";
import { fastProducts } from "../../extract/wasm-products.ts";
import {
  encodeTaskFile,
  type ModuleInput,
  placeOf,
  refuseLarge,
  type SideInput,
  type TaskPlace,
} from "../../format/encode.ts";
import type { Value } from "../../format/fields.ts";
import { MOST_TASKS } from "../../format/format.ts";
import type { ByteSource, SourceInput } from "../../source.ts";
import { DTYPES, type Dtype, type Dtypes, sum, type TaskDtypes } from "../../tensor/dtypes.ts";
import { storing, UnstorableError } from "../../tensor/encode.ts";
import type { OnWork } from "../../work.ts";
import { projectAdapters } from "../add.ts";
import { readFingerprints, type Streamed, sideInput } from "../build.ts";
import { type BuildOptions, completeDtypes } from "../recipe.ts";
import {
  type BuildReport,
  baseNotes,
  baseWarnings,
  componentsOf,
  fewerWarnings,
  sizes,
  type TaskLoss,
} from "../report.ts";
import { freshPack, newPack, tasksOf } from "../write.ts";
import {
  byId,
  factorsOf,
  gramComponents,
  oneOf,
  readPart,
  type Statistics,
  type Summary,
  writePart,
} from "./statistics.ts";

export interface BasisOptions extends Pick<BuildOptions, "select" | "centering" | "base" | "onProgress"> {
  /** Number format of components and means. Default: f16. */
  readonly dtype?: Dtype;
}

export interface BasisReport
  extends Pick<BuildReport, "modules" | "gauge" | "centering" | "bytes" | "components" | "warnings" | "notes"> {
  readonly dtype: Dtype;
  /** That were counted. */
  readonly adapters: number;
}

/**
 * The basis of all adapters that were counted: what `buildPack` finds in column mode with the same settings, to the bit
 * where a side's rows were kept, and else up to rounding.
 * @throws RangeError for the balanced gauge with the mean kept, which needs all adapters at once
 * @throws AdapterError for components that cannot be stored
 * @throws BaseMismatchError when the base given does not have the modules
 * @returns a pack without tasks, and what was found
 */
export async function buildBasis(statistics: Statistics, options: BasisOptions = {}): Promise<Streamed<BasisReport>> {
  const { select = { kind: "energy", share: 0.9 }, centering = "keep", dtype = "f16", base } = options;
  const { gauge, rank, normalize } = statistics;
  checkSelection(select);
  if (gauge === "balanced" && centering === "keep") {
    throw new RangeError(
      'balanced pairs settle their signs by the mean of all adapters at once: take centering "none", or statistics in gauge "as-trained"',
    );
  }
  const products = await fastProducts();
  const extraction = { gauge, centering, normalize, select, basisDtype: dtype, coefficientDtype: dtype, products };
  const fingerprints = base === undefined ? undefined : await readFingerprints(base, statistics.modules.values());
  const modules: ModuleInput[] = [];
  const adapted = statistics.adapters.map(() => new Set<string>());
  for (const { rows: _, ...shape } of statistics.modules.values()) {
    const { name } = shape;
    const ranks = await statistics.ranks(name);
    for (const [i, rank] of ranks.entries()) if (rank > 0) adapted[i]!.add(name);
    const side = async (which: "A" | "B"): Promise<SideInput> => {
      const summary = await statistics.side(name, which);
      try {
        const what = `basis ${which} of "${name}"`;
        const input = storing(what, undefined, () => sideInput(sideBasis(summary, ranks, extraction)));
        refuseLarge(what, input, input.K + Number(input.mean));
        return input;
      } catch (cause) {
        if (!(cause instanceof UnstorableError)) throw cause;
        const owner = ownerOf(statistics, summary, ranks);
        const whose = owner === undefined ? "" : `; the largest rows are those of "${owner}"`;
        throw new AdapterError(`${cause.message}${whose}`, { file: statistics.file, field: name, cause });
      }
    };
    modules.push({ ...shape, A: [await side("A")], B: [await side("B")], fingerprint: fingerprints?.get(name) });
    const total = statistics.modules.size;
    options.onProgress?.({ stage: "merging", done: modules.length, total, unit: "modules" });
  }
  const baseModel = commonBase(statistics.adapters);
  const { chunks, bytes } = await newPack({ gauge, centering, rank, baseModel, modules }, []);
  const components = componentsOf(modules);
  const report: BasisReport = {
    adapters: statistics.adapters.length,
    modules: modules.length,
    gauge,
    centering,
    dtype,
    bytes,
    components,
    warnings: [
      ...baseWarnings(statistics.adapters.map((adapter, i) => ({ ...adapter, modules: adapted[i]! }))),
      ...fewerWarnings(select, components),
    ],
    notes: baseNotes(base !== undefined),
  };
  return { chunks, report };
}

/** Id of the adapter with the largest rows; undefined where rows were not kept. */
function ownerOf({ adapters }: Statistics, summary: Summary, ranks: Uint32Array): string | undefined {
  if (summary.kind === "gram") return undefined;
  const factors = factorsOf(summary.values, ranks, summary.width);
  const peaks = factors.map(({ factor }) => Math.abs(dominant(factor, 0, factor.length)));
  return adapters[peaks.indexOf(Math.max(...peaks))]!.id;
}

function sideBasis(summary: Summary, ranks: Uint32Array, options: ExtractOptions): SideBasis {
  const { width } = summary;
  if (summary.kind === "gram") {
    const found = gramComponents(summary, options.centering, wanted(options.select!), options.products);
    return encodeSide({ width, ...found }, found.components.count, options.basisDtype, options.products);
  }
  const stacked = factorsOf(summary.values, ranks, width).filter(({ rank }) => rank > 0);
  const factors = stacked.map(({ factor }) => (options.gauge === "balanced" ? trimmed(factor, width) : factor));
  const side = decompose(factors, factors, width, options);
  return encodeSide(side, side.components.count, options.basisDtype, options.products);
}

/** A balanced factor without the rows of zeros behind. */
function trimmed(factor: Float64Array, width: number): Float64Array {
  let end = factor.length;
  while (end > width && factor.subarray(end - width, end).every((value) => value === 0)) end -= width;
  return factor.subarray(0, end);
}

// Tasks.

const nameOf = (id: string): string => `task ${id}`;

/**
 * Projects adapters onto a basis.
 * @param basis a pack; its tasks, if it has any, are left alone
 * @param made a digest of what the part is made of
 * @throws AdapterError as `projectAdapters`; TaskError for two adapters of one id
 * @returns the bytes of the part
 */
export async function projectTasks(
  basis: Pack,
  adapters: readonly Adapter[],
  made: string,
  options: { dtype?: Partial<Dtypes>; onProgress?: OnWork } = {},
): Promise<AsyncGenerator<Uint8Array, void>> {
  const sorted = byId(adapters);
  const dtype = completeDtypes(options.dtype);
  const projected = await projectAdapters(basis, sorted, dtype, { ...options, maxLoss: 1 });
  const losses = projected.map(({ residual }) => residual);
  const files = projected.map(({ entry, blob }) => encodeTaskFile(entry, basis.basisId, blob));
  return writeTasks(basis, made, dtype, losses, files);
}

/**
 * The bytes of a part with tasks.
 * @param losses of the tasks, sorted by id
 * @param files a task file of each
 */
export function writeTasks(
  { basisId }: Pack,
  made: string,
  { coefficients, head }: TaskDtypes,
  losses: readonly TaskLoss[],
  files: readonly Uint8Array<ArrayBuffer>[],
): AsyncGenerator<Uint8Array, void> {
  const entries = files.map((file, i) => {
    return { name: nameOf(losses[i]!.id), dtype: "U8", shape: [file.length], read: () => file };
  });
  return writePart("tasks", made, { basisId, types: { coefficients, head }, tasks: losses }, entries);
}

/** A pack of all tasks of some parts, and what became of the adapters. */
export interface AssembledPack {
  readonly chunks: AsyncGenerator<Uint8Array, void>;
  readonly report: ReturnType<typeof sizes> & {
    readonly modules: number;
    readonly dtype: TaskDtypes;
    readonly error: Omit<BuildReport["error"], "worstModule">;
  };
}

/**
 * Assembles a pack: the tasks of all parts, and those that the basis has already, by id, so that how they were spread
 * over parts makes no difference to a byte. Blobs are read twice, once to check them and once to be copied: parts and
 * basis stay open until the chunks have been written.
 * @param parts one or more
 * @throws FormatError for a damaged part; AdapterError for a part on another basis or of other number formats;
 *   TaskError for a task that is there twice
 */
export async function assemblePack(
  basis: Pack,
  parts: readonly TaskPart[],
  onProgress?: OnWork,
): Promise<AssembledPack> {
  const first = parts[0]!;
  const owners = new Map<string, string>([...basis.tasks.keys()].map((id) => [id, basis.name]));
  const losses: (TaskLoss & { modules: number })[] = [];
  const places = await tasksOf(basis);
  const total = sum(parts, ({ tasks }) => tasks.length);
  for (const part of parts) {
    refuseOther(basis, first, part);
    for (const loss of part.tasks) {
      const other = owners.get(loss.id);
      if (other !== undefined)
        throw new TaskError(`${other} and ${part.file} both hold the task "${loss.id}"; leave it out of one of them`, {
          task: loss.id,
        });
      owners.set(loss.id, part.file);
      const { place, modules } = await checkTask(basis, part, loss.id);
      places.push(place);
      losses.push({ ...loss, modules });
      onProgress?.({ stage: "assembling", done: losses.length, total, unit: "tasks" });
    }
  }
  places.sort((a, b) => compare(a.entry.id, b.entry.id));
  const { bytes, chunks } = await freshPack(basis, places);
  const count = sum(losses, ({ modules }) => modules);
  const worst = losses.reduce((a, b) => (b.max > a.max ? b : a));
  const report = {
    ...sizes(
      bytes,
      places.map(({ length, entry }) => ({ blob: length, adapter: entry.adapterBytes })),
    ),
    modules: basis.modules.length,
    dtype: first.dtype,
    error: {
      mean: sum(losses, ({ mean, modules }) => mean * modules) / Math.max(count, 1),
      max: worst.max,
      worstTask: worst.id,
    },
  };
  return { chunks, report };
}

function refuseOther(basis: Pack, first: TaskPart, part: TaskPart): void {
  const { basisId, file, dtype } = part;
  if (basisId !== basis.basisId) {
    throw new AdapterError(
      `it was projected onto the basis ${basisId}, ${basis.name} is ${basis.basisId}: project it again`,
      { file, field: "basis" },
    );
  }
  for (const what of ["coefficients", "head"] as const) {
    if (dtype[what] === first.dtype[what]) continue;
    throw new AdapterError(
      `its ${what} are ${dtype[what]}, those of ${first.file} ${first.dtype[what]}: project one of them again, with the same dtype`,
      { file, field: what },
    );
  }
}

/** All that a reader of the pack would check, before the pack is written. */
async function checkTask(basis: Pack, part: TaskPart, id: string): Promise<{ place: TaskPlace; modules: number }> {
  const bytes = await part.read(id);
  const file = `${part.file}, ${nameOf(id)}`;
  const { entry, blob } = taskIn(bytes, file);
  if (entry.id !== id)
    throw new FormatError(`it holds the task "${entry.id}": the part is damaged, make it again`, {
      file: part.file,
      part: nameOf(id),
    });
  const source: ByteSource = {
    name: file,
    byteLength: bytes.length,
    read: async (at, length) => bytes.subarray(at, at + length),
  };
  await basis.addTask(id, source);
  const modules = (await basis.load(id)).terms.length;
  basis.removeTask(id);
  const read = async (): Promise<Uint8Array> => taskIn(await part.read(id), file).blob;
  return { place: { ...(await placeOf({ entry, blob })), read }, modules };
}

/** A part with tasks, open. */
export interface TaskPart {
  /** Path, for messages. */
  readonly file: string;
  /** Hexadecimal id of the basis. */
  readonly basisId: string;
  readonly dtype: TaskDtypes;
  /** Sorted by id. */
  readonly tasks: readonly TaskLoss[];
  /** The task file of a task. @throws FormatError when it is damaged */
  read(id: string): Promise<Uint8Array>;
  close(): Promise<void>;
}

/** Opens a part with tasks. @throws FormatError as `openPart`, and for a description that its tensors do not fit */
export function openTasks(input: SourceInput): Promise<TaskPart> {
  return readPart(input, "tasks", (part) => {
    const { file, tensors } = part;
    const about: Value = part.about;
    const listed: readonly Value[] = about.get("tasks").array(MOST_TASKS);
    const tasks = listed.map((value: Value) => {
      const id = value.get("id").string(255);
      if (!tensors.has(nameOf(id))) value.fail(`the task "${id}" is missing`);
      const figure = (name: string): number => value.get(name).number(0, Infinity);
      return { id, total: figure("total"), mean: figure("mean"), max: figure("max") };
    });
    if (tasks.length === 0 || tasks.length !== tensors.size - 1)
      about.fail(`${tasks.length} tasks are listed, but there are ${tensors.size - 1}`);
    const types = about.get("types");
    return {
      file,
      basisId: about.get("basisId").string(64),
      dtype: { coefficients: oneOf(types.get("coefficients"), DTYPES), head: oneOf(types.get("head"), DTYPES) },
      tasks,
      read: (id) => part.read(nameOf(id)),
      close: part.close,
    };
  });
}
