/** Commands that pack very many adapters, on synthetic ones of one square module. */
import { spawnSync } from "node:child_process";
import { mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { f32Entry, safetensorsOf, smallNumbers } from "./adapters.js";
import { python } from "./peers.js";
import { inScratch } from "./process.js";

export const [RANK, K] = [32, 32];
/** Directions that adapters share, in addition to noise; components find them. */
const SHARED = 64;

const main = fileURLToPath(new URL("../../dist/src/cli/main.js", import.meta.url));

/** @param {string} cwd @param {string[]} args */
function run(cwd, ...args) {
  const { status, stdout, stderr } = spawnSync(process.execPath, [main, ...args, "--json"], { encoding: "utf8", cwd });
  if (status !== 0) throw new Error(`${args[0]}: ${stdout}${stderr}`);
  return JSON.parse(stdout);
}

/**
 * Writes one adapter's folder.
 * @param {string} folder
 * @param {number} width
 * @param {Float32Array} directions [2, SHARED, width]
 * @param {number} seed
 */
async function writeAdapter(folder, width, directions, seed) {
  const drawn = smallNumbers(2 * RANK * SHARED, seed);
  const noise = smallNumbers(2 * RANK * width, seed + 1);
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
  await mkdir(folder);
  await writeFile(
    join(folder, "adapter_model.safetensors"),
    await safetensorsOf([
      f32Entry(`${name}.lora_A.weight`, [RANK, width], A),
      f32Entry(`${name}.lora_B.weight`, [width, RANK], B),
    ]),
  );
  const config = {
    peft_type: "LORA",
    r: RANK,
    lora_alpha: RANK,
    target_modules: ["proj"],
    base_model_name_or_path: "synthetic",
  };
  await writeFile(join(folder, "adapter_config.json"), JSON.stringify(config));
}

/** Report of each command at one width, and numpy. @param {number} width */
export function measure(width) {
  return inScratch(async (scratch) => {
    // Both numbers are above width / 64, where rows give way to a Gram matrix.
    const counts = [width / 32, width / 16];
    const directions = smallNumbers(2 * SHARED * width, width);
    const folders = Array.from({ length: counts[1] }, (_, i) => `adapter-${String(i).padStart(4, "0")}`);
    for (const [i, folder] of folders.entries())
      await writeAdapter(join(scratch, folder), width, directions, 1000 * i + 1);
    const few = folders.slice(0, counts[0]);
    /** Cost of one more adapter. @param {(folders: string[]) => any} command */
    const slope = (command) => {
      const [less, many] = [few, folders].map(command);
      return { each: (many.coreSeconds - less.coreSeconds) / (counts[1] - counts[0]), many };
    };
    const shard = slope((some) => run(scratch, "hub", "shard", ...some, "-o", `${some.length}.part`));
    const other = few.flatMap((name) => ["--as", `${name}=other-${name}`]);
    run(scratch, "hub", "shard", ...few, ...other, "-o", "other.part");
    const merge = run(scratch, "hub", "merge", `${counts[1]}.part`, "other.part", "--part", "-o", "both.part");
    const basis = run(scratch, "hub", "merge", "both.part", "--k", String(K), "-o", "basis.eigen");
    const project = slope((some) =>
      run(scratch, "hub", "project", "basis.eigen", ...some, "-o", `tasks-${some.length}.part`),
    );
    run(scratch, "hub", "assemble", "basis.eigen", `tasks-${counts[1]}.part`, "-o", "tasks.eigen");
    const peer = python("hub.py", [String(K), String(counts[0]), ...folders.map((name) => join(scratch, name))]);
    return { width, counts, shard, merge, basis, project, peer };
  });
}
