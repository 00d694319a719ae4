/**
 * SPEC.md as code: what a pack is made of, as values. Bytes become checked values in `directory.ts`, without I/O, and
 * without an allocation of a size that the file names before that size has been checked; values become bytes in
 * `encode.ts`.
 */
import { type Dtype, decodeTensor } from "../tensor/dtypes.ts";

/** Version of this package, which packs name as their producer; a test holds it against package.json. */
export const VERSION = "0.3.0";

/** Bytes of the window: enough to plan the next read (SPEC.md, section 2). */
export const WINDOW_BYTES = 1536;
export const MAGIC: readonly number[] = [0x89, 0x45, 0x49, 0x47, 0x45, 0x4e, 0x0d, 0x0a];
export const TASK_FILE_MAGIC: readonly number[] = [0x89, 0x45, 0x54, 0x41, 0x53, 0x4b, 0x0d, 0x0a];
export const TASK_BLOB_MAGIC = 0x4b534154;
export const SECTION_ENTRY_BYTES = 32;
/** Bytes of a SHA-256. */
export const HASH_BYTES = 32;
/** First bytes of the window, which a root covers in addition to the directory. */
export const HEAD_BYTES = 48;
/** Bytes of a superblock with what is behind it. */
export const BLOCK_BYTES = 512;
/** First byte of the signature in a superblock, and its length: key, signature, CRC. */
export const SIGNATURE_OFFSET = 64;
export const SIGNATURE_BYTES = 100;
export const DIRECTORY_HEAD_BYTES = 16;
/**
 * How the base checkpoint stores an adapted weight:
 * `out-in` [out, in] (Linear), `in-out` [in, out] (Conv1D of GPT-2), `conv` [out, in/groups, k…] read as [out, in·k…],
 * `embedding` [vocabulary, dimension], where `in` is the vocabulary and `out` the dimension.
 */
export type Layout = "out-in" | "in-out" | "conv" | "embedding";

/** Role of a task's parameter: its effect on the base's (SPEC.md, section 6.2). */
export type ParameterRole = "saved" | "bias" | "bias-delta" | "rows";

/** Metadata of a task, kept in the pack as it is. */
export interface TaskMetadata {
  /** Class names of a classifier, in the order of its rows. */
  labels?: string[];
  license?: string;
  /** Where the adapter came from. */
  origin?: string;
  /** Prompt template of a language model: `Opposite: {input} → {output}`, with what ends an answer behind it. */
  template?: string;
  /** Other plain values: strings, numbers, booleans, null, arrays and objects of these. */
  [key: string]: unknown;
}

export const LAYOUTS: readonly Layout[] = ["out-in", "in-out", "conv", "embedding"];
export const ROLES: readonly ParameterRole[] = ["saved", "bias", "bias-delta", "rows"];
export const FINGERPRINT_SIZE = 64;

/**
 * Most rows of the factors of a module [out, in] that a task may have: beyond 256 they take at most four times the
 * weight's memory, however few bytes the coefficients have.
 */
export function mostRank(inputs: number, out: number): number {
  return Math.min(65_535, Math.max(256, 2 * Math.min(inputs, out)));
}

/** Who vouches for a pack or a task file (SPEC.md, section 8). */
export interface Signature {
  /** Ed25519 public key, 32 bytes. */
  readonly key: Uint8Array;
  /** Ed25519 signature, 64 bytes. */
  readonly bytes: Uint8Array;
}

/** Where the parts of a generation are. */
export interface Superblock {
  readonly generation: number;
  readonly committed: number;
  readonly directoryOffset: number;
  readonly directoryLength: number;
  readonly basesOffset: number;
  readonly basesLength: number;
  readonly directoryCrc: number;
  /** Says by its key who signed the root. Undefined where it is not signed. */
  readonly signature: Signature | undefined;
}

/** The head of a pack file, with the superblock that counts (SPEC.md, section 2). */
export interface Window {
  readonly version: string;
  /** Hexadecimal SHA-256. */
  readonly basisId: string;
  readonly superblock: Superblock;
  /** The first 48 bytes of the file. */
  readonly head: Uint8Array;
}

/** Most tasks of a pack (SPEC.md, section 10). */
export const MOST_TASKS = 262_144;
export const SECTION_BASES = 1;
export const SECTION_TASK = 2;
export const SECTION_FREE = 3;
/** Kind 4 is coded bases, kind 5 a coded task blob (`coded.ts`). */
export const SECTION_CODED = 3;
/** Coded sections and directories begin with it: "COD3". */
export const CODED_MAGIC = 0x33444f43;
/** Letters that other versions of it share, so that one is refused for what it is. */
export const CODED_MASK = 0xffffff;

