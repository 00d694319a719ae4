/**
 * SPEC.md as code, the reading half: bytes in, checked values out. No I/O, and no allocation of a size that the file
 * names before that size has been checked. Here window and directory, and what all parts are made of; task blobs are
 * `task.ts`, files of one task `task-file.ts`, writing `encode.ts`.
 */

import { DTYPES, type Dtype, tensorBytes } from "../tensor/dtypes.ts";
import { toHex } from "../tensor/hex.ts";
import { crc32c } from "./crc32c.ts";
import { align64, Fields } from "./fields.ts";
import { toIntegrity } from "./integrity.ts";
import { decode, type Value } from "./messagepack.ts";
import { parseMetadata } from "./metadata.ts";

/** Bytes of the window: enough to plan the next read (SPEC.md, section 2). */
export const WINDOW_BYTES = 1536;
export const MAGIC: readonly number[] = [0x89, 0x45, 0x49, 0x47, 0x45, 0x4e, 0x0d, 0x0a];
export const TASK_FILE_MAGIC: readonly number[] = [0x89, 0x45, 0x54, 0x41, 0x53, 0x4b, 0x0d, 0x0a];
export const TASK_BLOB_MAGIC = 0x4b534154;
export const SECTION_ENTRY_BYTES = 32;
/** Of a SHA-256. */
export const HASH_BYTES = 32;
/** First bytes of the window: what a root covers beside the directory. */
export const HEAD_BYTES = 48;
/** Of a superblock with what is behind it. */
export const BLOCK_BYTES = 512;
/** Where the signature begins in it, and its bytes: key, signature, CRC. */
export const SIGNATURE_OFFSET = 64;
export const SIGNATURE_BYTES = 100;
export const DIRECTORY_HEAD_BYTES = 16;
/**
 * How the base checkpoint stores an adapted weight:
 * `out-in` [out, in] (Linear), `in-out` [in, out] (Conv1D of GPT-2), `conv` [out, in/groups, k…] read as [out, in·k…],
 * `embedding` [vocabulary, dimension], where `in` is the vocabulary and `out` the dimension.
 */
export type Layout = "out-in" | "in-out" | "conv" | "embedding";

/** What a parameter that comes with a task does to the base's (SPEC.md, section 6.2). */
export type ParameterRole = "saved" | "bias" | "bias-delta" | "rows";

/** What is known about a task beside its numbers. Kept in the pack as it is. */
export interface TaskMetadata {
  /** Class names of a classifier, in the order of its rows. */
  labels?: string[];
  license?: string;
  /** Where the adapter came from. */
  origin?: string;
  /** Other plain values: strings, numbers, booleans, null, arrays and objects of these. */
  [key: string]: unknown;
}

export const LAYOUTS: readonly Layout[] = ["out-in", "in-out", "conv", "embedding"];
export const ROLES: readonly ParameterRole[] = ["saved", "bias", "bias-delta", "rows"];
export const FINGERPRINT_SIZE = 64;

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
  /** Whose the root is, says its key. Undefined where nobody signed it. */
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

export const SECTION_BASES = 1;
export const SECTION_TASK = 2;
export const SECTION_FREE = 3;

/** A stretch of the file and the checksum of its bytes. */
export interface Section {
  readonly kind: number;
  readonly required: boolean;
  readonly offset: number;
  readonly length: number;
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
  readonly A: Side | undefined;
  readonly B: Side | undefined;
  /** Byte offset of 64 f32 in the bases, when stored. */
  readonly fingerprint: number | undefined;
}

/** What the components are and were made of. */
export interface BasisDescription {
  readonly producer: string;
  readonly mode: string;
  readonly gauge: string;
  readonly centering: string;
  /** The most rank that was kept of each module, where that was limited. */
  readonly rank: number | undefined;
  readonly baseModel: string | undefined;
  readonly modules: readonly PackModule[];
}

/** What the directory says of a task. */
export interface TaskEntry {
  readonly id: string;
  readonly adapterBytes: number;
  readonly metadata: TaskMetadata;
  /** What the task changes beside its terms, as "role name": see SPEC.md, section 4.3. Undefined when not said. */
  readonly brings?: readonly string[] | undefined;
}

/** What a pack says of what it holds. */
export interface Directory {
  readonly sections: readonly Section[];
  /** As stored. */
  readonly bytes: Uint8Array;
  readonly basis: BasisDescription;
  /** The description as stored; an append copies it, so that the basis id stays true. */
  readonly basisBytes: Uint8Array;
  readonly bases: Section;
  /** In the order of the blobs. */
  readonly tasks: readonly (TaskEntry & { section: Section })[];
}

/** One side's coefficients in a task blob. */
export interface Coefficients {
  readonly mean: boolean;
  readonly tensor: TensorRef;
}

