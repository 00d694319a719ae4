/**
 * How long does packing take, from adapter files to one file, beside PyPI's lorashare on the same adapters in the same run?
 * Both run in a process of their own, one thread, and are timed from the first file read to the last file written; the
 * first pass of a process and the median of six are given, since a command line only ever sees the first.
 */
import { spawnSync } from "node:child_process";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { buildPack } from "eigenlora/build";
import { findAdapters, readAdapters } from "eigenlora/node";
import { data, median, min, print, python } from "./report.js";

const SUITE = data("adapters/own-seed");

/** @type {Record<string, import("eigenlora/build").BuildOptions>} */
const SETTINGS = {
  "K 32": { select: { kind: "k", k: 32 } },
  "K 16": { select: { kind: "k", k: 16 } },
  "energy 0.9 (default)": {},
  "energy 1, f32": { select: { kind: "energy", share: 1 }, dtype: { basis: "f32", coefficients: "f32", head: "f32" } },
  "error 0.3": { select: { kind: "error", max: 0.3 } },
};

const folder = process.argv[3];
if (process.argv[2] === "--one" && folder) await measure(process.argv[4] ?? "", folder);
else await compare();

/** @param {string} setting @param {string} out */
async function measure(setting, out) {
  const seconds = [];
  let report;
  for (let pass = 0; pass < 6; pass++) {
    const start = performance.now();
    const adapters = await readAdapters([SUITE]);
    const built = await buildPack(adapters, SETTINGS[setting]);
    await writeFile(join(out, "tasks.eigen"), built.chunks);
    seconds.push((performance.now() - start) / 1000);
    for (const adapter of adapters) await adapter.close();
    report = built.report;
  }
  const peak = process.resourceUsage().maxRSS * 1024;
  console.log(JSON.stringify({ seconds, bytes: report?.bytes, error: report?.error.mean, peak }));
}

async function compare() {
  const scratch = await mkdtemp(join(tmpdir(), "eigenlora-bench-"));
  try {
    const folders = (await findAdapters([SUITE])).map((a) => a.folder);
    const peer = python("pack.py", join(scratch, "peer"), ...folders);
    const found = "figures" in peer ? peer.figures : null;
    /** @type {import("./report.js").Row[]} */
    const rows = Object.keys(SETTINGS).map((name) => {
      const script = fileURLToPath(import.meta.url);
      const { stdout, stderr } = spawnSync(process.execPath, [script, "--one", scratch, name], { encoding: "utf8" });
      if (!stdout) throw new Error(stderr);
      const { seconds, bytes, error, peak } = JSON.parse(stdout);
      return {
        name: `eigenlora, ${name}`,
        "first, s": seconds[0],
        "median, s": median(seconds),
        "min, s": min(seconds),
        "first ÷ lorashare's first": found && seconds[0] / found.first,
        "median ÷ lorashare's median": found && median(seconds) / found.median,
        bytes,
        "ΔW error, mean": error,
        "peak MB": peak / 1e6,
      };
    });
    if (found) {
      const { first, median: m, min: least, bytes, peakMemoryBytes } = found;
      rows.push({
        name: "lorashare, K 32",
        "first, s": first,
        "median, s": m,
        "min, s": least,
        bytes,
        "peak MB": peakMemoryBytes / 1e6,
      });
    }
    print({
      question: "How long does packing 20 adapters take (own-seed, 12 modules, r 8), from files to a file?",
      rows,
      peers: [
        found
          ? { name: "lorashare", version: found.version }
          : { name: "lorashare", reason: "reason" in peer ? peer.reason : "" },
      ],
    });
  } finally {
    await rm(scratch, { recursive: true });
  }
}
