/**
 * PEFT adapters: every golden case, fields and names that PEFT's format allows, folders on disk, and export. PEFT
 * itself judges exported adapters, where Python has it; runtime.test.ts compares the goldens with PEFT's own merge.
 */
import { execFileSync } from "node:child_process";
import { cpSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { AdapterError, FormatError, openPack, readTensor } from "eigenlora";
import { type Adapter, buildPack, type Exportable, peftFiles, readPeft } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import t, { type Test } from "tap";
import { bytesOf, entries, readAll, type Spec } from "../support/adapters.ts";
import { fromRoot } from "../support/folder.ts";
import { openSource } from "../support/internals/base.ts";
import { concat, LOSSLESS } from "../support/packs.ts";
import { python, skip } from "../support/required.ts";

const data = fromRoot("test/data");
const goldens = join(data, "goldens/peft");

/** Reads everything under a path. @returns the error */
async function failureOf(paths: string[]): Promise<unknown> {
  let adapters: Adapter[] = [];
  try {
    adapters = await readAdapters(paths);
    for (const adapter of adapters) await readAll(adapter);
    return undefined;
  } catch (error) {
    return error;
  } finally {
    for (const adapter of adapters) await adapter.close();
  }
}

/** Names that the message must contain, for refused cases. */
const NAMED: ReadonlyMap<string, string> = new Map([
  ["refuse-other-type", "peft_type"],
  ["refuse-parameters", "target_parameters"],
  ["refuse-replication", "layer_replication"],
  ["refuse-alora", "alora_invocation_tokens"],
  ["refuse-qalora", "use_qalora"],
  ["refuse-bdlora", "use_bdlora"],
  ["refuse-arrow", "arrow_config"],
  ["refuse-kasa", "kasa_config"],
  ["refuse-velora", "velora_config"],
  ["refuse-monteclora", "monteclora_config"],
  ["refuse-bin", "safe_serialization=True"],
  ["refuse-nan", "layer.0.attention.self.query.lora_B.weight [48, 4]: element 3"],
  ["refuse-truncated", "adapter_model.safetensors, tensors: end at byte 7248, but the file has 7148; truncated"],
  ["refuse-pissa", "init_lora_weights"],
]);

const cases = readdirSync(goldens).sort();
t.ok(cases.length >= 36, "the goldens are there");

for (const name of cases) {
  t.test(`golden ${name}`, async (t) => {
    const folder = join(goldens, name);
    const { expect } = JSON.parse(readFileSync(join(folder, "case.json"), "utf8"));
    if (expect === "refuse") {
      const error = await failureOf([join(folder, "adapter")]);
      t.ok(error instanceof AdapterError || error instanceof FormatError, "an AdapterError or FormatError");
      const { message } = error as Error;
      t.ok(message.includes(NAMED.get(name) ?? "no expectation written"), message);
      t.match(message, /train|convert|merge|pack the|download|checkpoint/i, "says what to do");
      if (error instanceof AdapterError && error.field !== undefined) t.ok(message.includes(error.field));
      return;
    }
    const [adapter, ...others] = await readAdapters([join(folder, "adapter")]);
    t.same(others, []);
    t.equal(adapter!.id, name === "sub-folder" ? "style" : "adapter");
    t.equal(adapter!.baseModel, "tiny-random");
    t.same(adapter!.warnings, []);
    t.same([...adapter!.modules.keys()], [...adapter!.modules.keys()].sort(), "modules are sorted");
    await adapter!.close();
  });
}

for (const [suite, count] of [
  ["own-seed", 20],
  ["shared-seed", 20],
  ["hub", 53],
] as const) {
  t.test(`real adapters: ${suite}`, async (t) => {
    const adapters = await readAdapters([join(data, "adapters", suite)]);
    t.equal(adapters.length, count);
    t.same(
      adapters.map(({ id }) => id),
      readdirSync(join(data, "adapters", suite)).sort(),
    );
    for (const adapter of adapters) {
      const labels = adapter.metadata.labels ?? [];
      const shapes = new Set([...adapter.modules.values()].map((m) => [m.out, m.in, m.rank, m.layout].join()));
      const saved = adapter.saved.map((tensor) => [tensor.name, tensor.role, tensor.shape.join()].join(" "));
      const size = readFileSync(join(adapter.file, "adapter_model.safetensors")).length;
      const seen = {
        warnings: adapter.warnings,
        modules: adapter.modules.size,
        shapes: [...shapes],
        saved,
        base: adapter.baseModel,
        type: adapter.metadata.task_type,
        size: adapter.byteLength,
      };
      t.same(
        seen,
        {
          warnings: [],
          modules: 12,
          shapes: ["384,384,8,out-in"],
          saved: [`classifier.bias saved ${labels.length}`, `classifier.weight saved ${labels.length},384`],
          base: "sentence-transformers/all-MiniLM-L6-v2",
          type: "SEQ_CLS",
          size,
        },
        adapter.id,
      );
      await readAll(adapter);
      await adapter.close();
    }
  });
}

/** A small adapter to bend: two linear modules of rank 2, alpha 4. */
const PLAIN: Spec = {
  "base_model.model.enc.q.lora_A.weight": [[2, 3], 1],
  "base_model.model.enc.q.lora_B.weight": [[4, 2], 2],
  "base_model.model.enc.v.lora_A.weight": [[2, 3], 3],
  "base_model.model.enc.v.lora_B.weight": [[4, 2], 4],
};
const CONFIG = { peft_type: "LORA", r: 2, lora_alpha: 4 };

async function read(config: unknown, spec: Spec = PLAIN, task?: unknown): Promise<Adapter> {
  const source = await openSource(await bytesOf(entries(spec)));
  return readPeft({ id: "one", file: "folder/one", config, tensors: { ...source, name: "one.safetensors" }, task });
}

async function refuses(t: Test, message: RegExp, config: object, spec: Spec = PLAIN): Promise<void> {
  const error = await read({ ...CONFIG, ...config }, spec).catch((e: unknown) => e);
  t.ok(error instanceof AdapterError, String(error));
  t.match((error as Error).message, message);
}

const prefixed = (spec: Spec): Spec =>
  Object.fromEntries(Object.entries(spec).map(([name, tensor]) => [`base_model.model.${name}`, tensor]));

/** Scales of one module's factors with values 1, 2, … for A and B, by the definition. */
async function scaleOf(adapter: Adapter, name: string, firstB: number): Promise<number> {
  return (await adapter.modules.get(name)!.read()).Bt[0]! / firstB;
}

t.test("scales", async (t) => {
  t.equal(await scaleOf(await read({ peft_type: "LORA", r: 2 }), "enc.q", 2), 4, "lora_alpha is 8 unless given");
  t.equal(await scaleOf(await read({ ...CONFIG, use_rslora: true }), "enc.q", 2), Math.fround(8 / Math.SQRT2) / 2);
  t.equal(await scaleOf(await read({ ...CONFIG, lora_alpha: 0.5 }), "enc.q", 2), 0.25);
  t.equal(await scaleOf(await read({ ...CONFIG, lora_alpha: 0 }), "enc.q", 2), 0);
  const eight = await read(
    { peft_type: "LORA", lora_alpha: 4 },
    {
      "q.lora_A.weight": [[8, 3]],
      "q.lora_B.weight": [[4, 8], 2],
    },
  );
  t.equal(await scaleOf(eight, "q", 2), 0.5, "r is 8 unless given");
});

t.test("patterns match from the start, at a dot, to the end; the first one counts", async (t) => {
  const scales = async (alpha_pattern: object, config: object = {}): Promise<number[]> => {
    const adapter = await read({ ...CONFIG, ...config, alpha_pattern });
    return [await scaleOf(adapter, "enc.q", 2), await scaleOf(adapter, "enc.v", 4)];
  };
  t.same(await scales({ q: 6 }), [3, 2]);
  t.same(await scales({ "enc.q": 6 }), [3, 2]);
  t.same(await scales({ "nc.q": 6 }), [2, 2], "only at a dot");
  t.same(await scales({ enc: 6 }), [2, 2], "only to the end");
  t.same(await scales({ "^enc\\.v": 6 }), [2, 3]);
  t.same(await scales({ "^q": 6 }), [2, 2], "an anchor leaves nothing in front");
  t.same(await scales({ "[qv]": 6, q: 10 }), [3, 3], "the first match");
  t.same(await scales({ "enc\\.\\w": 6 }), [3, 3]);
  t.same(await scales({ "q|v": 6 }), [3, 3]);
  t.same(await scales({ q: 6 }, { r: 7, rank_pattern: { "q|v": 2 } }), [3, 2]);
  for (const pattern of ["(?P<x>q)", "\\Aq", "q\\Z", "(?i)q", "(", "*"]) {
    await refuses(t, /alpha_pattern "[^"]*" (has|is no) .*; write the modules' names instead/, {
      alpha_pattern: { [pattern]: 6 },
    });
  }
  const long = `${"x".repeat(900)}z`;
  const named = { [`${long}.lora_A.weight`]: [[2, 3]], [`${long}.lora_B.weight`]: [[4, 2]] } satisfies Spec;
  const adapter = await read({ ...CONFIG, rank_pattern: { "x+x+y": 3, "x+x+z": 2 } }, named);
  t.equal(adapter.modules.get(long)!.rank, 2, "in time that grows with the name alone");
  await refuses(t, /rank_pattern gives 2.5 for "q", expected a positive integer/, { rank_pattern: { q: 2.5 } });
  await refuses(t, /alpha_pattern gives null/, { alpha_pattern: { q: null } });
  await refuses(t, /rank_pattern is \["q"\]/, { rank_pattern: ["q"] });
});

