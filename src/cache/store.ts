/** Where ranges are kept. */

/**
 * Bytes under names. Entries may vanish or be damaged at any time: they are checked when they are read. Keys are up to 120
 * letters, digits, dots and hyphens.
 */
export interface RangeStore {
  /** The bytes; undefined when there are none. */
  get(key: string): Promise<Uint8Array | undefined>;
  /** Keeps bytes, in place of those that were there. They must not be changed afterwards. */
  put(key: string, bytes: Uint8Array): Promise<void>;
  /** Forgets bytes, if there are any. */
  delete(key: string): Promise<void>;
  /** The keys of all entries; others may be among them. */
  keys(): Promise<Iterable<string>>;
}
