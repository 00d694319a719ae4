/**
 * The command line never loses work: existing files, trained tasks, files of another model; and the texts of its
 * refusals.
 */
import { execFileSync } from "node:child_process";
import { once } from "node:events";
import { cp, mkdir, readdir, readFile, rm, stat, symlink, writeFile } from "node:fs/promises";
import { createServer } from "node:net";
import { join } from "node:path";
import { openPack } from "eigenlora";
import { encodeTaskFile } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import t from "tap";
import { json, run } from "../support/command-line.ts";
import { folderFor } from "../support/folder.ts";
import { openSafetensors, openSource } from "../support/internals/base.ts";
import { createOutput, openModel, Run, takeLock, writeTogether } from "../support/internals/cli.ts";
import { data } from "../support/packs.ts";

const folder = folderFor(t);
const at = (...names: string[]): string => join(folder, ...names);

/** Message of a command that fails. */
async function refusal(...args: string[]): Promise<string> {
  const { status, stdout } = await run(...args, "--json");
  if (status === 0) throw new Error(`${args.join(" ")} was not refused`);
  return JSON.parse(stdout).error.message;
}

// Two adapters, trained, as somebody has them.
const adapters = ["debtags-role", "sections-0"].map((id) => at("adapters", id));
for (const path of adapters) await cp(data(`adapters/own-seed/${path.split("/").at(-1)}`), path, { recursive: true });
const [role] = adapters as [string, string];
await json(0, "pack", at("adapters"), "-o", at("p.eigen"), "--k", "2");

t.test("what is there already is replaced by --force alone, by every command that writes a new file", async (t) => {
  await json(0, "hub", "shard", role, "-o", at("role.part"));
  await json(0, "hub", "merge", at("role.part"), "--k", "2", "-o", at("basis.eigen"));
  await json(0, "hub", "project", at("basis.eigen"), role, "-o", at("role.tasks"));
  await writeFile(at("lines.txt"), "a line\n");
  await writeFile(at("rows.jsonl"), '{"text":"one","label":"a"}\n{"text":"two","label":"b"}\n');
  const commands: string[][] = [
    ["pack", at("adapters"), "--k", "2"],
    ["hub", "shard", role],
    ["hub", "merge", at("role.part")],
    ["hub", "merge", at("role.part"), "--part"],
    ["hub", "project", at("basis.eigen"), role],
    ["hub", "assemble", at("basis.eigen"), at("role.tasks")],
    ["fold", at("p.eigen"), "--task", "sections-0", "--base", data("sessions/base.safetensors")],
    ["attach", data("sessions/torchscript.onnx"), at("p.eigen")],
    ["learn", at("p.eigen"), at("rows.jsonl"), "--model", data("sessions/torchscript.onnx")],
    ["distill", at("p.eigen"), role, "--text", at("lines.txt"), "--model", data("sessions/torchscript.onnx")],
  ];
  await writeFile(at("mine"), "work of hours");
  for (const command of commands) {
    const name = command.slice(0, command[0] === "hub" ? 2 : 1);
    t.match(await refusal(...command, "-o", at("mine")), /mine: already exists; .*--force/, name.join(" "));
    t.match(await refusal(...command, "-o", at("nowhere", "x")), /there is no folder .*nowhere; make it first/);
    t.match((await run(...name, "--help")).stdout, /--force/);
  }
  t.equal(await readFile(at("mine"), "utf8"), "work of hours");
  for (const command of commands.slice(0, 6)) {
    await writeFile(at("mine"), "work of hours");
    await json(0, ...command, "-o", at("mine"), "--force");
    t.not((await readFile(at("mine"))).toString(), "work of hours", command.join(" "));
  }
  t.equal(
    (await json(0, "hub", "shard", role, "-o", at("role.part")))["present"],
    true,
    "a part made of the same is left alone",
  );
  t.match(await refusal("keygen", "-o", at("nowhere", "x")), /there is no folder .*nowhere/);
  await writeFile(at("key.pub.pem"), "a key");
  t.match(await refusal("keygen", "-o", at("key")), /key\.pub\.pem already exists/);
  t.notOk((await readdir(folder)).includes("key.pem"), "neither of the two");
  await json(0, "keygen", "-o", at("key"), "--force");
  t.equal((await stat(at("key.pem"))).mode & 0o777, 0o600);
  // Files beside an attached model must not be overwritten either.
  await writeFile(at("a.base.safetensors"), "mine");
  const attach = ["attach", data("sessions/torchscript.onnx"), at("s.eigen"), "-o", at("a.onnx")];
  await json(0, "pack", data("sessions/adapters"), "-o", at("s.eigen"));
  t.match(await refusal(...attach), /a\.base\.safetensors already exists/);
  await json(0, ...attach, "--force");
  await rm(at("a.onnx"));
  await rm(at("a.base.safetensors"));
  t.match(await refusal(...attach), /a\.tasks.*\.safetensors already exists/);
});

