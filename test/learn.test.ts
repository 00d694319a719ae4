/**
 * The trainer: a task learned on a tiny model and on the real one, its file, its guards. learn-graph.test.ts checks gradients.
 */
import { openPack } from "eigenlora";
import { peftFiles, taskAdapter } from "eigenlora/build";
import { createTrainer, type Example } from "eigenlora/train";
import t from "tap";
import { createEncoder, readTask } from "../examples/minilm.js";
import { optionsFor, splitHoldout, targetsOf, toBatches, uniform } from "./internals.ts";
import { examples, F32, LABELS, tiny } from "./learning.ts";
import { data, packOf } from "./packs.ts";
import { peftAgrees } from "./peft-agrees.ts";
import { soak } from "./required.ts";
import { difference, feeds, GOLDENS, NODE, type Ort, open, outputOf, WEB } from "./sessions.ts";

for (const [name, ort] of [
  ["onnxruntime-node", NODE],
  ["onnxruntime-web", WEB],
] as const) {
  t.test(`${name}: learns, and the session answers with the task as the trainer does`, async (t) => {
    const session = await tiny(ort);
    const trainer = await createTrainer(session, { labels: LABELS, seed: 3, privateTerms: 1 });
    t.teardown(() => session.close());
    const known = examples(ort, session, 48, 1);
    const losses: number[] = [];
    for await (const { loss, step, steps, epoch, norm } of trainer.fit(known, { epochs: 6, batch: 16 })) {
      losses.push(loss);
      t.ok(norm > 0 && step === losses.length && steps === 18 && epoch === Math.ceil(step / 3));
    }
    t.equal(losses.length, 18);
    t.ok(losses.at(-1)! < 0.7 * losses[0]!, `loss ${losses[0]} → ${losses.at(-1)}`);

    await session.addTask("mine", await trainer.task({ id: "mine", dtype: F32, metadata: { origin: "a test" } }));
    const added = session.tasks.get("mine")!;
    t.same(added.metadata, { labels: LABELS, origin: "a test" });
    const more = trainer.task({ metadata: { labels: [...LABELS, "more"] } });
    await t.rejects(more, { name: "RangeError", message: /metadata.labels: it has \d labels, but .* has \d rows/ });
    const none = trainer.task({ id: "none", metadata: { labels: [] } });
    await t.rejects(none, { name: /RangeError|FormatError/, message: /labels/ });
    t.ok(
      added.brings!.includes("saved classifier.weight") && added.brings!.some((one) => one.startsWith("private ")),
      String(added.brings),
    );
    await session.switchTask("mine");
    const rows = known.slice(0, 5);
    const probabilities = await trainer.predict(rows);
    for (const [i, { feeds: own }] of rows.entries()) {
      const logits = await outputOf(session, own as never);
      const exps = [...logits].map(Math.exp);
      const sum = exps.reduce((a, b) => a + b, 0);
      t.ok(
        difference(
          Float32Array.from(exps, (v) => v / sum),
          [...probabilities[i]!],
        ) < 1e-5,
        `row ${i}: ${probabilities[i]}`,
      );
    }
    await session.switchTask(null);
  });
}

