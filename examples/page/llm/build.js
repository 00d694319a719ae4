/**
 * Builds the page with a language model into a folder of static files. What it is made of comes from material.js or
 * from a test. Not a server (../serve.js).
 */
import { createHash } from "node:crypto";
import { cp, open, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { bundlePage, writeOfflineWorker } from "../build.js";

/**
 * @typedef {object} Material
 * @property {string} name of the model, for people
 * @property {string} folder of transformers.js: config.json, generation_config.json, tokenizer.json,
 *   tokenizer_config.json
 * @property {string} model path of its ONNX file
 * @property {string | Uint8Array} pack path, or bytes
 * @property {number} adapters bytes of the files of all adapters in the pack
 * @property {Record<string, SkillFacts>} skills by task
 * @property {[skill: string, text: string]} first what the page begins with
 * @property {number} most tokens of an answer
 * @property {number} [partBytes] of the parts that the model is cut into. Default: 16 MB
 */

/**
 * @typedef {object} SkillFacts
 * @property {string} what it does, in a few words
 * @property {import("./worker.js").Prompt} prompt
 * @property {[text: string, answer: string][]} examples that it was not trained on
 */

/** @typedef {Awaited<ReturnType<typeof buildLlmPage>>} Facts */

/** Some hosts take no larger files, and what a browser keeps is checked a file at a time. */
const PART_BYTES = 16e6;

/** @param {string} path */
const here = (path) => fileURLToPath(new URL(path, import.meta.url));

/**
 * @param {string} folder emptied first
 * @param {Material} material
 */
export async function buildLlmPage(folder, material) {
  await bundlePage(folder, here("."), ["index.html", "../page.css", "llm.css"]);
  for (const file of ["tokenizer.json", "tokenizer_config.json"]) {
    await cp(join(material.folder, file), join(folder, file));
  }
  const pack = typeof material.pack === "string" ? await readFile(material.pack) : material.pack;
  await writeFile(join(folder, "tasks.eigen"), pack);
  const { parts, bytes } = await cut(material.model, folder, material.partBytes ?? PART_BYTES);
  const { name, adapters, skills, first, most } = material;
  const facts = {
    name,
    model: bytes,
    parts,
    pack: pack.length,
    adapters,
    skills,
    first,
    most,
    ...(await rules(material)),
  };
  await writeFile(join(folder, "facts.json"), JSON.stringify(facts));
  await writeOfflineWorker(folder, parts);
  return facts;
}

/** Facts of the model that decoding needs. @param {Material} material */
async function rules({ folder }) {
  const json = async (/** @type {string} */ file) => JSON.parse(await readFile(join(folder, file), "utf8"));
  const config = await json("config.json");
  const { eos_token_id: end } = { ...config, ...(await json("generation_config.json").catch(() => ({}))) };
  const { num_attention_heads: all, num_key_value_heads: heads = all, hidden_size: hidden } = config;
  return {
    cache: { heads: Number(heads), width: Number(config.head_dim ?? hidden / all) },
    end: /** @type {number[]} */ ([end].flat()),
  };
}

/**
 * Cuts a file into parts. Their names hold their content, so a part that a browser has is never out of date.
 * @param {string} path
 * @param {string} folder
 * @param {number} size
 */
async function cut(path, folder, size) {
  const file = await open(path);
  try {
    const { size: bytes } = await file.stat();
    const parts = [];
    for (let at = 0; at < bytes; at += size) {
      const part = new Uint8Array(Math.min(size, bytes - at));
      let filled = 0;
      while (filled < part.length)
        filled += (await file.read(part, filled, part.length - filled, at + filled)).bytesRead;
      const name = `model-${createHash("sha256").update(part).digest("hex").slice(0, 16)}.part`;
      await writeFile(join(folder, name), part);
      parts.push(name);
    }
    return { parts, bytes };
  } finally {
    await file.close();
  }
}
