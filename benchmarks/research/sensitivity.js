/**
 * Does it pay to store the modules that answers depend on more finely? The dependence is measured by text: all adapters with one module
 * rounded coarsely, and the change of their answers. Then entropy-coded packs of equal bytes: one step for all modules, and steps that
 * are finer where answers depend on more, by reverse water-filling. Judged by answers to other texts, as packed and distilled: mean
 * KL(adapter ‖ pack). No text of any test split is used.
 */

import { openPack } from "eigenlora";
import { buildPack } from "eigenlora/build";
import { createEigenSession, createEngine } from "eigenlora/onnxruntime";
import { createJudge, distill } from "eigenlora/train";
import * as ort from "onnxruntime-node";
import { geometricMean, mean } from "simple-statistics";
import { pairNorm } from "../../dist/src/extract/error.js";
import { balance, pairOf } from "../../dist/src/extract/gauge.js";
import { rowSteps } from "../../dist/src/extract/row-steps.js";
import { shuffle, uniform } from "../../dist/src/tensor/random.js";
import { createEncoder, model, readTask } from "../../examples/minilm.js";
import { folderOf, plainTexts, SUITES, testTexts, withAdapters } from "../lib/adapters.js";
import { choice, number, readArguments } from "../lib/arguments.js";
import { print, progress } from "../lib/report.js";

/**
 * @typedef {import("eigenlora/build").Adapter} Adapter
 * @typedef {import("eigenlora/build").BuildOptions} BuildOptions
 * @typedef {import("../lib/report.js").Row} Row
 * @typedef {{ label: string, bytes: number, step: number, pack: Awaited<ReturnType<typeof openPack>> }} Made
 */

/** The packs of docs/research/size.md. */
const PACKS = {
  "own-seed": { k: 28, rank: 5, step: 0.033, headStep: 0.5 },
  "shared-seed": { k: 28, rank: 5, step: 0.033, headStep: 0.5 },
  hub: { k: 20, rank: 3, step: 0.11, headStep: 0.3 },
};
/** Multiple of the pack's own step at which the change of answers is well above the resolution of the texts. */
const COARSE = 4;
/** Most texts that a task is distilled on. */
const MOST_TEXTS = 512;
/** Largest difference of packs that count as equal in bytes. */
const CLOSE = 0.0015;
const MOST_TRIES = 12;
/** Options with one thread: the same numbers on every machine. */
const SESSION = { intraOpNumThreads: 1, interOpNumThreads: 1 };

const given = readArguments("Does it pay to store the modules that answers depend on more finely?", {
  suite: choice(SUITES, "which adapters", "own-seed"),
  k: number("components. Default: as in docs/research/size.md", undefined, 1),
  rank: number("strongest directions of each module that are kept. Default: as in docs/research/size.md", undefined, 1),
  step: number("one step for all modules, whose bytes the others keep to. Default: as in docs/research/size.md"),
  texts: number("that sensitivities are found by, and as many others that judge", 48, 8),
  tasks: number("distil so many tasks, spread over the suite", 7),
  steps: number("of distilling", 240, 1),
});
const { k, rank, step, headStep } = {
  ...PACKS[given.suite],
  ...defined({ k: given.k, rank: given.rank, step: given.step }),
};
ort.env.logLevel = "error";
const engine = createEngine(ort, SESSION);
const encode = /** @type {any} */ (await createEncoder(ort));

