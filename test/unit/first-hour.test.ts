/** Messages that newcomers stumbled over, each as it should be. */
import { cp, mkdir, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import t from "tap";
import { json, run } from "../support/command-line.ts";
import { workIn } from "../support/folder.ts";
import { createOutput, downloading } from "../support/internals/cli.ts";
import { data } from "../support/packs.ts";

const MODEL = data("sessions/torchscript.onnx");
const adapters = ["two", "five"].map((id) => data(`sessions/adapters/${id}`));

t.beforeEach(async (t) => workIn(t));

t.test("a folder stands for the model in it, or in its folder onnx", async (t) => {
  await json(0, "pack", ...adapters, "-o", "p.eigen", "--k", "2", "--base", data("sessions/base.safetensors"));
  await mkdir("plain");
  await mkdir("exported/onnx", { recursive: true });
  await mkdir("bare");
  for (const path of ["plain/m.onnx", "exported/onnx/model.onnx", "model.onnx"]) await cp(MODEL, path);
  for (const [folder, file] of [
    ["plain", "plain/m.onnx"],
    ["exported", "exported/onnx/model.onnx"],
  ] as const) {
    const found = await run("check", folder, "p.eigen", "--files-only");
    t.equal(found.status, 0, found.stderr);
    t.match(found.stdout, new RegExp(`^${file}: `, "m"));
    const attached = await run("attach", folder, "p.eigen", "-o", `${folder}.onnx`);
    t.equal(attached.status, 0, attached.stderr);
    // Only what comes after the model was found is missing.
    const learn = await run("learn", "p.eigen", "lines.jsonl", "--model", folder, "-o", "t.eigentask");
    t.match(learn.stderr, /lines\.jsonl: cannot be read/);
  }
  const refused = async (folder: string): Promise<string> =>
    (await json(1, "check", folder, "p.eigen"))["error"].message;
  t.equal(await refused("bare"), "bare: holds no ONNX model; export one from it (docs/export.md)");
  await cp(MODEL, "plain/n.onnx");
  t.equal(await refused("plain"), "plain: holds several models; name one of plain/m.onnx, plain/n.onnx");
  await cp(data("sessions/base.safetensors"), "bare/model.safetensors");
  await json(0, "fold", "p.eigen", "--task", "two", "--base", "bare", "-o", "folded.safetensors");
});

t.test("adapters of two base models: a warning, and a card that names none", async (t) => {
  for (const [id, base] of [
    ["two", "org/one"],
    ["five", "org/other"],
  ]) {
    await cp(data(`sessions/adapters/${id}`), id!, { recursive: true });
    const path = join(id!, "adapter_config.json");
    const config = JSON.parse(await readFile(path, "utf8"));
    await writeFile(path, JSON.stringify({ ...config, base_model_name_or_path: base }));
  }
  const { stderr } = await run("pack", "two", "five", "-o", "p.eigen", "--any-base");
  t.match(stderr, /^warning: the adapters name different base models, so the pack names none: org\/other, org\/one$/m);
  t.equal((await json(0, "inspect", "p.eigen"))["baseModel"], null);
});

t.test("files that are downloaded together are one sum of bytes", async (t) => {
  const said: string[] = [];
  let now = 0;
  const out = createOutput(false, { isTTY: true, write: (text: string) => said.push(text.slice(4)) }, () => now);
  const tell = downloading(out);
  const at = (status: "initiate" | "progress" | "done", file: string, loaded: number, total: number): void => {
    now += 1000;
    tell({
      status,
      stage: "adapter",
      name: "hf:org/role@0123456789012345678901234567890123456789",
      file,
      loaded,
      total,
      progress: 0,
    });
  };
  at("initiate", "a", 0, 100);
  at("initiate", "b", 0, 300);
  at("progress", "a", 100, 100);
  at("done", "a", 100, 100);
  at("progress", "b", 100, 300);
  at("progress", "b", 300, 300);
  at("done", "b", 300, 300);
  at("initiate", "c", 0, 1000);
  at("progress", "c", 500, 1000);
  t.same(said, [
    "downloading 2 files of hf:org/role: 100 B of 400 B, 25 %",
    "downloading 2 files of hf:org/role: 200 B of 400 B, 50 %, 4 s left",
    "",
    "downloading c: 500 B of 1.00 kB, 50 %",
  ]);
});
