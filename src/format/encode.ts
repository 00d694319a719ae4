/**
 * SPEC.md as code, the writing half: values in, bytes out. No I/O. `directory.ts` must be able to read all of it and
 * checks limits, so a writer ends by parsing its bytes.
 */

import { atOnce } from "../pace.ts";
import { align4, BITS, bf16ToF32, DTYPES, type Dtype, f16ToF32, isQuantized } from "../tensor/dtypes.ts";
import { UnstorableError } from "../tensor/encode.ts";
import { isCoded, MOST_CODED_DIRECTORY } from "./coded.ts";
import { MOST, parseEntry } from "./directory.ts";
import { encodeSection } from "./encode-coded.ts";
import { align64, crc32c, decode, fromIntegrity, integrityOf, sha256, toIntegrity } from "./fields.ts";
import type { Signature, TaskEntry } from "./format.ts";
import * as format from "./format.ts";
import { pack } from "./msgpackr.ts";

type Bytes = Uint8Array<ArrayBuffer>;

/** Column components of one side of a module, ready to be written; those of whole factors (flat) are only read. */
export interface SideInput extends Pick<format.Side, "K" | "mean" | "explained"> {
  readonly dtype: Dtype;
  /** Encoded tensor: K rows, then the mean when there is one. */
  readonly encoded: Uint8Array;
}

export interface ModuleInput
  extends Pick<format.PackModule, "name" | "out" | "in" | "layout">,
    Partial<Pick<format.PackModule, "kernel">> {
  /** The bases of each side; several where tasks fall into groups. Default: none. */
  readonly A?: readonly SideInput[] | undefined;
  readonly B?: readonly SideInput[] | undefined;
  /** 64 weights of the base at the module's fingerprint positions. */
  readonly fingerprint?: Float32Array | undefined;
}

export interface BasisInput
  extends Pick<format.BasisDescription, "producer" | "gauge" | "centering">,
    Partial<Pick<format.BasisDescription, "rank" | "step" | "error" | "baseModel">> {
  readonly modules: readonly ModuleInput[];
  /** MessagePack of a typical task blob: coded blobs copy from it. */
  readonly header?: unknown;
}

/** An encoded tensor and its type. */
export interface TensorInput {
  readonly dtype: Dtype;
  readonly encoded: Uint8Array;
}

/** One side's coefficients. */
interface CoefficientsInput extends TensorInput, Pick<format.Side, "mean"> {
  /** Which of the side's bases they are over. Default: the first. */
  readonly basis?: number | undefined;
}

export interface TermInput extends Pick<format.TaskTerm, "module" | "rank"> {
  readonly A?: CoefficientsInput | undefined;
  readonly B?: CoefficientsInput | undefined;
  /** Rows of the task's own, [rank, in] and [rank, out]: added to what coefficients make, or in their place. */
  readonly ownA?: TensorInput | undefined;
  readonly ownBt?: TensorInput | undefined;
  /** Private factors: A [q, in] and Bᵀ [q, out], of one type. */
  readonly privateTerms?: { rank: number; dtype: Dtype; A: Uint8Array; Bt: Uint8Array } | undefined;
  readonly magnitude?: TensorInput | undefined;
}

export interface ParameterInput
  extends TensorInput,
    Pick<format.TaskParameter, "name" | "role" | "shape">,
    Partial<Pick<format.TaskParameter, "indices">> {}

/**
 * A writer's half of the limit on values that are multiplied by others (SPEC.md, section 5).
 * @param owner of the values, for the error
 * @throws UnstorableError
 */
export function refuseLarge(what: string, { dtype, encoded }: TensorInput, rows: number, owner?: () => string): void {
  if (dtype === "f16") return;
  const view = new DataView(encoded.buffer, encoded.byteOffset, encoded.byteLength);
  const most = isQuantized(dtype) ? MOST / (2 ** (BITS[dtype] - 1) - 1) : MOST;
  const count = isQuantized(dtype) ? rows : Math.floor(encoded.byteLength / (dtype === "f32" ? 4 : 2));
  const half = dtype === "bf16" ? bf16ToF32 : f16ToF32;
  for (let i = 0; i < count; i++) {
    const value = dtype === "f32" ? view.getFloat32(4 * i, true) : half(view.getUint16(2 * i, true));
    if (Math.abs(value) < most) continue;
    throw new UnstorableError(
      `${what} has a value of ${MOST} or more, which no pack can hold: scale the adapter down`,
      undefined,
      owner?.(),
    );
  }
}

