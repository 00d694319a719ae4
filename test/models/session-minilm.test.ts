/**
 * The real model with real adapters, packed without loss: PEFT's labels and logits. A sample of tasks and rows; the soak takes all of
 * three suites.
 */
import { openPack } from "eigenlora";
import { openOnnxHost } from "eigenlora/onnx";
import t from "tap";
import { createEncoder, readReference, readTask } from "../../examples/minilm.js";
import { data, LOSSLESS, packOf } from "../support/packs.ts";
import { soak, whole } from "../support/required.ts";
import { difference, type Mode, NODE, type Ort, open, WEB } from "../support/sessions.ts";

const model = data("minilm/model_fp16.onnx");
const TASKS = ["debtags-role", "debtags-game", "sections-0", "debtags-scope"];
/** Rows for which the reference has logits. */
const WITH_LOGITS = 16;

/** Least share of equal predictions. Sums of f32 in another order than PEFT's may decide close calls otherwise. */
const LEAST = soak ? 0.998 : 1;
/** Largest difference of logits: hub's adapters are stored in f16. */
const MOST = { "own-seed": 1e-5, "shared-seed": 1e-5, hub: 5e-4 };

async function packed(suite: string, tasks: readonly string[]): Promise<Uint8Array<ArrayBuffer>> {
  const base = await openOnnxHost(model);
  const { bytes } = await packOf(
    tasks.map((task) => `adapters/${suite}/${task}`),
    { ...LOSSLESS, base },
  );
  await base.close?.();
  return bytes;
}

function check(suite: keyof typeof MOST, ort: Ort, mode: Mode, some?: readonly string[], rows = Infinity): void {
  t.test(`${suite}, ${mode} on ${ort === NODE ? "onnxruntime-node" : "onnxruntime-web"}`, async (t) => {
    const reference = await readReference(suite);
    const tasks = some ?? [...reference.keys()];
    const session = await open(ort, model, await openPack(await packed(suite, tasks)), { mode });
    const encode = await createEncoder(ort);
    let [largest, equal, all] = [0, 0, 0];
    for (const task of tasks) {
      const { test } = await readTask(task);
      const { predictions, logits16 } = reference.get(task)!;
      await session.switchTask(task);
      const columns = session.tasks.get(task)!.metadata.labels!.length;
      for (let from = 0; from < Math.min(rows, test.length); from += WITH_LOGITS) {
        const texts = test.slice(from, Math.min(from + WITH_LOGITS, rows)).map(([text]) => text);
        const { data, dims } = (await session.run(encode(texts)))["logits"]!;
        t.same(dims, [texts.length, columns], `${task}: as many columns as labels`);
        for (let row = 0; row < texts.length; row++) {
          const values = [...(data as Float32Array).subarray(row * columns, (row + 1) * columns)];
          equal += Number(values.indexOf(Math.max(...values)) === predictions[from + row]);
          all++;
        }
        if (from > 0) continue;
        largest = Math.max(largest, difference(data as Float32Array, logits16.slice(0, texts.length).flat()));
      }
    }
    t.ok(equal >= LEAST * all, `${equal} of ${all} predictions as PEFT's`);
    // Folded weights are rounded to the model's f16.
    t.ok(largest <= (mode === "folded" ? 2e-3 : MOST[suite]), `logits differ by ${largest} at most`);
    await session.close();
  });
}

check("own-seed", NODE, "core", TASKS, 64);
check("own-seed", NODE, "factors", TASKS.slice(0, 1), 16);
check("own-seed", NODE, "folded", TASKS.slice(0, 1), 16);
if (whole) check("own-seed", WEB, "core", TASKS.slice(0, 1), 16);
if (soak) for (const suite of ["own-seed", "shared-seed", "hub"] as const) check(suite, NODE, "core");