/** A stretch of the file and the checksum of its bytes. */
export interface Section {
  /** Bytes of what it holds, once decoded. */
  readonly kind: number;
  /** True if it is entropy-coded: the file has `SECTION_CODED` added to its kind. */
  readonly coded: boolean;
  readonly required: boolean;
  readonly offset: number;
  readonly length: number;
  /** Bytes of the bases once decoded. */
  readonly size?: number;
  readonly crc: number;
  /** SHA-256 of its bytes, "sha256-…", of zeros where they are free. Undefined in packs without hashes. */
  readonly integrity: string | undefined;
}

/** One encoded tensor: where it lies in its section and how to decode it. */
export interface TensorRef {
  readonly dtype: Dtype;
  readonly rows: number;
  readonly width: number;
  readonly byteOffset: number;
  readonly byteLength: number;
}

/** The basis of one side of one module. `tensor` has `K` rows, and the mean as one row more when `mean`. */
export interface Side {
  readonly kind: "column" | "flat";
  readonly K: number;
  /** Flat: the rank of every task. Column: undefined. */
  readonly rank: number | undefined;
  readonly mean: boolean;
  /** The share of the squared singular values that the components keep; 0 where it is not said. */
  readonly explained: number;
  readonly tensor: TensorRef;
}

/** One adapted module of the pack. */
export interface PackModule {
  readonly name: string;
  readonly out: number;
  readonly in: number;
  readonly layout: Layout;
  readonly kernel: readonly number[] | undefined;
  /** The bases of each side; several where tasks fall into groups, none where each has rows of its own. */
  readonly A: readonly Side[];
  readonly B: readonly Side[];
  /** Byte offset of 64 f32 in the bases, when stored. */
  readonly fingerprint: number | undefined;
}

/** Description of the components and their origin. */
export interface BasisDescription {
  readonly producer: string;
  readonly mode: string;
  readonly gauge: string;
  readonly centering: string;
  /** The most rank that was kept of each module, where that was limited. */
  readonly rank: number | undefined;
  /**
   * Step of the integers that coefficients were rounded to, as a share of what an adapter typically does to a module.
   */
  readonly step: number | undefined;
  /** The share of its ΔW that no task was to lose. */
  readonly error: number | undefined;
  readonly baseModel: string | undefined;
  readonly modules: readonly PackModule[];
}

/** Entry of a task in the directory. */
export interface TaskEntry {
  readonly id: string;
  readonly adapterBytes: number;
  readonly metadata: TaskMetadata;
  /** Overrides of the task apart from its terms, as "role name": see SPEC.md, section 4.3. Undefined when not said. */
  readonly brings?: readonly string[] | undefined;
}

/** Directory of a pack. */
export interface Directory {
  readonly sections: readonly Section[];
  /** The bytes as stored. */
  readonly bytes: Uint8Array;
  readonly basis: BasisDescription;
  /** The description as stored; an append copies it, so that the basis id stays true. */
  readonly basisBytes: Uint8Array;
  readonly bases: Section;
  /** Tasks in the order of their blobs. */
  readonly tasks: readonly (TaskEntry & { section: Section })[];
}

/** One side's coefficients in a task blob. */
export interface Coefficients {
  /** Which of the side's bases they are over. */
  readonly basis: number;
  readonly mean: boolean;
  readonly tensor: TensorRef;
}

/** Low-rank term of a task for one module (SPEC.md, section 6.1). */
export interface TaskTerm {
  readonly module: number;
  readonly rank: number;
  readonly A: Coefficients | undefined;
  readonly B: Coefficients | undefined;
  /** Rows [rank, in] and [rank, out] of the task's own: added to what coefficients make, or in their place. */
  readonly ownA: TensorRef | undefined;
  readonly ownBt: TensorRef | undefined;
  /** Rank of the private factors, 0 for none. */
  readonly privateRank: number;
  readonly privateA: TensorRef | undefined;
  readonly privateBt: TensorRef | undefined;
  readonly magnitude: TensorRef | undefined;
}

/** A whole parameter that comes with a task (SPEC.md, section 6.2). */
export interface TaskParameter {
  readonly name: string;
  readonly role: ParameterRole;
  readonly shape: readonly number[];
  readonly indices: readonly number[] | undefined;
  readonly tensor: TensorRef;
}

/** A parsed task blob. Tensors are decoded from `bytes` when they are needed. */
export interface TaskBlob {
  readonly terms: readonly TaskTerm[];
  readonly parameters: readonly TaskParameter[];
  readonly bytes: Uint8Array;
  /**
   * Stored bytes of the task and its bases, and the factor by which its terms may exceed them. Undefined for tasks made
   * here.
   */
  readonly limit?: { readonly stored: number; readonly times: number } | undefined;
}

