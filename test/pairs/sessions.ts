/** Sessions, groups of them, and packs on pipelines. */
import { openPack, type Pack } from "eigenlora";
import { createEngine, type EigenSessions } from "eigenlora/onnxruntime";
import { createSession, createSessions, type Engine } from "eigenlora/session";
import { type AttachedPack, attachPack, type TransformersPipeline } from "eigenlora/transformers";
import { data, LOSSLESS, packOf as packOfAdapters } from "../packs.ts";
import { PlainEngine } from "../plain-engine.ts";
import { type Feeds, feeds, modelBytes, NODE, type Ort, type Session } from "../sessions.ts";
import { aborted, type Calls, changing, closed, digits, type Kind, late, must, refusalOf, to } from "./harness.ts";
import { checkCounts, file, fileOf, NATIVE, packOf, type Slowly, slow, slowly } from "./material.ts";

export const MODEL = modelBytes("gemm");
/** A row of the model's input. */
export const row = (at: number): Feeds => feeds(NODE, { inputNames: ["x"] }, [at]);

/** Answers of a session. */
export async function answer(session: Session, tasks?: (string | null)[]): Promise<string> {
  const own = tasks ? feeds(NODE, { inputNames: ["x"] }, [...tasks.keys()]) : row(0);
  const results = await session.run(own, tasks ? { tasks } : {});
  return digits(results[session.outputNames[0]!]!.data as Float32Array);
}

