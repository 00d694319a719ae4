// @ts-nocheck: it writes what no type allows
/**
 * Writes packs for the vectors and the mutants, from SPEC.md alone, without code of the package. It writes what it is
 * told, valid or not; numbers are packed bit by bit, the CRC is computed bit by bit.
 */
import { createHash, createPrivateKey, createPublicKey, sign } from "node:crypto";
import { coded } from "./coded.js";

export const TYPES = ["f32", "f16", "bf16", "int8", "int4", "int3"];
const BITS = { int8: 8, int4: 4, int3: 3 };

export const align = (n, a) => Math.ceil(n / a) * a;

const crcTable = Uint32Array.from({ length: 256 }, (_, i) => {
  let c = i;
  for (let bit = 0; bit < 8; bit++) c = c & 1 ? (c >>> 1) ^ 0x82f63b78 : c >>> 1;
  return c >>> 0;
});

export function crc32c(bytes) {
  let c = 0xffffffff;
  for (const byte of bytes) c = crcTable[(c ^ byte) & 255] ^ (c >>> 8);
  return (c ^ 0xffffffff) >>> 0;
}

export const sha256 = (...parts) => {
  const hash = createHash("sha256");
  for (const part of parts) hash.update(part);
  return new Uint8Array(hash.digest());
};

/** MessagePack bytes as they are, which no encoder would write. */
export class Raw {
  constructor(...bytes) {
    this.bytes = bytes;
  }
}

/** A number as float 64. */
export class Float {
  constructor(value) {
    this.value = value;
  }
}

function integer(v) {
  if (v >= 0 && v < 128) return [v];
  if (v < 0 && v >= -32) return [256 + v];
  const view = new DataView(new ArrayBuffer(9));
  const cut = (code, size) => [code, ...new Uint8Array(view.buffer, 0, size)];
  if (v >= 0 && v < 2 ** 8) return [0xcc, v];
  if (v >= 0 && v < 2 ** 16) return (view.setUint16(0, v), cut(0xcd, 2));
  if (v >= 0 && v < 2 ** 32) return (view.setUint32(0, v), cut(0xce, 4));
  if (v >= 0) return (view.setBigUint64(0, BigInt(v)), cut(0xcf, 8));
  return (view.setInt32(0, v), cut(0xd2, 4));
}

/** MessagePack of numbers, strings, booleans, null, arrays, and maps as objects or lists of pairs in a `Map`. */
export function msgpack(value) {
  const out = [];
  const head = (count, fix, small, code) => {
    if (count <= small) out.push(fix + count);
    else if (count < 65536) out.push(code, count >> 8, count & 255);
    else out.push(code + 1, count >>> 24, (count >> 16) & 255, (count >> 8) & 255, count & 255);
  };
  const put = (v) => {
    if (v === null || v === undefined) out.push(0xc0);
    else if (typeof v === "boolean") out.push(v ? 0xc3 : 0xc2);
    else if (typeof v === "number" && Number.isInteger(v)) out.push(...integer(v));
    else if (typeof v === "number" || v instanceof Float) {
      const view = new DataView(new ArrayBuffer(8));
      view.setFloat64(0, v instanceof Float ? v.value : v);
      out.push(0xcb, ...new Uint8Array(view.buffer));
    } else if (typeof v === "string") {
      const bytes = new TextEncoder().encode(v);
      if (bytes.length < 32) out.push(0xa0 + bytes.length);
      else if (bytes.length < 256) out.push(0xd9, bytes.length);
      else out.push(0xda, bytes.length >> 8, bytes.length & 255);
      for (const byte of bytes) out.push(byte);
    } else if (v instanceof Raw) {
      for (const byte of v.bytes) out.push(byte);
    } else if (Array.isArray(v)) {
      head(v.length, 0x90, 15, 0xdc);
      for (const item of v) put(item);
    } else {
      const pairs = v instanceof Map ? [...v] : Object.entries(v).filter(([, item]) => item !== undefined);
      head(pairs.length, 0x80, 15, 0xde);
      for (const [key, item] of pairs) {
        put(key);
        put(item);
      }
    }
  };
  put(value);
  return Uint8Array.from(out);
}

const scratch = new DataView(new ArrayBuffer(8));

/** The half nearest to a number, ties to even, found by search. */
function half(x) {
  const [sign, a] = [x < 0 || Object.is(x, -0) ? 0x8000 : 0, Math.abs(x)];
  let low = 0;
  let high = 0x7bff;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (halfValue(middle) <= a) low = middle;
    else high = middle;
  }
  const [below, above] = [a - halfValue(low), halfValue(high) - a];
  return sign | (below < above || (below === above && low % 2 === 0) ? low : high);
}

