/** Line charts as SVG, by Observable Plot: no script in the picture, readable on light and dark pages. */
import * as Plot from "@observablehq/plot";
import { parseHTML } from "linkedom";

/** Colours that differ in lightness as well as in hue. */
const COLOURS = ["#d55e00", "#e69f00", "#0072b2", "#009e73", "#7f7f7f", "#cc79a7", "#56b4e9", "#332288", "#882255"];

const [width, height] = [720, 420];
const margins = { marginLeft: 64, marginRight: 190, marginTop: 48, marginBottom: 48 };
/** Approximate number of ticks on an axis. */
const TICKS = 6;
const AXIS = /** @type {const} */ ({ labelAnchor: "center", labelArrow: "none", ticks: TICKS, tickFormat: String });
/** Distance between names beside the picture. */
const LINE_HEIGHT = 16;

/** Everything that is not a series is drawn in the current colour. */
const STYLE = "svg{color:#57606a}@media(prefers-color-scheme:dark){svg{color:#adbac7}}";

/**
 * @typedef {{ name: string, points: number[][] }} Series points [x, y]
 * @typedef {object} Chart
 * @property {string} title
 * @property {string} x
 * @property {string} y
 * @property {Series[]} series
 * @property {boolean} [linear] y is linear. Default: logarithmic
 * @property {boolean} [even] x is linear. Default: logarithmic
 * @property {{ name: string, y: number }[]} [lines] horizontal
 */

/**
 * Charts in one picture.
 * @param {readonly string[]} charts as `drawLines` gives them
 */
export function sideBySide(charts) {
  const placed = charts.map((chart, i) =>
    chart.replace("<svg ", `<svg x="${i * width}" width="${width}" height="${height}" `),
  );
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${charts.length * width} ${height}">\n${placed.join("")}</svg>\n`;
}

/** Draws lines. Points that a logarithm cannot show are left out. @param {Chart} chart @returns {string} */
export function drawLines({ title, x, y, series, linear = false, even = false, lines = [] }) {
  const visible = series.map(({ name, points }, i) => ({
    name,
    colour: COLOURS[i % COLOURS.length],
    points: points.filter(([a, b]) => (even || a > 0) && (linear || b > 0)),
  }));
  /** @type {import("@observablehq/plot").ScaleOptions} */
  const yScale = {
    type: linear ? "linear" : "log",
    domain: extent([...visible.flatMap(({ points }) => points.map(([, b]) => b)), ...lines.map((line) => line.y)]),
    nice: linear && TICKS,
  };
  const xs = visible.flatMap(({ points }) => points.map(([a]) => a));
  const { document } = parseHTML("<html></html>");
  const plot = Plot.plot({
    document,
    width,
    height,
    ...margins,
    style: { fontFamily: "system-ui, sans-serif", fontSize: "12px", background: "none" },
    x: { type: even ? "linear" : "log", label: x, inset: 8, ...AXIS },
    y: { ...yScale, label: y, grid: true, ...AXIS },
    marks: [
      Plot.text([title], { frameAnchor: "top-left", dy: -30, fontSize: 15, fontWeight: 600 }),
      Plot.ruleY(lines, { y: "y", strokeDasharray: "5 4", strokeOpacity: 0.6 }),
      visible.map(({ points, colour }) => [
        Plot.lineY(points, { x: "0", y: "1", stroke: colour, strokeWidth: 2.5 }),
        Plot.dot(points, { x: "0", y: "1", fill: colour, r: 3.5 }),
      ]),
      names(visible, lines, yScale, Math.max(...xs)),
    ],
  });
  plot.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  for (const name of ["width", "height"]) plot.removeAttribute(name);
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", title);
  const style = document.createElement("style");
  style.textContent = STYLE;
  plot.prepend(style);
  // A hundredth of a pixel is enough.
  return `${plot.outerHTML.replace(/(\.\d\d)\d+/g, "$1")}\n`;
}

/**
 * Names right of the picture, linked to the ends of their lines, pushed down where they would overlap.
 * @param {readonly (Series & { colour: string })[]} series
 * @param {readonly { name: string, y: number }[]} lines
 * @param {import("@observablehq/plot").ScaleOptions} yScale
 * @param {number} right the largest x
 */
function names(series, lines, yScale, right) {
  const { apply, invert } = /** @type {Required<import("@observablehq/plot").Scale>} */ (
    Plot.scale({ y: { ...yScale, range: [height - margins.marginBottom, margins.marginTop] } })
  );
  const ends = [
    ...series.flatMap(({ name, points, colour }) => points.slice(-1).map(([x, y]) => ({ name, x, y, colour }))),
    ...lines.map(({ name, y }) => ({ name, x: right, y, colour: "currentColor" })),
  ].sort((a, b) => b.y - a.y);
  let free = -Infinity;
  return ends.map((end) => {
    const at = Math.max(apply(end.y), free);
    free = at + LINE_HEIGHT;
    const place = [{ ...end, right, at: invert(at) }];
    return [
      Plot.link(place, { x1: "x", y1: "y", x2: "right", y2: "at", stroke: end.colour, strokeOpacity: 0.35 }),
      Plot.text(place, {
        x: "right",
        y: "at",
        text: "name",
        fill: end.colour,
        fontWeight: 600,
        textAnchor: "start",
        dx: 14,
      }),
    ];
  });
}

/** @param {readonly number[]} values */
const extent = (values) => [Math.min(...values), Math.max(...values)];
