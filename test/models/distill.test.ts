/**
 * Distilling on tiny models, through the API and the command line; in the soak on the real one, too.
 */
import { type ChildProcess, spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import { cp, mkdir, readdir, readFile, rm, symlink, writeFile } from "node:fs/promises";
import { basename, join } from "node:path";
import { openPack } from "eigenlora";
import { type Adapter, searchPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { type BatchFeeds, createTrainer, type DistillOptions, distill } from "eigenlora/train";
import t, { type Test } from "tap";
import { readTask } from "../../examples/minilm.js";
import { withTerms } from "../support/adapters.ts";
import { json, run, words } from "../support/command-line.ts";
import { fromRoot, workIn } from "../support/folder.ts";
import { uniform } from "../support/internals/base.ts";
import { MeanDivergence } from "../support/internals/learn.ts";
import { parseTaskFile } from "../support/internals/runtime.ts";
import { data, LOSSLESS } from "../support/packs.ts";
import { soak } from "../support/required.ts";
import {
  feeds,
  GOLDENS,
  model,
  NODE,
  ORTS,
  type Ort,
  open,
  outputOf,
  packBytes,
  type Session,
} from "../support/sessions.ts";
import { tinyLines, tinyModel } from "../support/tiny-model.ts";

const SMALL = { select: { kind: "k", k: 3 } } as const;

async function tiny(
  ort: Ort,
  options: Parameters<typeof packBytes>[2] = SMALL,
  adapters = ["adapters"],
): Promise<Session> {
  return open(ort, model("torchscript"), await openPack(await packBytes(adapters, "base", options)), {
    trainable: true,
  });
}

async function adapterOf(t: { teardown(work: () => Promise<void>): void }, path: string): Promise<Adapter> {
  const [adapter] = await readAdapters([data(path)]);
  t.teardown(() => adapter!.close());
  return adapter!;
}

/** Inputs of the tiny model, random ids. */
function inputs(ort: Ort, session: Session, count: number): BatchFeeds[] {
  const random = uniform(11);
  const like = feeds(ort, session, [0]);
  const length = GOLDENS.feeds["input_ids"]![0]!.length;
  return Array.from({ length: count }, () => {
    const ids = Array.from({ length }, () => 1 + Math.floor(random() * 60));
    const own = { ...like, input_ids: new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, length]) };
    if ("attention_mask" in own)
      own["attention_mask"] = new ort.Tensor("int64", new BigInt64Array(length).fill(1n), [1, length]);
    return own as BatchFeeds;
  });
}

/** log softmax */
function logs(logits: Float32Array): number[] {
  const total = Math.log([...logits].reduce((sum, value) => sum + Math.exp(value), 0));
  return [...logits].map((value) => value - total);
}

/** Mean KL between two tasks of two sessions, from runs of their own. */
async function divergence(
  ours: [Session, string],
  theirs: [Session, string],
  all: readonly BatchFeeds[],
): Promise<number> {
  let sum = 0;
  await ours[0].switchTask(ours[1]);
  await theirs[0].switchTask(theirs[1]);
  for (const one of all) {
    const [q, p] = [logs(await outputOf(ours[0], one as never)), logs(await outputOf(theirs[0], one as never))];
    sum += p.reduce((part, value, c) => part + Math.exp(value) * (value - q[c]!), 0);
  }
  return sum / all.length;
}

