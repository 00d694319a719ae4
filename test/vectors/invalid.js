// @ts-nocheck: it writes what no type allows
/** The invalid vectors: for each the section of SPEC.md that it breaks, and why. Checksums and hashes are right where nothing else is said. */
import { coded } from "./coded.js";
import { align, blobOf, crc32c, Float, msgpack, packFile, Raw, repair, repairTaskFile, sha256 } from "./format.js";
import { everyKind, SIGNER, STRANGER, taskFileOf, VALID } from "./valid.js";

/** `everyKind` with something else in it. */
const edited = (edit) => () => {
  const { pack } = everyKind();
  return packFile({ ...pack, ...edit(pack) });
};
/** Bytes of a valid vector with something else in them; checksums are made right again, unless `raw`. */
const changed =
  (name, change, { raw = false } = {}) =>
  () => {
    const bytes = VALID[name].bytes.slice();
    const after = change(bytes, new DataView(bytes.buffer)) ?? bytes;
    return raw ? after : repair(after);
  };
/** A module of the basis description. */
const module = (index, change) => edited(({ basis }) => void change(basis.modules[index]));
/** The first task's terms, or the second's parameters. */
const term = (index, change, task = 0) => edited(({ tasks }) => void change(tasks[task].header[0][index], tasks[task]));
const parameter = (index, change) =>
  edited(({ tasks }) => {
    delete tasks[1].entry.brings;
    change(tasks[1].header[1][index], tasks[1]);
  });
const entry = (index, change) => edited(({ tasks }) => void change(tasks[index].entry));
/** A byte of a tensor of the bases (`task` undefined) or of a task. */
const stored = (task, index, change) =>
  edited((pack) => {
    const list = task === undefined ? pack.tensors : pack.tasks[task].tensors;
    change(list[index], new DataView(list[index].buffer));
  });

/** Where an entry of the section table begins, in every-kind. */
const section = (index) => 1536 + 16 + 32 * index;
const long = (bytes) => "x".repeat(bytes);
const u64 = (view, at, value) => view.setBigUint64(at, BigInt(value), true);
const get = (view, at) => Number(view.getBigUint64(at, true));
const nested = (depth) => (depth === 0 ? 1 : [nested(depth - 1)]);
/** A signature in the first superblock that nothing else was changed for. */
const signed = (signature, key) => (bytes) => {
  bytes.set(key, 1024 + 64);
  bytes.set(signature, 1024 + 96);
  new DataView(bytes.buffer).setUint32(1024 + 52, 1, true);
};
const root = (bytes) => {
  const view = new DataView(bytes.buffer);
  return sha256(bytes.subarray(0, 48), bytes.subarray(1536, 1536 + get(view, 1024 + 24)));
};
export const integrity = (bytes) => `sha256-${Buffer.from(root(bytes)).toString("base64")}`;
export const KEYS = [`ed25519:${Buffer.from(SIGNER.publicKey).toString("base64")}`];
const EVERY = "every-kind.eigen";

/** Coded sections, one of them with something else in it. */
function recoded(which, change) {
  return () => {
    const { pack } = everyKind();
    const code = (bytes, name) => (name === which ? (change(bytes) ?? bytes) : bytes);
    return packFile({ ...pack, code });
  };
}

function codedDirectory(codeDirectory) {
  return () => packFile({ ...everyKind().pack, code: (bytes) => bytes, codeDirectory });
}

/** A magnitude of 8 in four bits: what a coder can write, and no tensor may hold. */
function codedLeast() {
  const { pack } = everyKind();
  const tensor = pack.tensors.find(({ of }) => of.type === "int4");
  const first = 4 * Math.ceil((2 * tensor.of.rows) / 4);
  tensor[first] = (tensor[first] & 0xf0) | 8;
  return packFile({ ...pack, code: (bytes) => bytes });
}

