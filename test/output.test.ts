/** The command line's estimates of the time left. */
import t from "tap";
import { createEstimate, timeLeft } from "./internals.ts";

t.test("time left, at the rate since the first report of a piece of work", async () => {
  let now = 1e6;
  const estimate = createEstimate(() => now);
  const after = (seconds: number, what: string, done: number, of: number): string[] => {
    now += 1000 * seconds;
    return estimate(what, done, of);
  };
  t.same(after(30, "module", 1, 101), [], "nothing is known yet: what came before is another piece");
  t.same(after(1, "module", 2, 101), [], "too short to tell");
  t.same(after(9, "module", 11, 101), ["2 min left"]);
  t.same(after(10, "module", 41, 101), ["30 s left"], "faster");
  t.same(after(60, "module", 41, 101), ["2 min left"], "a pause counts");
  t.same(after(5, "task", 1, 3), [], "a new piece");
  t.same(after(5, "task", 2, 3), ["5 s left"]);
  t.same(after(5, "task", 3, 3), ["0 s left"]);
});

t.test("seconds as people read them", async () => {
  t.same([0.2, 89, 90, 3601].map(timeLeft), ["1 s left", "89 s left", "2 min left", "61 min left"]);
});
