/** Adam, compared with torch.optim.Adam (test/data/make/make_adam_golden.py). */
import { readFileSync } from "node:fs";
import t from "tap";
import { Adam } from "../support/internals/learn.ts";
import { data } from "../support/packs.ts";

interface Golden {
  decay: "none" | "linear";
  steps: number;
  warmup: number;
  clip: number | null;
  rates: number[];
  start: number[][];
  /** Gradients by step, then by group. */
  gradients: number[][][];
  norms: number[];
  values: number[][][];
}

const GOLDENS = JSON.parse(readFileSync(data("goldens/adam.json"), "utf8")) as Golden[];

t.test("every step is PyTorch's", async (t) => {
  for (const { start, rates, gradients, norms, values, clip, steps, decay, warmup } of GOLDENS) {
    const groups = start.map((numbers, i) => ({
      values: Float32Array.from(numbers),
      rate: rates[i]!,
    }));
    const optimizer = new Adam(groups, { steps, decay, warmup, clip: clip ?? Infinity });
    let [worst, norm] = [0, 0];
    for (const [step, these] of gradients.entries()) {
      const report = optimizer.step(these.map((numbers) => Float32Array.from(numbers)));
      t.equal(report.applied, true);
      norm = Math.max(norm, Math.abs(report.norm - norms[step]!) / norms[step]!);
      for (const [i, numbers] of values[step]!.entries()) {
        for (const [at, expected] of numbers.entries())
          worst = Math.max(worst, Math.abs(groups[i]!.values[at]! - expected));
      }
    }
    const off = `${decay}: off by ${worst.toExponential(1)}, norms by ${norm.toExponential(1)}`;
    // f32 values near 3 are 2.4e-7 apart, and each step rounds once.
    t.ok(worst < 2e-6 && norm < 1e-6, off);
  }
});

const PLAIN = { steps: 1, clip: Infinity, warmup: 0, decay: "none" } as const;

t.test("parts of one vector are groups", async (t) => {
  const whole = Float32Array.of(1, 1, 1, 1);
  const groups = [
    { values: whole.subarray(0, 2), rate: 0.1 },
    { values: whole.subarray(2), rate: 0 },
  ];
  new Adam(groups, PLAIN).step([Float32Array.of(1, -2), Float32Array.of(5, 5)]);
  // The first step has the length of the rate, whatever the gradient.
  t.same(
    [...whole].map((value) => value.toFixed(4)),
    ["0.9000", "1.1000", "1.0000", "1.0000"],
  );
});

t.test("a gradient that is not finite changes nothing", async (t) => {
  const values = Float32Array.of(1, 2);
  const optimizer = new Adam([{ values, rate: 0.1 }], PLAIN);
  for (const bad of [NaN, Infinity]) t.match(optimizer.step([Float32Array.of(1, bad)]), { applied: false });
  t.same([...values], [1, 2]);
  t.match(optimizer.step([Float32Array.of(1, 1)]), { applied: true, norm: Math.SQRT2 });
});

t.test("a warm-up that takes all steps is refused", async (t) => {
  const refused = { name: "RangeError", message: /steps: expected a whole number above `warmup`, got 5/ };
  t.throws(() => new Adam([], { ...PLAIN, steps: 5, warmup: 5, decay: "linear" }), refused);
});