/** Name → [section, why, make, given]. `given` is what the reader was told to trust. */
export const PACKS = {
  // 5.1 Coded sections
  "coded-magic": ["5.1", "another magic in front of coded bases", recoded("bases", (b) => void (b[0] ^= 1))],
  "coded-short": ["5.1", "a word of coded bases is missing", recoded("bases", (b) => b.slice(0, -2))],
  "coded-long": ["5.1", "a word behind the last of a coded blob", recoded("terms", (b) => Uint8Array.of(...b, 0, 0))],
  "coded-odd": ["5.1", "half a word at the end of a coded blob", recoded("terms", (b) => Uint8Array.of(...b, 0))],
  "coded-end": ["5.1", "another state at the end of a coded blob", recoded("head", (b) => void (b[10] ^= 1))],
  "coded-size": [
    "5.1",
    "coded bases that become fewer bytes than their tensors take",
    recoded("bases", (b) => void (b[4] -= 16)),
  ],
  "coded-growth": [
    "5.1",
    "a coded blob that would become 2^31 bytes",
    recoded("terms", (b) => void new DataView(b.buffer).setUint32(4, 2 ** 31, true)),
  ],
  "coded-copy": ["5.1", "a copy from before a coded directory", codedDirectory((d) => coded(d, [], 4, d.slice(0, 64)))],
  "coded-place": [
    "4",
    "a coded directory says where a section is",
    codedDirectory((d) => {
      d[24] = 64;
      return coded(d, [], 4);
    }),
  ],
  "coded-directory": [
    "5.1",
    "a word of a coded directory is missing",
    codedDirectory((d) => coded(d, [], 4).slice(0, -2)),
  ],
  "coded-value": ["5", "the integer -8 in a coded int4 tensor", codedLeast],
  // 2. Window
  magic: ["2", "another magic", changed(EVERY, (b) => void (b[1] = 0x65))],
  "short-window": ["2", "1 535 bytes", changed(EVERY, (b) => b.slice(0, 1535), { raw: true })],
  "major-2": ["2", "major version 2", changed(EVERY, (_, v) => v.setUint16(8, 2, true))],
  "window-length": ["2", "a window of 2 048 bytes", changed(EVERY, (_, v) => v.setUint32(12, 2048, true))],
  "head-crc": ["2", "the CRC of the window's head", changed(EVERY, (b) => void (b[48] ^= 1), { raw: true })],
  "reserved-head": ["2", "byte 60 is not zero", changed(EVERY, (b) => void (b[60] = 1))],
  "reserved-superblock": ["2", "byte 57 of the superblock is not zero", changed(EVERY, (b) => void (b[1024 + 57] = 1))],
  "reserved-block": ["2", "byte 400 of the superblock is not zero", changed(EVERY, (b) => void (b[1024 + 400] = 1))],
  "superblock-flags": ["2", "flags 2 in the superblock, with the CRC of what follows", changed(EVERY, flagged)],
  "no-superblock": ["2", "both superblocks are zero", changed(EVERY, (b) => void b.fill(0, 1024, 1536))],
  "superblock-crc": [
    "2",
    "the CRC of the only superblock",
    changed(EVERY, (b) => void (b[1024 + 60] ^= 1), { raw: true }),
  ],
  "superblock-parity": ["2", "generation 2 in superblock 1", changed(EVERY, (_, v) => u64(v, 1024, 2))],
  "generation-0": ["2", "generation 0, in superblock 0", changed(EVERY, generation0, { raw: true })],
  "signature-unflagged": [
    "2",
    "a signature, but flag 0",
    changed("signed.eigen", (_, v) => v.setUint32(1024 + 52, 0, true)),
  ],
  "signature-crc": [
    "2",
    "the CRC of the signature",
    changed("signed.eigen", (b) => void (b[1024 + 160] ^= 1), { raw: true }),
  ],
  truncated: ["2", "shorter than the committed length", changed(EVERY, (b) => b.slice(0, -1), { raw: true })],
  "committed-u64": [
    "1",
    "a committed length above 2^53",
    changed(EVERY, (_, v) => v.setUint32(1024 + 12, 0xffffffff, true)),
  ],
  "directory-outside": [
    "2",
    "the directory lies outside the file",
    changed(EVERY, (_, v) => u64(v, 1024 + 24, 2 ** 32)),
  ],
  "directory-in-window": ["4.1", "the directory lies in the window", changed(EVERY, (_, v) => u64(v, 1024 + 16, 64))],
  // 4. Directory
  "directory-crc": [
    "2",
    "the CRC of the directory",
    changed(EVERY, (b, v) => ((b[1024 + 48] ^= 1), v.setUint32(1024 + 60, crc32c(b.subarray(1024, 1084)), true)), {
      raw: true,
    }),
  ],
  "directory-length": [
    "4",
    "its parts add up to less than the directory",
    changed(EVERY, (_, v) => v.setUint32(1536 + 8, v.getUint32(1536 + 8, true) - 1, true)),
  ],
  "too-many-sections": ["4", "2^31 sections", changed(EVERY, (_, v) => v.setUint32(1536, 2 ** 31, true))],
  "hashes-length": [
    "4",
    "32 bytes of hashes for more sections",
    changed(EVERY, (_, v) => v.setUint32(1536 + 12, 32, true)),
  ],
  "padding-of-bases": [
    "1",
    "padding between directory and bases is not zero",
    changed(EVERY, (b, v) => void (b[get(v, section(0) + 8) - 1] = 1)),
  ],
  "section-flags": ["4.1", "flag bit 1 of a section", changed(EVERY, (_, v) => v.setUint32(section(1) + 4, 3, true))],
  "section-optional": [
    "4.1",
    "a task blob that is not required",
    changed(EVERY, (_, v) => v.setUint32(section(1) + 4, 0, true)),
  ],
  "section-reserved": ["4.1", "byte 28 of a section is not zero", changed(EVERY, (b) => void (b[section(1) + 28] = 1))],
  "section-empty": [
    "4.1",
    "an empty section of unknown kind",
    edited(() => ({ extra: [{ kind: 99, required: 0, content: new Uint8Array(0) }] })),
  ],
  "section-required": [
    "4.1",
    "a required section of unknown kind",
    edited(() => ({ extra: [{ kind: 99, required: 1, content: Uint8Array.of(1) }] })),
  ],
  "section-hole": [
    "4.1",
    "a hole between two sections",
    changed(EVERY, (_, v) => u64(v, section(1) + 8, get(v, section(1) + 8) + 64)),
  ],
  "section-overlap": [
    "4.1",
    "a section that overlaps the one before",
    changed(EVERY, (_, v) => u64(v, section(1) + 8, get(v, section(1) + 8) - 64)),
  ],
  "section-end": [
    "4.1",
    "the last section ends behind the committed length",
    changed(EVERY, (_, v) => u64(v, section(5) + 16, get(v, section(5) + 16) + 1)),
  ],
  "free-crc": [
    "4.1",
    "a free section with a CRC",
    changed("grown.eigen", (b, v) => void (b[get(v, 512 + 16) + 16 + 24] = 1)),
  ],
  "free-hash": [
    "4",
    "a free section with a hash",
    changed(
      "grown.eigen",
      (b, v) => void (b[get(v, 512 + 16) + get(v, 512 + 24) - 32 * v.getUint32(get(v, 512 + 16), true)] = 1),
    ),
  ],
  "no-bases": [
    "4.1",
    "no bases section",
    changed(EVERY, (_, v) => (v.setUint32(section(0), 99, true), v.setUint32(section(0) + 4, 0, true))),
  ],
  "two-bases": ["4.1", "two bases sections", changed(EVERY, (_, v) => v.setUint32(section(1), 1, true))],
  "bases-differ": [
    "4.1",
    "superblock and table disagree about the bases",
    changed(EVERY, (_, v) => u64(v, 1024 + 40, get(v, 1024 + 40) - 4)),
  ],
  "bases-crc": [
    "4.1",
    "the CRC of the bases",
    changed("no-hashes.eigen", (b, v) => void (b[get(v, section(0) + 8)] ^= 1), { raw: true }),
  ],
  "blob-crc": [
    "4.1",
    "the CRC of a task blob",
    changed("no-hashes.eigen", (b, v) => void (b[get(v, section(1) + 8) + get(v, section(1) + 16) - 9] ^= 1), {
      raw: true,
    }),
  ],
  "fewer-tasks": [
    "4.3",
    "more task blobs than tasks",
    edited(({ tasks }) => ({ tasks, extra: [{ kind: 2, content: Uint8Array.of(1) }] })),
  ],
  // 1. MessagePack
  "key-twice": [
    "1",
    "a key that is there twice",
    described((b) => [b[0] + 1, ...b.slice(1), 0xa4, ...ascii("mode"), 0xa1, 97]),
  ],
  "key-number": ["1", "a key that is a number", described((b) => [b[0] + 1, ...b.slice(1), 1, 1])],
  "left-over": ["1", "a byte behind the basis description", described((b) => [...b, 0xc0])],
  "count-lies": [
    "1",
    "an array of 2^32 − 1 items in five bytes",
    edited(() => ({ basis: new Raw(0xdd, 255, 255, 255, 255) })),
  ],
  binary: ["1", "a value of type binary", edited(({ basis }) => void (basis["x-more"] = new Raw(0xc4, 1, 0)))],
  extension: ["1", "a value of an extension type", edited(({ basis }) => void (basis["x-more"] = new Raw(0xd4, 1, 0)))],
  "utf-8": ["1", "a name that is not UTF-8", module(0, (m) => void (m.name = new Raw(0xa2, 0xc3, 0x28)))],
  nesting: ["1", "a value inside 17 arrays and maps", edited(({ basis }) => void (basis["x-more"] = nested(16)))],
  collections: [
    "1",
    "more maps and arrays than 1 024 and a third of the bytes",
    entry(0, (e) => void (e["x-more"] = Array.from({ length: 4000 }, () => []))),
  ],
  "cut-off": [
    "1",
    "a string that ends behind the description",
    edited(() => ({ basis: new Raw(0x81, 0xd9, 200, 97) })),
  ],
  // 4.2 Basis description
  "no-producer": ["4.2", "no producer", edited(({ basis }) => void delete basis.producer)],
  "no-explained": ["4.2", "a side without `explained`", module(0, (m) => void delete m.A.explained)],
  "explained-2": ["4.2", "`explained` is 2", module(0, (m) => void (m.A.explained = 2))],
  "mode-long": ["4.2", "`mode` of 65 bytes", edited(({ basis }) => void (basis.mode = long(65)))],
  "base-model-long": ["4.2", "`baseModel` of 4 097 bytes", edited(({ basis }) => void (basis.baseModel = long(4097)))],
  "rank-0": ["4.2", "`rank` 0 of the basis", edited(({ basis }) => void (basis.rank = 0))],
  "name-long": ["4.2", "a module name of 1 025 bytes", module(5, (m) => void (m.name = long(1025)))],
  "name-empty": ["4.2", "an empty module name", module(5, (m) => void (m.name = ""))],
  "name-twice": ["4.2", "two modules of one name", module(1, (m) => void (m.name = "types.f32"))],
  "out-0": ["4.2", "`out` 0", module(15, (m) => void (m.out = 0))],
  "in-large": ["4.2", "`in` 2^31", module(15, (m) => void (m.in = 2 ** 31))],
  "in-fraction": ["4.2", "`in` 3.5", module(15, (m) => void (m.in = new Float(3.5)))],
  "layout-4": ["4.2", "layout 4", module(0, (m) => void (m.layout = 4))],
  "kernel-missing": ["4.2", "a convolution without a kernel", module(10, (m) => void delete m.kernel)],
  "kernel-divides": ["4.2", "a kernel [3, 2] for `in` 8", module(10, (m) => void (m.kernel = [3, 2]))],
  "kernel-linear": ["4.2", "a kernel of a linear layer", module(0, (m) => void (m.kernel = [1]))],
  "kernel-long": [
    "4.2",
    "a kernel of nine dimensions",
    module(10, (m) => void (m.kernel = [2, 2, 1, 1, 1, 1, 1, 1, 1])),
  ],
  "one-side": [
    "4.2",
    "a basis on one side only",
    edited(({ basis, tensors }) => ((basis.modules[12].B = null), void tensors.splice(26, 1))),
  ],
  "kind-3": ["4.2", "a side of kind 3", module(14, (m) => void (m.A.kind = 3))],
  "column-rank": ["4.2", "a rank on a column side", module(14, (m) => void (m.A.rank = 1))],
  "flat-no-rank": ["4.2", "a flat side without a rank", module(6, (m) => void delete m.A.rank)],
  "side-empty": [
    "4.2",
    "a side with neither components nor a mean",
    edited(({ basis, tensors }) => ((basis.modules[14].B.K = 0), void tensors.pop())),
  ],
  "type-6": ["5", "tensor type 6", module(0, (m) => void (m.A.type = 6))],
  "bases-long": [
    "4.4",
    "bytes behind the last tensor of the bases",
    edited(({ tensors }) => void tensors.push(new Uint8Array(4))),
  ],
  "bases-short": ["4.4", "K asks for more than the bases hold", module(0, (m) => void (m.A.K = 65_535))],
  "mean-1": ["4.2", "`mean` is 1", module(14, (m) => void (m.A.mean = 1))],
  "fingerprint-1": ["4.2", "`fingerprint` is 1", module(0, (m) => void (m.fingerprint = 1))],
  "k-large": ["4.2", "K 65 536", module(14, (m) => void (m.A.K = 65_536))],
  "k-negative": ["4.2", "K −1", module(14, (m) => void (m.A.K = -1))],
  "side-array": ["4.2", "a side that is an array", module(15, (m) => void ((m.A = []), (m.B = [])))],
  "module-array": ["4.2", "a module that is an array", edited(({ basis }) => void (basis.modules[15] = []))],
  "modules-map": ["4.2", "`modules` is a map", edited(({ basis }) => void (basis.modules = {}))],
  "basis-array": ["4.2", "a basis description that is an array", edited(() => ({ basis: [] }))],
  huge: [
    "4.4",
    "`in` and `out` 2^31 − 1, which no bytes stand behind",
    module(14, (m) => void ((m.in = 2 ** 31 - 1), (m.out = 2 ** 31 - 1))),
  ],
  // 4.3 Task list
  "id-empty": ["4.3", "an empty id", entry(0, (e) => void (e.id = ""))],
  "id-long": ["4.3", "an id of 256 bytes", entry(0, (e) => void (e.id = long(256)))],
  "id-control": ["4.3", "an id with a control character", entry(0, (e) => void (e.id = "a\u009bb"))],
  "id-twice": ["4.3", "two tasks of one id", entry(0, (e) => void (e.id = "head"))],
  "adapter-bytes": ["4.3", "`adapterBytes` −1", entry(0, (e) => void (e.adapterBytes = -1))],
  "no-adapter-bytes": ["4.3", "no `adapterBytes`", entry(0, (e) => void delete e.adapterBytes)],
  "metadata-array": ["4.3", "metadata that is an array", entry(0, (e) => void (e.metadata = []))],
  "labels-number": ["4.3", "`labels` is 5", entry(0, (e) => void (e.metadata = { labels: 5 }))],
  "labels-mixed": ["4.3", "a label that is a number", entry(0, (e) => void (e.metadata = { labels: ["a", 5] }))],
  "labels-empty": ["4.3", "an empty label", entry(0, (e) => void (e.metadata = { labels: ["a", ""] }))],
  "license-number": ["4.3", "`license` is a number", entry(0, (e) => void (e.metadata = { license: 1 }))],
  "brings-later": ["4.3", "`brings` gives the index of a later task", entry(0, (e) => void (e.brings = 1))],
  "brings-self": ["4.3", "`brings` gives the task's own index", entry(4, (e) => void (e.brings = 4))],
  "brings-long": [
    "4.3",
    "a string of `brings` of 1 036 bytes",
    entry(0, (e) => void (e.brings = [`bias-delta ${long(1025)}`])),
  ],
  "brings-twice": ["4.3", "`brings` has an item twice", entry(2, (e) => void e.brings.push(e.brings[0]))],
  "brings-role": ["4.3", "an unknown role in `brings`", entry(0, (e) => void (e.brings = ["other head.weight"]))],
  "brings-number": ["4.3", "`brings` has an item that is a number", entry(0, (e) => void (e.brings = ["saved x", 5]))],
  "brings-less": ["4.3", "`brings` leaves out a parameter", entry(1, (e) => void e.brings.pop())],
  "brings-more": [
    "4.3",
    "`brings` has a parameter that the blob does not bring",
    entry(2, (e) => void e.brings.push("saved other.weight")),
  ],
  // 4.4, 5. Tensors
  nan: ["5", "a NaN in a component", stored(undefined, 0, (_, v) => v.setFloat32(4, Number.NaN, true))],
  infinite: ["5", "an infinite half", stored(undefined, 3, (_, v) => v.setUint16(2, 0x7c00, true))],
  "large-f32": ["5", "a component of 2^16", stored(undefined, 0, (_, v) => v.setFloat32(4, -65_536, true))],
  "large-bf16": ["5", "a component of 2^100 in bf16", stored(undefined, 5, (_, v) => v.setUint16(2, 0x7180, true))],
  "large-scale": [
    "5",
    "a scale that makes values of 2^16 and more",
    stored(undefined, 7, (_, v) => v.setUint16(0, 0x7bff, true)),
  ],
  "large-coefficient": ["5", "a coefficient of 10^30", stored(0, 0, (_, v) => v.setFloat32(0, 1e30, true))],
  "scale-nan": ["5", "a scale that is NaN", stored(undefined, 7, (_, v) => v.setUint16(0, 0x7e00, true))],
  "least-int8": ["5", "the integer −128", stored(undefined, 7, (b) => void (b[8] = 0x80))],
  "least-int4": ["5", "the integer −8 in int4", stored(undefined, 9, (b) => void (b[8] = 8))],
  "least-int3": ["5", "the integer −4 in int3", stored(undefined, 11, (b) => void (b[8] = (b[8] & 0xf8) | 4))],
  "row-bits": ["5", "bits behind the last integer of a row", stored(undefined, 11, (b) => void (b[10] |= 0x80))],
  "scale-padding": ["5", "padding behind the scales", stored(0, 14, (b) => void (b[2] = 1))],
  "tensor-padding": ["5", "padding behind the values", stored(1, 2, (b) => void (b[b.length - 1] |= 0x80))],
  "fingerprint-nan": [
    "4.4",
    "a NaN in a fingerprint",
    stored(undefined, 2, (_, v) => v.setFloat32(0, Number.NaN, true)),
  ],
  "padding-of-tensors": ["4.4", "padding between tensors of the bases", changed(EVERY, paddingOfBases)],
  // 6. Task blob
  "blob-magic": ["6", "another magic of a blob", edited(({ tasks }) => void (tasks[0].magic = 1))],
  "blob-tiny": ["6", "a blob of four bytes", edited(({ tasks }) => void (tasks[0].blob = new Uint8Array(4)))],
  "blob-header": [
    "6",
    "a header longer than the blob",
    edited(
      ({ tasks }) => (
        (tasks[0].blob = blobOf(tasks[0])), void new DataView(tasks[0].blob.buffer).setUint32(4, 1e6, true)
      ),
    ),
  ],
  "header-items": ["6", "a header of three items", edited(({ tasks }) => void tasks[0].header.push([]))],
  "terms-map": ["6.1", "terms that are a map", edited(({ tasks }) => void (tasks[2].header[0] = {}))],
  "parameters-map": ["6.2", "parameters that are a map", edited(({ tasks }) => void (tasks[0].header[1] = {}))],
  "term-nothing": [
    "6.1",
    "a term that does nothing",
    edited(({ tasks }) => void tasks[0].header[0].push([15, 0, null, null, 0, 0, null])),
  ],
  "term-q-negative": ["6.1", "q −1", term(0, (x) => void (x[4] = -1))],
  "term-magnitude-type": ["6.1", "magnitudes of type 6", term(0, (x) => void (x[6] = 6), 1)],
  "parameter-type": ["6.2", "a parameter of type 6", parameter(0, (x) => void (x[2] = 6))],
  "rows-large": ["6.2", "row number 2^31", parameter(4, (x) => void (x[4][1] = 2 ** 31))],
  "term-items": ["6.1", "a term of eight items", term(0, (x) => void x.push(null))],
  "term-short": ["6.1", "a term of six items", term(0, (x) => void x.pop())],
  "terms-order": ["6.1", "terms that are not sorted", edited(({ tasks }) => void tasks[0].header[0].reverse())],
  "term-twice": ["6.1", "two terms of a module", term(1, (x) => void (x[0] = 0))],
  "term-module": ["6.1", "a term of module 99", term(12, (x) => void (x[0] = 99))],
  "term-rank-0": ["6.1", "coefficients of rank 0", term(12, (x) => void (x[1] = 0))],
  "term-rank-alone": ["6.1", "a rank without coefficients", term(1, (x) => void (x[1] = 1), 1)],
  "term-flat-rank": ["6.1", "another rank than the flat basis'", term(6, (x) => void (x[1] = 1))],
  "term-one-side": ["6.1", "coefficients on one side", term(12, (x) => void (x[3] = null))],
  "term-kind": ["6.1", "flat coefficients of a column basis", term(0, (x) => void (x[2] += 1))],
  "term-no-mean": ["6.1", "a mean that the basis does not have", term(7, (x) => void (x[2] += 4))],
  "term-no-basis": [
    "6.1",
    "coefficients of a module without a basis",
    term(1, (x) => void ((x[1] = 1), (x[2] = 1), (x[3] = 1)), 1),
  ],
  "term-rank-large": ["6.1", "rank 257 where 256 is allowed, at no cost of bytes", term(12, (x) => void (x[1] = 257))],
  "term-private-type": ["6.1", "a private type without private terms", term(0, (x) => void (x[5] = 1))],
  "term-type": ["6.1", "coefficients of type 6", term(0, (x) => void (x[2] = 1 + 4 + 48))],
  "parameter-items": ["6.2", "a saved parameter with numbers of rows", parameter(0, (x) => void x.push([0, 1]))],
  "parameter-short": ["6.2", "a parameter of three items", parameter(0, (x) => void x.pop())],
  "parameter-role": ["6.2", "role 4", parameter(0, (x) => void (x[1] = 4))],
  "parameter-twice": ["6.2", "a parameter that is there twice", parameter(1, (x) => void (x[0] = "classifier.weight"))],
  "parameter-name": ["6.2", "a parameter name of 1 025 bytes", parameter(0, (x) => void (x[0] = long(1025)))],
  "parameter-no-shape": ["6.2", "an empty shape", parameter(0, (x) => void (x[3] = []))],
  "parameter-0": ["6.2", "a dimension 0", parameter(0, (x) => void (x[3] = [2, 0]))],
  "parameter-large": [
    "6.2",
    "a shape of more than 2^53 values",
    parameter(0, (x) => void (x[3] = [2 ** 31 - 1, 2 ** 31 - 1, 2])),
  ],
  "bias-matrix": ["6.2", "a bias of two dimensions", parameter(2, (x) => void (x[3] = [1, 5]))],
  "rows-vector": ["6.2", "rows of one dimension", parameter(4, (x) => void ((x[3] = [8]), (x[4] = [0])))],
  "rows-order": ["6.2", "row numbers that do not ascend", parameter(4, (x) => void x[4].reverse())],
  "rows-count": ["6.2", "fewer row numbers than rows", parameter(4, (x) => void x[4].pop())],
  "rows-missing": ["6.2", "rows without numbers", parameter(4, (x) => void x.pop())],
  "saved-and-adapted": [
    "6.2",
    "a weight that is saved and adapted",
    parameter(0, (x) => void (x[0] = "types.f32.weight")),
  ],
  "rows-and-adapted": ["6.2", "rows of a weight that is adapted", parameter(4, (x) => void (x[0] = "no.basis.weight"))],
  "saved-and-bias": ["6.2", "a bias that is saved and changed", parameter(1, (x) => void (x[0] = "norm.bias"))],
  "blob-long": [
    "6",
    "bytes behind the last tensor of a blob",
    edited(({ tasks }) => void tasks[0].tensors.push(new Uint8Array(4))),
  ],
  "blob-short": ["6", "a blob that ends before its last tensor", edited(({ tasks }) => void tasks[1].tensors.pop())],
  "blob-padding": [
    "6",
    "padding behind the header",
    edited(({ tasks }) => ((tasks[2].blob = blobOf(tasks[2])), void padded(tasks[2].blob))),
  ],
  // 8. Hashes and signatures
  revoked: [
    "8",
    "a task that is revoked",
    changed(EVERY, (b) => b),
    { revoked: [`sha256-${Buffer.from(sha256(blobOf(everyKind().pack.tasks[2]))).toString("base64")}`] },
  ],
  "other-root": [
    "8",
    "another root than was asked for",
    changed(EVERY, (b) => b),
    { integrity: integrity(VALID["grown.eigen"].bytes) },
  ],
  "hash-of-blob": [
    "8",
    "a blob that was changed, with its CRC",
    changed(EVERY, (b, v) => exchanged(b, v, 1), { raw: true }),
    { integrity: "own" },
  ],
  "hash-of-bases": [
    "8",
    "bases that were changed, with their CRC",
    changed(EVERY, (b, v) => exchanged(b, v, 0), { raw: true }),
    { integrity: "own" },
  ],
  unhashed: ["8", "no hashes, though a root was asked for", changed("no-hashes.eigen", (b) => b), { integrity: "own" }],
  unsigned: ["8", "not signed, though keys were given", changed(EVERY, (b) => b), { keys: KEYS }],
  stranger: ["8", "signed by another key", () => packFile({ ...everyKind().pack, signer: STRANGER }), { keys: KEYS }],
  "signature-of-other": [
    "8",
    "the signature of another pack",
    changed(
      EVERY,
      (b) => void signed(VALID["signed-grown.eigen"].bytes.subarray(512 + 96, 512 + 160), SIGNER.publicKey)(b),
    ),
    { keys: KEYS },
  ],
  "signature-of-task": [
    "8",
    "a signature made for a task file",
    changed(EVERY, (b) => void signed(SIGNER.sign("task", root(b)), SIGNER.publicKey)(b)),
    { keys: KEYS },
  ],
  "key-swapped": [
    "8",
    "a stranger's signature beside the right key",
    changed(EVERY, (b) => void signed(STRANGER.sign("pack", root(b)), SIGNER.publicKey)(b)),
    { keys: KEYS },
  ],
};

