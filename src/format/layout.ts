/**
 * Where the parts of a pack go: a fresh file as a stream of chunks, and an append as a list of writes. Pure; the file
 * system is the caller's (SPEC.md, section 9).
 */
import { isCoded, MOST_CODED_DIRECTORY } from "./coded.ts";
import {
  directoryBytes,
  encodeDirectory,
  encodeHead,
  encodeSuperblock,
  encodeTaskList,
  encodeWindow,
  superblockOffset,
} from "./encode.ts";
import { encodeSection } from "./encode-coded.ts";
import { align64, crc32c } from "./fields.ts";
import {
  type Directory,
  HASH_BYTES,
  SECTION_BASES,
  SECTION_FREE,
  SECTION_TASK,
  type Section,
  type Signature,
  type Superblock,
  type TaskEntry,
  WINDOW_BYTES,
  type Window,
} from "./format.ts";
import { integrityOf, sha256, toIntegrity } from "./hash.ts";

/** A task to be written. */
export interface TaskToWrite {
  readonly entry: TaskEntry;
  readonly blob: Uint8Array;
}

/** What a fresh pack has before its tasks. */
export interface FreshBasis {
  /** Basis description, MessagePack. */
  readonly description: Uint8Array;
  readonly bases: Uint8Array;
  /** The bases as they are to be stored, where they are coded. */
  readonly coded?: Uint8Array | undefined;
  /** Hexadecimal, of 32 bytes. */
  readonly basisId: string;
}

/** The parts of a fresh pack. */
export interface FreshPack extends FreshBasis {
  readonly tasks: readonly TaskToWrite[];
}

/** A task whose blob lies elsewhere until its turn comes. */
export interface TaskPlace {
  readonly entry: TaskEntry;
  /** Bytes of the blob. */
  readonly length: number;
  /** CRC-32C of the blob. */
  readonly crc: number;
  /** SHA-256 of the blob, "sha256-…". */
  readonly integrity: string;
  /** Whether the blob is coded. */
  readonly coded: boolean;
  read(): Promise<Uint8Array>;
}

/** Vouches for a hash: the root of a pack, or that of a task file (SPEC.md, section 8). */
export type Sign = (kind: "pack" | "task", hash: Uint8Array) => Promise<Signature>;

/** A fresh pack as consecutive chunks: window, directory, bases, blobs. */
export async function layoutFresh({ tasks, ...basis }: FreshPack, sign?: Sign): Promise<Uint8Array[]> {
  const { head } = await freshHead(basis, await Promise.all(tasks.map(placeOf)), sign);
  return padded([...head, ...tasks.map((t) => t.blob)], 0);
}

/** The same, with one blob in memory at a time. `bytes` is the size of the whole. */
export async function streamFresh(
  basis: FreshBasis,
  tasks: readonly TaskPlace[],
  sign?: Sign,
): Promise<{ bytes: number; chunks: AsyncGenerator<Uint8Array, void> }> {
  const { head, bytes } = await freshHead(basis, tasks, sign);
  async function* chunks(): AsyncGenerator<Uint8Array, void> {
    const first = padded(head, 0);
    yield* first;
    let end = first.reduce((sum, chunk) => sum + chunk.length, 0);
    for (const { read, length } of tasks) {
      yield* padded([await read()], end);
      end = align64(end) + length;
    }
  }
  return { bytes, chunks: chunks() };
}

/** A task whose blob is in memory. */
export async function placeOf({ entry, blob }: TaskToWrite): Promise<TaskPlace> {
  const read = async (): Promise<Uint8Array> => blob;
  return {
    entry,
    length: blob.length,
    crc: crc32c(blob),
    integrity: await integrityOf(blob),
    coded: isCoded(blob),
    read,
  };
}

async function freshHead(
  { description, bases: plain, coded, basisId }: FreshBasis,
  tasks: readonly Omit<TaskPlace, "read">[],
  sign: Sign | undefined,
): Promise<{ head: Uint8Array[]; bytes: number }> {
  const bases = coded ?? plain;
  const list = encodeTaskList(tasks.map((t) => t.entry));
  let end = 0;
  const section = (
    kind: number,
    { length, crc, integrity, coded }: Pick<Section, "length" | "crc" | "integrity" | "coded">,
  ): Section => {
    const offset = align64(end);
    end = offset + length;
    return { kind, coded, required: true, offset, length, crc, integrity };
  };
  const all = {
    length: bases.length,
    crc: crc32c(bases),
    integrity: await integrityOf(bases),
    coded: coded !== undefined,
  };
  const behind = [section(SECTION_BASES, all), ...tasks.map((task) => section(SECTION_TASK, task))];
  const short = codedDirectory(behind, description, list);
  const directoryLength = short?.length ?? directoryBytes(behind.length, true, description, list);
  const basesOffset = align64(WINDOW_BYTES + directoryLength);
  const sections = behind.map((section) => ({ ...section, offset: basesOffset + section.offset }));
  const directory = short ?? encodeDirectory(sections, description, list);
  const window = encodeHead(basisId);
  const superblock: Superblock = {
    generation: 1,
    committed: basesOffset + end,
    directoryOffset: WINDOW_BYTES,
    directoryLength,
    basesOffset,
    basesLength: bases.length,
    directoryCrc: crc32c(directory),
    signature: await sign?.("pack", await sha256(window, directory)),
  };
  return { head: [encodeWindow(window, superblock), directory, bases], bytes: basesOffset + end };
}

/** The directory of a pack with coded sections, where it takes fewer bytes coded. It says no places: they follow from the lengths. */
function codedDirectory(
  sections: readonly Section[],
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

/** What an append writes: `body` at `offset`, flush, then `superblock` at `superblockOffset`, flush. */
export interface Append {
  readonly offset: number;
  readonly body: Uint8Array[];
  readonly superblock: Uint8Array;
  readonly superblockOffset: number;
}

/** What is known of a pack that is open. */
interface Current {
  readonly window: Window;
  readonly directory: Directory;
}

/** Plans an append. The ids of `tasks` must be new and unique. A pack that has no hashes stays without. */
export async function layoutAppend(
  { window, directory }: Current,
  tasks: readonly TaskToWrite[],
  sign?: Sign,
): Promise<Append> {
  const current = window.superblock;
  const entries = [...directory.tasks] as TaskEntry[];
  const added: Section[] = [];
  const hashed = directory.bases.integrity !== undefined;
  let end = current.committed;
  for (const task of tasks) {
    const { entry, length, crc, integrity, coded } = await placeOf(task);
    const offset = align64(end);
    entries.push(entry);
    added.push({
      kind: SECTION_TASK,
      coded,
      required: true,
      offset,
      length,
      crc,
      integrity: hashed ? integrity : undefined,
    });
    end = offset + length;
  }
  const superseded: Section = {
    kind: SECTION_FREE,
    coded: false,
    required: false,
    offset: current.directoryOffset,
    length: current.directoryLength,
    crc: 0,
    integrity: hashed ? toIntegrity(new Uint8Array(HASH_BYTES)) : undefined,
  };
  const sections = [...directory.sections, superseded, ...added].sort(
    (a, b) => a.offset - b.offset || a.length - b.length,
  );
  const parts = [sections, directory.basisBytes, encodeTaskList(entries)] as const;
  const bytes = codedDirectory(...parts) ?? encodeDirectory(...parts);
  const superblock: Superblock = {
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

/** The parts with zeros in front of each, so that all start at multiples of 64 when the first byte lands at `offset`. */
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