t.test("a LoRA without components, for comparison", async (t) => {
  const session = await tiny(NODE);
  const trainer = await createTrainer(session, { labels: LABELS, seed: 1, train: "lora", rank: 2 });
  t.teardown(() => session.close());
  t.equal(
    trainer.size.terms,
    session.pack.modules.reduce((sum, { in: inputs, out }) => sum + 2 * (inputs + out), 0),
  );
  const known = examples(NODE, session, 32, 1);
  const losses: number[] = [];
  for await (const { loss } of trainer.fit(known, { epochs: 6 })) losses.push(loss);
  t.ok(losses.at(-1)! < losses[0]!, `${losses[0]} → ${losses.at(-1)}`);
  await session.addTask("mine", await trainer.task({ dtype: F32 }));
  t.ok((await session.pack.load("mine")).terms.every(({ A, privateRank }) => A === undefined && privateRank === 2));
  await session.switchTask("mine");
  const logits = await outputOf(session, known[0]!.feeds as never);
  const [probabilities] = await trainer.predict(known.slice(0, 1));
  t.ok(
    difference(
      logits.map((v) => v - Math.log(logits.reduce((sum, x) => sum + Math.exp(x), 0))),
      [...probabilities!].map(Math.log),
    ) < 1e-5,
  );
  await t.rejects(createTrainer(session, { labels: LABELS, train: "all" as "lora" }), {
    name: "RangeError",
    message: /train: expected/,
  });
  const wrong = (options: object): never => options as never;
  const refusals: [() => Promise<unknown>, string][] = [
    [() => createTrainer(session, wrong({ labels: LABELS, terms: 2 })), 'createTrainer: unknown option "terms"'],
    [() => createTrainer(session, wrong({ sede: 1 })), 'createTrainer: unknown option "sede"; did you mean "seed"?'],
    [() => trainer.fit(known, wrong({ rates: {} })).next(), 'fit: unknown option "rates"'],
    [() => session.switchTask("two", wrong({ haed: "two" })), 'switchTask: unknown option "haed"'],
    [() => createTrainer(Promise.resolve(session) as never, { labels: LABELS }), "createTrainer: expected a session"],
  ];
  for (const [refused, message] of refusals) {
    const error = await refused().catch((thrown: Error) => thrown);
    t.ok(error instanceof TypeError && error.message.startsWith(message), String(error));
  }
});

t.test("a learned task leaves as a PEFT adapter that answers alike in PyTorch", async (t) => {
  const session = await tiny(NODE);
  const trainer = await createTrainer(session, { labels: LABELS, seed: 3, privateTerms: 2 });
  t.teardown(() => session.close());
  for await (const _ of trainer.fit(examples(NODE, session, 32, 1), { epochs: 4 }));
  await session.addTask("mine", await trainer.task({ dtype: F32 }));
  await session.switchTask("mine");
  const ours = await outputOf(session, feeds(NODE, session));

  const { pack } = session;
  const inputs = Object.fromEntries(session.inputNames.map((name) => [name, GOLDENS.feeds[name]]));
  const files = await peftFiles(await taskAdapter(pack, "mine"));
  await peftAgrees(t, files, { base: data("sessions/base.safetensors"), feeds: inputs, ours });
});

t.test("the same seed gives the same bits, another one others", async (t) => {
  const session = await tiny(NODE);
  t.teardown(() => session.close());
  const known = examples(NODE, session, 32, 2);
  const files: Buffer[] = [];
  for (const seed of [5, 5, 6]) {
    const trainer = await createTrainer(session, { labels: LABELS, seed });
    for await (const _ of trainer.fit(known, { epochs: 2, holdout: 0.25 }));
    files.push(Buffer.from(await trainer.task()));
  }
  t.ok(files[0]!.equals(files[1]!));
  t.notOk(files[0]!.equals(files[2]!));
});

t.test("whoever leaves early keeps the best epoch too", async (t) => {
  const session = await tiny(NODE);
  t.teardown(() => session.close());
  const known = examples(NODE, session, 32, 2);
  const trainer = await createTrainer(session, { labels: LABELS, seed: 5 });
  const losses: number[] = [];
  let last = Infinity;
  // Rates high enough to lead away from the findings of the first epochs.
  const how = {
    epochs: 12,
    batch: 4,
    holdout: 0.25,
    warmup: 0,
    decay: "none",
    learningRates: { terms: 0.3, head: 0.3 },
  } as const;
  for await (const { holdout } of trainer.fit(known, how)) {
    if (!holdout) continue;
    last = holdout.loss;
    losses.push(last);
    if (losses.length > 3 && last > Math.min(...losses)) break;
  }
  t.ok(last > Math.min(...losses), `${losses}`);
  const kept = await trainer.task();
  const short = await createTrainer(session, { labels: LABELS, seed: 5 });
  let epochs = 0;
  for await (const { holdout } of short.fit(known, how))
    if (holdout && epochs++ === losses.indexOf(Math.min(...losses))) break;
  t.ok(Buffer.from(kept).equals(Buffer.from(await short.task())), "as one that ends there");
  await t.rejects(trainer.fit([]).next(), { name: "RangeError", message: "fit: there are no examples" });
});

