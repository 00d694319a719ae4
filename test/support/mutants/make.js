// @ts-nocheck: it makes what no type allows
/**
 * Makes mutants of packs and task files from a number: structures with a change, put together again with right
 * checksums and hashes, and bytes that were changed afterwards.
 */

import { coded } from "../../vectors/coded.js";
import {
  blobOf,
  codedBlob,
  crc32c,
  Float,
  msgpack,
  packFile,
  Raw,
  repair,
  repairTaskFile,
  sha256,
  TYPES,
  taskFile,
} from "../../vectors/format.js";
import { bringsOf, createModel } from "../../vectors/model.js";
import { decodeSection } from "../internals/format.ts";

/** Numbers from 0 to n − 1. */
function dice(seed) {
  let x = (Math.imul(seed, 0x9e3779b1) ^ 0x5bf03635) | 1;
  return (n) => {
    x ^= x << 13;
    x ^= x >>> 17;
    x ^= x << 5;
    return (x >>> 0) % n;
  };
}

/** A small pack of some modules and tasks. */
function sample(seed, roll) {
  const model = createModel(seed * 2 + 1);
  const type = () => TYPES[roll(6)];
  const modules = [];
  for (let i = 0; i <= roll(4); i++) {
    const layout = roll(6) === 0 ? 2 : roll(4) === 0 ? 1 : 0;
    const rank = 1 + roll(3);
    const kind = roll(3) === 0 ? 2 : 1;
    const made = { name: `m${i}`, out: 1 + roll(7), in: layout === 2 ? 4 * (1 + roll(2)) : 1 + roll(7), layout };
    const basis = () => ({ kind, K: 1 + roll(4), ...(kind === 2 ? { rank } : {}), mean: roll(2) === 0, type: type() });
    const side = () => (roll(5) === 0 ? Array.from({ length: 1 + roll(3) }, basis) : roll(8) === 0 ? null : basis());
    if (roll(6) > 0) Object.assign(made, { A: side(), B: side() });
    if (layout === 2) made.kernel = [2, 2];
    if (roll(3) === 0) made.fingerprint = true;
    model.module(made);
    modules.push({ ...made, kind, rank });
  }
  for (let i = 0; i <= roll(3); i++) {
    const terms = [];
    modules.forEach(({ A, B, kind, rank }, module) => {
      if (roll(4) === 0) return;
      const term = { module, type: type(), meanA: roll(2) === 0, meanB: roll(2) === 0 };
      if (A || B || roll(4) === 0) {
        term.rank = kind === 2 ? rank : 1 + roll(4);
        const factor = (bases) => {
          const over = bases && roll(6) > 0 ? roll([bases].flat().length) : null;
          return { basis: over, ...(over === null || roll(4) === 0 ? { own: type() } : {}) };
        };
        Object.assign(term, { A: factor(A), B: factor(B) });
      }
      if (!term.rank || roll(4) === 0) Object.assign(term, { q: 1 + roll(2), privateType: type() });
      if (roll(5) === 0) term.magnitudeType = TYPES[roll(3)];
      terms.push(term);
    });
    const parameters = [];
    if (roll(3) === 0)
      parameters.push({ name: "head.weight", role: 0, type: type(), shape: [1 + roll(3), 1 + roll(4)] });
    if (roll(4) === 0) parameters.push({ name: "head.bias", role: 0, shape: [1 + roll(3)] });
    if (roll(5) === 0) parameters.push({ name: "norm.bias", role: 1 + roll(2), shape: [4] });
    if (roll(5) === 0)
      parameters.push({ name: "tokens.weight", role: 3, type: type(), shape: [2, 3], indices: [roll(3), 3 + roll(3)] });
    const task = model.task(`t${i}`, terms, parameters);
    if (roll(2)) task.entry.brings = bringsOf(task, model.pack);
    if (roll(2)) task.entry.metadata = { labels: ["a", "b"], license: "MIT" };
  }
  return model.pack;
}

const NUMBERS = [
  ...[0, 1, 2, 3, 4, 7, 8, 255, 256, 257, 65_535, 65_536],
  ...[2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1, 2 ** 32, 2 ** 53 - 1, -1, -128],
];
const OTHERS = [
  ...[null, true, "", "x", "m0", "t0", "\u0000", "__proto__", "head.weight", "saved head.weight", [], {}, [[]]],
  ...[Number.NaN, Infinity, 1.5, 2].map((value) => new Float(value)),
  ...[new Raw(0xc1), new Raw(0xdd, 255, 255, 255, 255), new Raw(0xc4, 1, 1)],
];

