/**
 * An open pack: which tasks and modules it has, and their bytes when they are wanted. Plans reads, checks what arrives and
 * keeps task blobs. It computes nothing; that is the runtime's part.
 */
/// <reference lib="esnext.disposable" preserve="true" />
import { checkChoice, checkOptions, described, nearest } from "../arguments.ts";
import { type EigenLoraError, TaskError } from "../errors.ts";
import { parseDirectory, parseWindow } from "../format/directory.ts";
import { align64, Fields } from "../format/fields.ts";
import {
  type Directory,
  type PackModule,
  type Section,
  type TaskBlob,
  WINDOW_BYTES,
  type Window,
} from "../format/format.ts";
import { integrityOf } from "../format/hash.ts";
import { basesTensors, checkTensors, parseTask } from "../format/task.ts";
import { openSource } from "../open-source.ts";
import {
  type ByteSource,
  FETCH_OPTIONS,
  type FetchOptions,
  type ReadOptions,
  type Reads,
  SharedWork,
  type SourceInput,
} from "../source.ts";
import { infoOf, type TaskInfo, type TaskSlot } from "./task-info.ts";
import type { TaskTrust, Trust, TrustOptions } from "./trust.ts";

/** Options of `openPack`. */
export interface OpenOptions extends FetchOptions, TrustOptions {
  readonly signal?: AbortSignal;
  /**
   * `now` reads the bases together with the directory, so that a first task costs three requests. `later` reads the
   * directory only; the runtime fetches the bases when it starts. Default: `now`.
   */
  readonly bases?: "now" | "later";
  /** Most bytes of task blobs to keep; those used least recently go first. Default: no limit. */
  readonly maxResidentBytes?: number;
}

/** The bases section of a pack, for as long as it is needed. */
export interface Bases {
  /** As SPEC.md, section 4.4. Do not write to it. */
  readonly bytes: Uint8Array;
  close(): void;
  /** With `using`. */
  [Symbol.dispose](): void;
}

interface SharedBases {
  users: number;
  bytes?: Uint8Array;
  checked?: SharedWork<Uint8Array>;
}

/**
 * Opens a pack. Reads the window, then directory and bases (one request where they are adjacent, as in a fresh pack).
 * @param input path, URL (read by HTTP ranges), Blob, ArrayBuffer or any ByteSource
 * @throws SourceError when bytes cannot be had, FormatError when they are not a whole pack of a known version, TrustError when they
 *   are not what `integrity` and `keys` ask for
 * @example
 * const pack = await openPack("tasks.eigen");
 * console.log([...pack.tasks.keys()]);
 */
export async function openPack(input: SourceInput, options: OpenOptions = {}): Promise<Pack> {
  checkOptions("openPack", options, [
    ...(["signal", "bases", "maxResidentBytes", "integrity", "keys", "revoked"] as const),
    ...FETCH_OPTIONS,
  ]);
  checkChoice("bases", options.bases ?? "now", ["now", "later"]);
  const inner = await openSource(input, options, "openPack");
  let directoryBytes: Uint8Array | undefined;
  try {
    const counted = { requests: 0, bytes: 0, whole: false };
    const read: ByteSource["read"] = async (...range) => {
      counted.requests++;
      const bytes = await inner.read(...range);
      counted.bytes += bytes.length;
      return bytes;
    };
    const { signal, integrity, keys, revoked } = options;
    const { name } = inner;
    // Not by truth: an empty hash or list is a mistake that must not pass for trust.
    const asked = [integrity, keys, revoked].some((option) => option !== undefined);
    const trust = asked ? await (await import("./trust.ts")).Trust.create(name, options) : undefined;
    // A file shorter than the window still has to be told apart from a file of another kind.
    const head = Math.min(WINDOW_BYTES, inner.byteLength ?? WINDOW_BYTES);
    const window = parseWindow(await read(0, head, { signal }), name, inner.byteLength);
    const { directoryOffset, directoryLength, basesOffset, basesLength } = window.superblock;
    const together = options.bases !== "later" && basesOffset === align64(directoryOffset + directoryLength);
    const length = together ? basesOffset + basesLength - directoryOffset : directoryLength;
    const bytes = await read(directoryOffset, length, { signal });
    const basesAt = together ? basesOffset - directoryOffset : directoryLength;
    new Fields(bytes, name, "padding").zero(directoryLength, basesAt);
    // A copy: as a view the directory would keep the bases in memory.
    directoryBytes = bytes.slice(0, directoryLength);
    await trust?.checkRoot(window, directoryBytes);
    const directory = await parseDirectory(directoryBytes, window.superblock, name, signal);
    trust?.checkHashes(directory);
    const bases = together ? bytes.subarray(basesAt) : undefined;
    const { reads = counted, byteLength } = inner;
    const source = { name, byteLength, read, clear: async () => inner.clear?.(), close: async () => inner.close?.() };
    if (bases) await checkSection(bases, directory.bases, "bases", name, trust);
    const { maxResidentBytes = Infinity } = options;
    return new Pack({ source, reads, window, directory, maxResidentBytes, trust, bases });
  } catch (error) {
    const refused = await explain(error, inner, directoryBytes);
    await inner.close?.();
    throw refused;
  }
}

