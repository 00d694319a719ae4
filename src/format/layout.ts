/**
 * Where the parts of a pack go: a fresh file as a stream of chunks, and an append as a list of writes. Pure; the file
 * system is the caller's (SPEC.md, section 8).
 */
import { crc32c } from "./crc32c.ts";
import {
  directoryBytes,
  encodeDirectory,
  encodeSuperblock,
  encodeTaskList,
  encodeWindow,
  superblockOffset,
} from "./encode.ts";
import { align64 } from "./fields.ts";
import {
  type Directory,
  SECTION_BASES,
  SECTION_FREE,
  SECTION_TASK,
  type Section,
  type Superblock,
  type TaskEntry,
  WINDOW_BYTES,
} from "./format.ts";

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
  /** Of the blob, in bytes. */
  readonly length: number;
  /** CRC-32C of the blob. */
  readonly crc: number;
  read(): Promise<Uint8Array>;
}

/** A fresh pack as consecutive chunks: window, directory, bases, blobs. */
export function layoutFresh({ tasks, ...basis }: FreshPack): Uint8Array[] {
  const places = tasks.map(({ entry, blob }) => ({ entry, length: blob.length, crc: crc32c(blob) }));
  return padded([...freshHead(basis, places).head, ...tasks.map((t) => t.blob)], 0);
}

/** The same, with one blob in memory at a time. `bytes` is the size of the whole. */
export function streamFresh(
  basis: FreshBasis,
  tasks: readonly TaskPlace[],
): { bytes: number; chunks: AsyncGenerator<Uint8Array, void> } {
  const { head, bytes } = freshHead(basis, tasks);
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

function freshHead(
  { description, bases, basisId }: FreshBasis,
  tasks: readonly Pick<TaskPlace, "entry" | "length" | "crc">[],
): { head: Uint8Array[]; bytes: number } {
  const list = encodeTaskList(tasks.map((t) => t.entry));
  const directoryLength = directoryBytes(1 + tasks.length, description, list);
  const basesOffset = align64(WINDOW_BYTES + directoryLength);
  let end = basesOffset + bases.length;
  const sections: Section[] = [
    { kind: SECTION_BASES, required: true, offset: basesOffset, length: bases.length, crc: crc32c(bases) },
  ];
  for (const { length, crc } of tasks) {
    sections.push({ kind: SECTION_TASK, required: true, offset: align64(end), length, crc });
    end = align64(end) + length;
  }
  const directory = encodeDirectory(sections, description, list);
  const superblock: Superblock = {
    generation: 1,
    committed: end,
    directoryOffset: WINDOW_BYTES,
    directoryLength,
    basesOffset,
    basesLength: bases.length,
    directoryCrc: crc32c(directory),
  };
  return { head: [encodeWindow(basisId, superblock), directory, bases], bytes: end };
}

/** What an append writes: `body` at `offset`, flush, then `superblock` at `superblockOffset`, flush. */
export interface Append {
  readonly offset: number;
  readonly body: Uint8Array[];
  readonly superblock: Uint8Array;
  readonly superblockOffset: number;
}

/** Plans an append. The ids of `tasks` must be new and unique. */
export function layoutAppend(directory: Directory, current: Superblock, tasks: readonly TaskToWrite[]): Append {
  const entries = [...directory.tasks] as TaskEntry[];
  const added: Section[] = [];
  let end = current.committed;
  for (const { entry, blob } of tasks) {
    entries.push(entry);
    added.push(taskSection(align64(end), blob));
    end = align64(end) + blob.length;
  }
  const superseded: Section = {
    kind: SECTION_FREE,
    required: false,
    offset: current.directoryOffset,
    length: current.directoryLength,
    crc: 0,
  };
  const sections = [...directory.sections, superseded, ...added].sort((a, b) => a.offset - b.offset);
  const bytes = encodeDirectory(sections, directory.basisBytes, encodeTaskList(entries));
  const superblock: Superblock = {
    ...current,
    generation: current.generation + 1,
    committed: align64(end) + bytes.length,
    directoryOffset: align64(end),
    directoryLength: bytes.length,
    directoryCrc: crc32c(bytes),
  };
  return {
    offset: current.committed,
    body: padded([...tasks.map((t) => t.blob), bytes], current.committed),
    superblock: encodeSuperblock(superblock),
    superblockOffset: superblockOffset(superblock.generation),
  };
}

function taskSection(offset: number, blob: Uint8Array): Section {
  return { kind: SECTION_TASK, required: true, offset, length: blob.length, crc: crc32c(blob) };
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