for (const { name, ort } of ORTS) {
  t.test(`${name}: a distilled task answers more like its adapter; a head whose rate is 0 stays`, async (t) => {
    const session = await tiny(ort);
    const teacher = await tiny(ort, LOSSLESS, ["adapters/three"]);
    t.teardown(async () => (await session.close(), teacher.close()));
    const adapter = await adapterOf(t, "sessions/adapters/three");
    const all = inputs(ort, session, 64);
    const seen: number[] = [];
    const made = await distill(session, {
      adapter,
      feeds: all,
      steps: 40,
      batch: 16,
      learningRates: { head: 0 },
      onStep: ({ step }) => seen.push(step),
    });
    t.match(made, { id: "three", steps: 40, kept: "distilled" });
    t.equal(seen.length, 40);
    t.ok(made.divergenceAfter < 0.5 * made.divergenceBefore, `${made.divergenceBefore} → ${made.divergenceAfter}`);
    t.same([...session.tasks.keys()], ["five", "three", "two"], "the pack is as it was");
    t.equal(session.task, null, "the session too");

    await session.addTask("distilled", made.file);
    const before = await divergence([session, "three"], [teacher, "three"], all);
    const after = await divergence([session, "distilled"], [teacher, "three"], all);
    t.ok(after < 0.5 * before, `by the sessions' own runs: ${before} → ${after}`);
    const [own, first] = [session.tasks.get("distilled")!, session.tasks.get("three")!];
    t.same(
      [own.metadata, own.adapterBytes, own.brings, own.bytes],
      [first.metadata, first.adapterBytes, first.brings, first.bytes],
    );
    const bytesOf = async (id: string): Promise<string[]> => {
      const { parameters, bytes } = await session.pack.load(id);
      return parameters
        .map(({ tensor: { byteOffset, byteLength } }) =>
          Buffer.from(bytes.subarray(byteOffset, byteOffset + byteLength)).toString("hex"),
        )
        .sort();
    };
    t.same(await bytesOf("distilled"), await bytesOf("three"));
  });
}

t.test("a task that shares one side keeps to its share, and trains what is its own", async (t) => {
  const adapter = await adapterOf(t, "sessions/adapters/three");
  const other = withTerms(adapter, ({ Bt, ...term }, name) => {
    const random = uniform(name.length);
    return { ...term, Bt: Bt.map((value) => value * (2 * random() - 1)) };
  });
  const { chunks, report } = await searchPack([adapter, { ...other, id: "other" }], {
    goal: { kind: "error", max: 0.5 },
  });
  t.ok(report.shared!.A.tasks === 2 && report.shared!.B.tasks === 0, JSON.stringify(report.shared));
  const session = await open(NODE, model("torchscript"), await openPack(new Blob(chunks as BlobPart[])), {
    trainable: true,
  });
  const teacher = await tiny(NODE, LOSSLESS, ["adapters/three"]);
  t.teardown(async () => (await session.close(), teacher.close()));
  const all = inputs(NODE, session, 64);
  const made = await distill(session, { adapter, feeds: all, steps: 60, batch: 16 });
  t.equal(made.kept, "distilled");
  await session.addTask("distilled", made.file);
  const before = await divergence([session, "three"], [teacher, "three"], all);
  const after = await divergence([session, "distilled"], [teacher, "three"], all);
  t.ok(after < 0.7 * before, `by the sessions' own runs: ${before} → ${after}`);
  const forms = async (id: string) => {
    const { terms } = await session.pack.load(id);
    return terms.map(({ rank, A, ownA, B, ownBt }) => [rank, A?.basis, ownA?.rows, B?.basis, ownBt?.rows]);
  };
  t.same(await forms("distilled"), await forms("three"));
  const trainer = await createTrainer(session, { labels: ["a", "b", "c"] });
  await t.rejects(trainer.begin("three"), /another share of the components .* make one with `init: { task: "three" }`/);
});