t.test("a batch that runs in parts gives the step of the whole", async (t) => {
  const session = await tiny(NODE);
  t.teardown(() => session.close());
  // 40 rows are parts of 16, 16 and 8. Repeated rows have the mean gradient of one round of them.
  const few = examples(NODE, session, 8, 2).map((one, i) => ({ ...one, weight: 1 + (i % 3) }));
  const learned: Float32Array[][] = [];
  const norms: number[] = [];
  for (const known of [few, Array.from({ length: 5 }, () => few).flat()]) {
    const trainer = await createTrainer(session, { labels: LABELS, init: { task: "three" } });
    await trainer.begin("three");
    for await (const { norm } of trainer.fit(known, { steps: 1, batch: 40, warmup: 0 })) norms.push(norm);
    learned.push(await trainer.predict(few.slice(0, 3)));
  }
  t.ok(Math.abs(norms[0]! - norms[1]!) < 1e-4 * norms[0]!, `${norms}`);
  t.ok(
    learned[0]!.every((row, i) => difference(row, [...learned[1]![i]!]) < 1e-4),
    `${learned}`,
  );
});

t.test("where it begins: mean, random, a task; a task of the pack is a start that is that task", async (t) => {
  const session = await tiny(NODE);
  t.teardown(() => session.close());
  const [known] = [examples(NODE, session, 8, 4)];
  const [task] = session.tasks.keys();
  for (const init of ["mean", "random", { task: task! }] as const) {
    const trainer = await createTrainer(session, { labels: LABELS, init });
    // Rates of 0 leave the start as it is.
    for await (const _ of trainer.fit(known, { epochs: 1, learningRates: { terms: 0, head: 0 } }));
    const id = `from ${JSON.stringify(init)}`;
    await session.addTask(id, await trainer.task({ dtype: F32 }));
    const [ours, theirs] = [await session.pack.load(id), await session.pack.load(task!)];
    const floats = (blob: typeof ours): Float32Array[] =>
      blob.terms.flatMap(({ A, B }) =>
        [A!, B!].map(
          ({ tensor: { byteOffset, byteLength } }) =>
            new Float32Array(blob.bytes.slice(byteOffset, byteOffset + byteLength).buffer),
        ),
      );
    const same = floats(ours).every((values, i) => difference(values, [...floats(theirs)[i]!]) < 1e-6);
    t.equal(same, typeof init === "object", id);
  }
  await t.rejects(createTrainer(session, { labels: LABELS, init: task as "mean" }), {
    name: "RangeError",
    message: /init: expected "auto", "mean", "random" or "fresh", got "/,
  });
  const other = await createTrainer(session, { labels: LABELS, init: { task: task! }, rank: 7 });
  await t.rejects(other.fit(known).next(), { tag: "task", message: /has rank \d+ on .*, the trainer 7/ });
  const trainer = await createTrainer(session, { labels: LABELS, init: { task: "nobody" } });
  await t.rejects(trainer.fit(known).next(), { tag: "task", message: /"nobody"/ });
});

