/**
 * Coded sections decoded by WebAssembly (`assembly/coded.ts`), where there is some: three to five times as fast as `coded.ts`, fifteen
 * times with the first section.
 *
 * A module of its own instead of a part of the backend's kernels: whoever decodes has no backend, those kernels are loaded without it
 * in the core of every app, and 2 kB may be compiled at once, without a promise. Where an engine has no WebAssembly, no SIMD, or a
 * policy against it, and for whatever is refused, `coded.ts` decodes.
 */
import binary from "#wasm/coded";
import { LEVEL_OF, Tables } from "./coded-tables.ts";

interface Decoder {
  readonly memory: WebAssembly.Memory;
  readonly decode: (stored: number, before: number, size: number) => void;
}

/** Addresses, as `assembly/coded.ts` has them. */
const FIRST = 0;
const LEVELS = 5632;
const STORED = 20_480;

const PAGE = 65_536;
/** Memory that is kept for the next section; that of larger ones is given back. */
const MOST_KEPT = 16 * PAGE;
/** All bytes of a section, coded and not, and what it copies from. More than this is for an engine without such limits. */
const MOST = 1 << 28;

let module: WebAssembly.Module | undefined;
let kept: Decoder | undefined;
let refused = typeof WebAssembly === "undefined";

/**
 * A section as it was, or undefined where WebAssembly cannot say.
 * @param stored with a head that was checked
 * @param size bytes that it becomes
 */
export function decodeByWasm(
  stored: Uint8Array,
  before: Uint8Array,
  size: number,
): Uint8Array<ArrayBuffer> | undefined {
  const start = STORED + stored.length + before.length;
  if (start + size > MOST || !compiled()) return undefined;
  try {
    const { memory, decode } = (kept ??= instance());
    const pages = Math.ceil((start + size - memory.buffer.byteLength) / PAGE);
    if (pages > 0) memory.grow(pages);
    const bytes = new Uint8Array(memory.buffer);
    bytes.set(stored, STORED);
    bytes.set(before, start - before.length);
    decode(stored.length, before.length, size);
    // Decoding may have moved the memory.
    return new Uint8Array(memory.buffer).slice(start, start + size);
  } catch {
    return undefined;
  } finally {
    if (kept && kept.memory.buffer.byteLength > MOST_KEPT) kept = undefined;
  }
}

function compiled(): boolean {
  if (module || refused) return !refused;
  try {
    module = new WebAssembly.Module(binary);
  } catch {
    refused = true;
  }
  return !refused;
}

function instance(): Decoder {
  const memory = new WebAssembly.Memory({ initial: 1 });
  const { exports } = new WebAssembly.Instance(module!, { env: { memory } });
  new Int32Array(memory.buffer, FIRST).set(new Tables().sums);
  new Uint8Array(memory.buffer, LEVELS).set(LEVEL_OF);
  return { memory, decode: exports["decode"] as Decoder["decode"] };
}