export interface Open {
  readonly session: Session;
  readonly pack: Pack;
  readonly counted: Slowly;
}
/** A task may stay loaded for a switch that is aborted afterwards. */
const KEPT = /^\[\["AbortError"\],\["task"\]/;

export const sessionCalls: Calls<Open> = {
  "switch to a": ({ session }) => to((task) => session.switchTask(task), "a"),
  "switch to the base": ({ session }) => to((task) => session.switchTask(task), null),
  "switch to a blend": ({ session }) => changing((blend) => session.switchTask(blend, { head: "a" })),
  "switch, broken off": aborted(({ session }, signal) => to((task) => session.switchTask(task, { signal }), "a")),
  run: ({ session }) => answer(session),
  "run a task per row": ({ session }) => answer(session, ["a", null, "b"]),
  "addTask c": ({ session }) => session.addTask("c", file("c")),
  "removeTask a": ({ session }) => session.removeTask("a"),
  "removeTask b": ({ session }) => session.removeTask("b"),
  close: ({ session }) =>
    closed(session.close(), [
      ...[() => session.switchTask("a"), () => answer(session)],
      ...[() => session.addTask("c", file("c")), () => session.removeTask("a")],
    ]),
};

const sessions = (["core", "folded"] as const).map((mode): Kind<Open> => {
  return {
    name: `a session in mode ${mode}`,
    calls: sessionCalls,
    refused: KEPT,
    async open() {
      const [pack, counted] = [await packOf(), slowly(new PlainEngine())];
      const session: Session = await createSession(counted.engine, MODEL, pack, { mode, probe: false });
      await session.switchTask("b");
      return { session, pack, counted };
    },
    async look({ session, pack, counted }) {
      const found: unknown[] = [session.task, await answer(session).catch(refusalOf), [...session.tasks.keys()]];
      for (const task of ["a", null]) {
        found.push(await to((one) => session.switchTask(one), task).catch(refusalOf));
        found.push(await answer(session).catch(refusalOf));
      }
      found.push(typeof session.memory().total);
      await session.close();
      must(counted.models === 0, `${counted.models} models are left`);
      return [...found, await checkCounts(pack)];
    },
  };
});

interface Grouped {
  readonly group: EigenSessions<Ort, "one" | "two">;
  readonly pack: Pack;
  readonly counted: Slowly;
}
/** Answers of both sessions, with their tasks. */
const both = ({ group }: Grouped): Promise<unknown> =>
  group.call(async ({ one, two }) => {
    const before = [one.task, await answer(one)];
    await late();
    return [...before, two.task, await answer(two)];
  });

const grouped: Kind<Grouped> = {
  name: "a group of sessions",
  refused: KEPT,
  calls: {
    "switch to a": ({ group }) => to((task) => group.switchTask(task), "a"),
    "switch to the base": ({ group }) => to((task) => group.switchTask(task), null),
    "switch to a blend": ({ group }) => changing((blend) => group.switchTask(blend, { head: "a" })),
    "switch, broken off": aborted(({ group }, signal) => to((task) => group.switchTask(task, { signal }), "a")),
    call: both,
    "addTask c": ({ group }) => group.sessions.two.addTask("c", file("c")),
    "removeTask a": ({ group }) => group.sessions.two.removeTask("a"),
    "removeTask b": ({ group }) => group.sessions.one.removeTask("b"),
    close: (on) => {
      const { group } = on;
      return closed(group.close(), [() => group.switchTask("a"), () => both(on), () => answer(group.sessions.one)]);
    },
  },
  async open() {
    const [pack, counted] = [await packOf(), slowly(new PlainEngine())];
    const models = { one: MODEL, two: MODEL };
    const group: Grouped["group"] = await createSessions(counted.engine, models, pack, { mode: "core", probe: false });
    await group.switchTask("b");
    return { group, pack, counted };
  },
  async look(on) {
    const { group, pack, counted } = on;
    const found: unknown[] = [group.task, await both(on).catch(refusalOf), [...group.tasks.keys()]];
    await group.switchTask("a").catch(refusalOf);
    found.push(await both(on).catch(refusalOf), typeof group.memory().total);
    await group.close();
    must(counted.models === 0, `${counted.models} models are left`);
    return [...found, await checkCounts(pack)];
  },
};

interface Decoding {
  readonly session: Session;
  readonly pack: Pack;
  /** Result of a run with a task per row. */
  made?: Feeds;
}
const decoder = await packOfAdapters(["decoder/adapters/upper", "decoder/adapters/lower"], LOSSLESS);
/** Replacement of "upper". */
const other = await fileOf(await openPack(decoder.bytes), "lower", "upper");

/** A token for two rows, with a cache or without one. */
function token(cache?: Feeds): Feeds {
  const past = cache?.["present.0.key"]?.dims[2] ?? 0;
  const ids = (values: number[], dims: number[]) => new NODE.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
  const made: Feeds = {
    input_ids: ids([5, 6], [2, 1]),
    attention_mask: ids(Array(2 * (past + 1)).fill(1), [2, past + 1]),
    position_ids: ids([past, past], [2, 1]),
  };
  for (const layer of [0, 1])
    for (const side of ["key", "value"])
      made[`past_key_values.${layer}.${side}`] =
        cache?.[`present.${layer}.${side}`] ?? new NODE.Tensor("float32", new Float32Array(0), [2, 2, 0, 8]);
  return made;
}
const tasks = ["upper", "lower"];
const logits = (results: Feeds): string => digits(results["logits"]!.data as Float32Array);

const decoding: Kind<Decoding> = {
  name: "a session with caches",
  more: 8,
  calls: {
    "run a task per row": async (on) => logits((on.made = await on.session.run(token(), { tasks }))),
    replace: async function* ({ pack }) {
      yield pack.removeTask("upper");
      yield pack.addTask("upper", other);
    },
  },
  async open() {
    // Tasks are read again for each run where there is no room for them.
    const pack = await openPack(slow(decoder.bytes, 30), { maxResidentBytes: 1 });
    const { engine } = slowly(createEngine(NODE, NATIVE) as Engine);
    const session: Session = await createSession(engine, data("decoder/onnx/model.onnx"), pack, { probe: false });
    await session.run(token(), { tasks });
    return { pack, session };
  },
  async look({ session, made }) {
    const behind = made && (await session.run(token(made), { tasks }).then(logits, refusalOf));
    const found = [behind, logits(await session.run(token(), { tasks }))];
    await session.close();
    return found;
  },
};

interface Attached {
  readonly pipe: TransformersPipeline & { _call(): Promise<unknown> };
  readonly pack: Pack;
  tasks: AttachedPack;
}
type OwnSessions = Record<string, Awaited<ReturnType<Ort["InferenceSession"]["create"]>>>;
/** Sessions as transformers.js makes them. */
async function loaded({ session_options = {} }: { session_options?: object } = {}): Promise<OwnSessions> {
  return { model: await NODE.InferenceSession.create(MODEL, { ...NATIVE, ...session_options }) };
}

async function pipeline(): Promise<Attached["pipe"]> {
  const model = {
    constructor: {
      from_pretrained: async (_id: string, options: object) => ({ sessions: await loaded(options) }),
    },
    sessions: await loaded(),
    config: { id2label: { 0: "base" } },
    async forward(): Promise<string> {
      await late();
      return digits((await this.sessions["model"]!.run(row(0)))["logits"]!.data as Float32Array);
    },
  };
  return {
    model,
    async _call() {
      return [await this.model.forward(), await this.model.forward(), this.model.config.id2label[0]];
    },
  } as Attached["pipe"] & { model: typeof model };
}
const attach = (pipe: Attached["pipe"], pack: Pack): Promise<AttachedPack> =>
  attachPack(pipe, pack, {
    ...{ model: "gemm", probe: false, Tensor: NODE.Tensor, session: NATIVE },
  });

const attached: Kind<Attached> = {
  name: "a pack on a pipeline",
  refused: KEPT,
  calls: {
    "switch to a": ({ tasks }) => to((task) => tasks.switchTask(task), "a"),
    "switch to the base": ({ tasks }) => to((task) => tasks.switchTask(task), null),
    "switch to a blend": ({ tasks }) => changing((blend) => tasks.switchTask(blend, { head: "a" })),
    "switch, broken off": aborted(({ tasks }, signal) => to((task) => tasks.switchTask(task, { signal }), "a")),
    call: ({ pipe }) => pipe._call(),
    "removeTask a": ({ tasks }) => tasks.session.removeTask("a"),
    attach: async (on) => void (on.tasks = await attach(on.pipe, on.pack)),
    close: ({ tasks }) => closed(tasks.close(), [() => tasks.switchTask("a"), () => answer(tasks.session as Session)]),
  },
  async open() {
    const [pipe, pack] = [await pipeline(), await packOf()];
    const tasks = await attach(pipe, pack);
    await tasks.switchTask("b");
    return { pipe, pack, tasks };
  },
  async look({ pipe, pack, tasks }) {
    const found = [tasks.task, await pipe._call(), [...pack.tasks.keys()]];
    await tasks.close();
    return [...found, await pipe._call(), await checkCounts(pack)];
  },
};

export const SESSIONS: readonly Kind<any>[] = [...sessions, grouped, decoding, attached];