/** The bases section and the description that goes with it (SPEC.md, sections 4.2 and 4.4). */
export function encodeBasis(basis: BasisInput): { description: Bytes; bases: Bytes; both: Bytes } {
  const tensors: { at: number; bytes: Uint8Array }[] = [];
  let end = 0;
  const place = (bytes: Uint8Array): void => {
    const at = Math.ceil(end / 16) * 16;
    tensors.push({ at, bytes });
    end = at + bytes.length;
  };
  const map = (which: string, s: SideInput): object => {
    refuseLarge(which, s, s.K + (s.mean ? 1 : 0));
    place(s.encoded);
    const { K, mean, explained } = s;
    return { kind: 1, K, mean, type: DTYPES.indexOf(s.dtype), explained };
  };
  const side = (which: string, all: readonly SideInput[] = []): object | object[] | null => {
    const maps = all.map((one) => map(which, one));
    return maps.length > 1 ? maps : (maps[0] ?? null);
  };
  const modules = basis.modules.map(({ name, out, in: inputs, layout, kernel, fingerprint, ...m }) => {
    const A = side(`basis A of "${name}"`, m.A);
    const B = side(`basis B of "${name}"`, m.B);
    if (fingerprint) {
      const bytes = new Uint8Array(4 * fingerprint.length);
      const view = new DataView(bytes.buffer);
      fingerprint.forEach((v, i) => view.setFloat32(4 * i, v, true));
      place(bytes);
    }
    const shape = { name, out, in: inputs, layout: format.LAYOUTS.indexOf(layout), kernel: kernel && [...kernel] };
    return { ...shape, A, B, fingerprint: fingerprint && true };
  });
  const { producer, gauge, centering, rank, step, error, baseModel = null, header } = basis;
  const said = pack({ producer, mode: "column", gauge, centering, rank, step, error, baseModel, modules, header });
  // One behind the other, as the basis id takes them: the bases of a large model are not copied for it.
  const both = new Uint8Array(said.length + end);
  both.set(said);
  const [description, bases] = [both.subarray(0, said.length), both.subarray(said.length)];
  for (const { at, bytes } of tensors) bases.set(bytes, at);
  return { description, bases, both };
}

/**
 * A task blob (SPEC.md, section 6). Terms must be sorted by module.
 * @param names of modules, for messages
 * @throws UnstorableError for values that no pack can hold
 */
export function encodeTask(
  terms: readonly TermInput[],
  parameters: readonly ParameterInput[],
  names: readonly string[] = [],
): Bytes {
  const tensors: Uint8Array[] = [];
  const code = (type: Dtype): number => DTYPES.indexOf(type);
  const head = pack([
    terms.map((t) => {
      const name = `"${names[t.module] ?? t.module}"`;
      const add = (what: string, tensor: TensorInput | undefined, rows: number): void => {
        if (!tensor) return;
        refuseLarge(`${what} of ${name}`, tensor, rows);
        tensors.push(tensor.encoded);
      };
      for (const s of [t.A, t.B]) add("coefficients", s, t.rank);
      for (const own of [t.ownA, t.ownBt]) add("a row", own, t.rank);
      const side = (s: TermInput["A"], own: TensorInput | undefined): number | null | (number | null)[] => {
        const over = s ? 1 + (s.mean ? 4 : 0) + 8 * code(s.dtype) : null;
        return own || s?.basis ? [over, s?.basis ?? 0, own ? code(own.dtype) : null] : over;
      };
      const [A, B] = [side(t.A, t.ownA), side(t.B, t.ownBt)];
      const pair = t.privateTerms;
      for (const encoded of pair ? [pair.A, pair.Bt] : [])
        add("a private term", { dtype: pair!.dtype, encoded }, pair!.rank);
      add("the magnitude", t.magnitude, 1);
      const magnitude = t.magnitude ? code(t.magnitude.dtype) : null;
      return [t.module, t.rank, A, B, pair?.rank ?? 0, pair ? code(pair.dtype) : 0, magnitude];
    }),
    parameters.map((p) => {
      tensors.push(p.encoded);
      const fields = [p.name, format.ROLES.indexOf(p.role), code(p.dtype), [...p.shape]];
      return p.indices ? [...fields, [...p.indices]] : fields;
    }),
  ]);
  let end = 8 + head.length;
  const places = tensors.map((bytes) => {
    const at = align4(end);
    end = at + bytes.length;
    return at;
  });
  const blob = new Uint8Array(end);
  const view = new DataView(blob.buffer);
  view.setUint32(0, format.TASK_BLOB_MAGIC, true);
  view.setUint32(4, head.length, true);
  blob.set(head, 8);
  tensors.forEach((bytes, i) => blob.set(bytes, places[i]!));
  return blob;
}

