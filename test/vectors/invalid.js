// @ts-nocheck: it writes what no type allows
/**
 * The invalid vectors: for each the section of SPEC.md that it breaks, and the reason. Checksums and hashes are right
 * unless said otherwise.
 */
import { byte, coded, everySymbol, integer, told } from "./coded.js";
import {
  align,
  blobOf,
  codedBlob,
  crc32c,
  Float,
  joined,
  msgpack,
  packFile,
  Raw,
  repair,
  repairTaskFile,
  sha256,
} from "./format.js";
import { createModel } from "./model.js";
import { everyKind, ranked, SIGNER, STRANGER, sides, taskFileOf, VALID } from "./valid.js";

/** Edits the pack of `everyKind`, and the options of `packFile`. */
const edited = (edit) => () => {
  const { pack } = everyKind();
  return packFile({ ...pack, ...edit(pack) });
};
const inBasis = (change) => edited(({ basis }) => void change(basis));
const inTasks = (change) => edited(({ tasks }) => void change(tasks));
const inModule = (index, change) => inBasis(({ modules }) => change(modules[index]));
/** Edits a term of the first task, or another one's; a parameter of the second; an entry. */
const term = (index, change, task = 0) => inTasks((tasks) => change(tasks[task].header[0][index], tasks[task]));
const parameter = (index, change) =>
  inTasks(([, task]) => {
    delete task.entry.brings;
    change(task.header[1][index], task);
  });
const entry = (index, change) => inTasks((tasks) => change(tasks[index].entry));
/** Adds what the pack of `everyKind` does not have. */
const added = (more) => edited(() => more);
/** A term of the first task of `sides`. */
const sidedEntry = (change) => () => {
  const { pack } = sides();
  change(pack.tasks[0].entry, pack);
  return packFile(pack);
};
const sided = (index, change) => sidedEntry((_, pack) => change(pack.tasks[0].header[0][index]));
const ownNan = sidedEntry((_, { tasks: [{ tensors }] }) => {
  const { buffer } = tensors.find(({ of }) => of.type === "f16" && of.rows === 2);
  new DataView(buffer).setUint16(2, 0x7e00, true);
});
/** Changes bytes of a task's blob. */
const blob = (index, change) => inTasks((tasks) => (tasks[index].blob = after(blobOf(tasks[index]), change)));
/** Changes a byte of a tensor of the bases (`task` undefined) or of a task. */
const stored = (task, index, change) =>
  edited((pack) => {
    const list = task === undefined ? pack.tensors : pack.tasks[task].tensors;
    change(list[index], new DataView(list[index].buffer));
  });
const EVERY = "every-kind.eigen";
/** Bytes after a change in place, or those that it gives instead. */
const after = (bytes, change, more) => {
  const given = change(bytes, more ?? new DataView(bytes.buffer));
  return given instanceof Uint8Array ? given : bytes;
};
const unrepaired = (name, change) => () => after(VALID[name].bytes.slice(), change);
const changed = (name, change) => () => repair(unrepaired(name, change)());
const every = (change) => changed(EVERY, change);

/** Position of an entry of the section table in every-kind. */
const section = (index) => 1536 + 16 + 32 * index;
const long = (bytes) => "x".repeat(bytes);
const u32 = (view, at, value) => view.setUint32(at, value, true);
const u64 = (view, at, value) => view.setBigUint64(at, BigInt(value), true);
const get = (view, at) => Number(view.getBigUint64(at, true));
/** Repairs the CRC of a superblock. */
const seal = (bytes, view, at = 1024) => u32(view, at + 60, crc32c(bytes.subarray(at, at + 60)));
const nested = (depth) => (depth === 0 ? 1 : [nested(depth - 1)]);
/** Puts a signature into the first superblock without other changes. */
const signed = (signature, key) => (bytes) => {
  bytes.set(key, 1024 + 64);
  bytes.set(signature, 1024 + 96);
  new DataView(bytes.buffer).setUint32(1024 + 52, 1, true);
};
const root = (bytes) => {
  const view = new DataView(bytes.buffer);
  return sha256(bytes.subarray(0, 48), bytes.subarray(1536, 1536 + get(view, 1024 + 24)));
};
const text = (hash) => `sha256-${Buffer.from(hash).toString("base64")}`;
const hashText = (bytes) => text(sha256(bytes));
export const integrity = (bytes) => text(root(bytes));
export const KEYS = [`ed25519:${Buffer.from(SIGNER.publicKey).toString("base64")}`];
/** Coded sections, one of them changed. */
function recoded(which, change) {
  return () => {
    const { pack } = everyKind();
    const task = pack.tasks.find(({ entry }) => entry.id === which);
    const code = (bytes, name) => (name === which ? after(bytes, change, task) : bytes);
    return packFile({ ...pack, code });
  };
}

/** The task "head" with its blob coded by `tell`, which gets the blob's bytes. */
function headAs(tell, { last, low } = {}) {
  return recoded("head", (_, task) => {
    const plain = blobOf(task);
    return told(plain.length, (to) => tell(to, plain), last, low);
  });
}

/**
 * A blob that ends with the int4 row (3, 0, …, 0) with a scale of 0.5, coded by `tell`.
 * @param more claimed bytes in addition to its own
 */
function oneInteger(tell, more = 0) {
  return () => {
    const model = createModel(5);
    model.module({ name: "layer", out: 8, in: 8 });
    const { tensors } = model.task("task", [{ module: 0, q: 1, privateType: "int4" }]);
    for (const tensor of tensors) tensor.set([0, 0x38, 0, 0, 3, 0, 0, 0]);
    const code = (_bytes, name) => {
      if (name !== "task") return undefined;
      const plain = blobOf(model.pack.tasks[0]);
      return told(plain.length + more, (to) => tell(to, plain));
    };
    return packFile({ ...model.pack, code });
  };
}

/** The run of that row, with another first integer. */
function integerRun(to, first) {
  tensors(to, 1, 1, 8, 1);
  to.number("scale", 7);
  to.symbol("fine", 7, 0);
  let mean = 64;
  for (let i = 0; i < 8; i++) mean = integer(to, mean, i, i === 0 ? first : 0);
}

/** Private rows that go by fours, coded as `how` says and changed then. @param first bytes of integers */
function byFours(how, change = (bytes) => bytes, first = []) {
  return () => {
    const model = createModel(9);
    model.module({ name: "layer", out: 4, in: 2100 });
    const task = model.task("task", [{ module: 0, q: 2, privateType: "int4" }]);
    task.tensors[0].set(first, 4);
    const code = (_, name) => (name === "task" ? change(codedBlob(task, model.pack.basis, how)) : undefined);
    return packFile({ ...model.pack, code });
  };
}

/** A state that begins below 2^16: it stays there with a first integer that is nearly certain. */
function lowLane(low) {
  const frequencies = everySymbol().map(() => [2017, ...Array(16).fill(1)]);
  return byFours({ low, frequencies }, undefined, [0, 0]);
}

