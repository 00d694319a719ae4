/** Figures of the paper, drawn from what was measured and from the adapters themselves. */

import { openPack } from "eigenlora";
import { buildPack, extractModule, projectAdapters } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import { drawLines } from "../chart.js";
import { data } from "../report.js";
import { STEPS } from "./cells.js";
import { K, METHODS, methodOf } from "./plan.js";
import { mean } from "./statistics.js";

/** @typedef {import("./tables.js").Reader} Reader */
/** @typedef {import("eigenlora/build").Adapter} Adapter */

/** In the figure of convergence, where there are cells. */
const CONVERGENCE = ["ours", "LoRA r 8", `LoRA r 8, init K ${K}`, "VeRA r 256", "PiSSA r 8", "head alone"];
/** In the figure of singular values. */
const COMPONENTS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128];
const TYPES = /** @type {const} */ ({ basis: "f32", coefficients: "f32", head: "f32" });

/**
 * @param {Reader} reader
 * @returns {Promise<Map<string, string>>} SVG by name
 */
export async function drawFigures(reader) {
  const figures = new Map([
    ["singular-values", await singularValues()],
    ["error-per-layer", await errorPerLayer(reader)],
  ]);
  for (const [name, figure] of /** @type {const} */ ([
    ["convergence", convergence(reader)],
    ["components", components(reader)],
  ])) {
    if (figure) figures.set(name, figure);
  }
  return figures;
}

/** How much of the adapters' rows lies outside the first components: mean over modules. */
async function singularValues() {
  const series = [];
  for (const suite of ["own-seed", "shared-seed"]) {
    const adapters = await readAdapters([data(`adapters/${suite}`)]);
    const modules = await Promise.all(
      [.../** @type {Adapter} */ (adapters[0]).modules.keys()].map((name) => extract(adapters, name)),
    );
    for (const side of /** @type {const} */ (["A", "B"])) {
      const shares = modules.map((module) => outside(module[side].singular));
      const points = shares[0].map((_, i) => [i + 1, 100 * mean(shares.map((share) => share[i]))]);
      series.push({ name: `${suite}, ${side}`, points: points.filter(([k]) => COMPONENTS.includes(k)) });
    }
    for (const adapter of adapters) await adapter.close();
  }
  return drawLines({
    title: "Twenty adapters: what K components leave out",
    x: "components K",
    y: "squared singular values outside, %",
    linear: true,
    series,
  });
}

/** @param {readonly Adapter[]} adapters @param {string} name of a module */
async function extract(adapters, name) {
  const first = /** @type {import("eigenlora/build").AdapterModule} */ (adapters[0].modules.get(name));
  const members = await Promise.all(
    adapters.map(async ({ id, modules }) => {
      const module = /** @type {import("eigenlora/build").AdapterModule} */ (modules.get(name));
      return { id, ...(await module.read()) };
    }),
  );
  const options = {
    gauge: "as-trained",
    centering: "keep",
    select: { kind: "k", k: 1 },
    basisDtype: "f32",
    coefficientDtype: "f32",
  };
  return extractModule(
    { name, out: first.out, in: first.in, members },
    /** @type {import("eigenlora/build").ExtractOptions} */ (options),
  );
}

/** Share of the sum of squares behind each value. @param {Float64Array} values */
function outside(values) {
  const squares = Array.from(values, (value) => value * value);
  const total = squares.reduce((a, b) => a + b, 0);
  let left = total;
  return squares.map((square) => (left -= square) / total);
}

/** ‖ΔW − ΔW'‖ / ‖ΔW‖ of each left-out adapter on the components of the others, mean over tasks. @param {Reader} reader */
async function errorPerLayer({ experiments }) {
  const { sections, debtags } = experiments;
  /** By kind of module and layer. @type {Map<string, number[][]>} */
  const found = new Map();
  for (const { suite, test, donors } of [sections, debtags]) {
    for (const id of test) {
      const adapters = await readAdapters(donors(id).map((one) => data(`adapters/${suite}/${one}`)));
      const [left] = await readAdapters([data(`adapters/${suite}/${id}`)]);
      const { chunks } = await buildPack(adapters, { select: { kind: "k", k: K }, dtype: TYPES });
      const pack = await openPack(new Uint8Array(Buffer.concat(chunks)));
      for (const [name, module] of left.modules) {
        const [, layer, kind] = /** @type {RegExpExecArray} */ (/layer\.(\d+)\..*\.(\w+)$/.exec(name));
        const [{ residual }] = await projectAdapters(
          pack,
          [{ ...left, saved: [], modules: new Map([[name, module]]) }],
          TYPES,
        );
        const layers = found.get(kind) ?? [];
        (layers[Number(layer)] ??= []).push(100 * residual.mean);
        found.set(kind, layers);
      }
      for (const adapter of [...adapters, left]) await adapter.close();
      await pack.close();
    }
  }
  const series = [...found].map(([name, layers]) => ({
    name,
    points: layers.map((errors, layer) => [layer + 1, mean(errors)]),
  }));
  return drawLines({
    title: `Left-out adapters on ${K} components of the others`,
    x: "layer",
    y: "error of ΔW, %",
    linear: true,
    even: true,
    series,
  });
}

/** Training loss against steps, mean over tasks and seeds of debtags. @param {Reader} reader */
function convergence(reader) {
  const { test } = reader.experiments.debtags;
  const series = METHODS.filter(({ name }) => CONVERGENCE.includes(name)).flatMap((plan) => {
    const cells = test.map((task) => reader.cells(plan, task));
    if (cells.some((of) => of.length === 0)) return [];
    const curves = cells.flat().map(({ loss }) => loss);
    const steps = STEPS / curves[0].length;
    return [
      { name: plan.name, points: curves[0].map((_, i) => [(i + 1) * steps, mean(curves.map((curve) => curve[i]))]) },
    ];
  });
  return (
    series.length > 0 &&
    drawLines({ title: "Training loss, mean over the tasks of debtags", x: "step", y: "loss", series })
  );
}

/** Accuracy against components, on rows that no donor has seen. @param {Reader} reader */
function components(reader) {
  const { test } = reader.experiments.sections;
  const accuracy = (/** @type {import("./plan.js").MethodPlan} */ plan) => {
    const cells = test.map((task) => reader.cells(plan, task));
    if (cells.some((of) => of.length === 0)) return NaN;
    return 100 * mean(cells.flatMap((of, i) => of.flatMap(({ answers }) => reader.right(test[i], answers, "kept"))));
  };
  const ours = METHODS.filter(
    ({ method, within, domains }) => method === "coefficients" && !within && domains.includes("sections"),
  );
  const points = ours
    .map((plan) => [plan.k ?? 0, accuracy(plan)])
    .filter(([, y]) => y > 0)
    .sort(([a], [b]) => a - b);
  const lines = ["LoRA r 8", "LoRA r 1", "head alone"]
    .map((name) => ({ name, y: accuracy(methodOf(name)) }))
    .filter(({ y }) => y > 0);
  return (
    points.length > 1 &&
    drawLines({
      title: "Sections: accuracy and components",
      x: "components K",
      y: "accuracy on unseen rows, %",
      linear: true,
      series: [{ name: "ours", points }],
      lines,
    })
  );
}
