/**
 * Files of onnxruntime-genai's model builder (test/data/builder): its names, its fused attention, and queries, keys and values in one
 * layer. Compared with PEFT's logits; in 4 bits with PEFT on the dequantised base.
 */
import { readFileSync } from "node:fs";
import { openPack, type Pack } from "eigenlora";
import { buildPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { createEigenSession } from "eigenlora/onnxruntime";
import t, { type Test } from "tap";
import { difference } from "./adapters.ts";
import { concat, data, LOSSLESS } from "./packs.ts";
import { modesOn, NODE, ORTS, type Ort, refusal, type Session } from "./sessions.ts";

const { rows: ROWS, logits } = JSON.parse(readFileSync(data("builder/goldens.json"), "utf8")) as {
  rows: number[][];
  logits: Record<string, Record<string, number[]>>;
};
const TASKS = ["all", "few", "dora", null] as const;

/** A lossless pack of the adapters of a model, with its fingerprints. */
async function packOf(t: Test, kind: string): Promise<Pack> {
  const adapters = await readAdapters([data(`builder/adapters/${kind}`)]);
  const base = data(`builder/${kind}.safetensors`);
  const { chunks } = await buildPack(adapters, { ...LOSSLESS, base });
  const pack = await openPack(concat(chunks));
  t.teardown(() => pack.close());
  return pack;
}

/** The golden rows, without a cache. */
function feeds(
  ort: Ort,
  { inputNames }: Session,
  heads: number,
  rows = ROWS,
): Record<string, InstanceType<Ort["Tensor"]>> {
  const [batch, length] = [rows.length, rows[0]!.length];
  const made: Record<string, InstanceType<Ort["Tensor"]>> = {};
  for (const name of inputNames) {
    if (name === "input_ids")
      made[name] = new ort.Tensor("int64", BigInt64Array.from(rows.flat(), BigInt), [batch, length]);
    else if (name === "attention_mask")
      made[name] = new ort.Tensor("int64", new BigInt64Array(batch * length).fill(1n), [batch, length]);
    else made[name] = new ort.Tensor("float32", new Float32Array(0), [batch, heads, 0, 16]);
  }
  return made;
}

/** File, model of its pack, module that its fused layer holds, and tolerance. */
const FILES = [
  ["llama", "llama", 1e-5],
  ["llama-apart", "llama", 1e-5],
  ["llama-int4", "llama", 1e-5],
  ["qwen2", "qwen2", 1e-5],
  ["qwen3", "qwen3", 1e-5],
  // Gate and up in one layer.
  ["small-gates", "small", 1e-5],
  // Layers packed in the checkpoint, as they are, and as the builder divides them.
  ["phi3", "phi3", 1e-5],
  ["phi3-apart", "phi3", 1e-5],
] as const;

for (const { name, ort } of ORTS) {
  t.test(`${name}: every task as PEFT has it`, async (t) => {
    for (const [file, kind, tolerance] of FILES) {
      const pack = await packOf(t, kind);
      const quantised = file.endsWith("int4");
      for (const mode of modesOn(name)) {
        // DoRA needs the float weight.
        if (quantised) pack.removeTask("dora");
        const session = await createEigenSession(ort, data(`builder/${file}.onnx`), pack, { mode });
        if (!quantised) t.same(session.unconfirmed, [], file);
        for (const task of TASKS) {
          if (quantised && task === "dora") continue;
          await session.switchTask(task);
          const found = (await session.run(feeds(ort, session, kind === "small" ? 1 : 2)))["logits"]!
            .data as Float32Array;
          const off = difference(found, logits[file]![task ?? "base"]!);
          t.ok(off < tolerance, `${file}, ${mode}, ${task}: off by ${off}`);
        }
        if (mode === "folded") {
          await session.close();
          continue;
        }
        const mixed = await session.run(feeds(ort, session, kind === "small" ? 1 : 2), {
          tasks: ["few", "all"],
        });
        const half = logits[file]!["all"]!.length / 2;
        const expected = [...logits[file]!["few"]!.slice(0, half), ...logits[file]!["all"]!.slice(half)];
        const off = difference(mixed["logits"]!.data as Float32Array, expected);
        t.ok(off < tolerance, `${file}, ${mode}, one task a row: off by ${off}`);
        await session.close();
        if (quantised) break;
      }
    }
  });
}

t.test("another model's pack is refused", async (t) => {
  const other = await packOf(t, "qwen2");
  t.match(await refusal(() => createEigenSession(NODE, data("builder/llama.onnx"), other)), {
    name: "BaseMismatchError",
    message: /fingerprint|another model/,
  });
});

t.test("4 bits cannot be folded, and say so", async (t) => {
  const pack = await packOf(t, "llama");
  pack.removeTask("dora");
  t.match(await refusal(() => createEigenSession(NODE, data("builder/llama-int4.onnx"), pack, { mode: "folded" })), {
    name: "BaseMismatchError",
    message: /mode "folded": the weight of "[^"]*_proj" is quantised.*use mode "core" or "factors"/,
  });
});
