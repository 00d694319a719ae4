/**
 * Tasks with sides of different kinds (SPEC.md, section 6.1): the same weights, terms and answers as with components on
 * both sides, on every backend, in every mode and with every tool.
 */
import { createRuntime, openPack } from "eigenlora";
import t from "tap";
import { backends, labelOf } from "../support/backend-list.ts";
import { relativeDifference } from "../support/compare.ts";
import { LOSSLESS, packOf, termDelta } from "../support/packs.ts";
import { difference, feeds, golden, MODES, model, open, outputOf, packFor, RUNTIMES } from "../support/sessions.ts";
import { inOtherWords } from "../support/sides.ts";

const TASKS = ["debtags-role", "debtags-game", "sections-1"];
const { bytes } = await packOf(
  TASKS.map((name) => `adapters/own-seed/${name}`),
  { ...LOSSLESS, select: { kind: "k", k: 6 } },
);
const words = await inOtherWords(await openPack(bytes));
const base = () =>
  openPack(words).then(
    ({ modules }) =>
      new Map(
        modules.map(({ name, out, in: inputs }, i) => [
          `${name}.weight`,
          { dtype: "f32" as const, shape: [out, inputs], data: new Float32Array(out * inputs).fill(0.01 * (i + 1)) },
        ]),
      ),
  );

t.test("the pack says what it holds", async (t) => {
  const pack = await openPack(words);
  const sides = pack.modules.slice(0, 6).map(({ A, B }) => `${A.length} ${B.length}`);
  t.same(sides, ["1 0", "0 1", "2 2", "1 1", "0 0", "1 1"]);
  const { terms } = await pack.load(TASKS[0]!);
  t.ok(terms[0]!.A && !terms[0]!.B && terms[0]!.ownBt && !terms[0]!.ownA, "A alone");
  t.ok(terms[3]!.A && terms[3]!.B && terms[3]!.ownA && terms[3]!.ownBt, "differences");
  t.ok(pack.tasks.get(TASKS[0]!)!.brings!.includes(`own-B ${pack.modules[0]!.name}`));
});

for (const options of await backends()) {
  const label = labelOf(options);
  t.test(`${label}: folded, and back to the bit`, async (t) => {
    const [plain, other] = [await openPack(bytes), await openPack(words)];
    const [first, second] = [await base(), await base()];
    const one = await createRuntime(plain, { ...options, base: first });
    const two = await createRuntime(other, { ...options, base: second });
    for (const selection of [TASKS[0]!, { [TASKS[1]!]: 0.7, [TASKS[2]!]: -0.4 }, TASKS[2]!]) {
      const how = typeof selection === "string" ? {} : { head: TASKS[1]! };
      await one.switchTask(selection, how);
      await two.switchTask(selection, how);
      for (const [name, { data }] of first) {
        const off = relativeDifference(second.get(name)!.data, data);
        if (!(off < 2e-6)) t.fail(`${JSON.stringify(selection)}, ${name}: off by ${off}`);
      }
    }
    await two.switchTask(null);
    const pristine = await base();
    for (const [name, { data }] of second) if (data.some((v, i) => v !== pristine.get(name)!.data[i])) t.fail(name);
    await one.close();
    await two.close();
  });

  t.test(`${label}: unfolded, and applied to rows`, async (t) => {
    for (const mode of ["core", "factors"] as const) {
      const runtimes = [];
      for (const file of [bytes, words]) runtimes.push(await createRuntime(await openPack(file), { ...options, mode }));
      for (const selection of [TASKS[0]!, { [TASKS[1]!]: 0.7, [TASKS[2]!]: -0.4 }]) {
        const how = typeof selection === "string" ? {} : { head: TASKS[1]! };
        for (const runtime of runtimes) await runtime.switchTask(selection, how);
        for (const { name, in: inputs, out } of runtimes[0]!.pack.modules) {
          const x = Float32Array.from({ length: 3 * inputs }, (_, i) => Math.sin(i));
          const [y, z] = [new Float32Array(3 * out), new Float32Array(3 * out)];
          const view = (data: Float32Array, width: number) => {
            return { dtype: "f32" as const, shape: [3, width], data: new Uint8Array(data.buffer), byteOffset: 0 };
          };
          for (const [i, to] of [y, z].entries())
            await runtimes[i]!.apply(name, view(x, inputs), view(to, out), { tasks: [TASKS[0]!, null, TASKS[2]!] });
          const off = relativeDifference(z, y);
          if (!(off < 5e-6)) t.fail(`${mode}, ${name}: rows are off by ${off}`);
          const [expected, found] = await Promise.all(
            runtimes.map((runtime) => termDelta(runtime.term(name)!, runtime.pack, name)),
          );
          const delta = relativeDifference(found!, expected!);
          if (!(delta < 5e-6)) t.fail(`${mode}, ${JSON.stringify(selection)}, ${name}: off by ${delta}`);
        }
      }
      t.ok(runtimes[1]!.term(runtimes[1]!.pack.modules[5]!.name)!.core === undefined || mode === "core");
      for (const runtime of runtimes) await runtime.close();
    }
  });
}

for (const { name, ort } of RUNTIMES) {
  t.test(`${name}: the answers of PEFT's merge, in every mode`, async (t) => {
    const plain = await packFor("base");
    const pack = await openPack(await inOtherWords(plain));
    for (const mode of MODES) {
      const session = await open(ort, model("torchscript"), pack, { mode });
      if (mode !== "folded") t.equal(session.probe.result, "passed", `${mode}: ${session.reason}`);
      for (const task of [...pack.tasks.keys(), null]) {
        await session.switchTask(task);
        const off = difference(await outputOf(session, feeds(ort, session)), golden("base", task));
        t.ok(off < 2e-5, `${mode}, ${task}: off by ${off}`);
      }
      await session.close();
    }
  });
}