t.test("fields of the wrong type are named", async (t) => {
  const wrong: [string, unknown][] = [
    ["r", 0],
    ["r", "2"],
    ["r", 1.5],
    ["lora_alpha", "4"],
    ["use_rslora", "yes"],
    ["fan_in_fan_out", 1],
    ["use_dora", "true"],
    ["lora_bias", 1],
    ["bias", "some"],
    ["modules_to_save", "classifier"],
    ["modules_to_save", [""]],
    ["task_type", 3],
    ["base_model_name_or_path", {}],
    ["revision", 1],
    ["trainable_token_indices", "all"],
    ["trainable_token_indices", [-1]],
    ["trainable_token_indices", [1, 1]],
    ["trainable_token_indices", { emb: 3 }],
    ["ensure_weight_tying", "yes"],
  ];
  for (const [field, value] of wrong) {
    await refuses(t, new RegExp(`adapter_config.json: ${field} `), { [field]: value });
  }
  for (const config of [null, [], "{}", 3]) {
    await t.rejects(read(config), { tag: "adapter", message: /folder.one.adapter_config.json: is not a JSON object/ });
  }
  for (const config of [{}, { peft_type: null }, { peft_type: "lora" }, { peft_type: "ADALORA" }]) {
    const expected = { tag: "adapter", field: "peft_type", message: /expected "LORA"; convert/ };
    await t.rejects(read({ r: 2, ...config }), expected);
  }
});

