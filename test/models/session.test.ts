/**
 * A session at work: one task per row, runs and switches in any order, failures that keep the old task, closing. On
 * every runtime in Node, and on an engine in plain JavaScript.
 */
import { type ByteSource, openPack } from "eigenlora";
import t from "tap";
import { soak } from "../support/required.ts";
import {
  checkRows,
  difference,
  feeds,
  golden,
  goldenRow,
  type Mode,
  model,
  ORTS,
  open,
  outputOf,
  packBytes,
  packFor,
  RUNTIMES,
  refusal,
  type Session,
} from "../support/sessions.ts";

/** Makes repeatable choices. */
function chooser(seed: number): <T>(of: readonly T[]) => T {
  return (of) => {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
    return of[(seed >>> 8) % of.length]!;
  };
}

const TASKS = ["two", "three", "five"] as const;

for (const { name: runtime, ort } of RUNTIMES) {
  /** The plain engine takes several times as long, on this thread. */
  const share = "engine" in ort ? 0.2 : 1;
  t.test(`one task per row on ${runtime}`, async (t) => {
    for (const [name, answers] of [
      ["torchscript", "base"],
      ["dynamo", "base"],
      ["f16", "f16"],
      ["q4", "q4"],
    ] as const) {
      for (const mode of ["core", "factors"] as const) {
        const session = await open(ort, model(name), await packFor(answers), { mode });
        const choose = chooser(7);
        let [worst, apart, invalid] = [0, 0, 0];
        for (let round = 0; round < 1 + 4 * share; round++) {
          const rows = Array.from({ length: round === 0 ? 1 : 5 }, () => choose([0, 1, 2]));
          const tasks = rows.map(() => choose([...TASKS, null]));
          const result = await session.run(feeds(ort, session, rows), { tasks });
          const { data, dims } = result["logits"]!;
          const columns = dims[1]!;
          const valid = result.validColumns!.get("classifier")!;
          for (const [i, row] of rows.entries()) {
            const expected = goldenRow(answers, tasks[i]!, row);
            const found = (data as Float32Array).subarray(i * columns, (i + 1) * columns);
            worst = Math.max(worst, difference(found.subarray(0, valid[i]), expected));
            await session.switchTask(tasks[i]!);
            const alone = await outputOf(session, feeds(ort, session, [row]));
            apart = Math.max(apart, difference(found.subarray(0, valid[i]), alone));
            if (found.subarray(valid[i]).some((v) => !(v < -1e38 && Number.isFinite(v)))) invalid++;
          }
          if (columns !== Math.max(...valid)) invalid++;
          if (Object.keys(result).join() !== "logits") invalid++;
        }
        t.ok(worst <= 1e-5, `${name}, ${mode}: off by ${worst}`);
        t.ok(apart <= 1e-5, `${name}, ${mode}: ${apart} from the rows alone`);
        t.equal(invalid, 0, "columns behind a task's own hold the lowest number, and are told");
        await session.close();
      }
    }
  });

  t.test(`rows that cannot be, on ${runtime}`, async (t) => {
    const session = await open(ort, model("torchscript"), await packFor("base"), { mode: "core" });
    await session.switchTask("two");
    const run = (tasks: readonly (string | null)[]) => session.run(feeds(ort, session), { tasks });
    await t.rejects(run(["two", "two"]), new TypeError("run: 2 tasks for a batch of 3; give one per row"));
    await t.rejects(run([]), TypeError);
    t.match(await refusal(() => run(["two", "thre", null])), { tag: "task", task: "thre", nearest: ["three"] });
    t.ok(difference(await outputOf(session, feeds(ort, session)), golden("base", "two")) <= 1e-5, "still works");
    t.equal(session.task, "two");
    await session.close();

    const folded = await open(ort, model("torchscript"), await packFor("base"), { mode: "folded" });
    await t.rejects(folded.run(feeds(ort, folded), { tasks: ["two", "two", "two"] }), {
      name: "TypeError",
      message: /needs mode "core" or "factors"; this session is "folded"/,
    });
    await folded.close();

    // Rows with every kind of parameter, the base next to a task.
    for (const task of ["dora", "bias", "bias-lora", "dense", "tokens"]) {
      const pack = await openPack(await packBytes([`adapters-more/${task}`], "base"));
      const mixed = await open(ort, model("torchscript"), pack, { mode: "core" });
      const row = (task: string | null, row: number) => goldenRow("base", task, row);
      await checkRows(t, mixed, feeds(ort, mixed, [0, 1, 2]), [task, null, task], row, { what: task });
      await mixed.close();
    }
  });

  t.test(`random switches while four callers run, on ${runtime}`, async (t) => {
    for (const [mode, most] of [
      ["core", 100],
      ["factors", 100],
      ["folded", 20],
    ] as [Mode, number][]) {
      const switches = most * share * (soak ? 50 : 1);
      const pack = await packFor("base");
      const session = await open(ort, model("torchscript"), pack, { mode });
      const run = feeds(ort, session);
      // Switched twice each: the active and the next head are in memory together.
      for (const task of [...TASKS, null]) for (let i = 0; i < 2; i++) await session.switchTask(task);
      const before = session.memory();
      const choose = chooser(99);
      /** The task that a run asked for now belongs to: the last one asked for before it. */
      let asked: string | null = null;
      let wrong = 0;
      let runs = 0;
      let done = false;
      const caller = async (): Promise<void> => {
        while (!done) {
          const task = asked;
          if (!(difference(await outputOf(session, run), golden("base", task)) <= 1e-5)) wrong++;
          runs++;
          // Random delays let callers and switches meet in every order.
          await new Promise((resolve) => choose([setImmediate, queueMicrotask])(resolve as () => void));
        }
      };
      const callers = [caller(), caller(), caller(), caller()];
      for (let i = 0; i < switches; i++) {
        asked = choose([...TASKS, null]);
        const change = session.switchTask(asked);
        // Some switches are overtaken by the next.
        if (choose([true, true, false])) await change;
        if (choose([true, false])) await new Promise(setImmediate);
      }
      asked = null;
      await session.switchTask(null);
      done = true;
      await Promise.all(callers);
      t.equal(wrong, 0, `${mode}: ${wrong} of ${runs} runs gave what was not their task's`);
      t.ok(runs > switches / 10, `${mode}: ${runs} runs beside ${switches} switches`);
      t.same(session.memory(), before, `${mode}: memory stays`);
      await session.close();
    }
  });

  t.test(`a switch that fails leaves the old task, on ${runtime}`, async (t) => {
    for (const mode of ["core", "folded"] as const) {
      const bytes = await packBytes(["adapters"], "base");
      const section = (await openPack(bytes)).directory.tasks.find(({ id }) => id === "three")!.section;
      const damaged = { now: false };
      const source: ByteSource = {
        name: "tasks.eigen",
        byteLength: bytes.length,
        async read(offset, length) {
          const read = bytes.slice(offset, offset + length);
          if (damaged.now && offset === section.offset) read[length >> 1]! ^= 4;
          return read;
        },
      };
      const session = await open(ort, model("torchscript"), await openPack(source), { mode });
      const run = feeds(ort, session);
      const is = async (task: string | null, why: string): Promise<void> => {
        t.equal(session.task, task);
        t.ok(difference(await outputOf(session, run), golden("base", task)) <= 1e-5, `${mode}: ${why}`);
      };
      await session.switchTask("two");
      const { active } = session.memory();
      t.match(await refusal(() => session.switchTask("threee")), { tag: "task", nearest: ["three"] });
      await is("two", "after an unknown id");
      damaged.now = true;
      const broken = { tag: "format", part: 'task "three"', message: /damaged/ };
      t.match(await refusal(() => session.switchTask("three")), broken);
      await is("two", "after a damaged blob");
      const controller = new AbortController();
      const aborted = refusal(() => session.switchTask("five", { signal: controller.signal }));
      controller.abort(new Error("not any more"));
      t.match(await aborted, { message: "not any more" });
      const never = AbortSignal.abort(new Error("never"));
      t.match(await refusal(() => session.switchTask("five", { signal: never })), { message: "never" });
      await is("two", "after an abort");
      t.match(await refusal(() => session.switchTask({ two: 0.5, three: 0.5 })), { tag: "format" });
      t.match(await refusal(() => session.switchTask({ two: NaN })), { name: "RangeError" });
      const unlike = await refusal(() => session.switchTask({ two: 0.5, five: 0.5 }));
      t.match(unlike, { tag: "task", message: /different labels/ });
      await is("two", "after blends that cannot be");
      damaged.now = false;
      // Failures in the queue do not stop later calls.
      const failing = refusal(() => session.switchTask("none"));
      const [change, output] = [session.switchTask("three"), outputOf(session, run)];
      t.match(await failing, { tag: "task" });
      t.match(await change, { task: "three" });
      t.ok(difference(await output, golden("base", "three")) <= 1e-5);
      await session.switchTask("two");
      t.equal(session.memory().active, active, "nothing was left behind");
      await session.close();
    }
  });

  t.test(`close on ${runtime}`, async (t) => {
    for (const mode of ["core", "folded"] as const) {
      const session = await open(ort, model("torchscript"), await packFor("base"), { mode });
      const run = feeds(ort, session);
      const runs = [outputOf(session, run)];
      const change = session.switchTask("five");
      runs.push(outputOf(session, run));
      const order: string[] = [];
      runs.forEach((one, i) => void one.then(() => order.push(`run ${i}`)));
      const closed = [session.close(), session.close(), session.close()];
      closed[0]!.then(() => order.push("closed"));
      await t.rejects(session.run(run), { tag: "backend", message: /closed/ });
      await t.rejects(session.switchTask("two"), { tag: "backend", message: /closed/ });
      t.match(await change, { task: "five" });
      t.ok(difference(await runs[0]!, golden("base", null)) <= 1e-5);
      t.ok(difference(await runs[1]!, golden("base", "five")) <= 1e-5);
      await Promise.all(closed);
      t.equal(order.at(-1), "closed", "runs under way come first");
      t.same(order.toSorted(), ["closed", "run 0", "run 1"]);
    }
  });
}

