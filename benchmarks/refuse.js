/**
 * How soon is a small pack refused that names the largest ranks and shapes? Five packs of about 2 kB with right checksums; the peer in the
 * same run is an honest pack of the same kind, opened and switched to. SPEC.md, section 11, has the rules.
 */
import { createRuntime, openPack } from "eigenlora";
import { packFile } from "../test/vectors/format.js";
import { createModel } from "../test/vectors/model.js";
import { number, readArguments } from "./lib/arguments.js";
import { print } from "./lib/report.js";

const QUESTION = "How soon is a small pack refused that names the largest ranks and shapes?";

const { json, runs } = readArguments(QUESTION, { runs: number("runs of each pack", 20, 1) });

/** @type {Record<string, (pack: any) => void>} what is changed in an honest pack */
const ATTACKS = {
  "honest, for comparison": () => undefined,
  "rank 65 535 without a component": (pack) => {
    const side = { kind: 1, K: 0, mean: false, type: 0, explained: 0 };
    Object.assign(pack.basis.modules[0], { A: side, B: side });
    pack.tasks[0].header = [[[0, 65_535, 1, 1, 0, 0, null]], []];
    pack.tasks[0].tensors = [];
  },
  "in and out 2^31 - 1": (pack) => Object.assign(pack.basis.modules[0], { out: 2 ** 31 - 1, in: 2 ** 31 - 1 }),
  "in and out 10^8": (pack) => Object.assign(pack.basis.modules[0], { out: 1e8, in: 1e8 }),
  "private rank 65 535": (pack) => {
    pack.tasks[0].header[0][0][4] = 65_535;
  },
  "a parameter of 2^51 values": (pack) => {
    pack.tasks[0].header[1] = [["x", 0, 5, [2 ** 31 - 1, 2 ** 20]]];
  },
};

/** @param {(pack: any) => void} change */
function packWith(change) {
  const model = /** @type {any} */ (createModel(3));
  model.module({ name: "layer", out: 384, in: 384 });
  model.task("task", [{ module: 0, q: 1, privateType: "int3" }]);
  change(model.pack);
  return packFile(model.pack);
}

/** @param {Uint8Array} bytes @returns {Promise<string>} what became of it */
async function use(bytes) {
  try {
    const pack = await openPack(bytes);
    const runtime = await createRuntime(pack, { backend: "js" });
    await runtime.switchTask("task");
    await runtime.close();
    return "taken";
  } catch (error) {
    return /** @type {Error} */ (error).message.replace(/^Uint8Array, /, "");
  }
}

const rows = [];
for (const [name, change] of Object.entries(ATTACKS)) {
  const bytes = packWith(change);
  const says = await use(bytes);
  const times = [];
  for (let i = 0; i < runs; i++) {
    const started = performance.now();
    await use(bytes);
    times.push(performance.now() - started);
  }
  times.sort((a, b) => a - b);
  const shown = (/** @type {number} */ ms) => Number(ms.toFixed(2));
  rows.push({
    pack: name,
    bytes: bytes.length,
    "ms median": shown(times[runs >> 1] ?? 0),
    "ms most": shown(times.at(-1) ?? 0),
    says,
  });
}
print(json, [{ question: QUESTION, rows }]);
