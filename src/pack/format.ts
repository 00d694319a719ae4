/**
 * SPEC.md as code, the reading half: bytes in, checked values out. No I/O, and no allocation of a size that the file
 * names before that size has been checked. Writing is `encode.ts`.
 */
import { align4, isQuantized, TENSOR_TYPES, tensorBytes, type TensorType } from "../dtypes.ts";
import { FormatError } from "../errors.ts";
import type { Layout, SavedTensor, TaskMetadata } from "../adapters/adapter.ts";
import { crc32c } from "./crc32c.ts";
import { check, decode, Value } from "./messagepack.ts";

/** Bytes of the window: enough to plan the next read (SPEC.md, section 2). */
export const WINDOW_BYTES = 1536;
export const MAGIC: readonly number[] = [0x89, 0x45, 0x49, 0x47, 0x45, 0x4e, 0x0d, 0x0a];
export const TASK_FILE_MAGIC: readonly number[] = [0x89, 0x45, 0x54, 0x41, 0x53, 0x4b, 0x0d, 0x0a];
export const TASK_BLOB_MAGIC = 0x4b534154;
export const SECTION_ENTRY_BYTES = 32;
export const DIRECTORY_HEAD_BYTES = 16;
export const LAYOUTS: readonly Layout[] = ["out-in", "in-out", "conv", "embedding"];
export const ROLES: readonly SavedTensor["role"][] = ["saved", "bias", "bias-delta", "rows"];
export const FINGERPRINT_SIZE = 64;

/** Which of two superblocks is current, and where it points. */
export interface Superblock {
  generation: number;
  committed: number;
  directoryOffset: number;
  directoryLength: number;
  basesOffset: number;
  basesLength: number;
  directoryCrc: number;
}

export interface Window {
  version: string;
  /** Hexadecimal SHA-256. */
  basisId: string;
  superblock: Superblock;
}

export const SECTION_BASES = 1;
export const SECTION_TASK = 2;
export const SECTION_FREE = 3;

export interface Section {
  kind: number;
  required: boolean;
  offset: number;
  length: number;
  crc: number;
}

/** One encoded tensor: where it lies in its section and how to decode it. */
export interface TensorRef {
  type: TensorType;
  rows: number;
  width: number;
  byteOffset: number;
  byteLength: number;
}

/** The basis of one side of one module. `tensor` has `K` rows, and the mean as one row more when `mean`. */
export interface Side {
  kind: "column" | "flat";
  K: number;
  /** Flat: the rank of every task. Column: undefined. */
  rank: number | undefined;
  mean: boolean;
  explained: number;
  tensor: TensorRef;
}

/** One adapted module of the pack. */
export interface PackModule {
  name: string;
  out: number;
  in: number;
  layout: Layout;
  kernel: readonly number[] | undefined;
  A: Side | undefined;
  B: Side | undefined;
  /** Byte offset of 64 f32 in the bases, when stored. */
  fingerprint: number | undefined;
}

export interface BasisDescription {
  producer: string;
  mode: string;
  gauge: string;
  centering: string;
  baseModel: string | undefined;
  modules: readonly PackModule[];
}

export interface TaskEntry {
  id: string;
  adapterBytes: number;
  metadata: TaskMetadata;
  /** What the task changes beside its terms, as "role name": see SPEC.md, section 4.3. Undefined when not said. */
  brings?: readonly string[] | undefined;
}

export interface Directory {
  sections: readonly Section[];
  basis: BasisDescription;
  /** The description as stored; an append copies it, so that the basis id stays true. */
  basisBytes: Uint8Array;
  bases: Section;
  /** In the order of the blobs. */
  tasks: readonly (TaskEntry & { section: Section })[];
}

/** One side's coefficients in a task blob. */
export interface Coefficients {
  mean: boolean;
  tensor: TensorRef;
}

/** What a task does to one module (SPEC.md, section 6.1). */
export interface TaskTerm {
  module: number;
  rank: number;
  A: Coefficients | undefined;
  B: Coefficients | undefined;
  /** Rank of the private factors, 0 for none. */
  q: number;
  privateA: TensorRef | undefined;
  privateBt: TensorRef | undefined;
  magnitude: TensorRef | undefined;
}

/** A whole parameter that comes with a task (SPEC.md, section 6.2). */
export interface TaskParameter {
  name: string;
  role: SavedTensor["role"];
  shape: readonly number[];
  indices: readonly number[] | undefined;
  tensor: TensorRef;
}

