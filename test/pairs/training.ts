/** Trainers and distilling. */
import type { Pack } from "eigenlora";
import { createSession } from "eigenlora/session";
import { type BatchFeeds, createTrainer, distill, type Trainer } from "eigenlora/train";
import { NODE, type Session } from "../sessions.ts";
import { type Calls, closed, digits, type Kind, must, outcome, refusalOf, some, to, without } from "./harness.ts";
import { ADAPTERS, checkCounts, FILES, file, native, packOf } from "./material.ts";
import { answer, MODEL, row } from "./sessions.ts";

/** A session that can learn, and its pack. */
interface Learning {
  readonly session: Session;
  readonly pack: Pack;
}
const idle: Learning[] = [];
async function learning(): Promise<Learning> {
  const before = idle.pop();
  if (before) return before;
  const pack = await packOf();
  const session: Session = await createSession(native().engine, MODEL, pack, { trainable: true, probe: false });
  return { pack, session };
}
/** Checks that an unchanged session serves again. */
async function endOf({ session, pack }: Learning): Promise<unknown> {
  must(pack.residentBytes.basis === 0, "the bases are held");
  await checkCounts(pack);
  const seen = [session.task, [...pack.tasks.keys()], await answer(session).catch(refusalOf)];
  const open = await session.switchTask(null).catch(() => undefined);
  if (open && [...pack.tasks.keys()].join() === "a,b") idle.push({ session, pack });
  else await session.close();
  return seen;
}

interface Training extends Learning {
  readonly trainer: Trainer;
}
const EXAMPLES = [0, 1].map((at) => ({ feeds: row(at) as unknown as BatchFeeds, label: at }));
const trainerOn = (session: Session): Promise<Trainer> =>
  createTrainer(session, { labels: ["x", "y"], init: "mean" });
async function* fit(trainer: Trainer, steps = 2): AsyncGenerator<string, void, void> {
  for await (const { loss } of trainer.fit(EXAMPLES, { steps, batch: 2 })) yield loss.toFixed(3);
}

const trainerCalls: Calls<Training> = {
  fit: ({ trainer }) => fit(trainer),
  "begin as a": ({ trainer }) => trainer.begin("a"),
  "begin as a file": ({ trainer }) => trainer.begin(FILES.get("c")!),
  score: ({ trainer }) => trainer.score(EXAMPLES).then(({ loss }) => loss.toFixed(3)),
  predict: ({ trainer }) => trainer.predict(EXAMPLES).then((rows) => rows.map(digits)),
  task: ({ trainer }) => trainer.task().then(digits),
  "another trainer": async function* ({ session }) {
    const trainer = await trainerOn(session);
    yield "made";
    yield* fit(trainer, 1);
  },
  "switch to b": ({ session }) => to((task) => session.switchTask(task), "b"),
  "addTask task": ({ session }) => session.addTask("task", file("c")),
  "removeTask a": ({ session }) => session.removeTask("a"),
  close: ({ session }) => closed(session.close(), [() => trainerOn(session).then((other) => fit(other).next())]),
};

const trainer = (how: string, begins: boolean, calls: Calls<Training>): Kind<Training> => ({
  name: `a trainer ${how}`,
  calls,
  refused: /this trainer is at work/,
  async open() {
    const { session, pack } = await learning();
    const trainer = await trainerOn(session);
    if (begins) await trainer.begin("a");
    return { session, pack, trainer };
  },
  async look({ trainer, ...on }) {
    return [await trainer.task().then(digits, refusalOf), await outcome(() => fit(trainer, 1)), await endOf(on)];
  },
});
const trainers = [
  trainer("that is new", false, some(trainerCalls, "fit", "begin as a", "another trainer", "removeTask a", "close")),
  trainer("that has begun", true, without(trainerCalls, "begin as a", "another trainer")),
];

const asked = Array.from({ length: 8 }, (_, i) => {
  const x = new Float32Array(12).map((_, k) => Math.sin(12 * i + k));
  return { x: new NODE.Tensor("float32", x, [1, 12]) } as unknown as BatchFeeds;
});
const distilling: Kind<Learning> = {
  name: "distilling",
  // The task was removed or replaced meanwhile.
  refused: /^\[\["task"\],/,
  open: learning,
  calls: {
    distill: ({ session }) =>
      distill(session, { adapter: ADAPTERS[0], feeds: asked, steps: 1 }).then(({ kept, file }) => [kept, digits(file)]),
    "switch to a": ({ session }) => to((task) => session.switchTask(task), "a"),
    "removeTask a": ({ session }) => session.removeTask("a"),
    replace: async function* ({ pack }) {
      yield pack.removeTask("a");
      yield pack.addTask("a", file("c"));
    },
    close: ({ session }) => session.close(),
  },
  look: endOf,
};

export const TRAINING: readonly Kind<any>[] = [...trainers, distilling];