/**
 * The directory (SPEC.md, section 4). Its hashes are there when all sections have theirs.
 * @param sections sorted by offset, tasks in the order of their sections
 */
function encodeDirectory(sections: readonly format.Section[], description: Uint8Array, tasks: Uint8Array): Bytes {
  const hashed = sections.every(({ integrity }) => integrity !== undefined);
  const bytes = new Uint8Array(directoryBytes(sections.length, hashed, description, tasks));
  const view = new DataView(bytes.buffer);
  const start = format.DIRECTORY_HEAD_BYTES + sections.length * format.SECTION_ENTRY_BYTES;
  const hashes = start + description.length + tasks.length;
  view.setUint32(0, sections.length, true);
  view.setUint32(4, description.length, true);
  view.setUint32(8, tasks.length, true);
  view.setUint32(12, bytes.length - hashes, true);
  sections.forEach((s, i) => {
    const at = format.DIRECTORY_HEAD_BYTES + i * format.SECTION_ENTRY_BYTES;
    view.setUint32(at, s.kind + (s.coded ? format.SECTION_CODED : 0), true);
    view.setUint32(at + 4, s.required ? 1 : 0, true);
    setU64(view, at + 8, s.offset);
    setU64(view, at + 16, s.length);
    view.setUint32(at + 24, s.crc, true);
    if (hashed) bytes.set(fromIntegrity(s.integrity!), hashes + i * format.HASH_BYTES);
  });
  bytes.set(description, start);
  bytes.set(tasks, start + description.length);
  return bytes;
}

/** Size of a directory: known before the offsets in it are. */
export function directoryBytes(sections: number, hashed: boolean, description: Uint8Array, tasks: Uint8Array): number {
  const each = format.SECTION_ENTRY_BYTES + (hashed ? format.HASH_BYTES : 0);
  return format.DIRECTORY_HEAD_BYTES + sections * each + description.length + tasks.length;
}

/** The task list (SPEC.md, section 4.3). */
function encodeTaskList(tasks: readonly TaskEntry[]): Bytes {
  if (tasks.length > format.MOST_TASKS)
    throw new RangeError(`${tasks.length} tasks, a pack has at most ${format.MOST_TASKS}; make several packs`);
  const first = new Map<string, number>();
  return pack(
    tasks.map((task, i) => {
      const list = JSON.stringify(task.brings);
      const earlier = task.brings && first.get(list);
      if (earlier !== undefined) return { ...entryMap(task), brings: earlier };
      first.set(list, i);
      return entryMap(task);
    }),
  );
}

function entryMap({ id, adapterBytes, metadata, brings }: TaskEntry): object {
  return { id, adapterBytes, metadata: Object.keys(metadata).length > 0 ? metadata : undefined, brings };
}

