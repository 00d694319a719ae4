/**
 * Training of more than coefficients: the arithmetic of terms, factors that begin from components, what a stored task
 * keeps of them.
 */

import { readFileSync } from "node:fs";
import { openPack, type Term } from "eigenlora";
import { searchPack, taskAdapter } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { createTrainer } from "eigenlora/train";
import fc from "fast-check";
import t from "tap";
import { uniform } from "../support/internals/base.ts";
import { Adam, type SharedBasis, type TrainedModule, TrainedTerms } from "../support/internals/learn.ts";
import { expandTerm } from "../support/internals/pack.ts";
import { examples, F32, LABELS, noise, relative, tiny } from "../support/learning.ts";
import { data, lossOf } from "../support/packs.ts";
import { difference, feeds, model, NODE, open, outputOf } from "../support/sessions.ts";

const basis = (K: number, mean: boolean, width: number, seed: number): SharedBasis => ({
  index: 0,
  K,
  mean,
  width,
  values: noise((K + Number(mean)) * width, seed),
});

const anyModule: fc.Arbitrary<TrainedModule> = fc
  .record({
    ...{
      in: fc.integer({ min: 1, max: 5 }),
      out: fc.integer({ min: 1, max: 5 }),
      privateRank: fc.integer({ min: 0, max: 2 }),
      rank: fc.integer({ min: 1, max: 3 }),
    },
    ...{
      KA: fc.integer({ min: 1, max: 4 }),
      KB: fc.integer({ min: 1, max: 4 }),
      meanA: fc.boolean(),
      meanB: fc.boolean(),
    },
    ...{ shared: fc.boolean(), seed: fc.integer({ min: 1, max: 1e6 }) },
    /** Form of the rows of each factor: coefficients, residual rows, or both. */
    takes: fc.tuple(fc.constantFrom("over", "own", "both"), fc.constantFrom("over", "own", "both")),
  })
  .map(({ in: inputs, out, privateRank, rank, KA, KB, meanA, meanB, shared, seed, takes }) => {
    const [ofA, ofB] = takes;
    const A = ofA === "own" ? undefined : basis(KA, meanA, inputs, seed);
    const B = ofB === "own" ? undefined : basis(KB, meanB, out, seed + 1);
    const own = { A: ofA !== "over", B: ofB !== "over" };
    return {
      name: `module ${seed}`,
      in: inputs,
      out,
      privateRank: shared ? privateRank : privateRank + 1,
      shared: shared ? { rank, A, B, own } : undefined,
    };
  });

const modules = fc.uniqueArray(anyModule, { minLength: 1, maxLength: 3, selector: ({ name }) => name });

t.test("factors are what the formula says", async (_t) => {
  fc.assert(
    fc.property(modules, fc.integer({ min: 1, max: 1e6 }), (all, seed) => {
      const terms = new TrainedTerms(all);
      const values = new Float32Array(noise(terms.size, seed));
      const found = terms.expand(values);
      for (const { name, in: inputs, out, shared, privateRank: own } of all) {
        for (const [side, factor, d] of [
          ["A", "A", inputs],
          ["B", "Bt", out],
        ] as const) {
          const rank = shared?.rank ?? 0;
          const expected = Array.from({ length: (rank + own) * d }, (_, at) => {
            const [row, i] = [Math.floor(at / d), at % d];
            if (row >= rank) return terms.part(values, name, `private${side}`)![(row - rank) * d + i]!;
            const beside = terms.part(values, name, `own${side}`)?.[row * d + i] ?? 0;
            const basis = shared![side];
            if (!basis) return beside;
            const { K, width, mean, values: E } = basis;
            const alpha = terms.part(values, name, `alpha${side}`)!;
            let sum = beside + (mean ? E[K * width + i]! : 0);
            for (let k = 0; k < K; k++) sum += alpha[row * K + k]! * E[k * width + i]!;
            return sum;
          });
          if (difference(found.get(name)![factor], expected) > 1e-6)
            throw new Error(`${factor} of ${name}: ${found.get(name)![factor]} instead of ${expected}`);
        }
      }
    }),
  );
});

t.test("gradients are pulled back along what factors are made of", async (_t) => {
  fc.assert(
    fc.property(modules, fc.integer({ min: 1, max: 1e6 }), (all, seed) => {
      const terms = new TrainedTerms(all);
      const values = new Float32Array(noise(terms.size, seed));
      const next = uniform(seed);
      // A loss linear in the factors is a polynomial of second degree in the trained numbers, so differences are exact.
      const weights = new Map(
        all.map(({ name, in: inputs, out, shared, privateRank: own }): [string, Term] => {
          const rank = (shared?.rank ?? 0) + own;
          const some = (d: number): Float32Array => Float32Array.from({ length: rank * d }, () => next() - 0.5);
          return [name, { rank, A: some(inputs), Bt: some(out) }];
        }),
      );
      const loss = (at: Float32Array<ArrayBuffer>): number => {
        let sum = 0;
        for (const [name, term] of terms.expand(at))
          for (const factor of ["A", "Bt"] as const)
            term[factor].forEach((v, i) => (sum += v * weights.get(name)![factor][i]!));
        return sum;
      };
      const gradient = terms.pullBack(weights);
      for (let i = 0; i < terms.size; i++) {
        const [up, down] = [0.5, -0.5].map((by) => loss(values.map((v, at) => (at === i ? v + by : v))));
        if (Math.abs(up! - down! - gradient[i]!) > 2e-6 * (1 + Math.abs(gradient[i]!)))
          throw new Error(`${i}: ${gradient[i]} instead of ${up! - down!}`);
      }
    }),
  );
});