/** What a task does to one module (SPEC.md, section 6.1). */
export interface TaskTerm {
  readonly module: number;
  readonly rank: number;
  readonly A: Coefficients | undefined;
  readonly B: Coefficients | undefined;
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
}

/** A parsed task file (SPEC.md, section 7). */
export interface TaskFile extends TaskEntry {
  readonly basisId: string;
  readonly blob: Uint8Array;
  /** What a hash or signature of the file covers: all up to the end of the blob. */
  readonly content: Uint8Array;
  /** Undefined where the file is not signed. */
  readonly signature: Signature | undefined;
}

/**
 * Checks the window and picks the current superblock.
 * @param bytes the first 1 536 bytes of the file
 * @param size size of the file, when known
 * @throws FormatError when this is not a pack of version 1, or no superblock is whole, or the file is truncated
 */
export function parseWindow(bytes: Uint8Array, file: string, size?: number): Window {
  const f: Fields = new Fields(bytes, file, "window");
  f.check(bytes.length >= 8, () => `the file has ${bytes.length} bytes, a pack has at least ${WINDOW_BYTES}`);
  f.magic(MAGIC, "an EigenLoRA pack");
  f.check(bytes.length >= WINDOW_BYTES, () => `truncated: ${bytes.length} bytes, the window alone has ${WINDOW_BYTES}`);
  const version = f.version();
  f.check(f.u32(12) === WINDOW_BYTES, () => `window of ${f.u32(12)} bytes, expected ${WINDOW_BYTES}`);
  f.crc(f.u32(HEAD_BYTES), HEAD_BYTES);
  f.zero(HEAD_BYTES + 4, 512);
  let best: Superblock | undefined;
  for (const index of [0, 1]) {
    const at = BLOCK_BYTES * (index + 1);
    const block = parseSuperblock(bytes.subarray(at, at + BLOCK_BYTES), file);
    if (block && block.generation % 2 === index && block.generation > (best?.generation ?? 0)) best = block;
  }
  f.check(best !== undefined, () => "neither superblock is whole: the file is damaged, fetch it again");
  const { committed, directoryOffset, directoryLength, basesOffset, basesLength } = best;
  f.check(size === undefined || size >= committed, () => `truncated: ${size} bytes of ${committed}; fetch it again`);
  const inside = (offset: number, length: number): boolean =>
    offset >= WINDOW_BYTES && offset % 64 === 0 && offset + length <= committed;
  f.check(inside(directoryOffset, directoryLength), () => "the directory lies outside the file");
  f.check(inside(basesOffset, basesLength), () => "the bases lie outside the file");
  // A copy: as a view it would keep what else was read with it.
  const head = bytes.slice(0, HEAD_BYTES);
  return { version, basisId: toHex(head.subarray(16)), superblock: best, head };
}

/** Undefined where the block is not whole: never written, or torn. */
function parseSuperblock(bytes: Uint8Array, file: string): Superblock | undefined {
  const f: Fields = new Fields(bytes, file, "superblock");
  if (f.u32(60) !== crc32c(bytes.subarray(0, 60))) return undefined;
  const signatureEnd = SIGNATURE_OFFSET + SIGNATURE_BYTES;
  const flags = f.u32(52);
  const behind = bytes.subarray(SIGNATURE_OFFSET, signatureEnd);
  // Both are written at once: where the signature is torn, so is the whole.
  const sound =
    flags > 0 ? f.u32(signatureEnd - 4) === crc32c(bytes.subarray(0, signatureEnd - 4)) : !behind.some(Boolean);
  if (!sound) return undefined;
  f.check(flags <= 1, () => `flags ${flags}, expected 0 or 1`);
  f.zero(56, 60);
  f.zero(signatureEnd, BLOCK_BYTES);
  return {
    generation: f.u64(0),
    committed: f.u64(8),
    directoryOffset: f.u64(16),
    directoryLength: f.u64(24),
    basesOffset: f.u64(32),
    basesLength: f.u64(40),
    directoryCrc: f.u32(48),
    signature: flags ? signatureOf(behind) : undefined,
  };
}

/** @param bytes key, signature, CRC */
export function signatureOf(bytes: Uint8Array): Signature {
  return { key: bytes.slice(0, 32), bytes: bytes.slice(32, 96) };
}

/**
 * Checks the directory against its superblock: the sections tile the file, every tensor of the bases has its place.
 * @throws FormatError saying which rule of SPEC.md, section 4, does not hold
 */
