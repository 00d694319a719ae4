/** Modules with different names in different versions of transformers: which names match, and which must not. */
import { createRuntime, openPack } from "eigenlora";
import { buildPack, readPeft } from "eigenlora/build";
import t from "tap";
import { writeSafetensors } from "../support/internals/base.ts";
import { NameMatcher } from "../support/internals/runtime.ts";
import { concat, LOSSLESS } from "../support/packs.ts";

/** Names in newer and older checkpoints, as transformers 5.24 maps them when it loads a checkpoint. */
const PAIRS = [
  ["vit.layers.3.attention.q_proj", "vit.encoder.layer.3.attention.attention.query"],
  ["vit.layers.3.attention.o_proj", "vit.encoder.layer.3.attention.output.dense"],
  ["vit.layers.3.mlp.fc1", "vit.encoder.layer.3.intermediate.dense"],
  ["vit.layers.3.mlp.fc2", "vit.encoder.layer.3.output.dense"],
  ["dinov2.encoder.layer.0.attention.v_proj", "dinov2.encoder.layer.0.attention.attention.value"],
  ["dinov2.encoder.layer.0.attention.o_proj", "dinov2.encoder.layer.0.attention.output.dense"],
  ["swin.encoder.layers.1.blocks.0.attention.k_proj", "swin.encoder.layers.1.blocks.0.attention.self.key"],
  ["swin.encoder.layers.1.blocks.0.mlp.fc2", "swin.encoder.layers.1.blocks.0.output.dense"],
  ["segformer.stages.1.blocks.0.attention.q_proj", "segformer.encoder.block.1.0.attention.self.query"],
  ["decode_head.linear_projections.1.proj", "decode_head.linear_c.1.proj"],
  ["segformer.stages.1.blocks.0.mlp.fc1", "segformer.encoder.block.1.0.mlp.dense1"],
  ["model.language_model.layers.0.self_attn.q_proj", "language_model.model.layers.0.self_attn.q_proj"],
  ["model.vision_tower.encoder.layers.0.mlp.fc1", "vision_tower.vision_model.encoder.layers.0.mlp.fc1"],
  ["model.language_model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"],
] as const;

t.test("one finds the other, both ways, with and without segments in front", async (t) => {
  const [now, former] = [0, 1].map((side) => PAIRS.slice(0, -1).map((pair) => `${pair[side]}.weight`));
  for (const [from, to] of [
    [now!, former!],
    [former!, now!],
  ] as const) {
    const matcher = new NameMatcher(to);
    const behind = new NameMatcher(to.map((name) => `base.${name}`));
    for (const [i, name] of from.entries()) {
      t.same(matcher.find(name), { name: to[i] });
      t.same(behind.find(name), { name: `base.${to[i]}` });
    }
  }
  const [whole, alone] = PAIRS.at(-1)!;
  t.same(new NameMatcher([`${alone}.bias`, `${alone}.weight`]).find(`${whole}.weight`), { name: `${alone}.weight` });
  t.same(new NameMatcher([`${whole}.weight`]).find(`${alone}.weight`), { name: `${whole}.weight` });
});

t.test("its own name comes first; another layer is never found; several are ambiguous", async (t) => {
  const [now, former] = [`${PAIRS[0][0]}.weight`, `${PAIRS[0][1]}.weight`];
  t.same(new NameMatcher([former, now]).find(now), { name: now });
  t.same(new NameMatcher([former, now]).find(former), { name: former });
  for (const other of ["vit.encoder.layer.4.attention.attention.query", "vit.encoder.layer.3.attention.attention.key"])
    t.match(new NameMatcher([`${other}.weight`]).find(now), { ambiguous: false });
  const several = new NameMatcher([`a.${former}`, `b.${former}`]).find(now);
  t.strictSame("ambiguous" in several && [several.ambiguous, several.candidates()], [
    true,
    [`a.${former}`, `b.${former}`],
  ]);
  // Names that agree only in part do not match.
  t.match(new NameMatcher(["vit.encoder.layer.3.attention.attention.query_norm.weight"]).find(now), {
    ambiguous: false,
  });
});

/** An adapter of one layer of width 4 and rank 1: ΔW = alpha · b aᵀ. */
async function adapterOf(module: string) {
  const entry = (side: "A" | "B", shape: number[]) => ({
    name: `base_model.model.${module}.lora_${side}.weight`,
    dtype: "F32",
    shape,
    read: () => new Uint8Array(Float32Array.of(1, 2, 3, 4).buffer),
  });
  const chunks: Uint8Array[] = [];
  for await (const chunk of writeSafetensors([entry("A", [1, 4]), entry("B", [4, 1])])) chunks.push(chunk);
  const config = { peft_type: "LORA", r: 1, lora_alpha: 2, target_modules: ["q_proj"] };
  return readPeft({ id: "task", file: "task", config, tensors: concat(chunks) });
}

t.test("a pack of an adapter by version 5, on a checkpoint by version 4", async (t) => {
  const [now, former] = PAIRS[0];
  const weights = Float32Array.from({ length: 16 }, (_, i) => Math.sin(1 + i));
  const baseOf = (data: Float32Array<ArrayBuffer>) =>
    new Map([[`${former}.weight`, { dtype: "f32" as const, shape: [4, 4], data }]]);
  const adapter = await adapterOf(now);
  const { chunks } = await buildPack([adapter], { ...LOSSLESS, base: baseOf(weights.slice()) });
  const pack = await openPack(concat(chunks));
  t.teardown(() => pack.close());
  const folded = weights.slice();
  const runtime = await createRuntime(pack, { base: baseOf(folded) });
  await runtime.switchTask("task");
  for (const [i, value] of folded.entries()) {
    const delta = 2 * (1 + Math.floor(i / 4)) * (1 + (i % 4));
    t.ok(Math.abs(value - (weights[i]! + delta)) < 1e-5, `${i}`);
  }
  await runtime.switchTask(null);
  t.same(folded, weights);
  await runtime.close();
  const other = baseOf(weights.map((value) => Math.cos(5 * value)));
  await t.rejects(createRuntime(pack, { base: other }), { name: "BaseMismatchError" }, "its fingerprint tells another");
});
