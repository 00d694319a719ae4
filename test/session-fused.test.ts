/**
 * Models as onnxruntime's optimiser fuses them (test/data/fused): queries, keys and values inside one operator, biases inside the
 * norms and activations behind them. Held against PEFT's logits.
 */
import { readFileSync } from "node:fs";
import t, { type Test } from "tap";
import { createEigenSession } from "../dist/bindings/onnxruntime.js";
import { readAdapters } from "../dist/src/adapters/folder.js";
import { openHost } from "../dist/src/base/open.js";
import { buildPack } from "../dist/src/pack/build.js";
import { openPack, type Pack } from "../dist/src/pack/pack.js";
import { difference } from "./adapters.ts";
import { concat, data, LOSSLESS } from "./packs.ts";
import { MODES, ORTS, type Ort } from "./sessions.ts";

const { rows, mask, logits } = JSON.parse(readFileSync(data("fused/goldens.json"), "utf8")) as {
  rows: number[][];
  mask: number[][];
  logits: Record<string, Record<string, number[]>>;
};
const FILES = [
  ["bert", "bert"],
  ["bert-mask", "bert"],
  ["roberta", "roberta"],
  ["distilbert", "distilbert"],
] as const;

/** A lossless pack of the adapters of a model, with its fingerprints. */
async function packOf(t: Test, kind: string, withBase = true): Promise<Pack> {
  const adapters = await readAdapters([data(`fused/adapters/${kind}`)]);
  const base = withBase ? { base: await openHost(data(`fused/${kind}.safetensors`)) } : {};
  const { chunks } = await buildPack(adapters, { ...LOSSLESS, ...base });
  const pack = await openPack(concat(chunks));
  t.teardown(() => pack.close());
  return pack;
}

function feeds(ort: Ort): Record<string, InstanceType<Ort["Tensor"]>> {
  const tensor = (of: number[][]) =>
    new ort.Tensor("int64", BigInt64Array.from(of.flat(), BigInt), [of.length, of[0]!.length]);
  return { input_ids: tensor(rows), attention_mask: tensor(mask) };
}

for (const { name, ort } of ORTS) {
  t.test(`${name}: every task as PEFT has it`, async (t) => {
    for (const [file, kind] of FILES) {
      const pack = await packOf(t, kind);
      for (const mode of MODES) {
        const session = await createEigenSession(ort, data(`fused/${file}.onnx`), pack, { mode });
        t.same(session.unconfirmed, [], file);
        for (const task of [...Object.keys(logits[kind]!).filter((id) => id !== "base"), null]) {
          await session.switchTask(task);
          const found = (await session.run(feeds(ort)))["logits"]!.data as Float32Array;
          const off = difference(found, logits[kind]![task ?? "base"]!);
          t.ok(off < 1e-5, `${file}, ${mode}, ${task}: off by ${off}`);
        }
        await session.close();
      }
    }
  });
}
