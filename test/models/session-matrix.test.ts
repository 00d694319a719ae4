/**
 * Every tiny model of test/data/sessions in every mode on every runtime in Node: it agrees with PyTorch and PEFT, or is refused by name
 * with a way out. Prints the table.
 */
import { openPack, type Pack } from "eigenlora";
import t, { type Test } from "tap";
import {
  difference,
  feeds,
  folders,
  GOLDENS,
  golden,
  MODES,
  type Mode,
  model,
  type Options,
  ORTS,
  type Ort,
  open,
  outputOf,
  packBytes,
  packFor,
  refusal,
} from "../support/sessions.ts";

/** Impossible combinations, and the expected message. */
const REFUSED: Record<string, { modes: readonly Mode[]; says: RegExp }> = {
  q4: { modes: ["folded"], says: /quantised.*use mode "core" or "factors"/ },
  int8: { modes: ["folded"], says: /quantised.*use mode "core" or "factors"/ },
  qdq: { modes: ["folded"], says: /quantised.*use mode "core" or "factors"/ },
};

/** Tolerance of tasks against PyTorch: rounding of f32, of folded f16 weights, of arithmetic in f16. */
function tolerance(name: string, mode: Mode): number {
  if (name === "half") return 5e-3;
  return name === "f16" && mode === "folded" ? 2e-3 : 1e-5;
}

/** The base of int8 and qdq has a quantised head; as a graph input it is float. */
function baseTolerance(name: string, mode: Mode): number {
  return name === "int8" || name === "qdq" ? 1e-2 : tolerance(name, mode);
}

const optionsOf = (name: string): Options => (name === "encoder" ? { ignore: ["classifier"] } : {});

/** A line of the table: the largest difference over all tasks, or the refusal. */
async function check(t: Test, ort: Ort, name: string, pack: Pack, answers: string, mode: Mode): Promise<string> {
  const what = `${name}, ${mode}`;
  const refused = REFUSED[name];
  if (refused?.modes.includes(mode)) {
    const error = await refusal(() => open(ort, model(name), pack, { mode, ...optionsOf(name) }));
    t.match(error, { tag: "base", message: refused.says, module: /encoder\.layer\.0/ }, `${what}: ${error.message}`);
    return "refused";
  }
  const session = await open(ort, model(name), pack, { mode, ...optionsOf(name) });
  t.match(session, { mode, probe: { result: mode === "folded" ? /^not needed/ : /^passed$/ } }, what);
  let [worst, failed] = [0, ""];
  for (const task of [null, ...Object.keys(GOLDENS.outputs[answers]!).filter((id) => pack.tasks.has(id)), null]) {
    await session.switchTask(task);
    const off = difference(await outputOf(session, feeds(ort, session)), golden(answers, task));
    const allowed = (task === null ? baseTolerance : tolerance)(name, mode);
    if (!(off <= allowed)) failed += `${task}: ${off} `;
    worst = Math.max(worst, off);
  }
  t.equal(failed, "", `${what} agrees`);
  await session.close();
  return worst.toExponential(0);
}

for (const { name: runtime, ort } of ORTS) {
  t.test(`exports × modes on ${runtime}`, async (t) => {
    t.comment(`${runtime}: largest difference from PyTorch over all tasks`);
    t.comment(["model", ...MODES].map((cell) => cell.padEnd(18)).join(""));
    for (const [name, answers] of Object.entries(GOLDENS.models)) {
      const pack = await packFor(answers);
      const cells = [name];
      for (const mode of MODES) cells.push(await check(t, ort, name, pack, answers, mode));
      t.comment(cells.map((cell) => cell.padEnd(18)).join(""));
    }
  });

  t.test(`what tasks bring × modes on ${runtime}`, async (t) => {
    for (const name of folders("adapters-more")) {
      const pack = await openPack(await packBytes([`adapters-more/${name}`], "base"));
      const cells = [name];
      const works = async (mode: Mode | "auto", expected: Mode): Promise<string> => {
        const session = await open(ort, model("torchscript"), pack, { mode });
        await session.switchTask(name);
        const off = difference(await outputOf(session, feeds(ort, session)), golden("base", name));
        await session.switchTask(null);
        const left = difference(await outputOf(session, feeds(ort, session)), golden("base", null));
        t.ok(off <= 1e-5 && left <= 1e-5, `${name}, ${mode}: off by ${off}, back at the base by ${left}`);
        t.equal(session.mode, expected);
        await session.close();
        return off.toExponential(0);
      };
      for (const mode of ["auto", ...MODES] as const) cells.push(await works(mode, mode === "auto" ? "core" : mode));
      t.comment(cells.map((cell) => cell.padEnd(18)).join(""));
    }
  });
}