/** A parsed task file (SPEC.md, section 7). */
export interface TaskFile extends TaskEntry {
  readonly basisId: string;
  readonly blob: Uint8Array;
  /** Bytes that a hash or signature of the file covers: all up to the end of the blob. */
  readonly content: Uint8Array;
  /** Undefined where the file is not signed. */
  readonly signature: Signature | undefined;
}

/** A basis of each side of a module. */
export type SharedBases = Readonly<Record<"A" | "B", Side>>;

/**
 * The bases of a module that all its tasks share on both sides; undefined where they share one side alone, or fall into
 * groups.
 */
export function sharedBases({
  A: [A, ...moreA],
  B: [B, ...moreB],
}: Pick<PackModule, "A" | "B">): SharedBases | undefined {
  return A && B && moreA.length + moreB.length === 0 ? { A, B } : undefined;
}

/** Parts that a task may have for a module. */
type ModuleRole = "magnitude" | "private" | "own-A" | "own-B";

/** A parameter that a task changes, or a module for which it has a magnitude, private terms or rows of its own. */
export interface Brought {
  readonly role: ParameterRole | ModuleRole;
  /** Names the parameter ("classifier.weight") or the module. */
  readonly name: string;
}

/** The parts of a blob, read or to be written, that say what it brings. */
interface Bringing {
  readonly terms: readonly (Pick<TaskTerm, "module"> & {
    [Key in "magnitude" | "privateA" | "ownA" | "ownBt"]?: unknown;
  })[];
  readonly parameters: readonly Pick<TaskParameter, "role" | "name">[];
}

/** The same list, derived from the blob itself. */
export function bringsOf({ terms, parameters }: Bringing, modules: readonly Pick<PackModule, "name">[]): string[] {
  const brings = parameters.map(({ role, name }) => `${role} ${name}`);
  for (const [role, key] of [
    ["magnitude", "magnitude"],
    ["private", "privateA"],
    ["own-A", "ownA"],
    ["own-B", "ownBt"],
  ] as const)
    for (const term of terms) if (term[key]) brings.push(`${role} ${modules[term.module]!.name}`);
  return brings;
}

/** A role, a space, and a name. */
export const BROUGHT: RegExp = /^(saved|bias(-delta)?|rows|magnitude|private|own-[AB]) ./s;

/** True if a role is of a module, not of a parameter. */
export function isOfModule(role: Brought["role"]): role is ModuleRole {
  return role === "magnitude" || needsFactors(role);
}

/** True if it takes factors, which a task without it does not have in addition to coefficients. */
export function needsFactors(role: Brought["role"]): boolean {
  return role === "private" || role === "own-A" || role === "own-B";
}

/** "classifier" of "classifier.weight". */
export function moduleOf(parameter: string): string {
  return parameter.replace(/\.[^.]*$/, "");
}

/** One entry of the list. */
export function parseBrought(entry: string): Brought {
  const cut = entry.indexOf(" ");
  return { role: entry.slice(0, cut) as Brought["role"], name: entry.slice(cut + 1) };
}

/** The encoded bytes of a tensor, a view of its section. */
export function encodedTensor(section: Uint8Array, { byteOffset, byteLength }: TensorRef): Uint8Array {
  return section.subarray(byteOffset, byteOffset + byteLength);
}

/**
 * The numbers of a tensor [rows, width], f32.
 * @param section that holds it: `bytes` of a loaded task, or of the pack's bases
 * @param out Default: new memory
 * @example
 * const { terms, bytes } = await pack.load("sst2");
 * const coefficients = terms.map(({ A }) => A && readTensor(bytes, A.tensor));
 */
export function readTensor(section: Uint8Array, ref: TensorRef, out?: Float32Array): Float32Array {
  return decodeTensor(ref.dtype, encodedTensor(section, ref), ref.rows, ref.width, out);
}

// Class names held against the head that they are the classes of.

/** True if a parameter belongs to a classifier, by the names that transformers and PEFT have for it. */
export function isHead(parameter: string): boolean {
  return /(^|\.)(classifier|score)\./.test(parameter);
}

/**
 * Says how a task's class names differ from its head; undefined where they fit, or where it brings no head that is
 * known as one. One layer of a head has a row for each class.
 */
export function misfitLabels(
  labels: readonly string[] | undefined,
  parameters: readonly Pick<TaskParameter, "name" | "role" | "shape">[],
): string | undefined {
  const layers = parameters.filter(({ name, role, shape }) => role === "saved" && isHead(name) && shape.length === 2);
  if (!labels || layers.length === 0 || layers.some(({ shape }) => shape[0] === labels.length)) return undefined;
  const found = layers.map(({ name, shape }) => `"${name}" has ${shape[0]} rows`).join(", ");
  return `it has ${labels.length} labels, but ${found}`;
}