t.test("a task to go on from: its labels by their names, and nothing of it is left out in silence", async (t) => {
  const session = await tiny(NODE);
  t.teardown(() => session.close());
  const known = examples(NODE, session, 12, 4);
  const first = await createTrainer(session, { labels: LABELS, seed: 2, privateTerms: 1 });
  for await (const _ of first.fit(known, { epochs: 2 }));
  const mine = await first.task({ id: "mine", dtype: F32 });
  const turned = [...LABELS].reverse();
  const next = await createTrainer(session, { labels: turned, privateTerms: 1 });
  await next.begin(mine);
  const [before, after] = [await first.predict(known), await next.predict(known)];
  for (const [i, row] of after.entries()) t.ok(difference(row, [...before[i]!].reverse()) < 1e-5, `${row}`);

  const plain = await createTrainer(session, { labels: LABELS });
  await t.rejects(plain.begin(mine), { tag: "task", message: /"mine" has private terms of ".*", which this trainer/ });
  const lora = await createTrainer(session, { labels: LABELS, train: "lora", init: "mean", privateTerms: 2 });
  for await (const { loss } of lora.fit(known, { steps: 1 })) t.ok(loss > 0);
  await session.addTask("mine", mine);
  const from = await createTrainer(session, { labels: LABELS, train: "lora", init: { task: "mine" } });
  for await (const _ of from.fit(known, { steps: 1, learningRates: { terms: 0, head: 0 } }));
  for (const [i, row] of (await from.predict(known)).entries())
    t.ok(difference(row, [...before[i]!]) < 1e-4, "a LoRA of coefficients and private terms answers as they do");
});

t.test("examples that cannot be learned from are refused before anything runs", async (t) => {
  const session = await tiny(NODE);
  t.teardown(() => session.close());
  const trainer = await createTrainer(session, { labels: LABELS });
  const known = examples(NODE, session, 8, 1);
  const fit = (all: Example[], options = {}): Promise<unknown> => trainer.fit(all, options).next();
  await t.rejects(fit(known.map((one) => ({ ...one, label: "even" }))), {
    name: "RangeError",
    message: /8 examples have one label only, "even"/,
  });
  await t.rejects(fit([]), { name: "RangeError", message: "fit: there are no examples" });
  await t.rejects(fit([...known, { ...known[0]!, label: "evn" }]), {
    name: "RangeError",
    message: /example 8: the label "evn" is none of the trainer's; did you mean even\?/,
  });
  await t.rejects(fit([...known, { ...known[0]!, label: 3 }]), { message: /example 8: the label 3/ });
  await t.rejects(fit([{ text: " ", label: 0 }]), { message: /example 0: its text is empty/ });
  await t.rejects(fit([{ text: "a", label: 0 }]), { name: "TypeError", message: /no `encode`/ });
  await t.rejects(fit([{ label: 0 }]), { name: "TypeError", message: /neither text nor feeds/ });
  await t.rejects(fit([{ ...known[0]!, weight: NaN }]), { message: /example 0: its weight is NaN/ });
  const soft = (target: number[]): Example[] => [...known, { feeds: known[0]!.feeds, target }];
  await t.rejects(fit(soft([0.5, 0.5])), {
    name: "RangeError",
    message: /example 8: its target has 2 probabilities, there are 3 labels/,
  });
  await t.rejects(fit(soft([0.5, 0.4, 0])), {
    name: "RangeError",
    message: /example 8: the probabilities of its target sum to 0.9/,
  });
  await t.rejects(fit(soft([1.5, -0.5, 0])), {
    name: "RangeError",
    message: /example 8: its target has the probability -0.5/,
  });
  await t.rejects(fit(soft([NaN, 0.5, 0.5])), {
    name: "RangeError",
    message: /example 8: its target has the probability NaN/,
  });
  await t.rejects(fit([...known, { ...known[0]!, target: [1, 0, 0] }]), {
    name: "TypeError",
    message: /example 8: expected a label or a target, got both/,
  });
  await t.rejects(fit([{ feeds: known[0]!.feeds }]), {
    name: "TypeError",
    message: /example 0: expected a label or a target, got neither/,
  });
  await t.rejects(fit(known, { steps: 1.5 }), { name: "RangeError", message: /steps/ });
  await t.rejects(fit(known, { epochs: 0 }), { name: "RangeError", message: /epochs/ });
  await t.rejects(fit(known, { holdout: 1 }), { name: "RangeError", message: /holdout/ });
  await t.rejects(fit(known, { temperature: 0 }), { name: "RangeError", message: /temperature/ });
  await t.rejects(fit(known, { decay: "constant" }), {
    name: "RangeError",
    message: /decay: expected "none", "linear"/,
  });
  const bare = await createTrainer(session, { labels: LABELS, head: false });
  await t.rejects(bare.fit(known, { temperature: 0.5 }).next(), {
    name: "RangeError",
    message: /needs a trainer with a head/,
  });
  const short = {
    ...known[0]!,
    feeds: { ...known[0]!.feeds!, input_ids: new NODE.Tensor("int64", new BigInt64Array(2), [1, 2]) as never },
  };
  await t.rejects(fit([...known, short], { batch: 9 }), {
    name: "TypeError",
    message: /the input "input_ids" of example \d+ is \[1, \d+\], another one's \[1, \d+\]/,
  });
  await t.rejects(trainer.task(), { name: "TypeError", message: /call fit first/ });
  await t.rejects(createTrainer(session, { labels: ["one"] }), { name: "RangeError", message: /labels/ });
  await t.rejects(createTrainer(session, { labels: ["one", ""] }), { name: "RangeError", message: /none empty/ });
  await t.rejects(createTrainer(session, { labels: LABELS, rank: 0 }), { name: "RangeError", message: /rank/ });
  await t.rejects(createTrainer(session, { labels: LABELS, head: "nothing" }), {
    name: "RangeError",
    message: /the session trains "classifier", not "nothing"; create it with reserve: \{ head: "nothing" \}/,
  });
  const plain = await tiny(NODE, { trainable: false });
  t.teardown(() => plain.close());
  await t.rejects(createTrainer(plain, { labels: LABELS }), { name: "TypeError", message: /trainable: true/ });
});