await withAdapters([folderOf(given.suite)], async (adapters) => {
  const tasks = await Promise.all(adapters.map(({ id }) => readTask(id)));
  const pool = plainTexts(tasks);
  const [asked, judging] = [pool.slice(0, given.texts), pool.slice(given.texts, 2 * given.texts)];
  const sensitivity = await sensitivities(adapters, asked);
  const bytes = (await packOf(adapters, step, sensitivity, 0)).bytes;
  /** @type {Made[]} */
  const packs = [];
  for (const power of [0, 0.5, 1, 1.5]) packs.push(await within(adapters, bytes, sensitivity, power));
  const rows = await judged(adapters, packs, judging);
  if (given.tasks > 0) {
    const chosen = spread(adapters.length, given.tasks);
    const unused = new Set([...asked, ...testTexts(tasks)]);
    const texts = (/** @type {number} */ i) => textsOf(tasks[i], pool, unused);
    for (const at of [0, 2])
      Object.assign(
        rows[at],
        await distilled(
          packs[at],
          chosen.map((i) => [adapters[i], texts(i)]),
        ),
      );
  }
  print(given.json, [
    {
      question: `How much do answers depend on a module (MiniLM, ${given.suite}, ${adapters.length} adapters)?`,
      rows: [...sensitivity].map(([name, value]) => ({ name, sensitivity: value })),
      notes: [
        "KL ÷ ‖ΔW − ΔW'‖² when this module alone is rounded coarsely, as a multiple of the geometric mean of all.",
      ],
    },
    {
      question: `Do steps by module pay at equal bytes (K ${k}, rank ${rank}, heads ${headStep})?`,
      rows,
      notes: [
        "Steps ÷ sensitivity^(power ÷ 2); 1 is reverse water-filling. KL in nats, mean over tasks and texts that sensitivities were not found by.",
        `Distilled: ${given.steps} steps, of ${given.tasks} tasks, judged by their own texts that were held back. Bytes are those before.`,
      ],
    },
  ]);
});

/**
 * KL for each ‖ΔW − ΔW'‖² that coarse rounding of one module makes, as a multiple of its geometric mean.
 * @param {readonly Adapter[]} adapters
 * @param {readonly string[]} texts
 * @returns {Promise<Map<string, number>>}
 */
async function sensitivities(adapters, texts) {
  const judge = createJudge(engine, model, { adapters, texts, encode, most: texts.length });
  const found = new Map();
  for (const name of new Set(adapters.flatMap(({ modules }) => [...modules.keys()]))) {
    const coarse = await Promise.all(adapters.map((adapter) => rounded(adapter, name)));
    const { chunks } = await buildPack(
      coarse.map(({ adapter }) => adapter),
      { gauge: "balanced", select: { kind: "k", k: 0 }, privateTerms: 255 },
    );
    found.set(name, (await judge.judge(await opened(chunks))) / mean(coarse.map(({ lost }) => lost)));
    progress(`${name}: ${found.get(name)} nats`);
  }
  await judge.close();
  const typical = geometricMean([...found.values()]);
  return new Map([...found].map(([name, value]) => [name, value / typical]));
}

/**
 * The adapter with one module rounded coarsely, and ‖ΔW − ΔW'‖² as a share of what the adapter typically does to a module.
 * @param {Adapter} adapter @param {string} name
 * @returns {Promise<{ adapter: Adapter, lost: number }>}
 */
async function rounded(adapter, name) {
  const module = adapter.modules.get(name);
  if (!module) return { adapter, lost: 0 };
  const norms = await Promise.all([...adapter.modules.values()].map(async (one) => pairNorm(pairOf(await one.read()))));
  const typical = Math.sqrt(mean(norms.map((norm) => norm ** 2)));
  const term = await module.read();
  const { rank, ...pair } = balance(pairOf(term), module.out, module.in);
  const steps = rowSteps({ rank, ...pair }, COARSE * step * typical);
  const [A, Bt] = [toRows(pair.A, steps.A), toRows(pair.Bt, steps.Bt)];
  const off = pairNorm({
    rank: 2 * rank,
    A: Float64Array.of(...pair.A, ...A),
    Bt: Float64Array.of(...pair.Bt, ...Bt.map((value) => -value)),
  });
  const changed = { ...module, rank, read: async () => ({ ...term, rank, A, Bt }) };
  return {
    adapter: { ...adapter, modules: new Map(adapter.modules).set(name, changed) },
    lost: (off / typical) ** 2,
  };
}

/** Rows as multiples of their steps. @param {Float64Array} rows @param {Float64Array} steps */
function toRows(rows, steps) {
  const width = rows.length / steps.length;
  return Float32Array.from(rows, (value, i) => {
    const own = steps[Math.floor(i / width)];
    return own > 0 ? own * Math.round(value / own) : 0;
  });
}

/**
 * A coded pack with steps by module: second moments that are the same for all inputs of a module weigh its ΔW.
 * @param {readonly Adapter[]} adapters @param {number} step
 * @param {ReadonlyMap<string, number>} sensitivity @param {number} power
 * @returns {Promise<Made>}
 */
