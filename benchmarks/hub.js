/**
 * Measures the cost of packing 10 000 adapters of rank 32 of a model of 7 billion parameters. Each command of
 * docs/hub.md is run on synthetic adapters of one square module, at three widths and two numbers of adapters; the
 * difference of the two is what one more adapter costs, in seconds of a core, so that a busy machine makes no
 * difference. In the same run numpy does the same sums on the same files, one thread as we do: Gram matrices in f64,
 * LAPACK's eigh, products with the components.
 *
 * Arithmetic says how the cost grows: a summary takes r·w²/2 multiplications per side of width w, projecting r·K·w. The
 * measured seconds per unit at the largest width, times the units of the model's layers, give the hours.
 *
 * `--whole 250,500,1000,2000` runs whole hubs instead: that many synthetic adapters of rank 16 on SmolLM2-135M's
 * shapes, through Ray (examples/hub/pack.py), made as they are read. The slope against their number gives the hours for
 * 10 000, and by the same arithmetic those of a model of 7 billion parameters.
 */
import { sum } from "simple-statistics";
import { number, readArguments, text } from "./lib/arguments.js";
import { K, measure, RANK } from "./lib/hub.js";
import { wholeHubs } from "./lib/hub-whole.js";
import { peerLine } from "./lib/peers.js";
import { print } from "./lib/report.js";

/** Shapes of Llama 2 7B's linear layers, [out, in]. @type {Record<string, number[]>} */
const LAYERS = {
  q: [4096, 4096],
  k: [4096, 4096],
  v: [4096, 4096],
  o: [4096, 4096],
  gate: [11008, 4096],
  up: [11008, 4096],
  down: [4096, 11008],
};
const BLOCKS = 32;
const MODELS = { "query and value": ["q", "v"], "all linear layers": Object.keys(LAYERS) };
const ADAPTERS = 10_000;
const SHARDS = 16;

const { json, widths, whole, layers, shards, cpus } = readArguments(
  "What does it cost to pack 10 000 adapters of a model of 7 billion parameters?",
  {
    widths: text("N,N,…", "sides of the square module", "1024,2048,4096"),
    whole: text("N,N,…", "instead: whole hubs of so many adapters on SmolLM2's shapes through Ray"),
    layers: text("q,v,…", "layers of --whole, of q, k, v, o, gate, up, down", "q,k,v,o,gate,up,down"),
    shards: number("of --whole; each makes its adapters on the disk and deletes them", 8, 1),
    cpus: number("of --whole: commands that run at a time", 2, 1),
  },
);
if (whole !== undefined) {
  const counts = whole.split(",").map(Number);
  const { parts, peers } = await wholeHubs(
    counts,
    { layers, shards, cpus },
    { adapters: ADAPTERS, blocks: BLOCKS, shapes: LAYERS },
  );
  print(json, parts, peers);
  process.exit();
}
const measured = [];
for (const width of widths.split(",").map(Number)) measured.push(await measure(width));
const largest = measured[measured.length - 1];

const rows = measured.map(({ width, counts, shard, merge, basis, project, peer }) => {
  const figures = "figures" in peer ? peer.figures : null;
  return {
    name: `width ${width}`,
    adapters: counts.join(", "),
    "shard, s an adapter": shard.each,
    "GMAC/s": (RANK * width ** 2) / shard.each / 1e9,
    "÷ numpy": figures && shard.each / figures.shard,
    "merge two parts, s": merge.coreSeconds,
    "basis, s": basis.coreSeconds,
    "÷ numpy's eigh": figures && basis.coreSeconds / figures.basis,
    "project, s an adapter": project.each,
    "÷ numpy's": figures && project.each / figures.project,
    "part, MB": shard.many.bytes / 1e6,
    "peak MB": Math.max(...[shard.many, merge, basis].map((report) => report.peakMemoryBytes)) / 1e6,
  };
});

/** Triangle and sum of both sides, in bytes of f64. @param {number[]} shape */
const summaryBytes = (shape) => sum(shape.map((w) => 8 * ((w * (w + 1)) / 2 + w)));
/** @param {number[]} shape */
const squares = (shape) => sum(shape.map((w) => w * w));
/** Two sides of the largest width that was measured. */
const unit = { squares: 2 * largest.width ** 2, widths: 2 * largest.width, bytes: largest.merge.bytes };

const hours = Object.entries(MODELS).map(([name, layers]) => {
  /** @param {(shape: number[]) => number} of over all blocks */
  const total = (of) => BLOCKS * sum(layers.map((layer) => of(LAYERS[layer])));
  const modules = BLOCKS * layers.length;
  const [part, task, all] = [total(summaryBytes), modules * 2 * RANK * K * 2, total(sum)];
  return {
    name: `7B, ${name}`,
    modules,
    "adapters, f32 GB": (ADAPTERS * 4 * RANK * all) / 1e9,
    [`${SHARDS} parts, GB`]: (SHARDS * part) / 1e9,
    "shard, h": (ADAPTERS * largest.shard.each * total(squares)) / unit.squares / 3600,
    "merge, h": (SHARDS * (largest.merge.coreSeconds / 2) * part) / unit.bytes / 3600,
    "basis, h": (largest.basis.coreSeconds * total(squares)) / unit.squares / 3600,
    "project, h": (ADAPTERS * largest.project.each * all) / unit.widths / 3600,
    "basis, MB": (all * (K + 1) * 2) / 1e6,
    "a task, kB": task / 1e3,
    "pack, GB": (ADAPTERS * task + all * (K + 1) * 2) / 1e9,
  };
});

print(
  json,
  [
    { question: `What does each command cost for one more adapter (rank ${RANK}, one square module, K ${K})?`, rows },
    {
      question: `What do ${ADAPTERS} adapters of rank ${RANK} cost, in hours of one core and in bytes, at two passes over the adapters?`,
      rows: hours,
      notes: ["From the largest width above: shard and basis by squares of widths, project by widths, merge by bytes."],
    },
  ],
  [peerLine("numpy", largest.peer)],
);
