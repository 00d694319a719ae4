/**
 * Weights that one task brings whole, or in rows, and another adapts: their values, in a blend too, and refusals by
 * name.
 */
import { createRuntime, type Runtime, type RuntimeOptions, type Tensor } from "eigenlora";
import type { Adapter, AdapterModule, SavedTensor } from "eigenlora/build";
import t from "tap";
import { adapterOf, lora, save } from "../support/adapters.ts";
import { relativeDifference } from "../support/compare.ts";
import { packed } from "../support/packs.ts";
import { chance } from "../support/random-packs.ts";

const random = chance(5);
const [OUT, IN, VOCABULARY] = [6, 6, 9];

const task = (id: string, modules: readonly AdapterModule[], saved: readonly SavedTensor[]): Adapter =>
  adapterOf(id, modules, { saved });

const other = lora(random.values, "other", OUT, IN);
const whole = task(
  "whole",
  [other],
  [save(random.values, "layer.weight", "saved", [OUT, IN]), save(random.values, "layer.bias", "saved", [OUT])],
);
const rows = task("rows", [other], [save(random.values, "emb.weight", "rows", [2, 4], [1, 7])]);
const adapts = task(
  "adapts",
  [lora(random.values, "layer", OUT, IN), lora(random.values, "emb", 4, VOCABULARY, { layout: "embedding" })],
  [save(random.values, "layer.bias", "bias-delta", [OUT])],
);
const dora = task("dora", [lora(random.values, "layer", OUT, IN, { magnitude: true })], []);
const ALL = [whole, rows, adapts, dora];

function baseOf(): Map<string, Tensor> {
  const { values } = chance(6);
  const tensor = (...shape: number[]): Tensor => ({
    dtype: "f32",
    shape,
    data: values(shape.reduce((a, b) => a * b, 1)),
  });
  return new Map([
    ["layer.weight", tensor(OUT, IN)],
    ["layer.bias", tensor(OUT)],
    ["other.weight", tensor(OUT, IN)],
    ["emb.weight", tensor(VOCABULARY, 4)],
  ]);
}

const values = async ({ saved }: Adapter, name: string): Promise<Float32Array> =>
  (await saved.find((one) => one.name === name)!.read()).slice();

/** base + strength · ΔW of the task, [out, in], or [in, out] where it is `turned`; with DoRA's scale. */
async function folded(adapter: Adapter, name: string, base: ArrayLike<number>, strength = 1, turned = false) {
  const { out, in: inputs, read } = adapter.modules.get(name)!;
  const { rank, A, Bt, magnitude } = await read();
  const at = (o: number, i: number): number => (turned ? i * out + o : o * inputs + i);
  const W = Float64Array.from(base);
  for (let o = 0; o < out; o++) {
    for (let i = 0; i < inputs; i++)
      for (let k = 0; k < rank; k++) W[at(o, i)]! += strength * Bt[k * out + o]! * A[k * inputs + i]!;
    if (!magnitude) continue;
    let norm = 0;
    for (let i = 0; i < inputs; i++) norm += W[at(o, i)]! ** 2;
    for (let i = 0; i < inputs; i++) W[at(o, i)]! *= magnitude[o]! / Math.sqrt(norm);
  }
  return W;
}