t.test("an engine that lacks an operator says which", async (t) => {
  const { ort } = RUNTIMES.at(-1)!;
  const refused = await refusal(async () => open(ort, model("branches"), await packFor("mlp")));
  t.match(refused, {
    tag: "backend",
    backend: "plain",
    message: /^the operator If, which makes ".+", is not known$/,
  });
});

t.test("a switch reads each task once, even where nothing stays in memory", async (t) => {
  const { ort } = ORTS[0]!;
  const pack = await packFor("base", { maxResidentBytes: 0 });
  const session = await open(ort, model("torchscript"), pack, { mode: "core" });
  const selections: Record<string, number>[] = [
    { two: 0.5, three: 0.5 },
    { five: 1, two: 0.1 },
  ];
  for (const selection of selections) {
    await session.switchTask(null);
    const { requests } = await session.switchTask(selection, { head: "two" });
    t.ok(requests >= 1 && requests <= 2, `${requests} requests for two tasks`);
  }
  await session.close();
  await pack.close();
});

t.test("blends, strengths and what a switch reports", async (t) => {
  const { ort } = ORTS[0]!;
  const names = ["core", "factors", "folded"] as const;
  const sessions: Session[] = [];
  for (const mode of names) sessions.push(await open(ort, model("torchscript"), await packFor("base"), { mode }));
  const selections: Record<string, number>[] = [
    { two: 0.5 },
    { two: 0.7, three: -0.2 },
    { five: 1, three: 0.5, two: 0.25 },
  ];
  for (const selection of selections) {
    const outputs: Float32Array[] = [];
    for (const session of sessions) {
      const report = await session.switchTask(selection, { head: Object.keys(selection)[0]! });
      t.same(report.task, selection);
      outputs.push(await outputOf(session, feeds(ort, session)));
    }
    // Folding adds weights, the other modes add outputs: one number in two ways.
    for (const [i, output] of outputs.entries()) t.ok(difference(output, outputs[2]!) <= 1e-5, `${names[i]} as folded`);
    t.ok(difference(outputs[0]!, golden("base", Object.keys(selection)[0]!)) > 1e-2, "not the first task alone");
  }
  const session = sessions[0]!;
  const selection = { two: 1 };
  await session.switchTask(selection);
  selection.two = 9;
  t.same(session.task, { two: 1 }, "a copy");
  t.ok(difference(await outputOf(session, feeds(ort, session)), golden("base", "two")) <= 1e-5);
  const warm = await session.switchTask("two");
  t.match(warm, { bytesRead: 0, requests: 0 });
  t.ok(warm.bytesFed > 0 && warm.milliseconds.total > 0);
  t.same(session.inputNames, ["input_ids", "attention_mask", "token_type_ids"]);
  t.same(session.outputNames, ["logits"], "the probe's are hidden");
  t.same(session.tasks.get("five")!.metadata.labels, ["five 0", "five 1", "five 2", "five 3", "five 4"]);
  t.throws(() => session.removeTask("two"), { message: /"two" is in use/ });
  session.removeTask("three");
  t.match(await refusal(() => session.switchTask("three")), { tag: "task" });
  for (const one of sessions) await one.close();
});
