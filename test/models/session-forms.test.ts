/**
 * Modules that are no linear layers, in every mode: convolutions, embeddings, normalisations and biases of convolutions
 * of the tiny models in test/data/forms, quantised too, compared with PEFT's answers.
 */
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { openPack, type Pack } from "eigenlora";
import t from "tap";
import { fromBinary, makeFloats, makeNode, toBinary } from "../support/internals/models.ts";
import { data, LOSSLESS, packOf as packed } from "../support/packs.ts";
import {
  checkRows,
  checkTasks,
  difference,
  type Feeds,
  ignoring,
  int64,
  MODES,
  type Mode,
  modesOn,
  NODE,
  ORTS,
  type Ort,
  open,
  outputOf,
  refusal,
} from "../support/sessions.ts";

type Nested = number | readonly Nested[];
const GOLDENS = JSON.parse(readFileSync(data("forms/goldens.json"), "utf8")) as {
  feeds: Record<string, Record<string, Nested>>;
  models: Record<string, string>;
  outputs: Record<string, Record<string, readonly Nested[]>>;
};

const path = (name: string): string => data(`forms/${name}.onnx`);
const flat = (value: Nested): number[] => [value].flat(Infinity as 1) as number[];
const kindOf = (model: string): string => model.split("-")[0]!;
const answer = (answers: string, task: string | null): number[] => flat(GOLDENS.outputs[answers]![task ?? "base"]!);

const rowOf = (answers: string, task: string | null, row: number): number[] =>
  flat(GOLDENS.outputs[answers]![task ?? "base"]![row]!);

function dimsOf(value: Nested): number[] {
  return typeof value === "number" ? [] : [value.length, ...dimsOf(value[0]!)];
}

function feedsOf(ort: Pick<Ort, "Tensor">, kind: string): Feeds {
  return Object.fromEntries(
    Object.entries(GOLDENS.feeds[kind]!).map(([name, value]) => {
      const floats = () => new ort.Tensor("float32", Float32Array.from(flat(value)), dimsOf(value));
      return [name, name === "x" ? floats() : int64(ort, value as number[][])];
    }),
  );
}

/** @param folders of adapters under test/data/forms, each one adapter or a folder of several */
async function packOf(kind: string, folders: readonly string[], options = {}): Promise<Pack> {
  const paths = folders.flatMap((folder) => {
    const at = `forms/${folder}`;
    return existsSync(data(`${at}/task.json`)) ? [at] : readdirSync(data(at)).map((name) => `${at}/${name}`);
  });
  const base = data(`forms/${kind}.safetensors`);
  return openPack((await packed(paths, { ...LOSSLESS, ...options, base })).bytes);
}

const packs = new Map<string, Promise<Pack>>();
function packFor(kind: string): Promise<Pack> {
  const pack = packs.get(kind) ?? packOf(kind, [`adapters-${kind}`]);
  packs.set(kind, pack);
  return pack;
}

const isQuantised = (name: string): boolean => /int8|qdq|qlinear|q4/.test(name);

/** Tolerance of half-precision arithmetic, and of integers that round to a neighbour now and then. */
function tolerance(name: string, mode: Mode): number {
  if (name.endsWith("half")) return mode === "folded" ? 1e-2 : 5e-3;
  return /int8|qdq|qlinear/.test(name) ? 2e-2 : 1e-5;
}

for (const { name: runtime, ort } of ORTS) {
  t.test(`models × modes on ${runtime}`, async (t) => {
    for (const [name, answers] of Object.entries(GOLDENS.models)) {
      const pack = await packFor(kindOf(name));
      for (const mode of modesOn(runtime)) {
        const what = `${name}, ${mode}`;
        if (mode === "folded" && isQuantised(name)) {
          const error = await refusal(() => open(ort, path(name), pack, { mode }));
          t.match(error, { tag: "base", message: /quantised.*use mode "core" or "factors"/ }, what);
          continue;
        }
        const session = await open(ort, path(name), pack, { mode });
        t.match(session, { mode, unconfirmed: [] }, what);
        if (mode !== "folded") t.match(session.probe, { result: "passed" }, what);
        const feeds = feedsOf(ort, kindOf(name));
        const allowed = tolerance(name, mode);
        await checkTasks(t, session, feeds, pack.tasks.keys(), (task) => answer(answers, task), { allowed, what });
        if (mode !== "folded" && pack.tasks.size > 1) {
          // The scales of a batch depend on all of its rows.
          const mixed = /int8/.test(name) ? 0.1 : allowed;
          const row = (task: string | null, row: number) => rowOf(answers, task, row);
          await checkRows(t, session, feeds, ["a", null, "b"], row, { allowed: mixed, what });
        }
        await session.close();
      }
    }
  });
}

