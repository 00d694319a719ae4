/**
 * Progress of packs and models in the shape that transformers.js's `progress_callback` takes, and what an abort ends.
 */
import { readFile } from "node:fs/promises";
import { createRuntime, openPack, type Pack, type Progress, type Selection } from "eigenlora";
import { cachedSource, type RangeStore } from "eigenlora/cache";
import { createEigenSession, createEigenSessions } from "eigenlora/onnxruntime";
import t, { type Test } from "tap";
import { externalFiles, readModel } from "../support/internals/models.ts";
import { data, LOSSLESS, packOf } from "../support/packs.ts";
import { serve } from "../support/range-server.ts";
import { model, modelBytes, NODE, open, packBytes, packFor } from "../support/sessions.ts";

const pack = await packBytes(["adapters"], "base");

/** Files of one model, and a pack for them. */
const SEQ2SEQ = { encoder: data("seq2seq/onnx/encoder_model.onnx"), decoder: data("seq2seq/decoder.onnx") };
const seq2seq = async (): Promise<Pack> =>
  openPack((await packOf(["seq2seq/adapters"], { ...LOSSLESS, base: data("seq2seq/base.safetensors") })).bytes);

/** `ProgressInfo` of transformers.js 4.3, as in its declarations. */
type Theirs =
  | { status: "initiate"; name: string; file: string }
  | { status: "download"; name: string; file: string }
  | { status: "progress"; name: string; file: string; progress: number; loaded: number; total: number }
  | { status: "progress_total"; name: string; progress: number; loaded: number; total: number; files: object }
  | { status: "done"; name: string; file: string }
  | { status: "ready"; task: string; model: string };

/** Collects what is told, by a function with the types of transformers.js. */
function collector(): { told: Progress[]; onProgress: (info: Theirs) => void } {
  const told: Progress[] = [];
  return { told, onProgress: (info) => void told.push(info as Progress) };
}

/** Checks the story of one file: from "initiate" to "done", with bytes that only grow. */
function checkFile(t: Test, told: readonly Progress[], file: string, bytes: number | undefined): void {
  const own = told.filter((one) => one.file === file && one.status !== "ready");
  const statuses = own.map(({ status }) => status);
  t.same(statuses.slice(0, 2), ["initiate", "download"], `${file}: begins`);
  t.equal(statuses.at(-1), "done", `${file}: ends`);
  t.same(new Set(statuses.slice(2, -1)), new Set(["progress"]), `${file}: bytes between`);
  const loaded = own.map((one) => one.loaded);
  t.same(
    loaded,
    [...loaded].sort((a, b) => a - b),
  );
  const last = own.at(-1)!;
  t.match(last, { loaded: last.total, progress: 100 });
  if (bytes !== undefined) t.equal(last.total, bytes, `${file}: ${bytes} bytes`);
}

t.test("a pack from a server with ranges, and from one without", async (t) => {
  const server = await serve(new Map([["some/tasks.eigen", pack]]));
  t.teardown(() => server.close());
  server.faults = [undefined, "slow"];
  const { told, onProgress } = collector();
  const opened = await openPack(server.url("some/tasks.eigen"), { onProgress });
  checkFile(t, told, "tasks.eigen", opened.reads.bytes);
  t.ok(told.length > 5, "told while bytes arrive");
  t.match(told[0], { stage: "pack", name: server.url("some") });
  const count = told.length;
  await opened.prefetch(opened.tasks.keys());
  t.equal(told.length, count, "tasks are told as events");
  await opened.close();

  const late = await openPack(server.url("some/tasks.eigen"), { bases: "later" });
  const bases = collector();
  (await late.bases({ onProgress: bases.onProgress })).close();
  checkFile(t, bases.told, "tasks.eigen", late.directory.bases.length);
  await late.close();

  const whole = collector();
  const store: RangeStore = memoryStore();
  for (const where of ["server", "store"]) {
    const cached = cachedSource(server.url("some/tasks.eigen"), store);
    const from = await openPack(cached, { onProgress: whole.onProgress });
    checkFile(t, whole.told.splice(0), "tasks.eigen", undefined);
    t.equal(cached.counts.hits > 0, where === "store");
    await from.close();
  }
});

