/** Draws figures of the measurements. */
import { mean } from "simple-statistics";
import { drawLines, sideBySide } from "../../lib/charts.js";
import { CURVES, pairsOf } from "./curve.js";
import { LORA } from "./tables.js";

/**
 * @typedef {import("./tables.js").Reader} Reader
 * @typedef {import("./tables.js").Point} Point
 * @typedef {import("./suite.js").Suite} Suite
 */

/** @param {Reader} reader @returns {Map<string, string>} SVG by name: of each suite, few adapters beside all */
export function drawFigures(reader) {
  /** @type {Map<string, string>} */
  const figures = new Map();
  for (const suite of reader.suites) {
    const sizes = [suite.sizes[0], suite.adapters.length];
    for (const [what, draw] of /** @type {const} */ ([
      ["accuracy", drawAccuracy],
      ["error", drawErrors],
    ])) {
      const panels = sizes.map((n) => draw(reader, suite, n)).filter((svg) => svg !== undefined);
      if (panels.length > 0) figures.set(`${suite.name}-${what}`, sideBySide(panels));
    }
  }
  return figures;
}

/**
 * Draws a curve for each suite: coded and shared beside coded alone, with little else, over the measured range.
 * @param {readonly import("./measure.js").Row[]} rows
 * @param {readonly import("./tables.js").Distilled[]} distilled
 * @returns {Map<string, string>} SVG by name
 */
export function drawCurves(rows, distilled) {
  /** @type {Map<string, string>} */
  const figures = new Map();
  for (const curve of CURVES) {
    const own = rows.filter(({ suite, n }) => suite === curve.suite && n === curve.n);
    const lora = own.find(({ way }) => way === LORA)?.accuracy;
    const pairs = pairsOf(curve, own);
    const trained = distilled.filter((one) => one.suite === curve.suite && one.before && one.bytes <= curve.most);
    const chosen = [
      { name: "cut by SVD", rows: pairs.map(({ theirs }) => theirs) },
      { name: "shared, by ΔW error", rows: pairs.map(({ ours }) => ours) },
      { name: "shared, by text", rows: curve.judges ? pairs.map(({ judged }) => judged) : [] },
    ];
    const panels = [
      panel(
        curve,
        "mean accuracy, %",
        [
          ...chosen,
          { name: "shared, distilled", rows: trained },
          { name: "before distilling", rows: trained.map(({ before }) => before) },
        ],
        ({ accuracy }) => accuracy && mean(accuracy),
        lora,
      ),
      panel(curve, "mean ΔW error, %", chosen.slice(0, 2), ({ error }) => error),
    ].filter((svg) => svg !== undefined);
    if (panels.length > 0) figures.set(`${curve.suite}-curve`, sideBySide(panels));
  }
  return figures;
}

/**
 * @typedef {{ bytes: number, accuracy?: number[], error?: number }} Measured
 * @param {import("./curve.js").Curve} curve
 * @param {string} y
 * @param {readonly { name: string, rows: readonly (Measured | undefined)[] }[]} chosen
 * @param {(row: Measured) => number | undefined} of
 * @param {number[]} [lora]
 */
function panel({ suite, n }, y, chosen, of, lora) {
  const series = chosen
    .map(({ name, rows }) => ({
      name,
      points: [...new Set(rows)].flatMap((row) => pointsOf(row, of)).sort(([a], [b]) => a - b),
    }))
    .filter(({ points }) => points.length > 0);
  if (series.length === 0) return undefined;
  const lines = lora && y.includes("accuracy") ? [{ name: "LoRA", y: 100 * mean(lora) }] : [];
  return drawLines({
    title: `${suite}, ${n} adapters, entropy-coded`,
    x: "kB, whole files",
    y,
    linear: true,
    lines,
    series,
  });
}

/** @param {Measured | undefined} row @param {(row: Measured) => number | undefined} of */
function pointsOf(row, of) {
  const value = row && of(row);
  return row && value !== undefined ? [[row.bytes / 1000, 100 * value]] : [];
}

const PAPER = /^column, .*f32$|^column K \d+, f32$/;

/** @param {Reader} reader @param {Suite} suite @param {number} n */
function drawAccuracy(reader, suite, n) {
  const points = reader.points(suite, n).filter(({ accuracy, tasks }) => accuracy !== undefined && tasks === n);
  const [lora, heads] = [LORA, "heads alone, f16"].map((name) => points.find(({ way }) => way === name)?.accuracy);
  const ours = points.filter(({ family }) => ["column", "flat", "joint", "auto", "coded"].includes(family));
  const of = (/** @type {string} */ family) => points.filter((one) => one.family === family);
  const series = [
    { name: "each cut by SVD", points: rising(of("each cut by SVD")) },
    { name: "paper: column, f32", points: rising(ours.filter(({ way }) => PAPER.test(way))) },
    { name: "packs, the best", points: rising(ours) },
    { name: "packs, distilled", points: rising(of("pack, distilled")) },
    { name: "lorashare", points: rising(of("lorashare")) },
    { name: "vlora-dev", points: rising(of("vlora")) },
    { name: "cut by SVD, coded", points: rising(of("SVD-cut, coded")) },
  ].filter(({ points }) => points.length > 0);
  if (series.length === 0) return undefined;
  const lines = [
    ["LoRA", lora],
    ["heads alone", heads],
  ].flatMap(([name, y]) => (typeof y === "number" ? [{ name: String(name), y: 100 * y }] : []));
  return drawLines({
    title: `${suite.name}, ${n} adapters: accuracy`,
    x: "kB for all tasks, heads included",
    y: "mean accuracy, %",
    linear: true,
    lines,
    series,
  });
}

/** @param {Reader} reader @param {Suite} suite @param {number} n */
function drawErrors(reader, suite, n) {
  const points = reader
    .points(suite, n)
    .filter(({ error, family }) => error !== undefined && error > 0.01 && error < 1 && family !== "heads");
  const names = {
    column: "column",
    joint: "joint",
    flat: "flat",
    auto: "auto",
    "each cut by SVD": "each cut by SVD",
    lorashare: "lorashare",
    vlora: "vlora-dev",
    "SVD-cut, coded": "cut by SVD, coded",
    coded: "packs, coded",
  };
  const series = Object.entries(names).map(([family, name]) => ({
    name,
    points: falling(points.filter((one) => one.family === family)),
  }));
  const drawn = series.filter(({ points }) => points.length > 0);
  if (drawn.length === 0) return undefined;
  return drawLines({
    title: `${suite.name}, ${n} adapters: ΔW error`,
    x: "kB for all tasks, heads included",
    y: "mean ΔW error, %",
    linear: true,
    series: drawn,
  });
}

/** More is better. @param {readonly Point[]} points */
const rising = (points) => frontier(points, ({ accuracy = NaN }) => accuracy, -1, 1);

/** Less is better. @param {readonly Point[]} points */
const falling = (points) => frontier(points, ({ error = NaN }) => error, Infinity, -1);

/**
 * Points that no other one with fewer bytes equals, as [kB, %].
 * @param {readonly Point[]} points fewest bytes first
 * @param {(point: Point) => number} value
 * @param {number} worst
 * @param {1 | -1} sense of better
 */
function frontier(points, value, worst, sense) {
  let best = worst;
  return points.flatMap((point) => {
    const found = value(point);
    if (sense * found <= sense * best) return [];
    best = found;
    return [[point.bytes / 1000, 100 * best]];
  });
}