t.test("the hold-out is judged as the sessions judge it; the head is trained; the better is kept", async (t) => {
  const session = await tiny(NODE);
  const teacher = await tiny(NODE, LOSSLESS, ["adapters/five"]);
  t.teardown(async () => (await session.close(), teacher.close()));
  const adapter = await adapterOf(t, "sessions/adapters/five");
  const [one] = inputs(NODE, session, 1);
  // All texts are equal, so that the hold-out is known.
  const all = Array.from({ length: 12 }, () => one!);
  const made = await distill(session, { adapter, feeds: all, steps: 10, batch: 4 });
  await session.addTask("distilled", made.file);
  const [before, after] = [
    await divergence([session, "five"], [teacher, "five"], [one!]),
    await divergence([session, "distilled"], [teacher, "five"], [one!]),
  ];
  t.ok(Math.abs(before - made.divergenceBefore) < 1e-5, `${before}, ${made.divergenceBefore}`);
  t.ok(Math.abs(after - made.divergenceAfter) < 1e-5, `${after}, ${made.divergenceAfter}`);
  const head = async (id: string): Promise<Uint8Array> => {
    const { parameters, bytes } = await session.pack.load(id);
    const { byteOffset, byteLength } = parameters.find(({ name }) => name === "classifier.weight")!.tensor;
    return bytes.slice(byteOffset, byteOffset + byteLength);
  };
  t.notOk(Buffer.from(await head("distilled")).equals(await head("five")));

  // Nothing is lost here, so high rates can only do harm.
  const kept = await distill(teacher, {
    adapter,
    feeds: inputs(NODE, teacher, 16),
    steps: 3,
    batch: 8,
    learningRates: { terms: 1 },
  });
  t.ok(
    kept.divergenceBefore < 1e-6 && kept.divergenceAfter > 1e-3,
    `${kept.divergenceBefore} → ${kept.divergenceAfter}`,
  );
  t.equal(kept.kept, "projected");
  t.same(parseTaskFile(kept.file, "five").blob, (await teacher.pack.load("five")).bytes);
  const still = await distill(teacher, { adapter, feeds: inputs(NODE, teacher, 16), steps: 3, batch: 8 });
  t.ok(
    still.divergenceAfter < 0.01 * kept.divergenceAfter,
    `with nothing to win back steps are short: ${still.divergenceBefore} → ${still.divergenceAfter}`,
  );
  const alike = new MeanDivergence();
  alike.add([{ probabilities: [0.5, 0.5 - 1e-9] }], [Float32Array.of(0, 0)]);
  t.equal(alike.mean, 0, "never below 0, whose root would be no rate");
});

