/**
 * Measures the cost of tasks on a model of the size that people ship. Qwen2.5's shapes in 4 bits with seeded random
 * weights, 20 LoRAs of rank 16 on all linear layers, one thread, onnxruntime-node. By `--part`: packing, creation,
 * memory, switches and tokens, compared with the plain model; a step of learning, compared with PEFT's; memory of very
 * many skills; a tab of Chromium (EIGENLORA_CHROMIUM, or /usr/bin/chromium).
 *
 * Needs a Python that makes the files (lib/scale-files.js), and for llama.cpp a folder with
 * llama/node_modules/node-llama-cpp (EIGENLORA_RUNTIMES).
 */
import { rm, stat } from "node:fs/promises";
import { join } from "node:path";
import { choice, number, readArguments, text } from "./lib/arguments.js";
import { findLlama } from "./lib/llm-llama.js";
import { peerLine, python } from "./lib/peers.js";
import { inFreshProcess, inScratch } from "./lib/process.js";
import { print, progress } from "./lib/report.js";
import { FOLDER, scaleFiles } from "./lib/scale-files.js";
import { holdInTab } from "./lib/scale-tab.js";

/** @typedef {import("./lib/report.js").Row} Row */
/** @typedef {import("./lib/report.js").Result} Result */

const PARTS = { costs, learn, many, tab };
const given = readArguments("What do tasks cost on a model of the size that people ship?", {
  part: choice(/** @type {(keyof typeof PARTS)[]} */ (Object.keys(PARTS)), "what is measured", "costs"),
  size: choice(["0.5b", "1.5b", "3b"], "of the model", "0.5b"),
  folder: text("FOLDER", "where models, adapters and packs are kept", FOLDER),
  only: choice(["core", "shared", "apart"], "this pack alone"),
  form: choice(["q4", "q4f16"], "of the model: what is not in 4 bits is f32 or f16", "q4"),
  rounds: number("rounds of steps", 5, 1),
  skills: number("how many, in the part many", 1000, 1),
});
const { adapters, model, packs, gguf } = await scaleFiles({
  ...given,
  ...(given.part === "learn" ? { only: /** @type {const} */ ("core") } : {}),
});
const [steps, llama] = ["scale-steps.js", "llm-llama.js"].map((name) => new URL(`lib/${name}`, import.meta.url));
print(given.json, ...(await PARTS[given.part]()));

/** @returns {Promise<Result>} */
async function costs() {
  const [packing, memory, times] = [[], [], []].map((rows) => /** @type {Row[]} */ (rows));
  memory.push({ name: "plain", ...inFreshProcess(steps, "holdModel", [model, ""]) });
  for (const { what, path, packed } of packs) {
    const row = packed();
    if (row) packing.push(row);
    progress(what);
    const { size } = await stat(path);
    memory.push({ name: what, "pack, MB": size / 1e6, ...inFreshProcess(steps, "holdModel", [model, path]) });
    times.push({ name: what, ...inFreshProcess(steps, "timeSteps", [model, path, given.rounds]) });
  }
  const peers = [besidePeft(memory, times), await besideLlama(memory, times)];
  const form = `${given.size}, ${given.form}`;
  return [
    [
      {
        question: `What does packing 20 adapters take? ${given.size}.`,
        rows: packing,
        notes: ["Packs are kept: remove them to pack again."],
      },
      {
        question: `How long does creation take, and what does a process hold? ${form}, each in a process of its own.`,
        rows: memory,
        notes: [
          "peak: of creation. resident: after a switch to each of 20 skills and a token, above the plain model; a pack keeps some of them,",
          "and all: once `prefetch` has read all 20. very first: switch, from the file.",
        ],
      },
      {
        question: `What do switches and tokens take? ${form}, in turns with the plain model, medians of ${given.rounds} rounds.`,
        rows: times,
        notes: [
          "CPU time. first: to a skill whose bytes are in memory, but were never used. again: to one that was used before; all are in memory.",
          "Peers are compared with their own plain models, 20 adapters in memory. PEFT: f32, set_adapter, plain tokens first. llama.cpp: Q4_0, adapters",
          "in f32, twice their files; a switch hands over a pointer by a method that node-llama-cpp keeps to itself, and the next run builds its",
          "graph anew.",
        ],
      },
    ],
    peers,
  ];
}

/** Adds PEFT's rows. @param {Row[]} memory @param {Row[]} times */
function besidePeft(memory, times) {
  progress("PEFT");
  const peer = python("scale_hold.py", [given.size, adapters, String(given.rounds)]);
  if ("figures" in peer) {
    const { resident, switch: again, plain, token } = peer.figures;
    memory.push({ name: "PEFT, f32", "all, MB": resident / 1e6 });
    times.push({ name: "PEFT, f32", "again, ms": again, "plain token, ms": plain, "token ÷ plain": token });
  }
  return peerLine("PEFT", peer);
}