/** A parsed task blob. Tensors are decoded from `bytes` when they are needed. */
export interface TaskBlob {
  terms: readonly TaskTerm[];
  parameters: readonly TaskParameter[];
  bytes: Uint8Array;
}

/** A parsed task file (SPEC.md, section 7). */
export interface TaskFile extends TaskEntry {
  basisId: string;
  blob: Uint8Array;
}

/** Where the next section may start: the least multiple of 64 that is ≥ n. */
export function align64(n: number): number {
  return Math.ceil(n / 64) * 64;
}

export function hex(bytes: Uint8Array): string {
  return Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("");
}

/** Checked reads of little-endian fields of one part of one file. */
class Fields {
  readonly view: DataView;
  readonly bytes: Uint8Array;
  readonly file: string;
  readonly part: string;

  constructor(bytes: Uint8Array, file: string, part: string) {
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    this.bytes = bytes;
    this.file = file;
    this.part = part;
  }

  u16(at: number): number {
    return this.view.getUint16(at, true);
  }

  u32(at: number): number {
    return this.view.getUint32(at, true);
  }

  u64(at: number): number {
    const high = this.u32(at + 4);
    this.check(high < 0x200000, () => `the number at byte ${at} is larger than 2^53`);
    return high * 2 ** 32 + this.u32(at);
  }

  magic(expected: readonly number[], what: string): void {
    const found = this.bytes.subarray(0, 8);
    this.check(
      expected.every((b, i) => found[i] === b),
      () => `this is not ${what}: it begins with ${hex(found)}, expected ${hex(Uint8Array.from(expected))}`,
    );
  }

  version(): string {
    const major = this.u16(8);
    this.check(major === 1, () => `version ${major}.${this.u16(10)}, but this reader knows version 1; update eigenlora`);
    return `${major}.${this.u16(10)}`;
  }

  crc(at: number, length: number): void {
    const found = crc32c(this.bytes.subarray(0, length));
    this.check(found === this.u32(at), () => `its checksum does not match: the file is damaged, fetch it again`);
  }

  limit(found: number, most: number, what: string): void {
    this.check(found <= most, () => `${found} ${what}, at most ${most} are allowed`);
  }

  check(condition: boolean, message: () => string): asserts condition {
    check(condition, this.file, this.part, message);
  }
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
  f.crc(48, 48);
  let best: Superblock | undefined;
  for (const index of [0, 1]) {
    const block = parseSuperblock(bytes.subarray(512 * (index + 1), 512 * (index + 1) + 64), file);
    if (block && block.generation % 2 === index && block.generation > (best?.generation ?? 0)) best = block;
  }
  f.check(best !== undefined, () => "neither superblock is whole: the file is damaged, fetch it again");
  const { committed, directoryOffset, directoryLength, basesOffset, basesLength } = best;
  f.check(size === undefined || size >= committed, () => `truncated: ${size} bytes of ${committed}; fetch it again`);
  const inside = (offset: number, length: number): boolean =>
    offset >= WINDOW_BYTES && offset % 64 === 0 && offset + length <= committed;
  f.check(inside(directoryOffset, directoryLength), () => "the directory lies outside the file");
  f.check(inside(basesOffset, basesLength), () => "the bases lie outside the file");
  return { version, basisId: hex(bytes.subarray(16, 48)), superblock: best };
}

function parseSuperblock(bytes: Uint8Array, file: string): Superblock | undefined {
  const f: Fields = new Fields(bytes, file, "superblock");
  if (f.u32(60) !== crc32c(bytes.subarray(0, 60))) return undefined;
  return {
    generation: f.u64(0),
    committed: f.u64(8),
    directoryOffset: f.u64(16),
    directoryLength: f.u64(24),
    basesOffset: f.u64(32),
    basesLength: f.u64(40),
    directoryCrc: f.u32(48),
  };
}

/**
 * Checks the directory against its superblock: the sections tile the file, every tensor of the bases has its place.
 * @throws FormatError saying which rule of SPEC.md, section 4, does not hold
 */