t.test("folders, devices, pipes, links and what the command reads", async (t) => {
  execFileSync("mkfifo", [at("pipe")]);
  await symlink("nowhere", at("dangling"));
  await symlink("p.eigen", at("link"));
  const pack = ["pack", at("adapters"), "--k", "2", "-o"];
  for (const [path, message] of [
    [at("adapters"), /is a folder; name a file in it/],
    [`${at("new")}/`, /ends like a folder/],
    ["/dev/null", /is a device; name a file/],
    [at("pipe"), /is a pipe; name a file/],
    ["-", /nothing is written to standard output/],
    [at("dangling"), /is a link to a file that is not there/],
  ] as const) {
    for (const force of [[], ["--force"]]) t.match(await refusal(...pack, path, ...force), message, path);
  }
  const weights = join(role, "adapter_model.safetensors");
  t.match(await refusal(...pack, weights, "--force"), /would overwrite what it is made of/);
  t.ok((await stat("/dev/null")).isCharacterDevice() && (await stat(at("pipe"))).isFIFO());
  t.match(await refusal(...pack, join(weights, "x")), /adapter_model\.safetensors is not a folder/);
  t.match(await refusal(...pack, at("link")), /already exists/);
  await json(0, ...pack, at("link"), "--force");
  t.equal((await json(0, "inspect", at("p.eigen")))["tasks"].length, 2, "through the link, which stays");
  for (const command of [
    ["hub", "assemble", at("basis.eigen"), at("role.tasks"), "-o", at("role.tasks")],
    ["hub", "merge", at("role.part"), "-o", at("role.part")],
    ["fold", at("p.eigen"), "--task", "x", "--base", at("p.eigen"), "-o", at("p.eigen")],
    ["attach", data("sessions/torchscript.onnx"), at("p.eigen"), "-o", at("p.eigen")],
    ["learn", at("p.eigen"), at("rows.jsonl"), "--model", "m", "-o", at("rows.jsonl")],
  ])
    t.match(await refusal(...command, "--force"), /would overwrite what it is made of/, command[0]!);
});

