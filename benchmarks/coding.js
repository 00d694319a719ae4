/**
 * Measures the bytes that entropy coding saves, and the cost of decoding. Packs of real adapters with a step: each
 * stored section, the same bytes without coding, decoded in JavaScript and by WebAssembly, and Brotli and Deflate of
 * these bytes, decoded by Node's zlib in the same run. Times are CPU times of one thread per 10 kB as stored: of the
 * first section that a process decodes, and of the fastest round.
 */
import { brotliCompressSync, brotliDecompressSync, deflateRawSync, inflateRawSync } from "node:zlib";
import { openPack } from "eigenlora";
import { buildPack } from "eigenlora/build";
import { min, sum } from "simple-statistics";
import { decodeSection } from "../dist/src/format/coded.js";
/** @import { Decoding } from "../dist/src/format/coded.js" */
import { folderOf, SUITES, withAdapters } from "./lib/adapters.js";
import { choice, number, readArguments } from "./lib/arguments.js";
import { print } from "./lib/report.js";

const QUESTION = "What does entropy coding save, and what does decoding cost?";
const { json, suite, k, rank, step, rounds } = readArguments(QUESTION, {
  suite: choice(SUITES, "which adapters", "hub"),
  k: number("components of a side", 20, 1),
  rank: number("strongest directions of each module that are kept", 3, 1),
  step: number("of the integers", 0.05),
  rounds: number("of decoding", 20, 1),
});

const chunks = await withAdapters([folderOf(suite)], async (adapters) => {
  const made = await buildPack(adapters, { gauge: "balanced", rank, step, select: { kind: "k", k } });
  return made.chunks;
});
const file = new Uint8Array(Buffer.concat(chunks));
const pack = await openPack(file);
const coded = pack.directory.sections.filter((section) => section.coded);
const stored = coded.map(({ offset, length }) => file.subarray(offset, offset + length));

/** @param {(bytes: Uint8Array) => Uint8Array | Promise<Uint8Array>} decode @param {readonly Uint8Array[]} all */
const clock = async (decode, all) => {
  const bytes = sum(all.map(({ length }) => length));
  const before = process.cpuUsage().user;
  await decode(all[0]);
  const first = (10 * (process.cpuUsage().user - before)) / all[0].length;
  const found = [];
  for (let round = 0; round < rounds; round++) {
    const before = process.cpuUsage().user;
    for (const one of all) await decode(one);
    found.push((10 * (process.cpuUsage().user - before)) / bytes);
  }
  return { "first, ms": first, "ms for 10 kB": min(found) };
};

const how = { file: "pack", part: "section", before: pack.directory.basisBytes };
/** @param {Partial<Decoding>} [more] @returns {(bytes: Uint8Array) => Promise<Uint8Array>} */
const decoder = (more) => (bytes) => decodeSection(bytes, { ...how, ...more });
const wasm = await clock(decoder(), stored);
const js = await clock(decoder({ by: () => undefined }), stored);
const plain = await Promise.all(stored.map(decoder()));
const total = sum(plain.map(({ length }) => length));
/** @param {readonly Uint8Array[]} all */
const sizes = (all) => {
  const bytes = sum(all.map(({ length }) => length));
  return { "bases, bytes": all[0].length, "blobs, bytes": bytes - all[0].length, "share of plain": bytes / total };
};
const brotli = plain.map((bytes) => brotliCompressSync(bytes));
const deflate = plain.map((bytes) => deflateRawSync(bytes, { level: 9 }));
print(json, [
  {
    question: `${QUESTION} ${suite}, K ${k}, rank ${rank}, step ${step}.`,
    rows: [
      { name: "plain", ...sizes(plain) },
      { name: "coded, WebAssembly", ...sizes(stored), ...wasm },
      { name: "coded, JavaScript", ...sizes(stored), ...js },
      { name: "Brotli 11", ...sizes(brotli), ...(await clock(brotliDecompressSync, brotli)) },
      { name: "Deflate 9", ...sizes(deflate), ...(await clock(inflateRawSync, deflate)) },
    ],
    notes: [
      `Each of ${stored.length} sections by itself, as a reader fetches them. Times: CPU, one thread, for 10 kB as stored.`,
    ],
  },
]);
