/**
 * What does it cost to pack 10 000 adapters of rank 32 of a model of 7 billion parameters? Each command of docs/hub.md is run on
 * synthetic adapters of one square module, at three widths and two numbers of adapters; the difference of the two is what one
 * more adapter costs, in seconds of a core, so that a busy machine makes no difference. Beside it numpy does the same sums on the same files, one thread as we do: Gram matrices in f64, LAPACK's
 * eigh, products with the components.
 *
 * Arithmetic says how the cost grows: a summary takes r·w²/2 multiplications per side of width w, projecting r·K·w. The
 * measured seconds per unit at the largest width, times the units of the model's layers, give the hours.
 */
import { spawnSync } from "node:child_process";
import { mkdir, mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { writeSafetensors } from "eigenlora/build";
import { option, printParts, python, uniform } from "./report.js";

const [RANK, K] = [32, 32];
/** Directions that adapters share, beside noise: what components look for. */
const SHARED = 64;
const WIDTHS = option("widths")?.split(",").map(Number) ?? [1024, 2048, 4096];

/** Shapes of Llama 2 7B's linear layers, [out, in] and how often. */
const LAYERS = {
  q: [4096, 4096],
  k: [4096, 4096],
  v: [4096, 4096],
  o: [4096, 4096],
  gate: [11008, 4096],
  up: [11008, 4096],
  down: [4096, 11008],
};
const MODELS = { "query and value": ["q", "v"], "all linear layers": ["q", "k", "v", "o", "gate", "up", "down"] };
const ADAPTERS = 10_000;
const SHARDS = 16;

const main = fileURLToPath(new URL("../dist/src/cli/main.js", import.meta.url));

/** @param {string} cwd @param {string[]} args */
function run(cwd, ...args) {
  const { status, stdout, stderr } = spawnSync(process.execPath, [main, ...args, "--json"], { encoding: "utf8", cwd });
  if (status !== 0) throw new Error(`${args[0]}: ${stdout}${stderr}`);
  return JSON.parse(stdout);
}

/** One adapter's folder. @param {string} folder @param {number} width @param {Float32Array} directions @param {number} seed */
async function writeAdapter(folder, width, directions, seed) {
  const drawn = uniform(2 * RANK * SHARED, seed);
  const noise = uniform(2 * RANK * width, seed + 1);
  /** @param {number} side */
  const factor = (side) => {
    const rows = noise.subarray(side * RANK * width, (side + 1) * RANK * width).map((value) => value * 0.01);
    for (let i = 0; i < RANK; i++) {
      for (let k = 0; k < SHARED; k++) {
        const share = (drawn[(side * RANK + i) * SHARED + k] ?? 0) * 0.97 ** k;
        for (let j = 0; j < width; j++) rows[i * width + j] += share * directions[(side * SHARED + k) * width + j];
      }
    }
    return rows;
  };
  const [A, Bt] = [factor(0), factor(1)];
  const B = new Float32Array(width * RANK);
  for (let i = 0; i < RANK; i++) for (let j = 0; j < width; j++) B[j * RANK + i] = Bt[i * width + j];
  const name = "base_model.model.layer.proj";
  const tensor = (/** @type {string} */ side, /** @type {number[]} */ shape, /** @type {Float32Array} */ values) => ({
    name: `${name}.${side}.weight`,
    dtype: "F32",
    shape,
    read: () => new Uint8Array(values.buffer),
  });
  const chunks = [];
  for await (const chunk of writeSafetensors([tensor("lora_A", [RANK, width], A), tensor("lora_B", [width, RANK], B)]))
    chunks.push(chunk);
  await mkdir(folder);
  await writeFile(join(folder, "adapter_model.safetensors"), chunks);
  const config = {
    peft_type: "LORA",
    r: RANK,
    lora_alpha: RANK,
    target_modules: ["proj"],
    base_model_name_or_path: "synthetic",
  };
  await writeFile(join(folder, "adapter_config.json"), JSON.stringify(config));
}

/** @param {number} width */
async function measure(width) {
  const scratch = await mkdtemp(join(tmpdir(), "eigenlora-bench-"));
  try {
    // Both numbers are above width / 64, where rows give way to a Gram matrix.
    const counts = [width / 32, width / 16];
    const directions = uniform(2 * SHARED * width, width);
    const folders = Array.from({ length: counts[1] }, (_, i) => `adapter-${String(i).padStart(4, "0")}`);
    for (const [i, folder] of folders.entries())
      await writeAdapter(join(scratch, folder), width, directions, 1000 * i + 1);
    const adapters = (/** @type {number} */ count) => folders.slice(0, count);
    /** @param {(count: number) => any} command */
    const slope = (command) => {
      const [few, many] = counts.map(command);
      return { each: (many.coreSeconds - few.coreSeconds) / (counts[1] - counts[0]), many };
    };
    const shard = slope((count) => run(scratch, "shard", ...adapters(count), "-o", `${count}.part`));
    const other = adapters(counts[0]).flatMap((name) => ["--as", `${name}=other-${name}`]);
    run(scratch, "shard", ...adapters(counts[0]), ...other, "-o", "other.part");
    const merge = run(scratch, "merge", `${counts[1]}.part`, "other.part", "--part", "-o", "both.part");
    const basis = run(scratch, "merge", "both.part", "--k", String(K), "-o", "basis.eigen");
    const project = slope((count) =>
      run(scratch, "project", "basis.eigen", ...adapters(count), "-o", `tasks-${count}.part`),
    );
    const assemble = run(scratch, "assemble", "basis.eigen", `tasks-${counts[1]}.part`, "-o", "tasks.eigen");
    const found = python("hub.py", String(K), String(counts[0]), ...folders.map((name) => join(scratch, name)));
    return { width, counts, shard, merge, basis, project, assemble, peer: found };
  } finally {
    await rm(scratch, { recursive: true });
  }
}

/** @typedef {Awaited<ReturnType<typeof measure>>} Measured */

const measured = [];
for (const width of WIDTHS) measured.push(await measure(width));
const largest = /** @type {Measured} */ (measured.at(-1));

const rows = measured.map(({ width, counts, shard, merge, basis, project, peer }) => {
  const figures = "figures" in peer ? peer.figures : null;
  return {
    name: `width ${width}`,
    adapters: `${counts[0]}, ${counts[1]}`,
    "shard, s an adapter": shard.each,
    "GMAC/s": (RANK * width ** 2) / shard.each / 1e9,
    "÷ numpy": figures && shard.each / figures.shard,
    "merge two parts, s": merge.coreSeconds,
    "basis, s": basis.coreSeconds,
    "÷ numpy's eigh": figures && basis.coreSeconds / figures.basis,
    "project, s an adapter": project.each,
    "÷ numpy's": figures && project.each / figures.project,
    "part, MB": shard.many.bytes / 1e6,
    "peak MB": Math.max(...[shard.many, merge, basis].map((r) => r.peakMemoryBytes)) / 1e6,
  };
});

/** Triangle and sum of both sides, in bytes of f64. @param {number[]} shape */
const summaryBytes = (shape) => shape.reduce((sum, w) => sum + 8 * ((w * (w + 1)) / 2 + w), 0);
/** @param {number[]} shape */
const squares = (shape) => shape.reduce((sum, w) => sum + w * w, 0);
/** @param {number[]} shape */
const widths = (shape) => shape.reduce((sum, w) => sum + w, 0);
/** Two sides of the largest width that was measured. */
const unit = {
  squares: 2 * largest.width ** 2,
  widths: 2 * largest.width,
  cubes: 2 * largest.width ** 3,
  bytes: largest.merge.bytes,
};

const hours = Object.entries(MODELS).map(([name, layers]) => {
  const shapes = layers.map((layer) => LAYERS[/** @type {keyof typeof LAYERS} */ (layer)]);
  /** @param {(shape: number[]) => number} of over all 32 blocks */
  const total = (of) => 32 * shapes.reduce((sum, shape) => sum + of(shape), 0);
  const modules = 32 * shapes.length;
  const [part, task] = [total(summaryBytes), modules * 2 * RANK * K * 2];
  return {
    name: `7B, ${name}`,
    modules,
    "adapters, f32 GB": (ADAPTERS * 4 * RANK * total(widths)) / 1e9,
    [`${SHARDS} parts, GB`]: (SHARDS * part) / 1e9,
    "shard, h": (ADAPTERS * largest.shard.each * total(squares)) / unit.squares / 3600,
    "merge, h": (SHARDS * (largest.merge.coreSeconds / 2) * part) / unit.bytes / 3600,
    "basis, h": (largest.basis.coreSeconds * total(squares)) / unit.squares / 3600,
    "project, h": (ADAPTERS * largest.project.each * total(widths)) / unit.widths / 3600,
    "basis, MB": (total(widths) * (K + 1) * 2) / 1e6,
    "a task, kB": task / 1e3,
    "pack, GB": (ADAPTERS * task + total(widths) * (K + 1) * 2) / 1e9,
  };
});

const peer = largest.peer;
printParts(
  [
    { question: `What does each command cost for one more adapter (rank ${RANK}, one square module, K ${K})?`, rows },
    {
      question: `What do ${ADAPTERS} adapters of rank ${RANK} cost, in hours of one core and in bytes, at two passes over the adapters?`,
      rows: hours,
      notes: ["From the largest width above: shard and basis by squares of widths, project by widths, merge by bytes."],
    },
  ],
  ["figures" in peer ? { name: "numpy", version: peer.figures.version } : { name: "numpy", reason: peer.reason }],
);