t.test("factors that were learned are stored as a pack with a step stores its tasks", async (t) => {
  const adapters = await readAdapters([data("sessions/adapters")]);
  const { chunks } = await searchPack(adapters);
  const pack = await openPack(new Blob(chunks as BlobPart[]));
  const session = await open(NODE, model("torchscript"), pack, { trainable: true });
  t.teardown(() => Promise.all([session.close(), ...adapters.map((adapter) => adapter.close())]));
  const trainer = await createTrainer(session, { labels: LABELS, rank: 8 });
  for await (const _ of trainer.fit(examples(NODE, session, 32, 5), { steps: 30, batch: 8 }));
  const files = {
    whole: await trainer.task({ dtype: F32 }),
    small: await trainer.task(),
    fine: await trainer.task({ error: 0.05 }),
  };
  t.ok(
    files.small.length < files.fine.length && files.fine.length < files.whole.length / 4,
    Object.values(files)
      .map(({ length }) => length)
      .join(", "),
  );
  for (const [id, file] of Object.entries(files)) await session.addTask(id, file);
  const whole = await taskAdapter(pack, "whole");
  for (const [id, most] of Object.entries({ small: 0.3, fine: 0.05 })) {
    const { total: loss } = await lossOf(pack, { ...whole, id });
    t.ok(loss <= most && loss > most / 2, `${id}: ${loss}`);
    t.same(session.tasks.get(id)!.metadata.labels, LABELS);
  }
  const answers = [];
  for (const id of Object.keys(files)) {
    await session.switchTask(id);
    answers.push(await outputOf(session, feeds(NODE, session)));
  }
  const [exact, coarse, near] = answers as [Float32Array, Float32Array, Float32Array];
  t.ok(difference(near, exact) < difference(coarse, exact), "the finer one answers more alike");
  await t.rejects(trainer.task({ error: 2 }), /error: expected a number between 0 and 1, got 2/);
});

t.test("a LoRA begins as PEFT's, or as the factors that coefficients make", async (t) => {
  const session = await tiny(NODE);
  t.teardown(() => session.close());
  const [task] = session.tasks.keys();
  const known = examples(NODE, session, 8, 4);
  const factors = async (id: string): Promise<Float32Array[]> => {
    const blob = await session.pack.load(id);
    const bases = (await session.pack.bases()).bytes;
    return blob.terms.flatMap((term) => {
      const { A, Bt } = expandTerm(blob, term, session.pack.modules[term.module]!, bases);
      return [A, Bt];
    });
  };
  for (const init of [undefined, "mean", { task: task! }] as const) {
    const trainer = await createTrainer(session, { labels: LABELS, train: "lora", ...(init ? { init } : {}) });
    // Rates of 0 leave the start as it is.
    for await (const _ of trainer.fit(known, { epochs: 1, learningRates: { terms: 0, head: 0 } }));
    const id = `from ${JSON.stringify(init)}`;
    await session.addTask(id, await trainer.task({ dtype: F32 }));
    const [ours, theirs] = [await factors(id), await factors(task!)];
    const off = ours.map((values, i) => relative(values, theirs[i]!));
    if (typeof init === "object") t.ok(Math.max(...off) < 1e-6, `${id}: the task's factors`);
    else t.ok(Math.min(...off) > 0.05, `${id}: others`);
    if (!init)
      t.ok(
        ours.filter((_, i) => i % 2 === 1).every((B) => B.every((v) => v === 0)),
        "B is zero",
      );
    // Training goes on from the task as it is.
    await trainer.begin(id);
    t.same(await trainer.task({ dtype: F32, id: "task" }), await trainer.task({ dtype: F32, id: "task" }));
    await session.addTask(`${id} again`, await trainer.task({ dtype: F32 }));
    t.ok(
      (await factors(`${id} again`)).every(
        (values, i) => relative(values, ours[i]!) < 1e-7 || ours[i]!.every((v) => v === 0),
      ),
      `${id}: again`,
    );
  }
  const wrong = createTrainer(session, { labels: LABELS, init: "fresh" });
  await t.rejects(wrong, { name: "RangeError", message: /"fresh" is for factors/ });
});

/** Adam, compared with torch.optim.Adam (test/data/make/make_adam_golden.py). */
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

t.test("a warm-up that takes all steps is refused", async (t) => {
  const refused = { name: "RangeError", message: /steps: expected a whole number above `warmup`, got 5/ };
  t.throws(() => new Adam([], { steps: 5, clip: Infinity, warmup: 5, decay: "linear" }), refused);
});
