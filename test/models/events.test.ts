/**
 * Events of packs, runtimes, sessions and groups: what is told, in which order, and that listeners are the platform's.
 */
import { createRuntime, openPack, type Selection } from "eigenlora";
import { buildPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { createEigenSessions } from "eigenlora/onnxruntime";
import t from "tap";
import { data, LOSSLESS } from "../support/packs.ts";
import { model, NODE, open, packFor } from "../support/sessions.ts";

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
  t.same(read, [`two ${bytes("two")}`, `three ${bytes("three")}`]);
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

  const adapters = await readAdapters([data("seq2seq/adapters")]);
  const { chunks } = await buildPack(adapters, { ...LOSSLESS, base: data("seq2seq/base.safetensors") });
  const skills = await openPack(new Uint8Array(Buffer.concat(chunks)));
  const [first] = skills.tasks.keys() as Iterable<string> as [string];
  const files = { encoder: data("seq2seq/onnx/encoder_model.onnx"), decoder: data("seq2seq/decoder.onnx") };
  const models = await createEigenSessions(NODE, files, skills);
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
