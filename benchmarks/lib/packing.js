/** Packing the adapters of own-seed from their files to one file, in one process. */
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { buildPack } from "eigenlora/build";
import { folderOf, withAdapters } from "./adapters.js";
import { clocked, peakMemory } from "./process.js";

const PASSES = 6;

/** @type {Record<string, import("eigenlora/build").BuildOptions>} */
export const SETTINGS = {
  "K 32": { select: { kind: "k", k: 32 } },
  "K 16": { select: { kind: "k", k: 16 } },
  "energy 0.9 (default)": {},
  "energy 1, f32": { select: { kind: "energy", share: 1 }, dtype: { basis: "f32", coefficients: "f32", head: "f32" } },
};

/** @param {string} setting @param {string} folder where the pack goes */
export async function measurePacking(setting, folder) {
  const seconds = [];
  /** @type {import("eigenlora/build").BuildReport | undefined} */
  let report;
  for (let pass = 0; pass < PASSES; pass++) {
    const { ms } = await clocked(() =>
      withAdapters([folderOf("own-seed")], async (adapters) => {
        const built = await buildPack(adapters, SETTINGS[setting]);
        await writeFile(join(folder, "tasks.eigen"), built.chunks);
        report = built.report;
      }),
    );
    seconds.push(ms / 1000);
  }
  return { seconds, bytes: report?.bytes, error: report?.error.mean, peak: await peakMemory() };
}
