/**
 * Every family of models in test/soak/families, made anew by PyTorch, PEFT and its exporters, then run in every mode on onnxruntime-node and
 * compared with PEFT; and a whole pipeline of Stable Diffusion. Refusals must be exactly those of test/soak/families/refusals.js. Takes
 * minutes; the files, some MB, go to a temporary folder.
 *
 * usage: node test/soak/families.js [--write] [--keep FOLDER] [FAMILY...]
 *   --write   writes test/soak/families/results/results.json and docs/research/families.md; for all families only
 *   --keep    makes the files in this folder, and uses those of families that are there already
 *
 * Needs PYTHON with torch, transformers, PEFT, diffusers, onnx and onnxscript; skips itself without, unless EIGENLORA_REQUIRE lists
 * families.
 */
import "../support/no-telemetry.js";
import { spawnSync } from "node:child_process";
import { existsSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { runPipeline } from "./families/diffusion.js";
import { unmet } from "./families/refusals.js";
import { runFamily } from "./families/run.js";
import { render } from "./families/table.js";

const { values, positionals } = parseArgs({
  options: { write: { type: "boolean" }, keep: { type: "string" } },
  allowPositionals: true,
});
const here = (/** @type {string} */ path) => fileURLToPath(new URL(path, import.meta.url));
const python = process.env["PYTHON"] ?? "python3";
const env = { ...process.env, OMP_NUM_THREADS: "1", PYTHONDONTWRITEBYTECODE: "1" };

const versions = spawnSync(
  python,
  [
    "-c",
    "import torch, transformers, peft, diffusers, onnx, onnxscript\n" +
      "for one in (torch, transformers, peft, diffusers): print(one.__name__, one.__version__.split('+')[0])",
  ],
  { encoding: "utf8", cwd: tmpdir(), env },
);
if (versions.status !== 0) {
  const why = `${python} has not all of torch, transformers, peft, diffusers, onnx, onnxscript`;
  if (/\bfamilies\b/.test(process.env["EIGENLORA_REQUIRE"] ?? "")) throw new Error(`${why}: ${versions.stderr}`);
  console.log(`skipped: ${why}`);
} else {
  await soak();
}

/** @param {string} script @param {string[]} args */
function made(script, ...args) {
  const { status } = spawnSync(python, [here(`families/${script}`), ...args], {
    stdio: ["ignore", "inherit", "inherit"],
    cwd: tmpdir(),
    env,
  });
  if (status !== 0) throw new Error(`${script} ${args.join(" ")}: exit code ${status}`);
}

async function soak() {
  const root = values.keep ?? mkdtempSync(join(tmpdir(), "eigenlora-families-"));
  try {
    const listed = spawnSync(python, [here("families/make.py"), "--list"], { encoding: "utf8", cwd: tmpdir(), env });
    const all = listed.stdout.trim().split("\n");
    const chosen = positionals.length > 0 ? positionals : all;
    const missing = chosen.filter((name) => !existsSync(join(root, name, "family.json")));
    if (missing.length > 0) made("make.py", root, ...missing);
    const [rows, failures] = await runAll(root, chosen);
    if (chosen === all) {
      const latents = await runPipelines(join(root, "pipelines"), failures);
      failures.push(...unmet());
      if (values.write && failures.length === 0) write(rows, latents);
    }
    for (const failure of failures) console.log(`FAILED ${failure}`);
    if (failures.length > 0) process.exitCode = 1;
  } finally {
    if (values.keep === undefined) rmSync(root, { recursive: true, force: true });
  }
}

/** @param {string} root @param {readonly string[]} names @returns {Promise<[import("./families/table.js").Row[], string[]]>} */
async function runAll(root, names) {
  const rows = [];
  /** @type {string[]} */
  const failures = [];
  for (const name of names) {
    const began = performance.now();
    const { family, results, failures: own } = await runFamily(join(root, name));
    rows.push({ title: family.title, results });
    failures.push(...own);
    const outcomes = results.flatMap(({ modes, rows }) => [...Object.values(modes), ...Object.values(rows)]);
    const refused = outcomes.filter((outcome) => typeof outcome !== "number").length;
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    console.log(`${name}: ${outcomes.length - refused} right, ${refused} refused, ${own.length} failed, ${seconds} s`);
  }
  return [rows, failures];
}

/** @param {string} root @param {string[]} failures @returns {Promise<import("./families/table.js").Latents>} */
async function runPipelines(root, failures) {
  if (!existsSync(join(root, "sdxl", "pipeline.json"))) made("diffusion.py", root);
  /** @type {import("./families/table.js").Latents} */
  const latents = {};
  for (const kind of /** @type {const} */ (["sd15", "sdxl"])) {
    const { off, failures: own } = await runPipeline(join(root, kind));
    failures.push(...own);
    latents[kind] = off;
    console.log(`pipeline ${kind}: latents within ${off.toExponential(1)} of diffusers', ${own.length} failed`);
  }
  return latents;
}

/** @param {import("./families/table.js").Row[]} rows @param {import("./families/table.js").Latents} latents */
function write(rows, latents) {
  const { version } = createRequire(import.meta.url)("onnxruntime-node/package.json");
  const used = [...versions.stdout.trim().split("\n"), `onnxruntime-node ${version}`];
  // Two digits, since further ones depend on the machine.
  const results = JSON.stringify({ versions: used, latents, rows }, (_, value) =>
    typeof value === "number" ? Number(value.toPrecision(2)) : value,
  );
  writeFileSync(here("families/results/results.json"), `${results.replaceAll('{"title"', '\n{"title"')}\n`);
  writeFileSync(here("../../docs/research/families.md"), render(JSON.parse(results)));
}