t.test("pipes, devices and sockets are refused before they are opened", async (t) => {
  const [pipe, socket] = [at("pipe.in"), at("socket.in")];
  execFileSync("mkfifo", [pipe]);
  const server = createServer().listen(socket);
  await once(server, "listening");
  t.teardown(() => server.close());
  await symlink("pipe.in", at("leads.in"));
  await cp(role, at("half"), { recursive: true });
  await rm(at("half", "adapter_model.safetensors"));
  execFileSync("mkfifo", [at("half", "adapter_model.safetensors")]);
  const [model, pack] = [data("sessions/torchscript.onnx"), at("p.eigen")];
  const refused = async (path: string, what: string, ...command: string[]): Promise<void> => {
    const { status, stdout } = await run(...command, "--json");
    const { tag, message } = JSON.parse(stdout).error;
    t.same([status, tag], [1, "source"], command.join(" "));
    t.match(message, `${path}: is ${what}, expected a file`, command.join(" "));
  };
  for (const [path, what] of [
    [pipe, "a pipe"],
    [at("leads.in"), "a pipe"],
    [socket, "a socket"],
    ["/dev/zero", "a device"],
  ] as const) {
    for (const command of [
      ["inspect", path],
      ["verify", path],
      ["verify", pack, "--key", path],
      ["pack", path, "-o", at("never")],
      ["pack", role, "--base", path, "-o", at("never")],
      ["add", pack, path],
      ["add", pack, role, "--key", path],
      ["export", path, "--task", "x", "-o", at("never")],
      ["fold", pack, "--task", "sections-0", "--base", path, "-o", at("never")],
      ["attach", path, pack, "-o", at("never")],
      ["attach", model, path, "-o", at("never")],
      ["check", path, pack],
      ["learn", pack, path, "--model", model, "-o", at("never")],
      ["distill", pack, role, "--text", path, "--model", model, "-o", at("never")],
    ])
      await refused(path, what, ...command);
    await t.rejects(openSource(path), { tag: "source", file: path, message: `${path}: is ${what}, expected a file` });
    await t.rejects(readAdapters([path]), { tag: "source", file: path, message: "expected a file or a folder" });
  }
  await refused(pipe, "a pipe", "remove", pipe, "x");
  await refused(at("half", "adapter_model.safetensors"), "a pipe", "pack", at("half"), "-o", at("never"));
  execFileSync("mkfifo", [at("held.lock")]);
  await t.rejects(
    takeLock(at("held"), () => {}, 0),
    { message: /has a lock that names no process/ },
  );
  await symlink("p.eigen", at("regular"));
  await json(0, "inspect", at("regular"));
});

t.test("what comes to lie there during the work stays, and so does the result", async (t) => {
  const run = new Run(createOutput(true));
  const target = await run.target(at("late"), { force: false });
  await writeFile(at("late"), "somebody else's");
  const [, kept] = /what was to be written is in (.*)$/.exec(
    await target.write([Buffer.from("the work")]).then(
      () => "",
      (error: Error) => error.message,
    ),
  )!;
  await run.close();
  t.equal(await readFile(at("late"), "utf8"), "somebody else's");
  t.equal(await readFile(kept!, "utf8"), "the work");
  // A folder instead of a file is refused even with --force.
  await mkdir(at("turned"));
  await t.rejects(writeTogether([[at("turned"), [Buffer.from("the work")]]]), {
    message: /stays; what was to be written/,
  });
});

t.test("export never writes over a trained adapter, nor into a folder of them", async (t) => {
  const weights = join(role, "adapter_model.safetensors");
  const trained = await readFile(weights);
  const exported = ["export", at("p.eigen"), "--task", "debtags-role", "-o"];
  for (const path of [role, at("adapters")])
    t.match(await refusal(...exported, path), /is not empty, and nothing in it/);
  t.match(await refusal(...exported, weights), /is a file; name a folder/);
  t.match(await refusal(...exported, weights, "--format", "kohya"), /already exists; choose another name$/);
  t.ok((await readFile(weights)).equals(trained));
  t.equal((await json(0, "pack", at("adapters"), "-o", at("again.eigen"), "--k", "2"))["tasks"], 2);

  await mkdir(at("out"));
  await json(0, ...exported, at("out"));
  t.same((await readdir(at("out"))).sort(), ["adapter_config.json", "adapter_model.safetensors", "task.json"]);
  const { metadata } = await openSafetensors(await openSource(at("out", "adapter_model.safetensors")));
  t.same([...metadata], [["format", "pt"]]);
  t.match(await refusal(...exported, at("out")), /is not empty/);
  // A task without metadata has no file of them.
  const pack = await openPack(at("p.eigen"));
  const entry = { id: "plain", adapterBytes: 0, metadata: {} };
  const file = encodeTaskFile(entry, pack.basisId, (await pack.load("sections-0")).bytes);
  await pack.close();
  await writeFile(at("plain.eigentask"), file);
  await json(0, "add", at("p.eigen"), at("plain.eigentask"));
  await json(0, "export", at("p.eigen"), "--task", "plain", "-o", at("plain"));
  t.same((await readdir(at("plain"))).sort(), ["adapter_config.json", "adapter_model.safetensors"]);
});

