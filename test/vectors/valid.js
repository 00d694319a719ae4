// @ts-nocheck: it writes what no type allows
/** The valid vectors: files, and the values in them. */
import { coded as codedSection } from "./coded.js";
import {
  blobOf,
  codedBlob,
  crc32c,
  Float,
  halfValue,
  keyOf,
  packFile,
  Raw,
  repair,
  TYPES,
  taskFile,
} from "./format.js";
import { bringsOf, createModel } from "./model.js";

export const SIGNER = keyOf(1);
export const STRANGER = keyOf(2);

/** One module, one task: the example of SPEC.md. */
export function minimal() {
  const model = createModel();
  model.module({ name: "layer", out: 3, in: 2, A: { K: 1, mean: false } });
  model.task("task", [{ module: 0, rank: 1 }]);
  return model;
}

/** Every kind of module, term and parameter, and all that a directory may say; the invalid vectors are made from it. */
export function everyKind() {
  const model = createModel(11);
  for (const type of TYPES)
    model.module({ name: `types.${type}`, out: 5, in: 6, A: { K: 3, type }, fingerprint: type === "f32" });
  model.module({ name: "flat", out: 4, in: 3, A: { kind: 2, K: 2, rank: 2, type: "f16" } });
  model.module({ name: "flat.packed", out: 3, in: 3, A: { kind: 2, K: 2, rank: 3, type: "int4", mean: false } });
  model.module({ name: "mixed.sides", out: 4, in: 5, A: { K: 2 }, B: { kind: 2, K: 1, rank: 2 } });
  model.module({ name: "in.out", out: 2, in: 7, layout: 1, A: { K: 2, type: "bf16" } });
  model.module({ name: "conv", out: 3, in: 8, layout: 2, kernel: [2, 2], A: { K: 2 } });
  model.module({ name: "embedding", out: 4, in: 9, layout: 3, A: { K: 2 } });
  model.module({ name: "mean.only", out: 3, in: 3, A: { K: 0 } });
  model.module({ name: "no.basis", out: 5, in: 4 });
  model.module({ name: "unused", out: 2, in: 2, A: { K: 1, mean: false } });
  model.module({ name: "unused.bare", out: 3, in: 2 });
  const all = TYPES.map((type, module) => ({ module, rank: 2, type, meanB: module % 2 === 0 }));
  model.task("terms", [
    ...all,
    { module: 6, rank: 2, type: "int8" },
    { module: 7, rank: 3, type: "int3" },
    { module: 8, rank: 2 },
    { module: 9, rank: 1, type: "f16", meanA: false },
    { module: 10, rank: 2 },
    { module: 11, rank: 1 },
    { module: 12, rank: 3 },
  ]);
  const whole = model.task(
    "whole",
    [
      { module: 0, rank: 1, q: 2, privateType: "int4", magnitudeType: "f16" },
      { module: 13, q: 3, privateType: "f16" },
    ],
    [
      { name: "classifier.weight", role: 0, type: "int8", shape: [2, 5] },
      { name: "classifier.bias", role: 0, type: "f16", shape: [2] },
      { name: "norm.bias", role: 1, shape: [5] },
      { name: "flat.bias", role: 2, type: "bf16", shape: [4] },
      { name: "tokens.weight", role: 3, type: "f16", shape: [2, 4], indices: [3, 8] },
      { name: "cube", role: 0, type: "int3", shape: [2, 3, 2] },
    ],
    {
      metadata: new Map([
        ["labels", ["ja", "nein"]],
        ["license", "CC0-1.0"],
        ["__proto__", new Map([["constructor", null]])],
        ["numbers", [1, -1, 0.5, 2 ** 40, true, false, null]],
      ]),
      "x-unknown": [1, { two: 2 }],
    },
  );
  whole.entry.brings = bringsOf(whole, model.pack);
  const head = model.task("head", [], [{ name: "classifier.weight", role: 0, shape: [2, 5] }]);
  head.entry.brings = bringsOf(head, model.pack);
  model.task("same head", [], [{ name: "classifier.weight", role: 0, shape: [2, 5] }]).entry.brings = 2;
  model.task("same again", [], [{ name: "classifier.weight", role: 0, shape: [2, 5] }]).entry.brings = 3;
  model.pack.basis.baseModel = "org/base";
  model.pack.basis.rank = 3;
  model.pack.basis["x-more"] = { anything: ["at", "all"] };
  return model;
}

