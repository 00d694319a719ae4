/** Whole hubs of synthetic adapters on SmolLM2's shapes, from shard to assemble through Ray on this machine. */
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { sum } from "simple-statistics";
import { python } from "./peers.js";
import { inScratch } from "./process.js";

/**
 * Linear layers of SmolLM2-135M: [out, in, the part of a block that they are in]. @type {Record<string, [number,
 * number, string]>}
 */
export const SMOLLM2 = {
  q: [576, 576, "self_attn"],
  k: [192, 576, "self_attn"],
  v: [192, 576, "self_attn"],
  o: [576, 576, "self_attn"],
  gate: [1536, 576, "mlp"],
  up: [1536, 576, "mlp"],
  down: [576, 1536, "mlp"],
};
export const BLOCKS = 30;
export const RANK = 16;
const K = 32;
const COMMANDS = ["shard", "merge", "project", "assemble"];
const command = fileURLToPath(new URL("hub-command.js", import.meta.url));

/**
 * @typedef {{ layers: string, shards: number, cpus: number }} How
 * @typedef {{ count: number, row: import("./report.js").Row, seconds: ReadonlyMap<string, number> }} Hub seconds: of a
 *   core, by command
 */

/**
 * Packs hubs with these numbers of adapters, one after the other on one cluster.
 * @param {readonly number[]} counts
 * @param {How} how
 * @returns {Promise<{ reason: string } | { ray: string, hubs: Hub[] }>}
 */
function packHubs(counts, { layers, shards, cpus }) {
  return inScratch(async (scratch) => {
    const settings = [scratch, counts.join(), shards, K, cpus].map(String);
    const ran = python("hub_ray.py", [...settings, process.execPath, command, layers]);
    if ("reason" in ran) return ran;
    const hubs = counts.map(async (count, i) => {
      const lines = (await readFile(join(scratch, String(count), "log.jsonl"), "utf8")).trim().split("\n");
      return hubOf(
        count,
        lines.map((line) => JSON.parse(line)),
        ran.figures.hubs[i],
      );
    });
    return { ray: ran.figures.ray, hubs: await Promise.all(hubs) };
  });
}

/**
 * @param {number} count
 * @param {readonly any[]} runs what every command said of itself
 * @param {{ seconds: number, bytes: number }} whole
 * @returns {Hub}
 */
function hubOf(count, runs, whole) {
  /** @param {string} name */
  const secondsOf = (name) => sum(runs.filter((run) => run.command === name).map((run) => run.coreSeconds));
  const seconds = new Map(COMMANDS.map((name) => [name, secondsOf(name)]));
  const row = {
    name: `${count} adapters`,
    ...Object.fromEntries([...seconds].map(([name, value]) => [`${name}, s`, value])),
    "all, s of a core": sum([...seconds.values()]),
    "wall, s": whole.seconds,
    "largest part, MB": Math.max(...runs.filter((run) => run.command !== "assemble").map((run) => run.bytes)) / 1e6,
    "peak MB": Math.max(...runs.map((run) => run.peakMemoryBytes)) / 1e6,
    "pack, MB": whole.bytes / 1e6,
  };
  return { count, row, seconds };
}

/**
 * Measures whole hubs of several sizes; derives the cost of one more adapter, and of very many.
 * @param {readonly number[]} counts of adapters
 * @param {How} how
 * @param {{ adapters: number, blocks: number, shapes: Record<string, number[]> }} large the hub that is wanted, of
 *   Llama 2 7B
 * @returns {Promise<{ parts: import("./report.js").Part[], peers: import("./report.js").Peer[] }>}
 */
export async function wholeHubs(counts, how, large) {
  const made = await packHubs(counts, how);
  if ("reason" in made) return { parts: [], peers: [{ name: "Ray", reason: made.reason }] };
  const { hubs } = made;
  const names = how.layers.split(",");
  /**
   * Summaries grow with Σ w², projecting and bytes with Σ w.
   * @param {(name: string) => readonly number[]} of out and in of a layer
   */
  const units = (of) => {
    const sides = names.flatMap((name) => of(name));
    return { squares: sum(sides.map((w) => w * w)), widths: sum(sides) };
  };
  const [ours, theirs] = [units((name) => sidesOf(name)), units((name) => large.shapes[name] ?? [])];
  const blocks = large.blocks / BLOCKS;
  const rows = slopes(hubs).map(({ name, each, fixed }) => {
    const hours = (fixed + large.adapters * each) / 3600;
    const squares = name === "shard" || name === "merge";
    const factor = blocks * (squares ? theirs.squares / ours.squares : theirs.widths / ours.widths);
    return {
      name,
      "one more adapter, ms of a core": 1000 * each,
      [`${large.adapters} adapters, h`]: hours,
      "Llama 2 7B, × more": factor,
      "Llama 2 7B, h": factor * hours,
    };
  });
  const what = `SmolLM2-135M's ${how.layers}, rank ${RANK}, K ${K}, ${how.shards} shards, ${how.cpus} at a time`;
  return {
    parts: [
      {
        question: `What do whole hubs cost through Ray, in seconds of a core (${what})?`,
        rows: hubs.map(({ row }) => row),
      },
      {
        question: "What does one more adapter cost, and what do very many?",
        rows,
        notes: ["By least squares; merging is the mean. Making the synthetic adapters is not counted."],
      },
    ],
    peers: [{ name: "Ray", version: made.ray }],
  };
}

/** @param {string} name */
function sidesOf(name) {
  const [out, width] = SMOLLM2[name] ?? [0, 0];
  return [out, width];
}

/**
 * Seconds of a core that each command takes for one more adapter, and for none, by least squares; merging depends only
 * on the number of parts.
 * @param {readonly Hub[]} hubs two at least
 */
function slopes(hubs) {
  const middle = sum(hubs.map(({ count }) => count)) / hubs.length;
  const spread = sum(hubs.map(({ count }) => (count - middle) ** 2));
  return COMMANDS.map((name) => {
    const values = hubs.map(({ seconds }) => seconds.get(name) ?? 0);
    const mean = sum(values) / hubs.length;
    const rise = sum(hubs.map(({ count }, i) => (count - middle) * ((values[i] ?? 0) - mean))) / spread;
    const each = name === "merge" ? 0 : rise;
    return { name, each, fixed: mean - each * middle };
  });
}
