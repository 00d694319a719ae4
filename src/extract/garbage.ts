/**
 * Arrays of numbers lie outside an engine's heap, where it sees no need to look for those that nobody uses any more: each thread would hold
 * a hundred megabytes of them. So extraction says when it is done with some.
 */
import { collectGarbage } from "#platform";

/** So many bytes may pile up in a thread before young arrays are looked for, and before all are, which takes longer. */
const YOUNG = 2 ** 23;
const ALL = 2 ** 25;

let [young, all] = [0, 0];

/** Says that so many bytes of arrays have been let go of. */
export function letGo(bytes: number): void {
  young += bytes;
  all += bytes;
  if (young < YOUNG) return;
  collectGarbage?.(all < ALL ? "young" : "all");
  young = 0;
  if (all >= ALL) all = 0;
}