export function halfValue(h) {
  const [exponent, fraction] = [(h >> 10) & 31, h & 1023];
  const value = exponent === 0 ? fraction * 2 ** -24 : (1024 + fraction) * 2 ** (exponent - 25);
  return h & 0x8000 ? -value : value;
}

const bits = (x) => (scratch.setFloat32(0, x), scratch.getUint32(0));
const fromBits = (u) => (scratch.setUint32(0, u >>> 0), scratch.getFloat32(0));
/** Nearest bfloat16, ties to even. */
const bf16 = (x) => ((bits(x) + 0x7fff + ((bits(x) >>> 16) & 1)) >>> 16) & 0xffff;

/** A tensor [rows, width] as stored, and its decoded values. */
export function tensor(type, rows, width, values) {
  const out = [];
  const found = new Float64Array(rows * width);
  const little = (v, size) => {
    for (let i = 0; i < size; i++) out.push((v >>> (8 * i)) & 255);
  };
  if (!(type in BITS)) {
    for (let i = 0; i < rows * width; i++) {
      if (type === "f32") little(bits(values[i]), 4), (found[i] = Math.fround(values[i]));
      else if (type === "f16") little(half(values[i]), 2), (found[i] = halfValue(half(values[i])));
      else little(bf16(values[i]), 2), (found[i] = fromBits(bf16(values[i]) << 16));
    }
  } else {
    const most = 2 ** (BITS[type] - 1) - 1;
    const row = (r) => Array.from({ length: width }, (_, i) => values[r * width + i]);
    const scales = Array.from({ length: rows }, (_, r) => half(Math.max(...row(r).map(Math.abs), 2 ** -14) / most));
    for (const scale of scales) little(scale, 2);
    while (out.length % 4) out.push(0);
    for (let r = 0; r < rows; r++) {
      const packed = new Uint8Array(Math.ceil((width * BITS[type]) / 8));
      row(r).forEach((value, i) => {
        const q = Math.max(-most, Math.min(most, Math.round(value / halfValue(scales[r]))));
        found[r * width + i] = q * halfValue(scales[r]);
        for (let b = 0; b < BITS[type]; b++) {
          const bit = i * BITS[type] + b;
          if ((q >> b) & 1) packed[bit >> 3] |= 1 << (bit & 7);
        }
      });
      for (const byte of packed) out.push(byte);
    }
  }
  while (out.length % 4) out.push(0);
  return { bytes: Object.assign(Uint8Array.from(out), { of: { type, rows, width } }), values: found };
}

/** Positions of joined tensors, for the coder; parts that are no tensors are skipped. */
function placesOf(parts, step, start = 0) {
  let end = start;
  return parts.flatMap((part) => {
    const at = align(end, step);
    end = at + part.length;
    return part.of ? { at, ...part.of } : [];
  });
}

/** Joins parts, each at the next multiple of `step` from the start. */
export function joined(parts, step, start = 0) {
  let end = start;
  const places = parts.map((part) => {
    const at = align(end, step);
    end = at + part.length;
    return at;
  });
  const bytes = new Uint8Array(end - start);
  parts.forEach((part, i) => bytes.set(part, places[i] - start));
  return bytes;
}

/** Makes a blob of a header value and its tensors. */
export function blobOf({ header, tensors, magic = 0x4b534154 }) {
  const head = msgpack(header);
  const start = new Uint8Array(8 + head.length);
  const view = new DataView(start.buffer);
  view.setUint32(0, magic, true);
  view.setUint32(4, head.length, true);
  start.set(head, 8);
  return joined([start, ...tensors], 4);
}

/** Makes a coded blob. @param basis whose description copies may come from */
export function codedBlob(task, basis, how) {
  const start = 8 + msgpack(task.header).length;
  return coded(blobOf(task), placesOf(task.tensors, 4, start), 4, msgpack(basis), how);
}

const PREFIX = Buffer.from("302e020100300506032b657004220420", "hex");

/** An Ed25519 key pair of 32 equal bytes, which belongs to no one: its public key, and a function that signs a hash. */
export function keyOf(byte) {
  const key = createPrivateKey({
    key: Buffer.concat([PREFIX, Buffer.alloc(32, byte)]),
    format: "der",
    type: "pkcs8",
  });
  return {
    pem: key.export({ format: "pem", type: "pkcs8" }),
    publicKey: new Uint8Array(createPublicKey(key).export({ format: "der", type: "spki" }).subarray(12)),
    sign: (kind, hash) => new Uint8Array(sign(null, Buffer.concat([Buffer.from(`eigenlora ${kind}\n`), hash]), key)),
  };
}