t.test("initialisations that changed the base", async (t) => {
  for (const init of ["pissa", "olora", "OLoRA"])
    await refuses(t, /init_lora_weights is "(pissa|olora)".*`base`.*weight_conversion/, {
      init_lora_weights: init,
    });
  for (const init of ["pissa_niter_16", "corda", "lora_ga"]) {
    const message = new RegExp(
      `init_lora_weights is "${init}".*changed base.*path_initial_model_for_weight_conversion`,
    );
    await refuses(t, message, { init_lora_weights: init });
  }
  await refuses(t, /init_lora_weights is "loftq".*quantised base.*save_pretrained/, { init_lora_weights: "loftq" });
  await refuses(t, /adapter_config.*init_lora_weights is "brandnew", which PEFT.*set it to true/, {
    init_lora_weights: "brandnew",
  });
  await refuses(t, /use_newer is true, a field that PEFT 0.21 does not know: delete/, { use_newer: true });
  t.same((await read({ ...CONFIG, use_newer: null, merge_weights: true })).warnings, []);
  for (const init of [true, false, null, "gaussian", "eva", "orthogonal", "mica"]) {
    t.same((await read({ ...CONFIG, init_lora_weights: init })).warnings, []);
  }
  t.same((await read({ ...CONFIG, ensure_weight_tying: true })).warnings, [], "nothing is left to say");
});

