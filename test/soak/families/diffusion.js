/**
 * Stable Diffusion and SDXL in JavaScript: text encoders and UNet under one switch, and a plain denoising loop, compared with the latents
 * of diffusers' own pipelines (diffusion.py).
 */
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { createEigenSessions } from "eigenlora/onnxruntime";
import * as ort from "onnxruntime-node";
import { difference, packOf, tensors } from "./run.js";

/**
 * @typedef {{ files: Record<string, string>, feeds: Record<string, import("./run.js").Feed>, steps: number, guidance: number,
 *   latents: Record<string, number[]> }} Pipeline
 * @typedef {{ prompt: ort.Tensor, pooled?: ort.Tensor | undefined }} Encoded
 * @typedef {import("eigenlora/onnxruntime").EigenSessions<typeof ort, "unet" | "text_encoder" | "text_encoder_2">} Models
 */

const MOST = 1e-4;
const TRAIN_STEPS = 1000;

/** Products of 1 - β up to each step of training, on the "scaled linear" schedule of Stable Diffusion. */
const ALPHAS = (() => {
  const [from, to] = [Math.sqrt(0.00085), Math.sqrt(0.012)];
  let product = 1;
  return Array.from({ length: TRAIN_STEPS }, (_, i) => {
    product *= 1 - (from + ((to - from) * i) / (TRAIN_STEPS - 1)) ** 2;
    return product;
  });
})();

/** Steps of training that denoising goes through, noisiest first: "leading", with an offset of 1. @param {number} steps */
function timesteps(steps) {
  const stride = Math.floor(TRAIN_STEPS / steps);
  return Array.from({ length: steps }, (_, i) => (steps - 1 - i) * stride + 1);
}

/** DDIM without noise of its own. */
const ddim = {
  scale: () => 1,
  input: () => 1,
  /** @param {Float32Array} x @param {Float32Array} noise what the UNet predicts @param {number} step @param {number[]} all */
  next(x, noise, step, all) {
    const before = all[step] - Math.floor(TRAIN_STEPS / all.length);
    const [now, then] = [ALPHAS[all[step]], ALPHAS[Math.max(before, 0)]];
    return x.map((value, i) => {
      const clean = (value - Math.sqrt(1 - now) * noise[i]) / Math.sqrt(now);
      return Math.sqrt(then) * clean + Math.sqrt(1 - then) * noise[i];
    });
  },
};

/** @param {number} step */
const sigma = (step) => Math.sqrt((1 - ALPHAS[step]) / ALPHAS[step]);

/** Euler's method. */
const euler = {
  /** Scale of the initial noise. @param {number[]} all */
  scale: (all) => Math.sqrt(sigma(all[0]) ** 2 + 1),
  /** Scale of the UNet's input. @param {number} step @param {number[]} all */
  input: (step, all) => 1 / Math.sqrt(sigma(all[step]) ** 2 + 1),
  /** @param {Float32Array} x @param {Float32Array} noise @param {number} step @param {number[]} all */
  next(x, noise, step, all) {
    const width = (step + 1 < all.length ? sigma(all[step + 1]) : 0) - sigma(all[step]);
    return x.map((value, i) => value + width * noise[i]);
  },
};

/** Joins tensors along the first dimension, or the last. @param {ort.Tensor[]} parts @param {"first" | "last"} at */
function joined(parts, at) {
  const data = parts.map((part) => /** @type {Float32Array} */ (part.data));
  const [rows, ...rest] = parts[0].dims;
  if (at === "first") {
    return new ort.Tensor("float32", Float32Array.from(data.flatMap((one) => [...one])), [
      rows * parts.length,
      ...rest,
    ]);
  }
  const widths = parts.map(({ dims }) => dims[dims.length - 1]);
  const all = Array.from({ length: data[0].length / widths[0] }, (_, row) =>
    data.flatMap((one, i) => [...one.subarray(row * widths[i], (row + 1) * widths[i])]),
  );
  const width = widths.reduce((a, b) => a + b, 0);
  return new ort.Tensor("float32", Float32Array.from(all.flat()), [...parts[0].dims.slice(0, -1), width]);
}

