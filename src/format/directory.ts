/**
 * Reads a pack: the window, which says which generation counts and where its parts are (SPEC.md, section 2); the
 * directory: sections, basis description, task list (section 4); the blob of a task (section 6). Bytes become checked
 * values, without I/O.
 */
import { FormatError } from "../errors.ts";
import { atOnce, paced, pacer } from "../pace.ts";
import { BITS, DTYPES, type Dtype, f16ToF32, isQuantized, leastAt, rowBytes, scaleBytes } from "../tensor/dtypes.ts";
import { toHex, toUtf8 } from "../text.ts";
import { align64, crc32c, decode, Fields, placing, toIntegrity, type Value } from "./fields.ts";
import type * as format from "./format.ts";
import {
  BLOCK_BYTES,
  BROUGHT,
  bringsOf,
  CODED_MAGIC,
  CODED_MASK,
  DIRECTORY_HEAD_BYTES,
  FINGERPRINT_SIZE,
  HASH_BYTES,
  HEAD_BYTES,
  LAYOUTS,
  MAGIC,
  MOST_TASKS,
  mostRank,
  ROLES,
  SECTION_BASES,
  SECTION_CODED,
  SECTION_ENTRY_BYTES,
  SECTION_FREE,
  SECTION_TASK,
  SIGNATURE_BYTES,
  SIGNATURE_OFFSET,
  TASK_BLOB_MAGIC,
  WINDOW_BYTES,
} from "./format.ts";

/** Most names in all lists of `brings` together. */
const MOST_BROUGHT = 500_000;
/** Most bytes of a task's metadata: the names of 20 000 classes take half of them. */
const METADATA_BYTES = 2 ** 20;

/**
 * Checks the window and picks the current superblock.
 * @param bytes the first 1 536 bytes of the file
 * @param size size of the file, when known
 * @throws FormatError when this is not a pack of version 1, or no superblock is whole, or the file is truncated
 */
