/**
 * Methods that train only a head on the features of a frozen model: the trainer's own loop, with a table of the head's inputs instead of
 * a training graph, since these never change. One run of the model then serves all rates and seeds.
 */

import { learnedTask, taskFile } from "../../../dist/src/train/stored-task.js";
import { labelSupervision } from "../../../dist/src/train/supervision.js";
import { TrainedTerms } from "../../../dist/src/train/trained-terms.js";
import { Trainer } from "../../../dist/src/train/trainer.js";
import { runBatches, toBatches } from "../../../examples/minilm.js";

/** @param {number} width how many numbers enter the head @param {number} labels */
const headOf = (width, labels) => [
  { module: "classifier", in: width, out: labels, bias: true, last: true, own: undefined },
];

/**
 * Inputs of the head for each text, with tasks of the pack active.
 * @param {import("./cells.js").Session} session
 * @param {Parameters<typeof toBatches>[0]} encode
 * @param {readonly string[]} texts
 * @param {Record<string, number>} blend strengths of tasks; none: the base
 * @param {number} width how many numbers enter the head
 * @returns {Promise<Map<string, Float32Array>>}
 */
export async function readFeatures(session, encode, texts, blend, width) {
  const weight = new Float32Array(width * width);
  for (let i = 0; i < width; i++) weight[i * width + i] = 1;
  const head = { weight, bias: new Float32Array(width) };
  const pack = /** @type {any} */ (session.pack);
  await session.addTask(
    "features",
    taskFile(
      pack,
      learnedTask(pack, new TrainedTerms([]), { ...head, parameters: new Float32Array(0) }, headOf(width, width), {
        id: "features",
        dtype: { head: "f32" },
      }),
    ),
  );
  await session.switchTask({ ...blend, features: 1 }, { head: "features" });
  const found = await runBatches(session, toBatches(encode, texts));
  await session.switchTask(null);
  session.removeTask("features");
  return new Map(texts.map((text, i) => [text, found[i]]));
}

/**
 * Makes a trainer of a head. It begins like every other, and does not use its pack.
 * @param {ReadonlyMap<string, Float32Array>} features by text
 * @param {{ labels: readonly string[], seed: number }} options
 * @returns {Trainer<Float32Array[]>}
 */
export function headTrainer(features, { labels, seed }) {
  const pack = /** @type {any} */ ({ tasks: new Map() });
  const none = new TrainedTerms([]);
  const [first] = features.values();
  const model = headModel(labels.length, first.length);
  /** @type {Parameters<typeof labelSupervision<Float32Array[]>>[0]} */
  const inputs = {
    encodes: true,
    lengths: async (rows) => new Map(rows.map((row) => [row, row.text?.length ?? 0])),
    alike: () => "",
    batch: async (rows) => rows.map(({ text = "" }) => /** @type {Float32Array} */ (features.get(text))),
  };
  return new /** @type {any} */ (Trainer)(
    { pack, model, supervision: labelSupervision(inputs, labels), terms: none, origin: none, labels },
    { seed, init: "random" },
  );
}

/**
 * @param {number} labels
 * @param {number} width how many numbers enter the head
 * @returns {import("../../../dist/src/train/trainable-model.js").TrainableModel<Float32Array[]>}
 */
export function headModel(labels, width) {
  /** @param {Float32Array} x @param {import("../../../dist/src/train/trainable-model.js").TaskWeights} weights */
  const logitsOf = (x, { weight, bias }) =>
    Array.from(bias, (b, label) => x.reduce((sum, value, i) => sum + value * weight[label * x.length + i], b));
  return {
    head: headOf(width, labels),
    answer: async (batch, weights) => Float32Array.from(batch.flatMap((x) => logitsOf(x, weights))),
    async step(batch, weights, { values: targets }) {
      const [weight, bias] = [weights.weight.length, labels].map((length) => new Float32Array(length));
      let loss = 0;
      for (const [row, x] of batch.entries()) {
        const z = logitsOf(x, weights);
        const top = Math.max(...z);
        const total = z.reduce((sum, value) => sum + Math.exp(value - top), 0);
        for (let label = 0; label < labels; label++) {
          const at = row * labels + label;
          loss -= (targets[at] * (z[label] - top - Math.log(total))) / batch.length;
          const slope = (Math.exp(z[label] - top) / total - targets[at]) / batch.length;
          bias[label] += slope;
          for (let i = 0; i < width; i++) weight[label * width + i] += slope * x[i];
        }
      }
      return { loss, gradients: { terms: new Map(), weight, bias } };
    },
  };
}
