/** AdamW, compared with torch.optim.AdamW (test/data/make/make_adamw_golden.py). */
import { readFileSync } from "node:fs";
import t from "tap";
import { AdamW } from "./internals.ts";
import { data } from "./packs.ts";

interface Golden {
  decay: "none" | "linear" | "cosine";
  steps: number;
  warmup: number;
  clip: number | null;
  beta1: number;
  beta2: number;
  rates: number[];
  weightDecay: number[];
  start: number[][];
  /** Gradients by step, then by group. */
  gradients: number[][][];
  norms: number[];
  values: number[][][];
}

const GOLDENS = JSON.parse(readFileSync(data("goldens/adamw.json"), "utf8")) as Golden[];

t.test("every step is PyTorch's", async (t) => {
  for (const { start, rates, weightDecay, gradients, norms, values, clip, ...options } of GOLDENS) {
    const groups = start.map((numbers, i) => ({
      values: Float32Array.from(numbers),
      rate: rates[i]!,
      weightDecay: weightDecay[i]!,
    }));
    const optimizer = new AdamW(groups, { ...options, clip: clip ?? undefined });
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
    t.equal(optimizer.count, options.steps);
    const off = `${options.decay}: off by ${worst.toExponential(1)}, norms by ${norm.toExponential(1)}`;
    // f32 values near 3 are 2.4e-7 apart, and each step rounds once.
    t.ok(worst < 2e-6 && norm < 1e-6, off);
  }
});

t.test("parts of one vector are groups", async (t) => {
  const whole = Float32Array.of(1, 1, 1, 1);
  const optimizer = new AdamW([
    { values: whole.subarray(0, 2), rate: 0.1 },
    { values: whole.subarray(2), rate: 0 },
  ]);
  optimizer.step([Float32Array.of(1, -2), Float32Array.of(5, 5)]);
  // The first step has the length of the rate, whatever the gradient.
  t.same(
    [...whole].map((value) => value.toFixed(4)),
    ["0.9000", "1.1000", "1.0000", "1.0000"],
  );
});

t.test("a gradient that is not finite changes nothing", async (t) => {
  const values = Float32Array.of(1, 2);
  const optimizer = new AdamW([{ values, rate: 0.1 }], { warmup: 2 });
  for (const bad of [NaN, Infinity])
    t.match(optimizer.step([Float32Array.of(1, bad)]), { applied: false, schedule: 0.5 });
  t.same([[...values], optimizer.count], [[1, 2], 0]);
  t.match(optimizer.step([Float32Array.of(1, 1)]), { applied: true, schedule: 0.5, norm: Math.SQRT2 });
});

t.test("wrong arguments are named", async (t) => {
  const values = new Float32Array(3);
  const refused: [() => unknown, RegExp][] = [
    [() => new AdamW([{ values, rate: -1 }]), /rate: expected .*, got -1/],
    [() => new AdamW([{ values, rate: NaN }]), /rate: expected .*, got NaN/],
    [() => new AdamW([{ values, rate: 1, weightDecay: -1 }]), /weightDecay: expected .*, got -1/],
    [() => new AdamW([], { beta1: 1 }), /beta1: expected .*, got 1/],
    [() => new AdamW([], { beta2: -0.1 }), /beta2: expected .*, got -0.1/],
    [() => new AdamW([], { epsilon: 0 }), /epsilon: expected .*, got 0/],
    [() => new AdamW([], { clip: 0 }), /clip: expected .*, got 0/],
    [() => new AdamW([], { warmup: 0.5 }), /warmup: expected .*, got 0.5/],
    [() => new AdamW([], { warmup: 5, steps: 5 }), /steps: expected .*, got 5/],
    [() => new AdamW([], { decay: "cosine" }), /steps: expected .*, got Infinity/],
    [() => new AdamW([{ values, rate: 1 }]).step([]), /gradients: expected the lengths \d+, got $/],
    [() => new AdamW([{ values, rate: 1 }]).step([new Float32Array(2)]), /gradients: expected the lengths \d+, got 2/],
  ];
  for (const [action, message] of refused) t.throws(action, { name: "RangeError", message });
});
