/**
 * Statements of reports hold, also in rare cases: one adapter, none of the model, no head, no components, no update.
 */
import { cp, mkdir, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import t from "tap";
import { bytesOf, entries, type Spec } from "../support/adapters.ts";
import { type Ended, run } from "../support/command-line.ts";
import { folderFor } from "../support/folder.ts";
import { smaller } from "../support/internals/cli.ts";
import { data, vector } from "../support/packs.ts";

const folder = folderFor(t);
const at = (...names: string[]): string => join(folder, ...names);

/** Runs a command that must succeed. */
async function ran(...args: string[]): Promise<Ended> {
  const ended = await run(...args);
  if (ended.status !== 0) throw new Error(`${args.join(" ")}: ${ended.stderr}${ended.stdout}`);
  return ended;
}

/** Makes an adapter of some modules [8, 6] at rank 2. @param zero its updates are 0 */
async function adapter(id: string, modules: readonly string[], { base = "", head = false, zero = false } = {}) {
  const spec: Spec = Object.fromEntries([
    ...modules.flatMap((name, i) => [
      [`base_model.model.${name}.lora_A.weight`, [[2, 6], i + 1]] as const,
      [`base_model.model.${name}.lora_B.weight`, [[8, 2], i + id.length]] as const,
    ]),
    ...(head ? [["base_model.model.classifier.weight", [[3, 8], 1]] as const] : []),
  ]);
  const tensors = entries(spec).map((entry) =>
    zero && entry.name.includes("lora_B") ? { ...entry, read: () => new Uint8Array(8 * 2 * 4) } : entry,
  );
  await mkdir(at("adapters", id), { recursive: true });
  await writeFile(at("adapters", id, "adapter_model.safetensors"), await bytesOf(tensors));
  const config = {
    ...{ peft_type: "LORA", r: 2, lora_alpha: 2 },
    ...(base && { base_model_name_or_path: base }),
    ...(head && { modules_to_save: ["classifier"] }),
  };
  await writeFile(at("adapters", id, "adapter_config.json"), JSON.stringify(config));
  return at("adapters", id);
}

const BERT = ["bert.layer.0.query", "bert.layer.0.value"];
const UNET = ["unet.down.0.to_q", "unet.down.0.to_v"];
const one = await adapter("one", BERT, { base: "bert" });
const two = await adapter("two", BERT, { head: true });
const other = await adapter("other", UNET);
const idle = await adapter("idle", BERT, { zero: true });

t.test("adapters of another base model are named, though none contradicts the others", async (t) => {
  const stranger = /warning: "other" adapts none of the modules that the others adapt: is it of another base model\?/;
  t.match((await ran("pack", one, two, other, "-o", at("three.eigen"))).stderr, stranger);
  t.match((await ran("pack", one, two, other, "-o", at("three.eigen"), "--k", "2", "--force")).stderr, stranger);
  for (const [i, path] of [one, two, other].entries()) await ran("hub", "shard", path, "-o", at(`${i}.part`));
  t.match(
    (await ran("hub", "merge", at("0.part"), at("1.part"), at("2.part"), "--k", "2", "-o", at("b.eigen"))).stderr,
    stranger,
  );
  t.equal((await ran("pack", one, two, "-o", at("bert.eigen"), "--k", "1")).stderr, "");
  const named = await adapter("named", UNET, { base: "bert" });
  t.equal(
    (await ran("pack", one, two, named, "-o", at("n.eigen"))).stderr,
    "",
    "adapters that name one base are believed",
  );
  const more = await adapter("more", UNET);
  const others = /"more", "other" adapt none of the modules that the others adapt: are they/;
  t.match((await ran("pack", one, two, idle, other, more, "-o", at("m.eigen"))).stderr, others);
  const refused = await run("add", at("bert.eigen"), other);
  t.match(refused, {
    status: 1,
    stderr: /none of the modules that the tasks of .* adapt, but unet.*another base model\?/,
  });
});

t.test("a report says what there is", async (t) => {
  const alone = await ran("pack", one, "-o", at("alone.eigen"));
  t.match(alone.stdout, /: 1 task, 2 modules, /);
  t.match(alone.stdout, /× larger\)/);
  t.notMatch(alone.stdout, /nothing is shared|× smaller/);
  t.match(alone.stdout, /not whether it is the right one: pass --base to store fingerprints/);
  t.equal(alone.stderr, "", "which is no warning");
  const both = await ran("pack", one, two, "-o", at("both.eigen"));
  t.match(both.stdout, /^Nothing is shared: |^Shared: what layers read \(A\)/m);
  const { stdout } = await ran("pack", one, two, "-o", at("k.eigen"), "--k", "1");
  t.match(stdout, /components per side +1$[\s\S]*^ΔW error is a proxy: with --model answers decide\.$/m);
  t.same(
    [smaller(17.52), smaller(0.7), smaller(0.98), smaller(1)],
    ["17.5× smaller", "1.4× larger", "as large", "as large"],
  );
});