export function parseDirectory(bytes: Uint8Array, superblock: Superblock, file: string): Directory {
  const f: Fields = new Fields(bytes, file, "directory");
  f.check(bytes.length === superblock.directoryLength, () => `${bytes.length} bytes of ${superblock.directoryLength}`);
  f.crc(superblock.directoryCrc);
  f.check(bytes.length >= DIRECTORY_HEAD_BYTES, () => `${bytes.length} bytes are too few`);
  const [count, basisLength, tasksLength] = [f.u32(0), f.u32(4), f.u32(8)];
  f.limit(count, 1_048_576, "sections");
  f.limit(basisLength, 67_108_864, "bytes of basis description");
  f.limit(tasksLength, 268_435_456, "bytes of task list");
  const hashes = f.u32(12);
  f.check(hashes === 0 || hashes === HASH_BYTES * count, () => `${hashes} bytes of hashes for ${count} sections`);
  const described = DIRECTORY_HEAD_BYTES + count * SECTION_ENTRY_BYTES + basisLength + tasksLength + hashes;
  f.check(described === bytes.length, () => `${bytes.length} bytes, but its parts add up to ${described}`);
  const sections: Section[] = [];
  for (let i = 0; i < count; i++) sections.push(parseSection(f, i, hashes && bytes.length - hashes));
  checkTiling(f, sections, superblock);
  const known = [SECTION_BASES, SECTION_TASK, SECTION_FREE];
  for (const { kind, required } of sections) {
    f.check(
      !required || known.includes(kind),
      () => `it needs a section of kind ${kind}, unknown here; update eigenlora`,
    );
  }
  const all = sections.filter((s) => s.kind === SECTION_BASES);
  const bases = all[0];
  f.check(bases !== undefined && all.length === 1, () => `${all.length} bases sections, expected 1`);
  f.check(
    bases.offset === superblock.basesOffset && bases.length === superblock.basesLength,
    () => "section table and superblock disagree about the bases",
  );
  const start = DIRECTORY_HEAD_BYTES + count * SECTION_ENTRY_BYTES;
  const basisBytes = bytes.subarray(start, start + basisLength);
  const basis = parseBasis(basisBytes, bases.length, file);
  const tasksStart = start + basisLength;
  const root = decode(bytes.subarray(tasksStart, tasksStart + tasksLength), file, "task list", "tasks");
  const blobs = sections.filter((s) => s.kind === SECTION_TASK);
  const list = root.array(1_048_576);
  f.check(
    list.length === blobs.length,
    () => `${list.length} tasks are listed, but there are ${blobs.length} task blobs`,
  );
  const seen = new Set<string>();
  const entries: TaskEntry[] = [];
  const tasks = list.map((value, i) => {
    const entry = parseEntry(value, entries);
    entries.push(entry);
    f.check(!seen.has(entry.id), () => `two tasks are named "${entry.id}"`);
    seen.add(entry.id);
    return { ...entry, section: blobs[i]! };
  });
  return { sections, bytes, basis, basisBytes, bases, tasks };
}

/** @param hashes where the hashes begin, 0 where there are none */
function parseSection(f: Fields, index: number, hashes: number): Section {
  const at = DIRECTORY_HEAD_BYTES + index * SECTION_ENTRY_BYTES;
  const hash = hashes + index * HASH_BYTES;
  const section = {
    kind: f.u32(at),
    required: f.u32(at + 4) === 1,
    offset: f.u64(at + 8),
    length: f.u64(at + 16),
    crc: f.u32(at + 24),
    integrity: hashes > 0 ? toIntegrity(f.bytes.subarray(hash, hash + HASH_BYTES)) : undefined,
  };
  const flags = f.u32(at + 4);
  const needed = section.kind === SECTION_BASES || section.kind === SECTION_TASK;
  f.check(
    flags <= 1 && (section.required || !needed),
    () => `section ${index} has flags ${flags}, expected ${needed ? "1" : "0 or 1"}`,
  );
  f.check(section.length > 0 || section.kind === SECTION_BASES, () => `section ${index} is empty`);
  f.zero(at + 28, at + 32);
  if (section.kind === SECTION_FREE) {
    f.zero(at + 24, at + 28);
    if (hashes > 0) f.zero(hash, hash + HASH_BYTES);
  }
  return section;
}

function checkTiling(f: Fields, sections: readonly Section[], superblock: Superblock): void {
  const directory = { offset: superblock.directoryOffset, length: superblock.directoryLength };
  let end = WINDOW_BYTES;
  let sawDirectory = false;
  const place = (part: { offset: number; length: number }, name: string): void => {
    f.check(part.offset === align64(end), () => `${name} starts at ${part.offset}, expected ${align64(end)}`);
    end = part.offset + part.length;
  };
  sections.forEach((section, i) => {
    if (!sawDirectory && directory.offset < section.offset) {
      place(directory, "the directory");
      sawDirectory = true;
    }
    place(section, `section ${i}`);
  });
  if (!sawDirectory) place(directory, "the directory");
  f.check(end === superblock.committed, () => `the sections end at ${end}, the file at ${superblock.committed}`);
}

