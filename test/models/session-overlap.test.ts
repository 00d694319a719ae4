/**
 * Layers that one task brings whole and another adapts: in every mode a session answers as on a pack of that task
 * alone, or gives the reason why it cannot.
 */
import type { Adapter } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import t from "tap";
import { adapterOf, lora, save } from "../support/adapters.ts";
import { uniform } from "../support/internals/base.ts";
import { data, packed } from "../support/packs.ts";
import {
  difference,
  feeds,
  model,
  modesOn,
  NODE,
  open,
  outputOf,
  RUNTIMES,
  refusal,
  type Session,
} from "../support/sessions.ts";

const random = uniform(11);
const values = (count: number): Float32Array => Float32Array.from({ length: count }, () => random() - 0.5);

const [two] = await readAdapters([data("sessions/adapters/two")]);
const [labels, width] = [4, two!.saved.find(({ name }) => name === "classifier.weight")!.shape[1]!];
/** A hidden layer of 32 to 32, and its name. */
const hidden = [...two!.modules.values()].find(({ out, in: inputs }) => out === inputs)!;

const others = [...two!.modules.values()].filter(({ name }) => name !== hidden.name).slice(0, 2);
/** Brings the classifier and the hidden layer whole. */
const whole = adapterOf("whole", others, {
  saved: [
    save(values, "classifier.weight", "saved", [labels, width]),
    save(values, "classifier.bias", "saved", [labels]),
    save(values, `${hidden.name}.weight`, "saved", [hidden.out, hidden.in]),
  ],
});
/** Adapts both. */
const adapts = adapterOf(
  "adapts",
  [...others, lora(values, "classifier", labels, width), lora(values, hidden.name, hidden.out, hidden.in)],
  { saved: [save(values, "classifier.bias", "bias-delta", [labels])] },
);

async function answer(session: Session): Promise<Float32Array> {
  return (await outputOf(session, feeds(NODE, session))).slice();
}

/** Result of a session on a pack of its own. */
async function alone(
  adapters: readonly Adapter[],
  selection: Parameters<Session["switchTask"]>[0],
): Promise<Float32Array> {
  const session = await open(NODE, model("torchscript"), await packed(adapters), { mode: "factors" });
  await session.switchTask(selection);
  const found = await answer(session);
  await session.close();
  return found;
}

const without = (adapter: Adapter, ...modules: string[]): Adapter => ({
  ...adapter,
  modules: new Map([...adapter.modules].filter(([name]) => !modules.includes(name))),
  saved: adapter.saved.filter(({ name }) => !modules.includes(name.replace(/\.[^.]*$/, ""))),
});
const blend = { whole: 0.5, adapts: 0.25 };
const EXPECTED = {
  whole: await alone([whole], "whole"),
  adapts: await alone([adapts], "adapts"),
  base: await alone([whole], null),
  /** The other task without its changes to those layers. */
  headOfWhole: await alone([whole, without(adapts, "classifier", hidden.name)], blend),
  headOfAdapts: await alone([without(whole, "classifier", hidden.name), adapts], blend),
};

for (const { name, ort } of RUNTIMES) {
  t.test(`a layer that one task brings whole and another adapts, on ${name}`, async (t) => {
    const apart = Object.values(EXPECTED).flatMap((a, i, all) => all.slice(i + 1).map((b) => difference(a, b)));
    t.ok(Math.min(...apart) > 1e-3, "the answers tell the tasks apart");
    for (const mode of modesOn(name)) {
      for (const file of ["torchscript", "dynamo"]) {
        const session = await open(ort, model(file), await packed([whole, adapts]), { mode });
        const is = async (what: keyof typeof EXPECTED): Promise<void> => {
          const off = difference(await answer(session), EXPECTED[what]);
          t.ok(off <= 1e-5, `${mode}, ${file}, ${what}: off by ${off}`);
        };
        for (const step of ["whole", "adapts", null, "adapts", "whole", null] as const) {
          await session.switchTask(step);
          await is(step ?? "base");
        }
        t.match(await refusal(() => session.switchTask(blend)), {
          tag: "task",
          message: /"whole" brings "[\w.]+" whole and "adapts" changes.*\{ head: "whole" \} or \{ head: "adapts" \}/,
        });
        await is("base");
        await session.switchTask(blend, { head: "whole" });
        await is("headOfWhole");
        await session.switchTask(blend, { head: "adapts" });
        await is("headOfAdapts");
        if (mode !== "folded") {
          const rows = await outputOf(session, feeds(NODE, session), { tasks: ["whole", null, "adapts"] });
          for (const [row, what] of (["whole", "base", "adapts"] as const).entries()) {
            const [from, to] = [row * labels, (row + 1) * labels];
            const off = difference(rows.slice(from, to), EXPECTED[what].slice(from, to));
            t.ok(off <= 1e-5, `${mode}, ${file}, row of ${what}: off by ${off}`);
          }
        }
        await session.close();
      }
    }
  });
}
