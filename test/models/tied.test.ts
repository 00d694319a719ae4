/**
 * Rows of tokens on a base whose head is tied to its embedding, and starts that change the base, against PEFT's logits.
 */
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { createRuntime, type Pack, type RuntimeOptions, type Tensor } from "eigenlora";
import { readAdapters } from "eigenlora/node";
import { createEngine } from "eigenlora/onnxruntime";
import { createSessions } from "eigenlora/session";
import t, { type Test } from "tap";
import { json, run, words } from "../support/command-line.ts";
import { tensorsOf as read } from "../support/compare.ts";
import { workIn } from "../support/folder.ts";
import { findParameters, fromBinary, readModel, toBinary } from "../support/internals/models.ts";
import { data, LOSSLESS, packed } from "../support/packs.ts";
import { feedsIn, int64, MODES, type Mode, NODE, ORTS, open, type Session } from "../support/sessions.ts";

const at = (path: string): string => data(`goldens/tied/${path}`);

type Logits = Readonly<Record<string, readonly number[]>>;
const goldens = JSON.parse(await readFile(at("goldens.json"), "utf8")) as Record<"tied" | "untied" | "q4", Logits> & {
  readonly input_ids: readonly number[];
};
const IDS = goldens.input_ids;
const ROWS = ["rows", "rows-more", "rows-ensured", "rows-apart", "rows-head", "rows-lora-head"];
const EMBEDDINGS = ["lora-embedding", "lora-ensured"];
const SAVED = ["saved-embedding", "saved-ensured"];
const STARTS = ["pissa", "olora", "pissa-dora"];

async function packOf(t: Test, tasks: readonly string[], options: object = LOSSLESS): Promise<Pack> {
  const paths = tasks.map((task) => at(`adapters/${task}`));
  const adapters = await readAdapters(paths, { base: at("base.safetensors") });
  const pack = await packed(adapters, options);
  t.teardown(async () => {
    for (const one of [pack, ...adapters]) await one.close();
  });
  return pack;
}

/** Largest difference, as a share of the largest logit. */
function off(found: ArrayLike<number>, expected: readonly number[]): number {
  const largest = expected.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
  return expected.reduce((most, value, i) => Math.max(most, Math.abs(value - found[i]!)), 0) / largest;
}

function agrees(t: Test, found: ArrayLike<number>, expected: readonly number[] | undefined, what: string): void {
  t.equal(found.length, expected?.length, `${what}: as many logits`);
  t.ok(off(found, expected!) <= 1e-5, `${what}: off by ${off(found, expected!)}`);
}

async function logitsOf(session: Session, Tensor: typeof NODE.Tensor, tasks?: readonly (string | null)[]) {
  const rows = tasks?.length ?? 1;
  const feeds = { input_ids: int64({ Tensor }, Array(rows).fill(IDS)) };
  return (await session.run(feeds, tasks && { tasks }))["logits"]!.data as Float32Array;
}

t.test("sessions: every mode and exporter", async (t) => {
  for (const [name, pack, tasks, modes] of [
    ["unfolded", await packOf(t, [...ROWS, ...EMBEDDINGS, ...STARTS]), [...ROWS, ...EMBEDDINGS, ...STARTS], MODES],
    [
      "components",
      await packOf(t, ["rows", "rows-more"], { ...LOSSLESS, select: { kind: "k", k: 8 } }),
      ["rows"],
      MODES,
    ],
    ["saved", await packOf(t, SAVED), SAVED, ["folded"]],
  ] as [string, Pack, string[], Mode[]][]) {
    for (const mode of modes.filter((mode) => mode !== "core" || name === "components")) {
      for (const model of ["torchscript", "dynamo"]) {
        const session = await open(NODE, at(`${model}.onnx`), pack, { mode });
        for (const task of [...tasks, null]) {
          await session.switchTask(task);
          agrees(
            t,
            await logitsOf(session, NODE.Tensor),
            goldens.tied[task ?? ""],
            `${name}, ${mode}, ${model}, ${task}`,
          );
        }
        if (mode !== "folded" && model === "torchscript") {
          const mixed = [null, ...tasks];
          const found = await logitsOf(session, NODE.Tensor, mixed);
          for (const [i, task] of mixed.entries())
            agrees(
              t,
              found.subarray(i * 200, (i + 1) * 200),
              goldens.tied[task ?? ""],
              `${mode}, ${model}, row of ${task}`,
            );
        }
        await session.close();
      }
    }
  }
});

for (const { name, ort } of ORTS.slice(1)) {
  t.test(`sessions: ${name}`, async (t) => {
    const session = await open(ort, at("torchscript.onnx"), await packOf(t, ["rows", "rows-more"]), {
      mode: "factors",
    });
    await session.switchTask("rows");
    agrees(t, await logitsOf(session, ort.Tensor), goldens.tied["rows"], name);
    await session.close();
  });
}