/** A byte of padding between the header and the first tensor. */
function padded(blob) {
  const h = new DataView(blob.buffer).getUint32(4, true);
  if ((8 + h) % 4 === 0) throw new Error("there is no padding here");
  blob[8 + h] = 1;
}

/** Another first byte of a section, with its CRC but without its hash: the root stays the one of the table. */
function exchanged(bytes, view, index) {
  const [offset, length] = [get(view, section(index) + 8), get(view, section(index) + 16)];
  const n = view.getUint32(1536, true);
  const at = 1536 + get(view, 1024 + 24) - 32 * (n - index);
  const hash = bytes.slice(at, at + 32);
  bytes[offset + length - 1] ^= 1;
  repair(bytes);
  bytes.set(hash, at);
  const directory = bytes.subarray(1536, 1536 + get(view, 1024 + 24));
  view.setUint32(1024 + 48, crc32c(directory), true);
  view.setUint32(1024 + 60, crc32c(bytes.subarray(1024, 1084)), true);
}

const ascii = (text) => [...new TextEncoder().encode(text)];

/** The basis description with other bytes. */
function described(change) {
  return edited(({ basis }) => ({ basis: new Raw(...change([...msgpack(basis)])) }));
}

function flagged(bytes, view) {
  view.setUint32(1024 + 52, 2, true);
  view.setUint32(1024 + 60, crc32c(bytes.subarray(1024, 1024 + 60)), true);
  view.setUint32(1024 + 160, crc32c(bytes.subarray(1024, 1024 + 160)), true);
}

