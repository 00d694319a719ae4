/**
 * Packs judged by answers, with text that the program makes: through the API and the command line, on the real model
 * and adapters.
 */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { readdir, writeFile } from "node:fs/promises";
import { basename } from "node:path";
import { openPack, type Pack } from "eigenlora";
import { type Adapter, buildPack, type WorkProgress } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { createEigenSession, createEngine } from "eigenlora/onnxruntime";
import { type ByAnswersOptions, distill, type Encode, packByAnswers } from "eigenlora/train";
import * as ort from "onnxruntime-node";
import t, { type Test } from "tap";
import {
  createEncoder,
  labelOf,
  model,
  readReference,
  readTask,
  runBatches,
  toBatches,
} from "../../examples/minilm.js";
import { json, run } from "../support/command-line.ts";
import { workIn } from "../support/folder.ts";
import { modelBase } from "../support/internals/learn.ts";
import { data } from "../support/packs.ts";
import { soak } from "../support/required.ts";
import { tinyModel } from "../support/tiny-model.ts";

ort.env.logLevel = "error";
const ROLE = "debtags-role";

async function adaptersOf(t: Test, ids: readonly string[]): Promise<Adapter[]> {
  const adapters = await readAdapters(ids.map((id) => data(`adapters/own-seed/${id}`)));
  t.teardown(() => Promise.all(adapters.map((adapter) => adapter.close())));
  return adapters;
}

if (soak)
  t.test("without text, questions are made of the tokenizer's words", async (t) => {
    const tokens = await createEncoder(ort);
    const encode = tokens as unknown as Encode;
    const adapters = await adaptersOf(t, [ROLE, "debtags-scope", "debtags-use", "debtags-game"]);
    const adapter = adapters.find(({ id }) => id === ROLE)!;
    const options = { gauge: "balanced", step: 0.08, select: { kind: "k", k: 12 } } as const;
    const pack = await openPack(new Blob((await buildPack(adapters, options)).chunks as BlobPart[]));
    const session = await createEigenSession(ort, model, pack, { trainable: true });
    t.teardown(async () => (await session.close(), pack.close()));
    const made = await distill(session, { adapter, encode, steps: 24 });
    t.equal(made.kept, "distilled");
    t.ok(made.divergenceAfter < 0.5 * made.divergenceBefore, `${made.divergenceBefore} → ${made.divergenceAfter}`);
    t.ok(made.agreement > 0.75 && made.agreement <= 1, `agreement ${made.agreement}`);
    const again = await distill(session, { adapter, encode, steps: 24 });
    t.same(again.file, made.file, "the same words each time");

    // The program has never seen these rows.
    const { test } = await readTask(ROLE);
    const batches = toBatches(
      tokens,
      test.map(([text]) => text),
    );
    const peft = (await readReference("own-seed")).get(ROLE)!.predictions;
    const same = async (task: string): Promise<number> => {
      await session.switchTask(task);
      return (await runBatches(session, batches)).filter((logits, row) => labelOf(logits) === peft[row]).length;
    };
    const before = await same(ROLE);
    await session.addTask("distilled", made.file);
    const after = await same("distilled");
    t.ok(after > before + test.length / 50, `${before} → ${after} of ${test.length}`);
  });

/** Words as the ids of a model of 64 tokens. */
const tiny: Encode = Object.assign(
  ((texts) => {
    const rows = texts.map((text) => text.split(" ").map((word) => 1 + ((word.charCodeAt(0) * 7 + word.length) % 60)));
    const width = Math.max(...rows.map(({ length }) => length));
    const dims = [rows.length, width];
    const of = (value: (id: number) => bigint) => {
      const data = new BigInt64Array(rows.length * width);
      for (const [r, row] of rows.entries()) data.set(row.map(value), r * width);
      return { type: "int64", dims, data };
    };
    return { input_ids: of(BigInt), attention_mask: of(() => 1n), token_type_ids: of(() => 0n) };
  }) satisfies Encode,
  {
    get_vocab: () => new Map(Array.from({ length: 52 }, (_, i) => [`##${i}ab`, i])),
    decode: ([id]: number[]) => String.fromCharCode((id! < 26 ? 65 : 71) + id!).repeat(2 + (id! % 3)),
  },
);

