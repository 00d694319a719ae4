/** Size, time and memory of packing a setting of the paper by shape, and the arithmetic of the size. */
import { buildPack } from "eigenlora/build";
import { sum } from "simple-statistics";
import { inFreshProcess, peakMemory } from "./process.js";
import { adaptersOf, SETTINGS } from "./settings.js";

/** @typedef {import("./settings.js").SettingName} SettingName */

export const DTYPES = /** @type {const} */ (["f32", "f16", "int8"]);

/**
 * @param {SettingName} name
 * @param {readonly (typeof DTYPES[number])[]} [dtypes]
 * @returns {import("./report.js").Part}
 */
export function shapesPart(name, dtypes = DTYPES) {
  const { model, paper, rank, adapters, components: K } = SETTINGS[name];
  return {
    question: `${model}: ${adapters} adapters of rank ${rank}, K ${K}. How large is the pack? The paper: ${paper}.`,
    rows: dtypes.map((dtype) => inFreshProcess(new URL(import.meta.url), "packSetting", [name, dtype])),
    notes: arithmetic(name),
  };
}

/** @param {SettingName} name */
function arithmetic(name) {
  const { rank, adapters, components: K, groups, why } = SETTINGS[name];
  const modules = sum(groups.map(([count]) => count));
  const lengths = sum(groups.map(([count, out, inputs]) => count * (out + inputs)));
  const loras = adapters * rank * lengths;
  const bases = (K + 1) * lengths;
  const coefficients = adapters * modules * 2 * rank * K;
  /** @param {number} values */
  const mega = (values) => `${((4 * values) / 1e6).toFixed(1)} MB`;
  return [
    `In f32, over ${modules} modules with Σ(in + out) = ${lengths}: adapters ${adapters}·${rank}·${lengths} values = ${mega(loras)};`,
    `components and means ${K + 1}·${lengths} = ${mega(bases)}; coefficients ${adapters}·${modules}·2·${rank}·${K} = ${mega(coefficients)}:`,
    `${mega(loras)} / ${mega(bases + coefficients)} = ${(loras / (bases + coefficients)).toFixed(1)}×. Without means ${(loras / (bases - lengths + coefficients)).toFixed(1)}×.`,
    ...why,
  ];
}

/**
 * Packs a setting; the time excludes making its numbers.
 * @param {SettingName} name
 * @param {typeof DTYPES[number]} dtype
 */
export async function packSetting(name, dtype) {
  const adapters = adaptersOf(name);
  let making = 0;
  for (const { modules } of adapters) {
    for (const module of modules.values()) {
      const { read } = module;
      // Numbers are made before anything is awaited.
      module.read = () => {
        const start = performance.now();
        const made = read();
        making += performance.now() - start;
        return made;
      };
    }
  }
  const start = performance.now();
  const { report } = await buildPack(adapters, {
    select: { kind: "k", k: SETTINGS[name].components },
    dtype: { basis: dtype, coefficients: dtype, head: dtype },
    ...(process.stderr.isTTY
      ? { onProgress: ({ done }) => process.stderr.write(`\r${name} ${dtype}: ${done} % `) }
      : {}),
  });
  const seconds = (performance.now() - start - making) / 1000;
  return {
    name: `${name}, ${dtype}`,
    "adapters, MB": report.adapterBytes / 1e6,
    "pack, MB": report.bytes / 1e6,
    "adapters ÷ pack": report.ratio,
    "packing, s": seconds,
    "making the numbers, s": making / 1000,
    "peak memory, MB": (await peakMemory()) / 1e6,
  };
}