t.test("sessions: a head in another form", async (t) => {
  const pack = await packOf(t, ["rows", "rows-more"]);
  for (const mode of ["core", "factors"] as const) {
    const shared = mode === "core" ? await packOf(t, ["rows"], { ...LOSSLESS, select: { kind: "k", k: 8 } }) : pack;
    const session = await open(NODE, at("q4.onnx"), shared, { mode });
    for (const task of ["rows", null]) {
      await session.switchTask(task);
      agrees(t, await logitsOf(session, NODE.Tensor), goldens.q4[task ?? ""], `a head in 4 bits, ${mode}, ${task}`);
    }
    await session.close();
  }
  await t.rejects(open(NODE, at("q4.onnx"), pack, { mode: "folded" }), {
    tag: "base",
    message:
      /"lm_head.weight", which is tied to "model.embed_tokens.weight", is quantised; use mode "core" or "factors"/,
  });
});

t.test("sessions: an embedding under another name, and two files of one model", async (t) => {
  const pack = await packOf(t, ["rows", "rows-more"]);
  const model = fromBinary("ModelProto", await readFile(at("torchscript.onnx")));
  for (const node of model.graph!.node) {
    if (!node.input.includes(TABLE)) continue;
    node.name = "/LookUp";
    node.input[node.input.indexOf(TABLE)] = "weight";
  }
  for (const tensor of model.graph!.initializer) if (tensor.name === TABLE) tensor.name = "weight";
  const renamed = toBinary("ModelProto", model);
  const names = new Map([["model.embed_tokens", "weight"]]);
  for (const mode of ["factors", "folded"] as const) {
    const session = await open(NODE, renamed, pack, { mode, names });
    await session.switchTask("rows");
    agrees(t, await logitsOf(session, NODE.Tensor), goldens.tied["rows"], `named by hand, ${mode}`);
    await session.close();
  }
  const engine = createEngine(NODE);
  const models = { whole: at("torchscript.onnx"), other: renamed };
  const message = /rows of "model.embed_tokens.weight", and ".*" of other, .*may be tied to it.*`names`.*ignore/;
  await t.rejects(createSessions(engine, models, pack, { mode: "factors" }), { tag: "base", message });
  const both = await createSessions(engine, models, pack, {
    mode: "factors",
    each: { other: { mode: "factors", names } },
  });
  await both.switchTask("rows");
  agrees(t, await logitsOf(both.sessions.other as Session, NODE.Tensor), goldens.tied["rows"], "mapped in its file");
  await both.close();
  const ignore = ["weight", "lm_head"];
  await (await createSessions(engine, models, pack, { each: { other: { ignore } } })).close();
});

// ---- own weights

const TABLE = "model.embed_tokens.weight";
const HEAD = "lm_head.weight";

const tensorsOf = async (path = at("base.safetensors")): Promise<Map<string, Tensor>> =>
  new Map([...(await read(path))].map(([name, tensor]) => [name, { dtype: "f32", ...tensor }]));

function turned({ shape: [rows = 0, columns = 0], data }: Tensor): Tensor {
  const values = Float32Array.from(data, (_, i) => data[(i % rows) * columns + Math.floor(i / rows)]!);
  return { dtype: "f32", shape: [columns, rows], data: values, layout: "in-out" };
}

/** The base's tensors, and those that a runtime has changed. */
async function changedBy(pack: Pack, task: string, options: RuntimeOptions & { base: Map<string, Tensor> }) {
  const runtime = await createRuntime(pack, { backend: "js", ...options });
  await runtime.switchTask(task);
  const tensors = new Map([...options.base].map(([name, one]) => [name, { ...one, data: one.data.slice() } as Tensor]));
  await runtime.switchTask(null);
  await runtime.close();
  return tensors;
}

/** Logits of the exported model with other weights. @param head [vocabulary, width] */
async function forward(tensors: ReadonlyMap<string, Tensor>, head: Tensor): Promise<Float32Array> {
  const file = await readModel(at("torchscript.onnx"));
  const { proto } = file.model;
  for (const { name, initializer, layout } of findParameters(file.model)) {
    const weight = name === HEAD ? head : tensors.get(name)!;
    const { data } = layout === "in-out" ? turned(weight) : weight;
    const stored = proto.graph!.initializer.find((one) => one.name === initializer)!;
    stored.rawData = new Uint8Array(Float32Array.from(data).buffer);
  }
  const session = await NODE.InferenceSession.create(toBinary("ModelProto", proto));
  const { logits } = await session.run({ input_ids: int64(NODE, [IDS]) });
  await session.release();
  await file.close();
  return logits!.data as Float32Array;
}