/** Fingerprints by module. */
async function fingerprintsOf(pack: Pack): Promise<Map<string, Uint8Array>> {
  const { bytes } = await pack.bases();
  return new Map(pack.modules.map(({ name, fingerprint: at = NaN }) => [name, bytes.slice(at, at + 256)]));
}

/** A model of 64 tokens; more threads than one would wait for each other. */
const file = data("sessions/torchscript.onnx");
const engine = createEngine(ort, { intraOpNumThreads: 1 });
const LINES = Array.from({ length: 48 }, (_, i) =>
  Array.from({ length: 5 + (i % 7) }, (_, k) =>
    "abcdefghijklmnop"[(3 * i + 5 * k * k) % 16]!.repeat(1 + ((i + k) % 4)),
  ).join(" "),
);

/** Adapters of a model of 64 tokens, under several names. */
async function tinyAdapters(t: Test, count: number): Promise<Adapter[]> {
  const names = ["two", "three", "five"];
  const adapters: Adapter[] = [];
  for (let round = 1; adapters.length < count; round++) {
    const some = names.slice(0, count - adapters.length);
    const rename = new Map(some.map((name) => [name, `${name}-${round}`]));
    adapters.push(
      ...(await readAdapters(
        some.map((name) => data(`sessions/adapters/${name}`)),
        { rename },
      )),
    );
  }
  t.teardown(() => Promise.all(adapters.map((adapter) => adapter.close())));
  return adapters;
}

t.test("an encoder without words", async (t) => {
  const adapters = await tinyAdapters(t, 3);
  const pack = await openPack(new Blob((await buildPack(adapters)).chunks as BlobPart[]));
  const session = await createEigenSession(ort, file, pack, { trainable: true });
  t.teardown(async () => (await session.close(), pack.close()));
  const adapter = adapters[0]!;
  const silent: Encode = (...given) => tiny(...given);
  await t.rejects(distill(session, { adapter, encode: silent }), {
    name: "TypeError",
    message: /texts or examples, or a tokenizer with get_vocab and decode/,
  });
  const wordless = Object.assign(silent, { get_vocab: () => new Map([["##a", 1]]), decode: () => "##a" });
  await t.rejects(distill(session, { adapter, encode: wordless }), { message: /has no words; give texts/ });
});