function parseBasis(bytes: Uint8Array, basesLength: number, file: string): BasisDescription {
  const root: Value = decode(bytes, file, "basis description", "basis");
  let end = 0;
  const tensor = (dtype: Dtype, rows: number, width: number): TensorRef => {
    const byteOffset = Math.ceil(end / 16) * 16;
    const byteLength = tensorBytes(dtype, rows, width);
    end = byteOffset + byteLength;
    root.check(end <= basesLength, () => `its tensors need ${end} bytes or more, the bases have ${basesLength}`);
    return { dtype, rows, width, byteOffset, byteLength };
  };
  const names = new Set<string>();
  const modules = root
    .get("modules")
    .array(65_536)
    .map((m: Value): PackModule => {
      const name = m.get("name").string(1024);
      m.check(!names.has(name), () => `two modules are named "${name}"`);
      names.add(name);
      const out = m.get("out").integer(1, 2 ** 31 - 1);
      const inputs = m.get("in").integer(1, 2 ** 31 - 1);
      const A = parseSide(m.get("A"), inputs, tensor);
      const B = parseSide(m.get("B"), out, tensor);
      m.check((A === undefined) === (B === undefined), () => `module "${name}" has a basis on one side only`);
      const layout = LAYOUTS[m.get("layout").integer(0, LAYOUTS.length - 1)]!;
      const kernel = m.get("kernel").maybe((kernel) => kernel.array(8).map((k) => k.integer(1, 65_535)));
      const size = kernel?.reduce((a, b) => a * b, 1);
      m.check(
        layout === "conv" ? size !== undefined && inputs % size === 0 : !kernel,
        () => `"${name}" has layout ${layout}, in ${inputs} and kernel ${kernel ? `[${kernel}]` : "none"}`,
      );
      return {
        name,
        out,
        in: inputs,
        layout,
        kernel,
        A,
        B,
        fingerprint: m.get("fingerprint").boolean() ? tensor("f32", 1, FINGERPRINT_SIZE).byteOffset : undefined,
      };
    });
  root.check(end === basesLength, () => `its tensors end at ${end}, the bases have ${basesLength} bytes`);
  return {
    producer: root.get("producer").string(1024),
    mode: root.get("mode").string(64),
    gauge: root.get("gauge").string(64),
    centering: root.get("centering").string(64),
    rank: root.get("rank").maybe((rank) => rank.integer(1, 65_535)),
    baseModel: root.get("baseModel").maybe((name) => name.string(4096)),
    modules,
  };
}

function parseSide(
  value: Value,
  dimension: number,
  tensor: (type: Dtype, rows: number, width: number) => TensorRef,
): Side | undefined {
  if (value.absent) return undefined;
  const kind = value.get("kind").integer(1, 2) === 1 ? "column" : "flat";
  const K = value.get("K").integer(0, 65_535);
  const mean = value.get("mean").boolean();
  value.check(K > 0 || mean, () => "it has neither components nor a mean");
  const rank = value.get("rank").maybe((rank) => rank.integer(1, 65_535));
  value.check((kind === "flat") === (rank !== undefined), () => `a rank belongs to kind 2, this is ${kind}`);
  const type = DTYPES[value.get("type").integer(0, DTYPES.length - 1)]!;
  const explained = value.get("explained").number(0, 1);
  return { kind, K, rank, mean, explained, tensor: tensor(type, K + (mean ? 1 : 0), dimension * (rank ?? 1)) };
}

/** @param earlier entries of the list before this one */
export function parseEntry(value: Value, earlier: readonly TaskEntry[]): TaskEntry {
  const id = value.get("id").string(255);
  value.check(isTaskId(id), () => `the task id ${JSON.stringify(id)} is empty or has control characters`);
  return {
    id,
    adapterBytes: value.get("adapterBytes").integer(0, Number.MAX_SAFE_INTEGER),
    metadata: parseMetadata(value.get("metadata")) as TaskMetadata,
    brings: parseBrings(value.get("brings"), earlier),
  };
}

function parseBrings(value: Value, earlier: readonly TaskEntry[]): readonly string[] | undefined {
  if (value.absent) return undefined;
  if (typeof value.value === "number") return earlier[value.integer(0, earlier.length - 1)]!.brings;
  // "bias-delta", a space, a name.
  return value.array(65_536).map((name) => name.string(1035));
}

/** Whether a string may name a task: 1 to 255 bytes of UTF-8, no control characters. */
export function isTaskId(id: string): boolean {
  return id.length > 0 && new TextEncoder().encode(id).length <= 255 && !/\p{Cc}/u.test(id);
}
