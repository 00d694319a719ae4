/**
 * The canonical adapter: the result of every reader and the input of extraction. Scales are already multiplied into B,
 * orientation and naming differences are gone, and nothing in the file has been dropped: a reader refuses what this
 * form cannot express.
 *
 * Tensors are read on demand, one module at a time, so that packing many adapters holds one module's stack in memory.
 */

import { AdapterError, checkArgument, checkList, listed } from "../errors.ts";
import { checkEntry } from "../format/encode.ts";
import type { Layout, ParameterRole, TaskMetadata } from "../format/format.ts";
import { wrongKind } from "../format/kind.ts";
import { openSource } from "../open-source.ts";
import { pacer } from "../pace.ts";
import type { ByteSource, ReadOptions, SourceInput } from "../source.ts";
import { elementsOf } from "../tensor/dtypes.ts";
import { encodeTensor } from "../tensor/encode.ts";
import {
  openSafetensors as readSafetensors,
  type SafetensorsEntry,
  type SafetensorsFile,
  type TensorFile,
  type TensorInfo,
} from "../tensor/safetensors.ts";
import { type Term, transpose } from "../tensor/term.ts";

/** An adapted layer of the base model. */
export interface ModuleShape {
  /** Name as in the adapter, without PEFT's prefix: "bert.encoder.layer.0.attention.self.query". */
  readonly name: string;
  readonly out: number;
  /** Input width; for convolutions input channels times kernel size. */
  readonly in: number;
  readonly layout: Layout;
  /** Kernel size of a convolution, for instance [3, 3]. */
  readonly kernel?: readonly number[] | undefined;
}

/** One adapted module: ΔW [out, in] = B · A, read lazily. */
export interface AdapterModule extends ModuleShape {
  readonly rank: number;
  /**
   * Reads and checks the term of this rank, with the adapter's scale in B. @throws AdapterError naming file and tensor
   * for NaN or infinity
   */
  read(): Promise<Term>;
}

/**
 * A tensor of the base model that the task brings along, by parameter name ("classifier.weight").
 * `saved` replaces the whole parameter (modules_to_save). `bias` replaces a bias vector. `bias-delta` [out] is added to
 * a bias. `rows` replaces the rows `indices` of an embedding [vocabulary, dimension].
 */
export interface SavedTensor {
  readonly name: string;
  readonly role: ParameterRole;
  /** Shape of the tensor; for `rows` [indices.length, dimension]. */
  readonly shape: readonly number[];
  readonly indices?: readonly number[] | undefined;
  /** Reads and checks the values, as f32. @throws AdapterError for NaN or infinity */
  read(): Promise<Float32Array>;
}

/** One trained adapter. */
export interface Adapter {
  /** Task id: the name of the folder or file. */
  readonly id: string;
  /** Path, for messages. */
  readonly file: string;
  /** Size of the tensor file in bytes. */
  readonly byteLength: number;
  /** `base_model_name_or_path` of the configuration. */
  readonly baseModel: string | undefined;
  /** Modules by name, sorted. */
  readonly modules: ReadonlyMap<string, AdapterModule>;
  readonly saved: readonly SavedTensor[];
  readonly metadata: TaskMetadata;
  /** Warnings to read before trusting the result. */
  readonly warnings: readonly string[];
  close(): Promise<void>;
}

// The files of an adapter, whatever its format.

/** The file with an adapter's tensors, and its task.json. */
export interface AdapterFile {
  /** Task id. */
  readonly id: string;
  /** The adapter's folder or address, for messages. */
  readonly file: string;
  /** Path, URL, Blob, bytes or ByteSource. Closed by the adapter's `close`. */
  readonly tensors: SourceInput;
  /** Parsed task.json, where there is one. */
  readonly task?: unknown;
}

/** A file that leaves facts to the base model. */
export interface BasedAdapterFile extends AdapterFile {
  /**
   * Default: names are read as those of Stable Diffusion's UNets and of CLIP; GGUF files of Llama's architecture are
   * refused.
   */
  readonly base?: BaseFacts | undefined;
}

/**
 * Opens a file with one of the readers of src/tensor; closes its source if that fails.
 * @param expected kind of file, for messages
 */