t.test("eight tasks share components; what is finished is not done again; a stopped call loses nothing", async (t) => {
  const adapters = await tinyAdapters(t, 8);
  const kept = new Map<string, string>();
  let written = 0;
  const finished: ByAnswersOptions["finished"] = {
    read: async (key) => kept.get(key),
    write: async (key, outcome) => void (written++, kept.set(key, outcome)),
  };
  const told: WorkProgress[] = [];
  const onProgress = (progress: WorkProgress): void => void told.push(progress);
  const options = { adapters, encode: tiny, steps: soak ? 24 : 6, agreement: 0.9, finished, onProgress };
  const { chunks, report } = await packByAnswers(engine, file, options);
  t.ok(told.some(({ detail }) => detail?.endsWith("to try a size")));
  t.equal(new Set(told.map(({ total }) => total)).size, 1, "one total");
  t.ok(
    told.every(({ done }, i) => i === 0 || done >= told[i - 1]!.done),
    "no step back",
  );
  t.match(told.at(-1), { done: told[0]!.total }, "all of it at the end");
  t.equal(report.bytes, Buffer.concat(chunks).length);
  t.same(report.left, []);
  t.same(
    report.answers.map(({ id }) => id),
    adapters.map(({ id }) => id),
  );
  for (const { id, agreement, kept } of report.answers)
    t.ok(kept === "closer" || agreement! >= 0.9, `${id}: ${kept}, ${agreement}`);
  const pack = await openPack(new Blob(chunks as BlobPart[]));
  t.same([...pack.tasks.keys()], [...report.answers.map(({ id }) => id)]);
  for (const { id, bytes } of report.answers) t.equal((await pack.stored(id)).length, bytes);
  t.same(report.notes, [], "apps recognise the model");
  const based = await buildPack(adapters, { base: data("sessions/base.safetensors"), select: { kind: "k", k: 1 } });
  t.same(
    await fingerprintsOf(pack),
    await fingerprintsOf(await openPack(new Blob(based.chunks as BlobPart[]))),
    "by its own weights, which are those of the checkpoint",
  );
  for (const [path, names] of [
    [data("sessions/int8.onnx"), undefined],
    [file, new Map([["layer", "nowhere"]])],
  ] as const)
    t.equal(await modelBase(path, adapters, names), undefined, "a model is no base where names or floats are missing");
  await pack.close();

  const before = written;
  const again = await packByAnswers(engine, file, options);
  t.equal(written, before, "nothing is done twice");
  t.ok(Buffer.concat(again.chunks).equals(Buffer.concat(chunks)));

  const controller = new AbortController();
  const stop = ({ detail }: WorkProgress): void => {
    if (detail === `${adapters[5]!.id} to try a size`) controller.abort();
  };
  const afresh = { ...options, onProgress: stop, signal: controller.signal, finished: undefined, seed: 1, steps: 1 };
  const stopped = await packByAnswers(engine, file, afresh);
  const left = new Set(stopped.report.left);
  t.ok(
    adapters.slice(5).every(({ id }) => left.has(id)),
    "those that had no turn are stored as without a model, and named",
  );
  const half = await openPack(new Blob(stopped.chunks as BlobPart[]));
  t.equal(half.tasks.size, 8);
  await half.close();

  if (soak) {
    // A size is given: so few small tasks take fewer bytes in a pack without a model.
    const few = await packByAnswers(engine, file, {
      ...{ ...options, agreement: undefined, bytes: report.bytes },
      ...{ adapters: adapters.slice(0, 6), finished: undefined },
    });
    t.equal(few.report.answers.length, 6, "few tasks that share both sides in groups are distilled too");
    const strict = await packByAnswers(engine, file, { ...options, agreement: 0.9999, finished: undefined });
    t.ok(
      strict.report.answers.some((one) => one.kept === "closer"),
      "what does not agree is stored closer, where that agrees better",
    );
  }

  await t.rejects(packByAnswers(engine, file, { ...options, agreement: 2 }), {
    message: /agreement: expected a number between/,
  });
  await t.rejects(packByAnswers(engine, file, { ...options, adapters: [] }), { message: /no adapters/ });
});

/** The adapter with one row of its head alone. */
function withOneLabel(adapter: Adapter): Adapter {
  const saved = adapter.saved.map((one) => {
    const shape = [1, ...one.shape.slice(1)];
    const read = async () => (await one.read()).slice(0, one.shape[1] ?? 1);
    return one.name.startsWith("classifier.") ? { ...one, shape, read } : one;
  });
  return { ...adapter, saved, metadata: {} };
}

t.test("an adapter that cannot be distilled is said, and stops no other", async (t) => {
  const [first, second] = await tinyAdapters(t, 2);
  const options = { encode: tiny, steps: 0, texts: LINES };
  const lone = withOneLabel(second!);
  const { report } = await packByAnswers(engine, file, { ...options, adapters: [first!, lone], agreement: 0.01 });
  t.same(report.left, []);
  const [distilled, refused] = report.answers;
  t.ok(distilled!.agreement! > 0.01 && distilled!.reason === undefined);
  t.match(refused, {
    kept: "undistilled",
    reason: /gives one number for a text, and answers are compared by two labels/,
  });
  const none = await packByAnswers(engine, file, { ...options, adapters: [lone] });
  t.same(none.report.answers, []);
  t.match(none.report.warnings, [/cannot be distilled: "classifier.weight" gives one number/]);

  const [name, module] = [...first!.modules][0]!;
  const tables = { ...first!, modules: new Map([[name, { ...module, layout: "embedding" as const }]]) };
  await t.rejects(packByAnswers(engine, file, { ...options, adapters: [tables] }), {
    tag: "adapter",
    message: new RegExp(`"${name}" has the layout "embedding", which cannot be trained: pack without a model`),
  });
});

