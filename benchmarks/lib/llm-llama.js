/** llama.cpp (node-llama-cpp): switches and first tokens beside `llm-steps.js`, memory beside `llm-memory.js`. */
import { existsSync } from "node:fs";
import { mkdir, readdir, readFile, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { openPack } from "eigenlora";
import { ggufFile, taskAdapter } from "eigenlora/build";
import { median } from "simple-statistics";
import { IN_A_ROW } from "./llm-steps.js";
import { clocked, inFreshProcess, inScratch, peakMemory, settledMemory } from "./process.js";
import { progress } from "./report.js";

const NAME = "llama.cpp (node-llama-cpp)";

/** Folder of the library. */
const library = join(process.env.EIGENLORA_RUNTIMES ?? "", "llama/node_modules/node-llama-cpp");

/**
 * The library's version, or the reason why it is missing.
 * @param {string | undefined} gguf the base
 * @returns {Promise<import("./report.js").Peer>}
 */
export async function findLlama(gguf) {
  if (!gguf) return { name: NAME, reason: "--gguf names no file of the base" };
  if (!existsSync(library))
    return { name: NAME, reason: "EIGENLORA_RUNTIMES has no llama/node_modules/node-llama-cpp" };
  const { version } = JSON.parse(await readFile(join(library, "package.json"), "utf8"));
  return { name: NAME, version };
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
  const peer = await findLlama(gguf);
  if (!gguf || "reason" in peer) return { parts: [], peers: [peer] };
  progress("llama.cpp");
  const rows = await inScratch(async (scratch) => {
    const folder = join(scratch, "gguf");
    await ggufAdapters(pack, 6, folder);
    return inFreshProcess(new URL(import.meta.url), "measureLlama", [gguf, folder, rounds]);
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
  const prompt = Array.from({ length: 32 }, (_, i) => 500 + ((i * 37) % 4000));
  const first = async () => {
    await sequence.clearHistory();
    await sequence.controlledEvaluate([...prompt.slice(0, -1), [prompt[31], { generateNext: { token: true } }]]);
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
  for (const [i, id] of ids.entries()) {
    const base = { architecture: "llama", heads: 9, kvHeads: 3 };
    const chunks = [];
    for await (const chunk of await ggufFile(await taskAdapter(pack, id), base)) chunks.push(chunk);
    await writeFile(join(folder, `${i}.gguf`), Buffer.concat(chunks));
  }
  for (let i = ids.length; i < count; i++) await symlink(`${i % ids.length}.gguf`, join(folder, `${i}.gguf`));
  await pack.close();
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
