/**
 * Measures the memory of N adapters in each way of holding them. Each figure is measured in a fresh process: resident
 * set after garbage collection minus before, with the base model's weights in none of them.
 *
 * The 20 real adapters of own-seed are repeated to reach N; only the count is real beyond 20.
 */
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { openPack } from "eigenlora";
import { findAdapters } from "eigenlora/node";
import { placeOf } from "../dist/src/format/encode.js";
import { freshPack } from "../dist/src/pack/write.js";
import { data } from "../examples/minilm.js";
import { folderOf, packOfK, withAdapters } from "./lib/adapters.js";
import { number, readArguments } from "./lib/arguments.js";
import { WAYS } from "./lib/holding.js";
import { peerLine, python } from "./lib/peers.js";
import { inFreshProcess, inScratch } from "./lib/process.js";
import { print } from "./lib/report.js";

const COUNTS = [1, 5, 20, 100, 300, 1000];
/** Most adapters of PEFT, whose time for the n-th one grows with n; 1000 take it a quarter of an hour. */
const PEFT_UP_TO = 100;
const SUITE = folderOf("own-seed");

const { json, most } = readArguments("How much resident memory do N LoRA adapters take, by the way they are held?", {
  most: number("adapters at most", 1000),
});
const counts = COUNTS.filter((count) => count <= most);
/** @type {import("./lib/report.js").Peer[]} */
const peers = [];
const folders = (await findAdapters([SUITE])).map(({ path }) => path);
const bytes = await withAdapters([SUITE], (adapters) => packOfK(adapters, 32));

/** @type {import("./lib/report.js").Row[]} */
const rows = [];
await inScratch(async (scratch) => {
  for (const count of counts) {
    const file = join(scratch, `${count}.eigen`);
    await writeFile(file, await repeated(count));
    rows.push({ name: `${count} adapters`, ...held(file, count) });
  }
});
print(
  json,
  [
    {
      question: "How much resident memory do N LoRA adapters take (MiniLM, 12 modules, r 8; pack at K 32, f16)?",
      rows,
      notes: [
        "Resident set of a fresh process each, after minus before; below about 1 MB it is noise. Real adapters up to 20, then repeated.",
      ],
    },
  ],
  peers.slice(-1),
);

/** Makes a pack with a given number of tasks, repeating the real ones. @param {number} count */
async function repeated(count) {
  const pack = await openPack(bytes);
  const ids = [...pack.tasks.keys()];
  const tasks = [];
  for (let i = 0; i < count; i++) {
    const id = ids[i % ids.length];
    tasks.push({ entry: { id: `${id} ${i}`, adapterBytes: 0, metadata: {} }, blob: (await pack.load(id)).bytes });
  }
  const { chunks } = await freshPack(pack, await Promise.all(tasks.map(placeOf)));
  await pack.close();
  return chunks;
}

/** @param {string} file the pack @param {number} count */
function held(file, count) {
  /** @type {import("./lib/report.js").Row} */
  const row = {};
  for (const way of WAYS)
    row[`${way}, MB`] = inFreshProcess(new URL("lib/holding.js", import.meta.url), "hold", [way, count, file]) / 1e6;
  if (count > PEFT_UP_TO) return row;
  const peer = python("memory.py", [data("minilm"), String(count), ...folders]);
  if ("figures" in peer) row["PEFT, all adapters, MB"] = peer.figures.bytes / 1e6;
  peers.push(peerLine("PEFT", peer));
  return row;
}
