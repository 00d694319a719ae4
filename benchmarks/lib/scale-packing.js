/** Packs for benchmarks/scale.js, in a process that holds nothing else. */
import { clocked, peakMemory } from "./process.js";

/**
 * Packs a folder by the command line, in this process.
 * @param {string} adapters
 * @param {string} pack
 * @param {string} options
 */
export async function packed(adapters, pack, options) {
  const main = new URL("../../dist/src/cli/main.js", import.meta.url).pathname;
  process.argv = [process.execPath, main, "pack", adapters, "-o", pack, ...options.split(" ").filter(Boolean)];
  const { cpu } = await clocked(async () => {
    await import(main);
    await new Promise((resolve) => process.once("beforeExit", resolve));
  });
  return { "CPU, s": cpu / 1000, "peak, MB": (await peakMemory()) / 1e6 };
}
