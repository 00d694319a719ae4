/**
 * How soon is a bad file refused? Five packs of about 2 kB with right checksums that name the largest ranks and shapes, beside an honest pack of
 * the same kind, opened and switched to (SPEC.md, section 10, has the rules). And coded sections that become about as much as they may and are
 * wrong in their last word, beside the same sections without the error: CPU time, and how long others wait for a turn at most.
 */
import { createRuntime, openPack } from "eigenlora";
import { code, mostDecoded } from "../dist/src/format/coded.js";
import { decodeSection } from "../dist/src/format/decode-coded.js";
import { Encoder } from "../dist/src/format/encode-coded.js";
import { encodeTensor } from "../dist/src/tensor/encode.js";
import { uniform } from "../dist/src/tensor/random.js";
import { packFile } from "../test/vectors/format.js";
import { createModel } from "../test/vectors/model.js";
import { number, readArguments } from "./lib/arguments.js";
import { print } from "./lib/report.js";

const QUESTION = "How soon is a bad file refused?";

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
/** Sections of `size` bytes with their tensor. @type {Record<string, (size: number) => { section: Uint8Array, tensor?: any }>} */
const CODED = {
  "int8, most of them 0": (size) => integers("int8", size, 0.09),
  "int3, most of them 0": (size) => integers("int3", size, 0.025),
  "int8, all of them as likely": (size) => integers("int8", size, 1),
  "single bytes that repeat": (size) => {
    const random = uniform(1);
    return { section: Uint8Array.from({ length: size }, () => (random() < 0.05 ? 256 * random() : 65)) };
  },
};

/** @param {"int8" | "int3"} dtype @param {number} size @param {number} share of integers that are not 0 */
function integers(dtype, size, share) {
  const random = uniform(1);
  const rows = 8;
  const width = Math.floor((size / rows) * (dtype === "int8" ? 1 : 8 / 3));
  const most = share < 1 ? 1 : 127;
  const values = Float32Array.from({ length: rows * width }, () =>
    random() < share ? Math.round(most * (share < 1 ? 1 : 2 * random() - 1)) : 0,
  );
  const section = encodeTensor(dtype, values, rows, width, new Float32Array(rows).fill(1));
  return { section, tensor: { dtype, rows, width, count: 1, step: 4, byteOffset: 0 } };
}

/** Codes a section without looking for copies. @param {{ section: Uint8Array, tensor?: any }} what */
function coded({ section, tensor }) {
  const encoder = new Encoder(section.length);
  const refuse = () => {
    throw new RangeError();
  };
  const plan = { runs: tensor ? [tensor] : [], copyAt: () => undefined };
  const pieces = code(encoder, section, refuse, new Uint8Array(), plan);
  while (!pieces.next().done);
  return encoder.finish(section.length);
}

/** @param {Uint8Array} bytes @param {boolean} isRight @returns {Promise<{ cpu: number, wait: number }>} */
async function cost(bytes, isRight) {
  let [last, wait, going] = [performance.now(), 0, true];
  const turn = () => {
    wait = Math.max(wait, performance.now() - last);
    last = performance.now();
    if (going) setImmediate(turn);
  };
  turn();
  const before = process.cpuUsage();
  const found = await decodeSection(bytes, { file: "file", part: "part" }).catch(() => undefined);
  if ((found !== undefined) !== isRight)
    throw new Error(`a ${isRight ? "right" : "wrong"} section was not taken for one`);
  const { user, system } = process.cpuUsage(before);
  going = false;
  return { cpu: (user + system) / 1000, wait: Math.max(wait, performance.now() - last) };
}

const sections = [];
for (const stored of [74_000, 290_000]) {
  for (const [name, make] of Object.entries(CODED)) {
    // A small section's coded size tells how large the section may be.
    const [try0, most] = [make(100_000), mostDecoded(stored)];
    const ratio = Math.min(100_000 / coded(try0).length, 15.5);
    const right = coded(make(Math.floor(Math.min(most, ratio * stored))));
    const wrong = right.slice();
    wrong[wrong.length - 1] = (wrong.at(-1) ?? 0) ^ 1;
    /** @type {{ cpu: number, wait: number }[][]} */
    const costs = [];
    for (let i = 0; i < runs; i++) costs.push([await cost(right, true), await cost(wrong, false)]);
    const least = (/** @type {number} */ which) => Number(Math.min(...costs.map((pair) => pair[which].cpu)).toFixed(1));
    const becomes = new DataView(right.buffer).getUint32(4, true);
    sections.push({
      section: name,
      bytes: right.length,
      becomes,
      "right: CPU ms": least(0),
      "wrong: CPU ms": least(1),
      "longest wait, ms": Number(Math.max(...costs.map(([, { wait }]) => wait)).toFixed(1)),
    });
  }
}

print(json, [
  { question: `${QUESTION} Small packs:`, rows },
  { question: "Coded sections that are wrong in their last word:", rows: sections },
]);
