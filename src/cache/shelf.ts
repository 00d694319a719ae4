/**
 * The ranges of files in a store: found, checked, limited in size. Knows keys and checksums, and nothing of where bytes come
 * from.
 *
 * An entry is a range, followed by its SHA-256. Its key says which file, which version, which bytes: the store's list of keys is
 * all there is to know, so nothing can disagree with it. One more entry, the order of use, is a hint: without it, or with an old
 * one, other entries go first.
 */
import { sha256 } from "../format/hash.ts";
import { toHex } from "../text.ts";
import type { RangeStore } from "./store.ts";

/** A range that is kept. */
interface Kept {
  readonly key: string;
  readonly file: string;
  readonly version: string;
  readonly offset: number;
  readonly length: number;
}

const KEY = /^([0-9a-f]{32})\.([0-9a-f]{32})\.(\d{1,16})-(\d{1,16})$/;
/** Key of the order of use: keys, the least recent first. */
const ORDER = "order";
/** Keys in it: of those that were used longer ago, any may go first. */
const ORDER_LENGTH = 1000;
const CHECKSUM_BYTES = 32;

/** What a store holds, as of when it was opened and what happened here since. */
export class Shelf {
  readonly #store: RangeStore;
  readonly #maxBytes: number;
  /** Entries in the order of use, the least recent first. */
  readonly #kept: Map<string, Kept>;
  /** The order is being written; true when it has changed meanwhile. */
  #writing: { again: boolean; done: Promise<void> } | undefined;

  private constructor(store: RangeStore, maxBytes: number, kept: Map<string, Kept>) {
    this.#store = store;
    this.#maxBytes = maxBytes;
    this.#kept = kept;
  }

  static async open(store: RangeStore, maxBytes: number): Promise<Shelf> {
    const order = orderOf(await store.get(ORDER));
    const found: Kept[] = [];
    for (const key of await store.keys()) {
      const [, file, version, offset, length] = KEY.exec(key) ?? [];
      if (file && version) found.push({ key, file, version, offset: Number(offset), length: Number(length) });
    }
    found.sort((a, b) => (order.get(a.key) ?? -1) - (order.get(b.key) ?? -1));
    const shelf = new Shelf(store, maxBytes, new Map(found.map((kept) => [kept.key, kept])));
    await shelf.#evict();
    return shelf;
  }

  /**
   * The bytes of a range that lie in one that is kept.
   * @returns "damaged" when they did, and are gone now; undefined when there are none
   */
  async get(
    file: string,
    version: string,
    offset: number,
    length: number,
  ): Promise<Uint8Array | "damaged" | undefined> {
    for (const kept of this.#kept.values()) {
      const from = offset - kept.offset;
      if (kept.file !== file || kept.version !== version || from < 0 || from + length > kept.length) continue;
      const entry = await this.#store.get(kept.key);
      // Another program has deleted it.
      if (!entry) {
        if (this.#kept.get(kept.key) === kept) this.#kept.delete(kept.key);
        return undefined;
      }
      const bytes = entry.subarray(0, Math.max(0, entry.length - CHECKSUM_BYTES));
      const good = bytes.length === kept.length && same(await sha256(bytes), entry.subarray(bytes.length));
      if (!good) {
        await this.#delete(kept.key);
        return "damaged";
      }
      if (this.#kept.get(kept.key) === kept) this.#use(kept);
      return bytes.subarray(from, from + length);
    }
    return undefined;
  }

  /** Keeps a range; a range above the limit is not kept. */
  async put(file: string, version: string, offset: number, bytes: Uint8Array): Promise<void> {
    const kept = { key: `${file}.${version}.${offset}-${bytes.length}`, file, version, offset, length: bytes.length };
    if (sizeOf(kept) > this.#maxBytes) return;
    const entry = new Uint8Array(sizeOf(kept));
    entry.set(bytes);
    entry.set(await sha256(bytes), bytes.length);
    // Room first: the store may have a limit of its own.
    await this.#evict(entry.length);
    await this.#store.put(kept.key, entry);
    // Listed only once it is there: a reader that did not find it would take it off the list, and it would never be deleted.
    this.#use(kept);
    await this.#evict();
  }

  /** Forgets the ranges of a file, except those of one version. */
  async forget(file: string, except?: string): Promise<void> {
    for (const kept of [...this.#kept.values()])
      if (kept.file === file && kept.version !== except) await this.#delete(kept.key);
  }

  /** Waits until the order of use is written. */
  async close(): Promise<void> {
    await this.#writing?.done;
  }

  #use(kept: Kept): void {
    this.#kept.delete(kept.key);
    this.#kept.set(kept.key, kept);
    if (this.#writing) this.#writing.again = true;
    else {
      const writing = { again: true, done: Promise.resolve() };
      this.#writing = writing;
      writing.done = this.#writeOrder(writing);
    }
  }

  async #writeOrder(writing: { again: boolean }): Promise<void> {
    while (writing.again) {
      writing.again = false;
      const order = new TextEncoder().encode(JSON.stringify([...this.#kept.keys()].slice(-ORDER_LENGTH)));
      // A hint: a failure to write it does no harm.
      await this.#store.put(ORDER, order).catch(() => undefined);
    }
    this.#writing = undefined;
  }

  /** @param coming bytes that there is to be room for beside those that are kept */
  async #evict(coming = 0): Promise<void> {
    let total = coming;
    for (const kept of this.#kept.values()) total += sizeOf(kept);
    for (const kept of [...this.#kept.values()]) {
      if (total <= this.#maxBytes) break;
      total -= sizeOf(kept);
      await this.#delete(kept.key);
    }
  }

  async #delete(key: string): Promise<void> {
    this.#kept.delete(key);
    await this.#store.delete(key);
  }
}

const sizeOf = ({ length }: Kept): number => length + CHECKSUM_BYTES;

/** Place of each key; empty for what is no list of keys. */
function orderOf(entry: Uint8Array | undefined): Map<unknown, number> {
  try {
    const keys: unknown = JSON.parse(new TextDecoder().decode(entry));
    return new Map(Array.isArray(keys) ? keys.map((key, i) => [key, i]) : []);
  } catch {
    return new Map();
  }
}

function same(a: Uint8Array, b: Uint8Array): boolean {
  return a.length === b.length && a.every((byte, i) => byte === b[i]);
}

/** What stands for a text in keys: 128 bits of its SHA-256. */
export async function digestOf(text: string): Promise<string> {
  return toHex((await sha256(new TextEncoder().encode(text))).subarray(0, 16));
}