/** A head of zeros, its blob coded by `tell`. */
function zeros(tell) {
  return edited(({ tasks }) => {
    for (const tensor of tasks[2].tensors) tensor.fill(0);
    const code = (_bytes, name) => {
      const plain = blobOf(tasks[2]);
      return name === "head" ? told(plain.length, (to) => tell(to, plain)) : undefined;
    };
    return { code };
  });
}

/** Bytes without a copy. @param length that they claim */
function bytesAsTheyAre(to, bytes, { length = bytes.length } = {}) {
  to.number("length", length);
  to.number("literals", bytes.length);
  bytes.forEach((b, i) => byte(to, bytes[i - 1] ?? 0, b));
}

function codedDirectory(codeDirectory) {
  return () => packFile({ ...everyKind().pack, code: (bytes) => bytes, codeDirectory });
}

/** A magnitude of 8 in four bits behind a number of 7s: a coder can write it, but no tensor may hold it. */
const codedLeast = (sevens) => () => {
  const model = createModel(5);
  model.module({ name: "layer", out: 20, in: 20 });
  const { tensors } = model.task("task", [{ module: 0, q: 1, privateType: "int4" }]);
  for (let i = 0; i <= sevens; i++) {
    const [byte, low] = [4 + (i >> 1), i % 2 === 0];
    const value = i < sevens ? 7 : 8;
    tensors[0][byte] = low ? (tensors[0][byte] & 0xf0) | value : (tensors[0][byte] & 15) | (value << 4);
  }
  return packFile({ ...model.pack, code: (bytes) => bytes });
};

/** The blob of the task "head", coded by `tell`. @param size that it claims */
const tells = (tell, { size = 40, last } = {}) => recoded("head", () => told(size, tell, last));
/** A run, from its type to its step. */
function tensors(to, type, rows, width, count) {
  to.bits(2, type);
  for (const n of [rows, width, count]) to.number("shape", n);
  to.bits(1, 0);
  if (rows * width <= 4096) to.bits(1, 0);
}
const run = (to, ...how) => {
  to.number("length", 0);
  tensors(to, ...how);
};

/** Vectors that fail when a task is read, though their rule does not stand in section 6. */
const OF_TASKS = new Set(
  [
    "coded-long coded-odd coded-end coded-state coded-second-state coded-fourth-state coded-second-end coded-fourth-end",
    "coded-fours-short coded-fours-value coded-frequencies coded-frequencies-huge coded-frequencies-0 coded-words coded-type",
    "coded-rows-0 coded-count-0 coded-run-long coded-run-huge coded-bytes-long coded-single-long coded-copy-long coded-copy-0",
    "coded-copy-again coded-copy-far coded-growth coded-value coded-value-shifted coded-value-large coded-growth-real",
    "blob-crc brings-less brings-more brings-own large-coefficient scale-padding half-padding tensor-padding own-nan",
    "revoked revoked-coded revoked-plain hash-of-blob task-other-basis task-brings task-revoked-plain",
  ].flatMap((names) => names.split(" ")),
);

/** The step at which a vector fails, where it does not say one itself. */
export const stepOf = (name, section) => (section.startsWith("6") || OF_TASKS.has(name) ? "task" : "open");

/** Vectors that break a rule of one section of SPEC.md. */
const breaking = (section, list) =>
  Object.fromEntries(Object.entries(list).map(([name, vector]) => [name, [section, ...vector]]));

/**
 * Vectors: name → [section, why, make, given]. `given` holds the reader's trust options, and the `step` where `stepOf`
 * does not tell it.
 */