t.test("own weights: one weight, two, shared memory, stored as [in, out]", async (t) => {
  const weights = await tensorsOf();
  agrees(t, await forward(weights, weights.get(TABLE)!), goldens.tied[""], "the base");
  const pack = await packOf(t, [...ROWS.slice(0, 3), ...STARTS]);
  const more = await packOf(t, ROWS);
  const table = weights.get(TABLE)!;
  const two = (head: Tensor): Map<string, Tensor> => new Map([...weights, [HEAD, head]]);
  const copy = (): Tensor => ({ ...table, data: table.data.slice() as Float32Array });
  for (const task of [...ROWS.slice(0, 3), ...STARTS]) {
    const one = await changedBy(pack, task, { base: new Map(weights) });
    agrees(t, await forward(one, one.get(TABLE)!), goldens.tied[task], `one weight, ${task}`);
    const shared = await changedBy(pack, task, { base: two({ ...table }) });
    agrees(t, await forward(shared, shared.get(HEAD)!), goldens.tied[task], `shared memory, ${task}`);
  }
  for (const task of ROWS) {
    const apart = await changedBy(more, task, { base: two(copy()) });
    agrees(t, await forward(apart, apart.get(HEAD)!), goldens.tied[task], `two weights, ${task}`);
    const across = await changedBy(more, task, { base: two(turned(table)) });
    const head = turned(across.get(HEAD)!);
    agrees(t, await forward(across, head), goldens.tied[task], `stored as [in, out], ${task}`);
  }
  t.same(weights.get(TABLE)!.data, (await tensorsOf()).get(TABLE)!.data, "the base is put back");
});

t.test("own weights: an embedding that changes without its head", async (t) => {
  const weights = await tensorsOf();
  const table = weights.get(TABLE)!;
  const pack = await packOf(t, ["rows-head", "lora-embedding", "saved-embedding"]);
  const ensured = await packOf(t, ["lora-ensured", "saved-ensured"]);
  const two = (head: Tensor): Map<string, Tensor> => new Map([...weights, [HEAD, head]]);
  const apart = (): Map<string, Tensor> => two({ ...table, data: table.data.slice() as Float32Array });
  for (const [from, tasks] of [
    [pack, ["lora-embedding", "saved-embedding"]],
    [ensured, ["lora-ensured", "saved-ensured"]],
  ] as const) {
    for (const task of tasks) {
      const changed = await changedBy(from, task, { base: apart() });
      agrees(t, await forward(changed, changed.get(HEAD)!), goldens.tied[task], task);
    }
  }
  for (const task of ["rows-head", "lora-embedding", "saved-embedding"]) {
    const message = /"(lm_head|model.embed_tokens).weight" and .* share their memory, and .* alone is to be changed/;
    await t.rejects(changedBy(pack, task, { base: two({ ...table }) }), { tag: "base", message }, task);
  }
  t.same(table.data, (await tensorsOf()).get(TABLE)!.data, "nothing has changed");
  for (const [task, said] of [
    ["lora-embedding", 1],
    ["saved-embedding", 1],
    ["lora-ensured", 0],
    ["saved-ensured", 0],
    ["rows", 0],
  ] as const) {
    const [adapter] = await readAdapters([at(`adapters/${task}`)]);
    t.equal(adapter!.warnings.filter((text) => text.includes("and no head with it")).length, said, task);
    t.notMatch(adapter!.warnings.join(), /ensure_weight_tying/);
    await adapter!.close();
  }
});

t.test("commands: fold, export, attach", async (t) => {
  const folder = workIn(t);
  const adapters = [...ROWS.slice(0, 3), ...STARTS].map((task) => at(`adapters/${task}`));
  const pack = words`pack ${adapters} -o p.eigen --energy 1 --dtype f32 --base ${at("base.safetensors")}`;
  await json(0, ...pack);
  for (const task of [...ROWS.slice(0, 3), ...STARTS]) {
    await json(0, "fold", "p.eigen", "--task", task, "--base", at("base.safetensors"), "-o", `${task}.safetensors`);
    const folded = await tensorsOf(join(folder, `${task}.safetensors`));
    agrees(t, await forward(folded, folded.get(TABLE)!), goldens.tied[task], `fold, ${task}`);
    await json(0, "export", "p.eigen", "--task", task, "-o", `out/${task}`);
    const config = JSON.parse(await readFile(join(folder, "out", task, "adapter_config.json"), "utf8"));
    t.equal(config.init_lora_weights, true, "of the base as it is");
    const [again] = await readAdapters([join(folder, "out", task)]);
    const twice = await packed([again!]);
    const changed = await changedBy(twice, task, { base: await tensorsOf() });
    agrees(t, await forward(changed, changed.get(TABLE)!), goldens.tied[task], `exported, ${task}`);
  }
  await json(0, "attach", at("torchscript.onnx"), "p.eigen", "-o", "with.onnx", "--task", "rows");
  const attached = await NODE.InferenceSession.create(join(folder, "with.onnx"));
  const feeds = { input_ids: int64(NODE, [IDS]), ...(await feedsIn(join(folder, "with.tasks", "rows.safetensors"))) };
  agrees(t, (await attached.run(feeds))["logits"]!.data as Float32Array, goldens.tied["rows"], "attach");
  const refused = await run("pack", at("adapters/pissa"), "-o", "q.eigen");
  t.match(refused, {
    status: 1,
    stderr: /init_lora_weights is "pissa": PEFT takes the start out of the base.*--base.*path_initial_model/,
  });
});