function memoryStore(): RangeStore {
  const kept = new Map<string, Uint8Array>();
  return {
    get: async (key) => kept.get(key),
    put: async (key, bytes) => void kept.set(key, bytes.slice()),
    delete: async (key) => void kept.delete(key),
    keys: async () => [...kept.keys()],
  };
}

t.test("a model, the files beside it, and that all is ready", async (t) => {
  const server = await serve(new Map([["onnx/model.onnx", modelBytes("torchscript")]]));
  t.teardown(() => server.close());
  const { told, onProgress } = collector();
  const opened = await openPack(pack, { onProgress });
  t.same(told, [], "bytes in memory have nothing to tell");
  const session = await createEigenSession(NODE, server.url("onnx/model.onnx"), opened, { onProgress });
  checkFile(t, told, "model.onnx", modelBytes("torchscript").length);
  t.match(told.at(-1), { status: "ready", stage: "session", model: server.url("onnx/model.onnx"), task: "" });
  t.equal(told.filter(({ status }) => status === "ready").length, 1);
  await session.close();

  const path = collector();
  await (await open(NODE, model("torchscript"), opened, { onProgress: path.onProgress })).close();
  t.match(path.told[0], { file: "torchscript.onnx", name: data("sessions"), stage: "model" });
  t.match(path.told.at(-2), { status: "done", progress: 100 });
  for (const name of ["sessions/external", "minilm/model_fp16"]) {
    const { told, onProgress } = collector();
    const file = await readModel(data(`${name}.onnx`), { weightsApart: true, onProgress });
    for (const location of externalFiles(file.model).keys()) await (await file.external!(location)).read(0, 1000);
    await file.close();
    const done = told.filter(({ status }) => status === "done");
    t.equal(done.length, name === "sessions/external" ? 2 : 1, name);
    for (const { loaded, total, progress } of done) t.match({ loaded, progress }, { loaded: total, progress: 100 });
    t.ok(
      told.every(({ status }) => status !== "progress"),
      "the runtime reads the rest: no percent of what is read here",
    );
  }
  await opened.close();
});

t.test("files of one model end with one `ready`", async (t) => {
  const { told, onProgress } = collector();
  const skills = await seq2seq();
  const models = await createEigenSessions(NODE, SEQ2SEQ, skills, { onProgress });
  t.same(new Set(told.map(({ file }) => file)), new Set(["encoder_model.onnx", "decoder.onnx"]));
  t.same(
    told.filter(({ status }) => status === "ready").map(({ status }) => status),
    ["ready"],
  );
  t.equal(told.at(-1)!.status, "ready");
  await models.close();
  await skills.close();
});

t.test("weights in a file beside the model are told by their own name", async (t) => {
  const [graph, weights] = [await readFile(model("external")), await readFile(data("sessions/external.onnx.data"))];
  const server = await serve(
    new Map<string, Uint8Array>([
      ["model.onnx", graph],
      ["external.onnx.data", weights],
    ]),
  );
  t.teardown(() => server.close());
  const { told, onProgress } = collector();
  const session = await createEigenSession(NODE, server.url("model.onnx"), await packFor("base"), { onProgress });
  checkFile(t, told, "model.onnx", graph.length);
  checkFile(t, told, "external.onnx.data", undefined);
  t.equal(told.at(-1)!.status, "ready");
  await session.close();
});

/** Events of packs, runtimes, sessions and groups: what is told, in which order, and that listeners are the platform's.
 */