export const PACKS = {
  ...breaking("1", {
    "generation-u64": ["generation 2^53 + 1", every((_, v) => v.setBigUint64(1024, 2n ** 53n + 1n, true))],
    "committed-u64": ["a committed length above 2^53", every((_, v) => u32(v, 1024 + 12, 0xffffffff))],
    "padding-of-bases": [
      "padding between directory and bases is not zero: for those who read both in one range, and verifiers",
      every((b, v) => (b[get(v, section(0) + 8) - 1] = 1)),
      { step: "verify" },
    ],
    "section-u64": [
      "an offset whose end wraps around 2^64",
      every((_, v) => v.setBigUint64(section(1) + 8, 2n ** 64n - 64n, true)),
    ],
    "key-twice": [
      "a key that is there twice",
      described((b) => [b[0] + 1, ...b.slice(1), 0xa4, ...ascii("mode"), 0xa1, 97]),
    ],
    "key-number": ["a key that is a number", described((b) => [b[0] + 1, ...b.slice(1), 1, 1])],
    "left-over": ["a byte behind the basis description", described((b) => [...b, 0xc0])],
    "count-lies": ["an array of 2^32 − 1 items in five bytes", added({ basis: new Raw(0xdd, 255, 255, 255, 255) })],
    binary: ["a value of type binary", inBasis((basis) => (basis["x-more"] = new Raw(0xc4, 1, 0)))],
    extension: ["a value of an extension type", inBasis((basis) => (basis["x-more"] = new Raw(0xd4, 1, 0)))],
    "utf-8": ["a string that is not UTF-8", inBasis((basis) => (basis["x-more"] = new Raw(0xa2, 0xc3, 0x28)))],
    nesting: ["a value inside 17 arrays and maps", inBasis((basis) => (basis["x-more"] = nested(16)))],
    collections: [
      "more maps and arrays than 1 024 and a third of the bytes",
      entry(0, (e) => (e["x-more"] = Array.from({ length: 4000 }, () => []))),
    ],
    "cut-off": ["a string that ends behind the description", added({ basis: new Raw(0x81, 0xd9, 200, 97) })],
    "padding-of-sections": [
      "padding between two blobs",
      unrepaired(EVERY, (b, v) => (b[get(v, section(2) + 8) - 1] = 1)),
      { step: "verify" },
    ],
  }),
  ...breaking("2", {
    magic: ["another magic", every((b) => (b[1] = 0x65))],
    "short-window": ["1 535 bytes", unrepaired(EVERY, (b) => b.slice(0, 1535))],
    "major-2": ["major version 2", every((_, v) => v.setUint16(8, 2, true))],
    "window-length": ["a window of 2 048 bytes", every((_, v) => u32(v, 12, 2048))],
    "head-crc": ["the CRC of the window's head", unrepaired(EVERY, (b) => (b[48] ^= 1))],
    "reserved-head": ["byte 60 is not zero", every((b) => (b[60] = 1))],
    "reserved-superblock": ["byte 57 of the superblock is not zero", every((b) => (b[1024 + 57] = 1))],
    "reserved-block": ["byte 400 of the superblock is not zero", every((b) => (b[1024 + 400] = 1))],
    "superblock-flags": ["flags 2 in the superblock, with the CRC of what follows", every(flagged)],
    "newest-reserved": [
      "byte 57 of the newest superblock is not zero, and the other is sound",
      newest((block) => (block[57] = 1)),
    ],
    "newest-block": [
      "byte 400 of the newest superblock is not zero, and the other is sound",
      newest((block) => (block[400] = 1)),
    ],
    "newest-flags": [
      "flags 2 in the newest superblock, and the other is sound",
      newest((_, v) => (u32(v, 52, 2), true)),
    ],
    "newest-truncated": [
      "the newest superblock names more bytes than there are, and the other is sound",
      newest((_, v) => u64(v, 8, get(v, 8) + 64)),
    ],
    "newest-directory": [
      "the CRC of the newest directory, and the other is sound",
      newest((block) => (block[48] ^= 1)),
    ],
    "newest-place": [
      "the newest directory lies outside the file, and the other is sound",
      newest((_, v) => u64(v, 16, 2 ** 40)),
    ],
    "no-superblock": ["both superblocks are zero", every((b) => b.fill(0, 1024, 1536))],
    "superblock-crc": ["the CRC of the only superblock", unrepaired(EVERY, (b) => (b[1024 + 60] ^= 1))],
    "superblock-parity": ["generation 2 in superblock 1", every((_, v) => u64(v, 1024, 2))],
    "generation-0": ["generation 0, in superblock 0", unrepaired(EVERY, generation0)],
    "signature-unflagged": ["a signature, but flag 0", changed("signed.eigen", (_, v) => u32(v, 1024 + 52, 0))],
    "signature-crc": ["the CRC of the signature", unrepaired("signed.eigen", (b) => (b[1024 + 160] ^= 1))],
    truncated: [
      "shorter than the committed length, by a byte that no reader needs",
      unrepaired("later.eigen", (b) => b.slice(0, -1)),
    ],
    "directory-outside": ["the directory lies outside the file", every((_, v) => u64(v, 1024 + 24, 2 ** 32))],
    "directory-in-window": ["the directory lies in the window", every((_, v) => u64(v, 1024 + 16, 64))],
    "directory-crc": ["the CRC of the directory", unrepaired(EVERY, (b, v) => ((b[1024 + 48] ^= 1), seal(b, v)))],
    // Faults that only a program that verifies files needs to find
    "basis-id": [
      "another basis id",
      unrepaired(EVERY, (b, v) => ((b[16] ^= 1), u32(v, 48, crc32c(b.subarray(0, 48))))),
      { step: "verify" },
    ],
  }),
  ...breaking("4", {
    "coded-place": [
      "a coded directory says where a section is",
      codedDirectory((d) => {
        d[24] = 64;
        return coded(d, [], 4);
      }),
    ],
    "directory-length": [
      "a byte more than its parts add up to",
      added({ hashed: false, editDirectory: (d) => longer(d, 1, 0) }),
    ],
    "directory-tiny": [
      "a directory of 12 bytes",
      unrepaired(EVERY, (b, v) => {
        u64(v, 1024 + 24, 12);
        u32(v, 1024 + 48, crc32c(b.subarray(1536, 1548)));
        seal(b, v);
      }),
    ],
    "too-many-sections": ["2^31 sections", every((_, v) => u32(v, 1536, 2 ** 31))],
    "hashes-length": [
      "32 bytes more of hashes than there are sections",
      added({
        editDirectory: (d) => {
          const h = new DataView(d.buffer).getUint32(12, true);
          const more = longer(d, 32, h + 32);
          more.copyWithin(d.length + 32 - h, d.length - h, d.length);
          return more;
        },
      }),
    ],
    "free-hash": [
      "a free section with a hash",
      changed(
        "grown.eigen",
        (b, v) => (b[get(v, 512 + 16) + get(v, 512 + 24) - 32 * v.getUint32(get(v, 512 + 16), true)] = 1),
      ),
    ],
  }),
  ...breaking("4.1", {
    "coded-empty": ["coded bases of no bytes", changed("bare.eigen", (_, v) => u32(v, section(0), 4))],
    "section-flags": ["flag bit 1 of a section", every((_, v) => u32(v, section(1) + 4, 3))],
    "section-flags-unknown": [
      "a section of unknown kind that is required = 2",
      added({ extra: [{ kind: 0, required: 2, content: Uint8Array.of(1) }] }),
    ],
    "section-optional": ["a task blob that is not required", every((_, v) => u32(v, section(1) + 4, 0))],
    "free-required": [
      "a free section that is required",
      changed("grown.eigen", (_b, v) => u32(v, get(v, 512 + 16) + 16 + 4, 1)),
    ],
    "section-reserved": ["byte 28 of a section is not zero", every((b) => (b[section(1) + 28] = 1))],
    "section-empty": [
      "an empty section of unknown kind",
      added({ extra: [{ kind: 99, required: 0, content: new Uint8Array(0) }] }),
    ],
    "section-required": [
      "a required section of unknown kind",
      added({ extra: [{ kind: 99, required: 1, content: Uint8Array.of(1) }] }),
    ],
    "section-hole": ["a hole between sections", added({ gap: 64 })],
    "section-overlap": [
      "a section that overlaps the one before",
      every((_, v) => u64(v, section(1) + 8, get(v, section(1) + 8) - 64)),
    ],
    "section-end": [
      "the last section ends behind the committed length",
      every((_, v) => u64(v, section(5) + 16, get(v, section(5) + 16) + 1)),
    ],
    "free-crc": ["a free section with a CRC", changed("grown.eigen", (b, v) => (b[get(v, 512 + 16) + 16 + 24] = 1))],
    "no-bases": ["no bases section", every((_, v) => (u32(v, section(0), 99), u32(v, section(0) + 4, 0)))],
    "two-bases": ["two bases sections", every((_, v) => u32(v, section(1), 1))],
    "bases-differ": [
      "superblock and table disagree about the bases",
      every((_, v) => u64(v, 1024 + 40, get(v, 1024 + 40) - 4)),
    ],
    "bases-crc": ["the CRC of the bases", unrepaired("no-hashes.eigen", (b, v) => (b[get(v, section(0) + 8)] ^= 1))],
    "blob-crc": [
      "the CRC of a task blob",
      unrepaired("no-hashes.eigen", (b, v) => (b[get(v, section(1) + 8) + get(v, section(1) + 16) - 9] ^= 1)),
    ],
    "unknown-crc": [
      "the CRC of a section of unknown kind",
      unknown((b, _v, at) => (b[at + 24] ^= 1)),
      { step: "verify" },
    ],
  }),
  ...breaking("4.2", {
    "no-producer": ["no producer", inBasis((basis) => delete basis.producer)],
    "explained-text": ["`explained` is a string", inModule(0, (m) => (m.A.explained = "0.5"))],
    "step-text": ["`step` is a string", inBasis((basis) => (basis.step = "0.5"))],
    "step-0": ["`step` is 0", inBasis((basis) => (basis.step = 0))],
    "step-nan": ["`step` is NaN", inBasis((basis) => (basis.step = new Float(Number.NaN)))],
    "step-large": ["`step` is 2^63", inBasis((basis) => (basis.step = new Float(2 ** 63)))],
    "error-text": ["`error` is a string", inBasis((basis) => (basis.error = "0.5"))],
    "error-nan": ["`error` is NaN", inBasis((basis) => (basis.error = new Float(Number.NaN)))],
    "error-2": ["`error` is 2", inBasis((basis) => (basis.error = 2))],
    "explained-2": ["`explained` is 2", inModule(0, (m) => (m.A.explained = 2))],
    "mode-long": ["`mode` of 65 bytes", inBasis((basis) => (basis.mode = long(65)))],
    "base-model-long": ["`baseModel` of 4 097 bytes", inBasis((basis) => (basis.baseModel = long(4097)))],
    "rank-0": ["`rank` 0 of the basis", inBasis((basis) => (basis.rank = 0))],
    "name-long": ["a module name of 1 025 bytes", inModule(5, (m) => (m.name = long(1025)))],
    "name-empty": ["an empty module name", inModule(5, (m) => (m.name = ""))],
    "name-twice": ["two modules of one name", inModule(1, (m) => (m.name = "types.f32"))],
    "out-0": ["`out` 0", inModule(15, (m) => (m.out = 0))],
    "in-large": ["`in` 2^31", inModule(15, (m) => (m.in = 2 ** 31))],
    "in-fraction": ["`in` 3.5", inModule(15, (m) => (m.in = new Float(3.5)))],
    "layout-4": ["layout 4", inModule(0, (m) => (m.layout = 4))],
    "kernel-missing": ["a convolution without a kernel", inModule(10, (m) => delete m.kernel)],
    "kernel-empty": ["a kernel without a number", inModule(10, (m) => (m.kernel = []))],
    "kernel-0": ["a kernel [0]", inModule(10, (m) => (m.kernel = [0]))],
    "kernel-divides": ["a kernel [3, 2] for `in` 8", inModule(10, (m) => (m.kernel = [3, 2]))],
    "kernel-linear": ["a kernel of a linear layer", inModule(0, (m) => (m.kernel = [1]))],
    "kernel-long": ["a kernel of nine dimensions", inModule(10, (m) => (m.kernel = [2, 2, 1, 1, 1, 1, 1, 1, 1]))],
    "sides-empty": ["an array of no bases", inModule(15, (m) => (m.A = []))],
    "sides-number": ["an array of bases with a number in it", inModule(15, (m) => (m.A = [1]))],
    "side-no-kind": ["a basis without a kind", inModule(14, (m) => delete m.A.kind)],
    "side-no-k": ["a basis without K", inModule(14, (m) => delete m.A.K)],
    "kind-3": ["a side of kind 3", inModule(14, (m) => (m.A.kind = 3))],
    "column-rank": ["a rank on a column side", inModule(14, (m) => (m.A.rank = 1))],
    "flat-no-rank": ["a flat side without a rank", inModule(6, (m) => delete m.A.rank)],
    "flat-rank-0": ["a flat side of rank 0", inModule(14, (m) => Object.assign(m.A, { kind: 2, rank: 0 }))],
    "side-empty": [
      "a side with neither components nor a mean",
      edited(({ basis, tensors }) => ((basis.modules[14].B.K = 0), void tensors.splice(-1, 1, new Uint8Array(0)))),
    ],
    "mean-1": ["`mean` is 1", inModule(14, (m) => (m.A.mean = 1))],
    "fingerprint-1": ["`fingerprint` is 1", inModule(0, (m) => (m.fingerprint = 1))],
    "k-true": ["K is true", inModule(14, (m) => (m.A.K = true))],
    "k-large": ["K 65 536", inModule(14, (m) => (m.A.K = 65_536))],
    "k-negative": [
      "K −1, with a mean",
      edited(({ basis, tensors }) => {
        Object.assign(basis.modules[14].A, { K: -1, mean: true });
        tensors.splice(-2, 1);
      }),
    ],
    "side-text": ["a side that is a string", inModule(15, (m) => (m.A = "none"))],
    "module-array": ["a module that is an array", inBasis((basis) => (basis.modules[15] = []))],
    "no-modules": ["no `modules`", inBasis((basis) => delete basis.modules)],
    "modules-map": ["`modules` is a map", inBasis((basis) => (basis.modules = {}))],
    "basis-array": ["a basis description that is an array", added({ basis: [] })],
  }),
  ...breaking("4.3", {
    "fewer-tasks": ["more task blobs than tasks", added({ extra: [{ kind: 2, content: Uint8Array.of(1) }] })],
    "tasks-map": [
      "a task list that is a map",
      changed("basis.eigen", (b, v) => {
        const at = 1536 + 16 + 32 * v.getUint32(1536, true) + v.getUint32(1540, true);
        if (b[at] !== 0x90) throw new Error("this is no empty list");
        b[at] = 0x80;
      }),
    ],
    "entry-array": ["a task that is an array", inTasks((tasks) => (tasks[0].entry = []))],
    "brings-map": ["`brings` is a map", entry(0, (e) => (e.brings = {}))],
    "id-empty": ["an empty id", entry(0, (e) => (e.id = ""))],
    "id-long": ["an id of 256 bytes", entry(0, (e) => (e.id = long(256)))],
    "id-control": ["an id with a control character", entry(0, (e) => (e.id = "a\u009bb"))],
    "id-twice": ["two tasks of one id", entry(0, (e) => (e.id = "head"))],
    "adapter-bytes": ["`adapterBytes` −1", entry(0, (e) => (e.adapterBytes = -1))],
    "no-adapter-bytes": ["no `adapterBytes`", entry(0, (e) => delete e.adapterBytes)],
    "metadata-array": ["metadata that is an array", entry(0, (e) => (e.metadata = []))],
    "labels-number": ["`labels` is 5", entry(0, (e) => (e.metadata = { labels: 5 }))],
    "labels-mixed": ["a label that is a number", entry(0, (e) => (e.metadata = { labels: ["a", 5] }))],
    "labels-empty": ["an empty label", entry(0, (e) => (e.metadata = { labels: ["a", ""] }))],
    "license-number": ["`license` is a number", entry(0, (e) => (e.metadata = { license: 1 }))],
    "brings-later": ["`brings` gives the index of a later task", entry(0, (e) => (e.brings = 1))],
    "brings-self": ["`brings` gives the task's own index", entry(4, (e) => (e.brings = 4))],
    "brings-long": ["a string of `brings` of 1 036 bytes", entry(0, (e) => (e.brings = [`bias-delta ${long(1025)}`]))],
    "brings-twice": ["`brings` has an item twice", entry(2, (e) => e.brings.push(e.brings[0]))],
    "brings-role": ["an unknown role in `brings`", entry(0, (e) => (e.brings = ["other head.weight"]))],
    "brings-no-name": ["a role without a name in `brings`", entry(0, (e) => (e.brings = ["saved "]))],
    "brings-no-space": ["a role without a space in `brings`", entry(0, (e) => (e.brings = ["saved"]))],
    "brings-role-unread": [
      "an unknown role in `brings`, of a task that is like another",
      entry(4, (e) => (e.brings = ["saved classifier.weight", "other x"])),
    ],
    "brings-number": ["`brings` has an item that is a number", entry(0, (e) => (e.brings = ["saved x", 5]))],
    "brings-less": ["`brings` leaves out a parameter", entry(1, (e) => e.brings.pop())],
    "brings-more": [
      "`brings` has a parameter that the blob does not bring",
      entry(2, (e) => e.brings.push("saved other.weight")),
    ],
    "brings-own": ["`brings` leaves out rows of its own", sidedEntry((e) => e.brings.pop())],
  }),
  ...breaking("4.4", {
    "coded-bases-short": [
      "coded bases that become fewer bytes than their tensors take",
      recoded("bases", () => {
        const plain = joined(everyKind().pack.tensors, 16).slice(0, -4);
        return told(plain.length, (to) => bytesAsTheyAre(to, plain));
      }),
    ],
    "coded-bases-long": [
      "coded bases that become more bytes than their tensors take",
      recoded("bases", () => {
        const plain = joined([...everyKind().pack.tensors, new Uint8Array(16)], 16);
        return told(plain.length, (to) => bytesAsTheyAre(to, plain));
      }),
    ],
    "bases-long": [
      "bytes behind the last tensor of the bases",
      edited(({ tensors }) => tensors.push(new Uint8Array(4))),
    ],
    "bases-short": ["K asks for more than the bases hold", inModule(0, (m) => (m.A.K = 65_535))],
    huge: [
      "`in` and `out` 2^31 − 1, which no bytes stand behind",
      inModule(14, (m) => ((m.in = 2 ** 31 - 1), (m.out = 2 ** 31 - 1))),
    ],
    "fingerprint-padding": ["padding in front of a fingerprint", fingerprintPadding],
    "fingerprint-nan": ["a NaN in a fingerprint", stored(undefined, 2, (_, v) => v.setFloat32(0, Number.NaN, true))],
    "padding-of-tensors": ["padding between tensors of the bases", every(paddingOfBases)],
  }),
  ...breaking("5", {
    "side-no-type": ["a basis without a type", inModule(14, (m) => delete m.A.type)],
    "type-6": ["tensor type 6", inModule(0, (m) => (m.A.type = 6))],
    nan: ["a NaN in a component", stored(undefined, 0, (_, v) => v.setFloat32(4, Number.NaN, true))],
    infinite: ["an infinite half", stored(undefined, 3, (_, v) => v.setUint16(2, 0x7c00, true))],
    "large-f32": ["a component of 2^16", stored(undefined, 0, (_, v) => v.setFloat32(4, -65_536, true))],
    "large-bf16": ["a component of 2^100 in bf16", stored(undefined, 5, (_, v) => v.setUint16(2, 0x7180, true))],
    "large-scale": [
      "a scale that makes 2^16 and more of the largest integer, which no integer of the row is",
      stored(undefined, 7, (b, v) => (v.setUint16(0, 0x60b0, true), b.fill(0, 8, 14))),
    ],
    "large-coefficient": ["a coefficient of 10^30", stored(0, 0, (_, v) => v.setFloat32(0, 1e30, true))],
    "scale-nan": ["a scale that is NaN", stored(undefined, 7, (_, v) => v.setUint16(0, 0x7e00, true))],
    "least-int8": ["the integer −128", stored(undefined, 7, (b) => (b[8] = 0x80))],
    "least-int4": ["the integer −8 in int4", stored(undefined, 9, (b) => (b[8] = 8))],
    "least-int3": ["the integer −4 in int3", stored(undefined, 11, (b) => (b[8] = (b[8] & 0xf8) | 4))],
    "row-bits": ["bits behind the last integer of a row", stored(undefined, 11, (b) => (b[10] |= 0x80))],
    "scale-padding": ["padding behind the scales", stored(0, 14, (b) => (b[2] = 1))],
    "half-padding": ["padding behind five halves", stored(1, 4, (b) => (b[b.length - 1] = 1))],
    "tensor-padding": ["padding behind the values", stored(1, 2, (b) => (b[b.length - 1] |= 0x80))],
    "own-nan": ["a NaN in rows of its own", ownNan],
  }),
  ...breaking("6", {
    "blob-magic": ["another magic of a blob", inTasks((tasks) => (tasks[0].magic = 1))],
    "blob-tiny": ["a blob of four bytes", inTasks((tasks) => (tasks[0].blob = new Uint8Array(4)))],
    "blob-header": ["a header longer than the blob", blob(0, (_, v) => u32(v, 4, 1e6))],
    "header-items": ["a header of three items", inTasks((tasks) => tasks[0].header.push([]))],
    "blob-long": [
      "bytes behind the last tensor of a blob",
      inTasks((tasks) => tasks[0].tensors.push(new Uint8Array(4))),
    ],
    "blob-short": ["a blob that ends before its last tensor", inTasks((tasks) => tasks[1].tensors.pop())],
    "blob-padding": ["padding behind the header", blob(2, padded)],
  }),
  ...breaking("6.1", {
    "terms-map": ["terms that are a map", inTasks((tasks) => (tasks[2].header[0] = {}))],
    "term-nothing": [
      "a term that does nothing",
      inTasks((tasks) => tasks[0].header[0].push([15, 0, null, null, 0, 0, null])),
    ],
    "term-q-negative": ["q −1", term(0, (x) => (x[4] = -1))],
    "term-q-text": ["q is a string", term(0, (x) => (x[4] = "1"))],
    "term-magnitude-type": ["magnitudes of type 6", term(0, (x) => (x[6] = 6), 1)],
    "term-items": ["a term of eight items", term(0, (x) => x.push(null))],
    "term-short": ["a term of six items", term(0, (x) => x.pop())],
    "terms-order": ["terms that are not sorted", inTasks((tasks) => tasks[0].header[0].reverse())],
    "term-twice": ["two terms of a module", term(1, (x) => (x[0] = 0))],
    "term-module": ["a term of module 99", term(12, (x) => (x[0] = 99))],
    "term-rank-0": ["coefficients of rank 0", term(12, (x) => (x[1] = 0))],
    "term-rank-alone": ["a rank without coefficients", term(1, (x) => (x[1] = 1), 1)],
    "term-flat-rank": ["another rank than the flat basis'", term(6, (x) => (x[1] = 1))],
    "term-one-side": ["coefficients on one side", term(12, (x) => (x[3] = null))],
    "term-factor-items": ["a factor of four items", sided(0, (x) => x[3].push(null))],
    "term-factor-nothing": [
      "a factor of nothing",
      sidedEntry((entry, { tasks: [task] }) => {
        delete entry.brings;
        task.header[0][0][3] = [null, 0, null];
        task.tensors.splice(1, 1);
      }),
    ],
    "term-factor-basis": ["a basis of rows that have no coefficients", sided(0, (x) => (x[3][1] = 1))],
    "term-factor-missing": ["coefficients over a basis that is not there", sided(2, (x) => (x[2][1] = 3))],
    "term-factor-type": ["rows of its own of type 6", sided(0, (x) => (x[3][2] = 6))],
    "term-factor-text": ["a factor that is a string", sided(0, (x) => (x[3] = "own"))],
    "term-own-alone": ["rows of its own on one side, nothing on the other", sided(0, (x) => (x[2] = null))],
    "term-own-rank-0": ["rows of its own of rank 0", sided(3, (x) => (x[1] = 0))],
    "term-code-0": ["a code of kind 0", term(0, (x) => (x[2] = 0))],
    "term-code-3": ["a code of kind 3", term(0, (x) => (x[2] = 3))],
    "term-kind": ["flat coefficients of a column basis", term(0, (x) => (x[2] += 1))],
    "term-no-mean": ["a mean that the basis does not have", term(7, (x) => (x[2] += 4))],
    "term-no-basis": [
      "coefficients of a module without a basis",
      term(1, (x) => ((x[1] = 1), (x[2] = 1), (x[3] = 1)), 1),
    ],
    "term-rank-large": ["rank 257 where 256 is allowed, at no cost of bytes", term(12, (x) => (x[1] = 257))],
    "term-rank-65536": ["rank 65 536, for a module whose shape allows it", () => packFile(ranked(65_536).pack)],
    "term-private-type": ["a private type without private terms", term(0, (x) => (x[5] = 1))],
    "term-type": ["coefficients of type 6", term(0, (x) => (x[2] = 1 + 4 + 48))],
  }),
  ...breaking("6.2", {
    "parameters-map": ["parameters that are a map", inTasks((tasks) => (tasks[0].header[1] = {}))],
    "parameter-type": ["a parameter of type 6", parameter(0, (x) => (x[2] = 6))],
    "rows-large": ["row number 2^31", parameter(4, (x) => (x[4][1] = 2 ** 31))],
    "parameter-items": ["a saved parameter with numbers of rows", parameter(0, (x) => x.push([0, 1]))],
    "parameter-text": ["a parameter that is a string", inTasks((tasks) => (tasks[2].header[1][0] = "x"))],
    "parameter-short": ["a parameter of three items", parameter(0, (x) => x.pop())],
    "parameter-role": ["role 4", parameter(0, (x) => (x[1] = 4))],
    "parameter-twice": ["a parameter that is there twice", parameter(1, (x) => (x[0] = "classifier.weight"))],
    "parameter-name": ["a parameter name of 1 025 bytes", parameter(0, (x) => (x[0] = long(1025)))],
    "parameter-no-shape": ["an empty shape", parameter(0, (x) => (x[3] = []))],
    "parameter-0": ["a dimension 0", parameter(0, (x) => (x[3] = [2, 0]))],
    "parameter-large": [
      "a shape of more than 2^53 values",
      parameter(0, (x) => (x[3] = [2 ** 31 - 1, 2 ** 31 - 1, 2])),
    ],
    "bias-matrix": ["a bias of two dimensions", parameter(2, (x) => (x[3] = [1, 5]))],
    "rows-vector": ["rows of one dimension", parameter(4, (x) => ((x[3] = [8]), (x[4] = [0])))],
    "rows-order": ["row numbers that do not ascend", parameter(4, (x) => x[4].reverse())],
    "rows-count": ["fewer row numbers than rows", parameter(4, (x) => x[4].pop())],
    "rows-missing": ["rows without numbers", parameter(4, (x) => x.pop())],
    "saved-and-adapted": ["a weight that is saved and adapted", parameter(0, (x) => (x[0] = "types.f32.weight"))],
    "rows-and-adapted": ["rows of a weight that is adapted", parameter(4, (x) => (x[0] = "no.basis.weight"))],
    "saved-and-bias": ["a bias that is saved and changed", parameter(1, (x) => (x[0] = "norm.bias"))],
  }),
  ...breaking("8", {
    "unknown-hash": [
      "the hash of a section of unknown kind",
      unknown((b, v) => (b[1536 + get(v, 1024 + 24) - 1] ^= 1)),
      { step: "verify" },
    ],
    "signature-alone": [
      "a signature that is not of the key beside it, without keys to hold it against",
      every((b) => signed(STRANGER.sign("pack", root(b)), SIGNER.publicKey)(b)),
      { step: "verify" },
    ],
    "revoked-coded": [
      "a coded task that is revoked by the hash of its stored bytes",
      () => packFile({ ...everyKind().pack, code: (bytes) => bytes }),
      { revoked: [hashText(codedBlob(everyKind().pack.tasks[0], everyKind().pack.basis))] },
    ],
    "revoked-plain": [
      "a coded task that is revoked by the hash of what it becomes",
      () => packFile({ ...everyKind().pack, code: (bytes) => bytes }),
      { revoked: [hashText(blobOf(everyKind().pack.tasks[0]))] },
    ],
    revoked: ["a task that is revoked", every((b) => b), { revoked: [hashText(blobOf(everyKind().pack.tasks[2]))] }],
    "other-root": [
      "another root than was asked for",
      every((b) => b),
      { integrity: integrity(VALID["grown.eigen"].bytes) },
    ],
    "hash-of-blob": [
      "a blob that was changed, with its CRC",
      unrepaired(EVERY, (b, v) => exchanged(b, v, 1)),
      { integrity: "own" },
    ],
    "hash-of-bases": [
      "bases that were changed, with their CRC",
      unrepaired(EVERY, (b, v) => exchanged(b, v, 0)),
      { integrity: "own" },
    ],
    unhashed: ["no hashes, though a root was asked for", changed("no-hashes.eigen", (b) => b), { integrity: "own" }],
    "keys-none": ["an empty list of keys, which trusts nobody", changed("signed.eigen", (b) => b), { keys: [] }],
    unsigned: ["not signed, though keys were given", every((b) => b), { keys: KEYS }],
    stranger: ["signed by another key", () => packFile({ ...everyKind().pack, signer: STRANGER }), { keys: KEYS }],
    "signature-of-other": [
      "the signature of another pack",
      every((b) => signed(VALID["signed-grown.eigen"].bytes.subarray(512 + 96, 512 + 160), SIGNER.publicKey)(b)),
      { keys: KEYS },
    ],
    "signature-of-task": [
      "a signature made for a task file",
      every((b) => signed(SIGNER.sign("task", root(b)), SIGNER.publicKey)(b)),
      { keys: KEYS },
    ],
    "key-swapped": [
      "a stranger's signature beside the right key",
      every((b) => signed(STRANGER.sign("pack", root(b)), SIGNER.publicKey)(b)),
      { keys: KEYS },
    ],
  }),
  ...breaking("A", {
    "coded-magic": ["another magic in front of coded bases", recoded("bases", (b) => (b[0] ^= 1))],
    "coded-short": ["a word of coded bases is missing", recoded("bases", (b) => b.slice(0, -2))],
    "coded-long": ["a word behind the last of a coded blob", recoded("terms", (b) => Uint8Array.of(...b, 0, 0))],
    "coded-odd": ["half a word at the end of a coded blob", recoded("terms", (b) => Uint8Array.of(...b, 0))],
    "coded-end": [
      "another state at the end of a coded blob",
      headAs((to, b) => bytesAsTheyAre(to, b), { last: [65537n] }),
    ],
    "coded-state": ["a first state below 2^16", headAs((to, b) => bytesAsTheyAre(to, b), { low: 0 })],
    "coded-second-state": ["a second state that begins below 2^16", lowLane(1)],
    "coded-fourth-state": ["a fourth state that begins below 2^16", lowLane(3)],
    "coded-second-end": ["a second state that ends as 2^16 + 1", byFours({ last: [65536n, 65537n] })],
    "coded-fourth-end": ["a fourth state that ends as 2^16 + 1", byFours({ last: [65536n, 65536n, 65536n, 65537n] })],
    "coded-fours-short": ["a word of rows by fours is missing", byFours({}, (bytes) => bytes.slice(0, -2))],
    "coded-fours-value": [
      "the integer 19 in an int4 tensor of given frequencies",
      byFours({ first: 19 }, undefined, [3]),
    ],
    "coded-frequencies": [
      "given frequencies of more than 2^11",
      byFours({ frequencies: everySymbol().map((level) => [...level.slice(0, 15), 2000, 0]) }),
    ],
    "coded-frequencies-huge": [
      "a given frequency of 2^31 − 2 for 0",
      byFours({ frequencies: everySymbol().map(([, ...others]) => [2 ** 31 - 2, ...others]) }),
    ],
    "coded-frequencies-0": [
      "a given frequency of 2^11 + 1 for 0",
      byFours({ frequencies: everySymbol().map(([, ...others]) => [2049, ...others]) }),
    ],
    "coded-words": ["a single word", recoded("head", (b) => b.slice(0, 10))],
    "coded-type": ["a run of tensor type 3", tells((to) => run(to, 3, 1, 1, 1))],
    "coded-rows-0": [
      "a run of tensors without rows",
      headAs((to, b) => {
        run(to, 0, 0, 4, 1);
        bytesAsTheyAre(to, b);
      }),
    ],
    "coded-count-0": ["a run without tensors", tells((to) => run(to, 0, 1, 4, 0))],
    "coded-run-long": [
      "a run that ends behind the section",
      oneInteger((to, b) => {
        bytesAsTheyAre(to, b.subarray(0, -8));
        integerRun(to, 3);
      }, -4),
    ],
    "coded-run-huge": ["a run of 2^90 integers", tells((to) => run(to, 0, 2 ** 30, 2 ** 30, 2 ** 30))],
    "coded-bytes-long": [
      "more bytes than the section has",
      headAs((to, b) => {
        bytesAsTheyAre(to, b, { length: b.length + 4 });
        to.number("length", 0);
        to.number("distance", 4);
      }),
    ],
    "coded-single-long": [
      "more single bytes than there are to come",
      headAs((to, b) => bytesAsTheyAre(to, b, { length: b.length - 1 })),
    ],
    "coded-copy-long": [
      "a copy that reaches behind the bytes it is among",
      zeros((to, b) => {
        bytesAsTheyAre(to, b.subarray(0, -8), { length: b.length - 1 });
        to.number("length", 4);
        to.number("distance", 4);
      }),
    ],
    "coded-copy-0": [
      "a first copy from as far back as the copy before it",
      zeros((to, b) => {
        bytesAsTheyAre(to, b.subarray(0, -4), { length: b.length });
        to.number("length", 0);
        to.number("distance", 0);
      }),
    ],
    "coded-copy-again": [
      "a copy from as far back as one among other bytes",
      tells((to) => {
        to.number("length", 4);
        to.number("literals", 0);
        to.number("length", 0);
        to.number("distance", 4);
        tensors(to, 0, 1, 0, 1);
        to.number("scale", 0);
        to.symbol("fine", 7, 0);
        to.number("length", 4);
        to.number("literals", 0);
        to.number("length", 0);
        to.number("distance", 0);
      }),
    ],
    "coded-copy-far": [
      "a copy from before the basis description",
      tells((to) => {
        to.number("length", 8);
        to.number("literals", 0);
        to.number("length", 0);
        to.number("distance", msgpack(everyKind().pack.basis).length + 1);
      }),
    ],
    "coded-bases-growth": [
      "coded bases that say they become more than 16 times their bytes and 4 096",
      recoded("bases", (b) => new DataView(b.buffer).setUint32(4, 16 * b.length + 4097, true)),
    ],
    "coded-directory-growth": [
      "a coded directory that says it becomes 2^31 bytes",
      codedDirectory((d) => {
        const b = coded(d, [], 4);
        new DataView(b.buffer).setUint32(4, 2 ** 31, true);
        return b;
      }),
    ],
    "coded-growth": [
      "a coded blob that would become 2^31 bytes",
      recoded("terms", (b) => new DataView(b.buffer).setUint32(4, 2 ** 31, true)),
    ],
    "coded-copy": ["a copy from before a coded directory", codedDirectory((d) => coded(d, [], 4, d.slice(0, 64)))],
    "coded-directory": ["a word of a coded directory is missing", codedDirectory((d) => coded(d, [], 4).slice(0, -2))],
    "coded-value": ["the integer −8 in a coded int4 tensor", codedLeast(0)],
    "coded-value-shifted": ["the same behind large integers, whose lowest bit stands by itself", codedLeast(12)],
    "coded-value-large": [
      "the integer 19 in a coded int4 tensor, whose lowest bits are those of 3",
      oneInteger((to, b) => {
        bytesAsTheyAre(to, b.subarray(0, -8));
        integerRun(to, 19);
      }),
    ],
    "coded-growth-real": [
      "a coded blob that becomes more than 16 times its bytes and 4 096",
      edited(({ tasks, basis }) => {
        const task = { header: [[], [["classifier.weight", 0, 0, [2, 5000]]]], tensors: [new Uint8Array(40_000)] };
        Object.assign(tasks[2], task);
        return { code: (_bytes, name) => (name === "head" ? codedBlob(tasks[2], basis) : undefined) };
      }),
    ],
  }),
};

