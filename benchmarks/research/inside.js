/**
 * What does a task lose that PEFT trains within the components of a pack, beside PEFT's LoRA? Tasks of own-seed are left out of the pack
 * one at a time and trained by examples/python (`PYTHON`, with PEFT), coefficients and head, or a whole LoRA and head, from the same rows in
 * as many steps. Judged on test lines that occur in no training set, neither the task's nor a donor's. Adapters trained within the
 * components are added to the pack, and a session answers with them. Every run is a line of `--into`; what is there is not run again.
 */
import { appendFile, mkdir, mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { fileURLToPath } from "node:url";
import { openPack } from "eigenlora";
import { createEigenSession } from "eigenlora/onnxruntime";
import * as ort from "onnxruntime-node";
import { mean } from "simple-statistics";
import { runProgram } from "../../dist/src/cli/program.js";
import { createEncoder, data, model, readTask } from "../../examples/minilm.js";
import { folderOf, packOfK, safetensorsOf, withAdapters } from "../lib/adapters.js";
import { number, readArguments, text } from "../lib/arguments.js";
import { peerLine, startPython } from "../lib/peers.js";
import { print, progress } from "../lib/report.js";
import { baseEntries } from "../lib/torch.js";

/** @typedef {{ task: string, way: "inside" | "lora", seed: number, settings: string, trained: number, accuracy: number, off: number | null, loss: number | null, seconds: number }} Cell */

const QUESTION = "What does a task lose that PEFT trains within the components of a pack, beside PEFT's LoRA?";
const given = readArguments(QUESTION, {
  tasks: text("NAMES", "tasks that are left out, between commas", "sections-2,debtags-role,debtags-uitoolkit"),
  seeds: number("seeds", 3, 1),
  k: number("components of each side", 32, 1),
  steps: number("steps", 80, 1),
  batch: number("rows of a step", 16, 1),
  rate: number("learning rate of coefficients and heads", 0.04),
  "lora-rate": number("of heads beside a LoRA, whose factors learn at a tenth", 0.04),
  into: text("FILE", "lines of all runs", fileURLToPath(new URL("results/inside.jsonl", import.meta.url))),
});
ort.env.logLevel = "error";
const encode = await createEncoder(ort);
const ids = (await readdir(folderOf("own-seed"))).filter((name) => !name.startsWith("."));
const tasks = new Map(await Promise.all(ids.map(async (id) => /** @type {const} */ ([id, await readTask(id)]))));
const trained = new Set([...tasks.values()].flatMap(({ train }) => train.map(([line]) => line)));
const known = (await readFile(given.into, "utf8").catch(() => "")).split("\n").filter(Boolean);
/** @type {Cell[]} */
const cells = known.map((line) => JSON.parse(line));
const wanted = given.tasks.split(",");
const folder = await mkdtemp(join(tmpdir(), "eigenlora-inside-"));
await writeBase(join(folder, "base"));
const examples = fileURLToPath(new URL("../../examples/python", import.meta.url));
const peft = await startPython("inside.py", [examples, join(folder, "base")]);
try {
  if (!("reason" in peft)) for (const task of wanted) await runAll(task, peft);
} finally {
  if (!("reason" in peft)) peft.stop();
  await rm(folder, { recursive: true });
}
report();

/** A checkpoint of the bundled model. @param {string} path */
async function writeBase(path) {
  await mkdir(path);
  await writeFile(join(path, "model.safetensors"), await safetensorsOf(await baseEntries()));
  for (const name of ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
    await writeFile(join(path, name), await readFile(data(`minilm/${name}`)));
}

/** @param {Cell["way"]} way */
function settingsOf(way) {
  const { k, steps, batch, rate } = given;
  return `${steps} steps of ${batch}, ${way === "inside" ? `K ${k}, rate ${rate}` : `rank 8, rate ${given["lora-rate"]}`}`;
}

/** Both ways and all seeds of a task. @param {string} task @param {import("../lib/peers.js").Running} peft */
async function runAll(task, peft) {
  const donors = ids.filter((id) => id !== task).map((id) => folderOf("own-seed", id));
  const file = join(folder, `${task}.eigen`);
  await writeFile(file, await withAdapters(donors, (adapters) => packOfK(adapters, given.k)));
  await command("export", file, "--components", "-o", `${file}.safetensors`);
  for (let seed = 1; seed <= given.seeds; seed++) {
    for (const way of /** @type {const} */ (["inside", "lora"])) {
      const settings = settingsOf(way);
      if (cells.some((one) => one.task === task && one.way === way && one.seed === seed && one.settings === settings))
        continue;
      const cell = { task, way, seed, settings, ...(await train(peft, file, { task, way, seed })) };
      cells.push(cell);
      await appendFile(given.into, `${JSON.stringify(cell)}\n`);
      progress(`${task}, ${way}, seed ${seed}: ${(100 * cell.accuracy).toFixed(1)} %`);
    }
  }
}

/** @param {import("../lib/peers.js").Running} peft @param {string} file of the pack @param {Pick<Cell, "task" | "way" | "seed">} run */
async function train(peft, file, { task, way, seed }) {
  const { labels, train, test } = /** @type {import("../../examples/minilm.js").Task} */ (tasks.get(task));
  const judges = test.filter(([line]) => !trained.has(line));
  const out = join(folder, `${task}-${way}-${seed}`);
  const { steps, batch } = given;
  const how = way === "lora" ? { way, rate: given["lora-rate"] } : { way: `${file}.safetensors`, rate: given.rate };
  const asked = { ...how, out, steps, batch, seed, labels, train, test: judges };
  const { trained: count, accuracy, logits, seconds } = await peft.ask(asked);
  const none = { off: null, loss: null };
  const lines = judges.slice(0, 16).map(([line]) => line);
  const added = way === "lora" ? none : await add(file, out, lines, logits);
  return { trained: count, accuracy, seconds, ...added };
}

/** Adds an adapter. @param {string} file @param {string} adapter @param {string[]} lines @param {number[][]} expected PEFT's logits */
async function add(file, adapter, lines, expected) {
  const { residual } = JSON.parse(await command("add", file, adapter, "--any-base", "--json"));
  const pack = await openPack(file);
  const session = await createEigenSession(ort, model, pack);
  await session.switchTask(basename(adapter));
  const { data: found } = (await session.run(encode(lines))).logits;
  await session.close();
  await pack.close();
  const off = expected.flat().map((value, i) => Math.abs(value - Number(found[i])));
  return { off: Math.max(...off), loss: residual[0].total };
}

/** Output of a command. @param {...string} args */
async function command(...args) {
  let [out, errors] = ["", ""];
  const status = await runProgram(args, { write: (said) => (out += said) }, { write: (said) => (errors += said) });
  if (status !== 0) throw new Error(errors);
  return out;
}

function report() {
  const rows = wanted.flatMap((name) => {
    const of = (/** @type {Cell["way"]} */ way) =>
      cells.filter((one) => one.task === name && one.way === way && one.settings === settingsOf(way));
    const percent = (/** @type {Cell["way"]} */ way) => 100 * mean(of(way).map(({ accuracy }) => accuracy));
    const inside = of("inside");
    if (inside.length === 0) return [];
    return {
      ...{ name, "within components, %": percent("inside"), "LoRA, %": percent("lora"), seeds: inside.length },
      ...{ numbers: inside[0].trained, "of a LoRA": of("lora")[0].trained },
      "loss of ΔW": Math.max(...inside.map(({ loss }) => loss ?? Infinity)),
      "logits off": Math.max(...inside.map(({ off }) => off ?? Infinity)),
    };
  });
  const notes = [`within components: ${settingsOf("inside")}; LoRA: ${settingsOf("lora")}`];
  print(given.json, [{ question: QUESTION, rows, notes }], [peerLine("PEFT", peft)]);
}