function directoryOf(sections, description, list, hashed) {
  const n = sections.length;
  const bytes = new Uint8Array(16 + n * (hashed ? 64 : 32) + description.length + list.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, n, true);
  view.setUint32(4, description.length, true);
  view.setUint32(8, list.length, true);
  view.setUint32(12, hashed ? 32 * n : 0, true);
  bytes.set(description, 16 + 32 * n);
  bytes.set(list, 16 + 32 * n + description.length);
  sections.forEach(({ kind, required = kind === 3 ? 0 : 1, offset, length, content }, i) => {
    view.setUint32(16 + 32 * i, kind, true);
    view.setUint32(20 + 32 * i, required, true);
    view.setBigUint64(24 + 32 * i, BigInt(offset), true);
    view.setBigUint64(32 + 32 * i, BigInt(length), true);
    if (!content) return;
    view.setUint32(40 + 32 * i, crc32c(content), true);
    if (hashed) bytes.set(sha256(content), bytes.length - 32 * (n - i));
  });
  return bytes;
}

function superblockOf(generation, committed, directory, bases, directoryBytes, signer, head) {
  const bytes = new Uint8Array(512);
  const view = new DataView(bytes.buffer);
  [generation, committed, directory, directoryBytes.length, bases.offset, bases.length].forEach((v, i) =>
    view.setBigUint64(8 * i, BigInt(v), true),
  );
  view.setUint32(48, crc32c(directoryBytes), true);
  view.setUint32(52, signer ? 1 : 0, true);
  view.setUint32(60, crc32c(bytes.subarray(0, 60)), true);
  if (signer) {
    bytes.set(signer.publicKey, 64);
    bytes.set(signer.sign("pack", sha256(head, directoryBytes)), 96);
    view.setUint32(160, crc32c(bytes.subarray(0, 160)), true);
  }
  return bytes;
}

/**
 * A pack file.
 * @param pack `{ basis, tensors, tasks, appended, hashed, signer, minor, extra }`: basis description, bases' tensors as
 *   stored, tasks as `{ entry, header, tensors }`, tasks of a second generation, whether there are hashes, who signs,
 *   sections of other kinds, and what is made of coded sections (undefined: they are not coded), the bases where
 *   another writer has coded them, how the directory is coded, or else what is made of it, and a hole before each blob
 */
export function packFile({
  basis,
  tensors,
  tasks,
  appended = [],
  hashed = true,
  signer,
  minor = 0,
  extra = [],
  code,
  codedBases,
  codeDirectory,
  editDirectory = (directory) => directory,
  gap = 0,
}) {
  const description = msgpack(basis);
  const basesBytes = joined(tensors, 16);
  const head = new Uint8Array(48);
  const headView = new DataView(head.buffer);
  head.set([0x89, 0x45, 0x49, 0x47, 0x45, 0x4e, 0x0d, 0x0a]);
  headView.setUint16(8, 1, true);
  headView.setUint16(10, minor, true);
  headView.setUint32(12, 1536, true);
  head.set(sha256(description, basesBytes), 16);

  const list = msgpack(tasks.map(({ entry }) => entry));
  codedBases ??= code?.(coded(basesBytes, placesOf(tensors, 16), 16, description), "bases");
  const contents = [
    codedBases ? { kind: 4, content: codedBases } : { kind: 1, content: basesBytes },
    ...tasks.map((task) => {
      const content = code?.(codedBlob(task, basis), task.entry.id);
      return content ? { kind: 5, content } : { kind: 2, content: task.blob ?? blobOf(task) };
    }),
    ...extra,
  ];
  const stored = (sections, list) => {
    const placed = codeDirectory ? sections.map((section) => ({ ...section, offset: 0 })) : sections;
    return (codeDirectory ?? editDirectory)(directoryOf(placed, description, list, hashed));
  };
  const nowhere = contents.map((section) => ({ ...section, offset: 0, length: section.content.length }));
  let end = 1536 + stored(nowhere, list).length;
  const place = (section) => {
    const offset = align(end, 64) + (section.kind === 1 ? 0 : gap);
    end = offset + section.content.length;
    return { ...section, offset, length: section.content.length };
  };
  const first = contents.map(place);
  const directory = stored(first, list);
  const parts = [directory, ...first.flatMap(({ content, kind }) => [new Uint8Array(kind === 1 ? 0 : gap), content])];
  const window = new Uint8Array(1536);
  window.set(head);
  new DataView(window.buffer).setUint32(48, crc32c(head), true);
  window.set(superblockOf(1, end, 1536, first[0], directory, signer, head), 1024);
  if (appended.length > 0) {
    const free = { kind: 3, offset: 1536, length: directory.length };
    const more = appended.map((task) => place({ kind: 2, content: blobOf(task) }));
    const all = msgpack([...tasks, ...appended].map(({ entry }) => entry));
    const second = stored([free, ...first, ...more], all);
    const at = align(end, 64);
    end = at + second.length;
    parts.push(...more.map(({ content }) => content), second);
    window.set(superblockOf(2, end, at, first[0], second, signer, head), 512);
  }
  return joined([window, ...parts], 64);
}

