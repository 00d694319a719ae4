/**
 * How fast is extraction beside numpy's full SVD of the same stacks, in the same run? Ours is timed twice: the components alone
 * (means, centring, top K), and all of `extractModule`: both sides' components, stored as f16, every task's coefficients and ΔW
 * errors. Against both stands numpy's SVD alone, in f64 and in f32, with one thread, as ours, and with `--own-threads` also with as
 * many as it takes by itself. Ours and numpy's take turns; of each module the best round counts.
 *
 * node benchmarks/extract.js [--suite sdxl|own-seed|shared-seed|hub] [--rounds N] [--own-threads] [--json]
 */
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { extractModule } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { centred, columnMeans, principalComponents } from "../dist/src/extract/components.js";
import { createWasmProducts } from "../dist/src/extract/wasm-products.js";
import { data, option, print, startPython, startPythonFreely } from "./report.js";
import { adaptersOf, SETTINGS } from "./shapes.js";

/** @typedef {{ name: string, modules: number, stack: import("eigenlora/build").ModuleStack }} Case `modules`: so many are of this shape */
/** @typedef {{ wall: number, cpu: number, lost?: number[] }} Times seconds */
/** @typedef {Extract<Awaited<ReturnType<typeof startPython>>, { ask: unknown }>} Numpy */

const ROUNDS = Number(option("rounds") ?? 3);
const products = await createWasmProducts();

/** @type {Record<string, { k: number, cases(): Promise<Case[]> }>} */
const SUITES = {
  // One module of each shape stands for all of them.
  sdxl: {
    k: SETTINGS.sdxl.components,
    cases: () =>
      casesOf(
        adaptersOf(
          "sdxl",
          SETTINGS.sdxl.groups.map(([, out, inputs]) => [1, out, inputs]),
        ),
        SETTINGS.sdxl.groups.map(([count]) => count),
      ),
  },
  "own-seed": { k: 32, cases: () => suite("own-seed") },
  "shared-seed": { k: 32, cases: () => suite("shared-seed") },
  hub: { k: 32, cases: () => suite("hub") },
};

/** @param {string} name */
async function suite(name) {
  const adapters = await readAdapters([data(`adapters/${name}`)]);
  const cases = await casesOf(adapters);
  for (const adapter of adapters) await adapter.close();
  return cases;
}

/**
 * @param {readonly import("eigenlora/build").Adapter[]} adapters
 * @param {readonly number[]} [counts]
 * @returns {Promise<Case[]>}
 */
async function casesOf(adapters, counts) {
  const cases = [];
  for (const [index, name] of [...adapters[0].modules.keys()].entries()) {
    const members = [];
    for (const { id, modules } of adapters) {
      const module = modules.get(name);
      if (module) members.push({ id, ...(await module.read()) });
    }
    const { out, in: inputs } = /** @type {import("eigenlora/build").AdapterModule} */ (adapters[0].modules.get(name));
    cases.push({ name, modules: counts?.[index] ?? 1, stack: { name, out, in: inputs, members } });
  }
  return cases;
}

/** @template T @param {() => T} work @returns {Times & { result: T }} */
function timed(work) {
  const [before, start] = [process.cpuUsage(), performance.now()];
  const result = work();
  const wall = (performance.now() - start) / 1000;
  const { user, system } = process.cpuUsage(before);
  return { wall, cpu: (user + system) / 1e6, result };
}

/** The two stacks of a module. @param {Case} one */
function sidesOf({ stack: { out, in: inputs, members } }) {
  const rows = members.reduce((sum, { rank }) => sum + rank, 0);
  return [
    { name: /** @type {const} */ ("A"), rows, width: inputs },
    { name: /** @type {const} */ ("Bt"), rows, width: out },
  ].map((side) => {
    const values = new Float32Array(side.rows * side.width);
    let at = 0;
    for (const member of members) {
      values.set(member[side.name], at);
      at += member[side.name].length;
    }
    return { ...side, values };
  });
}

/** @param {ReturnType<typeof sidesOf>} sides @param {number} k @returns {Times} */
function components(sides, k) {
  const stacks = sides.map((side) => ({ ...side, x: new Float64Array(side.values) }));
  const { wall, cpu, result } = timed(() =>
    stacks.map(({ x, rows, width }) => {
      const centre = centred(x, rows, width, columnMeans(x, rows, width));
      return { centre, rows, width, ...principalComponents(centre, rows, width, new Float64Array(rows), k, products) };
    }),
  );
  const lost = result.map(
    ({ centre, rows, width, vectors, total }) =>
      1 -
      products.multiplyTransposed(centre, vectors, rows, k, width).reduce((sum, value) => sum + value * value, 0) /
        total,
  );
  return { wall, cpu, lost };
}

