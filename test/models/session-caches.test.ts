/**
 * Caches of keys and values belong to the task that made them: a run under another task refuses them, unless asked not
 * to. Uses the tiny decoder of test/data/decoder; the pipeline needs what `pipelines.ts` needs.
 */
import { openPack, type Pack } from "eigenlora";
import { encodeTaskFile } from "eigenlora/build";
import { createEigenSession } from "eigenlora/onnxruntime";
import type { EngineTensor } from "eigenlora/session";
import { attachPack } from "eigenlora/transformers";
import t, { type Test } from "tap";
import { CacheWatch } from "../support/internals/models.ts";
import { data, LOSSLESS, packOf } from "../support/packs.ts";
import { skip, transformers } from "../support/pipelines.ts";
import {
  difference,
  type Feeds,
  NODE,
  type Options,
  ORTS,
  type Ort,
  refusal,
  type Session,
} from "../support/sessions.ts";

const MODEL = data("decoder/onnx/model.onnx");
const { bytes } = await packOf(["decoder/adapters/upper", "decoder/adapters/lower"], LOSSLESS);
const PROMPT = [5, 40, 7, 19];

/** A session on the decoder, and its pack. */
async function open(t: Test, ort: Ort, options: Options = {}): Promise<{ session: Session; pack: Pack }> {
  const pack = await openPack(bytes);
  const session = await createEigenSession(ort, MODEL, pack, options);
  t.teardown(async () => {
    await session.close();
    await pack.close();
  });
  return { session, pack };
}

/** Feeds for tokens behind a cache; without a cache they begin a text. */
function behind({ Tensor }: Ort, tokens: number[], rows = 1, cache?: Feeds): Feeds {
  const past = cache?.["present.0.key"]?.dims[2] ?? 0;
  const [length, total] = [tokens.length, past + tokens.length];
  const ids = Array.from({ length: rows }, (_, row) => tokens.map((token) => BigInt(token + row))).flat();
  const positions = Array.from({ length: rows }, () => tokens.map((_, i) => BigInt(past + i))).flat();
  const feeds: Feeds = {
    input_ids: new Tensor("int64", BigInt64Array.from(ids), [rows, length]),
    attention_mask: new Tensor("int64", new BigInt64Array(rows * total).fill(1n), [rows, total]),
    position_ids: new Tensor("int64", BigInt64Array.from(positions), [rows, length]),
  };
  for (const layer of [0, 1])
    for (const side of ["key", "value"])
      feeds[`past_key_values.${layer}.${side}`] =
        cache?.[`present.${layer}.${side}`] ?? new Tensor("float32", new Float32Array(0), [rows, 2, 0, 8]);
  return feeds;
}

/** Copies of a cache, which the session does not know. */
function copied({ Tensor }: Ort, cache: Feeds): Feeds {
  return Object.fromEntries(
    Object.entries(cache).map(([name, { data, dims }]) => [
      name,
      new Tensor("float32", (data as Float32Array).slice(), dims),
    ]),
  );
}

const logits = (results: Feeds): Float32Array => results["logits"]!.data as Float32Array;
const refused = (made: string, run: string): { tag: string; message: string } => ({
  tag: "task",
  message: `feeds: "past_key_values.0.key" was made under ${made}, and this run is under ${run}: its answer would mix the two`,
});