t.test("weights that are replaced here and adapted there, in numbers", async (t) => {
  const base = baseOf();
  const pristine = new Map([...base].map(([name, { data }]) => [name, Float32Array.from(data as Float32Array)]));
  const W = pristine.get("layer.weight")!;
  const runtime = await createRuntime(await packed(ALL), { backend: "js", base });
  const is = (name: string, expected: ArrayLike<number>, what: string): void => {
    const off = relativeDifference(base.get(name)!.data as Float32Array, expected);
    t.ok(off < 1e-6, `${what}: ${name} is off by ${off}`);
  };
  const brought = await values(whole, "layer.weight");
  for (const id of ["adapts", "whole", "dora", "whole", "adapts", null, "whole", null, "dora", "rows"]) {
    const { replaced } = await runtime.switchTask(id);
    const what = `after ${id}`;
    t.equal(replaced.includes("layer.weight"), id === "whole", what);
    if (id === "whole") t.same(base.get("layer.weight")!.data, brought, `${what}, exactly`);
    else if (id === "adapts" || id === "dora")
      is("layer.weight", await folded(id === "dora" ? dora : adapts, "layer", W), what);
    else t.same(base.get("layer.weight")!.data, W, `${what}, the base's bits`);
  }

  const blend = { whole: 0.5, adapts: 0.25 };
  await t.rejects(runtime.switchTask(blend), {
    tag: "task",
    message: `"whole" brings "layer.bias" whole and "adapts" changes the base's: say whose to use, { head: "whole" } or { head: "adapts" }`,
  });
  t.equal(runtime.task, "rows", "the task stays");
  await runtime.switchTask(blend, { head: "whole" });
  t.same(base.get("layer.weight")!.data, brought, "its own, whatever the strengths");
  t.same(base.get("layer.bias")!.data, await values(whole, "layer.bias"));
  is("other.weight", await folded(whole, "other", pristine.get("other.weight")!, 0.5), "the rest is blended");
  await runtime.switchTask(blend, { head: "adapts" });
  is("layer.weight", await folded(adapts, "layer", W, 0.25), "the other's head");
  const delta = await values(adapts, "layer.bias");
  is(
    "layer.bias",
    pristine.get("layer.bias")!.map((v, i) => v + 0.25 * delta[i]!),
    "the other's head",
  );

  await runtime.switchTask({ rows: 0.5, adapts: 0.25 });
  const table = await folded(adapts, "emb", pristine.get("emb.weight")!, 0.25, true);
  (await values(rows, "emb.weight")).forEach((v, i) => {
    const at = [1, 7][Math.floor(i / 4)]! * 4 + (i % 4);
    table[at]! += 0.5 * (v - pristine.get("emb.weight")![at]!);
  });
  is("emb.weight", table, "rows are differences");
  await runtime.switchTask(null);
  for (const [name, data] of pristine) t.same(base.get(name)!.data, data, `${name}: the base's bits at null`);
  await runtime.close();
});

t.test("what cannot be is refused by name, and changes nothing", async (t) => {
  const open = async (adapters: Adapter[], more: RuntimeOptions = {}): Promise<Runtime> => {
    const runtime = await createRuntime(await packed(adapters), { backend: "js", base: baseOf(), ...more });
    t.teardown(() => runtime.close());
    return runtime;
  };
  const wide = task("wide", [other], [save(random.values, "layer.weight", "saved", [OUT + 1, IN])]);
  const message =
    'task "wide" brings "layer.weight", which other tasks adapt as the module "layer": it is [7, 6], the base\'s [6, 6]; ' +
    "leave it out with `ignore`";
  const runtime = await open([wide, adapts]);
  await runtime.switchTask("adapts");
  await t.rejects(runtime.switchTask("wide"), { tag: "base", message, expected: [OUT, IN], found: [OUT + 1, IN] });
  t.equal(runtime.task, "adapts");
  await (await open([wide, adapts], { ignore: ["layer.weight"] })).switchTask("wide");

  const alias = task("alias", [other], [save(random.values, "model.layer.weight", "saved", [OUT, IN])]);
  await t.rejects((await open([alias, adapts])).switchTask("alias"), {
    tag: "base",
    message: /it calls it "model\.layer\.weight"; pack the adapters under one name/,
  });
  const biased = task("biased", [other], [save(random.values, "model.layer.bias", "saved", [OUT])]);
  await t.rejects((await open([biased, adapts])).switchTask({ biased: 1, adapts: 1 }), {
    tag: "base",
    message: /task "biased" calls it "model\.layer\.bias", task "adapts" calls it "layer\.bias"/,
  });

  const tied = baseOf();
  tied.set("other.weight", { ...tied.get("layer.weight")! });
  const both = task("both", [lora(random.values, "layer", OUT, IN), other], []);
  const one = await createRuntime(await packed([both, dora]), { backend: "js", base: tied });
  const before = Float32Array.from(tied.get("layer.weight")!.data as Float32Array);
  for (const [id, which] of [
    ["dora", "alone is"],
    ["both", "both are"],
  ] as const) {
    await t.rejects(one.switchTask(id), {
      tag: "base",
      message: new RegExp(`"layer\\.weight" .*"other\\.weight" share their memory, and .*${which} to be changed`),
    });
  }
  t.equal(one.task, null);
  t.same(tied.get("layer.weight")!.data, before, "refused before anything has changed");
  await one.close();
});
