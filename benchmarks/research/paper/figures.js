/** Draws the paper's figures from measurements and from the adapters themselves. */

import { openPack } from "eigenlora";
import { projectAdapters } from "eigenlora/build";
import { mean, sum } from "simple-statistics";
import { extractModule } from "../../../dist/src/extract/extract.js";
import { folderOf, packOf, stacksOf, withAdapters } from "../../lib/adapters.js";
import { drawLines } from "../../lib/charts.js";
import { STEPS } from "./cells.js";
import { K, METHODS, methodOf } from "./plan.js";

/** @typedef {import("./tables.js").Reader} Reader */
/** @typedef {import("eigenlora/build").Adapter} Adapter */

/** Ways in the figure of convergence, where there are cells. */
const CONVERGENCE = ["ours", "LoRA r 8", `LoRA r 8, init K ${K}`, "VeRA r 256", "PiSSA r 8", "head alone"];
/** Numbers of components in the figure of singular values. */
const COMPONENTS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128];
/** @type {import("../../../dist/src/extract/options.js").ExtractOptions} */
const EXTRACT = {
  gauge: "as-trained",
  centering: "keep",
  // All singular values are wanted.
  select: { kind: "energy", share: 1 },
  basisDtype: "f32",
  coefficientDtype: "f32",
};
const DTYPES = /** @type {const} */ ({ basis: "f32", coefficients: "f32", head: "f32" });

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

/** Share of the adapters' rows outside the first components: mean over modules. */
async function singularValues() {
  const series = [];
  for (const suite of /** @type {const} */ (["own-seed", "shared-seed"])) {
    const modules = await withAdapters([folderOf(suite)], async (adapters) =>
      Promise.all((await stacksOf(adapters)).map((stack) => extractModule(stack, EXTRACT))),
    );
    for (const side of /** @type {const} */ (["A", "B"])) {
      const shares = modules.map((module) => outside(module[side].singular));
      const points = shares[0].map((_, i) => [i + 1, 100 * mean(shares.map((share) => share[i]))]);
      series.push({ name: `${suite}, ${side}`, points: points.filter(([k]) => COMPONENTS.includes(k)) });
    }
  }
  return drawLines({
    title: "Twenty adapters: what K components leave out",
    x: "components K",
    y: "squared singular values outside, %",
    linear: true,
    series,
  });
}

/** Share of the sum of squares behind each value. @param {Float64Array} values */
function outside(values) {
  const squares = Array.from(values, (value) => value * value);
  const total = sum(squares);
  let left = total;
  return squares.map((square) => (left -= square) / total);
}

/** ‖ΔW − ΔW'‖ / ‖ΔW‖ of each left-out adapter on the components of the others, mean over tasks. @param {Reader} reader */
async function errorPerLayer({ experiments }) {
  const { sections, debtags } = experiments;
  /** Errors by kind of module and layer. @type {Map<string, number[][]>} */
  const found = new Map();
  for (const { suite, test, donors } of [sections, debtags]) {
    for (const id of test) {
      const others = donors(id).map((one) => folderOf(suite, one));
      const options = { select: { kind: /** @type {const} */ ("k"), k: K }, dtype: DTYPES };
      const pack = await openPack(await withAdapters(others, (adapters) => packOf(adapters, options)));
      for (const { layer, kind, error } of await withAdapters([folderOf(suite, id)], ([left]) =>
        errorsOf(pack, left),
      )) {
        const layers = found.get(kind) ?? [];
        (layers[layer] ??= []).push(100 * error);
        found.set(kind, layers);
      }
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

/** Error of each module. @param {import("eigenlora").Pack} pack @param {Adapter} adapter */
async function errorsOf(pack, adapter) {
  const errors = [];
  for (const [name, module] of adapter.modules) {
    const [, layer, kind] = /** @type {RegExpExecArray} */ (/layer\.(\d+)\..*\.(\w+)$/.exec(name));
    const alone = { ...adapter, saved: [], modules: new Map([[name, module]]) };
    const [{ residual }] = await projectAdapters(pack, [alone], DTYPES, { maxLoss: 1 });
    errors.push({ layer: Number(layer), kind, error: residual.mean });
  }
  return errors;
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
