/**
 * Export to files of diffusers, kohya, llama.cpp and ONNX Runtime: a task of a lossless pack, exported, gives the
 * golden weights in the tool of that format, and the same factors in our own reader. Content without a place in a
 * format is refused by name.
 */
import { execFileSync, spawnSync } from "node:child_process";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { AdapterError } from "eigenlora";
import { type Adapter, buildPack, diffusersFile, ggufFile, kohyaFile, onnxAdapterFile } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import t from "tap";
import { deltaOf, relativeDifference } from "../support/compare.ts";
import { fromRoot } from "../support/folder.ts";
import { concat, data, LOSSLESS } from "../support/packs.ts";
import { lacking, python, pythonLacks, runtimes, skip, without } from "../support/required.ts";

const goldens = data("goldens/formats");
const cli = fromRoot("dist/src/cli/main.js");
const CONFIG = JSON.stringify({ model_type: "mistral", num_attention_heads: 4, num_key_value_heads: 2 });

/** Golden adapter, its name in the oracle, and the format it is exported to. */
const CASES = [
  ["diffusers/adapter.safetensors", "diffusers.safetensors", "diffusers"],
  ["diffusers-sd2/adapter.safetensors", "sd2.safetensors", "diffusers"],
  ["locon-dora/adapter.safetensors", "kohya.safetensors", "kohya"],
  ["gguf/adapter-f32.gguf", "adapter.gguf", "gguf"],
  ["onnx-adapter/adapter.onnx_adapter", "adapter.onnx_adapter", "onnx_adapter"],
] as const;

async function readOne(path: string, base?: string): Promise<Adapter> {
  const [adapter] = await readAdapters([path], { base });
  return adapter!;
}

/** Exports tasks of lossless packs into a folder, by the command line. */
async function exportAll(folder: string): Promise<void> {
  const base = join(folder, "config.json");
  writeFileSync(base, CONFIG);
  for (const [golden, name, format] of CASES) {
    const adapter = await readOne(join(goldens, golden), base);
    const pack = join(folder, `${name}.eigen`);
    writeFileSync(pack, concat((await buildPack([adapter], LOSSLESS)).chunks));
    const args = ["export", pack, "--task", adapter.id, "--format", format, "-o", join(folder, name), "--base", base];
    const { status, stderr } = spawnSync(process.execPath, [cli, ...args], { encoding: "utf8" });
    if (status !== 0) throw new Error(`${name}: ${stderr}`);
    await adapter.close();
  }
}

const exported = t.testdir();
t.before(() => exportAll(exported));

t.test("format → lossless pack → format: the same modules and updates", async (t) => {
  const base = join(exported, "config.json");
  for (const [golden, name] of CASES) {
    const [before, after] = [await readOne(join(goldens, golden), base), await readOne(join(exported, name), base)];
    t.same([...after.modules.keys()], [...before.modules.keys()], name);
    let worst = 0;
    for (const [module, { read, in: inputs, out, kernel }] of before.modules) {
      const other = after.modules.get(module)!;
      t.same([other.in, other.out, other.kernel], [inputs, out, kernel]);
      const [was, is] = [await read(), await other.read()];
      worst = Math.max(worst, relativeDifference(deltaOf(is, out, inputs), deltaOf(was, out, inputs)));
      if (was.magnitude) worst = Math.max(worst, relativeDifference(is.magnitude!, was.magnitude));
    }
    t.ok(worst <= 1e-6, `${name}: off by ${worst}`);
    await before.close();
    await after.close();
  }
});

t.test("each tool loads what was exported and makes the golden weights of it", async (t) => {
  t.setTimeout(120_000);
  const oracle = fromRoot("test/support/export-oracle.py");
  let output: string;
  try {
    output = execFileSync(python, [oracle, goldens, exported], { encoding: "utf8", stdio: "pipe" });
  } catch (error) {
    const { status, stderr, message } = error as Error & { status: number | null; stderr?: string };
    if (status !== 3 && (error as NodeJS.ErrnoException).code !== "ENOENT") throw error;
    return skip(t, "diffusers", `${python} lacks a package: ${stderr || message}`);
  }
  const found = new Map<string, unknown>(Object.entries(JSON.parse(output)));
  t.same([...found.keys()].sort(), CASES.map(([, name]) => name).sort());
  for (const [name, off] of found) t.ok(typeof off === "number" && off <= 1e-6, `${name}: ${off}`);
});

const LLAMA = runtimes("llama/node_modules/node-llama-cpp");
const noLlama = without("llama", LLAMA) || lacking("peft", pythonLacks("gguf"));

t.test("llama.cpp answers with what was exported as with PEFT's merged weights", { skip: noLlama }, (t) => {
  const folder = t.testdir();
  const script = (name: string): string => fileURLToPath(new URL(name, import.meta.url));
  execFileSync(python, [script("../support/llama-base.py"), join(goldens, "gguf"), folder]);
  const [base, merged] = [join(folder, "base.gguf"), join(folder, "merged.gguf")];
  const pairs = [base, "", merged, "", base, join(exported, "adapter.gguf")];
  const answers = JSON.parse(
    execFileSync(process.execPath, [script("../support/llama.js"), LLAMA, ...pairs], { encoding: "utf8" }),
  );
  const [plain, expected, found] = answers.map((row: number[]) => Float64Array.from(row));
  t.ok(relativeDifference(plain, expected) > 1e-2, "the adapter changes the answer");
  t.ok(relativeDifference(found, expected) < 1e-6, `off by ${relativeDifference(found, expected)}`);
  t.end();
});

t.test("what a format has no place for is refused by name", async (t) => {
  const peft = (name: string): Promise<Adapter> => readOne(data(`goldens/peft/${name}/adapter`));
  const heads = await peft("modules-to-save");
  const plain = await peft("plain");
  const embedding = await peft("embedding");
  const conv = await peft("conv");
  const dora = await peft("dora");
  const llama = { architecture: "llama", heads: 4, kvHeads: 2 };
  const refused: [() => Promise<unknown>, RegExp][] = [
    [() => diffusersFile(heads), /\(saved\) has no place in a LoRA file of diffusers.*export as PEFT/],
    [() => diffusersFile(plain), /does not begin with a model of a pipeline/],
    [() => kohyaFile(embedding), /embedding/],
    [() => ggufFile(plain, llama), /query is no weight of llama/],
    [() => ggufFile(plain, {}), /architecture is not known; expected one of llama, qwen2.*`base`/],
    [() => ggufFile(plain, { architecture: "rwkv" }), /"rwkv" is none whose names are known/],
    [() => onnxAdapterFile(conv), /is stored as conv/],
    [() => onnxAdapterFile(dora), /has a magnitude \(DoRA\)/],
  ];
  for (const [make, message] of refused) await t.rejects(make, { message, constructor: AdapterError });
});