t.test("add refuses a task that would lose more than half of its ΔW, or than it is told", async (t) => {
  await cp(at("k.eigen"), at("limit.eigen"));
  const before = await readFile(at("limit.eigen"));
  const stranger = data("adapters/own-seed/sections-0");
  await ran(
    "pack",
    data("adapters/own-seed/debtags-role"),
    data("adapters/own-seed/debtags-use"),
    "-o",
    at("p.eigen"),
    "--k",
    "4",
  );
  const packed = await readFile(at("p.eigen"));
  for (const [flags, most] of [
    [[], "50 %"],
    [["--max-loss", "40%"], "40 %"],
  ] as const) {
    const { status, stderr } = await run("add", at("p.eigen"), stranger, ...flags);
    t.equal(status, 1);
    t.match(
      stderr,
      new RegExp(
        `task "sections-0" would lose [\\d.]+ % of its ΔW, which the components of .*p\\.eigen lack, and ${most}`,
      ),
    );
    t.match(stderr, /: nothing was added\. Pack all adapters again, with this one; or pass --max-loss 0\.\d+\n$/);
  }
  const { error } = JSON.parse((await run("add", at("p.eigen"), stranger, "--json")).stdout);
  t.match(error, { tag: "task", task: "sections-0" });
  t.ok(error.loss > 0.5 && error.loss <= 1);
  t.ok(packed.equals(await readFile(at("p.eigen"))));
  const allowed = await ran("add", at("p.eigen"), stranger, "--max-loss", "1");
  t.match(allowed.stderr, /loses [\d.]+ % of its ΔW, which the pack's components lack: pack all adapters again/);
  t.match((await ran("add", at("limit.eigen"), one, "--as", "one=again", "--max-loss", "0.5")).stdout, /1 task added/);
  t.notOk(before.equals(await readFile(at("limit.eigen"))));
});

t.test("verify: a task file by itself, and what is not signed is not ok", async (t) => {
  const pack = await ran("verify", at("k.eigen"));
  t.match(pack.stdout, /^signature +– +not signed$/m);
  const file = await ran("verify", vector("whole.eigentask"));
  t.match(file.stdout, /^checksums +ok +task whole$/m);
  t.match(file.stdout, /^hash +ok +sha256-/m);
  t.match(file.stdout, /^signature +– +not signed$/m);
  const { checks } = JSON.parse((await ran("verify", vector("whole.eigentask"), "--json")).stdout);
  const [, hash] = checks as { detail: string }[];
  await ran("verify", vector("whole.eigentask"), "--integrity", hash!.detail);
  t.match(await run("verify", vector("whole.eigentask"), "--integrity", `sha256-${"A".repeat(43)}=`), {
    ...{ status: 1, stderr: /its hash is sha256-.*, expected sha256-A/ },
  });
  await ran("keygen", "-o", at("me"));
  const unsigned = await run("verify", vector("whole.eigentask"), "--key", at("me.pub.pem"));
  t.match(unsigned, { status: 1, stderr: /it is not signed by any of --key/ });
  await cp(vector("whole.eigentask"), at("t.eigentask"));
  await ran("sign", at("t.eigentask"), "--key", at("me.pem"));
  t.match((await ran("verify", at("t.eigentask"), "--key", at("me.pub.pem"))).stdout, /^signature +ok +ed25519:/m);
  t.match(
    (await run("verify", at("t.eigentask"), "--key", at("me.pem"))).stderr,
    /--key .*me\.pem: .*got a private key: give/,
  );
  const damaged = await readFile(at("t.eigentask"));
  damaged[80]! ^= 1;
  await writeFile(at("damaged.eigentask"), damaged);
  t.match(await run("verify", at("damaged.eigentask")), { status: 1, stderr: /its checksum does not match/ });
  t.match(await run("verify", at("t.eigentask"), "--against", one), { status: 2, stderr: /--against needs a pack/ });
});

t.test("a file of another kind is called what it is", async (t) => {
  const onnx = data("sessions/gemm.onnx");
  const [tensors, text] = [data("sessions/base.safetensors"), at("text.json")];
  await writeFile(text, '{"a": 1}');
  await writeFile(at("empty"), "");
  const cases: [string[], number, RegExp][] = [
    [["check", onnx, onnx], 1, /gemm\.onnx.*this is an ONNX model, expected an EigenLoRA pack/],
    [["check", at("k.eigen"), onnx], 1, /k\.eigen.*this is an EigenLoRA pack, expected an ONNX model/],
    [["pack", one, "-o", at("x"), "--model", at("k.eigen")], 1, /this is an EigenLoRA pack, expected an ONNX model/],
    [["pack", at("k.eigen"), "-o", at("x")], 1, /this is an EigenLoRA pack, expected an adapter/],
    [
      ["learn", text, at("k.eigen"), "--model", onnx, "-o", at("x")],
      1,
      /k\.eigen.*not text in UTF-8: this is an EigenLo/,
    ],
    [["check", at("k.eigen"), at("k.eigen")], 1, /this is an EigenLoRA pack, expected an ONNX model/],
    [["check", tensors, at("k.eigen")], 1, /this is a safetensors file, expected an ONNX model/],
    [["inspect", onnx], 1, /this is an ONNX model, expected an EigenLoRA pack/],
    [["inspect", tensors], 1, /this is a safetensors file, expected an EigenLoRA pack/],
    [["inspect", vector("whole.eigentask")], 1, /this is an EigenLoRA task file, expected an EigenLoRA pack/],
    [["inspect", text], 1, /this is JSON, expected an EigenLoRA pack/],
    [["inspect", at("empty")], 1, /this is not an EigenLoRA pack: it is empty/],
    [["pack", one, "-o", at("x"), "--base", onnx], 1, /this is an ONNX model, expected a safetensors file/],
    [
      ["fold", at("k.eigen"), "--task", "one", "--base", onnx, "-o", at("x")],
      1,
      /this is an ONNX model, expected a saf/,
    ],
    [["hub", "merge", onnx, "-o", at("x")], 1, /this is an ONNX model, not a part/],
    [["hub", "merge", at("k.eigen"), "-o", at("x")], 1, /this is an EigenLoRA pack, not a part/],
  ];
  await cp(onnx, at("model.eigentask"));
  cases.push([
    ["add", at("k.eigen"), at("model.eigentask")],
    1,
    /this is an ONNX model, expected an EigenLoRA task file/,
  ]);
  for (const [args, status, message] of cases) {
    const said = await run(...args);
    t.match(said, { status, stderr: message }, args.join(" "));
    t.notMatch(said.stderr, /begins with|[0-9a-f]{16}|\d{12}/, "no bytes, no numbers made of them");
  }
});