/** First bytes of the window (SPEC.md, section 2). */
function encodeHead(basisId: string): Bytes {
  const bytes = new Uint8Array(format.HEAD_BYTES);
  const view = new DataView(bytes.buffer);
  bytes.set(format.MAGIC);
  view.setUint16(8, 1, true);
  view.setUint32(12, format.WINDOW_BYTES, true);
  bytes.set(fromHex(basisId), 16);
  return bytes;
}

/**
 * Reads a task's entry as a reader of it will: a writer ends by parsing what it wrote.
 * @param file for messages
 * @throws FormatError naming the field that the format does not hold
 */
export function checkEntry(entry: TaskEntry, file: string): void {
  // The list around the entry is as deep as that of a pack.
  const [read] = atOnce(decode(pack([entryMap(entry)]), file, "task", "tasks")).array(1);
  atOnce(parseEntry(read!, []));
}

/** The window of a file with a single superblock. */
function encodeWindow(head: Uint8Array, superblock: format.Superblock): Bytes {
  const bytes = new Uint8Array(format.WINDOW_BYTES);
  bytes.set(head);
  new DataView(bytes.buffer).setUint32(format.HEAD_BYTES, crc32c(head), true);
  bytes.set(encodeSuperblock(superblock), superblockOffset(superblock.generation));
  return bytes;
}

/** Where the superblock of a generation lies. */
export function superblockOffset(generation: number): number {
  return format.BLOCK_BYTES * (1 + (generation % 2));
}

/** A superblock, its signature, and zeros: 512 bytes. */
function encodeSuperblock({ signature, ...s }: format.Superblock): Bytes {
  const bytes = new Uint8Array(format.BLOCK_BYTES);
  const view = new DataView(bytes.buffer);
  [s.generation, s.committed, s.directoryOffset, s.directoryLength, s.basesOffset, s.basesLength].forEach((v, i) =>
    setU64(view, 8 * i, v),
  );
  view.setUint32(48, s.directoryCrc, true);
  view.setUint32(52, signature ? 1 : 0, true);
  view.setUint32(60, crc32c(bytes.subarray(0, 60)), true);
  if (signature) {
    const crcAt = format.SIGNATURE_OFFSET + format.SIGNATURE_BYTES - 4;
    bytes.set(signature.key, format.SIGNATURE_OFFSET);
    bytes.set(signature.bytes, format.SIGNATURE_OFFSET + signature.key.length);
    view.setUint32(crcAt, crc32c(bytes.subarray(0, crcAt)), true);
  }
  return bytes;
}

/**
 * One task as a file of its own (SPEC.md, section 7).
 * @throws FormatError for metadata that the format does not hold
 */
export function encodeTaskFile(entry: TaskEntry, basisId: string, blob: Uint8Array): Uint8Array<ArrayBuffer> {
  checkEntry(entry, entry.id);
  const map = pack(entryMap(entry));
  const start = align64(64 + map.length);
  const bytes = new Uint8Array(start + blob.length);
  const view = new DataView(bytes.buffer);
  bytes.set(format.TASK_FILE_MAGIC);
  view.setUint16(8, 1, true);
  view.setUint32(12, map.length, true);
  bytes.set(fromHex(basisId), 16);
  view.setUint32(48, blob.length, true);
  view.setUint32(52, crc32c(map), true);
  view.setUint32(56, crc32c(blob), true);
  view.setUint32(60, crc32c(bytes.subarray(0, 60)), true);
  bytes.set(map, 64);
  bytes.set(blob, start);
  return bytes;
}

/** The same file with a signature in the place of the one it may have (SPEC.md, section 8). */
export function encodeSignedTaskFile({ content, signature }: Pick<format.TaskFile, "content" | "signature">): Bytes {
  if (!signature) return content.slice();
  const start = align64(content.length);
  const bytes = new Uint8Array(start + format.SIGNATURE_BYTES);
  bytes.set(content);
  bytes.set(signature.key, start);
  bytes.set(signature.bytes, start + signature.key.length);
  new DataView(bytes.buffer).setUint32(bytes.length - 4, crc32c(bytes.subarray(start, bytes.length - 4)), true);
  return bytes;
}

