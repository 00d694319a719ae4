/**
 * LoRA files of diffusers: every golden case, names of three generations, alphas and configurations, refusals, files in
 * folders, and the command line. Golden cases go through a pack and a runtime too. The goldens come from diffusers' own
 * loading and PEFT's merge.
 */
import { cpSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { basename, join } from "node:path";
import { AdapterError } from "eigenlora";
import { type Adapter, buildPack, readDiffusers } from "eigenlora/build";
import { findAdapters, readAdapters } from "eigenlora/node";
import t, { type Test } from "tap";
import { bytesOf, entries, readAll, type Spec } from "../support/adapters.ts";
import { checkGolden } from "../support/compare.ts";
import { concat, data, LOSSLESS } from "../support/packs.ts";

const goldens = data("goldens/formats");
const golden = (name: string): string => join(goldens, name, "adapter.safetensors");
const NAME = "pytorch_lora_weights.safetensors";

async function readFile(path: string): Promise<Adapter> {
  const [adapter, ...others] = await readAdapters([path]);
  t.same(others, []);
  return adapter!;
}

const cases = readdirSync(goldens)
  .filter((name) => name.startsWith("diffusers"))
  .sort();
t.ok(cases.length >= 9, "the goldens are there");

for (const name of cases) {
  t.test(`golden ${name}`, async (t) => {
    const { changed } = JSON.parse(readFileSync(join(goldens, name, "case.json"), "utf8"));
    const adapter = await readFile(golden(name));
    t.same([adapter.id, adapter.warnings], ["adapter", []]);
    t.equal(adapter.byteLength, statSync(golden(name)).size);
    t.same([...adapter.modules.keys()], [...adapter.modules.keys()].sort(), "modules are sorted");
    const host = join(goldens, name, "base.safetensors");
    const pack = concat((await buildPack([adapter], { ...LOSSLESS, base: host })).chunks);
    await adapter.close();
    await checkGolden(t, { name, folder: join(goldens, name), pack, task: "adapter", changed }, { backend: "js" });
  });
}

const A = [2, 3];
const B = [4, 2];

async function read(spec: Spec, metadata: Record<string, unknown> = {}, task?: unknown): Promise<Adapter> {
  const header = Object.entries(metadata).map(([name, value]): [string, string] => [
    name,
    typeof value === "string" ? value : JSON.stringify(value),
  ]);
  return readDiffusers({ id: "one", file: "folder/one", tensors: await bytesOf(entries(spec), new Map(header)), task });
}

/** Factors of one module under a pair of names, B beginning with 2. */
const pair = (a: string, b: string): Spec => ({ [a]: [A, 1], [b]: [B, 2] });
const peft = (module: string): Spec => pair(`${module}.lora_A.weight`, `${module}.lora_B.weight`);
const BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn1";
const CLIP = "text_model.encoder.layers.3.self_attn";

t.test("names", async (t) => {
  const [LORA, DOWN] = [
    ["lora_A", "lora_B"],
    ["down", "up"],
  ] as const;
  const TEXT = "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q";
  const named: [stem: string, sides: readonly [string, string], module: string][] = [
    [`${BLOCK}.processor.to_q_lora`, DOWN, `unet.${BLOCK}.to_q`],
    [`unet.${BLOCK}.processor.to_out_lora`, DOWN, `unet.${BLOCK}.to_out.0`],
    [`unet.${BLOCK}.to_out.0.lora`, DOWN, `unet.${BLOCK}.to_out.0`],
    [`unet.${BLOCK}.to_k`, LORA, `unet.${BLOCK}.to_k`],
    [`unet.${BLOCK}.to_k`, ["lora_A.default", "lora_B.default"], `unet.${BLOCK}.to_k`],
    ["unet.base_model.model.mid_block.x", LORA, "unet.mid_block.x"],
    [`text_encoder.${CLIP}.to_out_lora`, DOWN, `text_encoder.${CLIP}.out_proj`],
    [`text_encoder_2.${CLIP}.q_proj.lora_linear_layer`, DOWN, `text_encoder_2.${CLIP}.q_proj`],
    ["text_encoder.encoder.layers.3.mlp.fc1", LORA, "text_encoder.text_model.encoder.layers.3.mlp.fc1"],
    [TEXT, LORA, TEXT],
    ["text_encoder_2.text_projection.lora", DOWN, "text_encoder_2.text_projection"],
    ["transformer_blocks.0.attn.to_q", LORA, "transformer.transformer_blocks.0.attn.to_q"],
    ["transformer.x_embedder", LORA, "transformer.x_embedder"],
  ];
  for (const [stem, sides, module] of named) {
    const [a, b] = sides.map((side) => `${stem}.${side}`);
    const adapter = await read(pair(`${a}.weight`, `${b}.weight`));
    t.same([...adapter.modules.keys()], [module]);
    const { A, Bt } = await adapter.modules.get(module)!.read();
    t.same([...A], [1, 2, 3, 4, 5, 6], a);
    t.same([...Bt], [2, 4, 6, 8, 3, 5, 7, 9], b);
  }
});

const scaleOf = async (spec: Spec, metadata = {}, module = "unet.x"): Promise<number> =>
  (await (await read(spec, metadata)).modules.get(module)!.read()).Bt[0]! / 2;

t.test("lora_adapter_metadata: a LoraConfig for each model", async (t) => {
  const config = (fields: object): Record<string, unknown> => ({ lora_adapter_metadata: fields });
  const both = { ...peft("unet.x"), ...peft("text_encoder.x") };
  const fields = { "unet.r": 2, "unet.lora_alpha": 8, "text_encoder.r": 2, "text_encoder.lora_alpha": 3 };
  t.equal(await scaleOf(both, config(fields)), 4);
  t.equal(await scaleOf(both, config(fields), "text_encoder.x"), 1.5);
  t.equal(await scaleOf(both, config({ ...fields, "unet.use_rslora": true })), Math.fround(8 / Math.SQRT2));
  t.equal(
    await scaleOf(both, config({ ...fields, "unet.alpha_pattern": { "^x": 6 } })),
    3,
    "patterns see names within the model",
  );
  t.equal(await scaleOf(both, config({ ...fields, "unet.alpha_pattern": { "unet.x": 6 } })), 4);
  const bare = peft("mid_block.x");
  t.equal(await scaleOf(bare, config({ r: 2, lora_alpha: 8 }), "unet.mid_block.x"), 4, "no model in names and fields");
  t.equal(await scaleOf(both, { lora_adapter_metadata: "" }), 1, "empty, as if it was not there");

  const named = config({
    ...fields,
    "unet.base_model_name_or_path": "base",
    "unet.revision": "v2",
  });
  const adapter = await read(both, named, { licence: "MIT" });
  t.equal(adapter.baseModel, "base");
  t.same(adapter.metadata, { licence: "MIT", revision: "v2" });
  await refuses(t, /of unet: use_novelty is true/, both, config({ "unet.use_novelty": true }));
});

async function refuses(t: Test, message: RegExp, spec: Spec, metadata: Record<string, unknown> = {}): Promise<void> {
  const error = await read(spec, metadata)
    .then(readAll)
    .catch((e: unknown) => e);
  t.ok(error instanceof AdapterError, String(error));
  t.match((error as Error).message, message);
}

t.test("what is refused, by name and with what to do", async (t) => {
  const x = peft("unet.x");
  const tensor = (name: string, shape = [2]): Spec => ({ ...x, [name]: [shape] });
  const kohya = "lora_unet_mid_block_attentions_0_proj_in";
  await refuses(
    t,
    /tensor lora_unet_.* a name of kohya's.*readKohya/,
    pair(`${kohya}.lora_down.weight`, `${kohya}.lora_up.weight`),
  );
  await refuses(t, /tensor lora_te1_x.alpha is a name of kohya's/, { "lora_te1_x.alpha": [[]] });
  await refuses(t, /hada_w1_a is of LyCORIS.*Train a plain/, { [`${kohya}.alpha`]: [[]], [`${kohya}.hada_w1_a`]: [A] });
  await refuses(t, /lokr_w2 is of LyCORIS/, tensor("unet.x.lokr_w2"));
  await refuses(t, /lora_mid.weight is a name of kohya's/, tensor(`${kohya}.lora_mid.weight`));
  await refuses(t, /unet.x.dora_scale is a DoRA scale/, tensor("unet.x.dora_scale"));
  await refuses(t, /unet.x.diff is the difference of a whole parameter/, tensor("unet.x.diff"));
  await refuses(t, /Custom Diffusion/, tensor("unet.a.processor.to_k_custom_diffusion.weight"));
  await refuses(t, /add_k_proj_lora.*Leave it out/, tensor("unet.a.processor.add_k_proj_lora.down.weight"));
  await refuses(t, /the model's original code.*save_lora_weights/, peft("diffusion_model.blocks.0.q"));
  await refuses(t, /of PEFT. Put adapter_config.json/, peft("base_model.model.q"));
  await refuses(t, /vae.x.lora_A.weight.*expected names that begin with one of unet, /, peft("vae.x"));
  await refuses(t, /^[^:]*: x.lora_A.weight, x.lora_B.weight: expected/, peft("x"));
  await refuses(t, /down_blocks.0.x.lora_A.weight.*expected names/, { ...x, ...peft("down_blocks.0.x") });
  await refuses(t, /unet.x.weight: not a part of a LoRA.*Remove/, tensor("unet.x.weight"));
  await refuses(t, /unet.x.base_layer.weight: not a part/, tensor("unet.x.base_layer.weight"));
  await refuses(t, /unet.x.lora_B.weight is I64, expected F32/, { ...x, "unet.x.lora_B.weight": [B, 1, "I64"] });
  await refuses(t, /holds no tensors/, {});
  await refuses(t, /has unet.x.lora_A.weight but no factor B/, { "unet.x.lora_A.weight": [A] });
  await refuses(t, /are the same one of two adapters/, {
    ...x,
    ...pair("unet.x.lora.down.weight", "unet.x.lora.up.weight"),
  });
  await refuses(t, /ranks 2 and 3 differ/, { ...x, "unet.x.lora_B.weight": [[4, 3]] });
  await refuses(t, /element 0 is NaN/, { ...x, "unet.x.lora_A.weight": [A, Number.NaN] });
  await refuses(t, /1024 bytes at most/, peft(`unet.${"x".repeat(1010)}`));

  await refuses(t, /unet.x.alpha is \[2\], expected one number/, tensor("unet.x.alpha"));
  await refuses(t, /unet.x.alpha is NaN/, { ...x, "unet.x.alpha": [[], Number.NaN] });
  await refuses(t, /unet.y.alpha is the alpha of unet.y, which has no factors/, tensor("unet.y.alpha", []));
  await refuses(t, /are the same one/, { ...x, "unet.x.alpha": [[]], "unet.x.lora.alpha": [[]] });

  await refuses(t, /module unet.x has no lora_magnitude_vector, but there is unet.y/, {
    ...x,
    ...peft("unet.y"),
    "unet.y.lora_magnitude_vector": [[4]],
  });
  await refuses(t, /lora_magnitude_vector is \[3\], expected \[4\]/, tensor("unet.x.lora_magnitude_vector", [3]));
});

t.test("what is refused of a header", async (t) => {
  const x = peft("unet.x");
  const config = (fields: unknown): Record<string, unknown> => ({ lora_adapter_metadata: fields });
  await refuses(t, /lora_adapter_metadata is not valid JSON.*save the adapter again/, x, config("{"));
  await refuses(t, /lora_adapter_metadata is not a JSON object/, x, config("[]"));
  await refuses(t, /lora_adapter_metadata of unet: peft_type is "LOKR"/, x, config({ "unet.peft_type": "LOKR" }));
  await refuses(t, /r and rank_pattern give rank 4, but unet.x.lora_A.weight has 2/, x, config({ "unet.r": 4 }));
  await refuses(t, /give rank 8/, x, config({ "text_encoder.r": 2 }));
  await refuses(
    t,
    /of unet: alora_invocation_tokens is set/,
    x,
    config({ "unet.r": 2, "unet.alora_invocation_tokens": [1] }),
  );
  await refuses(
    t,
    /trainable_token_indices is set, but there are no rows/,
    x,
    config({ "unet.trainable_token_indices": [1] }),
  );
  const olora = config({ "unet.r": 2, "unet.init_lora_weights": "olora" });
  await refuses(t, /init_lora_weights is "olora".*out of the base.*Convert it in PEFT/, x, olora);
  await refuses(t, /use_dora is true, but the file has no/, x, config({ "unet.r": 2, "unet.use_dora": true }));
  await refuses(
    t,
    /lora_adapter_metadata in its header: which is meant/,
    { ...x, "unet.x.alpha": [[]] },
    config({ "unet.r": 2 }),
  );
  await refuses(t, /the header has network_alphas/, x, { network_alphas: "{}" });
});

t.test("folders and files", async (t) => {
  const root = t.testdir({
    "all/notes": {},
    "all/README.md": "",
    two: {},
    pickled: {},
    damaged: { "x.safetensors": "{}" },
  });
  const at = (path: string): string => join(root, path);
  const put = (path: string, from = golden("diffusers-old-text")): void => {
    mkdirSync(join(at(path), ".."), { recursive: true });
    cpSync(from, at(path));
  };
  put(`all/ghibli/${NAME}`);
  put(`all/ghibli/checkpoint-500/${NAME}`);
  put(`all/runs/seed-1/${NAME}`);
  put("all/loose.safetensors");
  put("all/styles/ink.safetensors");
  put("all/styles/oil.safetensors");
  put("all/styles/model.safetensors", join(goldens, "diffusers-old-text/base.safetensors"));
  cpSync(data("goldens/peft/plain/adapter"), at("all/plain"), { recursive: true });
  writeFileSync(at("all/ghibli/task.json"), '{"license": "MIT"}');

  const found = async (...paths: string[]): Promise<string[]> =>
    (await findAdapters(paths.map(at))).map(({ id, path, format }) => `${id} ${format} ${path.slice(root.length + 1)}`);
  t.same(await found("all"), [
    "ghibli diffusers all/ghibli",
    "ink diffusers all/styles/ink.safetensors",
    "loose diffusers all/loose.safetensors",
    "oil diffusers all/styles/oil.safetensors",
    "plain peft all/plain",
    "seed-1 diffusers all/runs/seed-1",
  ]);
  t.same(await found(`all/ghibli/${NAME}`, "all/ghibli"), ["ghibli diffusers all/ghibli"]);
  t.same(await found("all/styles/ink.safetensors"), ["ink diffusers all/styles/ink.safetensors"]);

  const rename = new Map([
    ["ghibli", "soft"],
    [at("all/styles/ink.safetensors"), "hard"],
    [at(`all/runs/seed-1/${NAME}`), "first"],
  ]);
  const adapters = await readAdapters([at("all")], { rename });
  t.same(
    adapters.map(({ id, file, metadata }) => [id, basename(file), metadata]),
    [
      ["first", "seed-1", {}],
      ["hard", "ink.safetensors", {}],
      ["loose", "loose.safetensors", {}],
      ["oil", "oil.safetensors", {}],
      ["plain", "plain", {}],
      ["soft", "ghibli", { license: "MIT" }],
    ],
  );
  for (const adapter of adapters) await adapter.close();

  put(`two/${NAME}`);
  cpSync(data("goldens/peft/plain/adapter"), at("two"), { recursive: true });
  await t.rejects(findAdapters([at("two")]), { tag: "adapter", message: /which adapter is meant\? Give the path/ });
  t.same(await found(`two/${NAME}`, "two/adapter_model.safetensors"), ["two peft two", "two diffusers two"]);
  writeFileSync(at("pickled/pytorch_lora_weights.bin"), "");
  await t.rejects(findAdapters([at("pickled")]), { tag: "adapter", message: /pickle.*weights_only=True/ });
  await t.rejects(findAdapters([at("damaged")]), {
    tag: "format",
    message: /this is JSON, expected a safetensors file/,
  });
  await t.rejects(readAdapters([at("all/styles/model.safetensors")]), {
    tag: "adapter",
    message: /holds no LoRA, but \d+ tensors such as text_encoder.*A whole model is no adapter/,
  });
});