const file = (make, more = {}) => {
  const { pack, expected } = make();
  return { bytes: packFile({ ...pack, ...more }), expected };
};

/** Names and numbers that are easily misread. */
function oddities() {
  const model = createModel(3);
  const name = `\ufefflayer "ä" ${"x".repeat(1000)}`;
  model.module({ name, out: 1, in: 1, A: { K: 1 } });
  model.module({ name: "__proto__", out: 300, in: 2, A: { K: 1, mean: false } });
  model.task("constructor", [
    { module: 0, q: 1 },
    { module: 1, rank: 256 },
  ]);
  model.task("\u{1f9ed} 'a/b' ..", [{ module: 0, rank: 200, q: 56 }]);
  const [first] = model.pack.tasks;
  first.entry.brings = bringsOf(first, model.pack);
  first.entry.metadata = { labels: null, license: null, origin: null };
  const { modules } = model.pack.basis;
  modules[0].out = new Float(1);
  modules[0].in = new Raw(0xcf, 0, 0, 0, 0, 0, 0, 0, 1);
  modules[1].out = new Raw(0xd2, 0, 0, 1, 44);
  modules[1].layout = new Raw(0xd0, 0);
  return model;
}

function grown() {
  const model = everyKind();
  const { pack } = model;
  return { ...model, pack: { ...pack, tasks: pack.tasks.slice(0, 2), appended: pack.tasks.slice(2) } };
}

function bare() {
  const model = createModel(5);
  model.task("head alone", [], [{ name: "classifier.weight", role: 0, shape: [2, 3] }]);
  return model;
}

const basisAlone = () => ({ pack: { ...minimal().pack, tasks: [] }, expected: new Map() });
/** The directory is the last section, with an empty one before it that begins where the file ends. */
const nothing = () => createModel(5);

function privateAlone() {
  const model = createModel(9);
  model.module({ name: "layer", out: 3, in: 4 });
  model.task("own", [{ module: 0, q: 2, privateType: "int8" }]);
  return model;
}

/** An append that was cut off in the superblock: the generation before counts. */
function torn() {
  const { bytes } = file(grown);
  const { pack, expected } = everyKind();
  const names = pack.tasks.slice(0, 2).map(({ entry }) => entry.id);
  bytes.fill(0, 512 + 40, 1024);
  return { bytes, expected: new Map([...expected].filter(([name]) => names.includes(name.split("/")[0]))) };
}

function beyond() {
  const { bytes, expected } = file(minimal);
  return { bytes: new Uint8Array([...bytes, ...new Uint8Array(777).fill(7)]), expected };
}

/** The last two tasks of `everyKind`, each in a file of its own. */
export function taskFileOf(signer, edit = (task) => task) {
  const { pack, expected } = everyKind();
  const task = pack.tasks[1];
  const bytes = taskFile(
    edit({ entry: task.entry, basisId: packFile(pack).subarray(16, 48), blob: blobOf(task), signer }),
  );
  return { bytes, expected: new Map([...expected].filter(([name]) => name.startsWith("whole/"))) };
}

/** Rows that are too wide for their places to be remembered, and integers of eight bits. */
function large() {
  const model = createModel(21);
  model.module({ name: "wide", out: 3, in: 2002, A: { K: 2, type: "int8" } });
  model.task("large", [{ module: 0, rank: 2, type: "int8" }]);
  // Rows that do not end with four integers, of each type.
  for (const [i, privateType] of ["int8", "int4", "int3"].entries())
    model.task(privateType, [{ module: 0, q: 3 + i, privateType }]);
  return model;
}

