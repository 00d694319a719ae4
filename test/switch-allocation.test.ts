/**
 * Allocations of a switch: none for cores and factors once two selections have been used. Arrays are told apart by what the engine
 * receives, and a pending run keeps its numbers.
 */
import type { EngineTensor } from "eigenlora/session";
import t, { type Test } from "tap";
import { reuse } from "./internals.ts";
import { PlainEngine, PlainTensor } from "./plain-engine.ts";
import { difference, feeds, golden, model, type Ort, open, outputOf, packFor } from "./sessions.ts";

/** Switches on a session of one mode. @returns the engine's inputs, and whether answers are right */
async function watched(t: Test, mode: "core" | "factors", isTerm: (dims: readonly number[]) => boolean): Promise<void> {
  const made: { data: unknown; dims: readonly number[] }[] = [];
  class Watched extends PlainEngine {
    override tensor(...[data, dims, type]: Parameters<PlainEngine["tensor"]>): EngineTensor {
      made.push({ data, dims });
      return super.tensor(data, dims, type);
    }
  }
  const ort = { Tensor: PlainTensor as unknown as Ort["Tensor"], engine: new Watched() };
  const session = await open(ort, model("torchscript"), await packFor("base"), { mode });
  const run = feeds(ort, session);
  const given: unknown[][] = [];
  let worst = 0;
  // Factors of other ranks lie in other arrays; these two have rank 4.
  const some = ["two", "three", "two", "three", "two"] as const;
  const tasks = mode === "core" ? ([...some, null, "five", "two", null, "three", "two"] as const) : some;
  for (const task of tasks) {
    made.length = 0;
    await session.switchTask(task);
    given.push(made.filter(({ dims }) => isTerm(dims)).map(({ data }) => data));
    worst = Math.max(worst, difference(await outputOf(session, run), golden("base", task)));
  }
  const [first = []] = given;
  t.ok(first.length > 0, `${first.length} inputs hold terms`);
  for (const i of first.keys())
    t.equal(new Set(given.map((cores) => cores[i])).size, 2, "two arrays serve all switches");
  t.ok(worst < 1e-4, `largest difference from PEFT's logits ${worst}`);

  // A run that began before two switches has to keep its numbers.
  await session.switchTask("two");
  const early = outputOf(session, run);
  await Promise.all([session.switchTask("three"), session.switchTask("five")]);
  t.ok(difference(await early, golden("base", "two")) < 1e-4, "a run under way has what it began with");
  await session.close();
}

t.test("factors of a lower rank lie in the memory of those before them", async (t) => {
  const [sixteen, seven] = [reuse(undefined, 16), reuse(undefined, 7)];
  const eight = reuse(sixteen, 8);
  t.equal(eight.length, 8);
  t.equal(eight.buffer, sixteen.buffer);
  t.equal(reuse(eight, 16).buffer, sixteen.buffer, "and grow again in it");
  t.not(reuse(eight, 7).buffer, sixteen.buffer, "more than half of it would be of no use");
  t.not(reuse(seven, 8).buffer, seven.buffer);
  t.not(reuse(sixteen.subarray(8), 6).buffer, sixteen.buffer, "a part of another array is not written over");

  // Two sets of arrays serve in turns: "five", of rank 3, lies in that of "two", of rank 4, and memory counts all of it.
  const heldBy = async (...tasks: string[]): Promise<number> => {
    const ort = { Tensor: PlainTensor as unknown as Ort["Tensor"], engine: new PlainEngine() };
    const session = await open(ort, model("torchscript"), await packFor("base"), { mode: "factors" });
    for (const task of tasks) await session.switchTask(task);
    const { active } = session.memory();
    await session.close();
    return active;
  };
  t.ok((await heldBy("two", "three", "five")) > (await heldBy("five")));
});

t.test("cores are written over those of a selection that is gone", (t) =>
  // [1, K_A of all layers, K_B], K is 22 here.
  watched(t, "core", ([, , width]) => width === 22),
);

t.test("and so are factors", (t) =>
  // [1, in, rank] and [1, rank, out].
  watched(t, "factors", ([, height, width]) => height === 4 || width === 4),
);