/** All positions in a tree of maps and arrays, as [holder, key]. */
function places(value, found = []) {
  if (typeof value !== "object" || value === null || value instanceof Raw || value instanceof Float) return found;
  for (const key of Object.keys(value)) {
    found.push([value, key]);
    places(value[key], found);
  }
  return found;
}

/** Changes one position of a tree. */
function alter(tree, roll) {
  const all = places(tree);
  if (all.length === 0) return;
  const [holder, key] = all[roll(all.length)];
  const value = holder[key];
  const kind = roll(8);
  if (kind < 3)
    holder[key] = typeof value === "number" && kind === 0 ? value + (roll(2) ? 1 : -1) : NUMBERS[roll(NUMBERS.length)];
  else if (kind === 3) holder[key] = OTHERS[roll(OTHERS.length)];
  else if (kind === 4) Array.isArray(holder) ? holder.splice(Number(key), 1) : delete holder[key];
  else if (kind === 5) Array.isArray(holder) ? holder.splice(Number(key), 0, value) : (holder[`${key}x`] = value);
  else if (kind === 6) {
    const [other, otherKey] = all[roll(all.length)];
    [holder[key], other[otherKey]] = [structuredCloned(other[otherKey]), structuredCloned(value)];
  } else holder[key] = typeof value === "string" ? value + "y".repeat(roll(2) ? 1 : 1100) : structuredCloned(value);
}

/** Copies a tree. Trees have no circles, whatever was exchanged. */
function structuredCloned(value) {
  if (typeof value !== "object" || value === null || value instanceof Raw || value instanceof Float) return value;
  if (Array.isArray(value)) return value.map(structuredCloned);
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, structuredCloned(item)]));
}

function alterPack(pack, roll) {
  for (let i = 0; i <= roll(2); i++) {
    const kind = roll(8);
    const task = pack.tasks[roll(pack.tasks.length)];
    if (kind < 2) alter(pack.basis, roll);
    else if (kind < 4 && task) alter(task.header, roll);
    else if (kind === 4 && task) alter(task.entry, roll);
    else if (kind === 5) {
      const tensors = roll(2) || !task ? pack.tensors : task.tensors;
      const bytes = tensors[roll(tensors.length)];
      if (bytes?.length) for (let k = 0; k <= roll(3); k++) bytes[roll(bytes.length)] = roll(256);
    } else if (kind === 6) {
      const tensors = roll(2) || !task ? pack.tensors : task.tensors;
      if (roll(2)) tensors.splice(roll(tensors.length + 1), 1);
      else tensors.push(new Uint8Array(4 * roll(5)));
    } else if (pack.tasks.length > 1 && roll(2)) pack.appended = pack.tasks.splice(1);
    else if (roll(2)) pack.extra = [{ kind: roll(200), required: roll(3), content: new Uint8Array(roll(70)) }];
    else pack.hashed = roll(2) === 0;
  }
}

function alterBytes(bytes, roll) {
  const spot = () => roll(roll(2) ? bytes.length : Math.min(bytes.length, 2200));
  const view = new DataView(bytes.buffer);
  for (let i = 0; i <= roll(3); i++) {
    const kind = roll(5);
    if (kind === 0) bytes[spot()] ^= 1 << roll(8);
    else if (kind === 1) bytes[spot()] = [0, 1, 127, 128, 255][roll(5)];
    else if (kind === 2) bytes.copyWithin(spot(), spot(), spot());
    else if (kind === 3) view.setUint32(Math.min(spot() & ~3, bytes.length - 4), NUMBERS[roll(NUMBERS.length)], true);
    else bytes.fill(0, spot(), spot());
  }
}

