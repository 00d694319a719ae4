/**
 * A task learned on one file of a model serves another file of the same model: learned in f32, it is used on weights of 4 bits, and
 * answers as its factors do when they are fed directly.
 */
import { openPack } from "eigenlora";
import { buildPack, taskAdapter } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { createEigenSession } from "eigenlora/onnxruntime";
import { createTrainer, type Encode } from "eigenlora/train";
import t from "tap";
import { transpose } from "../support/internals/base.ts";
import type { Trainable } from "../support/internals/models.ts";
import { fitted, relative } from "../support/learning.ts";
import { concat, data, LOSSLESS } from "../support/packs.ts";
import { NODE as ort } from "../support/sessions.ts";

/** Encodes letters as tokens; the files know 48. */
const tokens = (text: string): number[] => [...text].map((letter) => letter.charCodeAt(0) % 48);
const encode: Encode & { eos_token?: string } = Object.assign(
  ([text]: readonly string[]) => {
    const ids = tokens(text!);
    return { input_ids: { type: "int64", dims: [1, ids.length], data: BigInt64Array.from(ids, BigInt) } };
  },
  { eos_token: "." },
);
const EXAMPLES = ["abc", "bcd", "cde", "def"].map((prompt) => ({ prompt, completion: "xyz" }));

const [base, fine] = ["llama", "llama-int4"].map((name) => data(`builder/${name}.onnx`)) as [string, string];

/** One text, with an empty cache. */
function feeds(inputNames: readonly string[]): Record<string, never> {
  const ids = tokens("abcxy");
  const int64 = (values: number[]) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  const all: Record<string, unknown> = { input_ids: int64(ids), attention_mask: int64(ids.map(() => 1)) };
  for (const name of inputNames)
    if (/past/.test(name)) all[name] = new ort.Tensor("float32", new Float32Array(0), [1, 2, 0, 16]);
  return all as Record<string, never>;
}

t.test("learned in f32, used in 4 bits", async (t) => {
  const [adapter, ...others] = await readAdapters([data("builder/adapters/llama/all")]);
  const bytes = concat((await buildPack([adapter!, ...others], LOSSLESS)).chunks);
  const learning = await createEigenSession(ort, base, await openPack(bytes), { trainable: true });
  const trainer = await createTrainer(learning, { encode, seed: 1 });
  const [first, last] = await fitted(trainer, EXAMPLES, { steps: 12, batch: 4 });
  t.ok(last < first, `loss ${first.toFixed(2)} to ${last.toFixed(2)}`);
  const file = await trainer.task({ id: "mine" });
  await learning.close();

  const served = await openPack(bytes);
  const logits: Float32Array[] = [];
  for (const mode of ["core", "factors"] as const) {
    const session = await createEigenSession(ort, fine, served, { mode });
    if (!served.tasks.has("mine")) await session.addTask("mine", file);
    for (const task of mode === "core" ? ["mine", null] : ["mine"]) {
      await session.switchTask(task);
      logits.push((await session.run(feeds(session.inputNames)))["logits"]!.data as Float32Array);
    }
    await session.close();
  }
  const [core, without, factors] = logits as [Float32Array, Float32Array, Float32Array];

  const other = await createEigenSession(ort, fine, await openPack(bytes), { trainable: true });
  const { inputs, run, base: none } = (other as unknown as { readonly trainable: Trainable }).trainable;
  const { modules } = await taskAdapter(served, "mine");
  const all: Record<string, unknown> = feeds(other.inputNames);
  const values = await none();
  for (const { name, of, kind } of inputs) {
    const { rank, A, Bt } = await modules.get(of)!.read();
    const { data, dims } = values.get(name)!;
    if (kind === "A") all[name] = new ort.Tensor("float32", transpose(A, rank, dims[0]!), [1, dims[0]!, rank]);
    else if (kind === "B") all[name] = new ort.Tensor("float32", Bt, [1, rank, dims[1]!]);
    else all[name] = new ort.Tensor("float32", data as Float32Array, [1, ...dims]);
  }
  const expected = (await run(all as never, ["logits"]))["logits"]!.data as Float32Array;
  await other.close();
  await served.close();

  t.ok(relative(without, expected) > 0.01, "the task changes the answer");
  // The task is not rounded to 4 bits; activations are rounded by the layers.
  t.ok(relative(core, expected) < 1e-4, `core: off by ${relative(core, expected).toExponential(1)}`);
  t.ok(relative(factors, expected) < 1e-4, `factors: off by ${relative(factors, expected).toExponential(1)}`);
});