/**
 * Adds llama.cpp's rows, with the same weights.
 * @param {Row[]} memory
 * @param {Row[]} times
 * @returns {Promise<import("./lib/report.js").Peer>}
 */
async function besideLlama(memory, times) {
  progress("llama.cpp");
  const peer = await findLlama(gguf);
  if ("reason" in peer) return peer;
  try {
    await inScratch(async (scratch) => {
      const folder = join(scratch, "adapters");
      inFreshProcess(llama, "qwen2Adapters", [adapters, folder]);
      const [plain, held] = ["", folder].map((one) => inFreshProcess(llama, "holdLlama", [peer.base, one]));
      memory.push({ name: "llama.cpp, plain", "resident, MB": plain.resident / 1e6 });
      memory.push({ name: "llama.cpp, Q4_0", "all, MB": (held.resident - plain.resident) / 1e6 });
      times.push({
        name: "llama.cpp, Q4_0",
        ...inFreshProcess(llama, "tokensLlama", [peer.base, folder, given.rounds]),
      });
    });
    return peer;
  } catch (error) {
    return { name: peer.name, reason: /** @type {Error} */ (error).message };
  }
}

/**
 * Coefficients of a pack whose factors are both shared, compared with PEFT's LoRA in f32.
 * @returns {Promise<Result>}
 */
async function learn() {
  const [pack] = packs;
  if (!pack) throw new Error("no pack");
  pack.packed();
  progress("learning");
  const ours = inFreshProcess(steps, "learnSteps", [model, pack.path, given.rounds]);
  const serving = inFreshProcess(steps, "learnSteps", [model, pack.path, 0]);
  progress("learning, PEFT");
  const peer = python("scale_step.py", [given.size, String(given.rounds)], JSON.stringify(ours.rows));
  const peft = "figures" in peer ? peer.figures : undefined;
  /** @type {Row[]} */
  const rows = [
    {
      name: "coefficients of all layers, 4 bits",
      "creation, CPU s": ours.creation / 1000,
      "until the first step, CPU s": ours.first / 1000,
      "step, CPU s": ours.ms / 1000,
      "step ÷ PEFT": peft ? ours.ms / peft.ms : null,
      "peak, MB": ours.peak / 1e6,
      "peak ÷ serving": ours.peak / serving.peak,
    },
  ];
  if (peft) rows.push({ name: "PEFT, LoRA r 16, f32", "step, CPU s": peft.ms / 1000, "peak, MB": peft.peak / 1e6 });
  const question = `What does a step of learning take? ${given.size}, 8 rows of 32 tokens, 6 of them learned; one thread, fastest of ${given.rounds}.`;
  const notes = [
    "Until the first step, two starts are tried for six steps each, and gradients are checked. serving: a run of as many tokens.",
  ];
  return [[{ question, rows, notes }], [peerLine("PEFT", peer)]];
}

/** Skills beyond 20 are copies of the 20 under other names. @returns {Promise<Result>} */
async function many() {
  /** @type {Row[]} */
  const rows = [];
  const plain = inFreshProcess(steps, "holdModel", [model, ""])["resident, MB"];
  for (const { what, path, packed } of packs) {
    packed();
    progress(`${given.skills} skills: ${what}`);
    const more = `${path}, ${given.skills}`;
    const bytes = inFreshProcess(steps, "manySkills", [path, more, given.skills]);
    const [few, many] = [path, more].map((one) => inFreshProcess(steps, "holdModel", [model, one])["resident, MB"]);
    await rm(more);
    rows.push({
      name: what,
      "pack, MB": bytes / 1e6,
      "20 skills, MB": few,
      "all, MB": many,
      "with the model, ÷ 20": (plain + many) / (plain + few),
    });
  }
  const question = `What does a process hold of ${given.skills} skills above the plain model, after a switch to each and a token? ${given.size}.`;
  return [[{ question, rows, notes: [`The plain model takes ${Math.round(plain)} MB.`] }]];
}

/** onnxruntime-web on WebAssembly. @returns {Promise<Result>} */
async function tab() {
  progress("the plain model in a tab");
  /** @type {Record<string, any>} */
  const plain = await holdInTab(model, "");
  /** @type {Row[]} */
  const rows = [{ name: "plain", ...plain }];
  for (const { what, path, packed } of packs) {
    packed();
    progress(what);
    const found = /** @type {Record<string, any>} */ (await holdInTab(model, path));
    const keys = ["creation, s", "peak, MB", "peak of all, MB"];
    const ratios = keys.map((key) => [`${key.split(",")[0]} ÷ plain`, found[key] / plain[key]]);
    rows.push({ name: what, ...found, ...Object.fromEntries(ratios) });
  }
  const question = `What does a tab take, with a switch to each of 20 skills and tokens? ${given.size}, a browser each.`;
  const notes = [
    "peak: resident set of the tab's process after creation, where ours has run a token, its probe. peak of all: after 20 switches and 17",
    "tokens too. Times by the clock.",
  ];
  return [[{ question, rows, notes }]];
}