/** Changes streams so that the pack still vouches for them: its basis id is that of the changed ones. */
async function codedPack(pack, roll) {
  let bases;
  const changed = (content) => {
    const bytes = content.slice();
    if (roll(3) === 0)
      for (let i = 0; i <= roll(3); i++) bytes[roll(roll(2) ? bytes.length : 24) % bytes.length] = roll(256);
    return bytes;
  };
  const code = (content, name) => {
    const task = pack.tasks.find(({ entry }) => entry.id === name);
    const bytes = changed(task && roll(2) ? codedBlob(task, pack.basis, { alike: true }) : content);
    if (name === "bases") bases = bytes;
    return bytes;
  };
  const bytes = packFile({
    ...pack,
    code,
    minor: 1,
    ...(roll(2) && { codeDirectory: (plain) => changed(coded(plain, [], 4)) }),
  });
  const description = msgpack(pack.basis);
  try {
    const content = await decodeSection(bases, { file: "mutant", part: "bases", before: description });
    bytes.set(sha256(description, content), 16);
    new DataView(bytes.buffer).setUint32(48, crc32c(bytes.subarray(0, 48)), true);
  } catch {
    // The streams become empty then.
  }
  return bytes;
}

/** Bit patterns at the edges of what a tensor may hold, and just beyond: zeros, subnormals, 2^16 and its neighbours. */
const EDGES = {
  f32: [0, 0x80000000, 1, 0x807fffff, 0x00800000, 0x0d800000, 0x477fffff, 0xc77fffff, 0x47800000, 0x7f7fffff],
  f16: [0, 0x8000, 1, 0x83ff, 0x0400, 0x3c00, 0x7bff, 0xfbff, 0x7c00, 0xfe00],
  bf16: [0, 0x8000, 1, 0x807f, 0x0080, 0x0d80, 0x477f, 0xc77f, 0x4780, 0x7f7f],
  // Scales. 516 · 127 lies below 2^16.
  int8: [0, 0x8000, 1, 0x83ff, 0x0400, 0x6008, 0xe008, 0x6009],
  int4: [0, 0x8000, 1, 0x83ff, 0x0400, 0x7092, 0xf092, 0x7093],
  int3: [0, 0x8000, 1, 0x83ff, 0x0400, 0x7555, 0xf555, 0x7556],
};

/** Puts numbers at the edges into some tensors. Patterns near the end of each list are rare, since most are refused. */
function toEdges({ tensors, tasks }, roll) {
  for (const bytes of [tensors, ...tasks.map((task) => task.tensors)].flat()) {
    if (!bytes.of?.rows || !bytes.of.width || roll(3)) continue;
    const { type, rows, width } = bytes.of;
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
    const count = type.startsWith("int") ? rows : rows * width;
    for (let i = 0; i <= roll(4); i++) {
      const pattern = EDGES[type][roll(roll(30) ? 7 : EDGES[type].length)];
      if (type === "f32") view.setUint32(4 * roll(count), pattern, true);
      else view.setUint16(2 * roll(count), pattern, true);
    }
  }
}

/** Makes the mutant of a number: `{ kind: "pack" | "task file", bytes, pack }`; a task file comes with its pack. */
export async function mutant(seed) {
  const roll = dice(seed);
  const pack = sample(seed, roll);
  if (roll(3) === 0) toEdges(pack, roll);
  const kind = roll(9);
  if (kind === 0 && pack.tasks.length > 0) {
    const whole = packFile(pack);
    const task = pack.tasks[0];
    if (Array.isArray(task.entry.brings) === false) delete task.entry.brings;
    const parts = { entry: task.entry, basisId: whole.slice(16, 48), blob: undefined };
    if (roll(2)) alter(roll(2) ? task.header : task.entry, roll);
    const bytes = taskFile({ ...parts, blob: roll(4) ? blobOf(task) : codedBlob(task, pack.basis) });
    if (roll(3) === 0) {
      alterBytes(bytes, roll);
      if (roll(2)) repairTaskFile(bytes);
    }
    return { kind: "task file", bytes, pack: whole };
  }
  if (kind === 8) {
    if (roll(3) === 0) alterPack(pack, roll);
    return { kind: "pack", bytes: await codedPack(pack, roll) };
  }
  if (kind < 6) alterPack(pack, roll);
  const bytes = packFile(pack);
  if (kind === 1 || kind >= 6) {
    alterBytes(bytes, roll);
    if (roll(4)) repair(bytes);
  }
  return { kind: "pack", bytes: roll(20) === 0 ? bytes.slice(0, roll(bytes.length + 1)) : bytes };
}