t.test("names: prefix, adapter names, wrappers", async (t) => {
  const adapter = await read(
    { ...CONFIG, task_type: "SEQ_CLS", bias: "all" },
    {
      "enc.q.lora_A.style.weight": [[2, 3], 1],
      "base_model.model.enc.q.lora_B.style.weight": [[4, 2], 2],
      ...prefixed({
        "enc.q.base_layer.bias": [[4], 10],
        "enc.norm.bias": [[4], 20],
        "enc.relative_attention_bias.weight": [[2, 2], 30],
        "classifier.dense.weight": [[4, 4], 40],
        "classifier.dense.bias": [[4], 50],
        "classifier.modules_to_save.dense.bias": [[4], 60],
        "classifier.modules_to_save.out.bias": [[2], 70],
        "classifier.modules_to_save.out.weight": [[2, 4], 80],
        "classifier.original_module.dense.bias": [[4], 90],
      }),
    },
  );
  t.same([...adapter.modules.keys()], ["enc.q"]);
  const saved = await Promise.all(adapter.saved.map(async ({ name, role, read }) => [name, role, (await read())[0]]));
  t.same(saved, [
    ["classifier.dense.bias", "saved", 50],
    ["classifier.dense.weight", "saved", 40],
    ["classifier.out.bias", "saved", 70],
    ["classifier.out.weight", "saved", 80],
    ["enc.norm.bias", "bias", 20],
    ["enc.q.bias", "bias", 10],
    ["enc.relative_attention_bias.weight", "saved", 30],
  ]);
  t.same(adapter.warnings, []);
});

t.test("modules_to_save: whole modules by the end of their name, and the heads of old files", async (t) => {
  const spec = { ...PLAIN, ...prefixed({ "head.dense.weight": [[2, 2]], "head.out.bias": [[2]] }) };
  const names = async (config: object, more: Spec): Promise<string[]> =>
    (await read({ ...CONFIG, ...config }, { ...PLAIN, ...more })).saved.map(({ name }) => name);
  t.same(await names({ modules_to_save: ["head"] }, spec), ["head.dense.weight", "head.out.bias"]);
  t.same(await names({ modules_to_save: ["ead"] }, spec), ["head.dense.weight", "head.out.bias"], "as PEFT matches");
  await refuses(t, /accounts for .*head.dense.weight.*modules_to_save/, { modules_to_save: ["out"] }, spec);
  const score = prefixed({ "score.weight": [[2, 2]] });
  t.same(await names({ task_type: "TOKEN_CLS" }, score), ["score.weight"]);
  const outputs = prefixed({ "qa_outputs.weight": [[2, 2]] });
  t.same(await names({ task_type: "QUESTION_ANS" }, outputs), ["qa_outputs.weight"]);
  await refuses(t, /accounts for base_model.model.score.weight/, {}, { ...PLAIN, ...score });
  await refuses(
    t,
    /enc.q.weight replaces weights of enc.q, which is also adapted/,
    { modules_to_save: ["enc.q"] },
    { ...PLAIN, ...prefixed({ "enc.q.weight": [[4, 3]] }) },
  );
});