/** Tasks of everyKind whose rows go by fours, however few integers they have. */
function byFours(_bytes, name) {
  const { pack } = everyKind();
  const task = pack.tasks.find(({ entry }) => entry.id === name);
  return task && codedBlob(task, pack.basis, { alike: true });
}

/** The task of whole.eigentask, coded. */
function codedTask(signer) {
  const { basis, tasks } = everyKind().pack;
  return taskFileOf(signer, (task) => ({ ...task, blob: codedBlob(tasks[1], basis) }));
}

/**
 * Components of one factor, several bases of a factor, residual rows instead of coefficients and in addition to them.
 */
export function sides() {
  const model = createModel(31);
  const own = (type) => ({ basis: null, own: type });
  model.module({ name: "A.alone", out: 4, in: 6, A: { K: 3 }, B: null });
  model.module({ name: "B.alone", out: 5, in: 4, A: null, B: { K: 2, type: "int8", mean: false } });
  model.module({
    ...{ name: "groups", out: 4, in: 5 },
    A: [{ K: 2 }, { K: 3, type: "f16", mean: false }, { K: 1, type: "int3" }],
    B: [
      { K: 2, type: "bf16" },
      { kind: 2, K: 1, rank: 2 },
    ],
  });
  model.module({ name: "no.basis", out: 3, in: 4 });
  model.module({ name: "flat", out: 3, in: 4, A: { kind: 2, K: 2, rank: 2 }, B: [{ K: 1 }] });
  const first = model.task("first", [
    { module: 0, rank: 2, B: own("f16") },
    { module: 1, rank: 3, type: "int8", A: own("int4") },
    { module: 2, rank: 2, A: { basis: 1, own: "int3" }, meanB: false },
    { module: 3, rank: 1, A: own("f32"), B: own("bf16"), q: 1, privateType: "int8", magnitudeType: "f16" },
    { module: 4, rank: 2, B: own("int8") },
  ]);
  const second = model.task("second", [
    { module: 0, rank: 3, A: { own: "int8" }, B: own("int4") },
    { module: 2, rank: 2, A: { basis: 2 }, B: { basis: 1, own: "f16" } },
    { module: 3, q: 2 },
    { module: 4, rank: 2, type: "int4", A: { own: "f16" }, B: { own: "int3" }, q: 1, privateType: "f16" },
  ]);
  for (const task of [first, second]) task.entry.brings = bringsOf(task, model.pack);
  return model;
}

/** Forms that a reader may take for errors. */
function choices() {
  const model = createModel(37);
  model.module({ name: "mean", out: 3, in: 3, A: { K: 0 } });
  model.module({ name: "plain", out: 3, in: 3, layout: new Float(-0), A: { K: 1 } });
  model.task("zeros", [{ module: 0, rank: 2, meanA: false }]).entry.metadata = { long: "x".repeat(3000) };
  const task = model.task("longer", [
    { module: 0, rank: 1, A: { basis: null, own: "f16" } },
    { module: 1, rank: 1 },
  ]);
  task.header[0][1][3] = [task.header[0][1][3], 0, null];
  task.entry["x-many"] = Array.from({ length: 1600 }, () => []);
  return model;
}

/** A superblock that does not count, whatever it holds, with a valid sum. */
function beside({ bytes, expected }, index, change) {
  const at = 512 * (index + 1);
  const view = new DataView(bytes.buffer);
  change(bytes.subarray(at, at + 512), (place, value) => view.setBigUint64(at + place, BigInt(value), true));
  view.setUint32(at + 60, crc32c(bytes.subarray(at, at + 60)), true);
  return { bytes, expected };
}

/** Bases without a byte, in front of a directory that begins at the same place. */
function emptyFirst() {
  const { bytes, expected } = file(bare);
  const view = new DataView(bytes.buffer);
  view.setBigUint64(1024 + 32, 1536n, true);
  view.setBigUint64(1536 + 16 + 8, 1536n, true);
  return { bytes: repair(bytes), expected };
}

