/**
 * `eigenlora learn` on the real model: a task file, adding it to the pack, exporting it to PEFT, refusals; on a tiny
 * one: seeds, Ctrl-C.
 */
import { spawnSync } from "node:child_process";
import { readdir, readFile, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { openPack } from "eigenlora";
import t from "tap";
import { createEncoder, readTask } from "../../examples/minilm.js";
import { json, run, words } from "../support/command-line.ts";
import { tensorsOf } from "../support/compare.ts";
import { workIn } from "../support/folder.ts";
import { COMMAND_LINE, readExamples, readQuestions } from "../support/internals/cli.ts";
import { parseTaskFile } from "../support/internals/runtime.ts";
import { data } from "../support/packs.ts";
import { difference, NODE, open } from "../support/sessions.ts";
import { tinyLines, tinyModel } from "../support/tiny-model.ts";

const folder = workIn(t);
const MODEL = data("minilm/model_fp16.onnx");

const { labels, train } = await readTask("sections-0");
/** Twenty lines of each of the first three labels. */
const rows = [0, 1, 2]
  .flatMap((label) => train.filter((row) => row[1] === label).slice(0, 20))
  .map(([text, label]) => ({ text, label: labels[label]! }));
const names = labels.slice(0, 3);
await writeFile(join(folder, "rows.jsonl"), rows.map((row) => JSON.stringify(row)).join("\n"));
await json(
  0,
  "pack",
  ...["debtags-role", "debtags-use", "debtags-game"].map((id) => data(`adapters/own-seed/${id}`)),
  "-o",
  "p.eigen",
  "--k",
  "8",
);
const learn = words`learn p.eigen rows.jsonl --model ${MODEL} --tokens 32 --epochs 4 --batch 12 --init random`;

// The same on a tiny model, whose steps take milliseconds.
await json(0, ...words`pack ${["two", "three"].map((id) => data(`sessions/adapters/${id}`))} -o tiny.eigen --k 4`);
const tinyRows = tinyLines(60).map((text, i) => JSON.stringify({ text, label: names[i % 3] }));
await writeFile("tiny.jsonl", tinyRows.join("\n"));
const learnTiny = words`learn tiny.eigen tiny.jsonl ${await tinyModel()} --epochs 4 --batch 2 --init random`;

t.test("learns, adds, verifies, runs, exports", async (t) => {
  const made = await json(0, ...learn, "-o", "mine.eigentask", "--rate", "0.03");
  t.match(made, {
    file: "mine.eigentask",
    id: "mine",
    labels: names,
    examples: 60,
    steps: 16,
    interrupted: false,
    seconds: Number,
  });
  t.equal(made["bytes"], (await readFile(join(folder, "mine.eigentask"))).length);
  t.equal(made["epochs"].length, 4);
  t.ok(made["epochs"].at(-1).loss < 0.8 * made["epochs"][0].loss, JSON.stringify(made["epochs"]));
  const best = made["epochs"].map((epoch: any) => epoch.holdout).reduce((a: any, b: any) => (b.loss < a.loss ? b : a));
  t.same(made["holdout"], best, "the epoch that was kept");
  t.same(made["epochs"][made["kept"] - 1].holdout, best);
  t.ok(best.accuracy > 0.5, `${best.accuracy}`);
  t.same(made["trained"], { terms: 12 * 2 * 8 * 8, head: 3 * 385 });

  const before = await openPack(join(folder, "p.eigen"));
  t.same((await json(0, "add", "p.eigen", "mine.eigentask"))["added"], ["mine"]);
  t.equal((await json(0, "verify", "p.eigen"))["ok"], true);
  t.match(await json(1, "add", "p.eigen", "mine.eigentask"), { error: { tag: "task", message: /--as mine=NEW/ } });
  const after = await openPack(join(folder, "p.eigen"));
  for (const id of before.tasks.keys()) t.same((await before.load(id)).bytes, (await after.load(id)).bytes, id);
  t.same(after.tasks.get("mine")!.metadata.labels, names);

  const encode = await createEncoder(NODE);
  const feeds = encode(rows.map(({ text }) => text));
  const answers = async (pack: typeof after, task: string): Promise<Float32Array> => {
    const session = await open(NODE, MODEL, pack);
    await session.switchTask(task);
    const { logits } = await session.run(feeds);
    t.same(logits!.dims, [60, 3]);
    await session.close();
    return logits!.data as Float32Array;
  };
  const logits = await answers(after, "mine");
  const right = rows.filter(({ label }, i) => {
    const row = [...logits.subarray(3 * i, 3 * i + 3)];
    return names[row.indexOf(Math.max(...row))] === label;
  });
  t.ok(right.length > 45, `${right.length} of 60 lines`);

  // PEFT's format holds all that was learned: packed again without loss, it answers the same.
  await json(0, "export", "p.eigen", "--task", "mine", "-o", "back");
  const config = JSON.parse(await readFile(join(folder, "back", "adapter_config.json"), "utf8"));
  t.match(config, { r: 8, modules_to_save: ["classifier"] }, "eight rows");
  const tensors = await tensorsOf(join(folder, "back", "adapter_model.safetensors"));
  t.same(tensors.get("base_model.model.classifier.weight")?.shape, [3, 384]);
  await json(0, "pack", "back", "-o", "back.eigen", "--energy", "1", "--dtype", "f32");
  const again = await openPack(join(folder, "back.eigen"));
  const off = difference(await answers(again, "back"), logits);
  t.ok(off < 2e-3, `off by ${off}`);
  for (const pack of [before, after, again]) await pack.close();
});

t.test("the same seed gives the same file; too few examples are not judged", async (t) => {
  const few = [...learnTiny, "--epochs", "1", "--holdout", "0", "--seed", "7"];
  const made = await json(0, ...few, "-o", "x.eigentask");
  t.equal(made["holdout"], null);
  const a = await readFile(join(folder, "x.eigentask"));
  await json(0, ...few, "-o", "x.eigentask", "--force");
  const b = await readFile(join(folder, "x.eigentask"));
  await rm(join(folder, "x.eigentask"));
  t.ok(a.equals(b));
  t.equal(parseTaskFile(new Uint8Array(a), "a").id, "x");

  const lines = ["one text", "another text"].map((text, i) => JSON.stringify({ text, label: names[i] }));
  await writeFile(join(folder, "two.jsonl"), lines.join("\n"));
  const two = words`learn tiny.eigen two.jsonl ${await tinyModel()} --epochs 2 -o e.eigentask`;
  const unjudged = (await run(...two)).stdout;
  t.match(unjudged, /No epoch was judged by examples held back: the last step is kept/);
  t.match(unjudged, /^ +2 +[\d.]+ +kept$/m);
});

t.test("Ctrl-C keeps what was learned, or says that nothing was", async (t) => {
  // A process of its own that signals itself at a known moment: after a step, or before the model is loaded.
  const program = `
    import { Command } from ${JSON.stringify(new URL("commander.js", COMMAND_LINE).href)};
    import { learn } from ${JSON.stringify(new URL("learn.js", COMMAND_LINE).href)};
    const [at, ...words] = process.argv.slice(1);
    const interrupt = () => process.kill(process.pid, "SIGINT");
    const progress = ({ done }) => done === Number(at) && interrupt();
    const program = new Command();
    let code;
    const phase = () => at === "0" && interrupt();
    learn(program, "", { progress, phase, warn() {} }, (result) => {
      if (typeof result === "number") code = result;
      else console.log(JSON.stringify(result));
    });
    await program.parseAsync(words, { from: "user" }).catch(({ tag, message }) => console.log(JSON.stringify({ tag, message, code })));
  `;
  const stopAt = (step: number): Record<string, any> => {
    const words = [...learnTiny, "-o", "stopped.eigentask", "--force"];
    const { stdout, stderr, signal } = spawnSync(
      process.execPath,
      ["--input-type=module", "-e", program, String(step), ...words],
      { encoding: "utf8", cwd: folder },
    );
    if (signal || stdout === "") throw new Error(`${signal} ${stderr}`);
    return JSON.parse(stdout);
  };
  t.match(stopAt(0), {
    tag: "task",
    message: "stopped before the first step: nothing was learned, nothing written",
    code: 130,
  });
  t.notOk((await readdir(folder)).includes("stopped.eigentask"));
  const { json: made, exitCode, text } = stopAt(1);
  t.equal(exitCode, 130, "a task was written, and not the one that was asked for");
  t.match(made, { interrupted: true, file: "stopped.eigentask", holdout: null });
  // A signal arrives slightly later than it was sent.
  t.ok(made.steps >= 1 && made.steps < 24, `${made.steps} steps`);
  t.match(text.join("\n"), /stopped at step \d+ of 96/);
  t.match(text.join("\n"), /^ +\d +[\d.]+ .*kept\n/m, "what was kept is marked");
  t.match(text.join("\n"), /\ntrained 128 coefficients and 99 head weights; /);
  t.equal(parseTaskFile(new Uint8Array(await readFile(join(folder, "stopped.eigentask"))), "stopped").id, "stopped");

  // After the second epoch of 24 steps some states are judged: the best is kept, however far the steps went.
  const later = stopAt(50).json;
  const judged = later.epochs.flatMap((epoch: any) => epoch.holdout ?? []);
  t.ok(later.interrupted && judged.length >= 2, JSON.stringify(later.epochs));
  t.equal(later.holdout.loss, Math.min(...judged.map(({ loss }: any) => loss)));
  t.same(later.epochs[later.kept - 1].holdout, later.holdout);
});

t.test("files of examples: what is read, and which line is refused", async (t) => {
  const write = async (name: string, text: string): Promise<string> => {
    await writeFile(join(folder, name), text);
    return join(folder, name);
  };
  const expected = {
    examples: [
      { text: "one, two", label: "a" },
      { text: 'say "no"', label: "b" },
    ],
    labels: ["a", "b"],
  };
  const text = '\uFEFF{"text": "one, two", "label": "a"}\r\n\r\n{"label": "b", "text": "say \\"no\\"", "id": 3}\n';
  t.same(await readExamples(await write("1.jsonl", text)), expected);
  t.same((await readExamples(await write("n.jsonl", '{"text":"x","label":1}\n{"text":"y","label":0}'))).labels, [
    "1",
    "0",
  ]);
  for (const [name, text, message] of [
    [
      "x.jsonl",
      '{"text":"x","label":"a"}\n{"text":"x"}',
      /x.jsonl: line 2: expected \{"text": "…", "label": "…"\}.*, got "text"$/,
    ],
    ["x.jsonl", '{"text":"x","label":"a"}\n\n{"text":7,"label":"a"}', /line 3: expected "text" with a string, got 7/],
    [
      "x.jsonl",
      '{"text":"x","label":"a"}\nnot json',
      /line 2: expected \{"text": "…", "label": "…"\}.*, got what is not valid JSON: /,
    ],
    ["x.jsonl", '{"text":"x","label":"a"}\n[1]', /line 2: expected \{"text": "…", "label": "…"\}.*, got \[1\]/],
    ["x.jsonl", '{"text":"  ","label":"a"}', /line 1: its text is empty/],
    ["x.jsonl", '{"text":"x","label":" "}', /line 1: its label is empty/],
    ["x.tsv", "a\tone", /line 1: expected .* what is not valid JSON/],
    [
      "x.jsonl",
      '{"text":"x","label":"a"}\n{"text":"y","label":"a"}',
      /all 2 examples have the label "a"; at least two labels/,
    ],
    ["x.jsonl", "\n \n", /has no examples/],
  ] as const) {
    await t.rejects(readExamples(await write(name, text)), { tag: "source", message });
  }

  const asked = async (name: string, text: string) => readQuestions(await write(name, text));
  t.same(await asked("q.txt", "one\n\n two \none"), { texts: ["one", "two"] });
  t.same(await asked("q.txt", "{not json}\n[1]"), { texts: ["{not json}", "[1]"] }, "plain text may begin in any way");
  t.same(await asked("q.jsonl", '{"id":1,"text":"one"}\n{"text":" two"}'), { texts: ["one", "two"] });
  const pair = { prompt: "a", completion: "b" };
  t.same(await asked("q.jsonl", `{"id":0,${JSON.stringify(pair).slice(1)}`), { examples: [pair] }, "keys in any order");
  for (const [text, message] of [
    ['{"promt":"a"}', /line 1: expected \{"text": "…"\}, \{"prompt": "…", "completion": "…"\} or .* got "promt"$/],
    ['{"promt":"a","completion":"b"}', /line 1: expected \{"prompt": .* got "promt", "completion"$/],
    ['{"text":"a"}\nb', /line 2: .* what is not valid JSON/],
    ['{"prompt":"a","completion":"b"', /line 1: expected \{"prompt": .* what is not valid JSON/],
    ['[{"text":"a"}]', /q\.jsonl: is a list; expected JSON lines/],
    ['{"messages":[{"role":"user","content":"a"}]}', /line 1: expected the assistant's message at the end, got user/],
    ['{"messages":[]}', /line 1: expected the assistant's message at the end, got none/],
  ] as const) {
    await t.rejects(asked("q.jsonl", text), { tag: "source", message }, text);
  }

  const refuse = async (status: number, error: object, ...changed: string[]): Promise<void> => {
    t.match(await json(status, ...learn, "-o", "x.eigentask", ...changed), { error }, changed.join(" "));
  };
  await refuse(2, { tag: "usage", message: /--holdout 1: expected a share from 0 to less than 1/ }, "--holdout", "1");
  await refuse(2, { tag: "usage", message: /--rate fast: expected a number above 0/ }, "--rate", "fast");
  await refuse(2, { tag: "usage", message: /--rank 0.5: expected a whole number from 1/ }, "--rank", "0.5");
  await refuse(2, { tag: "usage", message: /would overwrite what it is made of/ }, "-o", "p.eigen");
  await refuse(
    1,
    { tag: "task", message: /--init debtags-rule: expected auto, mean, random, or a task of p.eigen/ },
    "--init",
    "debtags-rule",
  );
  await refuse(
    1,
    { tag: "source", message: /nowhere.json: there is no tokenizer.*--tokenizer/ },
    "--tokenizer",
    "nowhere.json",
  );
  t.match(await json(1, "learn", "p.eigen", "missing.jsonl", "--model", MODEL, "-o", "x"), {
    error: { tag: "source", message: /missing.jsonl: cannot be read/ },
  });
  t.match(await json(2, "learn", "p.eigen", "rows.jsonl", "-o", "x"), {
    error: { tag: "usage", message: /missing --model/ },
  });
  t.notOk(
    (await readdir(folder)).some((name) => name.startsWith("x.eigentask")),
    "nothing is written",
  );
});

t.test("a language model learns completions, and chats by its template", async (t) => {
  const decoder = data("decoder/onnx/model.onnx");
  await json(
    0,
    ...words`pack ${data("decoder/adapters/upper")} ${data("decoder/adapters/lower")} -o skills.eigen --k 6`,
  );
  const write = (name: string, lines: object[]): Promise<void> =>
    writeFile(join(folder, name), lines.map((line) => JSON.stringify(line)).join("\n"));
  const answers = ["one", "two", "three", "four", "five", "six"].map((completion, i) => ({
    prompt: `${i} + 1 = `,
    completion,
  }));
  await write("sums.jsonl", answers);
  const how = ["--model", decoder, "--epochs", "3", "--batch", "4"];
  const made = await json(0, "learn", "skills.eigen", "sums.jsonl", ...how, "--holdout", "0", "-o", "sums.eigentask");
  t.match(made, { id: "sums", examples: 6, steps: 6, trained: { head: 0 } });
  t.notOk("labels" in made, "it has none");
  t.ok(made["epochs"].at(-1).loss < made["epochs"][0].loss, JSON.stringify(made["epochs"]));
  await json(0, "add", "skills.eigen", "sums.eigentask");
  t.ok((await openPack(join(folder, "skills.eigen"))).tasks.has("sums"));

  const template =
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";
  const config = JSON.parse(await readFile(data("decoder/tokenizer_config.json"), "utf8"));
  await writeFile(join(folder, "tokenizer.json"), await readFile(data("decoder/tokenizer.json")));
  await write("tokenizer_config.json", [{ ...config, chat_template: template }]);
  const chats = answers.map(({ prompt, completion }) => ({
    messages: [
      { role: "user", content: prompt },
      { role: "assistant", content: completion },
    ],
  }));
  await write("chats.jsonl", chats);
  const more = [...how, "--tokenizer", "tokenizer.json", "--holdout", "0", "-o", "chats.eigentask"];
  t.match(await json(0, "learn", "skills.eigen", "chats.jsonl", ...more), { id: "chats", examples: 6 });

  const refused = async (file: string, ...args: string[]): Promise<string> => {
    const result = await run("learn", "skills.eigen", file, ...how, "-o", "x.eigentask", ...args);
    t.not(result.status, 0);
    return result.stderr;
  };
  t.match(
    await refused("rows.jsonl"),
    /the model answers token by token: expected .*"prompt".* on each line of rows\.jsonl/,
  );
  await write("half.jsonl", [answers[0]!, { prompt: "1 + 1 = " }]);
  t.match(await refused("half.jsonl"), /half\.jsonl: line 2: expected \{"prompt": .* got "prompt"$/m);
  t.match(await refused("half.txt", "--model", "none.onnx"), /half\.txt: cannot be read/);
  t.match(await refused("sums.jsonl", "--model", "none.onnx"), /none\.onnx: cannot be read: there is no such file/);
  t.match(
    await refused("sums.jsonl", "--tokenizer", "tokenizer_config.json"),
    /tokenizer_config\.json: holds no tokenizer: /,
  );
  t.match(await refused("sums.jsonl", "--tokens", "4"), /tokens, more than --tokens 4/);
  const plain = ["learn", "p.eigen", "sums.jsonl", "--model", MODEL, "-o", "x.eigentask"];
  const other = await run(...plain);
  t.match(other.stderr, /the model gives one row of logits for each text: expected .*"label"/);
});