t.test("every tensor is accounted for", async (t) => {
  const leftovers = [
    "enc.q.bias",
    "enc.q.base_layer.weight.extra",
    "enc.x.base_layer.weight",
    "enc.x.base_layer.bias",
    "enc.q.lora_C.weight",
    "enc.q.lora_A.bias",
    "enc.q.lora_diag",
    "enc.x.lora_magnitude_vector",
    "enc.x.lora_B.bias",
    "enc.q.hada_w1_a",
    "enc.q.weight",
    "classifier.original_module.weight",
    "classifier.modules_to_save.weight",
    "emb.token_adapter.base_layer.lora_embedding_A",
    "lora_A.weight",
    "mlx.q.lora_a",
  ];
  for (const name of leftovers) {
    const spec = { ...PLAIN, ...prefixed({ [name]: [[2]] }) };
    await refuses(t, new RegExp(`accounts for base_model.model.${name}\\. List`), {}, spec);
  }
  const many = Object.fromEntries(Array.from({ length: 9 }, (_, i) => [`m${i}.weight`, [[1]] as Spec[string]]));
  await refuses(t, /m4.weight, and 4 more/, {}, { ...PLAIN, ...many });
  await refuses(t, /holds no lora_A and lora_B/, { bias: "all" }, { "enc.bias": [[2]] });
  await refuses(t, /holds no lora_A and lora_B/, {}, {});
  await refuses(t, /tensor extra.weight is I64, expected F32/, {}, { ...PLAIN, "extra.weight": [[1], 0, "I64"] });
});

t.test("factors that do not fit each other", async (t) => {
  const pair = (a: number[], b: number[]): Spec => ({ "q.lora_A.weight": [a], "q.lora_B.weight": [b] });
  const differ = /q.lora_A.weight is \[2, 3\] and q.lora_B.weight is \[4, 3\]: ranks 2 and 3 differ/;
  await refuses(t, differ, {}, pair([2, 3], [4, 3]));
  await refuses(t, /incomplete.*DeepSpeed/, {}, pair([0, 3], [4, 0]));
  await refuses(t, /incomplete.*DeepSpeed/, {}, pair([6], [8]));
  await refuses(t, /expected \[r, in\] and \[out, r\]/, {}, pair([2, 3, 3], [4, 2]));
  await refuses(t, /expected \[r, in\] and \[out, r\]/, {}, pair([2, 3, 3, 3], [4, 2, 3, 3]));
  await refuses(t, /expected \[r, in\] and \[out, r\]/, {}, pair([2, 3, 1, 1, 1, 1], [4, 2, 1, 1, 1, 1]));
  await refuses(t, /grouped convolution \(2 groups\)/, {}, pair([2, 6, 3, 3], [4, 1, 1, 1]));
  await refuses(t, /has q.lora_A.weight but no factor B/, {}, { ...PLAIN, "q.lora_A.weight": [[2, 3]] });
  await refuses(t, /has q.lora_embedding_B but no factor A/, {}, { ...PLAIN, "q.lora_embedding_B": [[2, 3]] });
  await refuses(t, /both lora_A or lora_B and lora_embedding/, {}, { ...PLAIN, "enc.q.lora_embedding_B": [[2, 3]] });
  await refuses(t, /expected \[r, in\]/, {}, { "e.lora_embedding_A": [[2, 3, 1]], "e.lora_embedding_B": [[4, 2, 1]] });
  for (const twin of ["enc.q.lora_A.weight", "base_model.model.enc.q.lora_A.other.weight"]) {
    await refuses(t, /are the same one of two adapters/, {}, { ...PLAIN, [twin]: [[2, 3]] });
  }
});

t.test("layouts and kernels", async (t) => {
  const adapter = await read(
    { ...CONFIG, fan_in_fan_out: true },
    {
      "lin.lora_A.weight": [[2, 3]],
      "lin.lora_B.weight": [[4, 2]],
      "one.lora_A.weight": [[2, 3, 5]],
      "one.lora_B.weight": [[4, 2, 1]],
      "three.lora_A.weight": [[2, 3, 1, 2, 3]],
      "three.lora_B.weight": [[4, 2, 1, 1, 1]],
      "emb.lora_embedding_A": [[2, 7]],
      "emb.lora_embedding_B.default": [[4, 2]],
    },
  );
  const shapes = [...adapter.modules.values()].map((m) => [m.name, m.layout, m.out, m.in, m.kernel?.join()]);
  t.same(shapes, [
    ["emb", "embedding", 4, 7, undefined],
    ["lin", "in-out", 4, 3, undefined],
    ["one", "conv", 4, 15, "5"],
    ["three", "conv", 4, 18, "1,2,3"],
  ]);
});