t.test(
  "a task's head is a start too; what has a rate of 0 stays; steps end a fit; a task file can be gone on with",
  async (t) => {
    const session = await tiny(NODE);
    t.teardown(() => session.close());
    const labels = ["a", "b", "c"];
    const trainer = await createTrainer(session, { labels, init: { task: "three" } });
    const known = examples(NODE, session, 24, 6);
    await session.switchTask("three");
    const logits = await outputOf(session, known[0]!.feeds as never);
    const exps = [...logits].map(Math.exp);
    const own = exps.map((value) => value / exps.reduce((a, b) => a + b));
    await trainer.begin("three");
    t.ok(difference((await trainer.predict(known.slice(0, 1)))[0]!, own) < 1e-5, "it answers as the task does");
    const steps: number[] = [];
    for await (const { step, steps: all } of trainer.fit(known, { steps: 5, batch: 8, learningRates: { head: 0 } }))
      steps.push(step, all);
    t.same(steps, [1, 5, 2, 5, 3, 5, 4, 5, 5, 5]);
    const file = await trainer.task({ dtype: F32 });
    await session.addTask("mine", file);
    const head = async (id: string): Promise<string> => {
      const { parameters, bytes } = await session.pack.load(id);
      return parameters
        .map(({ tensor: { byteOffset, byteLength } }) =>
          Buffer.from(bytes.subarray(byteOffset, byteOffset + byteLength)).toString("hex"),
        )
        .sort()
        .join();
    };
    t.equal(await head("mine"), await head("three"));
    const learned = await trainer.predict(known.slice(0, 3));
    await trainer.begin("two");
    t.ok(difference((await trainer.predict(known.slice(0, 1)))[0]!, [...learned[0]!]) > 1e-3);
    await trainer.begin(file);
    t.ok((await trainer.predict(known.slice(0, 3))).every((row, i) => difference(row, [...learned[i]!]) < 1e-6));
    await t.rejects(trainer.begin("nobody"), { tag: "task", message: /"nobody"/ });
    const foreign = file.slice();
    foreign[20]! ^= 1;
    await t.rejects(trainer.begin(foreign), { tag: "format", message: /checksum/ });
    const [one] = session.pack.modules;
    const small = await createTrainer(session, { labels, modules: [one!.name], init: { task: "three" } });
    t.ok(
      small.size.terms * session.pack.modules.length <= 1.01 * trainer.size.terms,
      `${small.size.terms} of ${trainer.size.terms}`,
    );
    await t.rejects(createTrainer(session, { labels, modules: ["nothing"] }), {
      name: "RangeError",
      message: /no "nothing"/,
    });
  },
);