for (const { name, ort } of ORTS) {
  t.test(`${name}: a cache is refused under another task`, async (t) => {
    const { session } = await open(t, ort);
    const base = await session.run(behind(ort, PROMPT));
    await session.run(behind(ort, [3], 1, base));
    await session.switchTask("upper");
    const error = await refusal(() => session.run(behind(ort, [3], 1, base)));
    t.match(error, refused("the base", 'task "upper"'));
    t.match(error, { task: "upper", message: /empty cache.* keepCache: true to switchTask or to this run$/ });
    const upper = await session.run(behind(ort, PROMPT));
    const step = await session.run(behind(ort, [3], 1, upper));
    await session.switchTask("lower");
    t.match(await refusal(() => session.run(behind(ort, [4], 1, step))), refused('task "upper"', 'task "lower"'));
    await session.switchTask(null);
    t.match(await refusal(() => session.run(behind(ort, [4], 1, step))), refused('task "upper"', "the base"));
    await session.switchTask({ upper: 0.5, lower: 0.5 });
    const blend = '"lower" × 0.5 + "upper" × 0.5';
    t.match(await refusal(() => session.run(behind(ort, [4], 1, step))), refused('task "upper"', `the blend ${blend}`));

    // Back under the task that made it.
    await session.switchTask("upper");
    const there = await session.run(behind(ort, [4], 1, step));
    t.equal(difference(logits(there), logits(await session.run(behind(ort, [4], 1, copied(ort, step))))), 0);
    await session.switchTask({ upper: 1 });
    await session.run(behind(ort, [4], 1, step));
  });

  t.test(`${name}: a cache is kept where that was asked for`, async (t) => {
    const { session } = await open(t, ort);
    const base = await session.run(behind(ort, PROMPT));
    await session.switchTask("upper", { keepCache: true });
    const kept = await session.run(behind(ort, [3], 1, base));
    const mixed = await session.run(behind(ort, [3], 1, copied(ort, base)));
    t.equal(difference(logits(kept), logits(mixed)), 0, "what is in it stays as it was made");
    await session.run(behind(ort, [4], 1, kept));
    await session.switchTask("lower");
    t.match(await refusal(() => session.run(behind(ort, [4], 1, kept))), refused('task "upper"', 'task "lower"'));
    t.match(await refusal(() => session.run(behind(ort, [4], 1, base))), refused("the base", 'task "lower"'));
    const once = await session.run(behind(ort, [4], 1, base), { keepCache: true });
    await session.run(behind(ort, [4], 1, once));
    t.match(await refusal(() => session.run(behind(ort, [4], 1, base))), refused("the base", 'task "lower"'));

    await session.switchTask("upper", { keepCache: true });
    const never = await refusal(() => session.run(behind(ort, [4], 1, base), { keepCache: false }));
    t.match(never, refused("the base", 'task "upper"'));
    t.match(await refusal(() => session.switchTask("upper", { keepCaches: true } as object)), {
      name: "TypeError",
      message: /keepCaches/,
    });
  });

  t.test(`${name}: rows have caches of their own tasks`, async (t) => {
    const { session } = await open(t, ort);
    const tasks = ["upper", null, "lower"];
    const cache = await session.run(behind(ort, PROMPT, 3), { tasks });
    const step = await session.run(behind(ort, [3], 3, cache), { tasks: [...tasks] });
    await session.run(behind(ort, [3], 3, step), { tasks });
    const swapped = await refusal(() => session.run(behind(ort, [3], 3, step), { tasks: ["upper", "lower", null] }));
    t.match(swapped, {
      tag: "task",
      message: '"past_key_values.0.key", row 1, was made under the base, and this run is under task "lower"',
    });
    await session.run(behind(ort, [3], 3, step), { tasks: ["upper", "lower", null], keepCache: true });
    t.match(await refusal(() => session.run(behind(ort, [3], 3, step))), {
      message: ', row 0, was made under task "upper", and this run is under the base',
    });
    // One task in all rows equals that task.
    const all = await session.run(behind(ort, PROMPT, 2), { tasks: ["lower", "lower"] });
    await session.switchTask("lower", { keepCache: true });
    const more = await session.run(behind(ort, [3], 2, all), { keepCache: false });
    await session.run(behind(ort, [4], 2, more), { tasks: ["lower", "lower"] });
    t.match(await refusal(() => session.run(behind(ort, [4], 2, more), { tasks: ["lower", "upper"] })), {
      message: ', row 1, was made under task "lower", and this run is under task "upper"',
    });
  });
}