t.test("what cannot be distilled is refused by name", async (t) => {
  const session = await tiny(NODE, SMALL, ["adapters/three", "adapters-more/dora", "adapters-more/bias-lora"]);
  t.teardown(() => session.close());
  const [three, two, dora, bias] = await Promise.all(
    ["adapters/three", "adapters/two", "adapters-more/dora", "adapters-more/bias-lora"].map((path) =>
      adapterOf(t, `sessions/${path}`),
    ),
  );
  const all = inputs(NODE, session, 8);
  const refused = (
    options: Partial<DistillOptions>,
    expected: { tag?: string; name?: string; message: RegExp },
  ): Promise<unknown> => t.rejects(distill(session, { adapter: three!, feeds: all, ...options }), expected);
  await refused({ adapter: two! }, { tag: "task", message: /no task "two"/ });
  await refused({ adapter: two!, task: "three" }, { tag: "task", message: /"three" has 3 labels, .*two.* 2/ });
  await refused(
    { adapter: dora! },
    { tag: "task", message: /"dora" cannot be distilled: it brings a DoRA magnitude of "bert/ },
  );
  await refused(
    { adapter: bias! },
    { tag: "task", message: /"bias-lora" cannot be distilled: it brings "bert.*" \(bias\)/ },
  );
  const alone = await tiny(NODE, { select: { kind: "k", k: 0 }, rank: 2 });
  t.teardown(() => alone.close());
  await t.rejects(distill(alone, { adapter: three!, feeds: all }), {
    tag: "task",
    message: /"three" cannot be distilled: it has residual rows, .* packs with a `step` alone/,
  });
  await refused({ feeds: all.slice(0, 7) }, { name: "RangeError", message: /expected 8 texts at least, .* got 7/ });
  await refused({ texts: ["a"] }, { name: "TypeError", message: /got texts and feeds, expected one of them/ });
  await refused({ feeds: undefined, texts: ["a"] }, { name: "TypeError", message: /need `encode`/ });
  await refused({ steps: 1.5 }, { name: "RangeError", message: /steps/ });
  await refused({ steps: -1 }, { name: "RangeError", message: /steps/ });
  await refused({ batch: 0 }, { name: "RangeError", message: /batch/ });
  await refused({ holdout: 1 }, { name: "RangeError", message: /holdout/ });
  const plain = await open(NODE, model("torchscript"), await openPack(await packBytes(["adapters"], "base")));
  t.teardown(() => plain.close());
  await t.rejects(distill(plain, { adapter: three!, feeds: all }), { name: "TypeError", message: /trainable: true/ });
});

/**
 * A model with its tokenizer; adapters of a pack, whose last is distilled, and of a task that comes; texts; how to
 * distil.
 */
interface Case {
  readonly with: readonly string[];
  readonly packed: readonly string[];
  readonly added: string;
  readonly stranger: string;
  readonly lines: readonly string[];
  readonly how: readonly string[];
}

const ROLE = data("adapters/own-seed/debtags-role");

async function tinyCase(): Promise<Case> {
  const of = (id: string): string => data(`sessions/adapters/${id}`);
  const how = words`--steps 150 --batch 8 --tokens 16`;
  const packed = [of("three"), of("two")];
  return { with: await tinyModel(), packed, added: of("five"), stranger: ROLE, lines: tinyLines(24), how };
}

async function minilmCase(): Promise<Case> {
  const of = (id: string): string => data(`adapters/own-seed/debtags-${id}`);
  const { train } = await readTask("debtags-devel");
  return {
    with: ["--model", data("minilm/model_fp16.onnx")],
    packed: ["use", "game", "scope", "role"].map(of),
    added: of("devel"),
    stranger: data("sessions/adapters/two"),
    lines: train.slice(0, 24).map(([text]) => text),
    how: words`--steps 4 --batch 8 --tokens 16`,
  };
}

for (const [title, caseOf] of [["a tiny model", tinyCase], ...(soak ? [["MiniLM", minilmCase] as const] : [])] as const)
  t.test(`the command line, on ${title}`, async (t) => {
    const folder = workIn(t);
    const main = fromRoot("dist/src/cli/main.js");
    const runAlone = (from: string, args: readonly string[]): { stdout: string; stderr: string } =>
      spawnSync(process.execPath, [from, ...args], { encoding: "utf8", cwd: folder });
    const given = await caseOf();
    const last = given.packed.at(-1)!;
    const ids = given.packed.map((path) => basename(path));
    const [distilled, added] = [basename(last), basename(given.added)];
    await json(0, "pack", ...given.packed, "-o", "p.eigen", "--k", "6");
    await writeFile("lines.txt", given.lines.join("\n"));
    const files = await readdir(folder);
    const settings = words`${given.with} --text lines.txt ${given.how}`;
    const command = ["distill", "p.eigen", last, given.added, ...settings, "-o", "o.eigen"];

    // The first run is killed when its first task is done.
    const child = spawn(process.execPath, [main, ...command], { cwd: folder, stdio: "ignore" });
    const gone = new Promise<void>((resolve) => child.on("exit", () => resolve()));
    const partial = join(folder, "o.eigen.partial");
    const finished = async (): Promise<string[]> =>
      (await readdir(partial).catch(() => [])).filter((name) => !name.endsWith(".tmp"));
    while ((await finished()).length === 0 && child.exitCode === null)
      await new Promise((resolve) => setTimeout(resolve, 50));
    child.kill("SIGKILL");
    await gone;
    t.equal((await finished()).length, 1);
    const [name] = await finished();
    const whole = await readFile(join(partial, name!), "utf8");
    const damages = ["{}", whole.replace(/"file":\s*"...../, '"file": "AAAAA'), "", whole.slice(0, 1000), "null"];
    for (const damage of soak ? damages : damages.slice(1, 2)) {
      await writeFile(join(partial, name!), damage);
      t.match(await json(1, ...command), {
        error: {
          tag: "format",
          file: /o.eigen.partial/,
          message: /is damaged: delete it, and the task is distilled again/,
        },
      });
    }
    // A run without gain says so: here its only task was finished before, and kept as it was.
    await mkdir(join(folder, "q.eigen.partial"));
    await writeFile(join(folder, "q.eigen.partial", name!), whole.replace('"distilled"', '"projected"'));
    const nothing = await run("distill", "p.eigen", given.added, ...settings, "-o", "q.eigen");
    t.match(nothing.stderr, /^warning: no task got better than it was, .* more than --steps \d+, or more text$/m);
    await rm(join(folder, "q.eigen"));
    await writeFile(join(partial, name!), whole);
    const made = await json(0, ...command);
    t.match(made, { file: "o.eigen", seconds: Number });
    t.match(made.tasks, [
      { id: added, added: true, resumed: true },
      { id: distilled, added: false, resumed: false, kept: "distilled" },
    ]);
    for (const { id, divergence } of made.tasks) {
      t.ok(divergence.after < 0.9 * divergence.before, `${id}: ${divergence.before} → ${divergence.after}`);
    }
    t.same(await readdir(folder), [...files, "o.eigen"].sort(), "nothing is left beside it");
    t.equal((await json(0, "verify", "o.eigen")).ok, true);
    const [before, after] = [await openPack(join(folder, "p.eigen")), await openPack(join(folder, "o.eigen"))];
    t.teardown(async () => (await before.close(), after.close()));
    t.equal(after.basisId, before.basisId);
    t.same([...after.tasks.keys()], [...before.tasks.keys(), added]);
    for (const id of ids) {
      const same = Buffer.from((await before.load(id)).bytes).equals((await after.load(id)).bytes);
      t.equal(same, id !== distilled, id);
      t.same(after.tasks.get(id)!.metadata, before.tasks.get(id)!.metadata);
    }

    await distillInPlace(t, folder, { main, command });

    await writeFile(join(folder, "empty.txt"), "\n \n");
    await writeFile(join(folder, "short.txt"), "one\ntwo\none\n");
    const refuse = async (status: number, expected: object, ...changed: string[]): Promise<void> => {
      t.match(await json(status, ...command, "--force", ...changed), { error: expected }, changed.join(" "));
    };
    await refuse(1, { tag: "source", message: /empty.txt: has no text/ }, "--text", "empty.txt");
    await refuse(1, { message: /expected 8 texts at least, .* got 2/ }, "--text", "short.txt");
    await refuse(1, { tag: "source", message: /missing.txt/ }, "--text", "missing.txt");
    await refuse(
      1,
      { tag: "source", message: /nowhere.json: there is no tokenizer.*--tokenizer/ },
      "--tokenizer",
      "nowhere.json",
    );
    await refuse(2, { tag: "usage", message: /--steps -1/ }, "--steps", "-1");
    await refuse(2, { tag: "usage", message: /stepps/ }, "--stepps", "3");
    t.match(await json(2, "distill", "p.eigen", last, "-o", "x"), {
      error: { tag: "usage", message: /missing --model/ },
    });
    const { stranger } = given;
    const other = await json(1, "distill", "p.eigen", stranger, ...settings, "-o", "x.eigen");
    const message = new RegExp(basename(stranger));
    t.match(other, { error: { tag: "adapter", message } }, "an adapter of another base");

    // A fresh install has none of the package's optional peers.
    const root = fromRoot("");
    const alone = join(folder, "alone");
    await mkdir(join(alone, "node_modules"), { recursive: true });
    await cp(join(root, "dist"), join(alone, "dist"), { recursive: true });
    await cp(join(root, "package.json"), join(alone, "package.json"));
    const without = (): object =>
      JSON.parse(runAlone(join(alone, "dist/src/cli/main.js"), [...command, "--force", "--json"]).stdout);
    t.match(without(), {
      error: {
        tag: "backend",
        message:
          /needs the package onnxruntime-node: npm install onnxruntime-node; where .* NuGet: ONNXRUNTIME_NODE_INSTALL=skip npm install onnxruntime-node/,
      },
    });
    await symlink(join(root, "node_modules/onnxruntime-node"), join(alone, "node_modules/onnxruntime-node"));
    t.match(without(), {
      error: { tag: "backend", message: /needs the package @huggingface\/tokenizers: npm install/ },
    });
  });

/** Distils a pack in place, which nobody else may write to meanwhile. */
async function distillInPlace(
  t: Test,
  folder: string,
  { main, command: given }: { main: string; command: readonly string[] },
): Promise<void> {
  const pack = join(folder, "q.eigen");
  const command = given.map((word) => (/^[op]\.eigen$/.test(word) ? "q.eigen" : word)).concat("--force");
  const names = async (): Promise<string[]> => (await readdir(folder)).filter((name) => name.startsWith("q."));
  /** Starts distilling, and acts when the first of its two tasks is done. @returns how it ended */
  const meanwhile = async (
    act: (child: ChildProcess) => unknown,
  ): Promise<[code: number | null, signal: string | null]> => {
    const child = spawn(process.execPath, [main, ...command], { cwd: folder, stdio: "ignore" });
    const gone = once(child, "exit") as Promise<[number | null, string | null]>;
    const done = async (): Promise<string[]> => readdir(`${pack}.partial`).catch(() => []);
    while (!(await done()).some((name) => !name.endsWith(".tmp")) && child.exitCode === null)
      await new Promise((resolve) => setTimeout(resolve, 20));
    await act(child);
    return gone;
  };
  const again = async (): Promise<void> => {
    await cp(join(folder, "p.eigen"), pack);
    await rm(`${pack}.partial`, { recursive: true, force: true });
  };

  if (soak) {
    await again();
    t.same(await meanwhile((child) => child.kill("SIGINT")), [null, "SIGINT"]);
    t.same(await names(), ["q.eigen", "q.eigen.partial"], "Ctrl-C leaves what is finished and no lock");
    t.ok((await readFile(pack)).equals(await readFile(join(folder, "p.eigen"))), "and the pack as it was");
  }

  await again();
  const ended = await meanwhile(async () => t.ok((await names()).includes("q.eigen.lock"), "others wait"));
  t.same(ended, [0, null]);
  t.equal((await json(0, "verify", "q.eigen")).ok, true);
  t.same(await names(), ["q.eigen"]);
}

/** Distilling on many machines: parts of tasks that `assemble` turns into a pack. */
t.test("tasks distilled in parts make the pack of one part, byte for byte", async (t) => {
  const folder = workIn(t);
  await writeFile(join(folder, "lines.txt"), tinyLines(60).join("\n"));
  const [a, b, c] = ["three", "five", "two"].map((id) => data(`sessions/adapters/${id}`)) as [string, string, string];
  await json(0, "hub", "shard", a, b, c, "-o", "a.part");
  await json(0, "hub", "merge", "a.part", "--k", "3", "-o", "basis.eigen");
  const asked = [...(await tinyModel()), "--text", "lines.txt"];
  const how = [...asked, "--steps", "30", "--batch", "8", "--dtype", "coefficients=int8,head=f16"];
  const distil = (status: number, ...args: string[]): Promise<Record<string, any>> =>
    json(status, "distill", "basis.eigen", ...args);

  const first = await distil(0, a, ...how, "--part", "-o", "1.part");
  t.match(first, { file: "1.part", adapters: 1, present: false, residual: [{ id: "three", total: Number }] });
  t.match(first.tasks, [{ id: "three", kept: "distilled", added: true, resumed: false }]);
  t.match(await distil(0, a, ...how, "--part", "-o", "1.part"), { present: true }, "it is there already");
  t.match(await distil(2, a, ...how, "--steps", "5", "--part", "-o", "1.part"), {
    error: { tag: "usage", message: /1.part: already exists.*--force/ },
  });
  await distil(0, b, ...how, "--part", "-o", "2.part");
  await distil(0, b, a, ...how, "--part", "-o", "both.part");
  await json(0, "hub", "assemble", "basis.eigen", "2.part", "1.part", "-o", "parts.eigen");
  await json(0, "hub", "assemble", "basis.eigen", "both.part", "-o", "one.eigen");
  t.ok((await readFile(join(folder, "parts.eigen"))).equals(await readFile(join(folder, "one.eigen"))));
  t.notOk(
    (await readdir(folder)).some((name) => /partial|lock/.test(name)),
    "nothing is left beside them",
  );

  const pack = await openPack(join(folder, "one.eigen"));
  t.teardown(() => pack.close());
  const { terms } = await pack.load("three");
  t.same([...new Set(terms.flatMap(({ A, B }) => [A!.tensor.dtype, B!.tensor.dtype]))], ["int8"]);

  t.match(await json(1, "distill", "one.eigen", a, ...how, "--part", "-o", "x.part"), {
    error: { tag: "task", message: /one.eigen has a task "three" already/ },
  });
  t.match(await distil(2, c, ...asked, "--dtype", "int8", "-o", "x.eigen"), {
    error: { tag: "usage", message: /--dtype needs --part/ },
  });
  t.match(await distil(2, c, ...how, "--part", "--key", "key.pem", "-o", "x.part"), {
    error: { tag: "usage", message: /--key and --part exclude each other: parts are not signed/ },
  });
});
