/**
 * Trains one small task on a tiny model, in Node and in browsers alike: the same examples, seed and steps.
 */
import { openPack } from "eigenlora";
import { createEigenSession } from "eigenlora/onnxruntime";
import { createTrainer } from "eigenlora/train";

/**
 * @typedef {{ ids: number[], label: string }[]} Lines token ids, of one length
 * @typedef {{ losses: number[], logits: number[], file: number[] }} Trained logits [lines, labels] of the task in the session
 * @param {typeof import("onnxruntime-common")} ort
 * @param {{ model: string | Uint8Array, pack: string | Uint8Array, provider?: string, lines: Lines }} lesson
 * @returns {Promise<Trained>}
 */
export async function train(ort, { model, pack, provider, lines }) {
  const session = await createEigenSession(ort, model, await openPack(pack), {
    trainable: true,
    session: provider ? { executionProviders: [provider] } : {},
  });
  const feeds = (/** @type {Lines} */ some) => {
    const dims = [some.length, some[0].ids.length];
    const ids = BigInt64Array.from(
      some.flatMap((line) => line.ids),
      BigInt,
    );
    /** @type {Record<string, import("onnxruntime-common").Tensor>} */
    const made = {};
    for (const name of session.inputNames) {
      const values =
        name === "input_ids" ? ids : new BigInt64Array(ids.length).fill(name === "attention_mask" ? 1n : 0n);
      made[name] = new ort.Tensor("int64", values, dims);
    }
    return made;
  };
  const labels = [...new Set(lines.map(({ label }) => label))];
  const trainer = await createTrainer(session, { labels, seed: 3, init: "mean" });
  const losses = [];
  const examples = lines.map((line) => ({ label: line.label, feeds: feeds([line]) }));
  for await (const { loss } of trainer.fit(examples, { steps: 16, batch: 12 })) losses.push(loss);
  const file = await trainer.task({ dtype: { coefficients: "f32", head: "f32" } });
  await session.addTask("mine", file);
  await session.switchTask("mine");
  const { logits } = await session.run(feeds(lines));
  const result = { losses, logits: Array.from(/** @type {Float32Array} */ (await logits.getData())), file: [...file] };
  await session.close();
  return result;
}