t.test("another task under the same id is another task", async (t) => {
  const { session, pack } = await open(t, NODE);
  const { bytes: blob } = await pack.load("upper");
  const file = encodeTaskFile({ id: "upper", adapterBytes: 0, metadata: {} }, pack.basisId, blob);
  await session.switchTask("upper");
  const cache = await session.run(behind(NODE, PROMPT));
  const rows = await session.run(behind(NODE, PROMPT, 2), { tasks: ["upper", null] });
  // Adding other tasks changes nothing.
  await session.addTask("other", file);
  await session.switchTask("other");
  await session.switchTask("upper");
  await session.run(behind(NODE, [3], 1, cache));
  await session.run(behind(NODE, [3], 2, rows), { tasks: ["upper", null] });

  await session.switchTask("lower");
  session.removeTask("upper");
  await session.addTask("upper", file);
  t.match(await refusal(() => session.run(behind(NODE, [3], 2, rows), { tasks: ["upper", null] })), {
    message: ', row 0, was made under task "upper" (replaced since, or of another open pack)',
  });
  await session.switchTask("upper");
  const error = await refusal(() => session.run(behind(NODE, [3], 1, cache)));
  t.match(error, refused('task "upper" (replaced since, or of another open pack)', 'task "upper"'));

  // While the replaced task is active, it stays as it was.
  const second = await session.run(behind(NODE, PROMPT));
  pack.removeTask("upper");
  await pack.addTask("upper", file);
  await session.run(behind(NODE, [3], 1, second));
  await session.switchTask("upper");
  t.match(await refusal(() => session.run(behind(NODE, [3], 1, second))), { message: /task "upper" \(replaced since/ });
});

t.test("a cache is known by its memory too; copies are nobody's", async (t) => {
  const { session } = await open(t, NODE);
  const { Tensor } = NODE;
  const dims = [1, 2, PROMPT.length, 8];
  const own = new Tensor("float32", new Float32Array(64), dims);
  const results = await session.run(behind(NODE, PROMPT), {
    logits: null,
    "present.0.key": own,
    "present.0.value": null,
    "present.1.key": null,
    "present.1.value": null,
  });
  await session.switchTask("upper");
  const again = new Tensor("float32", results["present.0.value"]!.data as Float32Array, dims);
  const fresh = behind(NODE, [3], 1, copied(NODE, results));
  for (const [name, tensor] of Object.entries({ "past_key_values.0.key": own, "past_key_values.0.value": again })) {
    const error = await refusal(() => session.run({ ...fresh, [name]: tensor }));
    t.match(error, { tag: "task", message: `"${name}" was made under the base` });
  }
  await session.run(fresh);
});

t.test("on a device the buffer tells, and nothing is read", (t) => {
  const watch = new CacheWatch({ tasks: new Map() }, ["past_key_values.0.key"], ["logits", "present.0.key"]);
  const tensor = (gpuBuffer: object): EngineTensor => ({
    ...{ type: "float32", dims: [1, 2, 3, 8] },
    ...{ location: "gpu-buffer", gpuBuffer },
    get data(): unknown {
      throw new Error("the data is not on CPU");
    },
  });
  const [one, two] = [{}, {}];
  watch.check({}, watch.stateOf("a"))({ "present.0.key": tensor(one), logits: tensor(two) });
  const run = (buffer: object): unknown => watch.check({ "past_key_values.0.key": tensor(buffer) }, watch.stateOf("b"));
  t.throws(() => run(one), /was made under task "a", and this run is under task "b"/);
  run(two);
  watch.check({ "past_key_values.0.key": tensor(one) }, watch.stateOf("a"));
  // Runtimes reuse buffers.
  watch.check({}, watch.stateOf("b"))({ "present.0.key": tensor(one) });
  run(one);
  t.end();
});

t.test("a pipeline's cache belongs to the task that made it", { skip }, async (t) => {
  const { pipeline } = await transformers(data(""));
  const pipe = await pipeline("text-generation", "decoder", { dtype: "fp32" });
  const pack = await openPack(bytes);
  const tasks = await attachPack(pipe, pack, { model: "decoder" });
  t.teardown(async () => {
    await pipe.dispose();
    await pack.close();
  });
  const options = { max_new_tokens: 4, do_sample: false, return_dict_in_generate: true };
  interface Generated {
    sequences: { tolist(): bigint[][] };
    past_key_values: Record<string, { dims: number[] }>;
  }
  const generate = async (text: string, past?: object): Promise<Generated> =>
    (await pipe.model.generate({ ...pipe.tokenizer(text), ...options, ...past })) as never;
  await tasks.switchTask("upper");
  const first = await generate("x = 3;");
  const text = "x = 3;" + "abcdefgh";
  const past_key_values = first.past_key_values;
  await tasks.switchTask("lower");
  const console = globalThis.console.error;
  globalThis.console.error = () => undefined;
  t.teardown(() => (globalThis.console.error = console));
  t.match(await refusal(() => generate(text, { past_key_values })), refused('task "upper"', 'task "lower"'));
  await tasks.switchTask("lower", { keepCache: true });
  await generate(text, { past_key_values });
  await tasks.switchTask("lower");
  await generate(`${text}more`, { past_key_values });
});
