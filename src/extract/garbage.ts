/**
 * Frees arrays by hand, since ending threads would free them only between phases: arrays of numbers lie outside an engine's heap, which
 * therefore sees no need to collect: packing 121 MB of adapters in two threads took 249 MB at its peak instead of 202. So extraction says
 * when it is done with some.
 */

/** Bytes that may pile up in a thread before young arrays are collected, and before all are, which takes longer. */
const YOUNG = 2 ** 23;
const ALL = 2 ** 27;

let [young, all] = [0, 0];
let collect: ((which: "young" | "all") => void) | undefined;

/** Frees arrays promptly in this thread. Each collection scans the heap, so avoid it with large ones. */
export function freeWith(free: (which: "young" | "all") => void): void {
  collect = free;
}

/** Says how many bytes of arrays have been let go of. */
export function letGo(bytes: number): void {
  young += bytes;
  all += bytes;
  if (young < YOUNG) return;
  collect?.(all < ALL ? "young" : "all");
  young = 0;
  if (all >= ALL) all = 0;
}
