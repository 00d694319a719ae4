/**
 * Training in Python within the components of a pack: what `export --components` writes, and the examples of
 * examples/python with PEFT and transformers' Trainer. After `add`, a session answers as PEFT does with the adapter
 * that was saved.
 */
import { execFile } from "node:child_process";
import { cp, mkdir, readFile, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { openPack, type Pack } from "eigenlora";
import { type Adapter, type AdapterModule, projectAdapters } from "eigenlora/build";
import { createEigenSession } from "eigenlora/onnxruntime";
import * as ort from "onnxruntime-node";
import t, { type Test } from "tap";
import { safetensorsOf } from "../../benchmarks/lib/adapters.js";
import { baseEntries } from "../../benchmarks/lib/torch.js";
import { createEncoder, readTask } from "../../examples/minilm.js";
import { adapterOf } from "../support/adapters.ts";
import { json, run, words } from "../support/command-line.ts";
import { fromRoot, workIn } from "../support/folder.ts";
import { normal, openSafetensors, openSource, uniform } from "../support/internals/base.ts";
import { data } from "../support/packs.ts";
import { lacking, python, pythonLacks, skip, soak } from "../support/required.ts";

ort.env.logLevel = "error";
const ONE_THREAD = { intraOpNumThreads: 1, interOpNumThreads: 1 };
const EXAMPLES = fromRoot("examples/python");
const folder = workIn(t);

const DONORS = ["debtags-admin", "debtags-game", "debtags-use", "sections-0", "sections-1", "sections-2"];
const own = DONORS.map((id) => data(`adapters/own-seed/${id}`));
const script = ["debtags-admin", "debtags-field", "debtags-game", "debtags-use", "sections-0", "sections-1"];

/** Packs whose tasks share components of both sides. */
const SHARED: Readonly<Record<string, readonly string[]>> = {
  column: ["--k", "16"],
  balanced: ["--k", "16", "--rank", "8"],
  few: ["--k", "16", "--rank", "4", "--dtype", "int4"],
  coded: ["--k", "16", "--rank", "4", "--step", "0.05"],
};

/**
 * Runs Python.
 * @returns what it prints; undefined where a package is missing, which skips the test unless it is required
 */
async function inPython(t: Test, name: string, ...args: string[]): Promise<any> {
  const oracle = fileURLToPath(new URL(name, import.meta.url));
  try {
    const { stdout } = await promisify(execFile)(python, [oracle, ...args], {
      maxBuffer: 2 ** 26,
    });
    return JSON.parse(stdout);
  } catch (error) {
    const { code, stderr, message } = error as Error & { code?: number | string; stderr?: string };
    if (code !== 3 && code !== "ENOENT") throw error;
    skip(t, "peft", `PEFT is not here: ${stderr || message}`);
    return undefined;
  }
}

t.before(async () => {
  for (const [name, how] of Object.entries(SHARED)) await json(0, "pack", ...own, ...how, "-o", `${name}.eigen`);
  const alike = script.map((id) => data(`adapters/same-script/${id}`));
  await json(0, "pack", ...alike, "-o", "sides.eigen");
});

t.test("components of every kind of pack, as Python reads them", async (t) => {
  await mkdir("read");
  for (const name of Object.keys(SHARED)) {
    const said = await json(0, "export", `${name}.eigen`, "--components", "-o", `read/${name}.safetensors`);
    t.match(said, { file: `read/${name}.safetensors`, modules: 12, sides: 24 });
    await json(0, "export", `${name}.eigen`, "--task", "sections-0", "-o", `read/${name}`);
  }
  const found = await inPython(t, "../support/components-oracle.py", "read");
  if (!found) return;
  t.same(Object.keys(found).sort(), Object.keys(SHARED).sort());
  const query = "bert.encoder.layer.0.attention.self.query";
  for (const [name, { about, shapes, off }] of Object.entries<any>(found)) {
    t.ok(off < 1e-6, `${name}: a task's rows are ${off} off`);
    const pack = await openPack(`${name}.eigen`);
    t.match(about, { "eigenlora.components": pack.basisId, base_model: "sentence-transformers/all-MiniLM-L6-v2" });
    const names = pack.modules.map((module) => module.name);
    t.same(JSON.parse(about.modules), names, name);
    const K = pack.modules.find((module) => module.name === query)!.A[0]!.K;
    await pack.close();
    t.same(shapes[`${query}.A.components`], [K, 384], name);
    t.same(shapes[`${query}.A.mean`], [384], name);
  }
  t.equal(found.few.about.rank, "4");
  t.equal(found.column.about.coefficients, "f16");
  t.equal(found.column.shapes[`${query}.B.components`][0], 16);
});

t.test("sides that are not shared are left out, and a pack that shares nothing is refused", async (t) => {
  const { sides } = await json(0, "export", "sides.eigen", "--components", "-o", "sides.safetensors");
  t.ok(sides > 0 && sides < 24, `${sides} sides`);
  const { stdout } = await run(...words`export sides.eigen --components -o again.safetensors`);
  t.match(stdout, / on \d+ of 24 sides/);
  await json(0, "pack", ...own, "-o", "apart.eigen");
  await cp(data("adapters/own-seed/sections-0/adapter_model.safetensors"), "mine.safetensors");
  for (const [given, message] of [
    [words`apart.eigen --components -o x`, /tasks of apart\.eigen share none\. .* --k 32/],
    [words`column.eigen -o x`, /missing --task; or --components/],
    [words`column.eigen --components --task sections-0 -o x`, /--components and --task exclude each other/],
    [words`column.eigen --components --format kohya -o x`, /--components and --format exclude each other/],
    [words`sides.eigen --components -o sides.safetensors`, /already exists; choose another name/],
    [words`sides.eigen --components -o mine.safetensors`, /already exists; choose another name/],
  ] as const) {
    const { status, stderr } = await run("export", ...given);
    t.equal(status, 2, given.join(" "));
    t.match(stderr, message);
  }
});

t.test("rows made of the file's components are added without loss, in either gauge", async (t) => {
  for (const [name, coefficients, most] of [
    ["column", "f16", 1e-3],
    ["balanced", "f16", 1e-3],
  ] as const) {
    const file = `made-${name}.safetensors`;
    await json(0, "export", `${name}.eigen`, "--components", "-o", file);
    const pack = await openPack(`${name}.eigen`);
    const [made] = await projectAdapters(pack, [await madeOf(file, pack)], { basis: "f32", coefficients, head: "f32" });
    const { total } = made!.residual;
    t.ok(total <= most && total > 0, `${name}: loses ${total} of its ΔW`);
    await pack.close();
  }
});

/** An adapter whose rows are random coefficients of components, about the mean. */
async function madeOf(file: string, { modules }: Pack): Promise<Adapter> {
  const { tensors, read } = await openSafetensors(await openSource(file));
  const random = uniform(1);
  const values = async (name: string): Promise<Float32Array> => new Float32Array((await read(name)).slice().buffer);
  /** Rows [8, in] or [8, out]. */
  const rowsOf = async (side: string, length: number): Promise<Float32Array> => {
    const E = await values(`${side}.components`);
    const width = E.length / tensors.get(`${side}.components`)!.shape[0]!;
    const mean = tensors.has(`${side}.mean`) ? await values(`${side}.mean`) : new Float32Array(width);
    const rows = new Float32Array(length);
    for (let from = 0; from < length; from += width) {
      const alpha = Float32Array.from({ length: E.length / width }, () => 0.1 * normal(random));
      for (let i = 0; i < width; i++)
        rows[from + i] = alpha.reduce((sum, a, k) => sum + a * E[k * width + i]!, mean[i]!);
    }
    return rows;
  };
  const made = modules.map(({ name, in: inputs, out, layout, kernel }): AdapterModule => {
    const read = async () => ({
      rank: 8,
      A: await rowsOf(`${name}.A`, 8 * inputs),
      Bt: await rowsOf(`${name}.B`, 8 * out),
    });
    return { name, in: inputs, out, layout, kernel, rank: 8, read };
  });
  return adapterOf("made", made, { file });
}

/** One call of an example: what is given to it, and texts that its adapter is asked. */
interface Job {
  readonly script: "train" | "train_llm";
  readonly given: readonly [model: string, components: string, rows: string, out: string, steps: number, batch: number];
  readonly asked: readonly string[];
}

interface Trained {
  readonly trained: number;
  readonly logits: readonly (readonly number[])[];
  readonly again: number;
}

/** Coefficients of MiniLM's twelve modules, and a head of eight labels. */
const coefficients = (perModule: number): number => 12 * perModule + 8 * 385;
const COUNTS: Readonly<Record<string, number>> = {
  column: coefficients(2 * 8 * 16),
  balanced: coefficients(2 * 8 * 16),
};

const lines = (rows: readonly object[]): string => rows.map((row) => `${JSON.stringify(row)}\n`).join("");

/** A checkpoint of the bundled model, under the name that its adapters have for it. */
async function writeModel(path: string): Promise<void> {
  await mkdir(path);
  await writeFile(join(path, "model.safetensors"), await safetensorsOf(await baseEntries()));
  for (const file of ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
    await cp(data(`minilm/${file}`), join(path, file));
}

t.test("adapters that PEFT trains within the components are added without loss", async (t) => {
  t.setTimeout(240_000);
  const model = "all-MiniLM-L6-v2";
  await writeModel(model);
  const { labels, train, test } = await readTask("debtags-role");
  const rows = train.slice(0, 64).map(([text, label]) => ({ text, label: labels[label] }));
  await writeFile("rows.jsonl", lines(rows));
  const asked = test.slice(0, 8).map(([text]) => text);
  const names = [...Object.keys(COUNTS), "sides"];
  const runs: Job[] = [];
  for (const name of names) {
    await run("export", `${name}.eigen`, "--components", "-o", `components/${name}.safetensors`);
    runs.push({
      script: "train",
      given: [model, `components/${name}.safetensors`, "rows.jsonl", `mine/${name}`, 4, 8],
      asked,
    });
  }
  await mkdir("book");
  await symlink(join(folder, model), "book/my-model");
  await cp("rows.jsonl", "book/rows.jsonl");
  await cp("components/column.safetensors", "book/components.safetensors");
  const notebook = { folder: join(folder, "book"), steps: 2, asked };
  const other = await otherModel();
  const wrong = [[other, "components/column.safetensors"]];
  const bases = [model, "components/column.safetensors", "rows.jsonl", "mine/bases"];
  await writeFile("jobs.json", JSON.stringify({ runs, notebook, wrong, bases }));
  const found = await inPython(t, "../support/training-oracle.py", EXAMPLES, "jobs.json");
  if (!found) return;
  t.match(
    found.wrong[0],
    /column\.safetensors: bert\.encoder\.layer\.0\.attention\.self\.\w+\.A is 384 wide, expected 32/,
  );
  t.match(found.bases, { float16: true, bfloat16: true, saved: false }, "half a float in the file, f32 in training");
  t.match(found.bases.nan, /^step 1: expected a finite loss, found nan; nothing is saved/);
  const encode = await createEncoder(ort);
  for (const [i, name] of names.entries()) {
    const { trained, logits, again } = found.runs[i] as Trained;
    if (name in COUNTS) t.equal(trained, COUNTS[name], `${name}: coefficients and the head learn`);
    t.ok(again < 1e-3, `${name}: read as a checkpoint, ${again} off`);
    const off = await addedOff(`${name}.eigen`, `mine/${name}`, encode(asked), logits);
    t.ok(off.loss <= (name === "sides" ? 0.15 : 1e-3), `${name}: loses ${off.loss} of its ΔW`);
    if (name !== "sides") t.ok(off.logits <= 1e-3, `${name}: logits are ${off.logits} off`);
  }
  const { loss, logits } = await addedOff("column.eigen", "book/adapters/mine", encode(asked), found.notebook.logits);
  t.ok(loss <= 1e-3 && logits <= 1e-3, `the notebook's: loses ${loss}, logits ${logits} off`);
});

/** Adds an adapter to a pack. @returns what it loses of its ΔW, and how far a session's logits are from PEFT's */
async function addedOff(
  file: string,
  adapter: string,
  feeds: Record<string, ort.Tensor>,
  expected: readonly (readonly number[])[],
): Promise<{ loss: number; logits: number }> {
  const task = adapter.replaceAll("/", "-");
  const { residual } = await json(0, "add", file, adapter, "--as", `${adapter}=${task}`, "--any-base");
  const pack = await openPack(file);
  const session = await createEigenSession(ort, data("minilm/model_fp16.onnx"), pack, { session: ONE_THREAD });
  t.same(pack.tasks.get(task)?.metadata.labels?.length, expected[0]!.length);
  await session.switchTask(task);
  const logits = (await session.run(feeds))["logits"]!.data as Float32Array;
  await session.close();
  await pack.close();
  const off = expected.flat().map((value, i) => Math.abs(value - logits[i]!));
  t.equal(off.length, logits.length);
  return { loss: residual[0].total, logits: Math.max(...off) };
}

/** The configuration of a BERT with the same names and other shapes. */
async function otherModel(): Promise<string> {
  const config = JSON.parse(await readFile(data("minilm/config.json"), "utf8"));
  const small = { hidden_size: 32, num_attention_heads: 2, intermediate_size: 48, vocab_size: 64 };
  await mkdir("other");
  await writeFile("other/config.json", JSON.stringify({ ...config, ...small }));
  return "other";
}

if (soak)
  t.test("the notebook repeats the examples", { skip: lacking("python", pythonLacks("json")) }, async (t) => {
    const made = join(folder, "train.ipynb");
    const tool = fromRoot("test/tools/notebook.py");
    await promisify(execFile)(python, [tool, EXAMPLES, made]);
    t.equal(await readFile(join(EXAMPLES, "train.ipynb"), "utf8"), await readFile(made, "utf8"), tool);
  });
