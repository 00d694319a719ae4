/** Names of the Hugging Face Hub on the command line, against a server that answers as the Hub does. */
import { readdirSync, readFileSync } from "node:fs";
import { cp } from "node:fs/promises";
import { join } from "node:path";
import t, { type Test } from "tap";
import { json, run } from "../support/command-line.ts";
import { workIn } from "../support/folder.ts";
import { filesBelow, hubFor } from "../support/huggingface-server.ts";
import { data } from "../support/packs.ts";
import { packBytes } from "../support/sessions.ts";

async function work(t: Test): Promise<Awaited<ReturnType<typeof hubFor>>> {
  workIn(t);
  return hubFor(t);
}

const seed = (id: string, prefix = "") => filesBelow(data(`adapters/own-seed/${id}`), prefix);
const session = (name: string): Uint8Array => readFileSync(data(`sessions/${name}`));
const text = (content: string): Uint8Array => new TextEncoder().encode(content);

t.test("pack, add and verify take repositories, revisions and folders", async (t) => {
  const { hub } = await work(t);
  hub.push("org/role", seed("debtags-role"));
  hub.push("org/use", seed("debtags-use"), "v1");
  hub.push("org/use", new Map([["README.md", text("moved")]]));
  hub.push("org/many", new Map([...seed("sections-0", "skills/zero/"), ...seed("sections-1", "skills/one/")]));
  const how = ["--as", "use=used", "--k", "2"];
  const made = await json(0, "pack", "org/role", "org/use@v1", "hf:org/many/skills", ...how, "-o", "hub.eigen");
  t.same(made["tasks"], 4);
  for (const [id, name] of [
    ["role", "debtags-role"],
    ["use", "debtags-use"],
    ["zero", "sections-0"],
    ["one", "sections-1"],
  ] as const)
    await cp(data(`adapters/own-seed/${name}`), `local/${id}`, { recursive: true });
  await json(0, "pack", "local", ...how, "-o", "local.eigen");
  t.ok(readFileSync("hub.eigen").equals(readFileSync("local.eigen")), "the pack is that of the same files on the disk");
  hub.push("org/late", seed("sections-2"));
  const added = await json(0, "add", "hub.eigen", `${hub.endpoint}/org/late`, "--max-loss", "1");
  t.match(added, { added: ["late"] });
  const against = await json(0, "verify", "hub.eigen", "--against", "org/late");
  t.ok(against["ok"]);

  hub.push("org/pack", new Map([["tasks.eigen", readFileSync("hub.eigen")]]));
  const shown = await run("inspect", "hf:org/pack/tasks.eigen");
  t.match(shown, { status: 0, stdout: /hf:org\/pack@[0-9a-f]{40}\/tasks.eigen|5 tasks/ });
  t.ok((await json(0, "verify", `${hub.endpoint}/org/pack/resolve/main/tasks.eigen`))["ok"]);
  for (const change of [
    ["add", "hf:org/pack/tasks.eigen", "org/role"],
    ["compact", "hf:org/pack/tasks.eigen"],
  ])
    t.match(await run(...change), { status: 2, stderr: /lies on the Hugging Face Hub, and the file is to be changed/ });
});

t.test("a path on the disk wins, and what is mistyped is told", async (t) => {
  const { hub } = await work(t);
  hub.push("org/role", seed("debtags-role"));
  await cp(data("adapters/own-seed/debtags-use"), "org/role", { recursive: true });
  const { metadata } = (await json(0, "pack", "org/role", "--k", "2", "-o", "a.eigen")) as never;
  t.equal(metadata, undefined);
  t.same(hub.take(), [], "the Hub is not asked");
  const typo = await run("pack", "org/rolf", "-o", "b.eigen");
  t.match(typo, { status: 1, stderr: /org\/rolf: does not exist or cannot be read; check the path/ });
  t.same(hub.take(), [], "nor where the folder is here");
  const far = await run("pack", "orgs/role", "-o", "b.eigen");
  t.match(
    far.stderr.replace(/\s+/g, " "),
    /hf:orgs\/role: the Hub has no such repository.*There is no file or folder orgs\/role here, so it was taken for a repository of the Hugging Face Hub/,
  );
  t.equal(far.status, 1);
  t.match(await run("pack", "hf:role", "-o", "b.eigen"), { status: 1, stderr: /expected hf:org\/name/ });
});

t.test("check takes a repository's model, with what lies beside it", async (t) => {
  const { hub, home } = await work(t);
  const model = new Map([
    ["onnx/external.onnx", session("external.onnx")],
    ["onnx/external.onnx.data", session("external.onnx.data")],
    ["onnx/unrelated.data", new Uint8Array(1000)],
    ["tokenizer.json", text("{}")],
    ["tokenizer_config.json", text("{}")],
    ["pytorch_model.bin", new Uint8Array(1000)],
  ]);
  const commit = hub.push("org/model", model);
  hub.push("org/pack", new Map([["tasks.eigen", await packBytes(["adapters"], "base")]]));
  const checked = await json(0, "check", "org/model", "hf:org/pack/tasks.eigen");
  t.match(checked, {
    works: true,
    model: "hf:org/model/onnx/external.onnx",
    next: 'createEigenSession(ort, "hf:org/model/onnx/external.onnx", await openPack("hf:org/pack/tasks.eigen"))',
    run: { session: { works: true } },
  });
  const snapshot = join(home, "hub/models--org--model/snapshots", commit);
  const here = readdirSync(snapshot, { recursive: true, encoding: "utf8" }).sort();
  t.same(here, ["onnx", "onnx/external.onnx", "onnx/external.onnx.data", "tokenizer.json", "tokenizer_config.json"]);
  const moved = await json(2, "attach", "hf:org/model/onnx/external.onnx", "hf:org/pack/tasks.eigen", "-o", "a.onnx");
  t.match(moved["error"].message, /has weights in .*external\.onnx\.data; .* copy that folder first/);

  hub.push("org/model", new Map([...model, ["onnx/model_q4.onnx", session("q4.onnx")]]));
  const { error } = await json(1, "check", "org/model", "hf:org/pack/tasks.eigen");
  t.match(error, {
    message: /: holds several models; name one of onnx\/external.onnx, onnx\/model_q4.onnx/,
  });
  hub.push("org/plain", new Map([["model.safetensors", session("base.safetensors")]]));
  const none = await json(1, "check", "org/plain", "hf:org/pack/tasks.eigen");
  t.match(none["error"], { message: /hf:org\/plain@.*: holds no ONNX model; export one/ });
});