/** A directory with more bytes behind it. @param hashes how many of hashes it says it has */
function longer(directory, more, hashes) {
  const bytes = new Uint8Array(directory.length + more);
  bytes.set(directory);
  new DataView(bytes.buffer).setUint32(12, hashes, true);
  return bytes;
}

/** Adds a section of unknown kind, with its entry of the table changed and the later sums repaired. */
function unknown(change) {
  return () => {
    const bytes = VALID["later.eigen"].bytes.slice();
    const view = new DataView(bytes.buffer);
    change(bytes, view, section(view.getUint32(1536, true) - 1));
    view.setUint32(1024 + 48, crc32c(bytes.subarray(1536, 1536 + get(view, 1024 + 24))), true);
    seal(bytes, view);
    return bytes;
  };
}

/** A byte of padding between the header and the first tensor. */
function padded(blob) {
  const h = new DataView(blob.buffer).getUint32(4, true);
  if ((8 + h) % 4 === 0) throw new Error("there is no padding here");
  blob[8 + h] = 1;
}

/** Changes the first byte of a section, with its CRC but without its hash: the root stays that of the table. */
function exchanged(bytes, view, index) {
  const [offset, length] = [get(view, section(index) + 8), get(view, section(index) + 16)];
  const n = view.getUint32(1536, true);
  const at = 1536 + get(view, 1024 + 24) - 32 * (n - index);
  const hash = bytes.slice(at, at + 32);
  bytes[offset + length - 1] ^= 1;
  repair(bytes);
  bytes.set(hash, at);
  const directory = bytes.subarray(1536, 1536 + get(view, 1024 + 24));
  u32(view, 1024 + 48, crc32c(directory));
  seal(bytes, view);
}