/** A task file. @param given `entry`: a value, or its bytes */
export function taskFile({ entry, basisId, blob, signer, minor = 0 }) {
  const map = entry instanceof Uint8Array ? entry : msgpack(entry);
  const start = align(64 + map.length, 64);
  const bytes = new Uint8Array(start + blob.length);
  const view = new DataView(bytes.buffer);
  bytes.set([0x89, 0x45, 0x54, 0x41, 0x53, 0x4b, 0x0d, 0x0a]);
  view.setUint16(8, 1, true);
  view.setUint16(10, minor, true);
  view.setUint32(12, map.length, true);
  bytes.set(basisId, 16);
  view.setUint32(48, blob.length, true);
  view.setUint32(52, crc32c(map), true);
  view.setUint32(56, crc32c(blob), true);
  view.setUint32(60, crc32c(bytes.subarray(0, 60)), true);
  bytes.set(map, 64);
  bytes.set(blob, start);
  if (!signer) return bytes;
  const trailer = new Uint8Array(100);
  trailer.set(signer.publicKey);
  trailer.set(signer.sign("task", sha256(bytes)), 32);
  new DataView(trailer.buffer).setUint32(96, crc32c(trailer.subarray(0, 96)), true);
  return joined([bytes, trailer], 64);
}

/** Repairs checksums, hashes and basis id of a pack after its bytes were changed, as far as its structure allows. */
export function repair(bytes) {
  if (bytes.length < 1536) return bytes;
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const u64 = (at) => view.getUint32(at, true) + 2 ** 32 * view.getUint32(at + 4, true);
  const cut = (offset, length) => bytes.subarray(offset, Math.min(bytes.length, offset + length));
  for (const at of [512, 1024]) {
    if (u64(at) === 0) continue;
    const [offset, length] = [u64(at + 16), u64(at + 24)];
    const directory = cut(offset, length);
    const blockCrc = () => {
      view.setUint32(at + 60, crc32c(bytes.subarray(at, at + 60)), true);
      if (view.getUint32(at + 52, true) === 1) view.setUint32(at + 160, crc32c(bytes.subarray(at, at + 160)), true);
    };
    blockCrc();
    if (directory.length !== length || length < 16) continue;
    const n = view.getUint32(offset, true);
    const hashes = view.getUint32(offset + 12, true);
    const whole = 16 + 32 * n + view.getUint32(offset + 4, true) + view.getUint32(offset + 8, true) + hashes === length;
    for (let i = 0; i < n && 48 + 32 * i <= length; i++) {
      const entry = offset + 16 + 32 * i;
      if (view.getUint32(entry, true) === 3) continue;
      const content = cut(u64(entry + 8), u64(entry + 16));
      view.setUint32(entry + 24, crc32c(content), true);
      if (whole && hashes === 32 * n) bytes.set(sha256(content), offset + length - hashes + 32 * i);
    }
    const described = cut(offset + 16 + 32 * n, view.getUint32(offset + 4, true));
    bytes.set(sha256(described, cut(u64(at + 32), u64(at + 40))), 16);
    view.setUint32(at + 48, crc32c(directory), true);
    blockCrc();
  }
  view.setUint32(48, crc32c(bytes.subarray(0, 48)), true);
  return bytes;
}

/** Repairs a task file. */
export function repairTaskFile(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const e = view.getUint32(12, true);
  const start = align(64 + e, 64);
  view.setUint32(52, crc32c(bytes.subarray(64, 64 + e)), true);
  view.setUint32(56, crc32c(bytes.subarray(start, start + view.getUint32(48, true))), true);
  view.setUint32(60, crc32c(bytes.subarray(0, 60)), true);
  return bytes;
}
