/**
 * Shared by the test and the soak of a real language model (SmolLM2, test/data/smollm2): lossless packs of its adapters, and whether a
 * session or transformers.js gives PEFT's greedy answers, token for token.
 */
import { basename, dirname, join } from "node:path";
import { pathToFileURL } from "node:url";
import { buildPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import {
  createEncode,
  END,
  force,
  readAnswers,
  readSkills,
  smollm2,
  smollm2File,
} from "../../benchmarks/lib/skills.js";

/** Most tokens that PEFT generated. */
const MOST_TOKENS = 14;
/** Rows that are generated together. */
const BATCH = 32;

/** Packs everything adapters have, in f32. @param {readonly string[]} folders each of one adapter, or of several */
export async function losslessPack(folders) {
  const adapters = await readAdapters(folders);
  const base = smollm2File("model.safetensors");
  const { chunks } = await buildPack(adapters, {
    base,
    select: { kind: "energy", share: 1 },
    dtype: { basis: "f32", coefficients: "f32", head: "f32" },
  });
  for (const adapter of adapters) await adapter.close();
  return new Blob(/** @type {BlobPart[]} */ (chunks));
}

/** PEFT's questions and answers, with the texts of the prompts. @param {number} [most] rows of a task */
export async function readCases(most = Infinity) {
  const [{ tasks, adapters }, skills, encode] = await Promise.all([readAnswers(), readSkills(), createEncode()]);
  /** @param {string} kind "adapters" or "adapters-all-linear" @param {string} task */
  return (kind, task) => {
    const { prompt, test } = /** @type {import("../../benchmarks/lib/skills.js").Skill} */ (skills.get(task));
    return adapters[`${kind}/${task}`].answers.slice(0, most).map((answer, row) => {
      const text = `${prompt}: ${test[row][0]} →`;
      const expected = tasks[task].prompts[row];
      if (String(encode(text)) !== String(expected))
        throw new Error(`${text}: tokens differ from those of transformers`);
      return { text, prompt: expected, answer };
    });
  };
}

/** @typedef {{ text: string, prompt: number[], answer: number[] }} Case */

/** Rows whose greedy answer differs from PEFT's. @param {any} ort @param {any} session on the task @param {readonly Case[]} cases */
export async function wrongOf(ort, session, cases) {
  const forced = await force(ort, session, cases);
  return cases.filter((_, row) => !forced[row].exact);
}

/**
 * Rows whose answer differs, by `generate` of transformers.js, with its cache and in padded batches.
 * @param {any} pipe text-generation @param {readonly Case[]} cases
 */
export async function wrongGenerated(pipe, cases) {
  pipe.tokenizer.padding_side = "left";
  /** @type {Case[]} */
  const wrong = [];
  for (let at = 0; at < cases.length; at += BATCH) {
    const rows = cases.slice(at, at + BATCH);
    const inputs = pipe.tokenizer(
      rows.map(({ text }) => text),
      { padding: true, add_special_tokens: false },
    );
    const width = inputs.input_ids.dims[1];
    const found = await pipe.model.generate({ ...inputs, max_new_tokens: MOST_TOKENS, do_sample: false });
    /** @type {bigint[][]} */ (found.tolist()).forEach((ids, row) => {
      const told = ids.slice(width).map(Number);
      const end = told.indexOf(END);
      const answer = end < 0 ? told : told.slice(0, end + 1);
      if (String(answer) !== String(rows[row].answer)) wrong.push(rows[row]);
    });
  }
  return wrong;
}

/** Id of the model in transformers.js. */
export const MODEL = basename(smollm2 ?? "");

/**
 * A pipeline of transformers.js on the model, f32.
 * @param {string} folder of the package @param {object} [options] of `pipeline`
 * @returns {Promise<any>}
 */
export async function pipelineOn(folder, options = {}) {
  const transformers = await import(pathToFileURL(join(folder, "dist/transformers.node.mjs")).href);
  Object.assign(transformers.env, { localModelPath: dirname(String(smollm2)), allowRemoteModels: false });
  return transformers.pipeline("text-generation", MODEL, { dtype: "fp32", ...options });
}
