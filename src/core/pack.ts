/**
 * An open pack: which tasks and modules it has, and their bytes when they are wanted. It is opened by two reads, the
 * window and then directory and bases, each checked before the next is planned (SPEC.md, sections 2 to 4). Plans reads,
 * checks what arrives and keeps task blobs. Computes nothing.
 */
/// <reference lib="esnext.disposable" preserve="true" />
import {
  checkChoice,
  checkOptions,
  described,
  type EigenLoraError,
  type FormatError,
  nearest,
  TaskError,
  type TrustError,
} from "../errors.ts";
import { Observable } from "../events.ts";
import { basesTensors, checkTensors, parseDirectory, parseTask, parseWindow } from "../format/directory.ts";
import { align64, Fields } from "../format/fields.ts";
import {
  type Directory,
  type PackModule,
  type Section,
  type TaskBlob,
  type TaskEntry,
  type TaskMetadata,
  WINDOW_BYTES,
  type Window,
} from "../format/format.ts";
import { openSource, watchedOf } from "../open-source.ts";
import { paced, pacer, throwIfAborted } from "../pace.ts";
import type { OnProgress } from "../progress.ts";
import {
  type AbortOptions,
  type ByteSource,
  FETCH_OPTIONS,
  type FetchOptions,
  type ReadOptions,
  type Reads,
  SharedWork,
  type SourceInput,
} from "../source.ts";
import type { AddTaskOptions, Trust, TrustOptions } from "./trust.ts";

/** Events of an open pack. */
export interface PackEvents {
  /** A task has been read and checked. */
  readonly taskread: { readonly task: string; readonly bytes: number };
}

/** Options of `Pack.bases`. */
export interface BasesOptions extends AbortOptions {
  /** Told how far they are read, where they are not in memory. */
  readonly onProgress?: OnProgress | undefined;
}

/** The bases section of a pack, for as long as it is needed. */
export interface Bases {
  /** Laid out as in SPEC.md, section 4.4. Do not write to it. */
  readonly bytes: Uint8Array;
  close(): void;
  /** Closes it at the end of a block, with `using`. */
  [Symbol.dispose](): void;
}

/** A task of the pack. */
export interface TaskInfo {
  readonly id: string;
  /** Size of its blob in the file. */
  readonly bytes: number;
  /** Size of the adapter it was made of, 0 when unknown. */
  readonly adapterBytes: number;
  readonly metadata: TaskMetadata;
  /**
   * Overrides of the task apart from its terms, as "role name" (SPEC.md, section 4.3), for instance "saved
   * classifier.weight". Undefined in packs that do not say.
   */
  readonly brings: readonly string[] | undefined;
  /**
   * The hash of the task, "sha256-…": what `revoked` takes. The same in a pack and in a task file. Undefined in packs
   * without hashes, and for tasks that were added where the platform has no SHA-256.
   */
  readonly integrity: string | undefined;
  /** True if a switch to it needs no request, at the time of asking. */
  readonly resident: boolean;
}

/** Entry of a task: `section` is where its blob lies in the file, or the length and hash of one that was added. */
type Entry = TaskEntry & { readonly section: Pick<Section, "length" | "integrity"> & Partial<Section> };

/** The blob of a task that was asked for, or that was added. */
interface TaskSlot {
  readonly entry: Entry;
  /** The blob as its file has it, of tasks added at run time, which are always resident. */
  readonly stored?: Uint8Array;
  blob?: TaskBlob | undefined;
  /** True if it was prefetched, where no limit was asked for. */
  stays?: boolean;
  loading?: SharedWork<TaskBlob> | undefined;
}

/**
 * The facts about tasks, put together when they are asked for, each time anew: a pack may have many, and few are looked
 * at.
 */
class Tasks implements ReadonlyMap<string, TaskInfo> {
  readonly #entries: ReadonlyMap<string, Entry>;
  readonly #slots: ReadonlyMap<Entry, TaskSlot>;

  constructor(entries: ReadonlyMap<string, Entry>, slots: ReadonlyMap<Entry, TaskSlot>) {
    this.#entries = entries;
    this.#slots = slots;
  }

  get size(): number {
    return this.#entries.size;
  }

  has(id: string): boolean {
    return this.#entries.has(id);
  }

