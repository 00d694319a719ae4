/**
 * Line charts as SVG for figures in the README. No dependency, no script in the picture; readable on light and dark pages.
 */

/** Colours that differ in lightness as well as in hue. */
const COLOURS = ["#d55e00", "#e69f00", "#0072b2", "#009e73", "#7f7f7f", "#cc79a7", "#56b4e9"];

/**
 * @typedef {{ name: string, points: number[][] }} Series points [x, y]
 * @typedef {{ at: (value: number) => number, ticks: number[] }} Axis `at` gives 0 to 1
 */

const [width, height] = [720, 420];

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

/**
 * @param {{ title: string, x: string, y: string, series: Series[], linear?: boolean, even?: boolean, lines?: { name: string, y: number }[] }} chart
 *   x is logarithmic unless `even`, y unless `linear`; points that a logarithm cannot show are left out; `lines` are horizontal
 * @returns {string}
 */
export function drawLines({ title, x, y, series, linear = false, even = false, lines = [] }) {
  const [left, right, top, bottom] = [64, 190, 48, 48];
  const visible = series.map((s) => ({
    ...s,
    points: s.points.filter(([a, b]) => (even || a > 0) && (linear || b > 0)),
  }));
  const all = visible.flatMap((s) => s.points);
  const xAxis = (even ? straight : logarithmic)(all.map(([a]) => a));
  const heights = [...all.map(([, b]) => b), ...lines.map((line) => line.y)];
  const yAxis = linear ? straight(heights) : logarithmic(heights);
  const px = (/** @type {number} */ v) => left + xAxis.at(v) * (width - left - right);
  const py = (/** @type {number} */ v) => height - bottom - yAxis.at(v) * (height - top - bottom);
  const text = (/** @type {number} */ a, /** @type {number} */ b, /** @type {string} */ t, more = "") =>
    `<text x="${a.toFixed(1)}" y="${b.toFixed(1)}" ${more}>${t}</text>`;
  const grid = (
    /** @type {number} */ x1,
    /** @type {number} */ y1,
    /** @type {number} */ x2,
    /** @type {number} */ y2,
    more = 'class="grid"',
  ) => `<line x1="${x1.toFixed(1)}" y1="${y1.toFixed(1)}" x2="${x2.toFixed(1)}" y2="${y2.toFixed(1)}" ${more}/>`;
  const parts = [text(left, 24, title, 'font-size="15" font-weight="600"')];
  for (const tick of xAxis.ticks) {
    parts.push(grid(px(tick), top, px(tick), height - bottom));
    parts.push(text(px(tick), height - bottom + 18, String(tick), 'text-anchor="middle"'));
  }
  for (const tick of yAxis.ticks) {
    parts.push(grid(left, py(tick), width - right, py(tick)));
    parts.push(text(left - 8, py(tick) + 4, String(tick), 'text-anchor="end"'));
  }
  parts.push(text((left + width - right) / 2, height - 10, x, 'text-anchor="middle"'));
  parts.push(
    text(
      14,
      (top + height - bottom) / 2,
      y,
      `text-anchor="middle" transform="rotate(-90 14 ${(top + height - bottom) / 2})"`,
    ),
  );
  for (const line of lines) {
    parts.push(grid(left, py(line.y), width - right, py(line.y), 'stroke="#8888" stroke-dasharray="5 4"'));
    parts.push(text(width - right + 10, py(line.y) + 4, line.name));
  }
  // Names stand right of the picture in the order of the lines' ends, pushed apart where they would overlap.
  const taken = lines.map((line) => py(line.y));
  const names = visible.flatMap((s, i) =>
    s.points.length > 0 ? [{ s, i, at: py(s.points[s.points.length - 1][1]) }] : [],
  );
  for (const name of names.sort((a, b) => a.at - b.at)) {
    while (taken.some((other) => Math.abs(other - name.at) < 16)) name.at++;
    taken.push(name.at);
  }
  for (const { s, i, at } of names) {
    const colour = COLOURS[i % COLOURS.length];
    const path = s.points.map(([a, b], k) => `${k ? "L" : "M"}${px(a).toFixed(1)} ${py(b).toFixed(1)}`).join("");
    parts.push(`<path d="${path}" fill="none" stroke="${colour}" stroke-width="2.5"/>`);
    for (const [a, b] of s.points)
      parts.push(`<circle cx="${px(a).toFixed(1)}" cy="${py(b).toFixed(1)}" r="3.5" fill="${colour}"/>`);
    const [a, b] = s.points[s.points.length - 1];
    parts.push(grid(px(a), py(b), width - right + 6, at, `stroke="${colour}" stroke-opacity="0.35"`));
    parts.push(
      `<text x="${width - right + 10}" y="${(at + 4).toFixed(1)}" style="fill:${colour}" font-weight="600">${s.name}</text>`,
    );
  }
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" font-family="system-ui, sans-serif" font-size="12" role="img" aria-label="${title}">`,
    "<style>text{fill:#57606a}.grid{stroke:#8884;stroke-width:1}@media(prefers-color-scheme:dark){text{fill:#adbac7}}</style>",
    ...parts,
    "</svg>\n",
  ].join("\n");
}

/** From a round number below to one above: 1, 2, 5, 10, … @param {number[]} values @returns {Axis} */
function logarithmic(values) {
  const round = [];
  for (let e = -6; e <= 9; e++) for (const m of [1, 2, 5]) round.push(Number(`${m}e${e}`));
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const from = round.filter((r) => r <= least).pop() ?? least;
  const to = round.find((r) => r >= most) ?? most;
  const inside = round.filter((r) => r >= from && r <= to);
  // Over many decades only their ends.
  const ticks = inside.length <= 8 ? inside : inside.filter((r) => /^[01.]+$/.test(String(r)));
  return { at: (v) => Math.log(v / from) / (Math.log(to / from) || 1), ticks };
}

/** @param {number[]} values @returns {Axis} */
function straight(values) {
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const step = [1, 2, 5, 10, 20, 50, 100].find((s) => (most - least) / s <= 6) ?? 100;
  const [from, to] = [Math.floor(least / step) * step, Math.ceil(most / step) * step];
  const ticks = Array.from({ length: Math.round((to - from) / step) + 1 }, (_, i) => from + i * step);
  return { at: (v) => (v - from) / (to - from || 1), ticks };
}
