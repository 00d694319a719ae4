import { spawnSync } from "node:child_process";
import { cp, mkdir, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { buildPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import * as ort from "onnxruntime-node";
import t, { type Test } from "tap";
import { run as eigenlora, json } from "../support/command-line.ts";
import { fromRoot, workIn } from "../support/folder.ts";
import { changed } from "../support/graphs.ts";
import { openSafetensors, openSource } from "../support/internals/base.ts";
import { fromBinary } from "../support/internals/models.ts";
import { concat, data, LOSSLESS, packOf } from "../support/packs.ts";
import { python, pythonLacks, skip } from "../support/required.ts";
import { feedsIn, feeds as feedsOf, GOLDENS, modelBytes, difference as off } from "../support/sessions.ts";

/**
 * `eigenlora attach`: onnxruntime runs its output without anything of this package, compared with answers of PyTorch
 * and PEFT (test/data/sessions). The Python part runs the code of docs/attach.md as it is written there.
 */
const main = fromRoot("dist/src/cli/main.js");
const folder = workIn(t);
const sessions = (name: string): string => data(`sessions/${name}`);
const outputs = GOLDENS.outputs as Record<string, Record<string, number[][]>>;
const TOLERANCE = 1e-5;
const LOWEST = -3.4028234663852886e38;

type Report = Record<string, any>;

/** Writes a pack that keeps its adapters whole. @returns its path */
async function pack(...adapters: string[]): Promise<string> {
  const path = join(folder, `${adapters[0]!.replace("/", "-")}.eigen`);
  const { bytes } = await packOf(
    adapters.map((name) => `sessions/${name}`),
    LOSSLESS,
  );
  await writeFile(path, bytes);
  return path;
}

/** Writes a pack with more options. */
const packed = async (out: string, ...options: string[]): Promise<unknown> =>
  await json(0, "pack", sessions("adapters"), "-o", out, "--energy", "1", "--dtype", "f32", ...options);

const bert = await pack("adapters");
const mlp = await pack("adapters-mlp");

type Inputs = Map<string, ort.Tensor>;

function tensorOf(isInteger: boolean, values: readonly (number | bigint)[], dims: readonly number[]): ort.Tensor {
  if (isInteger) return new ort.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
  return new ort.Tensor("float32", Float32Array.from(values, Number), dims);
}

const inputsOf = async (path: string): Promise<Inputs> => new Map(Object.entries(await feedsIn(join(folder, path))));

const load = (path: string): Promise<ort.InferenceSession> =>
  ort.InferenceSession.create(join(folder, path), { logSeverityLevel: 3, intraOpNumThreads: 1 });

/** Rows of the first output. */
async function run(session: ort.InferenceSession, task: Inputs): Promise<number[][]> {
  const own = session.inputNames.filter((name) => !name.startsWith("eigenlora."));
  const feeds = { ...feedsOf(ort, { inputNames: own }), ...Object.fromEntries(task) };
  const { [session.outputNames[0]!]: output } = await session.run(feeds as Record<string, ort.Tensor>);
  const [rows, columns] = output!.dims as [number, number];
  const values = output!.data as Float32Array;
  return Array.from({ length: rows }, (_, r) => Array.from(values.subarray(r * columns, (r + 1) * columns)));
}

/** Largest difference of rows. */
const difference = (found: readonly (readonly number[])[], expected: readonly (readonly number[])[]): number =>
  off(found.flat(), expected.flat());

/** One task per row, padded as docs/attach.md says. */
function stack(tasks: readonly Inputs[]): Inputs {
  const stacked: Inputs = new Map();
  for (const [name, first] of tasks[0]!) {
    const rows = tasks.map((task) => task.get(name)!);
    const height = Math.max(...rows.map(({ dims }) => dims[1]!));
    const width = Math.max(...rows.map(({ dims }) => dims[2]!));
    const at = (tensor: ort.Tensor, i: number, j: number): number | bigint | undefined => {
      const [, h = 0, w = 0] = tensor.dims;
      return i < h && j < w ? (tensor.data as Float32Array)[i * w + j] : undefined;
    };
    const nothing = name.endsWith(".bias") ? LOWEST : first.type === "int64" ? -1n : 0;
    const places = Array.from({ length: height * width }, (_, k) => [Math.floor(k / width), k % width] as const);
    const values = rows.flatMap((row) => places.map(([i, j]) => at(row, i, j) ?? nothing));
    stacked.set(name, tensorOf(first.type === "int64", values, [rows.length, height, width]));
  }
  return stacked;
}

/** Checks all tasks, the base, and one task per row on a written model, with its inputs and nothing else. */
async function checkAnswers(t: Test, report: Report, model: string, tasks: readonly string[]): Promise<void> {
  const answers = outputs[GOLDENS.models[model]!]!;
  const session = await load(report["file"]);
  t.same(session.outputNames, ["logits"], "no outputs but the model's own");
  const base = await inputsOf(report["base"].file);
  t.same([...base.keys()].sort(), report["inputs"].map((i: any) => i.name).sort());
  t.same(session.inputNames.filter((name) => name.startsWith("eigenlora.")).sort(), [...base.keys()].sort());
  const values = new Map([["base", base]]);
  for (const { id, file } of report["tasks"]) values.set(id, await inputsOf(file));
  t.same([...values.keys()].sort(), ["base", ...tasks].sort());
  for (const [id, inputs] of values) {
    t.ok(difference(await run(session, inputs), answers[id]!) < TOLERANCE, `${model}, ${id}`);
  }
  const rows = [tasks.at(-1)!, "base", tasks[0]!];
  const mixed = await run(session, stack(rows.map((id) => values.get(id)!)));
  const expected = rows.map((id, r) => answers[id]![r]!);
  const own = mixed.map((row, r) => row.slice(0, expected[r]!.length));
  t.ok(difference(own, expected) < TOLERANCE, `${model}, ${rows.join(" | ")}`);
  const behind = mixed.flatMap((row, r) => row.slice(expected[r]!.length));
  t.ok(
    behind.every((v) => v === LOWEST),
    "nothing behind",
  );
  await session.release();
}

for (const [model, tasks, ids, modes] of [
  ["torchscript", bert, ["five", "three", "two"], ["core", "factors"]],
  ["q4", bert, ["five", "three", "two"], ["core"]],
  ["external", bert, ["five", "three", "two"], ["core"]],
  ["gemm", mlp, ["a", "b"], ["core", "factors"]],
] as const) {
  for (const mode of modes) {
    t.test(`${model}, mode ${mode}`, async (t) => {
      const out = join(`${model}-${mode}`, "model.onnx");
      await mkdir(join(folder, dirname(out)));
      const given = join(dirname(out), `${model}.onnx`);
      await cp(sessions(`${model}.onnx`), given);
      if (model === "external") await cp(sessions("external.onnx.data"), `${given}.data`);
      const report = await json(0, "attach", given, tasks, "-o", out, "--mode", mode);
      t.match(report, { file: out, mode, reason: "asked for", modules: model === "gemm" ? 2 : 4 });
      t.equal(report["bytes"], (await readFile(join(folder, out))).length);
      for (const { file, bytes } of [report["base"], ...report["tasks"]]) {
        t.equal(bytes, (await readFile(join(folder, file))).length);
      }
      t.equal(
        report["inputs"].some((i: any) => i.kind === "core"),
        mode === "core",
      );
      for (const { dims } of report["inputs"]) t.equal(dims[0], "tasks");
      t.same(report["external"], model === "external" ? [join(dirname(out), "external.onnx.data")] : []);
      await checkAnswers(t, report, model, ids);
    });
  }
}

t.test("tasks that would be one file on disks that ignore case are refused", async (t) => {
  const rename = new Map([
    ["two", "SST2"],
    ["three", "sst2"],
  ]);
  const adapters = await readAdapters(
    ["two", "three"].map((id) => sessions(`adapters/${id}`)),
    { rename },
  );
  const { chunks } = await buildPack(adapters, LOSSLESS);
  for (const adapter of adapters) await adapter.close();
  await writeFile(join(folder, "names.eigen"), concat(chunks));
  const refused = await json(2, "attach", sessions("torchscript.onnx"), "names.eigen", "-o", "names.onnx");
  const message = /the tasks "SST2" and "sst2" would be one file on disks that ignore case: name others with --task/;
  t.match(refused, { error: { tag: "usage", message } });
});

t.test("names of files and what they say of themselves", async (t) => {
  await packed("odd.eigen", "--as", "two=base", "--as", "three=ä/..*b");
  const command = ["attach", sessions("torchscript.onnx"), "odd.eigen", "-o", "odd.onnx"];
  const report = await json(0, ...command, "--task", "base", "--task", "ä/..*b");
  t.match(report, { mode: "core", reason: /11 components/, base: { file: "odd.base.safetensors" } });
  const written = ["odd.tasks/base.safetensors", "odd.tasks/%C3%A4%2F..%2Ab.safetensors"];
  t.same(
    report["tasks"].map((task: any) => task.file),
    written,
  );
  t.same((await readdir(join(folder, "odd.tasks"))).length, 2, "some tasks only");
  const session = await load("odd.onnx");
  const answers = outputs["base"]!;
  const files = { "odd.base": "base", "odd.tasks/base": "two", "odd.tasks/%C3%A4%2F..%2Ab": "three" };
  for (const [file, id] of Object.entries(files)) {
    const found = await run(session, await inputsOf(`${file}.safetensors`));
    t.ok(difference(found, answers[id]!) < TOLERANCE, `${file} is ${id}`);
  }
  const bytes = await readFile(join(folder, report["tasks"][1].file));
  const { metadata } = await openSafetensors(await openSource(bytes));
  t.equal(metadata.get("eigenlora.task"), "ä/..*b");
  t.same(JSON.parse(metadata.get("labels")!), ["three 0", "three 1", "three 2"]);
  const { metadataProps } = fromBinary("ModelProto", await readFile(join(folder, "odd.onnx")));
  for (const key of ["eigenlora.basis", "eigenlora.mode"]) {
    t.equal(metadataProps.find((entry) => entry.key === key)?.value, metadata.get(key), key);
  }
  t.equal(metadata.get("eigenlora.basis"), (await json(0, "inspect", "odd.eigen"))["basisId"]);
  const people = await eigenlora(...command, "--force");
  t.match(
    people.stdout,
    /4 modules.*mode core.*\n.*odd\.base\.safetensors.*\n.*3 tasks in odd\.tasks.*\nthe weights of 4 modules could not be confirmed/,
  );
});

t.test("weights in files beside the model", async (t) => {
  await mkdir(join(folder, "source"));
  for (const name of ["external.onnx", "external.onnx.data"]) await cp(sessions(name), join(folder, "source", name));
  const weights = await readFile(sessions("external.onnx.data"));
  const same = await json(0, "attach", "source/external.onnx", bert, "-o", "source/same.onnx");
  t.same(same["external"], [join("source", "external.onnx.data")]);
  const beside = await readdir(join(folder, "source"));
  t.same(
    beside.filter((name) => name.includes("data")),
    ["external.onnx.data"],
    "no copy",
  );
  await checkAnswers(t, same, "external", ["five", "three", "two"]);

  await mkdir(join(folder, "target"));
  const moved = await json(2, "attach", "source/external.onnx", bert, "-o", "target/model.onnx");
  t.match(moved["error"], { tag: "usage", message: /has weights in source.external\.onnx\.data; write it into/ });
  t.same(await readdir(join(folder, "target")), [], "nothing is written");
  const over = await json(2, "attach", "source/external.onnx", bert, "--force", "-o", "source/external.onnx.data");
  t.match(over["error"], { tag: "usage", message: /overwrite/ });
  t.same(await readFile(join(folder, "source/external.onnx.data")), weights);

  // A file in a folder of its own keeps its relative name.
  await mkdir(join(folder, "source/parts"));
  await writeFile(join(folder, "source/parts/weights.bin"), weights);
  await writeFile(join(folder, "source/nested.onnx"), located("parts/weights.bin"));
  const report = await json(0, "attach", "source/nested.onnx", bert, "-o", "source/out.onnx");
  t.same(report["external"], [join("source", "parts", "weights.bin")]);
  await checkAnswers(t, report, "external", ["five", "three", "two"]);
  await rm(join(folder, "source/parts"), { recursive: true });
  const gone = await json(1, "attach", "source/nested.onnx", bert, "-o", "source/again.onnx");
  t.match(gone["error"], { tag: "source", message: /weights\.bin/ });
});

/** The model with its weights in a file of this name. */
const located = (location: string): Uint8Array =>
  changed(modelBytes("external"), ({ initializer }) => {
    for (const { externalData } of initializer)
      for (const entry of externalData) if (entry.key === "location") entry.value = location;
  });

t.test("weights that are called as what is written", async (t) => {
  await mkdir(join(folder, "named"));
  for (const location of ["out.base.safetensors", "out.tasks/two.safetensors"]) {
    const path = join(folder, "named", location);
    await mkdir(dirname(path), { recursive: true });
    await cp(sessions("external.onnx.data"), path);
    await writeFile(join(folder, "named/in.onnx"), located(location));
    const { error } = await json(2, "attach", "named/in.onnx", bert, "--force", "-o", "named/out.onnx");
    t.match(error, { tag: "usage", message: /would overwrite what it is made of/ }, location);
    t.same(new Uint8Array(await readFile(path)), new Uint8Array(await readFile(sessions("external.onnx.data"))));
  }
});

t.test("what cannot be is refused, and nothing is written", async (t) => {
  await mkdir(join(folder, "refused"));
  const refuse = async (status: number, ...args: string[]): Promise<unknown> =>
    (await json(status, "attach", ...args, "-o", "refused/out.onnx"))["error"];
  const torchscript = sessions("torchscript.onnx");
  // A convolution that a task brings whole.
  const vision = fromRoot("test/data/forms/vision.onnx");
  const folded = join(folder, "whole.eigen");
  await writeFile(folded, (await packOf(["forms/adapters-vision-whole"])).bytes);
  t.match(await refuse(1, vision, folded), { tag: "base", message: /eigenlora fold.*mode "folded"/ });
  t.match(await refuse(1, vision, folded, "--mode", "core"), { tag: "base", message: /mode "folded"/ });
  t.match(await refuse(2, torchscript, bert, "--mode", "folded"), { tag: "usage", message: /core or factors/ });
  t.match(await refuse(2, torchscript, bert, "--mode", "fast"), { tag: "usage", message: /core/ });
  t.match(await refuse(1, torchscript, bert, "--task", "too"), { tag: "task", nearest: ["two"] });
  t.match(await refuse(1, "odd.onnx", bert), { tag: "format", message: /task inputs already/ });
  t.match(await refuse(1, bert, bert), { tag: "format", message: /this is an EigenLoRA pack, expected an ONNX model/ });
  t.match(await refuse(1, torchscript, torchscript), { tag: "format" });
  t.same(await readdir(join(folder, "refused")), []);
  await writeFile(join(folder, "blocked.tasks"), "");
  const blocked = (await json(1, "attach", torchscript, bert, "-o", "blocked.onnx"))["error"];
  t.match(blocked, { tag: "source", file: "blocked.tasks" });
  t.same(
    (await readdir(folder)).filter((name) => name.startsWith("blocked")),
    ["blocked.tasks"],
  );
  t.match(await json(2, "attach", torchscript, bert), { error: { message: /missing --output/ } });
  await cp(sessions("gemm.onnx"), join(folder, "own.onnx"));
  t.match(await json(2, "attach", "own.onnx", mlp, "-o", "./own.onnx"), {
    error: { tag: "usage", message: /overwrite/ },
  });
  t.match(await json(2, "attach", "own.onnx", mlp, "-o", mlp), { error: { tag: "usage", message: /overwrite/ } });
  t.same(await readFile(join(folder, "own.onnx")), await readFile(sessions("gemm.onnx")));
});

t.test("onnxruntime in Python: the code of docs/attach.md, as it stands", async (t) => {
  const reason = pythonLacks("numpy", "onnxruntime", "safetensors.numpy");
  if (reason) return skip(t, "onnxruntime-python", reason);
  const text = await readFile(fromRoot("docs/attach.md"), "utf8");
  const [command = ""] = /(?<=npx eigenlora ).*/.exec(text) ?? [];
  const code = [...text.matchAll(/```python\n(.*?)```/gs)].map(([, block]) => block).join("\n");
  await mkdir(join(folder, "python"));
  const inPython = (name: string): string => join(folder, "python", name);
  const there = { encoding: "utf8", cwd: join(folder, "python") } as const;
  const report = "\nprint(json.dumps([logits.tolist(), [row[:n].tolist() for row, n in zip(mixed, labels)]]))\n";
  await packed(inPython("tasks.eigen"), "--as", "two=spam", "--as", "three=topic");
  const { input_ids, attention_mask, token_type_ids } = GOLDENS.feeds;
  await writeFile(inPython("feeds.json"), JSON.stringify({ input_ids, attention_mask, token_type_ids }));
  for (const model of ["torchscript", "q4"]) {
    await cp(sessions(`${model}.onnx`), inPython("model.onnx"));
    const attached = spawnSync(process.execPath, [main, ...command.split(" "), "--force"], there);
    t.equal(attached.status, 0, `${model}: ${command}`);
    const ran = spawnSync(python, ["-c", code + report], there);
    if (ran.status !== 0) throw new Error(ran.stderr);
    const [logits, mixed] = JSON.parse(ran.stdout.trim().split("\n").at(-1)!) as [number[][], number[][]];
    const { two, three } = outputs[GOLDENS.models[model]!]! as Record<"two" | "three", number[][]>;
    t.ok(difference(logits, two) < TOLERANCE, `${model}: one task`);
    t.ok(difference(mixed, [two[0]!, three[1]!, two[2]!]) < TOLERANCE, `${model}: one task per row`);
  }
});