t.test("DoRA and lora_bias: switch and tensors agree", async (t) => {
  const one: Spec = { "q.lora_A.weight": [[2, 3]], "q.lora_B.weight": [[4, 2]] };
  const dora = { use_dora: true };
  const vector = "q.lora_magnitude_vector";
  for (const name of [vector, `${vector}.weight`, `${vector}.default.weight`]) {
    const adapter = await read({ ...CONFIG, ...dora }, { ...one, [name]: [[4], 5] });
    t.same([...(await adapter.modules.get("q")!.read()).magnitude!], [5, 6, 7, 8], name);
  }
  await refuses(t, /use_dora is true, but the file has no lora_magnitude_vector/, dora, one);
  await refuses(t, /use_dora is false, but the file has q.lora_magnitude_vector/, {}, { ...one, [vector]: [[4]] });
  await refuses(t, /q.lora_magnitude_vector is \[3\], expected \[4\]/, dora, { ...one, [vector]: [[3]] });
  await refuses(t, /is \[4, 4\], expected \[4\]/, dora, { ...one, [vector]: [[4, 4]] });

  const biased: Spec = { ...one, "q.lora_B.bias": [[4], 1] };
  const delta = (await read({ ...CONFIG, lora_bias: true }, biased)).saved;
  t.same(
    delta.map(({ name, role, shape }) => [name, role, shape]),
    [["q.bias", "bias-delta", [4]]],
  );
  t.same([...(await delta[0]!.read())], [2, 4, 6, 8], "times the scale");
  const twice = { ...CONFIG, lora_bias: true, bias: "lora_only" };
  const both = (await read(twice, { ...biased, "q.base_layer.bias": [[4], 100] })).saved;
  t.same(
    both.map(({ name, role, shape }) => [name, role, shape]),
    [["q.bias", "bias", [4]]],
  );
  t.same([...(await both[0]!.read())], [102, 105, 108, 111]);
  await refuses(t, /lora_bias is true, but the file has no lora_B.bias/, { lora_bias: true }, one);
  await refuses(t, /lora_bias is false, but the file has q.lora_B.bias/, {}, biased);
  await refuses(t, /q.lora_B.bias is \[3\], expected \[4\]/, { lora_bias: true }, { ...one, "q.lora_B.bias": [[3]] });
  const short: Spec = { ...one, "q.base_layer.bias": [[3]] };
  await refuses(t, /q.base_layer.bias is \[3\], expected \[4\]/, { bias: "all" }, short);
});

t.test("token rows", async (t) => {
  const spec: Spec = { ...PLAIN, "a.emb.token_adapter.trainable_tokens_delta": [[2, 3], 7] };
  for (const indices of [[5, 1], { emb: [5, 1] }, { "b.emb": [1], "a.emb": [5, 1], emb: [9] }]) {
    const { saved } = await read({ ...CONFIG, trainable_token_indices: indices }, spec);
    const found = saved.map(({ name, role, shape, indices }) => [name, role, shape, indices]);
    t.same(found, [["a.emb.weight", "rows", [2, 3], [5, 1]]]);
    t.same([...(await saved[0]!.read())], [7, 8, 9, 10, 11, 12]);
  }
  const unordered = await read({ ...CONFIG, trainable_token_indices: [5, 1] }, spec);
  const packed = await openPack(concat((await buildPack([unordered], LOSSLESS)).chunks));
  const [rows] = (await packed.load(unordered.id)).parameters;
  t.same(rows!.indices, [1, 5], "packs have them in order");
  t.same([...readTensor((await packed.load(unordered.id)).bytes, rows!.tensor)], [10, 11, 12, 7, 8, 9]);
  for (const indices of [null, [5], { other: [5, 1] }]) {
    const message = /\[2, 3\], but trainable_token_indices names (no|1) rows of a.emb/;
    await refuses(t, message, { trainable_token_indices: indices }, spec);
  }
  await refuses(t, /there is no trainable_tokens_delta/, { trainable_token_indices: [1] });
  const adapted = { ...PLAIN, "enc.q.token_adapter.trainable_tokens_delta": [[1, 3]] } as Spec;
  await refuses(t, /which is also adapted/, { trainable_token_indices: [1] }, adapted);
});

