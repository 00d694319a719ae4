/** The command line's progress: one line in a terminal, a line each tenth elsewhere, with the time left. */
import type { WorkProgress } from "eigenlora/build";
import t from "tap";
import { createOutput, leftOf, timeLeft } from "../support/internals/cli.ts";

/** An output with a clock that stands still, and what it has written. */
function output(stream: { isTTY?: boolean; columns?: number } = {}, json = false) {
  const said: string[] = [];
  let now = 1e6;
  const out = createOutput(json, { ...stream, write: (text: string) => said.push(text) }, () => now);
  /** Output of a step that begins a number of seconds later. */
  const after = (seconds: number, step: () => void): string[] => {
    now += 1000 * seconds;
    said.length = 0;
    step();
    return [...said];
  };
  return { out, after };
}

const steps = (done: number, total = 100): WorkProgress => ({ stage: "learning", done, total, unit: "steps" });

t.test("a log hears of long work once, and again each tenth, never more than twelve times", async (t) => {
  const { out, after } = output();
  const said: string[] = [];
  for (let done = 1; done <= 1000; done++) {
    said.push(...after(0.1, () => out.progress({ stage: "packing", done: done / 10, total: 100, unit: "%" })));
  }
  t.ok(said.length <= 12, `${said.length} lines`);
  const shares = said.map((line) => Number(/^packing: (\d+) %/.exec(line)![1]));
  t.same(shares, [5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]);
  t.equal(said[5], "packing: 50 %, 50 s left\n");
  t.equal(said.at(-1), "packing: 100 %\n");
});

t.test("a terminal has one line, as wide as it is, which goes before anything else is said", async (t) => {
  const line = "\r\u001b[K";
  for (const [columns, shown] of [
    [undefined, "learning: 1 of 2 steps, 50 %"],
    [0, "learning: 1 of 2 steps, 50 %"],
    [14, "learning: 1 o"],
  ] as const) {
    const { out, after } = output({ isTTY: true, ...(columns === undefined ? {} : { columns }) });
    t.same(
      after(0, () => out.progress(steps(1, 2))),
      [],
      "not at once",
    );
    t.same(
      after(1, () => (out.phase("loading"), out.progress(steps(1, 2)), out.warn("x"), out.clear())),
      [`${line}loading`, `${line}${shown}`, line, "warning: x\n"],
    );
    t.same(
      after(1, () => (out.progress(steps(1, 2)), out.progress(steps(2, 2)))),
      [`${line}${shown}`, line],
    );
  }
});

t.test("units: bytes as people read them, percent, and amounts whose total is unknown", async (t) => {
  const { out, after } = output({ isTTY: true });
  const shown = (at: Partial<WorkProgress>): string =>
    after(1, () => out.progress({ ...steps(1), ...at }))[0]!.slice(4);
  t.equal(
    shown({ stage: "downloading x", done: 1.5e6, total: 3e7, unit: "bytes" }),
    "downloading x: 1.50 MB of 30.0 MB, 5 %",
  );
  t.equal(shown({ done: 37.9, unit: "%" }), "learning: 37 %");
  t.equal(shown({ done: 5, total: 0 }), "learning: 5 steps");
  t.equal(shown({ detail: "a\nb" }), "learning a\\u000ab: 1 of 100 steps, 1 %", "names cannot begin a line");
});

t.test("time left, at the rate since the first report of a stage", async (t) => {
  const left = (done: number, before: number, seconds: number): string[] =>
    leftOf({ done, total: 101 }, before, 1000 * seconds);
  t.same(left(1, 1, 30), [], "nothing is known yet");
  t.same(left(2, 1, 1), [], "too short to tell");
  t.same(left(11, 1, 10), ["2 min left"]);
  t.same(left(41, 1, 20), ["30 s left"]);
  t.same(left(101, 1, 20), [], "it is done");
  t.same(leftOf({ done: 5, total: 0 }, 0, 1e5), [], "nobody knows of how much");
  t.same([0.2, 89, 90, 3601].map(timeLeft), ["1 s left", "89 s left", "2 min left", "61 min left"]);
});