export async function openFile<F>(
  input: SourceInput,
  read: (source: ByteSource) => Promise<F>,
  expected: string,
): Promise<F & Pick<Adapter, "close">> {
  const source = await openSource(input);
  const close = async (): Promise<void> => source.close?.();
  try {
    return { ...(await read(source)), close };
  } catch (error) {
    const refused = await wrongKind(error, source, expected);
    await close();
    throw refused;
  }
}

export const openSafetensors = (input: SourceInput): Promise<SafetensorsFile & Pick<Adapter, "close">> =>
  openFile(input, readSafetensors, "a safetensors file");

/** Parts of an adapter that a reader finds in an open file; the rest has defaults. */
type Found = Pick<Adapter, "modules" | "saved"> & Partial<Pick<Adapter, "baseModel" | "metadata" | "warnings">>;

/**
 * Reads an adapter from one file of tensors: the common frame of the readers of all formats. Closes the file if `read`
 * fails.
 * @param open opens the file
 * @param read reads the adapter; `metadata` is that of task.json
 * @throws errors of `open` and `read`; AdapterError for an invalid task.json
 */
export async function readAdapterFile<F extends TensorFile & { close(): Promise<void> }>(
  { id, file, tensors, task }: AdapterFile,
  open: (input: SourceInput) => Promise<F>,
  read: (found: F, metadata: TaskMetadata) => Found | Promise<Found>,
): Promise<Adapter> {
  const metadata = readTaskMetadata(task, `${file}/task.json`);
  const found = await open(tensors);
  const { byteLength, close } = found;
  try {
    return {
      id,
      file,
      byteLength,
      baseModel: undefined,
      metadata,
      warnings: [],
      ...(await read(found, metadata)),
      close,
    };
  } catch (error) {
    await close();
    throw error;
  }
}

// Reads `task.json`, the file next to an adapter with facts that tensors do not tell: class names, licence, origin. All
// its plain values become the task's metadata. It is not the adapter's own configuration.

/** Metadata is read with a pack's directory, before any task: it must stay small. */
const MAX_METADATA_BYTES = 64 * 1024;

/**
 * Checks the contents of a task.json.
 * @param task parsed JSON; undefined when there is no such file
 * @param file its path, for messages
 * @throws AdapterError naming the field that a pack does not hold
 */
export function readTaskMetadata(task: unknown, file: string): TaskMetadata {
  if (task === undefined) return {};
  if (typeof task !== "object" || task === null || Array.isArray(task))
    throw new AdapterError(`is not a JSON object; write {"labels": [...]} or remove it`, { file });
  const metadata: TaskMetadata = { ...task };
  try {
    checkEntry({ id: "task", adapterBytes: 0, metadata, brings: [] }, file);
  } catch (cause) {
    const message = (cause as Error).message.replace(/^.*?, task: (tasks\[0\]\.metadata\.?)?/s, "");
    throw new AdapterError(`${message}; correct or remove it`, { file, field: /^\w*/.exec(message)![0], cause });
  }
  const { length } = new TextEncoder().encode(JSON.stringify(task));
  if (length > MAX_METADATA_BYTES)
    throw new AdapterError(`has ${length} bytes, ${MAX_METADATA_BYTES} at most are kept; shorten it`, { file });
  return metadata;
}

// Modules that several adapters, or parts made of adapters, have in common: a layer must be the same in all of them.

/** Compares by code units, so that the order is the same on every machine. */
export function compare(a: string, b: string): number {
  return a < b ? -1 : a > b ? 1 : 0;
}

interface Owner<M extends ModuleShape> {
  readonly file: string;
  readonly modules: ReadonlyMap<string, M>;
}

/** A module with all its owners. */
export interface SharedModule<O> {
  readonly shape: ModuleShape;
  readonly owners: readonly O[];
}

/**
 * All modules that occur, sorted by name.
 * @throws AdapterError naming the second file when two mean different modules by one name
 */
export function sharedModules<M extends ModuleShape, O extends Owner<M>>(
  all: readonly (O & Owner<M>)[],
): Map<string, SharedModule<O>> {
  const names = [...new Set(all.flatMap(({ modules }) => [...modules.keys()]))].sort();
  return new Map(
    names.map((name) => {
      const owners = all.filter(({ modules }) => modules.has(name));
      const { out, in: inputs, layout, kernel } = owners[0]!.modules.get(name)!;
      const shape = { name, out, in: inputs, layout, kernel };
      for (const { file, modules } of owners) {
        const other = modules.get(name)!;
        if (signatureOf(other) === signatureOf(shape)) continue;
        const found = `"${name}" is ${signatureOf(other)} here, but ${signatureOf(shape)} in ${owners[0]!.file}`;
        const message = `${found}: adapters of different base models cannot share a pack`;
        throw new AdapterError(message, { file, field: name });
      }
      return [name, { shape, owners }];
    }),
  );
}