async function packOf(adapters, step, sensitivity, power) {
  const inputs = new Map(adapters.flatMap(({ modules }) => [...modules].map(([name, one]) => [name, one.in])));
  const moments = new Map(
    [...sensitivity].map(([name, value]) => {
      const width = /** @type {number} */ (inputs.get(name));
      const square = new Float64Array(width * width);
      for (let i = 0; i < width; i++) square[i * (width + 1)] = value ** power;
      return [name, square];
    }),
  );
  const { chunks, report } = await buildPack(adapters, {
    ...{ gauge: "balanced", select: { kind: "k", k }, rank, step, headStep },
    ...(power === 0 ? {} : { moments }),
  });
  return { label: power === 0 ? "one step" : `power ${power}`, bytes: report.bytes, step, pack: await opened(chunks) };
}

/**
 * The pack of a power whose size is closest to a number of bytes.
 * @param {readonly Adapter[]} adapters @param {number} bytes
 * @param {ReadonlyMap<string, number>} sensitivity @param {number} power
 */
async function within(adapters, bytes, sensitivity, power) {
  let [fine, coarse, tried] = [step / 3, step * 3, step];
  let best = await packOf(adapters, tried, sensitivity, power);
  const off = (/** @type {Made} */ made) => Math.abs(made.bytes / bytes - 1);
  for (let made = best, i = 0; off(best) > CLOSE && i < MOST_TRIES; i++) {
    if (made.bytes > bytes) fine = tried;
    else coarse = tried;
    tried = Math.sqrt(fine * coarse);
    made = await packOf(adapters, tried, sensitivity, power);
    if (off(made) < off(best)) best = made;
  }
  return best;
}

/** @param {readonly Adapter[]} adapters @param {readonly Made[]} packs @param {readonly string[]} texts @returns {Promise<Row[]>} */
async function judged(adapters, packs, texts) {
  const judge = createJudge(engine, model, { adapters, texts, encode, most: texts.length });
  const rows = [];
  for (const { label, bytes, step, pack } of packs) {
    rows.push({ name: label, bytes, step, "KL, packed": await judge.judge(pack) });
    progress(JSON.stringify(rows.at(-1)));
  }
  await judge.close();
  return rows;
}

/** @param {Made} made @param {readonly [Adapter, string[]][]} tasks and their texts */
async function distilled({ label, pack }, tasks) {
  const session = await createEigenSession(ort, model, pack, { trainable: true, session: SESSION });
  const results = [];
  for (const [adapter, texts] of tasks) {
    results.push(await distill(session, { adapter, texts, encode, steps: given.steps }));
    progress(`${label}, ${adapter.id}: ${results.at(-1)?.divergenceAfter} nats`);
  }
  await session.close();
  return {
    "KL of some tasks": mean(results.map(({ divergenceBefore }) => divergenceBefore)),
    "KL, distilled": mean(results.map(({ divergenceAfter }) => divergenceAfter)),
  };
}

/** A task's own texts, filled up with others. @param {import("../../examples/minilm.js").Task} task @param {readonly string[]} pool @param {ReadonlySet<string>} unused */
function textsOf(task, pool, unused) {
  const own = shuffle(
    [...new Set(task.train.map(([text]) => text))].filter((text) => !unused.has(text)),
    uniform(2),
  ).slice(0, MOST_TEXTS);
  const others = pool.filter((text) => !unused.has(text));
  return [...new Set([...own, ...others])].slice(0, Math.max(own.length, MOST_TEXTS / 2));
}

/** @param {number} of @param {number} count places, evenly spread */
function spread(of, count) {
  const some = Math.min(of, count);
  return Array.from({ length: some }, (_, i) => Math.floor((i * of) / some));
}

/** @param {Uint8Array[]} chunks */
function opened(chunks) {
  return openPack(new Blob(/** @type {BlobPart[]} */ (chunks)));
}

/** @template {object} T @param {T} options @returns {Partial<T>} those that are given */
function defined(options) {
  return /** @type {Partial<T>} */ (
    Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined))
  );
}