/** Coded and plain tasks, as when a task file is added to a coded pack. */
function mixed() {
  const { pack, expected } = everyKind();
  const code = (bytes, name) => (name === "whole" || name === "bases" ? undefined : bytes);
  return { bytes: packFile({ ...pack, code }), expected };
}

function unexplained() {
  const model = minimal();
  for (const side of ["A", "B"]) delete model.pack.basis.modules[0][side].explained;
  return model;
}

/** The second generation with a torn signature, or one that no flag announces: the generation before counts. */
function unsound(change) {
  const { bytes } = file(grown, { signer: SIGNER });
  change(bytes.subarray(512, 1024), new DataView(bytes.buffer, 512, 512));
  return { bytes, expected: torn().expected };
}

/** Numbers and tensors that are easily misread: no coefficients, only magnitudes, scales of every kind. */
function odd() {
  const model = createModel(17);
  model.module({ name: "mean", out: 3, in: 3, A: { K: 0 } });
  model.module({ name: "scaled", out: 3, in: 5 });
  const task = model.task(
    "odd",
    [
      { module: 0, rank: 2, type: "int8", meanB: false },
      { module: 1, magnitudeType: "f16" },
    ],
    [{ name: "scales", role: 0, type: "int8", shape: [5, 3] }],
  );
  const tensor = task.tensors.at(-1);
  const scales = [0, 0x8000, 0xb800, 0x0001, 0x3800];
  scales.forEach((scale, row) => new DataView(tensor.buffer).setUint16(2 * row, scale, true));
  const { values } = model.expected.get("odd/scales");
  for (let i = 0; i < 15; i++) values[i] = ((tensor[12 + i] << 24) >> 24) * halfValue(scales[Math.floor(i / 3)]);
  task.entry.brings = bringsOf(task, model.pack);
  model.task("not said", [], [{ name: "scales", role: 0, type: "f16", shape: [3] }]);
  model.task("nor here", [], [{ name: "scales", role: 0, type: "f16", shape: [3] }]).entry.brings = 1;
  return model;
}

/** Rows of a mean alone, which take no byte each, for a module whose shape allows 65 536 of them. */
export function ranked(rank) {
  const side = { kind: 1, K: 0, mean: true, type: 5, explained: 0 };
  const pack = createModel().pack;
  pack.basis.modules.push({ name: "layer", out: 32_768, in: 32_768, layout: 0, A: side, B: side });
  const mean = new Uint8Array(4 + (3 * 32_768) / 8);
  pack.tensors.push(mean, mean);
  const none = new Uint8Array(0);
  pack.tasks.push({
    entry: { id: "task", adapterBytes: 0 },
    header: [[[0, rank, 5, 5, 0, 0, null]], []],
    tensors: [none, none],
  });
  return { pack };
}

/** A difference of a bias whose name is as long as a name may be: with its role, 1 035 bytes. */
function longBrings() {
  const model = createModel(18);
  const name = "x".repeat(1024);
  const task = model.task("long", [], [{ name, role: 2, shape: [1] }]);
  task.entry.brings = bringsOf(task, model.pack);
  return model;
}

const coded = { code: (bytes) => bytes, codeDirectory: (directory) => codedSection(directory, [], 4) };
const UNREAD = { kind: 0, required: 0, content: Uint8Array.of(1, 2, 3) };

