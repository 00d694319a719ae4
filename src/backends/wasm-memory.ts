/**
 * Blocks in a linear memory: a first-fit free list with coalescing, kept in JS so that the memory holds nothing but
 * data. Knows addresses and sizes; owners and views are the backend's.
 */

/** Every address is a multiple of this: the width of a vector. */
const ALIGN = 16;
const PAGE = 65536;

/** Hands out ranges of a `WebAssembly.Memory`. */
export interface Heap {
  /** Address of `byteLength` zeroed bytes, or `undefined` when the memory cannot grow by what is missing. */
  allocate(byteLength: number): number | undefined;
  /** Takes back what `allocate` gave for the same `byteLength`. */
  free(address: number, byteLength: number): void;
}

interface Range {
  start: number;
  end: number;
}

/** A heap over `memory` from byte `start` on, a multiple of 16. Memory grows by whole pages, never ahead of need. */
export function createHeap(memory: WebAssembly.Memory, start: number): Heap {
  // Sorted, disjoint, never adjacent. Beyond `top` nothing was ever handed out: those bytes are zero and not listed.
  const ranges: Range[] = [];
  let top = start;

  return {
    allocate(byteLength) {
      const size = roundUp(byteLength);
      const index = ranges.findIndex(({ start, end }) => end - start >= size);
      if (index >= 0) {
        const range = ranges[index]!;
        const address = range.start;
        range.start += size;
        if (range.start === range.end) ranges.splice(index, 1);
        new Uint8Array(memory.buffer, address, size).fill(0);
        return address;
      }
      // A free range that ends at the top is the beginning of the block; only the rest is new.
      const last = ranges.at(-1);
      const address = last?.end === top ? last.start : top;
      const missing = address + size - memory.buffer.byteLength;
      if (missing > 0) {
        try {
          memory.grow(Math.ceil(missing / PAGE));
        } catch {
          return undefined;
        }
      }
      if (address < top) {
        ranges.pop();
        new Uint8Array(memory.buffer, address, top - address).fill(0);
      }
      top = address + size;
      return address;
    },

    free(address, byteLength) {
      const end = address + roundUp(byteLength);
      let index = ranges.findIndex((range) => range.start > address);
      if (index < 0) index = ranges.length;
      const before = ranges[index - 1];
      const after = ranges[index];
      const joinsAfter = after?.start === end;
      if (before?.end === address) {
        before.end = joinsAfter ? after.end : end;
        if (joinsAfter) ranges.splice(index, 1);
      } else if (joinsAfter) {
        after.start = address;
      } else {
        ranges.splice(index, 0, { start: address, end });
      }
    },
  };
}

/** Whole vectors, and at least one, so that no two blocks share an address. */
function roundUp(byteLength: number): number {
  return Math.max(ALIGN, Math.ceil(byteLength / ALIGN) * ALIGN);
}