t.test("a temperature divides the logits that meet targets, and gradients agree", async (t) => {
  const session = await tiny(NODE);
  t.teardown(() => session.close());
  const trainer = await createTrainer(session, { labels: LABELS, init: { task: "three" } });
  await trainer.begin("three");
  const known = examples(NODE, session, 12, 6);
  const answers = await trainer.predict(known);
  const lossAt = (temperature: number): number =>
    known.reduce((sum, { label }, i) => {
      const powers = [...answers[i]!].map((p) => p ** (1 / temperature));
      return (
        sum -
        Math.log(powers[typeof label === "number" ? label : LABELS.indexOf(label!)]! / powers.reduce((a, b) => a + b)) /
          known.length
      );
    }, 0);
  // The first step compares the gradient of head and terms with the loss.
  const { value } = await trainer
    .fit(known, { steps: 1, batch: 12, temperature: 0.25, learningRates: { terms: 1e-9, head: 1e-9 } })
    .next();
  t.ok(Math.abs(value!.loss - lossAt(0.25)) < 1e-4, `${value!.loss}, ${lossAt(0.25)}`);
  t.ok(Math.abs(lossAt(1) - lossAt(0.25)) > 0.01, "not what it is undivided");
});

t.test("soft targets are learned as they are", async (t) => {
  const session = await tiny(NODE);
  t.teardown(() => session.close());
  const trainer = await createTrainer(session, { labels: LABELS, init: { task: "three" }, seed: 1 });
  const target = [0.6, 0.3, 0.1];
  // Answers with one most probable label are enough: probabilities tell more than labels.
  const known = examples(NODE, session, 16, 3).map(({ feeds }) => ({ feeds, target }));
  for await (const _ of trainer.fit(known, { epochs: 30, batch: 8 }));
  for (const row of await trainer.predict(known.slice(0, 4))) t.ok(difference(row, target) < 0.05, String(row));
});

t.test("aborting and leaving keep what was learned; a loss that explodes stops with the last good state", async (t) => {
  const session = await tiny(NODE);
  t.teardown(() => session.close());
  const known = examples(NODE, session, 32, 9);
  const trainer = await createTrainer(session, { labels: LABELS, seed: 2, init: "random" });
  const abort = new AbortController();
  const run = async (): Promise<void> => {
    for await (const { step } of trainer.fit(known, { epochs: 4, batch: 8, signal: abort.signal }))
      if (step === 3) abort.abort(new Error("enough"));
  };
  await t.rejects(run(), /enough/);
  const kept = Buffer.from(await trainer.task());
  for await (const _ of trainer.fit(known, { epochs: 1, batch: 8 })) break;
  t.notOk(Buffer.from(await trainer.task()).equals(kept), "a loop that is left has taken its step");

  const before = await trainer.predict(known.slice(0, 2));
  const wild = async (): Promise<void> => {
    for await (const _ of trainer.fit(known, {
      epochs: 20,
      batch: 8,
      learningRates: { terms: 1e20, head: 1e20 },
      clip: Infinity,
      warmup: 0,
    }));
  };
  await t.rejects(wild(), { tag: "backend", message: /step \d+: the loss is .+ gone astray/ });
  const after = await trainer.predict(known.slice(0, 2));
  t.ok(after.flatMap((row) => [...row]).every(Number.isFinite), "no number is lost");
  t.ok(before.length === after.length);
});

