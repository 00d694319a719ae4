/**
 * What does a step of learning on the device take, beside PyTorch? The same coefficients (K 16, r 8) of the same model begin at the
 * same task and see the same batches: through onnxruntime-node, in torch, and as PEFT's LoRA (r 8), all with one thread, taking
 * turns. Beside that, a run of the serving session on a batch, and the memory of processes that serve and that train.
 *
 * node benchmarks/step.js [--json] [--rounds 7]      after npm run build; PYTHON with torch, transformers, peft for the peer
 */
import { spawnSync } from "node:child_process";
import { mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { openPack } from "eigenlora";
import { buildPack, writeSafetensors } from "eigenlora/build";
import { createTrainer } from "eigenlora/learn";
import { readAdapters } from "eigenlora/node";
import { createEigenSession } from "eigenlora/onnxruntime";
import * as ort from "onnxruntime-node";
import { openOnnxHost } from "../dist/src/onnx/host.js";
import { decodeTensor } from "../dist/src/tensor/dtypes.js";
import { createEncoder, model, readTask } from "../examples/minilm.js";
import { data, median, option, printParts, startPython } from "./report.js";

const ROUNDS = Number(option("rounds") ?? 7);
const STEPS_OF_A_ROUND = 3;
const RATE = 0.02;
const TASK = "debtags-role";
const CASES = /** @type {const} */ ([
  { name: "16 rows of 32 tokens", batch: 16, joined: 6 },
  { name: "16 rows of real lengths", batch: 16, joined: 1 },
]);
const MODES = ["serves, plain session", "serves, trainable session", "trains"];
const HELD_RUNS = 12;

/** @typedef {{ ids: number[][], mask: number[][], labels: number[] }} Batch for the peer */
/** @typedef {import("eigenlora").Pack} Pack */

ort.env.logLevel = "error";
const oneThread = { intraOpNumThreads: 1, interOpNumThreads: 1 };

const [, script = "", flag, mode = "", packPath = ""] = process.argv;
if (flag === "--hold") await hold(mode, packPath);
else await compare();

/**
 * Lines of the task as examples; joined ones are cut to the longest that the model was trained on.
 * @param {number} joined
 */
async function examplesOf(joined) {
  const { train, labels } = await readTask(TASK);
  const texts = train.map((_, i) =>
    Array.from({ length: joined }, (_, j) => train[(i + j * 37) % train.length][0]).join(" "),
  );
  const label = new Map(train.map(([, label], i) => [texts[i], label]));
  return { labels, label, examples: [...label].map(([text, label]) => ({ text, label })) };
}

/**
 * The child's part: serves or trains for a while and prints the most memory it ever held.
 * @param {string} way @param {string} path of the pack
 */
async function hold(way, path) {
  const encode = await createEncoder(ort);
  const pack = await openPack(path);
  const { examples, labels } = await examplesOf(6);
  const trainable = way !== "serves, plain session";
  const session = await createEigenSession(ort, model, pack, { session: oneThread, trainable });
  if (way === "trains") {
    const trainer = await createTrainer(session, { labels, encode, init: { task: TASK } });
    for await (const _ of trainer.fit(examples, { steps: HELD_RUNS, batch: 16 }));
  } else {
    await session.switchTask(TASK);
    for (let i = 0; i < HELD_RUNS; i++)
      await session.run(encode(examples.slice(16 * i, 16 * i + 16).map(({ text }) => text)));
  }
  const status = await readFile("/proc/self/status", "utf8").catch(() => "");
  const kilobytes = /VmHWM:\s+(\d+)/.exec(status)?.[1] ?? process.resourceUsage().maxRSS;
  console.log(JSON.stringify({ peak: Number(kilobytes) * 1024 }));
  process.exit();
}

async function compare() {
  const folder = await mkdtemp(join(tmpdir(), "eigenlora-step-"));
  try {
    const names = (await readdir(data("adapters/own-seed"))).filter((name) => !name.startsWith("."));
    const adapters = await readAdapters(names.map((id) => data(`adapters/own-seed/${id}`)));
    const { chunks } = await buildPack(adapters, { select: { kind: "k", k: 16 } });
    for (const adapter of adapters) await adapter.close();
    const file = join(folder, "tasks.eigen");
    await writeFile(file, chunks);
    const pack = await openPack(file);
    const paths = ["base", "task"].map((name) => join(folder, `${name}.safetensors`));
    await writeFile(paths[0], writeSafetensors(await baseEntries()));
    await writeFile(paths[1], writeSafetensors(await taskEntries(pack)));
    const torch = await startPython("step.py", data("minilm/config.json"), ...paths, String(RATE));
    const rows = [];
    for (const one of CASES) rows.push(await time(pack, one, "ask" in torch ? torch : undefined));
    if ("stop" in torch) torch.stop();
    const created = await creation(pack);
    await pack.close();
    printParts(
      [question(rows), created, memory(file)],
      ["first" in torch ? { name: "torch", version: torch.first.version } : { name: "torch", reason: torch.reason }],
    );
  } finally {
    await rm(folder, { recursive: true });
  }
}

/** @param {import("./report.js").Row[]} rows @returns {import("./report.js").Part} */
function question(rows) {
  return {
    question: `How long does a training step take? MiniLM, K 16, r 8, one thread each; median of ${ROUNDS * STEPS_OF_A_ROUND} steps, in turns.`,
    rows,
    notes: [
      "step: loss, gradients, clipping and AdamW, in ms; tokens are made before. forward: a run of the serving session on the same",
      "batch. CPU: time of all threads of the process, which others on the machine do not lengthen. Losses are ours and torch's,",
      "which began with the same numbers and saw the same batches.",
    ],
  };
}

/**
 * All ways on the same batches, in turns.
 * @param {Pack} pack
 * @param {(typeof CASES)[number]} shape
 * @param {{ ask(question: object): Promise<any> } | undefined} torch
 * @returns {Promise<import("./report.js").Row>}
 */
async function time(pack, { name, batch, joined }, torch) {
  const tokens = await createEncoder(ort);
  const { examples, label, labels } = await examplesOf(joined);
  /** What the trainer asked for last. @type {{ feeds: ReturnType<typeof tokens>, texts: readonly string[] }} */
  let asked = { feeds: tokens([""]), texts: [] };
  const encoded = new Map(examples.map(({ text }) => [text, tokens([text])]));
  /** @param {string[]} texts */
  const encode = (texts) => {
    asked = { feeds: joinRows(texts.map((text) => /** @type {any} */ (encoded.get(text)))), texts };
    return asked.feeds;
  };
  const serving = await createEigenSession(ort, model, pack, { session: oneThread });
  await serving.switchTask(TASK);
  const session = await createEigenSession(ort, model, pack, { session: oneThread, trainable: true });
  const trainer = await createTrainer(session, { labels, encode, init: { task: TASK } });
  await trainer.begin(TASK);
  await torch?.ask({ way: "begin" });
  const steps = (ROUNDS + 1) * STEPS_OF_A_ROUND;
  const fit = trainer.fit(examples, { steps, batch, rates: { terms: RATE, head: RATE }, warmup: 0, decay: "none" });
  /** @type {Record<string, number[]>} */
  const times = { ours: [], forward: [], coefficients: [], lora: [], torchForward: [] };
  /** CPU time, which others on the machine do not lengthen. @type {Record<"ours" | "coefficients" | "lora", number[]>} */
  const cpu = { ours: [], coefficients: [], lora: [] };
  /** Ours and torch's at each step. @type {[number, number][]} */
  const losses = [];
  for (let round = 0; round <= ROUNDS; round++) {
    /** @type {Batch[]} */
    const batches = [];
    const feeds = [];
    const own = [];
    for (let i = 0; i < STEPS_OF_A_ROUND; i++) {
      const [started, used] = [performance.now(), process.cpuUsage()];
      const { value } = await fit.next();
      times.ours.push(performance.now() - started);
      const { user, system } = process.cpuUsage(used);
      cpu.ours.push((user + system) / 1000);
      own.push(/** @type {{ loss: number }} */ (value).loss);
      feeds.push(asked.feeds);
      batches.push({
        ids: matrix(asked.feeds.input_ids),
        mask: matrix(asked.feeds.attention_mask),
        labels: asked.texts.map((text) => label.get(text) ?? 0),
      });
    }
    for (const one of feeds) {
      const started = performance.now();
      await serving.run(one);
      times.forward.push(performance.now() - started);
    }
    for (const [way, key] of /** @type {const} */ ([
      ["coefficients", "coefficients"],
      ["lora", "lora"],
      ["forward", "torchForward"],
    ])) {
      const answer = await torch?.ask({ way, batches });
      times[key].push(...(answer?.ms ?? []));
      if (way !== "forward") cpu[way].push(...(answer?.cpu ?? []));
      if (way === "coefficients" && answer) own.forEach((loss, i) => losses.push([loss, answer.losses[i]]));
    }
  }
  await session.release();
  await serving.release();
  // The first round warms up.
  const middle = (/** @type {number[]} */ ms) => median(ms.slice(STEPS_OF_A_ROUND)) ?? null;
  const [ours, forward, coefficients, lora, torchForward] = Object.values(times).map(middle);
  /** @param {[number, number] | undefined} both */
  const show = (both) => both?.map((loss) => loss.toFixed(4)).join(" / ") ?? null;
  /** @param {number | null} a @param {number | null} b */
  const ratio = (a, b) => (a === null || b === null ? null : a / b);
  return {
    name,
    "step, ms": ours,
    "torch, ms": coefficients,
    "÷ torch": ratio(ours, coefficients),
    "÷ torch, CPU": ratio(middle(cpu.ours), middle(cpu.coefficients)),
    "PEFT LoRA, ms": lora,
    "÷ PEFT": ratio(ours, lora),
    "÷ PEFT, CPU": ratio(middle(cpu.ours), middle(cpu.lora)),
    "forward, ms": forward,
    "step ÷ forward": ratio(ours, forward),
    "torch forward, ms": torchForward,
    "first loss": show(losses[0]),
    "last loss": show(losses.at(-1)),
  };
}

/**
 * Rows of one text each as one batch, padded behind.
 * @param {ReturnType<Awaited<ReturnType<typeof createEncoder<import("onnxruntime-node").Tensor>>>>[]} rows
 */
function joinRows(rows) {
  const width = Math.max(...rows.map(({ input_ids }) => input_ids.dims[1]));
  /** @param {"input_ids" | "attention_mask" | "token_type_ids"} name */
  const all = (name) => {
    const values = new BigInt64Array(rows.length * width);
    rows.forEach((row, r) => values.set(/** @type {BigInt64Array} */ (row[name].data), r * width));
    return new ort.Tensor("int64", values, [rows.length, width]);
  };
  return { input_ids: all("input_ids"), attention_mask: all("attention_mask"), token_type_ids: all("token_type_ids") };
}

/** @param {import("onnxruntime-node").Tensor} tensor */
function matrix({ data: values, dims }) {
  const numbers = Array.from(/** @type {BigInt64Array} */ (values), Number);
  return Array.from({ length: dims[0] }, (_, r) => numbers.slice(r * dims[1], (r + 1) * dims[1]));
}

/** Every weight of the model but the head, f32 and as PyTorch has it. */
async function baseEntries() {
  const host = await openOnnxHost(model);
  const entries = [];
  for (const { name, shape, dtype, layout } of host.list()) {
    if (name.startsWith("classifier")) continue;
    const view = await host.read(name);
    const count = shape.reduce((a, b) => a * b, 1);
    const bytes = /** @type {Uint8Array} */ (view.data).subarray(view.byteOffset);
    const values = decodeTensor(dtype, bytes, 1, count);
    if (layout !== "in-out") entries.push(entry(name, [...shape], values));
    else {
      const [inputs, out] = shape;
      entries.push(
        entry(
          name,
          [out, inputs],
          Float32Array.from(values, (_, i) => values[(i % inputs) * out + Math.floor(i / inputs)]),
        ),
      );
    }
  }
  await host.close?.();
  return entries;
}

/**
 * Components and coefficients of the task, and its head, in f32.
 * @param {Pack} pack
 */
async function taskEntries(pack) {
  const bases = (await pack.bases()).bytes;
  const blob = await pack.load(TASK);
  /** @param {Uint8Array} section @param {{ dtype: any, rows: number, width: number, byteOffset: number, byteLength: number }} tensor */
  const decode = (section, { dtype, rows, width, byteOffset, byteLength }) =>
    decodeTensor(dtype, section.subarray(byteOffset, byteOffset + byteLength), rows, width);
  const entries = [];
  for (const term of blob.terms) {
    const module = pack.modules[term.module];
    for (const side of /** @type {const} */ (["A", "B"])) {
      const basis = /** @type {NonNullable<typeof module.A>} */ (module[side]);
      const { tensor } = /** @type {NonNullable<typeof term.A>} */ (term[side]);
      const { width } = basis.tensor;
      const rows = decode(bases, basis.tensor);
      entries.push(entry(`${module.name}.E_${side}`, [basis.K, width], rows.slice(0, basis.K * width)));
      entries.push(entry(`${module.name}.M_${side}`, [width], rows.slice(basis.K * width)));
      entries.push(entry(`${module.name}.alpha_${side}`, [term.rank, basis.K], decode(blob.bytes, tensor)));
    }
  }
  for (const { name, shape, tensor } of blob.parameters)
    entries.push(entry(name.replace("classifier", "head"), [...shape], decode(blob.bytes, tensor)));
  return entries;
}

/** @param {string} name @param {number[]} shape @param {Float32Array} values */
function entry(name, shape, values) {
  return {
    name,
    dtype: /** @type {const} */ ("F32"),
    shape,
    read: () => new Uint8Array(values.buffer, values.byteOffset, values.byteLength),
  };
}

/**
 * Sessions of each kind, in turns.
 * @param {Pack} pack
 * @returns {Promise<import("./report.js").Part>}
 */
async function creation(pack) {
  /** @type {Record<string, () => Promise<{ release(): Promise<void> }>>} */
  const ways = {
    plain: () => ort.InferenceSession.create(model, oneThread),
    "switches, factors": () => createEigenSession(ort, model, pack, { session: oneThread, mode: "factors" }),
    trainable: () => createEigenSession(ort, model, pack, { session: oneThread, trainable: true }),
  };
  const times = new Map(Object.keys(ways).map((name) => [name, /** @type {number[]} */ ([])]));
  for (let round = 0; round <= ROUNDS; round++) {
    for (const [name, create] of Object.entries(ways)) {
      const started = performance.now();
      const session = await create();
      if (round > 0) times.get(name)?.push(performance.now() - started);
      await session.release();
    }
  }
  const rows = [...times].map(([name, ms]) => ({ name, "create, ms": median(ms) ?? null }));
  return {
    question: `How long does it take to create a session? Median of ${ROUNDS}, in turns.`,
    rows: rows.map((row) => ({ ...row, "÷ plain": Number(row["create, ms"]) / Number(rows[0]["create, ms"]) })),
    notes: ["From the path of the model. Trainable: run on tiny inputs to look at shapes, and differentiated."],
  };
}

/**
 * The most memory that processes ever hold that serve and that train.
 * @param {string} file the pack
 * @returns {import("./report.js").Part}
 */
function memory(file) {
  const peaks = MODES.map((name) => {
    const child = spawnSync(process.execPath, ["--expose-gc", script, "--hold", name, file], { encoding: "utf8" });
    if (!child.stdout) throw new Error(child.stderr);
    return JSON.parse(child.stdout).peak / 1e6;
  });
  return {
    question: `How much memory does a process hold at most? ${HELD_RUNS} batches of 16 rows of 32 tokens, a fresh process each.`,
    rows: MODES.map((name, i) => ({
      name,
      "peak, MB": peaks[i],
      "÷ plain": peaks[i] / peaks[0],
      "÷ trainable": peaks[i] / peaks[1],
    })),
    notes: ["Peak resident set of the whole process: Node with the packages loaded, the model, the pack."],
  };
}