export function parseWindow(bytes: Uint8Array, file: string, size?: number): format.Window {
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

/** True if a superblock was written, and not torn. */
function isWhole(f: Fields, index: number): boolean {
  if (generationOf(f) === 0 || f.u32(0) % 2 !== index || f.u32(60) !== crc32c(f.bytes.subarray(0, 60))) return false;
  const end = SIGNATURE_OFFSET + SIGNATURE_BYTES;
  // Both are written at once: where the signature is torn, so is the whole.
  if (f.u32(52) > 0) return f.u32(end - 4) === crc32c(f.bytes.subarray(0, end - 4));
  return !f.bytes.subarray(SIGNATURE_OFFSET, end).some(Boolean);
}

function parseSuperblock(f: Fields): format.Superblock {
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
export function signatureOf(bytes: Uint8Array): format.Signature {
  return { key: bytes.slice(0, 32), bytes: bytes.slice(32, 96) };
}

type StoredEntry = format.Directory["tasks"][number];

/** A directory, and its entries by id, which an open pack adds to and removes from. */
interface ReadDirectory {
  readonly directory: format.Directory;
  readonly entries: Map<string, StoredEntry>;
}

/**
 * Checks the directory against its superblock: the sections tile the file, every tensor of the bases has its place.
 * @throws FormatError saying which rule of SPEC.md, section 4, does not hold
 */
export async function parseDirectory(
  stored: Uint8Array,
  superblock: format.Superblock,
  file: string,
  signal?: AbortSignal,
): Promise<ReadDirectory> {
  let f: Fields = new Fields(stored, file, "directory");
  if (stored.length !== superblock.directoryLength) f.fail(`${stored.length} bytes of ${superblock.directoryLength}`);
  const pause = pacer(signal);
  await paced(f.crc(superblock.directoryCrc), pause);
  const coded = stored.length > 4 && (f.u32(0) & CODED_MASK) === (CODED_MAGIC & CODED_MASK);
  if (coded) f = await (await import("./coded.ts")).plainDirectory(f, superblock, pause);
  return paced(parseParts(f, superblock, stored), pause);
}

function* parseParts(f: Fields, superblock: format.Superblock, stored: Uint8Array): Generator<void, ReadDirectory> {
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
  const section = (index: number): format.Section => parseSection(f, index, hashes && bytes.length - hashes);
  const { bases, blobs } = yield* parseSections(f, count, section, superblock);
  const start = DIRECTORY_HEAD_BYTES + count * SECTION_ENTRY_BYTES;
  const basisBytes = bytes.subarray(start, start + basisLength);
  const { basis, size } = yield* parseBasis(basisBytes, bases, file);
  const tasksStart = start + basisLength;
  const root = yield* decode(bytes.subarray(tasksStart, tasksStart + tasksLength), file, "task list", "tasks");
  const entries: ReadDirectory["entries"] = new Map();
  let names = 0;
  const tasks: StoredEntry[] = [];
  if (root.kind === "array" && root.count !== blobs.length)
    f.fail(`${root.count} tasks are listed, but there are ${blobs.length} task blobs`);
  for (const value of root.each(MOST_TASKS)) {
    const entry = yield* parseEntry(value, tasks);
    if (entries.has(entry.id)) f.fail(`two tasks are named "${entry.id}"`);
    if (entry.brings && value.get("brings").kind === "array") names += entry.brings.length;
    if (names > MOST_BROUGHT) f.fail(`tasks bring ${names} names, at most ${MOST_BROUGHT} are allowed together`);
    entry.section = blobs[tasks.length]!;
    tasks.push(entry as StoredEntry);
    entries.set(entry.id, entry as StoredEntry);
    if (tasks.length % 256 === 0) yield;
  }
  const directory: format.Directory = {
    ...{ bytes: stored, basis, basisBytes, bases: { ...bases, size }, tasks },
    // Free ones may be many, and only what changes or checks a file wants them.
    get sections() {
      return Array.from({ length: count }, (_, index) => section(index));
    },
  };
  return { directory, entries };
}

/**
 * Checks the section table. Sections and the directory tile the file: each begins where the part before it ends, at the
 * next multiple of 64.
 * @returns the sections that every reader needs
 */
function* parseSections(
  f: Fields,
  count: number,
  section: (index: number) => format.Section,
  { directoryOffset, directoryLength, basesOffset, basesLength, committed }: format.Superblock,
): Generator<void, { bases: format.Section; blobs: format.Section[] }> {
  const bases: format.Section[] = [];
  const blobs: format.Section[] = [];
  let end = WINDOW_BYTES;
  const follow = (offset: number, length: number, name: string): void => {
    if (offset !== align64(end)) f.fail(`${name} starts at ${offset}, expected ${align64(end)}`);
    end = offset + length;
  };
  let before = true;
  for (let i = 0; i < count; i++) {
    const found = section(i);
    const { kind, required, offset, length } = found;
    if (before && directoryOffset < offset) {
      follow(directoryOffset, directoryLength, "the directory");
      before = false;
    }
    follow(offset, length, `section ${i}`);
    if (required && (kind === 0 || kind > SECTION_FREE))
      f.fail(`it needs a section of kind ${kind}, unknown here; update eigenlora`);
    if (kind === SECTION_BASES) bases.push(found);
    if (kind === SECTION_TASK) blobs.push(found);
    if (i % 256 === 255) yield;
  }
  if (before) follow(directoryOffset, directoryLength, "the directory");
  if (end !== committed) f.fail(`the sections end at ${end}, the file at ${committed}`);
  if (bases.length !== 1) f.fail(`${bases.length} bases sections, expected 1`);
  if (bases[0]!.offset !== basesOffset || bases[0]!.length !== basesLength)
    f.fail("section table and superblock disagree about the bases");
  return { bases: bases[0]!, blobs };
}

/** Hash of a free section: 32 zeros. */
const FREE_HASH: string = `sha256-${"A".repeat(43)}=`;

/** @param hashes where the hashes begin, 0 where there are none */
function parseSection(f: Fields, index: number, hashes: number): format.Section {
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
  const offset = f.u64(at + 8);
  const crc = f.u32(at + 24);
  const hashOf = free ? () => FREE_HASH : toIntegrity;
  const integrity = hashes > 0 ? hashOf(f.bytes.subarray(hash, hash + HASH_BYTES)) : undefined;
  return { kind, coded, length, required: flags > 0, offset, crc, integrity };
}

/** @returns what it says, and how many bytes the bases have, once decoded where they are coded */
export function* parseBasis(
  bytes: Uint8Array,
  { coded, length }: Pick<format.Section, "coded" | "length">,
  file: string,
): Generator<void, { basis: format.BasisDescription; size: number }> {
  const root: Value = yield* decode(bytes, file, "basis description", "basis");
  const { place: tensor, full, end } = placing(16, 0, coded ? Infinity : length, file, "basis description");
  const names = new Set<string>();
  const modules: format.PackModule[] = [];
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

function* parseModule(m: Value, tensor: PlaceTensor): Generator<void, format.PackModule> {
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
type PlaceTensor = (type: Dtype, rows: number, width: number) => format.TensorRef;

function* parseSides(value: Value, dimension: number, tensor: PlaceTensor): Generator<void, format.Side[]> {
  if (value.absent) return [];
  if (value.kind !== "array") return [parseSide(value, dimension, tensor)];
  const sides = yield* value.list(65_536, (side: Value) => parseSide(side, dimension, tensor));
  if (sides.length === 0) value.fail("no basis is in it");
  return sides;
}

function parseSide(value: Value, dimension: number, tensor: PlaceTensor): format.Side {
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
export function* parseEntry(value: Value, earlier: readonly format.TaskEntry[]): Generator<void, Entry> {
  const id = value.get("id").string(255);
  if (CONTROL.test(id)) value.fail(`the task id ${JSON.stringify(id)} has control characters`);
  const metadata: Value = value.get("metadata");
  // Nil is as good as nothing, here as everywhere in a map.
  if (!metadata.absent) yield* checkMetadata(metadata);
  const adapterBytes = value.get("adapterBytes").integer(0, Number.MAX_SAFE_INTEGER);
  return new Entry(id, adapterBytes, yield* parseBrings(value.get("brings"), earlier), metadata);
}

/** An entry that makes its metadata when asked: a list has those of many tasks, and few of them are used. */
class Entry implements format.TaskEntry {
  /** Where its blob lies, of entries in the directory of a pack. */
  section: format.Section | undefined;
  readonly id: string;
  readonly adapterBytes: number;
  readonly brings: readonly string[] | undefined;
  #value: Value | undefined;
  #metadata: format.TaskMetadata | undefined;

  constructor(id: string, adapterBytes: number, brings: readonly string[] | undefined, metadata: Value) {
    this.id = id;
    this.adapterBytes = adapterBytes;
    this.brings = brings;
    this.#value = metadata.absent ? undefined : metadata;
  }

  get metadata(): format.TaskMetadata {
    this.#metadata ??= this.#value ? (this.#value.plain() as format.TaskMetadata) : {};
    this.#value = undefined;
    return this.#metadata;
  }
}

function* parseBrings(
  value: Value,
  earlier: readonly format.TaskEntry[],
): Generator<void, readonly string[] | undefined> {
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

/** True if a string may name a task: 1 to 255 bytes of UTF-8, no control characters. */
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

/**
 * Checks a task blob against the basis it belongs to, its numbers included, in pieces.
 * @param bytes the whole blob; kept by the result
 * @param brings what the directory says that it brings, where it says so
 * @throws FormatError saying which rule of SPEC.md, section 6, does not hold
 */
export function* parseTask(
  bytes: Uint8Array,
  modules: readonly format.PackModule[],
  file: string,
  { id, brings }: Pick<format.TaskEntry, "id" | "brings">,
): Generator<void, format.TaskBlob> {
  const f: Fields = new Fields(bytes, file, `task "${id}"`);
  if (bytes.length < 8 || f.u32(0) !== TASK_BLOB_MAGIC) f.fail("this is not a task blob");
  const headerLength = f.u32(4);
  if (headerLength > bytes.length - 8) f.fail(`a header of ${headerLength} bytes in a blob of ${bytes.length}`);
  const root = (yield* decode(bytes.subarray(8, 8 + headerLength), file, f.part, "header")).items(2);
  const { place: tensor, full } = placing(4, 8 + headerLength, bytes.length, file, f.part);
  let last = -1;
  const terms = yield* root[0]!.list(65_536, (term: Value) => {
    const parsed = parseTerm(term, modules, tensor);
    if (parsed.module <= last) term.fail("terms are not sorted by module");
    last = parsed.module;
    return parsed;
  });
  const names = new Set<string>();
  const parameters: format.TaskParameter[] = [];
  for (const parameter of root[1]!.each(65_536)) {
    const parsed = yield* parseParameter(parameter, tensor);
    const key = `${parsed.role} ${parsed.name}`;
    if (names.has(key)) f.fail(`"${parsed.name}" is there twice`);
    names.add(key);
    parameters.push(parsed);
    yield;
  }
  const adapted = new Set(terms.map(({ module }) => `${modules[module]!.name}.weight`));
  for (const { name, role } of parameters) {
    const twice =
      ((role === "saved" || role === "rows") && adapted.has(name)) || (role !== "saved" && names.has(`saved ${name}`));
    if (twice) f.fail(`it changes "${name}" in two ways`);
  }
  full();
  yield* checkTensors(bytes, 8 + headerLength, taskTensors(terms, parameters, modules), file, f.part);
  const blob = { terms, parameters, bytes };
  if (brings) {
    // Models are prepared for what the directory says. Many tasks may share one list, so it is not gone through where
    // the count differs.
    const found = bringsOf(blob, modules);
    if (found.length !== brings.length)
      f.fail(`it brings ${found.length} parameters and modules, the directory says ${brings.length}`);
    const said = new Set(brings);
    // The lists are equally long, so an unsaid entry means that a said one is missing.
    for (const entry of found)
      if (!said.delete(entry)) f.fail(`it brings "${entry}", which the directory does not say`);
  }
  return blob;
}

/** The tensors of a term in the order of the blob, and what they are called in errors. */
const TENSORS = {
  A: "A",
  B: "B",
  ownA: "own A",
  ownBt: "own B",
  privateA: "private A",
  privateBt: "private B",
  magnitude: "magnitude",
} as const;

/** Lists tensors in the order of the blob, with what they are called in errors. */
export function* taskTensors(
  terms: readonly format.TaskTerm[],
  parameters: readonly format.TaskParameter[],
  modules: readonly format.PackModule[],
): Generator<Checked> {
  for (const term of terms) {
    for (const [key, what] of Object.entries(TENSORS)) {
      const found = term[key as keyof typeof TENSORS];
      const tensor = found && "tensor" in found ? found.tensor : found;
      yield [`${what} of "${modules[term.module]!.name}"`, tensor, true];
    }
  }
  for (const { name, tensor } of parameters) yield [`"${name}"`, tensor];
}

/**
 * @param given coefficients, the number of their basis, the type of residual rows; coefficients alone are over the
 *   first basis
 */
function coefficientsOf(
  [item, which, own]: readonly Value[],
  bases: readonly format.Side[],
  rank: number,
  tensor: PlaceTensor,
): format.Coefficients | undefined {
  const code: Value = item!;
  const index = which?.integer(0, code.absent ? 0 : 65_535) ?? 0;
  if (code.absent) {
    if (!own || own.absent) code.fail("it has neither coefficients nor rows of its own");
    return undefined;
  }
  const bits = code.integer(0, 8 * DTYPES.length - 1);
  const kind = bits & 3;
  const basis = bases[index];
  if (!basis || kind !== (basis.kind === "column" ? 1 : 2))
    code.fail(`coefficients of kind ${kind} for a basis of kind ${basis?.kind ?? "none"}`);
  const mean = (bits & 4) !== 0;
  if (mean && !basis.mean) code.fail("a mean is asked for, but the basis has none");
  if (basis.rank !== undefined && rank !== basis.rank)
    code.fail(`rank ${rank}, but the basis is ${basis.kind} of rank ${basis.rank}`);
  return { basis: index, mean, tensor: tensor(DTYPES[bits >> 3]!, basis.kind === "column" ? rank : 1, basis.K) };
}

function parseTerm(term: Value, modules: readonly format.PackModule[], tensor: PlaceTensor): format.TaskTerm {
  const [moduleItem, rankItem, itemA, itemB, privateRankItem, privateTypeItem, magnitudeItem] = term.items(7);
  const index = moduleItem!.integer(0, modules.length - 1);
  const { name, in: inputs, out, A: basesA, B: basesB } = modules[index]!;
  const rank = rankItem!.integer(0, 65_535);
  const [sideA, sideB] = [itemA!, itemB!].map((item) =>
    item.absent ? undefined : item.kind === "array" ? item.items(3) : [item],
  );
  if (!sideA !== !sideB) term.fail(`"${name}" has a factor on one side only`);
  if (!sideA !== (rank === 0)) term.fail(`"${name}" has rank ${rank} and ${sideA ? "two factors" : "no factor"}`);
  const A = sideA && coefficientsOf(sideA, basesA, rank, tensor);
  const B = sideB && coefficientsOf(sideB, basesB, rank, tensor);
  const ownA = sideA?.[2]?.maybe((type) => tensor(type.choice(DTYPES), rank, inputs));
  const ownBt = sideB?.[2]?.maybe((type) => tensor(type.choice(DTYPES), rank, out));
  const q = privateRankItem!.integer(0, 65_535);
  const most = mostRank(inputs, out);
  if (rank + q > most) term.fail(`"${name}" has rank ${rank + q}, at most ${most} is allowed`);
  const type = privateTypeItem!.choice(q > 0 ? DTYPES : DTYPES.slice(0, 1));
  if (rank + q === 0 && magnitudeItem!.absent) term.fail(`nothing is done to "${name}"`);
  const privateA = q > 0 ? tensor(type, q, inputs) : undefined;
  const privateBt = q > 0 ? tensor(type, q, out) : undefined;
  const magnitude = magnitudeItem!.maybe((code) => tensor(code.choice(DTYPES), 1, out));
  return { module: index, rank, A, B, ownA, ownBt, privateRank: q, privateA, privateBt, magnitude };
}

function* parseParameter(parameter: Value, tensor: PlaceTensor): Generator<void, format.TaskParameter> {
  const [nameItem, roleItem, typeItem, shapeItem, indicesItem] = parameter.array(5);
  if (shapeItem === undefined) parameter.fail("it has fewer than 4 items");
  const name = nameItem!.string(1024);
  const role = roleItem!.choice(ROLES);
  if ((role === "rows") !== (indicesItem !== undefined))
    parameter.fail(`"${name}": numbers of rows belong to role 3, this is ${role}`);
  const shape = shapeItem.array(8).map((d) => d.integer(1, 2 ** 31 - 1));
  const dimensions = role === "saved" ? shape.length : role === "rows" ? 2 : 1;
  if (shape.length === 0 || shape.length !== dimensions)
    parameter.fail(`"${name}" (${role}) has the shape [${shape}], expected ${dimensions || "1 to 8"} dimensions`);
  const rows = shape.length === 1 ? 1 : shape[0]!;
  const width = shape.slice(shape.length === 1 ? 0 : 1).reduce((a, b) => a * b, 1);
  if (!Number.isSafeInteger(rows * width)) parameter.fail(`"${name}" is too large: [${shape}]`);
  let last = -1;
  const ascending = (item: Value): number => (last = item.integer(last + 1, 2 ** 31 - 1));
  const indices = indicesItem && (yield* indicesItem.list(rows, ascending));
  if (indices && indices.length !== rows)
    parameter.fail(`"${name}": ${indices.length} rows are named, expected ${rows}`);
  return { name, role, shape, indices, tensor: tensor(typeItem!.choice(DTYPES), rows, width) };
}

/** A tensor, what it is called in errors, and whether its values are multiplied by others. */
type Checked = readonly [name: string, tensor: format.TensorRef | undefined, multiplied?: boolean];

/** The tensors of the bases section in its order, with what they are called in errors. */
export function* basesTensors(modules: readonly format.PackModule[]): Generator<Checked> {
  for (const { name, A, B, fingerprint } of modules) {
    for (const [side, bases] of Object.entries({ A, B }))
      for (const [i, { tensor }] of bases.entries()) yield [`basis ${side}${i || ""} of "${name}"`, tensor, true];
    if (fingerprint === undefined) continue;
    const size = { rows: 1, width: FINGERPRINT_SIZE, byteLength: 4 * FINGERPRINT_SIZE };
    yield [`the fingerprint of "${name}"`, { dtype: "f32", byteOffset: fingerprint, ...size }];
  }
}

/** Bound of values that are multiplied by others, so that no ΔW leaves binary32, whatever its K and rank. */
export const MOST = 65_536;

/**
 * Refuses what no tensor may hold (SPEC.md, section 5): NaN and infinity, which would spread to the whole weight and no
 * sum would show where from, and what would become so when multiplied; the integer −2^(b−1); and bits and bytes that
 * mean nothing and are not zero. Works in pieces.
 * @param start where the first tensor may begin
 * @param tensors one behind the other, with what they are called
 * @throws FormatError naming the tensor
 */
export function* checkTensors(
  section: Uint8Array,
  start: number,
  tensors: Iterable<Checked>,
  file: string,
  part: string,
): Generator<void> {
  const f: Fields = new Fields(section, file, part);
  let end = start;
  for (const [name, tensor, multiplied] of tensors) {
    if (!tensor) continue;
    f.zero(end, tensor.byteOffset);
    end = tensor.byteOffset + tensor.byteLength;
    yield* checkTensor(f, tensor, name, multiplied ? MOST : Infinity);
    yield;
  }
}

/** Numbers between two looks at the clock: at most a millisecond. A multiple of 8, whose integers end with a byte. */
const PIECE = 1 << 17;

function* checkTensor(
  f: Fields,
  { dtype, rows, width, byteOffset, byteLength }: format.TensorRef,
  name: string,
  most: number,
): Generator<void> {
  const bad = (row: number, what: string): never => {
    const large = most === MOST ? `, or ${MOST} and more` : "";
    throw new FormatError(`${name}: ${what} of row ${row} is NaN or infinite${large}`, f);
  };
  const stride = rowBytes(dtype, width);
  const values = byteOffset + scaleBytes(dtype, rows);
  f.zero(values + rows * stride, byteOffset + byteLength);
  if (!isQuantized(dtype)) {
    const step = dtype === "f32" ? 4 : 2;
    // The exponents of infinity, and of 2^16, which halves do not reach.
    const [exponent, least] = dtype === "f16" ? [0x7c00, 0x7c00] : [0x7f80, most === MOST ? 0x4780 : 0x7f80];
    for (let i = 0, at = byteOffset + step - 2; i < rows * width; i++, at += step) {
      if ((f.view.getUint16(at, true) & exponent) >= least) bad(Math.floor(i / width), `value ${i % width}`);
      if (i % PIECE === PIECE - 1) yield;
    }
    return;
  }
  f.zero(byteOffset + 2 * rows, values);
  const least = -(2 ** (BITS[dtype] - 1));
  const spare = 8 * stride - width * BITS[dtype];
  let done = 0;
  for (let row = 0, at = values; row < rows; row++, at += stride) {
    if (!(Math.abs(f16ToF32(f.view.getUint16(byteOffset + 2 * row, true)) * (least + 1)) < most)) bad(row, "the scale");
    for (let from = 0; from < width; from += PIECE) {
      const count = Math.min(PIECE, width - from);
      const found = leastAt(f.bytes, dtype, at + (from / 8) * BITS[dtype], count);
      if (found !== count) f.fail(`${name}: integer ${from + found} of row ${row} is ${least}, which is not allowed`);
      if ((done += count) < PIECE) continue;
      done = 0;
      yield;
    }
    if (f.bytes[at + stride - 1]! >> (8 - spare) !== 0)
      f.fail(`${name}: bits behind the last integer of row ${row} are not zero`);
    // A row may have no integer.
    done++;
  }
}