function signatureOf({ out, in: inputs, layout, kernel = [] }: ModuleShape): string {
  return `[${out}, ${inputs}] ${[layout, ...kernel].join(" ")}`;
}

/**
 * @throws AdapterError when an adapter both replaces a weight (or rows of it) and adapts it; PEFT makes no such adapter
 */
export function refuseBoth({ file, modules, saved }: Pick<Adapter, "file" | "modules" | "saved">): void {
  const adapted = new Set([...modules.keys()].map((name) => `${name}.weight`));
  const both = saved.find(({ name, role }) => adapted.has(name) && (role === "saved" || role === "rows"));
  if (!both) return;
  const message = `it brings "${both.name}" (${both.role}) and adapts it as well: which of the two is meant? Leave one out`;
  throw new AdapterError(message, { file, field: both.name });
}

/** @throws AdapterError when two adapters have one id */
export function refuseTwins(adapters: readonly Pick<Adapter, "id" | "file">[]): void {
  const files = new Map<string, string>();
  for (const { id, file } of adapters) {
    const other = files.get(id);
    if (other !== undefined) throw new AdapterError(`it has the id "${id}", as ${other}: give it another`, { file });
    files.set(id, file);
  }
}

/** @throws TypeError when `value` is no adapter */
export function checkAdapter(where: string, value: unknown): void {
  checkArgument(where, value, "an adapter (readAdapters of eigenlora/node, or readPeft)", "saved");
}

/** @throws TypeError when `value` is no list of adapters */
export function checkAdapters(where: string, value: unknown): void {
  checkList(where, value, "adapters (await readAdapters(…))");
  for (const one of value as unknown[]) checkAdapter(where, one);
}

interface Based {
  readonly id: string;
  readonly file: string;
  readonly baseModel: string | undefined;
}

/**
 * Refuses adapters of different base models, which cannot share a pack. One model goes by several names, as a hub's id
 * and as a folder, so names with the same end count as one. An adapter without a name fits any.
 * @param anyBase accept them all the same
 * @throws AdapterError when adapters name different base models, listing them
 */
export function refuseBases(adapters: readonly Based[], anyBase = false): void {
  const byEnd = new Map<string, Based[]>();
  for (const adapter of adapters) {
    if (adapter.baseModel === undefined) continue;
    const end = lastPart(adapter.baseModel);
    byEnd.set(end, [...(byEnd.get(end) ?? []), adapter]);
  }
  if (anyBase || byEnd.size < 2) return;
  const groups = [...byEnd.values()].sort((a, b) => b.length - a.length);
  const named = groups.map((group) => `${group[0]!.baseModel} (${listed(group.map(({ id }) => id))})`);
  throw new AdapterError(
    `the adapters name different base models: ${named.join("; ")}. Take those of one model; if these are names of one, pass ` +
      "anyBase: true",
    { file: groups.at(-1)![0]!.file, field: "base_model_name_or_path" },
  );
}

/** The end of a base model's name: of a hub's id, of a path, or of a folder in the hub's cache. */
function lastPart(name: string): string {
  const cached = /models--(?:[^/\\]+?--)?([^/\\]+)[/\\]snapshots[/\\]/.exec(name)?.[1];
  return (cached ?? name.split(/[/\\]/).findLast(Boolean) ?? "").toLowerCase();
}

/** The base model that all adapters name that name one; undefined where there is none, or they name different ones. */
export function commonBase(adapters: readonly { readonly baseModel: string | undefined }[]): string | undefined {
  const named = baseModels(adapters);
  return new Set(named.map(lastPart)).size === 1 ? named[0] : undefined;
}

/** Base models that adapters name, in the order of the adapters. */
export function baseModels(adapters: readonly { readonly baseModel: string | undefined }[]): string[] {
  return [...new Set(adapters.map(({ baseModel }) => baseModel).filter((name) => name !== undefined))];
}

// Factors of a module in the shapes of LoRA files, for the writers of all formats.

/** The parts of an adapter that are needed to write it. A task of a pack can be given in this form. */
export type Exportable = Pick<Adapter, "id" | "baseModel" | "modules" | "saved" | "metadata">;