interface Switches {
  readonly task: Selection;
  addEventListener(
    type: "switchstart" | "switchend",
    listener: (event: { type: string; detail: { task: Selection; error?: unknown; report?: object } }) => void,
  ): void;
}

/** Collects the switches of something: what, which task, and which is active at the time. */
function collect(of: Switches): unknown[][] {
  const told: unknown[][] = [];
  for (const type of ["switchstart", "switchend"] as const) {
    of.addEventListener(type, ({ type, detail: { task, error, report } }) =>
      told.push([type, task, of.task, ...(error ? [(error as Error).name] : []), ...(report ? ["report"] : [])]),
    );
  }
  return told;
}

t.test("a session tells of switches, in order, and of those that fail", async (t) => {
  const pack = await packFor("base");
  const session = await open(NODE, model("torchscript"), pack);
  t.teardown(() => session.close());
  const told = collect(session);
  const all = ["two", "three", "none", null].map((task) => session.switchTask(task).catch(() => undefined));
  await Promise.all(all);
  t.same(told, [
    ["switchstart", "two", null],
    ["switchend", "two", "two", "report"],
    ["switchstart", "three", "two"],
    ["switchend", "three", "three", "report"],
    ["switchstart", "none", "three"],
    ["switchend", "none", "three", "TaskError"],
    ["switchstart", null, "three"],
    ["switchend", null, null, "report"],
  ]);
});

t.test("a pack tells of tasks that are read, once each", async (t) => {
  const pack = await packFor("base");
  const read: string[] = [];
  pack.addEventListener("taskread", ({ detail }) => read.push(`${detail.task} ${detail.bytes}`));
  await Promise.all([pack.load("two"), pack.load("two"), pack.prefetch(["two", "three"])]);
  const bytes = (id: string): number => pack.tasks.get(id)!.bytes;
  // Tasks that are read at once are hashed on threads of the platform: either may be the first to be checked.
  t.same(read.sort(), [`three ${bytes("three")}`, `two ${bytes("two")}`]);
  await pack.close();
});

t.test("listeners are the platform's: once, a signal, removed, an object, and the target", async (t) => {
  const pack = await packFor("base");
  t.ok((pack as object) instanceof EventTarget);
  const told: string[] = [];
  const note = (name: string) => () => void told.push(name);
  const [removed, ending] = [note("removed"), new AbortController()];
  pack.addEventListener("taskread", note("once"), { once: true });
  pack.addEventListener("taskread", note("until"), { signal: ending.signal });
  pack.addEventListener("taskread", removed);
  pack.addEventListener("taskread", { handleEvent: (event) => void told.push(event.type) });
  pack.addEventListener("taskread", (event) => t.equal((event as unknown as Event).target, pack));
  pack.removeEventListener("taskread", removed);
  await pack.load("two");
  ending.abort();
  await pack.load("three");
  t.same(told, ["once", "until", "taskread", "taskread"]);
  await pack.close();
});

t.test("a runtime and a group of sessions tell of theirs", async (t) => {
  const runtime = await createRuntime(await packFor("base"), { mode: "core" });
  const told = collect(runtime);
  await runtime.switchTask("two");
  await runtime.switchTask("none").catch(() => undefined);
  t.same(told, [
    ["switchstart", "two", null],
    ["switchend", "two", "two", "report"],
    ["switchstart", "none", "two"],
    ["switchend", "none", "two", "TaskError"],
  ]);
  await runtime.close();

  const skills = await seq2seq();
  const [first] = skills.tasks.keys() as Iterable<string> as [string];
  const models = await createEigenSessions(NODE, SEQ2SEQ, skills);
  const both = collect(models);
  await models.switchTask(first);
  await models.switchTask("none").catch(() => undefined);
  t.same(both, [
    ["switchstart", first, null],
    ["switchend", first, first, "report"],
    ["switchstart", "none", first],
    ["switchend", "none", first, "TaskError"],
  ]);
  await models.close();
  await skills.close();
});