const ascii = (text) => [...new TextEncoder().encode(text)];

/** Replaces the bytes of the basis description. */
function described(change) {
  return edited(({ basis }) => ({ basis: new Raw(...change([...msgpack(basis)])) }));
}

/** Changes the newer of two superblocks and repairs its sums. */
function newest(change) {
  return () => {
    const bytes = VALID["grown.eigen"].bytes.slice();
    const block = bytes.subarray(512, 1024);
    const view = new DataView(bytes.buffer, 512, 512);
    const signed = change(block, view) === true;
    seal(block, view, 0);
    if (signed) u32(view, 160, crc32c(block.subarray(0, 160)));
    return bytes;
  };
}

function fingerprintPadding() {
  const model = createModel(3);
  model.module({ name: "layer", out: 3, in: 1, A: { K: 1, mean: false }, fingerprint: true });
  const bytes = packFile(model.pack);
  const view = new DataView(bytes.buffer);
  bytes[get(view, section(0) + 8) + 28] = 1;
  return repair(bytes);
}

function flagged(bytes, view) {
  u32(view, 1024 + 52, 2);
  seal(bytes, view);
  u32(view, 1024 + 160, crc32c(bytes.subarray(1024, 1024 + 160)));
}

function generation0(bytes, view) {
  bytes.copyWithin(512, 1024, 1536);
  bytes.fill(0, 1024, 1536);
  u64(view, 512, 0);
  seal(bytes, view, 512);
}

