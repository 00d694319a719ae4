/**
 * Material of the page with a language model: SmolLM2-135M-Instruct from a folder on this machine, and the pack and the
 * tasks of test/data/smollm2.
 */
import { existsSync } from "node:fs";
import { readdir, readFile, stat } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { openPack } from "eigenlora";

/** @param {string} path */
const data = (path) => fileURLToPath(new URL(`../../../test/data/smollm2/${path}`, import.meta.url));

/** Lines of each task's test set that the page offers. */
const EXAMPLES = 12;
/** More than any skill answers. */
const MOST = 24;

/**
 * @returns {Promise<import("./build.js").Material>}
 * @throws Error when the model is not on this machine: how to make it
 */
export async function smolMaterial() {
  const folder = process.env["EIGENLORA_SMOLLM2"] ?? "";
  const model = join(folder, "onnx/model_q4.onnx");
  if (!folder || !existsSync(model)) {
    const found = folder ? `${model} is not there` : "EIGENLORA_SMOLLM2 names no folder";
    throw new Error(
      `${found}: make the model with \`npm run smollm2 -- FOLDER\`, which needs Python, and set EIGENLORA_SMOLLM2=FOLDER.`,
    );
  }
  const mine = join(folder, "tasks.eigen");
  const path = existsSync(mine) ? mine : data("twenty.eigen");
  const pack = await openPack(path);
  const ids = [...pack.tasks.keys()];
  await pack.close();
  return {
    name: "SmolLM2-135M-Instruct, 4 bits a weight",
    folder,
    model,
    pack: path,
    adapters: await adapterBytes(ids.length),
    skills: Object.fromEntries(await Promise.all(ids.map(async (id) => [id, await skillOf(id)]))),
    first: ["plural", "mouse"],
    most: MOST,
  };
}

/**
 * @param {string} id
 * @returns {Promise<import("./build.js").SkillFacts>}
 */
async function skillOf(id) {
  const { what, prompt, test } = JSON.parse(await readFile(data(`tasks/${id}.json`), "utf8"));
  const short = what.replace(/ \(.*\)$/, "").replaceAll("->", "→");
  return { what: short, prompt: { before: `${prompt}: `, after: " →" }, examples: test.slice(0, EXAMPLES) };
}

/**
 * Bytes of a number of adapters. Files of one rank on the same layers are equally large; not all are here.
 * @param {number} count
 */
async function adapterBytes(count) {
  const sizes = [];
  for (const id of await readdir(data("adapters"))) {
    sizes.push((await stat(data(`adapters/${id}/adapter_model.safetensors`))).size);
  }
  return Math.round((count * sizes.reduce((sum, size) => sum + size, 0)) / sizes.length);
}