t.test("adapters of different base models are refused, with who names which", async (t) => {
  const named = async (id: string, base: string | null): Promise<string> => {
    await cp(role, at("named", id), { recursive: true });
    const path = at("named", id, "adapter_config.json");
    const config = JSON.parse(await readFile(path, "utf8"));
    await writeFile(path, JSON.stringify({ ...config, base_model_name_or_path: base }));
    return at("named", id);
  };
  const bert = await named("a", "google/bert-base");
  const local = await named("b", "/home/me/models/BERT-base/");
  const cached = await named("c", "/cache/models--google--bert-base/snapshots/0123abcd");
  const mirror = await named("d", "someone/bert-base");
  const unnamed = await named("e", null);
  const gpt = await named("z", "gpt2");
  const all = [bert, local, cached, mirror, unnamed];
  const { warnings } = await json(0, "pack", ...all, "-o", at("bert.eigen"), "--k", "2");
  t.match(
    warnings.join("\n"),
    /name their base model in several ways, taken for one: google\/bert-base, .*someone\/bert-base/,
  );
  const expected =
    /named\/z: the adapters name different base models: google\/bert-base \(a, b, c, d\); gpt2 \(z\)\. .*--any-base/;
  t.match(await refusal("pack", ...all, gpt, "-o", at("x"), "--k", "2"), expected);
  t.match(await refusal("pack", ...all, gpt, "-o", at("x"), "--bytes", "1/2"), expected);
  t.match(await refusal("hub", "shard", ...all, gpt, "-o", at("x")), expected);
  t.match(await refusal("add", at("bert.eigen"), gpt), /google\/bert-base \(the pack\); gpt2 \(z\)/);
  for (const [i, path] of [bert, gpt].entries()) await json(0, "hub", "shard", path, "-o", at(`${i}.part`));
  t.match(
    await refusal("hub", "merge", at("0.part"), at("1.part"), "-o", at("x"), "--k", "2"),
    /google\/bert-base \(a\); gpt2 \(z\)/,
  );
  await json(0, "hub", "merge", at("0.part"), "-o", at("bert-basis.eigen"), "--k", "2");
  t.match(await refusal("hub", "project", at("bert-basis.eigen"), gpt, "-o", at("x")), /\(the pack\); gpt2 \(z\)/);
  t.notOk((await readdir(folder)).includes("x"));
  const any = await run("pack", ...all, gpt, "-o", at("any.eigen"), "--k", "2", "--any-base");
  t.match(any.stderr, /the adapters name different base models, so the pack names none: .*google\/bert-base, .*gpt2/s);
  t.equal((await json(0, "inspect", at("any.eigen")))["baseModel"], null);
  await json(0, "add", at("bert.eigen"), gpt, "--any-base");
});

t.test("a refusal says what to do", async (t) => {
  const pack = ["pack", at("adapters"), "-o", at("y")];
  const few = await refusal(...pack, "--bytes", "1/600");
  t.match(few, /^--bytes 1\/600: .* at most [\d.]+× smaller than they are: ask for --bytes 1\/[\d.]+ or more$/);
  const [, most] = /ask for --bytes (1\/[\d.]+) or more/.exec(few)!;
  await json(0, ...pack, "--bytes", most!);
  t.match(await refusal("pack", ...adapters, "-o", at("z"), "--bytes", "5kB"), /ask for --bytes \d+ or more$/);
  const { warnings, components } = await json(0, "pack", at("adapters"), "-o", at("w"), "--k", "10000");
  t.match(warnings.join("\n"), new RegExp(`10000 components were asked for, and the adapters have ${components.max} `));
  t.match(await refusal("inspect", folder), /is a folder, expected a file/);
  t.match(await refusal("inspect", at("nowhere")), /cannot be opened: there is no such file or folder \(ENOENT\)/);
  t.match(
    await refusal("learn", at("p.eigen"), folder, "--model", "m", "-o", at("y2")),
    /is a folder, expected a file/,
  );
  // The library speaks of options, the command line of flags.
  const base = data("goldens/peft/conv/base.safetensors");
  const other = ["fold", at("p.eigen"), "--task", "sections-0", "-o", at("v"), "--base", base];
  t.match(await refusal(...other), /If the names differ, map them with --names MODULE=WEIGHT$/);
  t.match(
    await refusal("pack", role, "-o", at("v"), "--base", base),
    /If the names differ, map them with --names MODULE=WEIGHT$/,
  );
  t.match(await refusal(...other, "--names", "nobody=x"), /--names nobody=…: .* adapts no such module/);
});