/** Encodes token ids. @param {Models["sessions"]} sessions @param {ort.Tensor} input_ids @returns {Promise<Encoded>} */
async function encode({ text_encoder, text_encoder_2 }, input_ids) {
  const first = await text_encoder.run({ input_ids });
  if (!text_encoder_2) return { prompt: first["last"] };
  const second = await text_encoder_2.run({ input_ids });
  return { prompt: joined([first["penultimate"], second["penultimate"]], "last"), pooled: second["last"] };
}

/** Latents of one picture, with guidance. @param {Models} models @param {Pipeline} pipeline */
async function denoise(models, { feeds, steps, guidance }) {
  const { prompt, negative, noise } = tensors(feeds);
  return models.call(async (sessions) => {
    const texts = [await encode(sessions, negative), await encode(sessions, prompt)];
    /** @type {Record<string, ort.Tensor>} */
    const given = {
      encoder_hidden_states: joined(
        texts.map((one) => one.prompt),
        "first",
      ),
    };
    const pooled = texts.flatMap((one) => one.pooled ?? []);
    const size = 8 * noise.dims[2];
    if (pooled.length > 0) {
      given["text_embeds"] = joined(pooled, "first");
      given["time_ids"] = new ort.Tensor(
        "float32",
        [size, size, 0, 0, size, size, size, size, 0, 0, size, size],
        [2, 6],
      );
    }
    const method = pooled.length > 0 ? euler : ddim;
    const all = timesteps(steps);
    let x = /** @type {Float32Array} */ (noise.data).map((value) => value * method.scale(all));
    for (const [step, time] of all.entries()) {
      const seen = new ort.Tensor(
        "float32",
        x.map((value) => value * method.input(step, all)),
        noise.dims,
      );
      const sample = joined([seen, seen], "first");
      const timestep = new ort.Tensor("int64", BigInt64Array.of(BigInt(time)), [1]);
      const { out_sample } = await sessions.unet.run({ sample, timestep, ...given });
      const both = /** @type {Float32Array} */ (out_sample.data);
      const predicted = x.map((_, i) => both[i] + guidance * (both[x.length + i] - both[i]));
      x = method.next(x, predicted, step, all);
    }
    return x;
  });
}

/**
 * Runs every task of a pipeline, and the base after them.
 * @param {string} folder
 * @returns {Promise<{ off: number, failures: string[] }>}
 */
export async function runPipeline(folder) {
  const pipeline = /** @type {Pipeline} */ (JSON.parse(await readFile(join(folder, "pipeline.json"), "utf8")));
  const files = Object.fromEntries(Object.entries(pipeline.files).map(([name, file]) => [name, join(folder, file)]));
  /** @type {string[]} */
  const failures = [];
  let off = 0;
  for (const [mode, ...tasks] of /** @type {const} */ ([
    ["core", "a", "b"],
    ["factors", "a", "b"],
    ["folded", "a", "b", "convolutions"],
  ])) {
    const pack = await packOf(folder, tasks);
    try {
      const models = await createEigenSessions(ort, files, pack, { mode, session: { logSeverityLevel: 3 } });
      for (const task of [...tasks, null]) {
        await models.switchTask(task);
        const found = difference({ data: await denoise(models, pipeline) }, pipeline.latents[task ?? "base"]);
        off = Math.max(off, found);
        if (!(found <= MOST))
          failures.push(`${folder}, ${mode}, ${task}: latents are off by ${found.toExponential(1)}`);
      }
      await models.close();
    } catch (error) {
      failures.push(`${folder}, ${mode}: ${/** @type {Error} */ (error).message}`);
    }
    await pack.close();
  }
  return { off, failures };
}
