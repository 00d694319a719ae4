/** Switches, first tokens and tokens of a language model: plain, and with tasks in each mode. */
import { existsSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { openPack } from "eigenlora";
import { createEigenSession } from "eigenlora/onnxruntime";
import { median } from "simple-statistics";
import { generation } from "./generation.js";
import { clocked, inFreshProcess } from "./process.js";
import { progress } from "./report.js";
import { smollm2File } from "./skills.js";

/**
 * @typedef {import("eigenlora/onnxruntime").Ort} Ort
 * @typedef {import("eigenlora/onnxruntime").EigenSession<any>} EigenSession
 * @typedef {{ inputNames: readonly string[], run(feeds: any): Promise<any> }} Running
 * @typedef {{ way: string, session: Running, switching?: (round: number) => Promise<unknown>, close(): Promise<unknown>
 *   }} Way
 * @typedef {{ prompt: number, tokens: number, rounds: number, folds: number }} Sizes
 *   tokens of the prompt and of the answer; rounds; of these, how many have the switches of mode "folded", which load the model each
 * @typedef {"core" | "factors" | "folded"} Mode
 * @typedef {Record<"switch" | "first" | "after" | "token" | "first ratio" | "token ratio" | "after ratio", number[]>}
 *   Times
 */

const WARM_UP = 50;
/**
 * First tokens in a row, with a switch before each and without. Garbage of a run is collected at some later allocation;
 * with single runs in turns, the switch that it happens to meet would be charged for it.
 */
export const IN_A_ROW = 3;

export const ONE_THREAD = { intraOpNumThreads: 1, interOpNumThreads: 1, executionProviders: ["cpu"] };

const FILES = /** @type {const} */ ([
  ["f32", "onnx/model.onnx", "onnxruntime-node", ["core", "factors", "folded"]],
  ["q4", "onnx/model_q4.onnx", "onnxruntime-node", ["core", "factors"]],
  ["q4", "onnx/model_q4.onnx", "onnxruntime-web", ["core", "factors"]],
]);

/**
 * @param {string} pack path
 * @param {number} rounds
 * @param {boolean} quick one file, shorter texts
 * @returns {import("./report.js").Part}
 */
export function stepsPart(pack, rounds, quick) {
  /** @type {Sizes} */
  const sizes = quick ? { prompt: 8, tokens: 2, rounds, folds: 1 } : { prompt: 32, tokens: 16, rounds, folds: 2 };
  const rows = [];
  for (const [name, file, runtime, modes] of quick ? FILES.slice(1, 2) : FILES) {
    if (!existsSync(smollm2File(file))) continue;
    progress(`${name}, ${runtime}`);
    const args = /** @type {any} */ ([runtime, smollm2File(file), pack, modes, sizes]);
    for (const row of inFreshProcess(new URL(import.meta.url), "measureSteps", args))
      rows.push({ name: `${name}, ${runtime}`, ...row });
  }
  return {
    question: `What do a switch, the first token behind ${sizes.prompt} and each later one take? One thread, in turns, medians of ${rounds} rounds.`,
    rows,
    notes: [
      "CPU time of all threads, which others on the machine do not lengthen; tasks are in memory. after a switch ÷ without:",
      `${IN_A_ROW} times a switch and the first token ÷ ${IN_A_ROW} first tokens.`,
    ],
  };
}

/**
 * Measures rows of one file on one runtime, in a fresh process.
 * @param {"onnxruntime-node" | "onnxruntime-web"} runtime
 * @param {string} model path
 * @param {string} pack path
 * @param {readonly Mode[]} modes
 * @param {Sizes} sizes
 */
export async function measureSteps(runtime, model, pack, modes, sizes) {
  /** @type {any} */
  const ort = await import(runtime);
  ort.env.logLevel = "error";
  const web = runtime === "onnxruntime-web";
  if (web) ort.env.wasm.numThreads = 1;
  const session = web ? { executionProviders: ["wasm"] } : ONE_THREAD;
  return measure({ ort, model: web ? await readFile(model) : model, pack, modes, session }, sizes);
}

/**
 * @param {{ ort: Ort, model: string | Uint8Array, pack: string, modes: readonly Mode[], session: any }} what
 * @param {Sizes} sizes
 */
async function measure({ ort, model, pack, modes, session }, sizes) {
  const plain = await ort.InferenceSession.create(/** @type {any} */ (model), session);
  /** @type {Way[]} */
  const ways = [{ way: "plain", session: /** @type {any} */ (plain), close: () => plain.release() }];
  const opened = await openPack(pack);
  await opened.prefetch(opened.tasks.keys());
  const ids = [...opened.tasks.keys()];
  for (const mode of modes) {
    const eigen = await createEigenSession(/** @type {any} */ (ort), model, opened, { mode, session, probe: false });
    const switching = (/** @type {number} */ round) => eigen.switchTask(ids[round % ids.length]);
    // Warms up the code of a switch, which takes some dozens.
    for (let i = 0; i < (mode === "folded" ? 1 : WARM_UP); i++) await switching(i);
    ways.push({ way: mode, session: eigen, switching, close: () => eigen.close() });
  }
  const times = ways.map(() => noTimes());
  for (let round = 0; round <= sizes.rounds; round++) {
    const into = round === 0 ? ways.map(() => noTimes()) : times;
    for (const [i, way] of ways.entries()) await measureOnce(ort, way, sizes, round, into[i], into[0]);
  }
  for (const { close } of ways) await close();
  await opened.close();
  return ways.map(({ way }, i) => rowOf(way, times[i]));
}

/** @returns {Times} */
const noTimes = () => ({
  ...{ switch: [], first: [], after: [], token: [] },
  ...{ "first ratio": [], "token ratio": [], "after ratio": [] },
});

/**
 * A round of one way: the first token of a prompt, the same right after a switch, and the tokens that follow.
 * @param {Ort} ort
 * @param {Way} way
 * @param {Sizes} sizes
 * @param {number} round
 * @param {Times} times
 * @param {Times} plain of the same round
 */
async function measureOnce(ort, { way, session, switching }, { prompt, tokens, folds }, round, times, plain) {
  const first = () => generate(ort, session, prompt, 1);
  const switches = switching && (way !== "folded" || round <= folds);
  const count = switches && way !== "folded" ? IN_A_ROW : 1;
  let switched = 0;
  const inARow = async (/** @type {boolean} */ withSwitch) => {
    const { cpu } = await clocked(async () => {
      for (let i = 0; i < count; i++) {
        if (withSwitch && switching) switched += (await clocked(() => switching(round + i))).cpu / count;
        await first();
      }
    });
    return cpu / count;
  };
  // The two take turns at being first.
  const early = switches && round % 2 === 0 ? await inARow(true) : undefined;
  const without = await inARow(false);
  times.first.push(without);
  times["first ratio"].push(without / plain.first[plain.first.length - 1]);
  if (switches) {
    const after = early ?? (await inARow(true));
    times.switch.push(switched);
    times.after.push(after);
    times["after ratio"].push(after / without);
  }
  const { cpu } = await clocked(() => generate(ort, session, prompt, tokens + 1));
  const token = (cpu - without) / tokens;
  times.token.push(token);
  times["token ratio"].push(token / plain.token[plain.token.length - 1]);
}

/** @param {string} way @param {Times} times */
function rowOf(way, times) {
  const { first, token, switch: switches, after, ...ratios } = times;
  return {
    way,
    ...(switches.length > 0 && { "switch, ms": median(switches) }),
    "first token, ms": median(first),
    "÷ plain": median(ratios["first ratio"]),
    ...(after.length > 0 && { "after a switch ÷ without": median(ratios["after ratio"]) }),
    "tokens/s": 1000 / median(token),
    "a token ÷ plain": median(ratios["token ratio"]),
  };
}

/**
 * Makes tokens behind a prompt, greedily.
 * @param {Ort} ort
 * @param {Running} session
 * @param {number} length of the prompt
 * @param {number} count tokens
 */
async function generate(ort, session, length, count) {
  const tokens = generation(ort, session, { num_key_value_heads: 3, head_size: 64 }, length);
  for (let i = 0; i < count; i++) await tokens.next();
}

/**
 * Inputs of rows behind a cache; shorter rows are padded on the right, which attention does not see.
 * @param {Pick<Ort, "Tensor">} ort
 * @param {{ inputNames: readonly string[] }} session
 * @param {readonly (readonly number[])[]} rows
 * @param {number} width
 * @param {Record<string, any>} [cache] results of the run before
 */
export function feedsOf({ Tensor }, { inputNames }, rows, width, cache) {
  const past = cache?.["present.0.key"].dims[2] ?? 0;
  const ids = new BigInt64Array(rows.length * width);
  const places = ids.map((_, i) => BigInt(past + (i % width)));
  const mask = new BigInt64Array(rows.length * (past + width)).fill(1n);
  rows.forEach((row, r) => ids.set(row.map(BigInt), r * width));
  const make = /** @type {new (type: string, data: object, dims: number[]) => any} */ (/** @type {unknown} */ (Tensor));
  /** @type {Record<string, any>} */
  const feeds = {
    input_ids: new make("int64", ids, [rows.length, width]),
    attention_mask: new make("int64", mask, [rows.length, past + width]),
    position_ids: new make("int64", places, [rows.length, width]),
  };
  for (const name of inputNames.filter((one) => one.startsWith("past")))
    feeds[name] =
      cache?.[name.replace("past_key_values", "present")] ??
      new make("float32", new Float32Array(0), [rows.length, 3, 0, 64]);
  return feeds;
}