  get(id: string): TaskInfo | undefined {
    const entry = this.#entries.get(id);
    return entry && infoOf(entry, this.#slots);
  }

  keys(): MapIterator<string> {
    return this.#entries.keys();
  }

  *values(): Generator<TaskInfo, undefined> {
    for (const [, info] of this) yield info;
  }

  entries(): Generator<[string, TaskInfo], undefined> {
    return this[Symbol.iterator]();
  }

  *[Symbol.iterator](): Generator<[string, TaskInfo], undefined> {
    for (const [id, entry] of this.#entries) yield [id, infoOf(entry, this.#slots)];
  }

  forEach(...call: Parameters<ReadonlyMap<string, TaskInfo>["forEach"]>): void {
    new Map(this).forEach(...call);
  }
}

function infoOf(entry: Entry, slots: ReadonlyMap<Entry, TaskSlot>): TaskInfo {
  const { id, adapterBytes, brings, section } = entry;
  return {
    id,
    bytes: section.length,
    adapterBytes,
    brings,
    integrity: section.integrity,
    // The object has them itself, so that copies do.
    get metadata() {
      return entry.metadata;
    },
    get resident() {
      return slots.get(entry)?.blob !== undefined;
    },
  };
}

/** Bytes of tasks that are kept where no limit was asked for, or so many tasks. */
const MOST_RESIDENT = 8e6;
const RESIDENT_TASKS = 4;
/** Times that a task may expand where nothing else was asked for. Rank 64 over one int3 component comes to 683. */
const MAX_EXPANSION = 1024;

interface SharedBases {
  users: number;
  bytes?: Uint8Array;
  checked?: SharedWork<Uint8Array>;
}

/** Adds the likely cause to an error that makes a pack useless. */
async function withDiagnosis(error: unknown, source: ByteSource): Promise<unknown> {
  if (!["format", "trust"].includes((error as Partial<EigenLoraError>).tag!)) return error;
  // The explanation cannot be loaded without a network; the error then stays unchanged.
  const kind = await import("../format/kind.ts").catch(() => undefined);
  return kind ? kind.refusal(error as FormatError | TrustError, source) : error;
}

/** @throws FormatError when the bytes are damaged, TrustError when they are not those that were asked for */
async function checkSection(
  bytes: Uint8Array,
  section: Section,
  part: string,
  file: string,
  trust: Trust | undefined,
  signal: AbortSignal | undefined,
): Promise<void> {
  await paced(new Fields(bytes, file, part).crc(section.crc), pacer(signal));
  await trust?.checkSection(section, bytes, part);
}

/** A file whose head has been read and checked. */
interface OpenedFile {
  readonly source: ByteSource;
  readonly reads: Reads;
  readonly window: Window;
  readonly directory: Directory;
  /** Entries of its tasks by id; the pack takes them over. */
  readonly entries: Map<string, Entry>;
  readonly maxResidentBytes: number | undefined;
  readonly maxExpansion: number | undefined;
  readonly trust: Trust | undefined;
  /** The bases section, where it was read with the directory. */
  readonly bases: Uint8Array | undefined;
}

/** An open pack. Made by `openPack`. */
export class Pack extends Observable<PackEvents> {
  /** Path or URL. */
  readonly name: string;
  /** "1.0" */
  readonly version: string;
  /** Hexadecimal SHA-256 that ties task files to this basis. */
  readonly basisId: string;
  /** Adapted modules, in the order of the bases. */
  readonly modules: readonly PackModule[];
  /** Everything the file says about itself. */
  readonly directory: Directory;
  /** The window as read. */
  readonly window: Window;
  /** Requests made and bytes read so far, and whether the server made it read the file whole. */
  readonly reads: Reads;

  readonly #file: OpenedFile;
  #entries: Map<string, Entry>;
  readonly #slots = new Map<Entry, TaskSlot>();
  /** Most bytes of the blobs in `#recent` where no limit was asked for: tasks of this size call for it. */
  #most = MOST_RESIDENT;
  /** Slots whose blobs could be read again, least recently used first. */
  readonly #recent = new Set<TaskSlot>();
  /** Last result of `tasks`; undefined once a task was added or removed. */
  #tasks: ReadonlyMap<string, TaskInfo> | undefined;
  /** The bases section while it is in use, and until its first use. */
  #bases: SharedBases | undefined;

  /** @internal Use `openPack`. */
  constructor(file: OpenedFile) {
    super();
    const { source, reads, window, directory, entries, bases } = file;
    this.#file = file;
    this.name = source.name;
    this.reads = reads;
    this.window = window;
    this.version = window.version;
    this.basisId = window.basisId;
    this.directory = directory;
    this.#entries = entries;
    this.modules = directory.basis.modules;
    if (bases) this.#bases = { users: 0, bytes: bases };
  }

  /** The tasks by id, in the order of the file. A snapshot: tasks added or removed later do not change it. */
  get tasks(): ReadonlyMap<string, TaskInfo> {
    return (this.#tasks ??= new Tasks(this.#entries, this.#slots));
  }

  /** The entries, to be changed: a snapshot that was taken keeps those from before. */
  #changing(): Map<string, Entry> {
    if (this.#tasks) this.#entries = new Map(this.#entries);
    this.#tasks = undefined;
    return this.#entries;
  }

  /**
   * The slot of a task, made when it is first asked for: a pack may have many tasks, and most of them are never used.
   */
  #slot(id: string): TaskSlot | undefined {
    const entry = this.#entries.get(id);
    if (entry && !this.#slots.has(entry)) this.#slots.set(entry, { entry });
    return entry && this.#slots.get(entry);
  }

  /** Counts bytes held by this object: task blobs, and the bases while they are in use, and until their first use. */
  get residentBytes(): { coefficients: number; basis: number } {
    let coefficients = 0;
    for (const { blob } of this.#slots.values()) coefficients += blob?.bytes.length ?? 0;
    return { coefficients, basis: this.#bases?.bytes?.length ?? 0 };
  }

  /**
   * Reads task blobs ahead, so that switching to them needs no request. They stay in memory where `maxResidentBytes`
   * was not given.
   * @param ids of tasks, or the id of one
   * @throws TaskError for an id that is not there
   */
  async prefetch(ids: Iterable<string>, options: ReadOptions = {}): Promise<void> {
    const all = [...(typeof ids === "string" ? [ids] : ids)];
    for (const id of this.#file.maxResidentBytes === undefined ? all : []) {
      const slot = this.#slot(id);
      if (!slot) continue;
      slot.stays = true;
      this.#recent.delete(slot);
    }
    await Promise.all(all.map((id) => this.load(id, options)));
  }

  /**
   * The blob of a task, from memory or in one request.
   * @throws TaskError naming the nearest ids when there is no such task
   */
  async load(id: string, options: ReadOptions = {}): Promise<TaskBlob> {
    const slot = this.#slot(id);
    if (!slot) throw this.#unknown(id);
    throwIfAborted(options.signal);
    if (slot.blob) {
      if (this.#recent.delete(slot)) this.#recent.add(slot);
      return slot.blob;
    }
    // Callers share one request. A caller's signal ends its own wait only, while others still want the bytes.
    slot.loading = SharedWork.join(slot.loading, (signal) => this.#fetch(slot, signal), options.signal);
    return slot.loading.wait(options.signal);
  }

  async #fetch(slot: TaskSlot, signal: AbortSignal | undefined): Promise<TaskBlob> {
    const { id, section } = slot.entry;
    const part = `task "${id}"`;
    const blob = await this.#checked(section as Section, part, { signal }, undefined, async (bytes, coded) => {
      if (coded) await this.#file.trust?.checkDecoded(bytes, part);
      const blob = await paced(parseTask(bytes, this.modules, this.name, slot.entry), pacer(signal));
      return this.#bounded(blob, section.length);
    });
    // The task may have been removed meanwhile, or read by a later request.
    if (this.#slot(id) !== slot || slot.blob) return slot.blob ?? blob;
    slot.blob = blob;
    slot.loading = undefined;
    this.tell("taskread", { task: id, bytes: section.length });
    if (slot.stays) return blob;
    this.#recent.add(slot);
    this.#most = Math.max(this.#most, RESIDENT_TASKS * blob.bytes.length);
    let held = 0;
    for (const { blob } of this.#recent) held += blob!.bytes.length;
    for (const other of this.#recent) {
      if (held <= (this.#file.maxResidentBytes ?? this.#most) || other === slot) break;
      held -= other.blob!.bytes.length;
      other.blob = undefined;
      this.#recent.delete(other);
    }
    return blob;
  }

  /** @param bytes of the blob in its file */
  #bounded(blob: TaskBlob, bytes: number): TaskBlob {
    const times = this.#file.maxExpansion ?? MAX_EXPANSION;
    return { ...blob, limit: { stored: this.directory.bases.length + bytes, times } };
  }

  /**
   * The blob of a task as its file has it, coded or not: a copy of the task is made of these bytes and keeps its hash.
   * @throws TaskError, SourceError, FormatError, TrustError as `load`
   */
  async stored(id: string, options: ReadOptions = {}): Promise<Uint8Array> {
    const slot = this.#slot(id);
    // A copy passes the same checks as a task that is used.
    await this.load(id, options);
    return slot!.stored ?? this.#read(slot!.entry.section as Section, `task "${id}"`, options);
  }

  /**
   * Reads and checks the bases section: all components and means. All callers share one copy, which is forgotten when
   * the last of them closes; the next call reads it again.
   * @throws SourceError, FormatError when it cannot be read or is damaged
   */
  async bases(options: BasesOptions = {}): Promise<Bases> {
    const shared = (this.#bases ??= { users: 0 });
    shared.users++;
    let open = true;
    const close = (): void => {
      if (open && --shared.users === 0 && this.#bases === shared) this.#bases = undefined;
      open = false;
    };
    try {
      const work = (signal: AbortSignal | undefined) => this.#checkedBases(shared, { ...options, signal });
      shared.checked = SharedWork.join(shared.checked, work, options.signal);
      return { bytes: await shared.checked.wait(options.signal), close, [Symbol.dispose]: close };
    } catch (error) {
      close();
      throw error;
    }
  }

  async #checkedBases(shared: SharedBases, options: BasesOptions): Promise<Uint8Array> {
    return this.#checked(this.directory.bases, "bases", options, shared.bytes, async (bytes) => {
      await paced(checkTensors(bytes, 0, basesTensors(this.modules), this.name, "bases"), pacer(options.signal));
      return (shared.bytes = bytes);
    });
  }

  /** Reads a section as the file has it, and checks it. */
  async #read(section: Section, part: string, { signal, onProgress }: BasesOptions): Promise<Uint8Array> {
    const watched = await watchedOf(this.#file.source, "pack", onProgress, () => section.length);
    const bytes = await (watched ?? this.#file.source).read(section.offset, section.length, { signal });
    watched?.done();
    await checkSection(bytes, section, part, this.name, this.#file.trust, signal);
    return bytes;
  }

  /**
   * Reads, decodes and parses a section.
   * @param bytes of a section that was checked already. Default: it is read
   */
  async #checked<T>(
    section: Section,
    part: string,
    options: BasesOptions,
    bytes: Uint8Array | undefined,
    parse: (bytes: Uint8Array, coded: boolean) => Promise<T>,
  ): Promise<T> {
    try {
      const read = bytes ?? (await this.#read(section, part, options));
      if (!section.coded) return await parse(read, false);
      const { decodeSection } = await import("../format/coded.ts");
      const before = this.directory.basisBytes;
      const how = { file: this.name, part, before, expected: section.size, signal: options.signal };
      return await parse(await decodeSection(read, how), true);
    } catch (error) {
      throw await withDiagnosis(error, this.#file.source);
    }
  }

  /**
   * The root of the pack, "sha256-…", which names everything in it: what `openPack` takes as `integrity`. The same
   * whether the pack is signed or not; another after each change.
   * @throws TypeError where the platform has no WebCrypto
   */
  async integrity(): Promise<string> {
    return (await import("./trust.ts")).rootOf(this.window.head, this.directory.bytes);
  }

  /**
   * Adds a task that came as a file of its own (SPEC.md, section 7), for this open pack only; nothing is written.
   * @throws FormatError when the file is damaged, TaskError when it belongs to another basis, or the id is taken or
   *   being added, TrustError when it is another than `integrity` says, or revoked, or not signed where the pack was
   *   opened with `keys`
   */
  async addTask(id: string, file: SourceInput, options: AddTaskOptions = {}): Promise<void> {
    const { addTaskFile } = await import("./task-file.ts");
    await addTaskFile(file, id, this, this.#entries, this.#file.trust, options, (entry, integrity, stored, blob) => {
      const { length } = stored;
      const added = { ...entry, section: { length, integrity } };
      this.#changing().set(id, added);
      this.#slots.set(added, { entry: added, stored, blob: this.#bounded(blob, length) });
    });
  }

  /**
   * Forgets a task of this open pack; the file is not changed.
   * @throws TaskError when there is no such task
   */
  removeTask(id: string): void {
    const slot = this.#slot(id);
    if (!slot) throw this.#unknown(id);
    this.#recent.delete(slot);
    this.#slots.delete(slot.entry);
    this.#changing().delete(id);
  }

  #unknown(id: string): Error {
    if (typeof id !== "string") return new TypeError(`task: expected an id, got ${described(id)}`);
    const close = nearest(id, this.#entries.keys());
    const hint = close.length ? `; the nearest are ${close.map(described).join(", ")}` : "";
    return new TaskError(`no task "${id}" in ${this.name}${hint}`, { task: id, nearest: close });
  }

  /** Closes the file. Resident tasks stay usable. */
  async close(): Promise<void> {
    await this.#file.source.close?.();
  }

  /** Closes it at the end of a block, with `await using`. Engines without the symbol never call it. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

/** Larger directories are read by themselves, since copying them out of what was read with them takes too long. */
const MOST_TOGETHER = 2 ** 22;

/** Options of `openPack`. */
export interface OpenOptions extends FetchOptions, TrustOptions {
  readonly signal?: AbortSignal;
  /**
   * Receives the progress of reading, as `progress_callback` of transformers.js does. Not called for sources in memory.
   */
  readonly onProgress?: OnProgress | undefined;
  /**
   * `now` reads the bases together with the directory, so that a first task costs three requests. `later` reads the
   * directory only; the runtime fetches the bases when it starts. Default: `now`.
   */
  readonly bases?: "now" | "later";
  /**
   * Most bytes of task blobs to keep; the least recently used go first. Default: 8 MB, or four times the largest task
   * if that is more; prefetched tasks then stay.
   */
  readonly maxResidentBytes?: number;
  /**
   * Largest size of a task in memory, as factors or as an exported adapter, in multiples of its stored bytes (SPEC.md,
   * section 10). 16 MiB are always allowed. Set it higher for a pack that you trust. Default: 1024.
   */
  readonly maxExpansion?: number | undefined;
}

/**
 * Opens a pack. Reads the window, then directory and bases (one request where they are adjacent, as in a fresh pack).
 * @param input path, URL (read by HTTP ranges), name on the Hugging Face Hub (`hf:org/name/tasks.eigen`), Blob,
 *   ArrayBuffer or any ByteSource
 * @throws SourceError when bytes cannot be had, FormatError when they are not a whole pack of a known version,
 *   TrustError when they are not what `integrity` and `keys` ask for
 * @example
 * const pack = await openPack("tasks.eigen");
 * console.log([...pack.tasks.keys()]);
 */
export async function openPack(input: SourceInput, options: OpenOptions = {}): Promise<Pack> {
  checkOptions("openPack", options, [
    ...(["signal", "onProgress", "bases", "maxResidentBytes", "maxExpansion", "integrity", "keys", "revoked"] as const),
    ...FETCH_OPTIONS,
  ]);
  checkChoice("bases", options.bases ?? "now", ["now", "later"]);
  const inner = await openSource(input, options, "openPack");
  try {
    const counted = { requests: 0, bytes: 0, whole: false };
    let needed: number | undefined;
    // A server without ranges sends the whole file at once.
    const total = (loaded: number) => needed ?? (loaded > WINDOW_BYTES ? inner.byteLength : undefined);
    let watched = await watchedOf(inner, "pack", options.onProgress, total);
    const read: ByteSource["read"] = async (...range) => {
      counted.requests++;
      const bytes = await (watched ?? inner).read(...range);
      counted.bytes += bytes.length;
      return bytes;
    };
    const { signal, integrity, keys, revoked } = options;
    const { name } = inner;
    // An empty hash or list counts as given: it is a mistake that must not pass for trust.
    const asked = [integrity, keys, revoked].some((option) => option !== undefined);
    const trust = asked ? await (await import("./trust.ts")).Trust.create(name, options) : undefined;
    // A file shorter than the window may be of another kind, which its first bytes tell.
    const head = Math.min(WINDOW_BYTES, inner.byteLength ?? WINDOW_BYTES);
    const window = parseWindow(await read(0, head, { signal }), name, inner.byteLength);
    const { directoryOffset, directoryLength, basesOffset, basesLength } = window.superblock;
    const behind = basesOffset === align64(directoryOffset + directoryLength);
    const together = options.bases !== "later" && behind && directoryLength < MOST_TOGETHER;
    const length = together ? basesOffset + basesLength - directoryOffset : directoryLength;
    needed = head + length;
    const bytes = await read(directoryOffset, length, { signal });
    watched?.done();
    watched = undefined;
    const basesAt = together ? basesOffset - directoryOffset : directoryLength;
    // A copy: as a view the directory would keep the bases in memory.
    const directoryBytes = together ? bytes.slice(0, directoryLength) : bytes;
    await trust?.checkRoot(window, directoryBytes);
    const { directory, entries } = await parseDirectory(directoryBytes, window.superblock, name, signal);
    trust?.checkHashes(directory);
    const bases = together ? bytes.subarray(basesAt) : undefined;
    const { reads = counted, byteLength } = inner;
    const source = { name, byteLength, read, clear: async () => inner.clear?.(), close: async () => inner.close?.() };
    if (bases) await checkSection(bases, directory.bases, "bases", name, trust, signal);
    const { maxResidentBytes, maxExpansion } = options;
    return new Pack({ source, reads, window, directory, entries, maxResidentBytes, maxExpansion, trust, bases });
  } catch (error) {
    const refused = await withDiagnosis(error, inner);
    await inner.close?.();
    throw refused;
  }
}
