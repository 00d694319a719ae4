/** Rules for the progress records of every piece of work. */
import type { WorkProgress } from "eigenlora/build";
import type { Test } from "tap";

/**
 * Checks that work was told as one stage in one unit of a total that stays, never went back, and ended with all of it.
 */
export function checkWork(t: Test, told: readonly WorkProgress[], stage: string): void {
  const [first] = told;
  t.ok(told.length > 2, `${stage}: ${told.length} reports`);
  t.ok(
    told.every((at) => at.stage === stage && at.unit === first!.unit && at.total === first!.total),
    "one stage",
  );
  t.ok(
    told.every(({ done }, i) => done >= (told[i - 1]?.done ?? 0)),
    "never goes back",
  );
  t.equal(told.at(-1)?.done, first?.total, "ends");
}