t.test("NaN and infinity, in any dtype, are named where they are read", async (t) => {
  const values = [
    ["F32", NaN],
    ["F16", Infinity],
    ["BF16", -Infinity],
    ["F64", NaN],
    ["F64", 1e300],
  ] as const;
  for (const [dtype, start] of values) {
    const bad = await read(
      { ...CONFIG, modules_to_save: ["head"] },
      {
        ...PLAIN,
        "base_model.model.enc.q.lora_A.weight": [[2, 3], start, dtype],
        "base_model.model.head.weight": [[2], start, dtype],
      },
    );
    await t.rejects(bad.modules.get("enc.q")!.read(), {
      tag: "adapter",
      file: "one.safetensors",
      field: "base_model.model.enc.q.lora_A.weight",
      message: /tensor base_model.model.enc.q.lora_A.weight \[2, 3\]: element 0 is (NaN|-?Infinity)/,
    });
    await t.rejects(bad.saved[0]!.read(), { tag: "adapter", message: /tensor base_model.model.head.weight/ });
    await bad.modules.get("enc.v")!.read();
  }
  const overflow = await read({ ...CONFIG, lora_alpha: 1e39 });
  await t.rejects(overflow.modules.get("enc.q")!.read(), { message: /element 0 times the scale 5e\+38 is Infinity/ });
});

/** A folder with the files of the plain golden. */
function makeAdapter(folder: string): string {
  mkdirSync(folder, { recursive: true });
  cpSync(join(goldens, "plain/adapter"), folder, { recursive: true });
  return folder;
}

