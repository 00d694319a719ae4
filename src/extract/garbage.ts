/**
 * Arrays of numbers lie outside an engine's heap, where it sees no need to look for those that nobody uses any more: each thread would hold
 * a hundred megabytes of them. So extraction says when it is done with some.
 */

/** So many bytes may pile up in a thread before young arrays are looked for, and before all are, which takes longer. */
const YOUNG = 2 ** 23;
const ALL = 2 ** 25;

let [young, all] = [0, 0];
let collect: ((which: "young" | "all") => void) | undefined;

/** From now on arrays are freed in time, in this thread. Not for one whose heap is large, or somebody else's: looking for them takes as long. */
export function freeWith(free: (which: "young" | "all") => void): void {
  collect = free;
}

/** Says that so many bytes of arrays have been let go of. */
export function letGo(bytes: number): void {
  young += bytes;
  all += bytes;
  if (young < YOUNG) return;
  collect?.(all < ALL ? "young" : "all");
  young = 0;
  if (all >= ALL) all = 0;
}
