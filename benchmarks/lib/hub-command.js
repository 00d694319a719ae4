/**
 * Runs the command line on synthetic adapters that are made before a command reads them and deleted afterwards, so that
 * thousands need the disk of one share: `node hub-command.js LAYERS COMMAND…`. An adapter is named synthetic-NUMBER,
 * and is the same whenever it is made. The command's report becomes a line of log.jsonl next to its output.
 */
import { spawnSync } from "node:child_process";
import { appendFileSync, mkdirSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { f32Entry, safetensorsOf, smallNumbers } from "./adapters.js";
import { BLOCKS, RANK, SMOLLM2 } from "./hub-whole.js";

const main = fileURLToPath(new URL("../../dist/src/cli/main.js", import.meta.url));
const [layers = "", ...args] = process.argv.slice(2);

/** Numbers that adapters are cut from: drawing each anew would take longer than packing it. */
const pool = smallNumbers(1 << 20, 1);

/** @param {string} folder */
async function writeAdapter(folder) {
  let at = (Number(folder.slice(-6)) * 7919) % pool.length;
  /** @param {number} length */
  const cut = (length) => {
    const values = new Float32Array(length);
    for (let i = 0; i < length; i++) values[i] = pool[(at + i) % pool.length] ?? 0;
    at = (at + length + 12_345) % pool.length;
    return values;
  };
  const entries = [];
  for (let block = 0; block < BLOCKS; block++) {
    for (const layer of layers.split(",")) {
      const [out, width, of] = SMOLLM2[layer] ?? [0, 0, ""];
      const name = `base_model.model.model.layers.${block}.${of}.${layer}_proj`;
      entries.push(f32Entry(`${name}.lora_A.weight`, [RANK, width], cut(RANK * width)));
      entries.push(f32Entry(`${name}.lora_B.weight`, [out, RANK], cut(RANK * out)));
    }
  }
  mkdirSync(folder, { recursive: true });
  writeFileSync(join(folder, "adapter_model.safetensors"), await safetensorsOf(entries));
  const target_modules = layers.split(",").map((layer) => `${layer}_proj`);
  const config = { peft_type: "LORA", r: RANK, lora_alpha: RANK, target_modules, base_model_name_or_path: "synthetic" };
  writeFileSync(join(folder, "adapter_config.json"), JSON.stringify(config));
}

const adapters = args.filter((word) => /synthetic-\d{6}$/.test(word));
for (const folder of adapters) await writeAdapter(folder);
const { status, stdout, stderr } = spawnSync(process.execPath, [main, ...args], {
  encoding: "utf8",
  maxBuffer: 2 ** 30,
});
for (const folder of adapters) rmSync(folder, { recursive: true });
if (status === 0) {
  const { seconds, coreSeconds, peakMemoryBytes, bytes } = JSON.parse(stdout);
  const line = { command: args[0], adapters: adapters.length, seconds, coreSeconds, peakMemoryBytes, bytes };
  appendFileSync(join(dirname(args[args.indexOf("-o") + 1] ?? ""), "log.jsonl"), `${JSON.stringify(line)}\n`);
}
process.stdout.write(stdout);
process.stderr.write(stderr);
process.exitCode = status ?? 1;
