/**
 * Packs judged by answers, with text that the program makes: through the API and the command line, on the real model and adapters.
 */
import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { mkdtemp, readdir, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { openPack } from "eigenlora";
import { type Adapter, buildPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { createEigenSession, createEngine } from "eigenlora/onnxruntime";
import { type ByAnswersOptions, createJudge, distill, type Encode, packByAnswers } from "eigenlora/train";
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
} from "../examples/minilm.js";
import { json, run, workIn } from "./command-line.ts";
import { data } from "./packs.ts";

ort.env.logLevel = "error";
const ROLE = "debtags-role";

async function adaptersOf(t: Test, ids: readonly string[]): Promise<Adapter[]> {
  const adapters = await readAdapters(ids.map((id) => data(`adapters/own-seed/${id}`)));
  t.teardown(() => Promise.all(adapters.map((adapter) => adapter.close())));
  return adapters;
}

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

  const silent: Encode = (...given) => encode(...given);
  await t.rejects(distill(session, { adapter, encode: silent }), {
    name: "TypeError",
    message: /texts, feeds or examples, or a tokenizer with get_vocab and decode/,
  });
  const wordless = Object.assign(silent, { get_vocab: () => new Map([["##a", 1]]), decode: () => "##a" });
  await t.rejects(distill(session, { adapter, encode: wordless }), { message: /has no words; give texts/ });

  const judge = createJudge(createEngine(ort), model, { adapters, encode, most: 16 });
  t.ok((await judge.judge(pack)) > 0, "packs are judged without text too");
  await judge.close();
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

t.test("eight tasks share components; what is finished is not done again; a stopped call loses nothing", async (t) => {
  const paths = ["two", "three", "five"].map((name) => data(`sessions/adapters/${name}`));
  const copies: Adapter[] = [];
  for (const round of [1, 2, 3]) {
    const rename = new Map(["two", "three", "five"].map((name) => [name, `${name}-${round}`]));
    copies.push(...(await readAdapters(paths, { rename })));
  }
  t.teardown(() => Promise.all(copies.map((adapter) => adapter.close())));
  const adapters = copies.slice(0, 8);
  const kept = new Map<string, string>();
  let written = 0;
  const finished: ByAnswersOptions["finished"] = {
    read: async (key) => kept.get(key),
    write: async (key, outcome) => void (written++, kept.set(key, outcome)),
  };
  const engine = createEngine(ort);
  const file = data("sessions/torchscript.onnx");
  const stages = new Set<string>();
  const onProgress = ({ stage }: { stage: string }): void => void stages.add(stage);
  const options = { adapters, encode: tiny, steps: 24, agreement: 0.9, finished, onProgress };
  const { chunks, report } = await packByAnswers(engine, file, options);
  t.same([...stages], ["trying", "distilling"]);
  t.equal(report.bytes, Buffer.concat(chunks).length);
  t.equal(report.stopped, false);
  t.same(
    report.answers.map(({ id }) => id),
    adapters.map(({ id }) => id),
  );
  for (const { id, agreement, kept } of report.answers)
    t.ok(kept === "closer" || agreement! >= 0.9, `${id}: ${kept}, ${agreement}`);
  const pack = await openPack(new Blob(chunks as BlobPart[]));
  t.same([...pack.tasks.keys()], [...report.answers.map(({ id }) => id)]);
  for (const { id, bytes } of report.answers) t.equal((await pack.stored(id)).length, bytes);
  await pack.close();

  const before = written;
  const again = await packByAnswers(engine, file, options);
  t.equal(written, before, "nothing is done twice");
  t.ok(Buffer.concat(again.chunks).equals(Buffer.concat(chunks)));

  const controller = new AbortController();
  const stop = ({ done, stage }: { done: number; stage: string }): void => {
    if (stage === "distilling" && done === 3) controller.abort();
  };
  const afresh = { ...options, onProgress: stop, signal: controller.signal, finished: undefined, seed: 1 };
  const stopped = await packByAnswers(engine, file, afresh);
  t.equal(stopped.report.stopped, true);
  t.same(
    stopped.report.answers.map((one) => one.kept === "whole"),
    adapters.map((_, i) => i === 3 || i === 7),
    "those that were neither tried nor distilled are stored as without a model",
  );
  const half = await openPack(new Blob(stopped.chunks as BlobPart[]));
  t.equal(half.tasks.size, 8);
  await half.close();

  const few = await packByAnswers(engine, file, { ...options, adapters: copies.slice(0, 6), finished: undefined });
  t.equal(few.report.answers.length, 6, "few tasks that share both sides in groups are distilled too");

  const strict = await packByAnswers(engine, file, { ...options, agreement: 0.9999, finished: undefined });
  t.ok(
    strict.report.answers.some((one) => one.kept === "closer"),
    "what does not agree is stored closer",
  );
  for (const { id, kept, agreement } of strict.report.answers)
    t.ok(kept === "closer" || agreement! >= 0.9999, `${id}: ${kept}, ${agreement}`);
  await t.rejects(packByAnswers(engine, file, { ...options, agreement: 2 }), {
    message: /agreement: expected a number between/,
  });
  await t.rejects(packByAnswers(engine, file, { ...options, adapters: [] }), { message: /no adapters/ });
});

t.test("the command line: two tasks, a third added, a Ctrl-C", async (t) => {
  const folder = await mkdtemp(join(tmpdir(), "eigenlora-by-answers-"));
  workIn(t, folder);
  const own = (id: string): string => data(`adapters/own-seed/${id}`);
  const asked = ["--model", model, "--tokens", "32"];
  const made = await json(0, "pack", own(ROLE), own("debtags-scope"), "-o", "two.eigen", ...asked, "--distill", "0");
  t.match(made, { file: "two.eigen", tasks: 2, stopped: false, answers: [{ id: ROLE }, { id: "debtags-scope" }] });
  t.same(await readdir("."), ["two.eigen"], "nothing is left beside it");
  t.equal((await json(0, "verify", "two.eigen")).ok, true);

  const added = await json(0, "add", "two.eigen", own("debtags-game"), ...asked, "--minutes", "1");
  t.match(added, { added: ["debtags-game"], answers: [{ id: "debtags-game" }] });
  t.ok(added["answers"][0].agreement >= 0.95, `agreement ${added["answers"][0].agreement}`);
  t.equal((await json(0, "verify", "two.eigen")).ok, true);

  await writeFile("lines.txt", "one\n");
  for (const [args, message] of [
    [["--text", "lines.txt"], /--text needs --model/],
    [["--max-loss", "0.5", "--model", model], /--max-loss is about ΔW/],
  ] as const)
    t.match(await json(2, "add", "two.eigen", own("debtags-use"), ...args), { error: { tag: "usage", message } });
  for (const [args, message] of [
    [["--text", "lines.txt"], /--text needs --model/],
    [["--minutes", "3"], /--minutes needs --model/],
    [["--model", model, "--error", "0.1"], /--error is about ΔW/],
    [["--model", model, "--ratio", "30", "--minutes", "3"], /--minutes is for packs without a size/],
    [["--model", model, "--k", "4", "--agreement", "0.9"], /--agreement is for --mode auto/],
  ] as const)
    t.match(await json(2, "pack", own(ROLE), "-o", "x.eigen", ...args), { error: { tag: "usage", message } });
  const short = await json(1, "pack", own(ROLE), "-o", "x.eigen", ...asked, "--text", "lines.txt");
  t.match(short, { error: { message: /expected 8 texts at least/ } });

  const main = new URL("../dist/src/cli/main.js", import.meta.url).pathname;
  const command = ["pack", own(ROLE), own("debtags-game"), "-o", "stopped.eigen", ...asked, "--distill", "8"];
  const child = spawn(process.execPath, [main, ...command, "--json"], { stdio: ["ignore", "pipe", "inherit"] });
  let said = "";
  child.stdout.on("data", (text) => (said += text));
  const gone = once(child, "exit");
  const some = async (): Promise<number> => (await readdir("stopped.eigen.partial").catch(() => [])).length;
  while ((await some()) < 1 && child.exitCode === null) await new Promise((resolve) => setTimeout(resolve, 20));
  child.kill("SIGINT");
  t.same(await gone, [0, null], "Ctrl-C ends it with a pack");
  t.match(JSON.parse(said), { stopped: true });
  t.equal((await json(0, "verify", "stopped.eigen")).ok, true);
  t.ok(existsSync("stopped.eigen.partial"), "what is finished waits");
  const text = await run(...command, "--force");
  t.equal(text.status, 0, text.stderr);
  t.match(text.stdout, /Too few tasks to share components|as without a model/);
  t.match(text.stdout, /answers like the adapter's, mean \/ least/);
  t.notOk(existsSync("stopped.eigen.partial"), "and is gone at the end");
});
