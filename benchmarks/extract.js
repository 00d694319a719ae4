/**
 * Times extraction, compared with numpy's full SVD of the same stacks in the same run. Ours is timed twice: the
 * components alone (means, centring, top K), and all of `extractModule`: both sides' components, stored as f16, every
 * task's coefficients and ΔW errors. Against both stands numpy's SVD alone, in f64 and in f32, with one thread, as
 * ours, and with `--own-threads` also with as many as it takes by itself. Ours and numpy's take turns; of each module
 * the best round counts.
 */
import { min } from "simple-statistics";
import { choice, flag, number, readArguments } from "./lib/arguments.js";
import { measureModule, STACKS } from "./lib/extraction.js";
import { peerLine, startPython } from "./lib/peers.js";
import { inScratch } from "./lib/process.js";
import { print } from "./lib/report.js";

/** @typedef {import("./lib/extraction.js").StacksName} StacksName */

const names = /** @type {StacksName[]} */ (Object.keys(STACKS));
const { json, suite, rounds, ...rest } = readArguments("How fast is extraction, compared with numpy's full SVD?", {
  suite: choice(names, "this one alone"),
  rounds: number("rounds of each module", 3, 1),
  "own-threads": flag("numpy also with as many threads as it takes by itself"),
});

const one = await startPython("extract.py");
const free = rest["own-threads"] ? await startPython("extract.py", [], { threads: Infinity }) : undefined;
const numpy = [one, free].map((peer) => (peer && "ask" in peer ? peer : undefined));
try {
  const rows = await inScratch(async (scratch) => {
    const rows = [];
    for (const name of names) if (!suite || name === suite) rows.push(await compare(name, scratch));
    return rows;
  });
  const question = "How long does extraction take, per module, compared with numpy's full SVD of the same stacks?";
  const notes = [
    "extraction: components of both sides, coefficients, ΔW errors, all stored as f16. components: means, centring and top K alone.",
    "numpy: mean, centring and svd(full_matrices=False) of both sides, one thread; ratios to the faster of f64 and f32. Times of one",
    "thread are CPU times, which others on the machine lengthen least; its own threads are wall times. Error: ‖X − X·EᵀE‖² above numpy's f64, relative.",
  ];
  print(json, [{ question, rows, notes }], [peerLine("numpy", one)]);
} finally {
  for (const peer of numpy) peer?.stop();
}

/** @param {StacksName} name @param {string} scratch @returns {Promise<import("./lib/report.js").Row>} */
async function compare(name, scratch) {
  const { k, cases } = STACKS[name];
  /** @type {Record<string, number>} */
  const sums = {};
  let [apart, modules] = [0, 0];
  for (const module of await cases()) {
    const times = await measureModule(module, { k, rounds, scratch, one: numpy[0], free: numpy[1] });
    for (const [way, all] of Object.entries(times)) {
      for (const clock of /** @type {const} */ (["ms", "cpu"])) {
        const key = `${way} ${clock}`;
        sums[key] = (sums[key] ?? 0) + module.modules * min(all.map((time) => time[clock]));
      }
    }
    const exact = times["numpy float64"]?.[0].lost;
    if (exact) times.components[0].lost?.forEach((lost, i) => (apart = Math.max(apart, (lost - exact[i]) / exact[i])));
    modules += module.modules;
  }
  const per = (/** @type {string} */ way) => (sums[way] === undefined ? null : sums[way] / modules);
  const fastest = Math.min(sums["numpy float64 cpu"], sums["numpy float32 cpu"]);
  const freely = Math.min(sums["numpy float64, free ms"], sums["numpy float32, free ms"]);
  /** @param {number} numerator @param {string} way */
  const ratio = (numerator, way) => (Number.isFinite(numerator) ? numerator / sums[way] : null);
  return {
    name: `${name}, K ${k}`,
    modules,
    "extraction, ms": per("extraction cpu"),
    "components, ms": per("components cpu"),
    "numpy f64, ms": per("numpy float64 cpu"),
    "f32, ms": per("numpy float32 cpu"),
    "numpy ÷ extraction": ratio(fastest, "extraction cpu"),
    "numpy ÷ components": ratio(fastest, "components cpu"),
    ...(numpy[1] && {
      "its own threads: f64, ms": per("numpy float64, free ms"),
      "its own threads: numpy ÷ extraction": ratio(freely, "extraction ms"),
    }),
    "error above numpy's": numpy[0] ? Math.max(0, apart) : null,
  };
}
