/** Tables of the curves: the gain of sharing with the same coder, and published results of others. */
import { mean, sampleStandardDeviation } from "simple-statistics";
import { CURVES, pairsOf } from "./curve.js";
import { LORA } from "./tables.js";

/**
 * @typedef {import("./measure.js").Row} Row
 * @typedef {import("./curve.js").Curve} Curve
 * @typedef {import("./curve.js").Pair} Pair
 * @typedef {import("../../lib/report.js").Part} Part
 */

/**
 * Makes docs/research/size/curves.md.
 * @param {readonly Row[]} rows
 * @returns {string} empty where no curve was measured
 */
export function curvePage(rows) {
  const parts = curveTables(rows);
  if (parts.length === 0) return "";
  const begin =
    "# Entropy-coded packs by bytes\n\nWritten by `npm run bench size`; what it says is in [size.md](../size.md).\n";
  return [begin, ...[...parts, published()].map(sectionOf)].join("\n");
}

/** @param {Part} part */
function sectionOf({ question, rows, notes = [] }) {
  const names = [...new Set(rows.flatMap((row) => Object.keys(row)))];
  const lines = [
    names.map((name) => (name === "name" ? "" : name)),
    ...rows.map((row) => names.map((name) => cellOf(row[name]))),
  ];
  const widths = names.map((_, i) => Math.max(3, ...lines.map((line) => line[i].length)));
  const drawn = lines.map((line) => `| ${line.map((cell, i) => cell.padEnd(widths[i])).join(" | ")} |`);
  const rule = `| ${widths.map((width) => "-".repeat(width)).join(" | ")} |`;
  return [`## ${question}`, "", drawn[0], rule, ...drawn.slice(1), "", ...notes, ""].join("\n");
}

/** @param {string | number | null} value */
function cellOf(value) {
  if (typeof value !== "number" || Number.isInteger(value)) return String(value ?? "");
  return Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3);
}

/** @param {readonly Row[]} rows @returns {Part[]} */
export function curveTables(rows) {
  return CURVES.map((curve) => curveTable(curve, rows)).filter((part) => part.rows.length > 0);
}

/** @param {Curve} curve @param {readonly Row[]} rows @returns {Part} */
function curveTable(curve, rows) {
  const lora = rows.find(({ suite, n, way }) => suite === curve.suite && n === curve.n && way === LORA);
  const pairs = pairsOf(curve, rows);
  const [asked, judged] = [pairs.some(({ theirs }) => theirs.accuracy), pairs.some((pair) => pair.judged)];
  const notes = [
    "Whole files, coded with one step, heads alike. SVD: private terms alone, which is each adapter cut by its own SVD. shared: the pack",
    "with components and the least ΔW error within those bytes.",
    ...(judged
      ? [
          "by text: of each number of components the pack that loses least, and of those the least KL on training texts.",
        ]
      : []),
    ...(asked && lora
      ? [`LoRA: ${percent(lora)?.toFixed(1)} %. ±: standard error of the mean difference over tasks.`]
      : []),
    ...(asked ? [crossing(pairs)] : []),
  ];
  return {
    question: `${curve.suite}, ${curve.n} adapters, entropy-coded: what does sharing gain within the bytes of each cut by SVD?`,
    rows: pairs.map((pair) => lineOf(pair, lora, asked, judged)),
    notes,
  };
}

/** @param {Pair} pair @param {Row | undefined} lora @param {boolean} asks @param {boolean} judges @returns {import("../../lib/report.js").Row} */
function lineOf({ theirs, ours, judged }, lora, asks, judges) {
  return {
    name: `${(theirs.bytes / 1000).toFixed(0)} kB`,
    "× fewer": lora ? lora.bytes / theirs.bytes : null,
    "SVD: error": theirs.error ?? null,
    ...(judges ? { "SVD: KL, milli": milli(theirs) } : {}),
    ...(asks ? { "SVD: %": percent(theirs) } : {}),
    "shared: way": shapeOf(ours),
    "shared: error": ours?.error ?? null,
    ...(asks ? { "shared: %": percent(ours), ...differenceOf(ours, theirs) } : {}),
    ...(judges ? { "by text: way": shapeOf(judged), "by text: KL, milli": milli(judged) } : {}),
    ...(judges && asks ? { "by text: %": percent(judged) } : {}),
  };
}