function setU64(view: DataView, at: number, value: number): void {
  view.setUint32(at, value >>> 0, true);
  view.setUint32(at + 4, Math.floor(value / 2 ** 32), true);
}

/** A task to be written. */
export interface TaskToWrite {
  readonly entry: TaskEntry;
  readonly blob: Uint8Array;
}

/** Parts of a new pack before its tasks. */
interface FreshBasis {
  /** Basis description, MessagePack. */
  readonly description: Uint8Array;
  readonly bases: Uint8Array;
  /** The bases as they are to be stored, where they are coded. */
  readonly coded?: Uint8Array | undefined;
  /** Hexadecimal, of 32 bytes. */
  readonly basisId: string;
}

/** Size and checksums of a section. */
type Measured = Pick<format.Section, "length" | "crc" | "coded"> & { readonly integrity: string };

/** A task whose blob lies elsewhere until its turn comes. */
export interface TaskPlace extends Measured {
  readonly entry: TaskEntry;
  read(): Promise<Uint8Array>;
}

/** Vouches for a hash: the root of a pack, or that of a task file (SPEC.md, section 8). */
export type Sign = (kind: "pack" | "task", hash: Uint8Array) => Promise<Signature>;

/** A task whose blob is in memory. */
export async function placeOf({ entry, blob }: TaskToWrite): Promise<TaskPlace> {
  return { entry, ...(await measured(blob, isCoded(blob))), read: async () => blob };
}

async function measured(bytes: Uint8Array, coded: boolean): Promise<Measured> {
  return { length: bytes.length, crc: crc32c(bytes), integrity: await integrityOf(bytes), coded };
}

/**
 * Writes a fresh pack as consecutive chunks: window, directory, bases, blobs, one blob in memory at a time. `bytes` is
 * the total size.
 */
export async function streamFresh(
  { description, bases: plain, coded, basisId }: FreshBasis,
  tasks: readonly TaskPlace[],
  sign?: Sign,
): Promise<{ bytes: number; chunks: AsyncGenerator<Uint8Array, void> }> {
  const bases = coded ?? plain;
  const list = encodeTaskList(tasks.map((t) => t.entry));
  let end = 0;
  const section = (kind: number, { length, crc, integrity, coded }: Measured): format.Section => {
    const offset = align64(end);
    end = offset + length;
    return { kind, coded, required: true, offset, length, crc, integrity };
  };
  const first = section(format.SECTION_BASES, await measured(bases, coded !== undefined));
  const behind = [first, ...tasks.map((task) => section(format.SECTION_TASK, task))];
  const short = codedDirectory(behind, description, list);
  const directoryLength = short?.length ?? directoryBytes(behind.length, true, description, list);
  const basesOffset = align64(format.WINDOW_BYTES + directoryLength);
  const sections = behind.map((section) => ({ ...section, offset: basesOffset + section.offset }));
  const directory = short ?? encodeDirectory(sections, description, list);
  const window = encodeHead(basisId);
  const superblock: format.Superblock = {
    generation: 1,
    committed: basesOffset + end,
    directoryOffset: format.WINDOW_BYTES,
    directoryLength,
    basesOffset,
    basesLength: bases.length,
    directoryCrc: crc32c(directory),
    signature: await sign?.("pack", await sha256(window, directory)),
  };
  const head = padded([encodeWindow(window, superblock), directory, bases], 0);
  async function* chunks(): AsyncGenerator<Uint8Array, void> {
    yield* head;
    let at = basesOffset + bases.length;
    for (const { read, length } of tasks) {
      yield* padded([await read()], at);
      at = align64(at) + length;
    }
  }
  return { bytes: basesOffset + end, chunks: chunks() };
}

/**
 * The directory of a pack with coded sections, where it takes fewer bytes coded. It says no places: they follow from
 * the lengths.
 */
function codedDirectory(
  sections: readonly format.Section[],
  description: Uint8Array,
  tasks: Uint8Array,
): Uint8Array | undefined {
  if (!sections.some(({ coded }) => coded)) return undefined;
  const directory = encodeDirectory(
    sections.map((section) => ({ ...section, offset: 0 })),
    description,
    tasks,
  );
  return directory.length > MOST_CODED_DIRECTORY ? undefined : encodeSection(directory, [], 4);
}