t.test("a provider whose gradients are wrong is found before the first step", async (t) => {
  // No provider here computes wrongly, so results are bent on purpose.
  const bent: Ort = {
    ...NODE,
    InferenceSession: {
      async create(...given: [never]) {
        const session = await NODE.InferenceSession.create(...given);
        const run = session.run.bind(session) as (...of: unknown[]) => Promise<Record<string, { data: Float32Array }>>;
        session.run = (async (...of: unknown[]) => {
          const results = await run(...of);
          for (const [name, { data }] of Object.entries(results))
            if (name.endsWith("gradient")) data.forEach((g, i) => (data[i] = i % 2 ? -g : g));
          return results;
        }) as never;
        return session;
      },
    } as never,
  };
  const session = await tiny(bent);
  const trainer = await createTrainer(session, { labels: LABELS, init: "random" });
  t.teardown(() => session.close());
  await t.rejects(trainer.fit(examples(NODE, session, 16, 1)).next(), {
    tag: "backend",
    message: /computes gradients wrongly/,
  });
});

t.test("a hold-out leaves two of every label and takes a share of the rest", (t) => {
  const rows = Array.from({ length: 43 }, (_, i) => ({ label: i < 3 ? 0 : 1, i }));
  const { train, holdout } = splitHoldout(rows, 0.25, uniform(1));
  t.equal(train.length + holdout.length, 43);
  t.equal(holdout.filter(({ label }) => label === 0).length, 1);
  t.equal(holdout.filter(({ label }) => label === 1).length, 10);
  t.equal(new Set([...train, ...holdout].map(({ i }) => i)).size, 43);
  t.same(splitHoldout(rows, 0, uniform(1)).holdout, []);
  t.end();
});

t.test("batches have every row once, in chance order, and hardly pad", (t) => {
  const random = uniform(3);
  const rows = Array.from({ length: 203 }, (_, i) => ({ i }));
  const lengths = new Map(rows.map((row) => [row, 5 + Math.floor(random() * 28)]));
  const batches = toBatches(rows, 8, lengths, random);
  t.same(
    batches
      .flat()
      .map(({ i }) => i)
      .sort((a, b) => a - b),
    rows.map(({ i }) => i),
  );
  t.same(
    batches.map(({ length }) => length).sort((a, b) => a - b),
    [3, ...Array<number>(25).fill(8)],
  );
  const padded = (all: typeof batches): number =>
    all.reduce((sum, some) => sum + some.length * Math.max(...some.map((row) => lengths.get(row)!)), 0);
  const bare = [...lengths.values()].reduce((a, b) => a + b, 0);
  const asTheyCame = Array.from({ length: 26 }, (_, b) => rows.slice(8 * b, 8 * b + 8));
  t.ok(
    padded(batches) < 1.15 * bare && padded(asTheyCame) > 1.5 * bare,
    `${bare}, ${padded(batches)}, ${padded(asTheyCame)}`,
  );
  const tops = batches.map((some) => Math.max(...some.map((row) => lengths.get(row)!)));
  t.ok(
    tops.some((top, at) => at > 0 && top < tops[at - 1]!),
    "not in order of length",
  );
  t.not(
    String(
      toBatches(rows, 8, lengths, random)
        .flat()
        .map(({ i }) => i),
    ),
    String(batches.flat().map(({ i }) => i)),
  );
  t.end();
});

t.test("targets: weights, whose mean is 1", (t) => {
  const rows = [
    { label: 2, weight: 1 },
    { label: 0, weight: 3 },
    { label: 1, weight: 0 },
  ];
  const targets = targetsOf(rows, 4);
  t.ok(
    difference(targets, [0, 0, 0.75, 0, 2.25, 0, 0, 0, 0, 0, 0, 0]) < 1e-6,
    String(targets),
  );
  t.end();
});

