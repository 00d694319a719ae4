/**
 * Adapter files of kohya and LyCORIS, llama.cpp, ONNX Runtime and MLX LM, and pipelines of PEFT: every golden case by
 * its own tool's merge, through a pack and a runtime too; names; refusals; facts read from a base; the command line.
 */
import { cpSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { AdapterError, FormatError } from "eigenlora";
import { type Adapter, buildPack, readKohya } from "eigenlora/build";
import { describeBase, findAdapters, readAdapters } from "eigenlora/node";
import t from "tap";
import { bytesOf, entries, type Spec } from "../support/adapters.ts";
import { checkGolden, relativeDifference, tensorsOf } from "../support/compare.ts";
import { openGguf } from "../support/internals/base.ts";
import { openOnnxAdapter, unflatten } from "../support/internals/pack.ts";
import { concat, data, LOSSLESS } from "../support/packs.ts";

const goldens = data("goldens/formats");
/** config.json of the model behind the GGUF golden. */
const HEADS = { num_attention_heads: 4, num_key_value_heads: 2 };

async function readOne(path: string, base?: string): Promise<Adapter> {
  const [adapter, ...others] = await readAdapters([path], { base });
  t.same(others, []);
  return adapter!;
}

/** Folder, path of the adapter in it, its format, and the tolerance for rounding in the file. */
const CASES: readonly [folder: string, file: string, format: string, tolerance: number][] = [
  ["kohya", "adapter.safetensors", "kohya", 1e-6],
  ["locon", "adapter.safetensors", "kohya", 1e-6],
  ["locon-tucker", "adapter.safetensors", "kohya", 1e-6],
  ["locon-dora", "adapter.safetensors", "kohya", 1e-6],
  ["mlx", ".", "mlx", 1e-6],
  ["mlx-dora", ".", "mlx", 1e-6],
  ["onnx-adapter", "adapter.onnx_adapter", "onnx_adapter", 1e-6],
  ["gguf", "adapter-f32.gguf", "gguf", 1e-6],
  ["gguf", "adapter-f16.gguf", "gguf", 1e-3],
  ["gguf", "adapter-q8_0.gguf", "gguf", 1e-2],
];

for (const [name, file, format, tolerance] of CASES) {
  t.test(`golden ${name}, ${file}`, async (t) => {
    const folder = join(goldens, name);
    const [location] = await findAdapters([join(folder, file)]);
    t.equal(location?.format, format);
    const config = join(t.testdir(), "config.json");
    writeFileSync(config, JSON.stringify(HEADS));
    const adapter = await readOne(join(folder, file), config);
    t.same(adapter.warnings, []);
    t.same([...adapter.modules.keys()], [...adapter.modules.keys()].sort(), "modules are sorted");
    const base = await tensorsOf(join(folder, "base.safetensors"));
    const expected = await tensorsOf(join(folder, "merged.safetensors"));
    const changed = [...expected.keys()].filter(
      (key) => relativeDifference(expected.get(key)!.data, base.get(key)!.data) > 0,
    );
    const host = join(folder, "base.safetensors");
    const pack = concat((await buildPack([adapter], { ...LOSSLESS, base: host })).chunks);
    await adapter.close();
    await checkGolden(t, { name, folder, pack, task: adapter.id, changed, tolerance }, { backend: "js" });
  });
}

function sourceOf(bytes: Uint8Array, name = "memory") {
  const read = async (offset: number, length: number): Promise<Uint8Array> => bytes.slice(offset, offset + length);
  return { name, byteLength: bytes.byteLength, read };
}

const A = [2, 3];
const B = [4, 2];
const kohya = (spec: Spec, base?: { names: string[] }): Promise<Adapter> =>
  bytesOf(entries(spec)).then((tensors) => readKohya({ id: "one", file: "one.safetensors", tensors, base }));
const flat = (name: string): Spec => ({ [`${name}.lora_down.weight`]: [A, 1], [`${name}.lora_up.weight`]: [B, 2] });

t.test("kohya's names, by their words and by the base's", async (t) => {
  const named: Record<string, string> = {
    lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0:
      "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0",
    lora_unet_mid_block_resnets_1_time_emb_proj: "unet.mid_block.resnets.1.time_emb_proj",
    lora_unet_conv_in: "unet.conv_in",
    lora_unet_time_embedding_linear_2: "unet.time_embedding.linear_2",
    lora_te_text_model_encoder_layers_11_self_attn_out_proj:
      "text_encoder.text_model.encoder.layers.11.self_attn.out_proj",
    lora_te1_text_model_encoder_layers_0_mlp_fc1: "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    lora_te2_text_model_encoder_layers_31_mlp_fc2: "text_encoder_2.text_model.encoder.layers.31.mlp.fc2",
    lora_te2_text_projection: "text_encoder_2.text_projection",
  };
  for (const [name, module] of Object.entries(named)) {
    const adapter = await kohya(flat(name));
    t.same([...adapter.modules.keys()], [module]);
  }
  const names = ["double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.qkv.bias", "unet.time_in.in_layer"];
  const own = { ...flat("lora_unet_double_blocks_0_img_attn_qkv"), ...flat("lora_unet_time_in_in_layer") };
  t.same(
    [...(await kohya(own, { names })).modules.keys()],
    ["unet.double_blocks.0.img_attn.qkv", "unet.time_in.in_layer"],
  );
  await t.rejects(kohya(own), {
    message: /lora_unet_double_blocks_0_img_attn_qkv.*the module is not known.*`base`/s,
    constructor: AdapterError,
  });
  await t.rejects(kohya(flat("lora_unet_a_b"), { names: ["a.b.weight", "a_b.weight"] }), {
    message: /a_b can be a\.b and a_b of the base/,
  });
});

t.test("words read every module of a real UNet back from its flattened name", async (t) => {
  const modules: string[] = JSON.parse(readFileSync(join(goldens, "kohya", "modules.json"), "utf8"));
  const adapted = modules.filter((name) => !/norm/.test(name));
  t.ok(adapted.length > 60);
  for (const name of adapted) t.equal(unflatten(name.replaceAll(".", "_")), name);
  const original: object = JSON.parse(readFileSync(join(goldens, "sdxl-names.json"), "utf8"));
  for (const [name, module] of Object.entries(original)) t.equal(`unet.${unflatten(name)}`, module, "SDXL's own");
});

t.test("what a kohya file cannot hold is refused by name", async (t) => {
  const one = flat("lora_unet_conv_in");
  const refused: [Spec, RegExp][] = [
    [{ ...one, "lora_unet_conv_out.hada_w1_a": [A] }, /hada_w1_a is of LyCORIS \(LoHa or LoKr\).*Train a plain LoRA/],
    [{ ...one, "lora_unet_conv_out.lokr_w1": [A] }, /lokr_w1 is of LyCORIS/],
    [{ ...one, "lora_unet_conv_out.diff": [A] }, /is the difference of a whole parameter/],
    [
      { ...one, "lora_unet_conv_in.dora_scale": [[1, 3]] },
      /dora_scale is \[1, 3\], expected one magnitude for each of 4 outputs/,
    ],
    [
      { ...one, "lora_unet_conv_in.lora_mid.weight": [[2, 2, 3, 3]] },
      /lora_mid.* is \[2, 2, 3, 3\], but .*lora_down.* is \[2, 3\]/,
    ],
    [{ ...one, "lora_unet_conv_in.alpha": [[2]] }, /alpha is \[2\], expected one number/],
    [{ "lora_unet_conv_in.lora_up.weight": [B] }, /no factor A/],
    [{ ...one, "lora_unet_conv_in.bias": [[4]] }, /conv_in\.bias/],
  ];
  for (const [spec, message] of refused) await t.rejects(kohya(spec), { message, constructor: AdapterError });
  await t.rejects(readOne(join(goldens, "locon-dora-inputs", "adapter.safetensors")), {
    message: /norms over inputs cannot be held/,
  });
});

t.test("GGUF: heads come from the base, by any of its files", async (t) => {
  const adapter = join(goldens, "gguf", "adapter-f32.gguf");
  await t.rejects(readOne(adapter), { message: /blk\.0\.attn_k.*orders the rows of llama by heads.*`base`/s });
  const folder = t.testdir({
    model: { "config.json": JSON.stringify(HEADS) },
    "few.json": '{"num_attention_heads": 3}',
  });
  cpSync(join(goldens, "gguf", "base.safetensors"), join(folder, "model", "model.safetensors"));
  const model = join(folder, "model");
  for (const path of [model, join(model, "config.json"), join(model, "model.safetensors")]) {
    t.match(await describeBase(path), { heads: 4, kvHeads: 2 }, path);
    await (await readOne(adapter, path)).close();
  }
  t.ok([...(await describeBase(model)).names!].includes("model.layers.0.self_attn.q_proj.weight"));
  await t.rejects(readOne(adapter, join(folder, "few.json")), { message: /rows do not make 3 heads/ });
  await t.rejects(readOne(adapter, join(folder, "none")), { message: /does not exist/ });
  writeFileSync(join(folder, "no.json"), "{}");
  await t.rejects(describeBase(join(folder, "no.json")), { message: /says nothing of a base model/ });
});

t.test("GGUF and onnx_adapter: any byte may be wrong", async (t) => {
  const files: [string, (bytes: Uint8Array) => Promise<unknown>][] = [
    ["gguf/adapter-q8_0.gguf", (bytes) => openGguf(sourceOf(bytes))],
    ["onnx-adapter/adapter.onnx_adapter", (bytes) => openOnnxAdapter(sourceOf(bytes))],
  ];
  let seed = 7;
  const random = (below: number): number => {
    seed = (seed * 1_103_515_245 + 12_345) & 0x7fffffff;
    return seed % below;
  };
  for (const [path, open] of files) {
    const whole = new Uint8Array(readFileSync(join(goldens, path)));
    let refused = 0;
    for (let i = 0; i < 1500; i++) {
      const bytes = whole.slice(0, i % 3 === 0 ? random(whole.length) : whole.length);
      const near = Math.min(bytes.length, i % 2 === 0 ? 2048 : bytes.length);
      for (let n = 0; n < 1 + (i % 3); n++)
        if (near > 0) bytes[random(near)] = [0, 0xff, 0x7f, random(256)][random(4)]!;
      await open(bytes).catch((error: Error) => {
        if (!(error instanceof FormatError)) t.fail(`${path}, mutant ${i}: ${error.stack}`);
        refused++;
      });
    }
    t.ok(refused > 300, `${path}: ${refused} of 1500 refused`);
  }
});

t.test("a pipeline of PEFT's folders is one adapter", async (t) => {
  const folder = t.testdir();
  for (const model of ["unet", "text_encoder"])
    cpSync(data("goldens/peft/plain/adapter"), join(folder, "styles", "ink", model), { recursive: true });
  writeFileSync(join(folder, "styles", "ink", "task.json"), '{"note": "black"}');
  const adapter = await readOne(join(folder, "styles"));
  t.equal(adapter.id, "ink");
  t.same(
    [...adapter.modules.keys()].map((name) => name.split(".")[0]),
    [...Array(4).fill("text_encoder"), ...Array(4).fill("unet")],
  );
  t.match(adapter.metadata, { note: "black" });
  const [first] = adapter.modules.values();
  t.ok((await first!.read()).A.length > 0);
  await adapter.close();
});
