/**
 * What a switch allocates, in mode "core": nothing for cores once two selections have been there. Arrays are told apart by what an
 * engine gets, and a run that is under way keeps the numbers that it began with.
 */
import t from "tap";
import type { EngineTensor } from "../dist/src/session/engine.js";
import { PlainEngine, PlainTensor } from "./plain-engine.ts";
import { difference, feeds, golden, model, type Ort, open, outputOf, packFor } from "./sessions.ts";

t.test("cores are written over those of a selection that is gone", async (t) => {
  const made: { data: unknown; dims: readonly number[] }[] = [];
  class Watched extends PlainEngine {
    override tensor(...[data, dims, type]: Parameters<PlainEngine["tensor"]>): EngineTensor {
      made.push({ data, dims });
      return super.tensor(data, dims, type);
    }
  }
  const ort = { Tensor: PlainTensor as unknown as Ort["Tensor"], engine: new Watched() };
  const session = await open(ort, model("torchscript"), await packFor("base"), { mode: "core" });
  const run = feeds(ort, session);
  const given: unknown[][] = [];
  let worst = 0;
  for (const task of ["two", "three", null, "five", "two", null, "three", "two"] as const) {
    made.length = 0;
    await session.switchTask(task);
    // [1, K_A, K_B], K is 22 here.
    given.push(made.filter(({ dims }) => dims[1] === 22).map(({ data }) => data));
    worst = Math.max(worst, difference(await outputOf(session, run), golden("base", task)));
  }
  const [first = []] = given;
  t.ok(first.length > 0, `${first.length} inputs hold cores`);
  for (const i of first.keys())
    t.equal(new Set(given.map((cores) => cores[i])).size, 2, "two arrays serve all switches");
  t.ok(worst < 1e-4, `largest difference from PEFT's logits ${worst}`);

  // A run that began before two switches has to keep its numbers.
  await session.switchTask("two");
  const early = outputOf(session, run);
  await Promise.all([session.switchTask("three"), session.switchTask("five")]);
  t.ok(difference(await early, golden("base", "two")) < 1e-4, "a run under way has what it began with");
  await session.close();
});
