/**
 * Times packing, from adapter files to one file, compared with PyPI's lorashare on the same adapters in the same run.
 * Both run in a process of their own, one thread, and are timed from the first file read to the last file written; the
 * first pass of a process and the median of six are given, since a command line only ever sees the first.
 */
import { existsSync } from "node:fs";
import { join } from "node:path";
import { findAdapters } from "eigenlora/node";
import { median, min } from "simple-statistics";
import { folderOf } from "./lib/adapters.js";
import { flag, readArguments, text } from "./lib/arguments.js";
import { SETTINGS } from "./lib/packing.js";
import { peerLine, python } from "./lib/peers.js";
import { inFreshProcess, inScratch } from "./lib/process.js";
import { print } from "./lib/report.js";
import { packingRows, writeSetting } from "./lib/setting-files.js";

const { json, sdxl, folder, ...rest } = readArguments("How long does packing take, from adapter files to one file?", {
  sdxl: flag(
    "20 synthetic adapters of SDXL's attention instead, 3.7 GB of files in f32, with one worker and with one for each core",
  ),
  folder: text(
    "DIR",
    "with --sdxl: where these adapters are, or are written and kept; otherwise they are made and removed",
  ),
  default: flag("with --sdxl: also without --k, the search for an error of 0.15, which takes much longer"),
});

if (sdxl) await inScratch(packSdxl);
else await inScratch(packOwnSeed);

/** @param {string} scratch */
async function packSdxl(scratch) {
  const at = folder ?? join(scratch, "adapters");
  if (!existsSync(at)) await writeSetting("sdxl", at);
  const rows = packingRows("sdxl", at, scratch, [["--k", "14"], ...(rest.default ? [[]] : [])]);
  const question =
    "How long does packing 20 adapters of SDXL's attention take (560 modules, r 32), from files to a file?";
  print(json, [{ question, rows }]);
}

/** @param {string} scratch */
async function packOwnSeed(scratch) {
  const folders = (await findAdapters([folderOf("own-seed")])).map(({ path }) => path);
  const peer = python("pack.py", [join(scratch, "peer"), ...folders]);
  const found = "figures" in peer ? peer.figures : null;
  /** @type {import("./lib/report.js").Row[]} */
  const rows = Object.keys(SETTINGS).map((name) => {
    const module = new URL("lib/packing.js", import.meta.url);
    const { seconds, bytes, error, peak } = inFreshProcess(module, "measurePacking", [name, scratch]);
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
    rows.push({
      name: "lorashare, K 32",
      "first, s": found.first,
      "median, s": found.median,
      "min, s": found.min,
      bytes: found.bytes,
      "peak MB": found.peakMemoryBytes / 1e6,
    });
  }
  const question = "How long does packing 20 adapters take (own-seed, 12 modules, r 8), from files to a file?";
  print(json, [{ question, rows }], [peerLine("lorashare", peer)]);
}