t.test("what a pack without components, or with too few, does to a task is said", async (t) => {
  await json(0, "pack", at("adapters"), "-o", at("few.eigen"), "--k", "2");
  const added = await run("add", at("few.eigen"), data("adapters/own-seed/debtags-use"), "--max-loss", "1");
  t.match(added.stderr, /task "debtags-use" loses \d\d\.\d % of its ΔW, which the pack's components lack/);
  await json(0, "pack", at("adapters"), "-o", at("none.eigen"));
  t.equal((await run("add", at("none.eigen"), data("adapters/own-seed/debtags-use"))).stderr, "");
  await writeFile(at("taught.jsonl"), '{"text":"one","label":"a"}\n{"text":"two","label":"b"}\n');
  const learn = ["learn", at("none.eigen"), at("taught.jsonl"), "--model", at("nowhere.onnx"), "-o", at("t.eigentask")];
  t.notMatch((await run(...learn)).stderr, /LoRA of its own/);
  await json(0, "pack", at("adapters"), "-o", at("none.eigen"), "--force", "--error", "0.002");
  t.match((await run(...learn)).stderr, /the pack has no shared components, so the task becomes a LoRA of its own/);
});

t.test("fold takes another base where it is asked to, and names for modules", async (t) => {
  await json(0, "pack", data("sessions/adapters"), "-o", at("f.eigen"), "--base", data("sessions/base.safetensors"));
  const { tasks, modules } = await json(0, "inspect", at("f.eigen"));
  const fold = ["fold", at("f.eigen"), "--task", tasks[0].id, "-o", at("folded"), "--base"];
  const base = data("sessions/base.safetensors");
  const bytes = await readFile(base);
  // Other weights of the same shapes: all numbers turned round.
  const header = 8 + Number(bytes.readBigUInt64LE(0));
  for (let i = header + 3; i < bytes.length; i += 8) bytes[i]! ^= 0x80;
  await writeFile(at("other.safetensors"), bytes);
  t.match(await refusal(...fold, at("other.safetensors")), /fingerprints correlate by .* or pass --any-base$/);
  await json(0, ...fold, at("other.safetensors"), "--any-base");
  t.ok(modules.length > 0);
});

t.test(
  "tokenizer.json is looked for beside the model, and one folder above, as transformers.js keeps models",
  async (t) => {
    await mkdir(at("hub", "onnx"), { recursive: true });
    const model = at("hub", "onnx", "model.onnx");
    const of = { tokens: undefined, tokenizer: undefined };
    await t.rejects(openModel("learn", model, of), { message: /model\.onnx: cannot be read: there is no such file/ });
    await writeFile(model, "");
    await t.rejects(openModel("learn", model, of), {
      message: /onnx\/tokenizer\.json: there is no tokenizer, nor one folder above; .*--tokenizer$/,
    });
    await cp(data("minilm/tokenizer.json"), at("hub", "tokenizer.json"));
    const { encode } = await openModel("learn", model, of);
    const { input_ids } = await encode(["a tool", "a"], { padding: true, truncation: true }, ["input_ids"]);
    t.same(input_ids!.dims, [2, 4]);
  },
);