/** A tensor, row-major. */
export interface FactorMatrix {
  readonly shape: readonly number[];
  readonly values: Float32Array;
}

/** The factors of one module, scale in B. */
export interface AdapterFactors {
  /** A [r, in], or [r, in, k…] of a convolution. */
  readonly A: FactorMatrix;
  /** B [out, r], or [out, r, 1…]. */
  readonly B: FactorMatrix;
  /** DoRA magnitude [out]. */
  readonly magnitude: Float32Array | undefined;
}

/** Rank to write. No format has a rank of 0: a module whose update is zero gets one component of zeros. */
export function rankOf({ rank }: AdapterModule): number {
  return Math.max(1, rank);
}

/** Reads the factors of a module. @throws as the module's `read` */
export async function factorsOf(module: AdapterModule): Promise<AdapterFactors> {
  const { out, in: inputs, kernel = [] } = module;
  const { A, Bt, magnitude } = await module.read();
  const rank = rankOf(module);
  const b = new Float32Array(out * rank);
  const pause = pacer();
  for (let k = 0; k < module.rank; k++) {
    for (let i = 0; i < out; i++) b[i * rank + k] = Bt[k * out + i]!;
    const turn = pause();
    if (turn) await turn;
  }
  const channels = inputs / elementsOf(kernel);
  return {
    A: { shape: [rank, channels, ...kernel], values: module.rank === 0 ? new Float32Array(inputs) : A },
    B: { shape: [out, rank, ...kernel.map(() => 1)], values: b },
    magnitude,
  };
}

/** Adds one tensor, under its name in the base model. */
export type Add = (name: string, shape: readonly number[], values: Float32Array) => void;

export function f32Bytes(values: Float32Array): Uint8Array {
  return encodeTensor("f32", values, 1, values.length);
}

/** A tensor of f32 to write into a safetensors file. */
export function f32Entry(name: string, shape: readonly number[], values: Float32Array): SafetensorsEntry {
  return { name, dtype: "F32", shape: [...shape], read: () => f32Bytes(values) };
}

/** @throws AdapterError when an adapter brings more than factors, which the format cannot hold */
export function refuseSaved({ id, saved }: Exportable, format: string): void {
  const [first] = saved;
  if (first === undefined) return;
  const message =
    `${first.name} (${first.role}) has no place in ${format}, which holds factors of LoRA alone: export as PEFT, or fold the task ` +
    "into its base";
  throw new AdapterError(message, { file: id, field: first.name });
}

/** Makes the error for a module that the format cannot hold. */
export function refuseModule({ id }: Exportable, name: string, why: string): AdapterError {
  return new AdapterError(`${name} ${why}: export as PEFT, or fold the task into its base`, { file: id, field: name });
}

// Facts that some formats leave to the base model: kohya's files flatten the names of modules, and GGUF's order the
// rows of two projections by heads.

/** Known facts of a base model. */
export interface BaseFacts {
  /** Names of its modules or parameters; in a pipeline with the model in front ("unet.mid_block.…"). */
  readonly names?: Iterable<string> | undefined;
  /** Attention heads, and those of keys and values. */
  readonly heads?: number | undefined;
  readonly kvHeads?: number | undefined;
  /** llama.cpp's name of the architecture, which all models of a kind share: "llama". */
  readonly architecture?: string | undefined;
}

/** A tensor that is made of others: another shape, and values of its own. */
export interface Derived extends TensorInfo {
  read(options?: ReadOptions): Promise<Float32Array<ArrayBuffer>>;
}

/** The file with some of its tensors replaced. */
export function withDerived<T extends TensorFile>(file: T, derived: ReadonlyMap<string, Derived>): T {
  if (derived.size === 0) return file;
  return {
    ...file,
    tensors: new Map([...file.tensors, ...derived]),
    readF32: (name: string, options?: ReadOptions) => derived.get(name)?.read(options) ?? file.readF32(name, options),
  };
}

/** The tensor [a, b] as [b, a]. */
export function transposed(file: TensorFile, name: string): Derived {
  const { dtype, shape } = file.tensors.get(name)!;
  const [rows = 0, columns = 0] = shape;
  return {
    dtype,
    shape: [columns, rows],
    read: async (options) => transpose(await file.readF32(name, options), rows, columns),
  };
}
