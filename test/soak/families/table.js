/** Writes docs/research/families.md from the findings of a run. */

/**
 * @typedef {import("./run.js").Outcome} Outcome
 * @typedef {{ title: string, results: import("./run.js").Result[] }} Row
 * @typedef {Record<string, number>} Latents how far those of a pipeline are from diffusers'
 * @typedef {{ versions: readonly string[], latents: Latents, rows: readonly Row[] }} Results
 */

const FORMATS = /** @type {const} */ ({ f32: "f32", q4: "4 bits", f16: "f16", int8: "int8" });

const HEAD = `# Model families

\`npm run soak\` runs tiny models of each family with random weights, exported by torch's TorchScript exporter (as Optimum writes files) and
by its dynamo exporter; where transformers 5 names modules otherwise than version 4, also with the older names, which checkpoints on the
Hub have. PEFT made two adapters of each, of different ranks: one of attention, one of nearly all linear layers. A lossless pack goes onto
every file in modes \`core\`, \`factors\` and \`folded\`. Both tasks, the base before and after them, and in the first two modes a batch with one
task per row are compared with PEFT in f64.

A figure is the largest difference of all these from PEFT, divided by the largest logit. f32 and 4 bits may be off by 1e-5; 4 bits are
compared with PEFT on the dequantised weights. Files in f16, and in int8, which quantises activations too, are off without a pack: that
difference is behind the slash.

\`node test/soak/families.js --write\` writes this page.
`;

/** @param {Results} results */
export function render({ versions, latents, rows }) {
  /** @type {string[]} */
  const causes = [];
  const cells = rows.map((row) => [
    row.title,
    [...new Set(row.results.map(({ exporter }) => exporter))].join(", "),
    ...Object.keys(FORMATS).map((format) => cellOf(row, format)),
    notesOf(row, causes),
  ]);
  const table = aligned([["family", "exports", ...Object.values(FORMATS), "refused"], ...cells]);
  const notes = causes.map((cause, i) => `${i + 1}. ${cause}`);
  const sessions = rows.flatMap(({ results }) => results.flatMap(({ modes }) => Object.values(modes)));
  const made = sessions.filter((outcome) => typeof outcome === "number").length;
  const count = `${rows.length} families, ${rows.flatMap(({ results }) => results).length} exports, ${made} sessions; ${versions.join(", ")}.`;
  return [HEAD, count, "", table, "", "Refused, by number:", "", ...notes, "", pipelines(latents), ""].join("\n");
}

/** @param {Latents} latents */
function pipelines(latents) {
  return `## Whole pipelines

Tiny pipelines of Stable Diffusion 1.5 (DDIM) and SDXL (Euler), LoRAs as diffusers saves them, UNet and text encoders under one switch
(\`createEigenSessions\`), and a loop of four steps with guidance in JavaScript, \`test/soak/families/diffusion.js\` in the repository. The latents
of two tasks and the base, and in mode \`folded\` of one that adapts convolutions too, are diffusers' own within
${short(latents["sd15"])} (1.5) and ${short(latents["sdxl"])} (SDXL) of the largest.`;
}

/** The largest difference of a format. @param {Row} row @param {string} format */
function cellOf({ results }, format) {
  const own = results.filter((one) => one.format === format);
  const found = own.flatMap(({ modes, rows }) => [...Object.values(modes), ...Object.values(rows)]);
  const numbers = found.filter((outcome) => typeof outcome === "number");
  if (numbers.length === 0) return "";
  const plain = Math.max(...own.map((one) => one.plain));
  const isExact = format === "f32" || format === "q4";
  return `${short(Math.max(...numbers))}${isExact ? "" : ` / ${short(plain)}`}`;
}

/** @param {Row} row @param {string[]} causes all so far, numbered by their order */
function notesOf({ results }, causes) {
  const notes = new Set();
  for (const { modes, rows } of results) {
    const outcomes = [
      ...Object.entries(modes),
      ...Object.values(rows).map((outcome) => /** @type {const} */ (["one task a row", outcome])),
    ];
    for (const [what, outcome] of outcomes) {
      if (typeof outcome === "number") continue;
      if (!causes.includes(outcome.refused)) causes.push(outcome.refused);
      notes.add(`${what} (${causes.indexOf(outcome.refused) + 1})`);
    }
  }
  return [...notes].join(", ");
}

/** @param {number} value */
function short(value) {
  return value.toExponential(1);
}

/** Formats a table as the formatter of the documents does. @param {readonly (readonly string[])[]} rows */
function aligned(rows) {
  const widths = rows[0].map((_, column) => Math.max(3, ...rows.map((row) => row[column].length)));
  const lines = rows.map((row) => `| ${row.map((cell, i) => cell.padEnd(widths[i])).join(" | ")} |`);
  return [lines[0], `| ${widths.map((width) => "-".repeat(width)).join(" | ")} |`, ...lines.slice(1)].join("\n");
}