t.test("a size is kept to, whatever distilling adds", async (t) => {
  const adapters = await tinyAdapters(t, 5);
  const options = { adapters, encode: tiny, texts: LINES, steps: 8 };
  const made = async (bytes: number, more: Partial<ByAnswersOptions> = {}) => {
    const { chunks, report } = await packByAnswers(engine, file, { ...options, ...more, bytes });
    t.equal(report.bytes, Buffer.concat(chunks).length);
    t.ok(report.bytes <= bytes, `${report.bytes} ≤ ${bytes}`);
    return report;
  };
  const refused = await packByAnswers(engine, file, { ...options, bytes: 100 }).catch((error: Error) => error);
  t.match(refused, { name: "RangeError", message: /^100 bytes are too few: the least is \d+$/ });
  const least = Number(/\d+$/.exec((refused as Error).message)![0]);
  const coarse = await made(least);
  t.ok(coarse.answers.every(({ kept, agreement }) => kept !== "closer" && agreement! > 0));
  const fine = await made(1.4 * least);
  t.ok(fine.bytes > 1.25 * least, `${fine.bytes} of ${1.4 * least}`);
  for (const [i, { total }] of fine.errors.entries()) t.ok(total < 0.8 * coarse.errors[i]!.total, `${total}`);

  const stopped = await made(1.4 * least, { signal: AbortSignal.abort() });
  t.equal(stopped.left.length, adapters.length);
  t.ok(stopped.answers.every(({ kept }) => kept === "undistilled"));
  await t.rejects(made(least, { agreement: 0.9 }), { message: /agreement or bytes: give one of them/ });
});

/** A model with its tokenizer, and three adapters, that commands are tried on. */
interface Case {
  readonly with: readonly string[];
  readonly adapters: readonly [string, string, string];
}

async function tinyCase(): Promise<Case> {
  const [two, three, five] = ["two", "three", "five"].map((id) => data(`sessions/adapters/${id}`));
  return { with: await tinyModel(), adapters: [two!, three!, five!] };
}

async function minilmCase(): Promise<Case> {
  const [role, scope, game] = [ROLE, "debtags-scope", "debtags-game"].map((id) => data(`adapters/own-seed/${id}`));
  return { with: ["--model", model, "--tokens", "32"], adapters: [role!, scope!, game!] };
}

for (const [name, caseOf] of [["a tiny model", tinyCase], ...(soak ? [["MiniLM", minilmCase] as const] : [])] as const)
  t.test(`the command line on ${name}: two tasks, a third added, a Ctrl-C`, async (t) => {
    workIn(t);
    const { with: how, adapters } = await caseOf();
    const [first, second, third] = adapters;
    const ids = adapters.map((path) => basename(path));
    const made = await json(0, "pack", first, second, "-o", "two.eigen", ...how, "--distill", "0");
    t.match(made, {
      file: "two.eigen",
      tasks: 2,
      left: [],
      answers: ids
        .slice(0, 2)
        .sort()
        .map((id) => ({ id })),
    });
    t.notOk(existsSync("two.eigen.partial"), "nothing is left beside it");
    t.equal((await json(0, "verify", "two.eigen"))["ok"], true);

    const strict = await run(
      "pack",
      first,
      second,
      "-o",
      "strict.eigen",
      ...how,
      "--distill",
      "0",
      "--agreement",
      "0.99999",
    );
    t.match(strict.stdout, new RegExp(`Less alike than asked .100.0 %.: .*${ids[0]}.*--error 0.05 keeps more`));

    const added = await json(0, "add", "two.eigen", third, ...how, "--minutes", "0.5");
    t.match(added, { added: [ids[2]], answers: [{ id: ids[2] }] });
    t.ok(added["answers"][0].agreement >= 0.95, `agreement ${added["answers"][0].agreement}`);
    t.equal((await json(0, "verify", "two.eigen"))["ok"], true);

    const hurried = ["pack", first, second, "-o", "hurried.eigen", ...how, "--minutes", "1e-6"];
    t.match(await json(3, ...hurried), { left: ids.slice(0, 2).sort() }, "the exit code says that tasks had no turn");
    t.notOk(existsSync("hurried.eigen.partial"), "an empty folder does not stay");
    t.match((await run(...hurried, "--force")).stdout, /the pack is as without a model|tasks not distilled/);

    const sized = ["pack", first, second, "-o", "sized.eigen", ...how, "--distill", "0", "--bytes"];
    const ratio = Math.floor(1.1 * made["ratio"]);
    t.ok((await json(0, ...sized, `1/${ratio}`))["ratio"] >= ratio);
    const few = (await json(1, ...sized, "1/5000", "--force"))["error"].message;
    t.match(few, /^--bytes 1\/5000: a pack of these adapters can be at most [\d.]+× smaller/);

    await interrupted(t, ["pack", first, third, "-o", "stopped.eigen", ...how, "--distill", "60"]);
    if (name === "MiniLM") return;
    await refusals(t, first, how);
  });

