/**
 * Measures memory and a switch in Hermes and workerd, compared with Node. The same script in each: a pack of real
 * adapters, opened from bytes; weights in the engine's memory, or the factors of the active task handed out.
 *
 * EIGENLORA_RUNTIMES names the folder with hermes-engine-cli, Metro and workerd. Time is taken outside, since a
 * Worker's clock stands still while it computes: a process with more switches minus one with fewer. Memory is the most
 * that was resident, minus that of a process that holds the same bytes and weights and opens nothing.
 */
import { folderOf, packOfK, withAdapters } from "./lib/adapters.js";
import { number, readArguments } from "./lib/arguments.js";
import { can, ENGINES, measure, prepare } from "./lib/engines.js";
import { inScratch } from "./lib/process.js";
import { print } from "./lib/report.js";

const { json, runs } = readArguments("Memory and switches in Hermes and workerd, compared with Node", {
  runs: number("processes of each kind; the least counts", 3, 1),
});
const packed = await withAdapters([folderOf("own-seed")], (adapters) => packOfK(adapters, 32));

/**
 * Least of several runs.
 * @param {string} folder
 * @param {string} engine
 * @param {import("./lib/engines.js").Task} task
 */
async function least(folder, engine, task) {
  const command = await /** @type {typeof ENGINES.node} */ (ENGINES[engine])(folder, task);
  const found = [];
  for (let i = 0; i < runs; i++) found.push(await measure(...command));
  return { seconds: Math.min(...found.map((one) => one.seconds)), peak: Math.min(...found.map((one) => one.peak)) };
}

/** @type {import("./lib/report.js").Row[]} */
const rows = [];
await inScratch(async (folder) => {
  await prepare(folder, packed);
  for (const mode of /** @type {const} */ (["folded", "factors"])) {
    for (const backend of /** @type {const} */ (["js", "wasm"])) {
      /** @type {{ ms: number, mb: number } | undefined} */
      let node;
      for (const engine of Object.keys(ENGINES)) {
        if (!can(engine, backend)) continue;
        const more = engine === "hermes" ? 10 : 200;
        const empty = await least(folder, engine, { backend, mode, switches: -1 });
        const few = await least(folder, engine, { backend, mode, switches: 2 });
        const many = await least(folder, engine, { backend, mode, switches: 2 + more });
        const [ms, mb] = [(1000 * (many.seconds - few.seconds)) / more, many.peak - empty.peak];
        if (engine === "node") node = { ms, mb };
        const beside = node && { "× Node's": ms / node.ms, "× Node's memory": mb / node.mb };
        rows.push({
          name: engine,
          how: `${mode}, ${backend}`,
          "ms a switch": ms,
          "MB more": mb,
          ...beside,
          "MB in all": many.peak,
        });
      }
    }
  }
});
print(json, [
  {
    question: "What do memory and a switch cost (20 adapters, 12 modules of 384×384, r 8, K 32)?",
    rows,
    notes: [
      `The pack has ${packed.length} bytes. "MB more": than a process with the same bytes and weights that opens nothing.`,
    ],
  },
]);
