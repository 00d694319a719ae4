/**
 * The paper's two settings by shape: how large is the pack, how long does packing take, and how much memory? Adapters of the same
 * shapes, ranks and number, made while they are read (synthetic.js), in a process of their own for each stored type.
 *
 * node benchmarks/shapes.js [--setting sdxl|flan-t5] [--type f32|f16|int8] [--json]
 */
import { spawnSync } from "node:child_process";
import { fileURLToPath } from "node:url";
import { buildPack } from "eigenlora/build";
import { option, print } from "./report.js";
import { syntheticAdapters } from "./synthetic.js";

/** @typedef {[number, number, number]} Group how many modules of one shape, out, in */

/** @type {Record<string, { model: string, paper: string, rank: number, adapters: number, components: number, groups: Group[] }>} */
export const SETTINGS = {
  sdxl: {
    model: "SDXL's UNet, attention",
    paper: "4.6 GB to 261 MB, 18×",
    rank: 32,
    adapters: 20,
    components: 14,
    groups: [
      [360, 1280, 1280],
      [120, 1280, 2048],
      [60, 640, 640],
      [20, 640, 2048],
    ],
  },
  "flan-t5": {
    model: "FLAN-T5-large, query and value",
    paper: "about 5×",
    rank: 16,
    adapters: 8,
    components: 32,
    groups: [[144, 1024, 1024]],
  },
};

const TYPES = /** @type {const} */ (["f32", "f16", "int8"]);

/**
 * Adapters of a setting, or of a part of it.
 * @param {keyof typeof SETTINGS} name
 * @param {Group[]} groups
 */
export function adaptersOf(name, groups = SETTINGS[name].groups) {
  const { rank, adapters, components } = SETTINGS[name];
  const modules = groups.flatMap(([count, out, inputs], group) =>
    Array.from({ length: count }, (_, i) => ({
      name: `block.${group}.${String(i).padStart(3, "0")}`,
      out,
      in: inputs,
    })),
  );
  return syntheticAdapters({ rank, adapters, modules, shared: components + 2, noise: 1 });
}

/**
 * Size, time and memory of packing a setting at each stored type, and the arithmetic of the size.
 * @param {keyof typeof SETTINGS} name
 * @param {readonly string[]} types
 * @returns {import("./report.js").Part}
 */
export function shapesPart(name, types = TYPES) {
  const { model, paper, rank, adapters, components: K, groups } = SETTINGS[name];
  const rows = types.map((type) => {
    const args = [fileURLToPath(import.meta.url), "--one", name, type];
    const { stdout } = spawnSync(process.execPath, args, { encoding: "utf8", stdio: ["ignore", "pipe", "inherit"] });
    if (!stdout) throw new Error(`${name}, ${type}: failed`);
    return JSON.parse(stdout);
  });
  return {
    question: `${model}: ${adapters} adapters of rank ${rank}, K ${K}. How large is the pack? The paper: ${paper}.`,
    rows,
    notes: arithmetic(name, groups),
  };
}

/** @param {string} name @param {Group[]} groups */
function arithmetic(name, groups) {
  const { rank, adapters, components: K } = SETTINGS[name];
  const modules = groups.reduce((sum, [count]) => sum + count, 0);
  const lengths = groups.reduce((sum, [count, out, inputs]) => sum + count * (out + inputs), 0);
  const [loras, bases, coefficients] = [
    adapters * rank * lengths,
    (K + 1) * lengths,
    adapters * modules * 2 * rank * K,
  ];
  /** @param {number} values */
  const mega = (values) => `${((4 * values) / 1e6).toFixed(1)} MB`;
  return [
    `In f32, over ${modules} modules with Σ(in + out) = ${lengths}: adapters ${adapters}·${rank}·${lengths} values = ${mega(loras)};`,
    `components and means ${K + 1}·${lengths} = ${mega(bases)}; coefficients ${adapters}·${modules}·2·${rank}·${K} = ${mega(coefficients)}:`,
    `${mega(loras)} / ${mega(bases + coefficients)} = ${(loras / (bases + coefficients)).toFixed(1)}×. Without means ${(loras / (bases - lengths + coefficients)).toFixed(1)}×.`,
    ...EXPLAINED[name],
  ];
}

/** Why our sizes are not the paper's. @type {Record<string, string[]>} */
const EXPLAINED = {
  sdxl: [
    "The paper's 4.6 GB are 230 MB an adapter; attention of the UNet at rank 32 in f32 is 185.8 MB, so 24 % of its bytes lie in layers it",
    "does not name. Its 261 MB are 5.7 % of 4.6 GB, ours 3.4 % of 3.7 GB: K 14 for 20·32 rows is 2.2 %, coefficients 1.1 %, means 0.2 %.",
    "By this arithmetic 261 MB would hold K 24 at the paper's sizes: it stores more than components and coefficients at K 14, or not all in one type.",
  ],
  "flan-t5": [
    "K 32 for 8·16 rows is 4× at best, before means and coefficients: the paper's 5× at K 32 takes 13 adapters by this arithmetic.",
  ],
};

/** The child's part. @param {string} name @param {typeof TYPES[number]} type */
async function pack(name, type) {
  const adapters = adaptersOf(name);
  let making = 0;
  for (const { modules } of adapters) {
    for (const module of modules.values()) {
      const { read } = module;
      // Made before anything is waited for.
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
    dtype: { basis: type, coefficients: type, head: type },
    ...(process.stderr.isTTY
      ? { onProgress: (done, of) => process.stderr.write(`\r${name} ${type}: module ${done} of ${of} `) }
      : {}),
  });
  const seconds = (performance.now() - start - making) / 1000;
  console.log(
    JSON.stringify({
      name: `${name}, ${type}`,
      "adapters, MB": report.adapterBytes / 1e6,
      "pack, MB": report.bytes / 1e6,
      "adapters ÷ pack": report.ratio,
      "packing, s": seconds,
      "making the numbers, s": making / 1000,
      "peak memory, MB": (process.resourceUsage().maxRSS * 1024) / 1e6,
    }),
  );
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const [, , mode, name = "", type = ""] = process.argv;
  if (mode === "--one") await pack(name, /** @type {typeof TYPES[number]} */ (type));
  else {
    const only = option("setting");
    const types = option("type");
    const parts = Object.keys(SETTINGS)
      .filter((each) => !only || each === only)
      .map((each) => shapesPart(each, types ? [types] : TYPES));
    print({
      question: parts.map(({ question }) => question).join(" "),
      rows: parts.flatMap(({ rows }) => rows),
      notes: parts.flatMap(({ notes = [] }) => notes),
      peers: [],
    });
  }
}