// A visitor teaches that model in page-learn.test.ts.
if (soak)
  t.test("the real model: a few lines for each of two labels, on a pack that has not seen the task", async (t) => {
    const others = ["debtags-role", "debtags-game", "sections-0", "debtags-scope", "debtags-use", "debtags-interface"];
    const { bytes } = await packOf(
      others.map((task) => `adapters/own-seed/${task}`),
      { select: { kind: "k", k: 16 } },
    );
    const session = await open(NODE, data("minilm/model_fp16.onnx"), await openPack(bytes), { trainable: true });
    const encode = await createEncoder(NODE);
    const { labels, train, test } = await readTask("debtags-devel");
    const count = (label: number): number => train.filter(([, of]) => of === label).length;
    const [a, b] = labels.map((_, i) => i).sort((x, y) => count(y) - count(x)) as [number, number];
    const pick = (rows: readonly (readonly [string, number])[], label: number, most: number): Example[] =>
      rows
        .filter(([, of]) => of === label)
        .slice(0, most)
        .map(([text]) => ({ text, label: label === a ? 0 : 1 }));
    const trainer = await createTrainer(session, {
      labels: [labels[a]!, labels[b]!],
      encode: encode as never,
      seed: 1,
    });
    t.teardown(() => session.close());
    t.same(trainer.size, { terms: 12 * 8 * 2 * 16, head: 2 * 385 });
    for await (const _ of trainer.fit([...pick(train, a, 24), ...pick(train, b, 24)], { epochs: 6 }));
    const asked = [...pick(test, a, 40), ...pick(test, b, 40)];
    const answers = await trainer.predict(asked);
    const right = answers.filter(([first, second], i) => (first! > second! ? 0 : 1) === asked[i]!.label).length;
    t.ok(right >= 0.75 * asked.length, `${right} of ${asked.length}`);
    const file = await trainer.task();
    t.ok(file.length < 10_000, `${file.length} bytes`);
    await session.addTask("mine", file);
    await session.switchTask("mine");
    const { logits } = await session.run(encode(asked.slice(0, 8).map(({ text }) => text!)) as never);
    const values = (logits as { data: Float32Array }).data;
    asked
      .slice(0, 8)
      .forEach((_, i) => t.equal(values[2 * i]! > values[2 * i + 1]!, answers[i]![0]! > answers[i]![1]!, `row ${i}`));
  });

t.test("nodes that WebGPU is not exact enough for run on the CPU", (t) => {
  const options = { executionProviders: ["webgpu", "wasm"], graphOptimizationLevel: "all" };
  t.same(optionsFor(options, { exactNodes: ["a", "b"] }), {
    ...options,
    executionProviders: [{ name: "webgpu", forceCpuNodeNames: ["a", "b"] }, "wasm"],
  });
  const given = { executionProviders: [{ name: "webgpu", preferredLayout: "NHWC", forceCpuNodeNames: ["c"] }] };
  t.same(optionsFor(given, { exactNodes: ["a"] }), {
    executionProviders: [{ name: "webgpu", preferredLayout: "NHWC", forceCpuNodeNames: ["c", "a"] }],
  });
  for (const other of [{}, { executionProviders: ["wasm"] }]) t.equal(optionsFor(other, { exactNodes: ["a"] }), other);
  t.equal(optionsFor(options, {}), options);
  // Weights are not packed a second time.
  const extra = { session: { disable_prepacking: "1" } };
  t.same(optionsFor(options, { purpose: "train" }), { enableMemPattern: false, ...options, extra });
  const inspecting = { graphOptimizationLevel: "disabled", enableCpuMemArena: false, extra };
  t.same(optionsFor(options, { purpose: "inspect" }), inspecting);
  t.end();
});