export function parseDirectory(bytes: Uint8Array, superblock: Superblock, file: string): Directory {
  const f: Fields = new Fields(bytes, file, "directory");
  f.check(bytes.length === superblock.directoryLength, () => `${bytes.length} bytes of ${superblock.directoryLength}`);
  f.check(crc32c(bytes) === superblock.directoryCrc, () => "its checksum does not match: the file is damaged");
  f.check(bytes.length >= DIRECTORY_HEAD_BYTES, () => `${bytes.length} bytes are too few`);
  const [count, basisLength, tasksLength] = [f.u32(0), f.u32(4), f.u32(8)];
  f.limit(count, 1_048_576, "sections");
  f.limit(basisLength, 67_108_864, "bytes of basis description");
  f.limit(tasksLength, 268_435_456, "bytes of task list");
  const described = DIRECTORY_HEAD_BYTES + count * SECTION_ENTRY_BYTES + basisLength + tasksLength;
  f.check(described === bytes.length, () => `${bytes.length} bytes, but its parts add up to ${described}`);
  const sections: Section[] = [];
  for (let i = 0; i < count; i++) {
    const at = DIRECTORY_HEAD_BYTES + i * SECTION_ENTRY_BYTES;
    const section = {
      kind: f.u32(at),
      required: (f.u32(at + 4) & 1) === 1,
      offset: f.u64(at + 8),
      length: f.u64(at + 16),
      crc: f.u32(at + 24),
    };
    f.check(section.length > 0 || section.kind === SECTION_BASES, () => `section ${i} is empty`);
    sections.push(section);
  }
  checkTiling(f, sections, superblock);
  const known = [SECTION_BASES, SECTION_TASK, SECTION_FREE];
  for (const { kind, required } of sections) {
    f.check(!required || known.includes(kind), () => `it needs a section of kind ${kind}, unknown here; update eigenlora`);
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
  const root = new Value(decode(bytes.subarray(start + basisLength), file, "task list"), file, "task list", "tasks");
  const blobs = sections.filter((s) => s.kind === SECTION_TASK);
  const list = root.array(1_048_576);
  f.check(list.length === blobs.length, () => `${list.length} tasks are listed, but there are ${blobs.length} task blobs`);
  const seen = new Set<string>();
  const entries: TaskEntry[] = [];
  const tasks = list.map((value, i) => {
    const entry = parseEntry(value, entries);
    entries.push(entry);
    f.check(!seen.has(entry.id), () => `two tasks are named "${entry.id}"`);
    seen.add(entry.id);
    return { ...entry, section: blobs[i]! };
  });
  return { sections, basis, basisBytes, bases, tasks };
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
  const root: Value = new Value(decode(bytes, file, "basis description"), file, "basis description", "basis");
  let end = 0;
  const tensor = (type: TensorType, rows: number, width: number): TensorRef => {
    const byteOffset = Math.ceil(end / 16) * 16;
    const byteLength = tensorBytes(type, rows, width);
    end = byteOffset + byteLength;
    root.check(end <= basesLength, () => `its tensors need ${end} bytes or more, the bases have ${basesLength}`);
    return { type, rows, width, byteOffset, byteLength };
  };
  const names = new Set<string>();
  const modules = root.get("modules").array(65_536).map((m: Value): PackModule => {
    const name = m.get("name").string(1024);
    m.check(!names.has(name), () => `two modules are named "${name}"`);
    names.add(name);
    const out = m.get("out").integer(1, 2 ** 31 - 1);
    const inputs = m.get("in").integer(1, 2 ** 31 - 1);
    const kernel = m.get("kernel");
    const A = parseSide(m.get("A"), inputs, tensor);
    const B = parseSide(m.get("B"), out, tensor);
    m.check((A === undefined) === (B === undefined), () => `module "${name}" has a basis on one side only`);
    return {
      name,
      out,
      in: inputs,
      layout: LAYOUTS[m.get("layout").integer(0, LAYOUTS.length - 1)]!,
      kernel: kernel.absent ? undefined : kernel.array(8).map((k) => k.integer(1, 65_535)),
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
    baseModel: root.get("baseModel").absent ? undefined : root.get("baseModel").string(4096),
    modules,
  };
}

function parseSide(
  value: Value,
  dimension: number,
  tensor: (type: TensorType, rows: number, width: number) => TensorRef,
): Side | undefined {
  if (value.absent) return undefined;
  const kind = value.get("kind").integer(1, 2) === 1 ? "column" : "flat";
  const K = value.get("K").integer(0, 65_535);
  const mean = value.get("mean").boolean();
  const rank = kind === "flat" ? value.get("rank").integer(1, 65_535) : undefined;
  const type = TENSOR_TYPES[value.get("type").integer(0, TENSOR_TYPES.length - 1)]!;
  const explained = value.get("explained").number(0, 1);
  return { kind, K, rank, mean, explained, tensor: tensor(type, K + (mean ? 1 : 0), dimension * (rank ?? 1)) };
}

/** @param earlier entries of the list before this one */
function parseEntry(value: Value, earlier: readonly TaskEntry[]): TaskEntry {
  const id = value.get("id").string(255);
  value.check(isTaskId(id), () => `the task id ${JSON.stringify(id)} is empty or has control characters`);
  return {
    id,
    adapterBytes: value.get("adapterBytes").integer(0, Number.MAX_SAFE_INTEGER),
    metadata: value.get("metadata").plain() as TaskMetadata,
    brings: parseBrings(value.get("brings"), earlier),
  };
}

function parseBrings(value: Value, earlier: readonly TaskEntry[]): readonly string[] | undefined {
  if (value.absent) return undefined;
  if (typeof value.value === "number") return earlier[value.integer(0, earlier.length - 1)]!.brings;
  return value.array(65_536).map((name) => name.string(1024));
}

/** Whether a string may name a task: 1 to 255 bytes of UTF-8, no control characters. */
export function isTaskId(id: string): boolean {
  return id.length > 0 && new TextEncoder().encode(id).length <= 255 && !/[\u0000-\u001f\u007f-\u009f]/.test(id);
}

/**
 * Checks a task blob against the basis it belongs to.
 * @param bytes the whole blob; kept by the result
 * @throws FormatError saying which rule of SPEC.md, section 6, does not hold
 */
export function parseTask(bytes: Uint8Array, modules: readonly PackModule[], file: string, id: string): TaskBlob {
  const f: Fields = new Fields(bytes, file, `task "${id}"`);
  f.check(bytes.length >= 8 && f.u32(0) === TASK_BLOB_MAGIC, () => "this is not a task blob");
  const headerLength = f.u32(4);
  f.check(headerLength <= bytes.length - 8, () => `a header of ${headerLength} bytes in a blob of ${bytes.length}`);
  const root = new Value(decode(bytes.subarray(8, 8 + headerLength), file, f.part), file, f.part, "header").array(8);
  let end = 8 + headerLength;
  const tensor = (code: Value, rows: number, width: number): TensorRef => {
    const type = TENSOR_TYPES[code.integer(0, TENSOR_TYPES.length - 1)]!;
    const byteOffset = align4(end);
    const byteLength = tensorBytes(type, rows, width);
    end = byteOffset + byteLength;
    f.check(end <= bytes.length, () => `its tensors need ${end} bytes or more, the blob has ${bytes.length}`);
    return { type, rows, width, byteOffset, byteLength };
  };
  f.check(root.length >= 2, () => "the header has no terms and parameters");
  let last = -1;
  const terms = root[0]!.array(65_536).map((term: Value) => {
    const parsed = parseTerm(term, modules, tensor);
    term.check(parsed.module > last, () => "terms are not sorted by module");
    last = parsed.module;
    return parsed;
  });
  const names = new Set<string>();
  const parameters = root[1]!.array(65_536).map((parameter: Value) => {
    const parsed = parseParameter(parameter, tensor);
    const key = `${parsed.role} ${parsed.name}`;
    parameter.check(!names.has(key), () => `"${parsed.name}" is there twice`);
    names.add(key);
    return parsed;
  });
  f.check(end === bytes.length, () => `its tensors end at ${end}, the blob has ${bytes.length} bytes`);
  return { terms, parameters, bytes };
}

function parseTerm(
  term: Value,
  modules: readonly PackModule[],
  tensor: (code: Value, rows: number, width: number) => TensorRef,
): TaskTerm {
  const items = term.array(16);
  const item = (i: number): Value => items[i] ?? term.missing(i);
  const index = item(0).integer(0, modules.length - 1);
  const module = modules[index]!;
  const rank = item(1).integer(0, 65_535);
  const side = (value: Value, basis: Side | undefined): Coefficients | undefined => {
    if (value.absent) return undefined;
    const code = value.integer(0, 8 * TENSOR_TYPES.length - 1);
    const kind = code & 3;
    value.check(
      basis !== undefined && kind === (basis.kind === "column" ? 1 : 2),
      () => `coefficients of kind ${kind} for a basis of kind ${basis?.kind ?? "none"}`,
    );
    const mean = (code & 4) !== 0;
    value.check(!mean || basis.mean, () => "a mean is asked for, but the basis has none");
    value.check(
      basis.rank === undefined ? rank > 0 : rank === basis.rank,
      () => `rank ${rank}, but the basis is ${basis.kind}${basis.rank === undefined ? "" : ` of rank ${basis.rank}`}`,
    );
    const rows = basis.kind === "column" ? rank : 1;
    return { mean, tensor: tensor(new Value(code >> 3, value.file, value.part, value.path), rows, basis.K) };
  };
  const A = side(item(2), module.A);
  const B = side(item(3), module.B);
  term.check((A === undefined) === (B === undefined), () => `"${module.name}" has coefficients on one side only`);
  term.check(A !== undefined || rank === 0, () => `"${module.name}" has rank ${rank} but no coefficients`);
  const q = item(4).integer(0, 65_535);
  return {
    module: index,
    rank,
    A,
    B,
    q,
    privateA: q > 0 ? tensor(item(5), q, module.in) : undefined,
    privateBt: q > 0 ? tensor(item(5), q, module.out) : undefined,
    magnitude: item(6).absent ? undefined : tensor(item(6), 1, module.out),
  };
}

function parseParameter(
  parameter: Value,
  tensor: (code: Value, rows: number, width: number) => TensorRef,
): TaskParameter {
  const items = parameter.array(16);
  const item = (i: number): Value => items[i] ?? parameter.missing(i);
  const name = item(0).string(1024);
  const role = ROLES[item(1).integer(0, ROLES.length - 1)]!;
  const shape = item(3).array(8).map((d) => d.integer(1, 2 ** 31 - 1));
  parameter.check(shape.length > 0, () => `"${name}" has no shape`);
  parameter.check(role !== "rows" || shape.length === 2, () => `"${name}" needs two dimensions, got [${shape}]`);
  parameter.check(
    (role !== "bias" && role !== "bias-delta") || shape.length === 1,
    () => `"${name}" is a bias, expected one dimension, got [${shape}]`,
  );
  const rows = shape.length === 1 ? 1 : shape[0]!;
  const width = shape.slice(shape.length === 1 ? 0 : 1).reduce((a, b) => a * b, 1);
  parameter.check(Number.isSafeInteger(rows * width), () => `"${name}" is too large: [${shape}]`);
  const indices = role === "rows" ? item(4).array(shape[0]!).map((i) => i.integer(0, 2 ** 31 - 1)) : undefined;
  if (indices) {
    parameter.check(indices.length === shape[0], () => `"${name}": ${indices.length} rows are named, ${shape[0]} stored`);
    parameter.check(indices.every((v, i) => i === 0 || v > indices[i - 1]!), () => `"${name}": rows are not ascending`);
  }
  return { name, role, shape, indices, tensor: tensor(item(2), rows, width) };
}

/**
 * Checks a task file and cuts it into entry and blob.
 * @throws FormatError saying which rule of SPEC.md, section 7, does not hold
 */
export function parseTaskFile(bytes: Uint8Array, file: string): TaskFile {
  const f: Fields = new Fields(bytes, file, "task file");
  f.check(bytes.length >= 64, () => `truncated: ${bytes.length} bytes, its head alone has 64`);
  f.magic(TASK_FILE_MAGIC, "an EigenLoRA task file");
  f.version();
  f.crc(60, 60);
  const start = align64(64 + f.u32(12));
  f.check(start + f.u32(48) === bytes.length, () => `${bytes.length} bytes, expected ${start + f.u32(48)}; fetch it again`);
  const entry = bytes.subarray(64, 64 + f.u32(12));
  f.check(bytes.subarray(64 + entry.length, start).every((b) => b === 0), () => "its padding is not zero: it is damaged");
  const blob = bytes.subarray(start);
  f.check(crc32c(entry) === f.u32(52) && crc32c(blob) === f.u32(56), () => "its checksum does not match: it is damaged");
  const parsed = parseEntry(new Value(decode(entry, file, f.part), file, f.part, "entry"), []);
  return { ...parsed, basisId: hex(bytes.subarray(16, 48)), blob };
}

/**
 * Refuses NaN and infinity in a tensor: they would spread to the whole weight and no sum would show where from.
 * @throws FormatError naming the tensor
 */
export function checkFinite(section: Uint8Array, tensor: TensorRef, file: string, part: string, name: string): void {
  const { type, rows, width } = tensor;
  const start = section.byteOffset + tensor.byteOffset;
  const view = new DataView(section.buffer, start, tensor.byteLength);
  const bad = (row: number, what: string): never => {
    throw new FormatError(`${name}: ${what} of row ${row} is NaN or infinite`, { file, part });
  };
  if (isQuantized(type)) {
    for (let i = 0; i < rows; i++) if ((view.getUint16(2 * i, true) & 0x7c00) === 0x7c00) bad(i, "the scale");
    return;
  }
  const [step, exponent] = type === "f32" ? [4, 0x7f80] : [2, type === "f16" ? 0x7c00 : 0x7f80];
  for (let i = 0, at = step - 2; i < rows * width; i++, at += step) {
    if ((view.getUint16(at, true) & exponent) === exponent) bad(Math.floor(i / width), `value ${i % width}`);
  }
}