t.test("folders: what is refused", async (t) => {
  const root = t.testdir({ empty: {}, "a.safetensors": "", "model.pt": "", "notes.txt": "" });
  const at = (path: string): string => join(root, path);
  const without = (name: string, file: string): void => rmSync(join(makeAdapter(at(name)), file));
  without("no-tensors", "adapter_model.safetensors");
  without("no-config", "adapter_config.json");
  writeFileSync(join(makeAdapter(at("bad-json")), "adapter_config.json"), '{"r": 4,}');
  writeFileSync(join(makeAdapter(at("bad-task")), "task.json"), "[1");
  makeAdapter(at("x/same"));
  makeAdapter(at("y/same"));
  makeAdapter(at(`ctrl/a\u0007b`));

  type Expected = { message: RegExp; [field: string]: unknown };
  const fails = async (paths: string[], expected: Expected, rename?: [string, string][]): Promise<void> => {
    await t.rejects(readAdapters(paths.map(at), { rename: new Map(rename) }), expected);
  };
  const adapter = (message: RegExp, file: string): Expected => ({ tag: "adapter", file: at(file), message });
  await fails(["missing"], adapter(/does not exist/, "missing"));
  await fails(["empty"], adapter(/holds no adapter; looked for adapter_config.json and/, "empty"));
  await fails(["a.safetensors"], { tag: "format", message: /a.safetensors, header: has 0 bytes/ });
  await fails(["notes.txt"], adapter(/expected adapter_model.safetensors with/, "notes.txt"));
  await fails(["model.pt"], adapter(/pickle.*save_pretrained/, "model.pt"));
  await fails(["no-tensors"], adapter(/no adapter_model.safetensors beside adapter_config.json/, "no-tensors"));
  await fails(["no-config"], adapter(/no adapter_config.json beside adapter_model.safetensors/, "no-config"));
  await fails(["no-config/adapter_model.safetensors"], adapter(/has no adapter_config.json/, "no-config"));
  await fails(["bad-json"], adapter(/is not valid JSON: .*position 8/, "bad-json/adapter_config.json"));
  await fails(["bad-task"], adapter(/is not valid JSON/, "bad-task/task.json"));
  const bad: [text: string, message: RegExp][] = [
    ['{"r": 4, "peft_type": "LORA", "r": 8}', /names "r" twice/],
    [`{"r": ${"[".repeat(10 ** 6)}${"]".repeat(10 ** 6)}}`, /is nested deeper than 64 levels/],
    [" ".repeat(2 ** 24 + 1), /has 16777217 bytes, 16777216 at most are read/],
  ];
  for (const [text, message] of bad) {
    writeFileSync(at("bad-json/adapter_config.json"), text);
    await fails(["bad-json"], adapter(message, "bad-json/adapter_config.json"));
  }

  const task = (message: RegExp, fields: object = {}): Expected => ({ tag: "task", message, ...fields });
  const [x, y] = [at("x/same"), at("y/same")];
  const both = new RegExp(`${x} and ${y} are both called same; give one a new id with \`rename\``);
  await fails(["x", "y"], task(both, { task: "same" }));
  await fails(["x", "y"], task(/rename same to other: means several; use a path/), [["same", "other"]]);
  await fails(["x"], task(/rename sane to other: no adapter has this id/, { nearest: ["same"] }), [["sane", "other"]]);
  await fails(["x"], task(/cannot be a task's id/), [["same", ""]]);
  await fails(["x"], task(/cannot be a task's id/), [["same", "é".repeat(128)]]);
  await fails(["ctrl"], task(/"a\\u0007b" cannot be a task's id/));
  const renamed = await readAdapters([at("x"), at("y")], { rename: new Map([[at("y/same"), "é".repeat(127)]]) });
  t.equal(renamed.length, 2);
  for (const adapter of renamed) await adapter.close();
});

/** Writes an adapter as PEFT's two files. */
async function exportTo(folder: string, adapter: Exportable): Promise<void> {
  const { config, tensors } = await peftFiles(adapter);
  mkdirSync(folder, { recursive: true });
  writeFileSync(join(folder, "adapter_config.json"), JSON.stringify(config, null, 2));
  writeFileSync(join(folder, "adapter_model.safetensors"), await bytesOf(tensors));
}

async function contents(adapter: Exportable): Promise<unknown> {
  const modules = [];
  for (const module of adapter.modules.values()) modules.push([{ ...module, read: null }, await module.read()]);
  const saved = [];
  for (const tensor of adapter.saved) saved.push([{ ...tensor, read: null }, await tensor.read()]);
  return { modules, saved, base: adapter.baseModel };
}

const loadable = cases.filter((name) => !name.startsWith("refuse-"));

t.test("export and read again: the same adapter, to the bit", async (t) => {
  const root = t.testdir();
  for (const name of loadable) {
    const [before] = await readAdapters([join(goldens, name, "adapter")]);
    await exportTo(join(root, name), before!);
    const [after] = await readAdapters([join(root, name)]);
    t.same(await contents(after!), await contents(before!), name);
    t.same(after!.metadata, before!.metadata, name);
    t.same(after!.warnings, [], name);
    await before!.close();
    await after!.close();
  }
});

t.test("PEFT loads what was exported and merges it to the golden weights", async (t) => {
  t.setTimeout(120_000);
  const root = t.testdir();
  for (const name of loadable) {
    const [adapter] = await readAdapters([join(goldens, name, "adapter")]);
    await exportTo(join(root, name), adapter!);
    await adapter!.close();
  }
  let output: string;
  try {
    const script = fromRoot("test/support/peft-oracle.py");
    output = execFileSync(python, [script, goldens, root], { encoding: "utf8", stdio: "pipe" });
  } catch (error) {
    const { status, stderr, message } = error as Error & { status: number | null; stderr?: string };
    const absent = status === 3 || (error as NodeJS.ErrnoException).code === "ENOENT";
    if (!absent) throw error;
    return skip(t, "peft", `${python} has no PEFT: ${stderr || message}`);
  }
  const differences = new Map<string, unknown>(Object.entries(JSON.parse(output)));
  t.same([...differences.keys()].sort(), loadable);
  for (const [name, found] of differences) t.ok(typeof found === "number" && found <= 1e-6, `${name}: ${found}`);
});
