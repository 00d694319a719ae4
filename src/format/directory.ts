/**
 * The head of a pack: the window, which says which generation counts and where its parts are (SPEC.md, section 2), and the directory: sections,
 * basis description, task list (section 4).
 */

import { atOnce, paced, pacer } from "../pace.ts";
import { DTYPES, type Dtype } from "../tensor/dtypes.ts";
import { toHex, toUtf8 } from "../text.ts";
import { align64, crc32c, decode, Fields, placing, toIntegrity, type Value } from "./fields.ts";
import {
  type BasisDescription,
  BLOCK_BYTES,
  BROUGHT,
  CODED_MAGIC,
  CODED_MASK,
  DIRECTORY_HEAD_BYTES,
  type Directory,
  FINGERPRINT_SIZE,
  HASH_BYTES,
  HEAD_BYTES,
  LAYOUTS,
  MAGIC,
  type PackModule,
  SECTION_BASES,
  SECTION_CODED,
  SECTION_ENTRY_BYTES,
  SECTION_FREE,
  SECTION_TASK,
  type Section,
  SIGNATURE_BYTES,
  SIGNATURE_OFFSET,
  type Side,
  type Signature,
  type Superblock,
  type TaskEntry,
  type TaskMetadata,
  type TensorRef,
  WINDOW_BYTES,
  type Window,
} from "./format.ts";

/** Most names in all lists of `brings` together. */
const MOST_BROUGHT = 1_000_000;
/** Most bytes of a task's metadata: the names of 20 000 classes take half of them. */
const METADATA_BYTES = 2 ** 20;

/**
 * Checks the window and picks the current superblock.
 * @param bytes the first 1 536 bytes of the file
 * @param size size of the file, when known
 * @throws FormatError when this is not a pack of version 1, or no superblock is whole, or the file is truncated
 */
export function parseWindow(bytes: Uint8Array, file: string, size?: number): Window {
  const f: Fields = new Fields(bytes, file, "window");
  f.magic(MAGIC, "an EigenLoRA pack");
  if (bytes.length < WINDOW_BYTES) f.fail(`truncated: ${bytes.length} bytes, the window alone has ${WINDOW_BYTES}`);
  const version = f.version();
  if (f.u32(12) !== WINDOW_BYTES) f.fail(`window of ${f.u32(12)} bytes, expected ${WINDOW_BYTES}`);
  atOnce(f.crc(f.u32(HEAD_BYTES), HEAD_BYTES));
  f.zero(HEAD_BYTES + 4, 512);
  const whole = [0, 1]
    .map(
      (index) => new Fields(bytes.subarray(BLOCK_BYTES * (index + 1), BLOCK_BYTES * (index + 2)), file, "superblock"),
    )
    .filter(isWhole)
    .sort((a, b) => generationOf(b) - generationOf(a));
  if (whole[0] === undefined) f.fail("neither superblock is whole: the file is damaged, fetch it again");
  // All other rules are of the one that counts.
  const superblock = parseSuperblock(whole[0]);
  const { committed, directoryOffset, directoryLength, basesOffset, basesLength } = superblock;
  if (size !== undefined && size < committed) f.fail(`truncated: ${size} bytes of ${committed}; fetch it again`);
  const inside = (offset: number, length: number): boolean =>
    offset >= WINDOW_BYTES && offset % 64 === 0 && offset + length <= committed;
  if (!inside(directoryOffset, directoryLength) || !inside(basesOffset, basesLength))
    f.fail("directory or bases lie outside the file");
  // A copy: as a view it would keep what else was read with it.
  const head = bytes.slice(0, HEAD_BYTES);
  return { version, basisId: toHex(head.subarray(16)), superblock, head };
}

const generationOf = (f: Fields): number => f.u32(4) * 2 ** 32 + f.u32(0);

/** Whether a superblock was written, and not torn. */
function isWhole(f: Fields, index: number): boolean {
  if (generationOf(f) === 0 || f.u32(0) % 2 !== index || f.u32(60) !== crc32c(f.bytes.subarray(0, 60))) return false;
  const end = SIGNATURE_OFFSET + SIGNATURE_BYTES;
  // Both are written at once: where the signature is torn, so is the whole.
  if (f.u32(52) > 0) return f.u32(end - 4) === crc32c(f.bytes.subarray(0, end - 4));
  return !f.bytes.subarray(SIGNATURE_OFFSET, end).some(Boolean);
}

