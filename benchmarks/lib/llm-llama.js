/**
 * llama.cpp (node-llama-cpp): switches and tokens for comparison with `llm-steps.js` and `scale-steps.js`, memory with
 * `llm-memory.js`.
 */
import { existsSync } from "node:fs";
import { mkdir, readdir, readFile, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { openPack } from "eigenlora";
import { ggufFile, taskAdapter } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { median } from "simple-statistics";
import { IN_A_ROW } from "./llm-steps.js";
import { clocked, inFreshProcess, inScratch, peakMemory, settledMemory } from "./process.js";
import { progress } from "./report.js";

const NAME = "llama.cpp (node-llama-cpp)";
const PROMPT = Array.from({ length: 32 }, (_, i) => 500 + ((i * 37) % 4000));

/** Folder of the library. */
const library = join(process.env.EIGENLORA_RUNTIMES ?? "", "llama/node_modules/node-llama-cpp");

/**
 * The library's version and its base, or the reason why one is missing.
 * @param {() => string | undefined} gguf makes or names the base; asked where the library is there
 * @returns {Promise<{ name: string, version: string, base: string } | { name: string, reason: string }>}
 */
export async function findLlama(gguf) {
  if (!existsSync(library))
    return { name: NAME, reason: "EIGENLORA_RUNTIMES has no llama/node_modules/node-llama-cpp" };
  const base = gguf();
  if (!base) return { name: NAME, reason: "there is no GGUF file of the base" };
  const { version } = JSON.parse(await readFile(join(library, "package.json"), "utf8"));
  return { name: NAME, version, base };
}

/** The base, loaded. @param {string} modelPath GGUF */
async function loadLlama(modelPath) {
  const { getLlama, LlamaLogLevel } = await import(pathToFileURL(join(library, "dist/index.js")).href);
  const llama = await getLlama({ gpu: false, build: "never", skipDownload: true, logLevel: LlamaLogLevel.error });
  return llama.loadModel({ modelPath });
}

/**
 * @param {string} pack path
 * @param {string | undefined} gguf the base
 * @param {number} rounds
 * @returns {Promise<{ parts: import("./report.js").Part[], peers: import("./report.js").Peer[] }>}
 */
export async function llamaSteps(pack, gguf, rounds) {
  const peer = await findLlama(() => gguf);
  if ("reason" in peer) return { parts: [], peers: [peer] };
  progress("llama.cpp");
  const rows = await inScratch(async (scratch) => {
    const folder = join(scratch, "gguf");
    await ggufAdapters(pack, 6, folder);
    return inFreshProcess(new URL(import.meta.url), "measureLlama", [peer.base, folder, rounds]);
  });
  const question = `What do a switch and the first token behind 32 take in llama.cpp? One thread, medians of ${rounds} rounds.`;
  const notes = [
    "Q4_1, adapters in f32 and in memory. A switch gives the context another adapter, by a method that node-llama-cpp keeps to itself:",
    "its own way is a new context.",
  ];
  return { parts: [{ question, rows, notes }], peers: [peer] };
}

/**
 * Runs in a fresh process.
 * @param {string} modelPath GGUF
 * @param {string} folder of adapters
 * @param {number} rounds
 */
export async function measureLlama(modelPath, folder, rounds) {
  const model = await loadLlama(modelPath);
  const context = await model.createContext({ contextSize: 64, threads: 1, flashAttention: false });
  const sequence = context.getSequence();
  const files = (await readdir(folder)).map((file) => join(folder, file));
  const first = async () => {
    await sequence.clearHistory();
    await sequence.controlledEvaluate([...PROMPT.slice(0, -1), [PROMPT[31], { generateNext: { token: true } }]]);
  };
  let next = 0;
  const switched = () => context._setLoras([{ filePath: files[next++ % files.length], scale: 1 }]);
  const inARow = async (/** @type {boolean} */ withSwitch) => {
    const { cpu } = await clocked(async () => {
      for (let i = 0; i < IN_A_ROW; i++) {
        if (withSwitch) await switched();
        await first();
      }
    });
    return cpu / IN_A_ROW;
  };
  for (const _ of files) await switched();
  /** @type {Record<"plain" | "without" | "after" | "switch", number[]>} */
  const times = { plain: [], without: [], after: [], switch: [] };
  for (let round = 0; round <= rounds; round++) {
    await context._setLoras([]);
    const plain = await inARow(false);
    await switched();
    const early = round % 2 === 0 ? await inARow(true) : undefined;
    const without = await inARow(false);
    const after = early ?? (await inARow(true));
    const { cpu } = await clocked(switched);
    if (round === 0) continue;
    times.plain.push(plain);
    times.without.push(without);
    times.after.push(after);
    times.switch.push(cpu);
  }
  const ratios = times.after.map((after, i) => after / times.without[i]);
  return [
    {
      name: "llama.cpp, Q4_1",
      "switch, ms": median(times.switch),
      "first token, ms": median(times.without),
      "÷ plain": median(times.without.map((one, i) => one / times.plain[i])),
      "after a switch ÷ without": median(ratios),
    },
  ];
}

/**
 * Writes adapters in llama.cpp's format.
 * @param {string} path of a pack
 * @param {number} count
 * @param {string} folder to write them in
 */
export async function ggufAdapters(path, count, folder) {
  const pack = await openPack(path);
  await mkdir(folder);
  const ids = [...pack.tasks.keys()].slice(0, count);
  const base = { architecture: "llama", heads: 9, kvHeads: 3 };
  for (const [i, id] of ids.entries())
    await writeFile(join(folder, `${i}.gguf`), await ggufFile(await taskAdapter(pack, id), base));
  for (let i = ids.length; i < count; i++) await symlink(`${i % ids.length}.gguf`, join(folder, `${i}.gguf`));
  await pack.close();
}

/**
 * Writes PEFT adapters of Qwen2 in llama.cpp's format.
 * @param {string} from a folder of folders
 * @param {string} to
 * @returns {Promise<number>} how many there are
 */
export async function qwen2Adapters(from, to) {
  await mkdir(to);
  const adapters = await readAdapters([from]);
  for (const adapter of adapters) {
    await writeFile(join(to, `${adapter.id}.gguf`), await ggufFile(adapter, { architecture: "qwen2" }));
    await adapter.close();
  }
  return adapters.length;
}

/**
 * Switches, and tokens behind a prompt of 32, in turns without an adapter and with one.
 * @param {string} modelPath GGUF
 * @param {string} folder of adapters, all in memory
 * @param {number} rounds
 */
export async function tokensLlama(modelPath, folder, rounds) {
  const model = await loadLlama(modelPath);
  const context = await model.createContext({ contextSize: 128, threads: 1, flashAttention: false });
  const sequence = context.getSequence();
  const files = (await readdir(folder)).map((file) => join(folder, file));
  const to = (/** @type {string[]} */ files) => context._setLoras(files.map((filePath) => ({ filePath, scale: 1 })));
  const token = (/** @type {number} */ id) => sequence.controlledEvaluate([[id, { generateNext: { token: true } }]]);
  for (const file of files) await to([file]);
  /** @type {{ again: number[], plain: number[], ratio: number[] }} */
  const found = { again: [], plain: [], ratio: [] };
  // A context that got another adapter builds its graph anew.
  const tokens = async (/** @type {string[]} */ files) => {
    await to(files);
    await sequence.clearHistory();
    await sequence.controlledEvaluate(PROMPT);
    const took = [];
    for (let step = 0; step < 24; step++) took.push((await clocked(() => token(700 + step))).cpu);
    return median(took);
  };
  for (let round = 0; round <= rounds; round++) {
    for (const file of files.slice(0, 5)) found.again.push((await clocked(() => to([file]))).cpu);
    const early = round % 2 === 0 ? await tokens([]) : undefined;
    const ours = await tokens(files.slice(0, 1));
    const plain = early ?? (await tokens([]));
    if (round === 0) continue;
    found.plain.push(plain);
    found.ratio.push(ours / plain);
  }
  return {
    "again, ms": median(found.again),
    "plain token, ms": median(found.plain),
    "token ÷ plain": median(found.ratio),
  };
}

/**
 * Holds all adapters of a folder on llama.cpp's model; one is in use.
 * @param {string} modelPath GGUF
 * @param {string} folder
 */
export async function holdLlama(modelPath, folder) {
  const model = await loadLlama(modelPath);
  const files = folder === "" ? [] : await readdir(folder);
  const adapters = files.map((file, i) => ({ filePath: join(folder, file), scale: i === 0 ? 1 : 0 }));
  const lora = adapters.length > 0 ? { lora: { adapters } } : {};
  const context = await model.createContext({ contextSize: 64, threads: 1, flashAttention: false, ...lora });
  await context.getSequence().controlledEvaluate([500, [600, { generateNext: { probabilities: true } }]]);
  const { rss } = await settledMemory();
  return { resident: rss, peak: await peakMemory() };
}