/** The first place between two tensors of the bases that belongs to neither. */
function paddingOfBases(bytes, view) {
  const { pack } = everyKind();
  let end = 0;
  for (const { length } of pack.tensors) {
    if (align(end, 16) > end) {
      bytes[get(view, section(0) + 8) + end] = 1;
      return;
    }
    end += length;
  }
  throw new Error("there is no padding here");
}

/** Edits the task file, before it is put together or after. */
const file = (edit) => () => taskFileOf(undefined, (task) => ({ ...task, ...edit(task) })).bytes;
const fileBytes = (name, change) => () => repairTaskFile(unrepaired(name, change)());
const WHOLE = "whole.eigentask";
const SIGNED = "signed.eigentask";

/** Task files, which belong to every-kind.eigen. */
export const TASK_FILES = {
  ...breaking("1", {
    "task-nesting": [
      "metadata that would be too deep in a task list",
      file(({ entry }) => ({ entry: { ...entry, metadata: { x: nested(14) } } })),
    ],
  }),
  ...breaking("4.3", {
    "task-id": ["an id with a line feed", file(({ entry }) => ({ entry: { ...entry, id: "a\nb" } }))],
    "task-brings": [
      "`brings` leaves out what the blob brings",
      file(({ entry }) => ({ entry: { ...entry, brings: [] } })),
    ],
    "task-role": ["an unknown role in `brings`", file(({ entry }) => ({ entry: { ...entry, brings: ["other x"] } }))],
  }),
  ...breaking("7", {
    "task-magic": ["another magic", fileBytes(WHOLE, (b) => (b[1] = 0))],
    "task-major": ["major version 2", fileBytes(WHOLE, (_, v) => v.setUint16(8, 2, true))],
    "task-crc": ["the CRC of the head", unrepaired(WHOLE, (b) => (b[60] ^= 1))],
    "task-entry-crc": ["the CRC of the entry", unrepaired(WHOLE, (b) => (b[70] ^= 1))],
    "task-blob-crc": ["the CRC of the blob", unrepaired(WHOLE, (b) => (b[b.length - 9] ^= 1))],
    "task-short": ["63 bytes", unrepaired(WHOLE, (b) => b.slice(0, 63))],
    "task-truncated": ["a byte less", unrepaired(WHOLE, (b) => b.slice(0, -1))],
    "task-longer": ["a byte more", unrepaired(WHOLE, (b) => new Uint8Array([...b, 0]))],
    "task-padding": ["padding behind the entry", fileBytes(WHOLE, (b, v) => (b[64 + v.getUint32(12, true)] = 1))],
    "task-other-basis": ["another basis id", fileBytes(WHOLE, (b) => (b[16] ^= 1))],
    "task-index": ["`brings` gives an index", file(({ entry }) => ({ entry: { ...entry, brings: 0 } }))],
    "task-blob": ["an empty blob", file(() => ({ blob: new Uint8Array(0) }))],
    "task-blob-magic": [
      "a blob that begins as none",
      fileBytes(WHOLE, (b, v) => (b[align(64 + v.getUint32(12, true), 64)] ^= 1)),
    ],
    "task-signature-crc": ["the CRC of the signature", unrepaired(SIGNED, (b) => (b[b.length - 1] ^= 1))],
    "task-signature-padding": [
      "padding before the signature",
      unrepaired(SIGNED, (b, v) => (b[align(64 + v.getUint32(12, true), 64) + v.getUint32(48, true)] = 1)),
    ],
  }),
  ...breaking("8", {
    "task-revoked": [
      "a task that is revoked",
      fileBytes(WHOLE, (b) => b),
      { revoked: [hashText(blobOf(everyKind().pack.tasks[1]))] },
    ],
    "task-revoked-plain": [
      "a coded task that is revoked by the hash of what it becomes",
      fileBytes("coded.eigentask", (b) => b),
      { revoked: [hashText(blobOf(everyKind().pack.tasks[1]))] },
    ],
    "task-signature-alone": [
      "a signature that is not of the key beside it, without keys to hold it against",
      () => taskFileOf({ ...SIGNER, sign: (kind, hash) => STRANGER.sign(kind, hash) }).bytes,
      { step: "verify" },
    ],
    "task-unsigned": ["not signed, though keys were given", fileBytes(WHOLE, (b) => b), { keys: KEYS }],
    "task-stranger": ["signed by another key", () => taskFileOf(STRANGER).bytes, { keys: KEYS }],
    "task-signature": [
      "a signature made for a pack",
      () => taskFileOf({ ...SIGNER, sign: (_, hash) => SIGNER.sign("pack", hash) }).bytes,
      { keys: KEYS },
    ],
  }),
};