function parseSuperblock(f: Fields): Superblock {
  const flags = f.u32(52);
  const signatureEnd = SIGNATURE_OFFSET + SIGNATURE_BYTES;
  if (flags > 1) f.fail(`flags ${flags}, expected 0 or 1`);
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
    signature: flags ? signatureOf(f.bytes.subarray(SIGNATURE_OFFSET, signatureEnd)) : undefined,
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
export async function parseDirectory(
  stored: Uint8Array,
  superblock: Superblock,
  file: string,
  signal?: AbortSignal,
): Promise<Directory> {
  let f: Fields = new Fields(stored, file, "directory");
  if (stored.length !== superblock.directoryLength) f.fail(`${stored.length} bytes of ${superblock.directoryLength}`);
  const pause = pacer(signal);
  await paced(f.crc(superblock.directoryCrc), pause);
  const coded = stored.length > 4 && (f.u32(0) & CODED_MASK) === (CODED_MAGIC & CODED_MASK);
  if (coded) f = await (await import("./decode-coded.ts")).plainDirectory(f, superblock, pause);
  return paced(parseParts(f, superblock, stored), pause);
}

function* parseParts(f: Fields, superblock: Superblock, stored: Uint8Array): Generator<void, Directory> {
  const { bytes, file } = f;
  if (bytes.length < DIRECTORY_HEAD_BYTES) f.fail(`${bytes.length} bytes are too few`);
  const count = f.u32(0);
  const basisLength = f.u32(4);
  const tasksLength = f.u32(8);
  for (const [found, most, what] of [
    [count, 1_048_576, "sections"],
    [basisLength, 67_108_864, "bytes of basis description"],
    [tasksLength, 268_435_456, "bytes of task list"],
  ] as const)
    if (found > most) f.fail(`${found} ${what}, at most ${most} are allowed`);
  const hashes = f.u32(12);
  if (hashes > 0 && hashes !== HASH_BYTES * count) f.fail(`${hashes} bytes of hashes for ${count} sections`);
  const parts = DIRECTORY_HEAD_BYTES + count * SECTION_ENTRY_BYTES + basisLength + tasksLength + hashes;
  if (parts !== bytes.length) f.fail(`${bytes.length} bytes, but its parts add up to ${parts}`);
  const sections = yield* parseSections(f, count, hashes && bytes.length - hashes, superblock);
  const [bases, ...others] = sections.filter(({ kind }) => kind === SECTION_BASES);
  if (!bases || others.length > 0) f.fail(`${others.length + (bases ? 1 : 0)} bases sections, expected 1`);
  if (bases.offset !== superblock.basesOffset || bases.length !== superblock.basesLength)
    f.fail("section table and superblock disagree about the bases");
  const start = DIRECTORY_HEAD_BYTES + count * SECTION_ENTRY_BYTES;
  const basisBytes = bytes.subarray(start, start + basisLength);
  const { basis, size } = yield* parseBasis(basisBytes, bases, file);
  const tasksStart = start + basisLength;
  const root = yield* decode(bytes.subarray(tasksStart, tasksStart + tasksLength), file, "task list", "tasks");
  const blobs = sections.filter((s) => s.kind === SECTION_TASK);
  const seen = new Set<string>();
  let names = 0;
  const tasks: (TaskEntry & { section: Section })[] = [];
  if (root.kind === "array" && root.count !== blobs.length)
    f.fail(`${root.count} tasks are listed, but there are ${blobs.length} task blobs`);
  for (const value of root.each(1_048_576)) {
    const entry = yield* parseEntry(value, tasks);
    if (seen.has(entry.id)) f.fail(`two tasks are named "${entry.id}"`);
    if (entry.brings && value.get("brings").kind === "array") names += entry.brings.length;
    if (names > MOST_BROUGHT) f.fail(`tasks bring ${names} names, at most ${MOST_BROUGHT} are allowed together`);
    seen.add(entry.id);
    tasks.push(Object.assign(entry, { section: blobs[tasks.length]! }));
    if (tasks.length % 256 === 0) yield;
  }
  return { sections, bytes: stored, basis, basisBytes, bases: { ...bases, size }, tasks };
}

/**
 * The section table. Sections and the directory tile the file: each begins where the part before it ends, at the next multiple of 64.
 * @param hashes where the hashes begin, 0 where there are none
 */
function* parseSections(
  f: Fields,
  count: number,
  hashes: number,
  { directoryOffset, directoryLength, committed }: Superblock,
): Generator<void, Section[]> {
  const sections: Section[] = [];
  let end = WINDOW_BYTES;
  const follow = (offset: number, length: number, name: string): void => {
    if (offset !== align64(end)) f.fail(`${name} starts at ${offset}, expected ${align64(end)}`);
    end = offset + length;
  };
  let before = true;
  for (let i = 0; i < count; i++) {
    const section = parseSection(f, i, hashes);
    const { kind, required, offset, length } = section;
    if (before && directoryOffset < offset) {
      follow(directoryOffset, directoryLength, "the directory");
      before = false;
    }
    follow(offset, length, `section ${i}`);
    if (required && (kind === 0 || kind > SECTION_FREE))
      f.fail(`it needs a section of kind ${kind}, unknown here; update eigenlora`);
    sections.push(section);
    if (i % 256 === 255) yield;
  }
  if (before) follow(directoryOffset, directoryLength, "the directory");
  if (end !== committed) f.fail(`the sections end at ${end}, the file at ${committed}`);
  return sections;
}

function parseSection(f: Fields, index: number, hashes: number): Section {
  const at = DIRECTORY_HEAD_BYTES + index * SECTION_ENTRY_BYTES;
  const hash = hashes + index * HASH_BYTES;
  const stored = f.u32(at);
  const flags = f.u32(at + 4);
  const length = f.u64(at + 16);
  const coded = stored > SECTION_CODED && stored <= SECTION_CODED + SECTION_TASK;
  const kind = coded ? stored - SECTION_CODED : stored;
  const needed = kind === SECTION_BASES || kind === SECTION_TASK;
  if (flags > 1 || flags < Number(needed))
    f.fail(`section ${index} has flags ${flags}, expected ${needed ? "1" : "0 or 1"}`);
  const free = kind === SECTION_FREE;
  if (free && flags > 0) f.fail(`section ${index} is free and required`);
  if (length === 0 && stored !== SECTION_BASES) f.fail(`section ${index} is empty`);
  f.zero(at + (free ? 24 : 28), at + 32);
  if (free && hashes > 0) f.zero(hash, hash + HASH_BYTES);
  return {
    ...{ kind, coded, length, required: flags > 0, offset: f.u64(at + 8), crc: f.u32(at + 24) },
    integrity: hashes > 0 ? toIntegrity(f.bytes.subarray(hash, hash + HASH_BYTES)) : undefined,
  };
}

/** @returns what it says, and how many bytes the bases have, once decoded where they are coded */
export function* parseBasis(
  bytes: Uint8Array,
  { coded, length }: Pick<Section, "coded" | "length">,
  file: string,
): Generator<void, { basis: BasisDescription; size: number }> {
  const root: Value = yield* decode(bytes, file, "basis description", "basis");
  const { place: tensor, full, end } = placing(16, 0, coded ? Infinity : length, file, "basis description");
  const names = new Set<string>();
  const modules: PackModule[] = [];
  for (const value of root.get("modules").each(65_536)) {
    const module = yield* parseModule(value, tensor);
    if (names.has(module.name)) root.fail(`two modules are named "${module.name}"`);
    names.add(module.name);
    modules.push(module);
    yield;
  }
  if (!coded) full();
  const basis = {
    producer: root.get("producer").string(1024),
    mode: root.get("mode").string(64),
    gauge: root.get("gauge").string(64),
    centering: root.get("centering").string(64),
    rank: root.get("rank").maybe((rank) => rank.integer(1, 65_535)),
    step: root.get("step").maybe((step: Value) => share(step, 16)),
    error: root.get("error").maybe((error: Value) => share(error, 1)),
    baseModel: root.get("baseModel").maybe((name) => name.string(4096)),
    modules,
  };
  return { basis, size: end() };
}

function* parseModule(m: Value, tensor: PlaceTensor): Generator<void, PackModule> {
  const name = m.get("name").string(1024);
  const out = m.get("out").integer(1, 2 ** 31 - 1);
  const inputs = m.get("in").integer(1, 2 ** 31 - 1);
  const A = yield* parseSides(m.get("A"), inputs, tensor);
  const B = yield* parseSides(m.get("B"), out, tensor);
  const layout = m.get("layout").choice(LAYOUTS);
  const kernel = m.get("kernel").maybe((kernel) => kernel.array(8).map((k) => k.integer(1, 65_535)));
  const size = kernel?.reduce((a, b) => a * b, 1);
  if (layout === "conv" ? size === undefined || kernel!.length === 0 || inputs % size !== 0 : kernel)
    m.fail(`"${name}" has layout ${layout}, in ${inputs} and kernel ${kernel ? `[${kernel}]` : "none"}`);
  const fingerprint = m.get("fingerprint").boolean() ? tensor("f32", 1, FINGERPRINT_SIZE).byteOffset : undefined;
  return { name, out, in: inputs, layout, kernel, A, B, fingerprint };
}

/** A number above 0. */
function share(value: Value, most: number): number {
  const found = value.number(0, most);
  if (found === 0) value.fail("it is 0");
  return found;
}

/** The place of the next tensor. */
type PlaceTensor = (type: Dtype, rows: number, width: number) => TensorRef;

function* parseSides(value: Value, dimension: number, tensor: PlaceTensor): Generator<void, Side[]> {
  if (value.absent) return [];
  if (value.kind !== "array") return [parseSide(value, dimension, tensor)];
  const sides = yield* value.list(65_536, (side: Value) => parseSide(side, dimension, tensor));
  if (sides.length === 0) value.fail("no basis is in it");
  return sides;
}

function parseSide(value: Value, dimension: number, tensor: PlaceTensor): Side {
  const kind = value.get("kind").integer(1, 2) === 1 ? "column" : "flat";
  const K = value.get("K").integer(0, 65_535);
  const mean = value.get("mean").boolean();
  if (K === 0 && !mean) value.fail("it has neither components nor a mean");
  const rank = value.get("rank").maybe((rank) => rank.integer(1, 65_535));
  if ((kind === "flat") !== (rank !== undefined)) value.fail(`a rank belongs to kind 2, this is ${kind}`);
  const type = value.get("type").choice(DTYPES);
  const explained = value.get("explained").maybe((share: Value) => share.number(0, 1)) ?? 0;
  return { kind, K, rank, mean, explained, tensor: tensor(type, K + (mean ? 1 : 0), dimension * (rank ?? 1)) };
}

/** @param earlier entries of the list before this one */
export function* parseEntry(value: Value, earlier: readonly TaskEntry[]): Generator<void, TaskEntry> {
  const id = value.get("id").string(255);
  if (CONTROL.test(id)) value.fail(`the task id ${JSON.stringify(id)} has control characters`);
  const metadata: Value = value.get("metadata");
  let plain: TaskMetadata | undefined;
  // Nil is as good as nothing, here as everywhere in a map.
  if (!metadata.absent) yield* checkMetadata(metadata);
  return {
    id,
    adapterBytes: value.get("adapterBytes").integer(0, Number.MAX_SAFE_INTEGER),
    // Made when it is asked for: a list has the metadata of many tasks, and few of them are used.
    get metadata() {
      return (plain ??= metadata.absent ? {} : (metadata.plain() as TaskMetadata));
    },
    brings: yield* parseBrings(value.get("brings"), earlier),
  };
}

function* parseBrings(value: Value, earlier: readonly TaskEntry[]): Generator<void, readonly string[] | undefined> {
  if (value.absent) return undefined;
  if (value.kind === "number") return earlier[value.integer(0, earlier.length - 1)]!.brings;
  const names = new Set<string>();
  yield* value.list(65_536, (name: Value) => {
    // "bias-delta", a space, a name of 1 024 bytes.
    const text = name.string(1035);
    const wrong = BROUGHT.test(text) ? names.has(text) && "is there twice" : "is no role and name";
    if (wrong) name.fail(`${JSON.stringify(text.slice(0, 80))} ${wrong}`);
    names.add(text);
  });
  return [...names];
}

// biome-ignore lint/suspicious/noControlCharactersInRegex: these are \p{Cc}, which not every engine knows.
const CONTROL = /[\0-\x1f\x7f-\x9f]/;

/** Whether a string may name a task: 1 to 255 bytes of UTF-8, no control characters. */
export function isTaskId(id: string): boolean {
  const { length } = toUtf8(id);
  return length > 0 && length <= 255 && !CONTROL.test(id);
}

/** @throws FormatError naming the field that is not what it must be */
function* checkMetadata(value: Value): Generator<void> {
  for (const key of ["license", "origin"]) value.get(key).maybe((field: Value) => field.string(4096));
  value.within(METADATA_BYTES);
  const labels: Value = value.get("labels");
  if (labels.absent) return;
  const { length } = yield* labels.list(65_536, (label) => label.string(1024));
  if (length === 0) labels.fail("no names, expected 1 to 65536");
}