/** @param {string} name @param {string} scratch @param {{ one?: Numpy, free?: Numpy }} numpy @returns {Promise<import("./report.js").Row>} */
async function compare(name, scratch, numpy) {
  const { k, cases } = SUITES[name];
  /** @type {Record<string, number>} */
  const sums = {};
  let [apart, modules] = [0, 0];
  for (const one of await cases()) {
    const sides = sidesOf(one);
    const file = join(scratch, "stacks");
    await writeFile(file, Buffer.concat(sides.map(({ values }) => new Uint8Array(values.buffer))));
    const question = { file, stacks: sides.map(({ rows, width }) => [rows, width]), k };
    /** @type {Record<string, Times[]>} */
    const times = {};
    /** @param {string} way @param {Times | undefined} time */
    const keep = (way, time) => time && (times[way] ??= []).push(time);
    for (let round = 0; round < ROUNDS; round++) {
      keep("components", components(sides, k));
      keep(
        "extraction",
        timed(() =>
          extractModule(one.stack, {
            gauge: "as-trained",
            centering: "keep",
            select: { kind: "k", k },
            basisDtype: "f16",
            coefficientDtype: "f16",
            products,
          }),
        ),
      );
      for (const dtype of ["float64", "float32"]) {
        keep(`numpy ${dtype}`, await numpy.one?.ask({ ...question, dtype }));
        // Where the machine is shared its threads wait for each other, and a round may take a minute.
        if (round === 0) keep(`numpy ${dtype}, free`, await numpy.free?.ask({ ...question, dtype }));
      }
    }
    for (const [way, all] of Object.entries(times)) {
      for (const clock of /** @type {const} */ (["wall", "cpu"])) {
        sums[`${way} ${clock}`] =
          (sums[`${way} ${clock}`] ?? 0) + one.modules * Math.min(...all.map((time) => time[clock]));
      }
    }
    const exact = times["numpy float64"]?.[0].lost;
    if (exact) times.components[0].lost?.forEach((lost, i) => (apart = Math.max(apart, (lost - exact[i]) / exact[i])));
    modules += one.modules;
  }
  const per = (/** @type {string} */ way) => (sums[way] === undefined ? null : (1000 * sums[way]) / modules);
  const fastest = Math.min(sums["numpy float64 cpu"], sums["numpy float32 cpu"]);
  const freely = Math.min(sums["numpy float64, free wall"], sums["numpy float32, free wall"]);
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
    ...(numpy.free && {
      "its own threads: f64, ms": per("numpy float64, free wall"),
      "its own threads: numpy ÷ extraction": ratio(freely, "extraction wall"),
    }),
    "error above numpy's": numpy.one ? Math.max(0, apart) : null,
  };
}

const scratch = await mkdtemp(join(tmpdir(), "eigenlora-bench-"));
const numpy = [
  await startPython("extract.py"),
  ...(process.argv.includes("--own-threads") ? [await startPythonFreely("extract.py")] : []),
];
try {
  const [one, free] = numpy.map((process) => ("ask" in process ? process : undefined));
  const only = option("suite");
  const rows = [];
  for (const name of Object.keys(SUITES))
    if (!only || name === only) rows.push(await compare(name, scratch, { ...(one && { one }), ...(free && { free }) }));
  print({
    question: "How long does extraction take, per module, beside numpy's full SVD of the same stacks?",
    rows,
    notes: [
      "extraction: components of both sides, coefficients, ΔW errors, all stored as f16. components: means, centring and top K alone.",
      "numpy: mean, centring and svd(full_matrices=False) of both sides, one thread; ratios to the faster of f64 and f32. Times of one",
      "thread are CPU times, which others on the machine lengthen least; its own threads are wall times. Error: ‖X − X·EᵀE‖² above numpy's f64, relative.",
    ],
    peers: [
      one
        ? { name: "numpy", version: one.first.version }
        : { name: "numpy", reason: "reason" in numpy[0] ? numpy[0].reason : "" },
    ],
  });
} finally {
  for (const process of numpy) if ("stop" in process) process.stop();
  await rm(scratch, { recursive: true });
}