function generation0(bytes, view) {
  bytes.copyWithin(512, 1024, 1536);
  bytes.fill(0, 1024, 1536);
  u64(view, 512, 0);
  view.setUint32(512 + 60, crc32c(bytes.subarray(512, 512 + 60)), true);
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

/** The task file with something else in it, before it is put together or after. */
const file = (edit) => () => taskFileOf(undefined, (task) => ({ ...task, ...edit(task) })).bytes;
const fileBytes =
  (name, change, { raw = false } = {}) =>
  () => {
    const bytes = VALID[name].bytes.slice();
    const after = change(bytes, new DataView(bytes.buffer)) ?? bytes;
    return raw ? after : repairTaskFile(after);
  };
const WHOLE = "whole.eigentask";
const SIGNED = "signed.eigentask";

/** They belong to every-kind.eigen. */
export const TASK_FILES = {
  "task-magic": ["7", "another magic", fileBytes(WHOLE, (b) => void (b[1] = 0))],
  "task-major": ["7", "major version 2", fileBytes(WHOLE, (_, v) => v.setUint16(8, 2, true))],
  "task-crc": ["7", "the CRC of the head", fileBytes(WHOLE, (b) => void (b[60] ^= 1), { raw: true })],
  "task-entry-crc": ["7", "the CRC of the entry", fileBytes(WHOLE, (b) => void (b[70] ^= 1), { raw: true })],
  "task-blob-crc": ["7", "the CRC of the blob", fileBytes(WHOLE, (b) => void (b[b.length - 9] ^= 1), { raw: true })],
  "task-short": ["7", "63 bytes", fileBytes(WHOLE, (b) => b.slice(0, 63), { raw: true })],
  "task-truncated": ["7", "a byte less", fileBytes(WHOLE, (b) => b.slice(0, -1), { raw: true })],
  "task-longer": ["7", "a byte more", fileBytes(WHOLE, (b) => new Uint8Array([...b, 0]), { raw: true })],
  "task-padding": [
    "7",
    "padding behind the entry",
    fileBytes(WHOLE, (b, v) => void (b[64 + v.getUint32(12, true)] = 1)),
  ],
  "task-other-basis": ["7", "another basis id", fileBytes(WHOLE, (b) => void (b[16] ^= 1))],
  "task-index": ["7", "`brings` gives an index", file(({ entry }) => ({ entry: { ...entry, brings: 0 } }))],
  "task-id": ["4.3", "an id with a line feed", file(({ entry }) => ({ entry: { ...entry, id: "a\nb" } }))],
  "task-brings": [
    "4.3",
    "`brings` leaves out what the blob brings",
    file(({ entry }) => ({ entry: { ...entry, brings: [] } })),
  ],
  "task-blob": ["6", "an empty blob", file(() => ({ blob: new Uint8Array(0) }))],
  "task-signature-crc": [
    "7",
    "the CRC of the signature",
    fileBytes(SIGNED, (b) => void (b[b.length - 1] ^= 1), { raw: true }),
  ],
  "task-signature-padding": [
    "7",
    "padding before the signature",
    fileBytes(SIGNED, (b, v) => void (b[align(64 + v.getUint32(12, true), 64) + v.getUint32(48, true)] = 1), {
      raw: true,
    }),
  ],
  "task-unsigned": ["8", "not signed, though keys were given", fileBytes(WHOLE, (b) => b), { keys: KEYS }],
  "task-stranger": ["8", "signed by another key", () => taskFileOf(STRANGER).bytes, { keys: KEYS }],
  "task-signature": [
    "8",
    "a signature made for a pack",
    () => taskFileOf({ ...SIGNER, sign: (_, hash) => SIGNER.sign("pack", hash) }).bytes,
    { keys: KEYS },
  ],
};