t.test("biases of convolutions, DoRA on convolutions and embeddings, a norm by itself", async (t) => {
  for (const [kind, folder] of [
    ["vision", "adapters-vision-more"],
    ["text", "adapters-text-more"],
  ] as const) {
    for (const task of readdirSync(data(`forms/${folder}`))) {
      const pack = await packOf(kind, [`${folder}/${task}`]);
      for (const mode of [undefined, "factors", "folded"] as const) {
        const session = await open(NODE, path(kind), pack, mode && { mode });
        t.equal(session.mode, mode ?? "core");
        const feeds = feedsOf(NODE, kind);
        const what = session.mode;
        await checkTasks(t, session, feeds, [task], (task) => answer(kind, task), { what });
        const row = (task: string | null, row: number) => rowOf(kind, task, row);
        if (mode !== "folded") await checkRows(t, session, feeds, [task, null, task], row, { what });
        await session.close();
      }
    }
  }
});

t.test("what only weights can take is refused by name, and so is what would mix rows", async (t) => {
  const whole = await packOf("vision", ["adapters-vision-whole"]);
  for (const mode of ["core", "factors"] as const) {
    const message = /tasks bring "apart\.weight" \(saved\).*use mode "folded"$/;
    t.match(await refusal(() => open(NODE, path("vision"), whole, { mode })), { tag: "base", message });
  }
  const session = await open(NODE, path("vision"), whole);
  await session.switchTask("adapters-vision-whole");
  const off = difference(
    await outputOf(session, feedsOf(NODE, "vision")),
    answer("vision-whole", "adapters-vision-whole"),
  );
  t.match({ mode: session.mode, right: off <= 1e-5 }, { mode: "folded", right: true });
  await session.close();

  const swapped = await packOf("swapped", ["adapters-swapped"]);
  for (const mode of ["core", "factors"] as const) {
    const session = await open(NODE, path("swapped"), swapped, { mode });
    const message = /one task per row: tasks get into each other's rows/;
    const tasks = ["a", null, "a"];
    t.match(await refusal(() => session.run(feedsOf(NODE, "swapped"), { tasks })), { tag: "backend", message });
    await session.close();
  }

  const dora = await packOf("text", ["adapters-text-more/dora"]);
  const message = /DoRA tasks, which need the float weight.*Pass a float export/;
  t.match(await refusal(() => open(NODE, path("text-int8"), dora)), { tag: "base", message });
  const texts = await packFor("text");
  const trainable = await refusal(() => open(NODE, path("text"), texts, { trainable: true }));
  t.match(trainable, { tag: "base", message: /"places" is an embedding, whose term cannot be trained/ });
});

t.test("norms of Gemma, as onnxruntime-genai's builder stores them", async (t) => {
  const built = fromBinary("ModelProto", new Uint8Array(readFileSync(path("text-simplified"))));
  built.producerName = "onnxruntime-genai";
  const pack = await packFor("text");
  // Other families keep their checkpoint's numbers.
  await (await open(NODE, toBinary("ModelProto", built), pack)).close();
  const [words] = built.graph!.node;
  words!.output[0] = "words";
  const scaled = makeNode("Mul", "/model/embed_tokens/Mul", ["words", "scale"], "/words/Gather_output_0");
  built.graph!.node.splice(1, 0, scaled);
  built.graph!.initializer.push(makeFloats("scale", [1], [1]));
  const message = /brings? "(norm|rms)\.weight", which .* has stored with 1 added.*ignore: \["(norm|rms)"\]/;
  for (const mode of MODES) {
    const error = await refusal(() => open(NODE, toBinary("ModelProto", built), pack, { mode }));
    t.match(error, { tag: "base", message }, mode);
  }
  const without = await open(NODE, toBinary("ModelProto", built), pack, { ignore: ["norm", "rms"] });
  t.equal(without.probe.result, "passed");
  await without.close();
});

t.test("a provider that ignores inputs of a form is found, whichever it is", async (t) => {
  const cases = [
    ["vision", "core", "eigenlora.cores."],
    ["vision", "factors", "eigenlora.odd.A"],
    ["vision", "factors", "eigenlora.odd.B"],
    ["vision", "core", "eigenlora.norm.weight.change"],
    ["vision-padded", "factors", "eigenlora.odd.A"],
    ["signal", "factors", "eigenlora.cube.A"],
    ["text", "core", "eigenlora.cores."],
    ["text", "factors", "eigenlora.places.A"],
    ["text-simplified", "core", "eigenlora.norm.weight.change"],
  ] as const;
  for (const [name, mode, input] of cases) {
    // Those of several layers come as one.
    const fake = ignoring(NODE, (one) => one === input || (input.endsWith(".") && one.startsWith(input)));
    const pack = await packFor(kindOf(name));
    const error = await refusal(() => open(fake, path(name), pack, { mode }));
    t.match(
      error,
      { tag: "backend", message: /with and without a task|whether a task changes|it may ignore inputs/ },
      `${name}, ${input}`,
    );
  }
});
