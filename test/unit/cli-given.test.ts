/**
 * Arguments that people give to the command line: folders of models, archives, pointers, whole models, other spellings
 * of sizes, formats and shares. Each is taken, or named as what it is.
 */
import { cp, mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { openPack } from "eigenlora";
import t, { type Test } from "tap";
import { json, run } from "../support/command-line.ts";
import { workIn } from "../support/folder.ts";
import { createOutput, downloading } from "../support/internals/cli.ts";
import { data } from "../support/packs.ts";

/** A folder with two adapters in `ad/`. */
async function workplace(t: Test): Promise<void> {
  workIn(t);
  for (const id of ["two", "three"]) await cp(data(`sessions/adapters/${id}`), join("ad", id), { recursive: true });
}

/** The message of a command that fails. */
async function refusal(...args: string[]): Promise<string> {
  const { status, stderr } = await run(...args);
  return status === 0 ? "" : stderr.replaceAll(/\s+/g, " ");
}

t.test("--base takes a model's folder; one without weights is warned of, once", async (t) => {
  await workplace(t);
  await mkdir("base");
  await cp(data("sessions/base.safetensors"), "base/model.safetensors");
  const fingerprints = async (file: string): Promise<number> => {
    const pack = await openPack(file);
    await pack.close();
    return pack.modules.filter(({ fingerprint }) => fingerprint !== undefined).length;
  };
  const made = await run("pack", "ad", "--base", "base", "-o", "folder.eigen");
  t.match(made.stdout, /of it, fingerprints of the base +1.02 kB/);
  t.match(await json(0, "pack", "ad", "--base", "base/model.safetensors", "-o", "file.eigen"), { notes: [] });
  t.equal(await fingerprints("folder.eigen"), 4, "of 256 bytes each");
  t.equal(await fingerprints("file.eigen"), 4);

  // Weights in several files, with an index.
  await mkdir("sharded");
  await cp("base/model.safetensors", "sharded/model-00001-of-00001.safetensors");
  const index = { weight_map: { a: "model-00001-of-00001.safetensors", b: "model-00001-of-00001.safetensors" } };
  await writeFile("sharded/model.safetensors.index.json", JSON.stringify(index));
  await json(0, "pack", "ad", "--base", "sharded", "-o", "sharded.eigen");
  t.equal(await fingerprints("sharded.eigen"), await fingerprints("file.eigen"));
  for (const file of ["../base/model.safetensors", 5, ["model-00001-of-00001.safetensors"]]) {
    await writeFile("sharded/model.safetensors.index.json", JSON.stringify({ weight_map: { a: file } }));
    t.match(
      await refusal("pack", "ad", "--base", "sharded", "-o", "strayed.eigen"),
      /index\.json: "weight_map" names .*, expected a file of its folder/,
    );
  }

  await mkdir("config");
  await writeFile("config/config.json", '{"num_attention_heads":4,"model_type":"bert"}');
  const { status, stdout, stderr } = await run("pack", "ad", "--base", "config", "-o", "config.eigen");
  t.equal(status, 0);
  t.match(
    stderr,
    /--base config: has no weights in safetensors, so no fingerprints are stored: give model\.safetensors/,
  );
  t.notMatch(stdout, /pass --base/);
});

t.test("what is no adapter is named as what it is", async (t) => {
  await workplace(t);
  const pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
  await mkdir("lfs/x", { recursive: true });
  await cp("ad/two/adapter_config.json", "lfs/x/adapter_config.json");
  await writeFile("lfs/x/adapter_model.safetensors", pointer);
  t.match(
    await refusal("pack", "lfs", "-o", "x"),
    /adapter_model\.safetensors, header: this is a Git LFS pointer.* git lfs pull/,
  );
  await writeFile("tasks.eigen", pointer);
  t.match(
    await refusal("inspect", "tasks.eigen"),
    /this is a Git LFS pointer, expected an EigenLoRA pack; .* git lfs pull/,
  );
  await writeFile("model.onnx", pointer);
  await json(0, "pack", "ad", "-o", "ok.eigen");
  t.match(await refusal("check", "model.onnx", "ok.eigen"), /this is a Git LFS pointer, expected an ONNX model/);

  await writeFile("adapters.zip", "PK\u0003\u0004");
  t.match(
    await refusal("pack", "adapters.zip", "-o", "x"),
    /adapters\.zip: is an archive; unpack it, and give its folder/,
  );
  await mkdir("down");
  await writeFile("down/adapters.tar.gz", "x");
  t.match(await refusal("pack", "down", "-o", "x"), /holds no adapter; .* It holds adapters\.tar\.gz: unpack that/);

  await mkdir("whole");
  await writeFile("whole/pytorch_model.bin", "x");
  t.match(
    await refusal("pack", "whole", "-o", "x"),
    /It holds pytorch_model\.bin\. A whole model is no adapter: give what PEFT/,
  );
  await mkdir("full");
  await cp(data("sessions/base.safetensors"), "full/model.safetensors");
  t.match(await refusal("pack", "full", "-o", "x"), /It holds model\.safetensors\. A whole model is no adapter/);
  t.match(
    await refusal("pack", "full/model.safetensors", "-o", "x"),
    /holds no LoRA, but \d+ tensors such as bert\.[\w.]+\. A whole model is no adapter/,
  );
});

/** Messages that newcomers stumbled over, each as it should be. */
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