/** Vectors by name: `{ bytes, expected, why, signed }`. Task files belong to every-kind. */
export const VALID = Object.fromEntries(
  Object.entries({
    "minimal.eigen": ["one module, one task", file(minimal)],
    "every-kind.eigen": ["every kind of module, term, parameter and number format", file(everyKind)],
    "grown.eigen": ["a second generation: tasks were appended", file(grown)],
    "torn.eigen": ["an append that was cut off in the superblock: the first generation counts", torn()],
    "oddities.eigen": ["long names, a byte order mark, integers in other formats, the largest ranks", file(oddities)],
    "later.eigen": [
      "minor version 7: unknown keys and an unknown section that is not required",
      file(everyKind, { minor: 7, extra: [{ ...UNREAD, kind: 99 }] }),
    ],
    "unread.eigen": ["a section of kind 0, which is unknown like any other", file(everyKind, { extra: [UNREAD] })],
    "long-brings.eigen": ["`brings` names the longest parameter there may be", file(longBrings)],
    "no-hashes.eigen": ["as written before 1.0", file(everyKind, { hashed: false })],
    "basis.eigen": ["no tasks", file(basisAlone)],
    "bare.eigen": ["no modules: the bases are empty", file(bare)],
    "nothing.eigen": ["no modules and no tasks: the file ends with empty bases", file(nothing)],
    "private.eigen": ["a module without a basis: the bases are empty", file(privateAlone)],
    "beyond.eigen": ["bytes behind the committed end are ignored", beyond()],
    "signed.eigen": ["signed", file(everyKind, { signer: SIGNER }), "signed"],
    "signed-grown.eigen": ["signed, both generations", file(grown, { signer: SIGNER }), "signed"],
    "coded.eigen": ["coded sections and a coded directory", file(everyKind, coded)],
    "coded-grown.eigen": ["a coded directory, of a second generation", file(grown, coded)],
    "coded-nothing.eigen": [
      "a coded directory, and empty bases where it ends",
      file(nothing, { ...coded, code: undefined }),
    ],
    "coded-large.eigen": [
      "coded sections with large integers and wide rows, which go by fours",
      file(large, { ...coded, codeDirectory: undefined }),
    ],
    "coded-given.eigen": ["short rows that go by fours", file(everyKind, { code: byFours })],
    "sides.eigen": ["components on one side, several bases of a side, rows of a task's own", file(sides)],
    "coded-sides.eigen": ["the same, coded", file(sides, coded)],
    "ranked.eigen": ["rank 65 535", file(() => ranked(65_535))],
    "mixed.eigen": ["bases and a task that are not coded, beside tasks that are", mixed()],
    "no-explained.eigen": ["a side without `explained`", file(unexplained)],
    "empty-first.eigen": ["empty bases where the directory begins", emptyFirst()],
    "far-apart.eigen": ["generations 1 and 8", beside(file(grown), 0, (_, put) => put(0, 8))],
    "torn-signature.eigen": [
      "an append that was cut off in the signature: the first generation counts",
      unsound((block) => (block[159] ^= 1)),
    ],
    "unflagged-signature.eigen": [
      "a signature that no flag announces: the first generation counts",
      unsound((block, view) => {
        view.setUint32(52, 0, true);
        view.setUint32(60, crc32c(block.subarray(0, 60)), true);
      }),
    ],
    "odd.eigen": ["no coefficients, magnitudes alone, scales that are 0, negative, −0 and subnormal", file(odd)],
    "other-places.eigen": [
      "the superblock that does not count names places outside the file",
      beside(file(grown), 1, (_, put) => [16, 24, 32, 40].forEach((at) => put(at, 2 ** 50))),
    ],
    "other-parity.eigen": [
      "superblock 0 has an odd generation, and reserved bytes that are not zero",
      beside(file(everyKind), 0, (block, put) => (put(0, 7), (block[60 - 4] = 1))),
    ],
    "other-huge.eigen": [
      "superblock 0 has an odd generation of 2^64 − 1",
      beside(file(everyKind), 0, (block) => block.fill(255, 0, 8)),
    ],
    "other-generation-0.eigen": [
      "superblock 0 has generation 0, and reserved bytes that are not zero",
      beside(file(everyKind), 0, (block) => (block[57] = 1)),
    ],
    "choices.eigen": [
      "−0.0 as an integer, an entry of many arrays, factors in the longer form, K = 0 without its mean",
      file(choices),
    ],
    "coded.eigentask": ["a task file whose blob is coded", codedTask()],
    "coded-signed.eigentask": ["a task file that is coded and signed", codedTask(SIGNER), "signed"],
    "whole.eigentask": ["a task file", taskFileOf(undefined)],
    "signed.eigentask": ["a signed task file", taskFileOf(SIGNER), "signed"],
  }).map(([name, [why, given, signed]]) => [name, { ...given, why, signed: signed !== undefined }]),
);