/** What to throw for an error of a pack. */
async function explain(error: unknown, source: ByteSource, directory: Uint8Array | undefined): Promise<unknown> {
  if (!["format", "trust"].includes((error as Partial<EigenLoraError>).tag!)) return error;
  // Where that part cannot be had, as without a network, what went wrong is said as it is.
  const part = await import("../format/kind.ts").catch(() => undefined);
  return part ? part.refusal(error as Error, source, directory) : error;
}

/** @throws FormatError when the bytes are damaged, TrustError when they are not those that were asked for */
async function checkSection(
  bytes: Uint8Array,
  section: Section,
  part: string,
  file: string,
  trust: Trust | undefined,
): Promise<void> {
  new Fields(bytes, file, part).crc(section.crc);
  await trust?.checkSection(section, bytes, part);
}

/** What an open pack is made of. */
interface Parts {
  readonly source: ByteSource;
  readonly reads: Reads;
  readonly window: Window;
  readonly directory: Directory;
  readonly maxResidentBytes: number;
  readonly trust: Trust | undefined;
  /** Where they were read with the directory. */
  readonly bases: Uint8Array | undefined;
}

/** An open pack. Made by `openPack`. */
export class Pack {
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

  readonly #source: ByteSource;
  readonly #trust: Trust | undefined;
  readonly #slots = new Map<string, TaskSlot>();
  readonly #maxResidentBytes: number;
  /** Resident blobs that could be read again, least recently used first. */
  readonly #recent = new Set<TaskSlot>();
  /** Bytes of these. */
  #held = 0;
  /** What `tasks` gave last; undefined when that is no longer so. */
  #tasks: ReadonlyMap<string, TaskInfo> | undefined;
  /** The bases section while somebody works on it, or until somebody first does. */
  #bases: SharedBases | undefined;

  /** @internal Use `openPack`. */
  constructor({ source, reads, window, directory, maxResidentBytes, trust, bases }: Parts) {
    this.#source = source;
    this.#maxResidentBytes = maxResidentBytes;
    this.#trust = trust;
    this.name = source.name;
    this.reads = reads;
    this.window = window;
    this.version = window.version;
    this.basisId = window.basisId;
    this.directory = directory;
    this.modules = directory.basis.modules;
    if (bases) this.#bases = { users: 0, bytes: bases };
    for (const task of directory.tasks) {
      const { length: bytes, integrity } = task.section;
      this.#slots.set(task.id, { ...task, bytes, integrity });
    }
  }

  /** The tasks by id, in the order of the file. A snapshot: tasks added or removed later do not change it. */
  get tasks(): ReadonlyMap<string, TaskInfo> {
    this.#tasks ??= new Map([...this.#slots].map(([key, slot]) => [key, infoOf(slot)]));
    return this.#tasks;
  }

