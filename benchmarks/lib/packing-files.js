/** Packing files of a setting with the command line, in a process of its own. */
import { spawnSync } from "node:child_process";
import { availableParallelism } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { SETTINGS } from "./settings.js";

const CLI = fileURLToPath(new URL("../../dist/src/cli/main.js", import.meta.url));

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
      const args = [CLI, "pack", folder, "-o", output, "--force", "--json", "--workers", String(workers), ...way];
      const { status, stdout } = spawnSync(process.execPath, args, {
        encoding: "utf8",
        stdio: ["ignore", "pipe", "inherit"],
        maxBuffer: 2 ** 28,
      });
      if (status !== 0) throw new Error(`pack ${way.join(" ")} failed`);
      const made = JSON.parse(stdout);
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
