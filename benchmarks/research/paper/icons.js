/** The paper's image tasks: ten sets of eight icons (test/data/icons), each left out once, and the ViT that learns them. Nothing is trained here. */
import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { gunzipSync } from "node:zlib";
import * as ort from "onnxruntime-node";
import { data } from "../../../examples/minilm.js";
import { safetensorsOf } from "../../lib/adapters.js";
import { missing, startPython } from "../../lib/peers.js";
import { baseEntries } from "../../lib/torch.js";

/** @typedef {import("./data.js").Task} Task rows are names of icons, such as "mdi:home" */

/** Pixels of a side, and number of greys beside paper. */
const SIZE = 32;
const GREYS = 15;
/** Deviation that the ViT divides pixels by. */
const DEVIATION = 0.3;

const model = data("icons/model_fp16.onnx");

/** Reason why Python cannot run the peers; undefined where it can. */
export const reasonAgainst = () => missing(["torch", "peft", "transformers"]);

/** @returns {Promise<Map<string, Task>>} by name */
export async function readIconTasks() {
  const tasks = JSON.parse(await readFile(data("icons/tasks.json"), "utf8"));
  return new Map(Object.entries(tasks).map(([task, one]) => [task, { task, ...one }]));
}

/** PEFT's answers with the given adapters. @returns {Promise<Map<string, { predictions: number[], logits16: number[][] }>>} */
export async function readIconReference() {
  return new Map(Object.entries(JSON.parse(await readFile(data("icons/reference.json"), "utf8"))));
}

/** Each task is left out of the other nine's adapters. @param {ReadonlyMap<string, Task>} tasks @returns {import("./data.js").Experiment} */
export function iconExperiment(tasks) {
  const all = [...tasks.keys()];
  return {
    ...{ domain: "icons", suite: "icons", start: "mean", test: all },
    donors: (id) => all.filter((other) => other !== id),
  };
}

/**
 * The function from names of icons to pixels [icons, 1, 32, 32].
 * @param {ReadonlyMap<string, Task>} tasks in the order of the file
 * @returns {Promise<(names: readonly string[]) => any>}
 */
export async function createPixels(tasks) {
  const packed = gunzipSync(await readFile(data("icons/pixels.gz")));
  const names = [...tasks.values()].flatMap(({ train, test }) => [...train, ...test].map(([name]) => name));
  const at = new Map(names.map((name, i) => [name, i]));
  const bytes = (SIZE * SIZE) / 2;
  if (packed.length !== bytes * at.size)
    throw new Error(`pixels.gz: expected ${at.size} icons of ${bytes} bytes, found ${packed.length} bytes`);
  return (some) => {
    const pixels = new Float32Array(some.length * SIZE * SIZE);
    for (const [row, name] of some.entries()) {
      const start = /** @type {number} */ (at.get(name)) * bytes;
      for (let i = 0; i < bytes; i++) {
        pixels[2 * (row * bytes + i)] = (packed[start + i] >> 4) / GREYS / DEVIATION;
        pixels[2 * (row * bytes + i) + 1] = (packed[start + i] & 15) / GREYS / DEVIATION;
      }
    }
    return { pixel_values: new ort.Tensor("float32", pixels, [some.length, 1, SIZE, SIZE]) };
  };
}

/**
 * Model, inputs and peers for the benchmark's cells.
 * @param {ReadonlyMap<string, Task>} tasks
 * @param {string} scratch folder for the peers' files
 * @returns {Promise<import("./cells.js").Subject & { stop(): void }>} stop: ends the peers
 */
export async function iconSubject(tasks, scratch) {
  ort.env.logLevel = "error";
  /** @type {import("../../lib/peers.js").Running | undefined} */
  let peer;
  const start = async () => {
    const base = join(scratch, "base.safetensors");
    await writeFile(base, await safetensorsOf(await baseEntries(model)));
    const started = await startPython("images.py", [base, data("icons")]);
    if ("reason" in started) throw new Error(`images.py: ${started.reason}`);
    return started;
  };
  return {
    ...{ model, encode: await createPixels(tasks), width: 96, steps: 96, batch: 16 },
    askPeer: async (job) => (peer ??= await start()).ask(job),
    stop: () => peer?.stop(),
  };
}