  /** Bytes held by this object: task blobs, and the bases while somebody works on them, or nobody has yet. */
  get residentBytes(): { coefficients: number; basis: number } {
    let coefficients = 0;
    for (const { blob } of this.#slots.values()) coefficients += blob?.bytes.length ?? 0;
    return { coefficients, basis: this.#bases?.bytes?.length ?? 0 };
  }

  /**
   * Reads task blobs ahead, so that switching to them needs no request.
   * @param ids of tasks, or the id of one
   * @throws TaskError for an id that is not there
   */
  async prefetch(ids: Iterable<string>, options: ReadOptions = {}): Promise<void> {
    await Promise.all([...(typeof ids === "string" ? [ids] : ids)].map((id) => this.load(id, options)));
  }

  /**
   * The blob of a task, from memory or in one request.
   * @throws TaskError naming the nearest ids when there is no such task
   */
  async load(id: string, options: ReadOptions = {}): Promise<TaskBlob> {
    const slot = this.#slots.get(id);
    if (!slot) throw this.#unknown(id);
    options.signal?.throwIfAborted();
    if (slot.blob) {
      if (this.#recent.delete(slot)) this.#recent.add(slot);
      return slot.blob;
    }
    // Callers share one request. A caller's signal ends its own wait only, while others still want the bytes.
    if (!slot.loading || slot.loading.stopped)
      slot.loading = new SharedWork((signal) => this.#fetch(slot, signal), options.signal);
    return slot.loading.wait(options.signal);
  }

  async #fetch(slot: TaskSlot, signal: AbortSignal | undefined): Promise<TaskBlob> {
    const part = `task "${slot.id}"`;
    const blob = await this.#checked(slot.section!, part, signal, undefined, async (bytes, coded) => {
      if (coded) await this.#trust?.checkDecoded(bytes, part);
      return parseTask(bytes, this.modules, this.name, slot);
    });
    // It may have been removed in the meantime, or read by a later request.
    if (this.#slots.get(slot.id) !== slot || slot.blob) return slot.blob ?? blob;
    slot.blob = blob;
    slot.loading = undefined;
    this.#recent.add(slot);
    this.#held += blob.bytes.length;
    for (const other of this.#recent) {
      if (this.#held <= this.#maxResidentBytes || other === slot) break;
      this.#forget(other);
    }
    return blob;
  }

  /**
   * The blob of a task as its file has it, coded or not: what a copy of the task is made of, so that it keeps its hash.
   * @throws TaskError, SourceError, FormatError, TrustError as `load`
   */
  async stored(id: string, options: ReadOptions = {}): Promise<Uint8Array> {
    const slot = this.#slots.get(id);
    // All that `load` checks is checked of a copy, too.
    await this.load(id, options);
    return slot!.stored ?? this.#read(slot!.section!, `task "${id}"`, options);
  }

  #forget(slot: TaskSlot): void {
    if (!this.#recent.delete(slot)) return;
    this.#held -= slot.blob!.bytes.length;
    slot.blob = undefined;
  }

  /**
   * The bases section, checked: all components and means. Everyone who asks shares one copy, and it is forgotten when the
   * last of them closes; whoever asks after that has it read again.
   * @throws SourceError, FormatError when it cannot be read or is damaged
   */
  async bases(options: ReadOptions = {}): Promise<Bases> {
    const shared = (this.#bases ??= { users: 0 });
    shared.users++;
    let open = true;
    const close = (): void => {
      if (open && --shared.users === 0 && this.#bases === shared) this.#bases = undefined;
      open = false;
    };
    try {
      if (!shared.checked || shared.checked.stopped)
        shared.checked = new SharedWork((signal) => this.#checkedBases(shared, signal), options.signal);
      return { bytes: await shared.checked.wait(options.signal), close, [Symbol.dispose]: close };
    } catch (error) {
      close();
      throw error;
    }
  }

  async #checkedBases(shared: SharedBases, signal: AbortSignal | undefined): Promise<Uint8Array> {
    return this.#checked(this.directory.bases, "bases", signal, shared.bytes, async (bytes) => {
      checkTensors(bytes, 0, basesTensors(this.modules), this.name, "bases");
      return (shared.bytes = bytes);
    });
  }

  /** A section as the file has it, checked. */
  async #read(section: Section, part: string, options: ReadOptions): Promise<Uint8Array> {
    const bytes = await this.#source.read(section.offset, section.length, options);
    await checkSection(bytes, section, part, this.name, this.#trust);
    return bytes;
  }

  /**
   * What a section means.
   * @param bytes of a section that was checked already. Default: it is read
   */
  async #checked<T>(
    section: Section,
    part: string,
    signal: AbortSignal | undefined,
    bytes: Uint8Array | undefined,
    parse: (bytes: Uint8Array, coded: boolean) => Promise<T>,
  ): Promise<T> {
    try {
      const read = bytes ?? (await this.#read(section, part, { signal }));
      if (!section.coded) return await parse(read, false);
      const { decodeSection } = await import("../format/decode-coded.ts");
      const how = { file: this.name, part, before: this.directory.basisBytes, expected: section.size, signal };
      return await parse(await decodeSection(read, how), true);
    } catch (error) {
      throw await explain(error, this.#source, this.directory.bytes);
    }
  }

  /**
   * The root of the pack, "sha256-…", which names everything in it: what `openPack` takes as `integrity`. The same whether the
   * pack is signed or not; another after each change.
   * @throws TypeError where the platform has no WebCrypto
   */
  async integrity(): Promise<string> {
    return integrityOf(this.window.head, this.directory.bytes);
  }

  /**
   * Adds a task that came as a file of its own (SPEC.md, section 7), for this open pack only; nothing is written.
   * @throws FormatError when the file is damaged, TaskError when it belongs to another basis, or the id is taken or being added, TrustError
   *   when it is another than `integrity` says, or revoked, or not signed where the pack was opened with `keys`
   */
  async addTask(id: string, file: SourceInput, options: TaskTrust = {}): Promise<void> {
    const { addTaskFile } = await import("./task-file.ts");
    await addTaskFile(file, id, this, this.#slots, this.#trust, options, (task) => {
      this.#tasks = undefined;
      this.#slots.set(id, { ...task, bytes: task.stored.length });
    });
  }

  /**
   * Forgets a task of this open pack; the file is not changed.
   * @throws TaskError when there is no such task
   */
  removeTask(id: string): void {
    const slot = this.#slots.get(id);
    if (!slot) throw this.#unknown(id);
    this.#forget(slot);
    this.#tasks = undefined;
    this.#slots.delete(id);
  }

  #unknown(id: string): Error {
    if (typeof id !== "string") return new TypeError(`task: expected an id, got ${described(id)}`);
    const close = nearest(id, this.#slots.keys());
    const hint = close.length ? `; the nearest are ${close.map(described).join(", ")}` : "";
    return new TaskError(`no task "${id}" in ${this.name}${hint}`, { task: id, nearest: close });
  }

  /** Closes the file. Resident tasks stay usable. */
  async close(): Promise<void> {
    await this.#source.close?.();
  }

  /** With `await using`. In engines without the symbol a method that nobody calls. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}
