/**
 * Layers that one task brings whole and another adapts: in every mode a session answers as on a pack of that task alone, or gives the
 * reason why it cannot.
 */
import { openPack, type Pack } from "eigenlora";
import { type Adapter, type AdapterModule, buildPack, type SavedTensor } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import t from "tap";
import { uniform } from "../support/internals/base.ts";
import { concat, data, LOSSLESS } from "../support/packs.ts";
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

function save(name: string, role: SavedTensor["role"], shape: readonly number[]): SavedTensor {
  const value = values(shape.reduce((a, b) => a * b, 1));
  return { name, role, shape, read: async () => value };
}

function lora(name: string, out: number, inputs: number, magnitude = false): AdapterModule {
  const term = { rank: 2, A: values(2 * inputs), Bt: values(2 * out), ...(magnitude && { magnitude: values(out) }) };
  return { name, out, in: inputs, layout: "out-in", rank: 2, read: async () => term };
}

function task(id: string, modules: readonly AdapterModule[], saved: readonly SavedTensor[]): Adapter {
  return { ...two!, id, metadata: {}, modules: new Map(modules.map((module) => [module.name, module])), saved };
}

const others = [...two!.modules.values()].filter(({ name }) => name !== hidden.name).slice(0, 2);
/** Brings the classifier and the hidden layer whole. */
const whole = task("whole", others, [
  save("classifier.weight", "saved", [labels, width]),
  save("classifier.bias", "saved", [labels]),
  save(`${hidden.name}.weight`, "saved", [hidden.out, hidden.in]),
]);
/** Adapts both. */
const adapts = task(
  "adapts",
  [...others, lora("classifier", labels, width), lora(hidden.name, hidden.out, hidden.in)],
  [save("classifier.bias", "bias-delta", [labels])],
);

async function packOf(...adapters: Adapter[]): Promise<Pack> {
  return openPack(concat((await buildPack(adapters, LOSSLESS)).chunks));
}

async function answer(session: Session): Promise<Float32Array> {
  return (await outputOf(session, feeds(NODE, session))).slice();
}

/** Result of a session on a pack of its own. */
async function alone(
  adapters: readonly Adapter[],
  selection: Parameters<Session["switchTask"]>[0],
): Promise<Float32Array> {
  const session = await open(NODE, model("torchscript"), await packOf(...adapters), { mode: "factors" });
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
        const session = await open(ort, model(file), await packOf(whole, adapts), { mode });
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