/** Writes of an append: `body` at `offset`, flush, then `superblock` at `superblockOffset`, flush. */
export interface Append {
  readonly offset: number;
  readonly body: Uint8Array[];
  readonly superblock: Uint8Array;
  readonly superblockOffset: number;
}

/** Facts about an open pack. */
interface Current {
  readonly window: format.Window;
  readonly directory: format.Directory;
}

/** Plans an append. The ids of `tasks` must be new and unique. A pack that has no hashes stays without. */
export async function layoutAppend(
  { window, directory }: Current,
  tasks: readonly TaskToWrite[],
  sign?: Sign,
): Promise<Append> {
  const current = window.superblock;
  const entries: TaskEntry[] = [...directory.tasks];
  const added: format.Section[] = [];
  const hashed = directory.bases.integrity !== undefined;
  let end = current.committed;
  for (const { entry, blob } of tasks) {
    const { integrity, ...section } = await measured(blob, isCoded(blob));
    const offset = align64(end);
    entries.push(entry);
    added.push({
      kind: format.SECTION_TASK,
      required: true,
      offset,
      ...section,
      integrity: hashed ? integrity : undefined,
    });
    end = offset + section.length;
  }
  const superseded: format.Section = {
    kind: format.SECTION_FREE,
    coded: false,
    required: false,
    offset: current.directoryOffset,
    length: current.directoryLength,
    crc: 0,
    integrity: hashed ? toIntegrity(new Uint8Array(format.HASH_BYTES)) : undefined,
  };
  const sections = [...directory.sections, superseded, ...added].sort(
    (a, b) => a.offset - b.offset || a.length - b.length,
  );
  const parts = [sections, directory.basisBytes, encodeTaskList(entries)] as const;
  const bytes = codedDirectory(...parts) ?? encodeDirectory(...parts);
  const superblock: format.Superblock = {
    ...current,
    generation: current.generation + 1,
    committed: align64(end) + bytes.length,
    directoryOffset: align64(end),
    directoryLength: bytes.length,
    directoryCrc: crc32c(bytes),
    signature: await sign?.("pack", await sha256(window.head, bytes)),
  };
  return {
    offset: current.committed,
    body: padded([...tasks.map((t) => t.blob), bytes], current.committed),
    superblock: encodeSuperblock(superblock),
    superblockOffset: superblockOffset(superblock.generation),
  };
}

/** Plans the signing of a pack as it is: a generation of the same directory, so that a crash leaves one of both. */
export async function layoutSigned({ window, directory }: Current, sign: Sign): Promise<Append> {
  const { superblock } = window;
  const generation = superblock.generation + 1;
  const signature = await sign("pack", await sha256(window.head, directory.bytes));
  return {
    offset: superblock.committed,
    body: [],
    superblock: encodeSuperblock({ ...superblock, generation, signature }),
    superblockOffset: superblockOffset(generation),
  };
}

/**
 * The parts with zeros in front of each, so that all start at multiples of 64 when the first byte lands at `offset`.
 */
function padded(parts: readonly Uint8Array[], offset: number): Uint8Array[] {
  const chunks: Uint8Array[] = [];
  let end = offset;
  for (const part of parts) {
    const gap = align64(end) - end;
    if (gap > 0) chunks.push(new Uint8Array(gap));
    chunks.push(part);
    end += gap + part.length;
  }
  return chunks;
}

/** @throws TypeError when `digits` is not an even number of hexadecimal digits */
function fromHex(digits: string): Uint8Array<ArrayBuffer> {
  if (!/^([0-9a-f]{2})*$/i.test(digits))
    throw new TypeError(`expected hexadecimal digits, two a byte, got "${digits}"`);
  return Uint8Array.from({ length: digits.length / 2 }, (_, i) => Number.parseInt(digits.slice(2 * i, 2 * i + 2), 16));
}