/** Stops a command, and runs it again. */
async function interrupted(t: Test, command: readonly string[]): Promise<void> {
  const main = new URL("../../dist/src/cli/main.js", import.meta.url).pathname;
  const child = spawn(process.execPath, [main, ...command, "--json"], { stdio: ["ignore", "pipe", "inherit"] });
  let said = "";
  child.stdout.on("data", (text) => (said += text));
  const gone = once(child, "exit");
  const some = async (): Promise<number> => (await readdir("stopped.eigen.partial").catch(() => [])).length;
  while ((await some()) < 1 && child.exitCode === null) await new Promise((resolve) => setTimeout(resolve, 20));
  child.kill("SIGINT");
  t.same(await gone, [130, null], "Ctrl-C ends it with a pack");
  t.ok(JSON.parse(said).left.length > 0, "and says what is not done");
  t.equal((await json(0, "verify", "stopped.eigen"))["ok"], true);
  t.ok(existsSync("stopped.eigen.partial"), "what is finished waits");
  const text = await run(...command, "--force");
  t.equal(text.status, 0, text.stderr);
  t.match(text.stdout, /^(Shared: |Nothing is shared|By answers, it would take no fewer bytes)/m);
  t.match(text.stdout, /answers like the adapter's, mean \/ least/);
  t.notMatch(text.stdout, /--base/, "fingerprints are of the model");
  t.notOk(existsSync("stopped.eigen.partial"), "and is gone at the end");
}

async function refusals(t: Test, adapter: string, how: readonly string[]): Promise<void> {
  await writeFile("lines.txt", "one\n");
  for (const [args, message] of [
    [["--text", "lines.txt"], /--text needs --model/],
    [["--max-loss", "0.5", ...how], /--max-loss and --model exclude each other: .*--agreement/],
  ] as const)
    t.match(await json(2, "add", "two.eigen", adapter, ...args), { error: { tag: "usage", message } });
  for (const [args, message] of [
    [["--text", "lines.txt"], /--text needs --model/],
    [["--minutes", "3"], /--minutes needs --model/],
    [[...how, "--error", "0.1"], /--error and --model exclude each other: .*--agreement/],
    [[...how, "--dtype", "int4"], /--dtype and --model exclude each other/],
    [
      [...how, "--bytes", "1/30", "--agreement", "0.9"],
      /--agreement and --bytes exclude each other: it is for packs without a size/,
    ],
    [[...how, "--k", "4", "--agreement", "0.9"], /--k and --model exclude each other/],
  ] as const)
    t.match(await json(2, "pack", adapter, "-o", "x.eigen", ...args), { error: { tag: "usage", message } });
  const short = await json(1, "pack", adapter, "-o", "x.eigen", ...how, "--text", "lines.txt");
  t.match(short, { error: { message: /expected 8 texts at least/ } });
}