/** @param {Row | undefined} row */
const percent = (row) => (row?.accuracy ? 100 * mean(row.accuracy) : null);

/** @param {Row | undefined} row */
const milli = (row) => (row?.divergence === undefined ? null : 1000 * row.divergence);

/** Name of a way without the common part. @param {Row | undefined} row */
const shapeOf = (row) => row?.way.replace(/^coded /, "") ?? null;

/** Difference in points over the same rows. @param {Row | undefined} ours @param {Row} theirs @returns {Record<string, number | null>} */
function differenceOf(ours, theirs) {
  const other = theirs.accuracy;
  if (!ours?.accuracy || !other) return { difference: null, "±": null };
  const each = ours.accuracy.map((share, i) => 100 * (share - other[i]));
  return { difference: mean(each), "±": sampleStandardDeviation(each) / Math.sqrt(each.length) };
}

/** Where sharing is ahead, and where not. @param {readonly Pair[]} pairs fewest bytes first */
function crossing(pairs) {
  const asked = pairs.filter(({ theirs, ours }) => theirs.accuracy && ours?.accuracy);
  if (asked.length === 0) return "At no size both were asked yet.";
  const sizes = (/** @type {(difference: number) => boolean} */ is) =>
    asked
      .filter(({ theirs, ours }) => is(Number(differenceOf(ours, theirs)["difference"])))
      .map(({ theirs }) => `${(theirs.bytes / 1000).toFixed(0)} kB`)
      .join(", ") || "nowhere";
  return `Sharing, chosen by ΔW error, is ahead in accuracy at: ${sizes((one) => one > 0)}; not at: ${sizes((one) => one <= 0)}.`;
}

/**
 * Published results of others about small LoRAs near equal quality, on their models: nothing of it was measured here.
 * @returns {Part}
 */
export function published() {
  const rows = [
    {
      name: "EigenLoRA (this package's paper)",
      "kept of": "20 SDXL adapters, rank 32",
      "fewer bytes": "18 × fewer numbers in memory",
      quality: "pictures side by side",
      source: "ICLR 2025 submission, 4.3",
    },
    {
      name: "Universal Weight Subspace",
      "kept of": "500 adapters of Mistral-7B",
      "fewer bytes": "19 ×",
      quality: "near equal",
      source: "https://arxiv.org/abs/2512.05117",
    },
    {
      name: "Compress then Serve (JD)",
      "kept of": "1000 adapters of Mistral-7B, rank 16",
      "fewer bytes": "no figure in the abstract",
      quality: "preserved",
      source: "https://arxiv.org/abs/2407.00066",
    },
    {
      name: "LoRAQuant",
      "kept of": "one adapter: LLaMA 2-7B, 13B, Mistral 7B",
      "fewer bytes": "below 2 bits a number: > 8 × to f16",
      quality: "as other quantisers, or better",
      source: "https://arxiv.org/abs/2510.26690",
    },
    {
      name: "LoRDBA",
      "kept of": "one adapter, rank 16",
      "fewer bytes": "> 10 × to f16",
      quality: "f16's in some settings",
      source: "https://arxiv.org/abs/2605.24058",
    },
    {
      name: "LoRA-Squeeze",
      "kept of": "one adapter of Gemma 3, cut by SVD",
      "fewer bytes": "source rank ÷ target rank",
      quality: "often above training at that rank",
      source: "https://arxiv.org/abs/2602.10993",
    },
    {
      name: "VB-LoRA",
      "kept of": "none: trained in this form, Llama 2-13B",
      "fewer bytes": "250 × fewer stored numbers (0.4 %)",
      quality: "comparable or better",
      source: "https://arxiv.org/abs/2405.15179",
    },
  ];
  return {
    question: "What have others published?",
    rows,
    notes: ["Their models, tasks and ways of counting, as the papers say: nothing of it was measured here."],
  };
}
