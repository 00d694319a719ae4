/**
 * Every tiny model of test/data/sessions in every mode on every runtime in Node: it agrees with PyTorch and PEFT, or is refused by name
 * with a way out.
 */
import { openPack, type Pack } from "eigenlora";
import t, { type Test } from "tap";
import {
  checkTasks,
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
  packBytes,
  packFor,
  refusal,
} from "../support/sessions.ts";

/** Models whose weights nothing can be written into. */
const QUANTISED = ["q4", "int8", "qdq"];

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

async function check(t: Test, ort: Ort, name: string, pack: Pack, answers: string, mode: Mode): Promise<void> {
  const what = `${name}, ${mode}`;
  const opening = () => open(ort, model(name), pack, { mode, ...optionsOf(name) });
  if (mode === "folded" && QUANTISED.includes(name)) {
    const message = /quantised.*use mode "core" or "factors"/;
    t.match(await refusal(opening), { tag: "base", message, module: /encoder\.layer\.0/ }, what);
    return;
  }
  const session = await opening();
  t.match(session, { mode, probe: { result: mode === "folded" ? /^not needed/ : /^passed$/ } }, what);
  const tasks = Object.keys(GOLDENS.outputs[answers]!).filter((id) => pack.tasks.has(id));
  const allowed = (task: string | null): number => (task === null ? baseTolerance : tolerance)(name, mode);
  await checkTasks(t, session, feeds(ort, session), tasks, (task) => golden(answers, task), { allowed, what });
  await session.close();
}

for (const { name: runtime, ort } of ORTS) {
  t.test(`exports × modes on ${runtime}`, async (t) => {
    for (const [name, answers] of Object.entries(GOLDENS.models)) {
      const pack = await packFor(answers);
      for (const mode of MODES) await check(t, ort, name, pack, answers, mode);
    }
  });

  t.test(`what tasks bring × modes on ${runtime}`, async (t) => {
    for (const name of folders("adapters-more")) {
      const pack = await openPack(await packBytes([`adapters-more/${name}`], "base"));
      for (const mode of [undefined, "factors", "folded"] as const) {
        const session = await open(ort, model("torchscript"), pack, mode && { mode });
        t.equal(session.mode, mode ?? "core");
        await checkTasks(t, session, feeds(ort, session), [name], (task) => golden("base", task), {
          what: session.mode,
        });
        await session.close();
      }
    }
  });
}
