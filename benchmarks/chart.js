/**
 * Line charts as SVG, both axes logarithmic: for figures in the README. No dependency, no script in the picture; readable on
 * light and dark pages.
 */

/** Colours that differ in lightness as well as in hue. */
const COLOURS = ["#d55e00", "#e69f00", "#0072b2", "#009e73", "#7f7f7f"];

/**
 * @param {{ title: string, x: string, y: string, series: { name: string, points: number[][] }[] }} chart
 *   points [x, y]; those not above 0 are left out
 * @returns {string}
 */
export function drawLines({ title, x, y, series }) {
  const [width, height, left, right, top, bottom] = [720, 420, 64, 190, 48, 48];
  const visible = series.map((s) => ({ ...s, points: s.points.filter(([a, b]) => a > 0 && b > 0) }));
  const all = visible.flatMap((s) => s.points);
  const decades = (/** @type {number[]} */ v) => [Math.floor(Math.log10(Math.min(...v))), Math.ceil(Math.log10(Math.max(...v)))];
  const [x0, x1] = decades(all.map(([a]) => a));
  const [y0, y1] = decades(all.map(([, b]) => b));
  const px = (/** @type {number} */ v) => left + ((Math.log10(v) - x0) / (x1 - x0 || 1)) * (width - left - right);
  const py = (/** @type {number} */ v) => height - bottom - ((Math.log10(v) - y0) / (y1 - y0 || 1)) * (height - top - bottom);
  const text = (/** @type {number} */ a, /** @type {number} */ b, /** @type {string} */ t, more = "") => `<text x="${a.toFixed(1)}" y="${b.toFixed(1)}" ${more}>${t}</text>`;
  const parts = [text(left, 24, title, 'font-size="15" font-weight="600"')];
  for (let e = x0; e <= x1; e++) {
    const at = px(10 ** e);
    parts.push(`<line x1="${at}" x2="${at}" y1="${top}" y2="${height - bottom}" class="grid"/>`);
    parts.push(text(at, height - bottom + 18, String(10 ** e), 'text-anchor="middle"'));
  }
  for (let e = y0; e <= y1; e++) {
    const at = py(10 ** e);
    parts.push(`<line x1="${left}" x2="${width - right}" y1="${at}" y2="${at}" class="grid"/>`);
    parts.push(text(left - 8, at + 4, String(e < 0 ? (10 ** e).toFixed(-e) : 10 ** e), 'text-anchor="end"'));
  }
  parts.push(text((left + width - right) / 2, height - 10, x, 'text-anchor="middle"'));
  parts.push(text(14, (top + height - bottom) / 2, y, `text-anchor="middle" transform="rotate(-90 14 ${(top + height - bottom) / 2})"`));
  // Labels at the lines' ends, pushed apart where they would overlap.
  const ends = visible.filter((s) => s.points.length > 0).map((s, i) => ({ s, i, at: py(s.points[s.points.length - 1][1]) }));
  let last = -Infinity;
  for (const end of ends.sort((a, b) => a.at - b.at)) last = end.at = Math.max(end.at, last + 16);
  for (const { s, i, at } of ends) {
    const colour = COLOURS[i % COLOURS.length];
    const path = s.points.map(([a, b], k) => `${k ? "L" : "M"}${px(a).toFixed(1)} ${py(b).toFixed(1)}`).join("");
    parts.push(`<path d="${path}" fill="none" stroke="${colour}" stroke-width="2.5"/>`);
    for (const [a, b] of s.points) parts.push(`<circle cx="${px(a).toFixed(1)}" cy="${py(b).toFixed(1)}" r="3.5" fill="${colour}"/>`);
    parts.push(`<text x="${px(s.points[s.points.length - 1][0]) + 10}" y="${at + 4}" style="fill:${colour}" font-weight="600">${s.name}</text>`);
  }
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" font-family="system-ui, sans-serif" font-size="12" role="img" aria-label="${title}">`,
    "<style>text{fill:#57606a}.grid{stroke:#8884;stroke-width:1}@media(prefers-color-scheme:dark){text{fill:#adbac7}}</style>",
    ...parts,
    "</svg>\n",
  ].join("\n");
}
