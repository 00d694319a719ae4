/**
 * The adapters of a setting as files in PEFT's format, and the command line that packs them in a process of its own.
 */

import { mkdir, open, writeFile } from "node:fs/promises";
import { availableParallelism } from "node:os";
import { join } from "node:path";
import { writeSafetensors } from "../../dist/src/tensor/safetensors.js";
import { command } from "./process.js";
import { adaptersOf, SETTINGS } from "./settings.js";

/**
 * Time and memory with each number of workers.
 * @param {import("./settings.js").SettingName} name
 * @param {string} folder holds its adapters
 * @param {string} scratch where packs go
 * @param {readonly string[][]} ways options of `eigenlora pack`
 * @returns {import("./report.js").Row[]}
 */
export function packingRows(name, folder, scratch, ways = [["--k", String(SETTINGS[name].components)]]) {
  const cores = availableParallelism();
  return ways.flatMap((way) =>
    (cores > 1 ? [1, cores] : [1]).map((workers) => {
      const output = join(scratch, "setting.eigen");
      const made = command("pack", folder, "-o", output, "--force", "--workers", String(workers), ...way);
      return {
        name: `pack ${way.join(" ") || "(default)"}, workers ${workers}`,
        "adapters, MB": made.adapterBytes / 1e6,
        "pack, MB": made.bytes / 1e6,
        minutes: made.seconds / 60,
        "CPU minutes, all threads": made.coreSeconds / 60,
        "peak memory, MB": made.peakMemoryBytes / 1e6,
      };
    }),
  );
}

/**
 * Writes a folder for each adapter, in f32; holds one module of each.
 * @param {import("./settings.js").SettingName} name
 * @param {string} folder
 * @param {readonly import("./settings.js").Group[]} [groups]
 */
export async function writeSetting(name, folder, groups) {
  const adapters = adaptersOf(name, groups);
  const files = await Promise.all(adapters.map(({ id, modules }) => openAdapter(join(folder, id), modules)));
  try {
    // All files advance together: what adapters share of a module is made once for neighbours.
    for (let open = true; open; ) {
      for (const { file, chunks } of files) {
        const { done, value } = await chunks.next();
        if (value) await file.write(value);
        open = !done;
      }
    }
  } finally {
    for (const { file } of files) await file.close();
  }
}

/** @param {string} folder @param {import("eigenlora/build").Adapter["modules"]} modules */
async function openAdapter(folder, modules) {
  await mkdir(folder, { recursive: true });
  const [{ rank }] = modules.values();
  const config = {
    peft_type: "LORA",
    base_model_name_or_path: null,
    r: rank,
    lora_alpha: rank,
    target_modules: [...modules.keys()],
  };
  await writeFile(join(folder, "adapter_config.json"), JSON.stringify(config));
  const file = await open(join(folder, "adapter_model.safetensors"), "w");
  return { file, chunks: writeSafetensors([...modules.values()].flatMap(entriesOf)) };
}

/** Both factors, made when they are written. @param {import("eigenlora/build").AdapterModule} module */
function entriesOf(module) {
  const { name, out, in: inputs, rank } = module;
  /** B's turn is right after A's. @type {Promise<import("eigenlora").Term> | undefined} */
  let term;
  const entry = (/** @type {"A" | "B"} */ factor, /** @type {number[]} */ shape) => ({
    name: `base_model.model.${name}.lora_${factor}.weight`,
    dtype: "F32",
    shape,
    async read() {
      const { A, Bt } = await (term ??= module.read());
      if (factor === "B") term = undefined;
      const values = factor === "A" ? A : transposed(Bt, rank, out);
      return new Uint8Array(values.buffer);
    },
  });
  return [entry("A", [rank, inputs]), entry("B", [out, rank])];
}

/** @param {Float32Array} rows @param {number} count @param {number} width */
function transposed(rows, count, width) {
  const made = new Float32Array(rows.length);
  for (let i = 0; i < count; i++) for (let j = 0; j < width; j++) made[j * count + i] = rows[i * width + j];
  return made;
}
