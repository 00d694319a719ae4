/** Learning from pictures: a tiny ViT (test/data/pipelines) learns a task of its own, which then answers in every mode. */
import { openPack } from "eigenlora";
import { buildPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { createTrainer } from "eigenlora/train";
import t from "tap";
import { fitted } from "../support/learning.ts";
import { concat, data, LOSSLESS } from "../support/packs.ts";
import { difference, MODES, NODE, open, outputOf } from "../support/sessions.ts";

const VIT = data("pipelines/vit/onnx/model.onnx");
const LABELS = ["stripes", "checks", "plain"];

/** A picture of 8 × 8 with a pattern of its class, and noise of its number. */
function picture(label: number, number: number): InstanceType<typeof NODE.Tensor> {
  const values = Float32Array.from({ length: 3 * 64 }, (_, i) => {
    const [x, y] = [i % 8, Math.floor((i % 64) / 8)];
    const pattern = [y % 4 < 2, (x + y) % 2 === 0, true][label] ? 1 : -1;
    return pattern + 0.5 * Math.sin(12.9 * i + 78.2 * number);
  });
  return new NODE.Tensor("float32", values, [1, 3, 8, 8]);
}

const pictures = (from: number): { feeds: { pixel_values: InstanceType<typeof NODE.Tensor> }; label: string }[] =>
  Array.from({ length: 30 }, (_, i) => ({ feeds: { pixel_values: picture(i % 3, from + i) }, label: LABELS[i % 3]! }));

t.test("a ViT learns from pictures", async (t) => {
  const adapters = await readAdapters(["birds", "fish"].map((name) => data(`pipelines/vit/adapters/${name}`)));
  const base = data("pipelines/vit/base.safetensors");
  const pack = await openPack(concat((await buildPack(adapters, { ...LOSSLESS, base })).chunks));
  const session = await open(NODE, VIT, pack, { trainable: true });
  const trainer = await createTrainer(session, { labels: LABELS, head: "classifier" });
  const [before, after] = await fitted(trainer, pictures(0), { steps: 80, batch: 10 });
  t.ok(after < before / 5, `the loss falls from ${before} to ${after}`);
  await pack.addTask("patterns", await trainer.task());
  await session.close();
  const fresh = pictures(1000);
  let first: Float32Array[] | undefined;
  for (const mode of MODES) {
    const served = await open(NODE, VIT, pack, { mode });
    await served.switchTask("patterns");
    const answers: Float32Array[] = [];
    for (const { feeds } of fresh) answers.push(await outputOf(served, feeds));
    const right = answers.filter((logits, i) => LABELS[logits.indexOf(Math.max(...logits))] === fresh[i]!.label).length;
    t.ok(right >= 27, `${mode}: ${right} of ${fresh.length} pictures that were not seen`);
    first ??= answers;
    for (const [i, logits] of answers.entries()) t.ok(difference(logits, first[i]!) < 1e-4, `${mode}, picture ${i}`);
    await served.close();
  }
  await pack.close();
});
