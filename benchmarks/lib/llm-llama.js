/** Switches and first tokens of llama.cpp (node-llama-cpp), beside `llm-steps.js`. */
import { existsSync } from "node:fs";
import { readdir, readFile } from "node:fs/promises";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { median } from "simple-statistics";
import { ggufAdapters } from "./llm-memory.js";
import { clocked, inFreshProcess, inScratch } from "./process.js";
import { progress } from "./report.js";

/** First tokens in a row, as in `llm-steps.js`. */
const IN_A_ROW = 3;
const NAME = "llama.cpp (node-llama-cpp)";

/** Folder of the library. */
const library = join(process.env.EIGENLORA_RUNTIMES ?? "", "llama/node_modules/node-llama-cpp");

/**
 * @param {string} pack path
 * @param {string | undefined} gguf the base
 * @param {number} rounds
 * @returns {Promise<{ parts: import("./report.js").Part[], peers: import("./report.js").Peer[] }>}
 */
export async function llamaSteps(pack, gguf, rounds) {
  if (!gguf) return { parts: [], peers: [{ name: NAME, reason: "--gguf names no file of the base" }] };
  if (!existsSync(library))
    return {
      parts: [],
      peers: [{ name: NAME, reason: "EIGENLORA_RUNTIMES has no llama/node_modules/node-llama-cpp" }],
    };
  progress("llama.cpp");
  const rows = await inScratch(async (scratch) => {
    const folder = join(scratch, "gguf");
    await ggufAdapters(pack, 6, folder);
    return inFreshProcess(new URL(import.meta.url), "measureLlama", [gguf, folder, rounds]);
  });
  const { version } = JSON.parse(await readFile(join(library, "package.json"), "utf8"));
  const question = `What do a switch and the first token behind 32 take in llama.cpp? One thread, medians of ${rounds} rounds.`;
  const notes = [
    "Q4_1, adapters in f32 and in memory. A switch gives the context another adapter, by a method that node-llama-cpp keeps to itself:",
    "its own way is a new context.",
  ];
  return { parts: [{ question, rows, notes }], peers: [{ name: NAME, version }] };
}

/**
 * For a fresh process.
 * @param {string} modelPath GGUF
 * @param {string} folder of adapters
 * @param {number} rounds
 */
export async function measureLlama(modelPath, folder, rounds) {
  const { getLlama, LlamaLogLevel } = await import(pathToFileURL(join(library, "dist/index.js")).href);
  const llama = await getLlama({ gpu: false, build: "never", skipDownload: true, logLevel: LlamaLogLevel.error });
  const model = await llama.loadModel({ modelPath });
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
