/**
 * The real model with real adapters, packed without loss: PEFT's labels and logits. A sample of tasks and rows; `test/soak-session.js`
 * takes all.
 */
import { openPack } from "eigenlora";
import { openOnnxHost } from "eigenlora/onnx";
import t from "tap";
import { createEncoder, readReference, readTask } from "../examples/minilm.js";
import { data, LOSSLESS, packOf } from "./packs.ts";
import { difference, type Mode, NODE, type Ort, open, WEB } from "./sessions.ts";

const model = data("minilm/model_fp16.onnx");
const TASKS = ["debtags-role", "debtags-game", "sections-0", "debtags-scope"];
/** Rows for which the reference has logits. */
const WITH_LOGITS = 16;

const base = await openOnnxHost(model);
const { bytes } = await packOf(
  TASKS.map((task) => `adapters/own-seed/${task}`),
  { ...LOSSLESS, base },
);
await base.close?.();
const reference = await readReference("own-seed");

function check(ort: Ort, mode: Mode, tasks: readonly string[], rows: number): void {
  t.test(`${mode} on ${ort === NODE ? "onnxruntime-node" : "onnxruntime-web"}`, async (t) => {
    const session = await open(ort, model, await openPack(bytes), { mode });
    const encode = await createEncoder(ort);
    let largest = 0;
    for (const task of tasks) {
      const { test } = await readTask(task);
      const { predictions, logits16 } = reference.get(task)!;
      await session.switchTask(task);
      const columns = session.tasks.get(task)!.metadata.labels!.length;
      const found: number[] = [];
      for (let from = 0; from < Math.min(rows, test.length); from += WITH_LOGITS) {
        const texts = test.slice(from, Math.min(from + WITH_LOGITS, rows)).map(([text]) => text);
        const { data, dims } = (await session.run(encode(texts)))["logits"]!;
        t.same(dims, [texts.length, columns], `${task}: as many columns as labels`);
        for (let row = 0; row < texts.length; row++) {
          const values = [...(data as Float32Array).subarray(row * columns, (row + 1) * columns)];
          found.push(values.indexOf(Math.max(...values)));
        }
        if (from > 0) continue;
        largest = Math.max(largest, difference(data as Float32Array, logits16.slice(0, texts.length).flat()));
      }
      t.same(found, predictions.slice(0, found.length), `${task}: ${found.length} predictions as PEFT's`);
    }
    // Folded weights are rounded to the model's f16.
    t.ok(largest <= (mode === "folded" ? 2e-3 : 1e-5), `logits differ by ${largest} at most`);
    t.comment(`${tasks.length} tasks, logits by ${largest.toExponential(1)} at most`);
    await session.close();
  });
}

check(NODE, "core", TASKS, 64);
check(NODE, "factors", TASKS.slice(0, 1), 16);
check(NODE, "folded", TASKS.slice(0, 1), 16);
check(WEB, "core", TASKS.slice(0, 1), 16);
