/**
 * The trainer: a task learned on a tiny model and on the real one, its file, its guards. learn-graph.test.ts checks
 * gradients.
 */

import { openPack } from "eigenlora";
import { buildPack, peftFiles, taskAdapter } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { createTrainer, type Example } from "eigenlora/train";
import t from "tap";
import { optionsFor } from "../support/internals/models.ts";
import { answersAlike, examples, F32, fitted, LABELS, tiny } from "../support/learning.ts";
import { concat, data, LOSSLESS } from "../support/packs.ts";
import { peftAgrees } from "../support/peft-agrees.ts";
import { soak } from "../support/required.ts";
import { difference, feeds, GOLDENS, MODES, NODE, ORTS, type Ort, open, outputOf } from "../support/sessions.ts";

for (const { name, ort } of ORTS) {
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
    await answersAlike(t, session, trainer, known.slice(0, 5));
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
  const [first, last] = await fitted(trainer, known, { epochs: 6 });
  t.ok(last < first, `${first} → ${last}`);
  await session.addTask("mine", await trainer.task({ dtype: F32 }));
  t.ok((await session.pack.load("mine")).terms.every(({ A, privateRank }) => A === undefined && privateRank === 2));
  await session.switchTask("mine");
  await answersAlike(t, session, trainer, known.slice(0, 1));
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
  const plain = await tiny(NODE, { trainable: false });
  t.teardown(async () => (await session.close(), plain.close()));
  const trainer = await createTrainer(session, { labels: LABELS });
  const known = examples(NODE, session, 8, 1);
  const { feeds } = known[0]!;
  const input_ids = new NODE.Tensor("int64", new BigInt64Array(2), [1, 2]) as never;
  const short = { ...known[0]!, feeds: { ...feeds!, input_ids } };
  const misspelt = { ...known[0]!, label: "evn" };
  const apart = /the input "input_ids" of example \d+ is \[1, \d+\], another one's \[1, \d+\]/;
  const fits: [name: string, examples: Example[], message: string | RegExp, options?: object][] = [
    ["RangeError", known.map((one) => ({ ...one, label: "even" })), /8 examples have one label only, "even"/],
    ["RangeError", [], "fit: there are no examples"],
    ["RangeError", [...known, misspelt], /example 8: the label "evn" is none of the trainer's; did you mean even\?/],
    ["RangeError", [...known, { ...known[0]!, label: 3 }], /example 8: the label 3/],
    ["RangeError", [{ text: " ", label: 0 }], /example 0: its text is empty/],
    ["TypeError", [{ text: "a", label: 0 }], /no `encode`/],
    ["TypeError", [{ label: 0 }], /neither text nor feeds/],
    ["RangeError", [{ ...known[0]!, weight: NaN }], /example 0: its weight is NaN/],
    ["TypeError", [{ feeds }], /example 0: has no label/],
    ["RangeError", known, /steps/, { steps: 1.5 }],
    ["RangeError", known, /epochs/, { epochs: 0 }],
    ["RangeError", known, /holdout/, { holdout: 1 }],
    ["RangeError", known, /temperature/, { temperature: 0 }],
    ["RangeError", known, /decay: expected "none" or "linear"/, { decay: "constant" }],
    ["TypeError", [...known, short], apart, { batch: 9 }],
  ];
  for (const [name, all, message, options = {}] of fits)
    await t.rejects(trainer.fit(all, options).next(), { name, message }, `${message}`);
  await t.rejects(trainer.task(), { name: "TypeError", message: /call fit first/ });
  const bare = await createTrainer(session, { labels: LABELS, head: false });
  const heads = { name: "RangeError", message: /needs a trainer with a head/ };
  await t.rejects(bare.fit(known, { temperature: 0.5 }).next(), heads);
  const reserve = /the session trains "classifier", not "nothing"; create it with reserve: \{ head: "nothing" \}/;
  for (const [name, on, options, message] of [
    ["RangeError", session, { labels: ["one"] }, /labels/],
    ["RangeError", session, { labels: ["one", ""] }, /none empty/],
    ["RangeError", session, { labels: LABELS, rank: 0 }, /rank/],
    ["RangeError", session, { labels: LABELS, head: "nothing" }, reserve],
    ["TypeError", plain, { labels: LABELS }, /trainable: true/],
  ] as const)
    await t.rejects(createTrainer(on, options), { name, message });
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

// A visitor teaches that model in page-learn.test.ts.
if (soak)
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
    for (const other of [{}, { executionProviders: ["wasm"] }])
      t.equal(optionsFor(other, { exactNodes: ["a"] }), other);
    t.equal(optionsFor(options, {}), options);
    // Weights are not packed a second time.
    const extra = { session: { disable_prepacking: "1" } };
    t.same(optionsFor(options, { purpose: "train" }), { enableMemPattern: false, ...options, extra });
    const inspecting = { graphOptimizationLevel: "disabled", enableCpuMemArena: false, extra };
    t.same(optionsFor(options, { purpose: "inspect" }), inspecting);
    t.end();
  });

/**
 * Learning from pictures: a tiny ViT (test/data/pipelines) learns a task of its own, which then answers in every mode.
 */
const VIT = data("pipelines/vit/onnx/model.onnx");
const PATTERNS = ["stripes", "checks", "plain"];

/** A picture of 8 × 8 with a pattern of its class, and noise of its number. */
function picture(label: number, number: number): InstanceType<typeof NODE.Tensor> {
  const values = Float32Array.from({ length: 3 * 64 }, (_, i) => {
    const [x, y] = [i % 8, Math.floor((i % 64) / 8)];
    const pattern = [y % 4 < 2, (x + y) % 2 === 0, true][label] ? 1 : -1;
    return pattern + 0.5 * Math.sin(12.9 * i + 78.2 * number);
  });
  return new NODE.Tensor("float32", values, [1, 3, 8, 8]);
}

const pictures = (from: number): { feeds: { pixel_values: InstanceType<typeof NODE.Tensor> }; label: string }[] =>
  Array.from({ length: 30 }, (_, i) => ({
    feeds: { pixel_values: picture(i % 3, from + i) },
    label: PATTERNS[i % 3]!,
  }));

t.test("a ViT learns from pictures", async (t) => {
  const adapters = await readAdapters(["birds", "fish"].map((name) => data(`pipelines/vit/adapters/${name}`)));
  const base = data("pipelines/vit/base.safetensors");
  const pack = await openPack(concat((await buildPack(adapters, { ...LOSSLESS, base })).chunks));
  const session = await open(NODE, VIT, pack, { trainable: true });
  const trainer = await createTrainer(session, { labels: PATTERNS, head: "classifier" });
  const [before, after] = await fitted(trainer, pictures(0), { steps: 80, batch: 10 });
  t.ok(after < before / 5, `the loss falls from ${before} to ${after}`);
  await pack.addTask("patterns", await trainer.task());
  await session.close();
  const fresh = pictures(1000);
  let first: Float32Array[] | undefined;
  for (const mode of MODES) {
    const served = await open(NODE, VIT, pack, { mode });
    await served.switchTask("patterns");
    const answers: Float32Array[] = [];
    for (const { feeds } of fresh) answers.push(await outputOf(served, feeds));
    const right = answers.filter(
      (logits, i) => PATTERNS[logits.indexOf(Math.max(...logits))] === fresh[i]!.label,
    ).length;
    t.ok(right >= 27, `${mode}: ${right} of ${fresh.length} pictures that were not seen`);
    first ??= answers;
    for (const [i, logits] of answers.entries()) t.ok(difference(logits, first[i]!) < 1e-4, `${mode}, picture ${i}`);
    await served.close();
  }
  await pack.close();
});
