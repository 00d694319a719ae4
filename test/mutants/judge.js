// @ts-nocheck: it reads what no type describes
/**
 * Meaning of a pack in 64 bits, by a reader written from SPEC.md alone without code of the package. It checks nothing, since it reads
 * only files that the package has accepted.
 */
import { halfValue, TYPES } from "../vectors/format.js";
import { readCoded } from "./read-coded.js";

/** "COD3", in front of coded sections. */
const CODE = 0x33444f43;

const BITS = { f32: 32, f16: 16, bf16: 16, int8: 8, int4: 4, int3: 3 };
const up = (n, step) => Math.ceil(n / step) * step;

/** Decodes MessagePack, with maps as `Map`s. */
function messagepack(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  let at = 0;
  const text = (length) => {
    at += length;
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes.subarray(at - length, at));
  };
  const list = (count) => Array.from({ length: count }, read);
  const map = (count) => new Map(Array.from({ length: count }, () => [read(), read()]));
  const take = (size, name) => {
    at += size;
    return Number(view[`get${name}`](at - size));
  };
  function read() {
    const code = bytes[at++];
    if (code < 0x80) return code;
    if (code < 0x90) return map(code - 0x80);
    if (code < 0xa0) return list(code - 0x90);
    if (code < 0xc0) return text(code - 0xa0);
    if (code >= 0xe0) return code - 256;
    const sizes = [1, 2, 4, 8];
    if (code >= 0xcc && code <= 0xcf)
      return take(sizes[code - 0xcc], ["Uint8", "Uint16", "Uint32", "BigUint64"][code - 0xcc]);
    if (code >= 0xd0 && code <= 0xd3)
      return take(sizes[code - 0xd0], ["Int8", "Int16", "Int32", "BigInt64"][code - 0xd0]);
    if (code === 0xca) return take(4, "Float32");
    if (code === 0xcb) return take(8, "Float64");
    if (code >= 0xd9 && code <= 0xdb) return text(take(sizes[code - 0xd9], ["Uint8", "Uint16", "Uint32"][code - 0xd9]));
    if (code === 0xdc || code === 0xdd) return list(take(code === 0xdc ? 2 : 4, code === 0xdc ? "Uint16" : "Uint32"));
    if (code === 0xde || code === 0xdf) return map(take(code === 0xde ? 2 : 4, code === 0xde ? "Uint16" : "Uint32"));
    return code === 0xc0 ? null : code === 0xc3;
  }
  return read();
}

/** Decodes the tensor at `at`. @returns its values and its end */
function tensor(bytes, at, type, rows, width) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const values = new Float64Array(rows * width);
  const bits = BITS[type];
  const stride = Math.ceil((width * bits) / 8);
  const scales = bits < 16 ? up(2 * rows, 4) : 0;
  for (let r = 0; r < rows; r++) {
    for (let i = 0; i < width; i++) {
      const start = at + scales + r * stride;
      if (type === "f32") values[r * width + i] = view.getFloat32(start + 4 * i, true);
      else if (type === "f16") values[r * width + i] = halfValue(view.getUint16(start + 2 * i, true));
      else if (type === "bf16") {
        const word = new DataView(new ArrayBuffer(4));
        word.setUint16(0, view.getUint16(start + 2 * i, true));
        values[r * width + i] = word.getFloat32(0);
      } else {
        let q = 0;
        for (let b = 0; b < bits; b++) {
          const bit = i * bits + b;
          if ((bytes[start + (bit >> 3)] >> (bit & 7)) & 1) q += b === bits - 1 ? -(2 ** b) : 2 ** b;
        }
        values[r * width + i] = q * halfValue(view.getUint16(at + 2 * r, true));
      }
    }
  }
  return { values, end: at + scales + up(rows * stride, 4) };
}

/**
 * The tasks of a pack by id: terms by module with ΔW and its bound, magnitudes, and parameters.
 * @returns `{ modules, description, coded, tasks: Map<id, { terms: Map<name, { out, in, sides, delta, bound, magnitude }>, parameters }> }`
 */
export function judge(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const u64 = (at) => Number(view.getBigUint64(at, true));
  const superblock = [512, 1024].filter((at) => wholeAt(bytes, view, at)).sort((a, b) => u64(b) - u64(a))[0];
  const [from, length] = [u64(superblock + 16), u64(superblock + 24)];
  const { sections, description, list } = readDirectory(bytes.subarray(from, from + length), from);
  const content = ({ kind, offset, length }) => {
    const stored = bytes.subarray(offset, offset + length);
    return kind === 4 || kind === 5 ? readCoded(stored, description) : stored;
  };
  const bases = content(sections.find(({ kind }) => kind === 1 || kind === 4));
  const modules = readBases(messagepack(description), bases);
  const blobs = sections.filter(({ kind }) => kind === 2 || kind === 5);
  const entries = messagepack(list);
  const tasks = new Map(entries.map((entry, i) => [entry.get("id"), readTask(content(blobs[i]), modules)]));
  return { modules, description, tasks, coded: sections.some(({ kind }) => kind === 4 || kind === 5) };
}

/** Sections, basis description and task list. In a coded directory, sections lie one behind the other around it, at multiples of 64. */
function readDirectory(stored, from) {
  const isCoded = new DataView(stored.buffer, stored.byteOffset).getUint32(0, true) === CODE;
  const bytes = isCoded ? readCoded(stored) : stored;
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const u64 = (at) => Number(view.getBigUint64(at, true));
  const [n, d, t] = [0, 4, 8].map((at) => view.getUint32(at, true));
  let end = 1536;
  const place = () => (up(end, 64) === from ? up(from + stored.length, 64) : up(end, 64));
  const sections = Array.from({ length: n }, (_, i) => {
    const at = 16 + 32 * i;
    const [offset, length] = [isCoded ? place() : u64(at + 8), u64(at + 16)];
    end = offset + length;
    return { kind: view.getUint32(at, true), offset, length };
  });
  const start = 16 + 32 * n;
  return { sections, description: bytes.slice(start, start + d), list: bytes.subarray(start + d, start + d + t) };
}

/** Reads the task of a task file. @param pack that it belongs to, as `judge` gives it */
export function judgeTaskFile(bytes, { modules, description }) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const start = up(64 + view.getUint32(12, true), 64);
  const blob = bytes.subarray(start, start + view.getUint32(48, true));
  return readTask(view.getUint32(start, true) === CODE ? readCoded(blob, description) : blob, modules);
}

/** Which superblocks count (SPEC.md, section 2). */
function wholeAt(bytes, view, at) {
  const generation = Number(view.getBigUint64(at, true));
  if (generation === 0 || generation % 2 !== at / 512 - 1) return false;
  if (crc(bytes.subarray(at, at + 60)) !== view.getUint32(at + 60, true)) return false;
  if (view.getUint32(at + 52, true) === 0) return bytes.subarray(at + 64, at + 164).every((byte) => byte === 0);
  return crc(bytes.subarray(at, at + 160)) === view.getUint32(at + 160, true);
}

function crc(bytes) {
  let c = 0xffffffff;
  for (const byte of bytes) {
    c ^= byte;
    for (let k = 0; k < 8; k++) c = c & 1 ? (c >>> 1) ^ 0x82f63b78 : c >>> 1;
  }
  return (c ^ 0xffffffff) >>> 0;
}

function readBases(basis, bytes) {
  let end = 0;
  const side = (map, dimension) => {
    const [kind, K, mean] = [map.get("kind"), map.get("K"), map.get("mean") === true];
    const width = dimension * (kind === 2 ? map.get("rank") : 1);
    const found = tensor(bytes, up(end, 16), TYPES[map.get("type")], K + (mean ? 1 : 0), width);
    end = found.end;
    return { kind, K, dimension, width, values: found.values };
  };
  return basis.get("modules").map((m) => {
    const made = {
      name: m.get("name"),
      out: m.get("out"),
      in: m.get("in"),
      layout: m.get("layout"),
      kernel: m.get("kernel"),
    };
    const sides = (given, dimension) => [given ?? []].flat().map((one) => side(one, dimension));
    made.A = sides(m.get("A"), made.in);
    made.B = sides(m.get("B"), made.out);
    if (m.get("fingerprint") === true) end = up(end, 16) + 256;
    return made;
  });
}

function readTask(bytes, modules) {
  const h = new DataView(bytes.buffer, bytes.byteOffset, bytes.length).getUint32(4, true);
  const [terms, parameters] = messagepack(bytes.subarray(8, 8 + h));
  let end = 8 + h;
  const next = (type, rows, width) => {
    const found = tensor(bytes, up(end, 4), TYPES[type], rows, width);
    end = found.end;
    return found.values;
  };
  const task = { terms: new Map(), parameters: [] };
  for (const [index, rank, givenA, givenB, q, privateType, magnitudeType] of terms) {
    const module = modules[index];
    // A code alone belongs to coefficients over the first basis.
    const sides = [
      [module.A, givenA, module.in],
      [module.B, givenB, module.out],
    ].map(([bases, given, width]) => {
      const [code, which, own] = Array.isArray(given) ? given : [given, 0, null];
      return { code, basis: code === null ? undefined : bases[which], own, width };
    });
    for (const side of sides) {
      const { code, basis } = side;
      if (basis) side.coefficients = next(code >> 3, basis.kind === 2 ? 1 : rank, basis.K);
    }
    for (const side of sides) if (side.own !== null) side.rows = next(side.own, rank, side.width);
    const factors = sides.map(({ basis, code, coefficients, rows, width }) => {
      const zeros = { exact: new Float64Array(rank * width), size: new Float64Array(rank * width) };
      const made = basis ? expand(basis, rank, coefficients, (code & 4) !== 0) : zeros;
      rows?.forEach((value, i) => {
        made.exact[i] += value;
        made.size[i] += Math.abs(value);
      });
      return made;
    });
    const term = {
      out: module.out,
      in: module.in,
      sides,
      delta: new Float64Array(module.out * module.in),
      bound: new Float64Array(module.out * module.in),
    };
    addProduct(term, factors[0], factors[1], rank);
    if (q > 0) {
      const [a, b] = [next(privateType, q, module.in), next(privateType, q, module.out)];
      addProduct(term, { exact: a, size: a.map(Math.abs) }, { exact: b, size: b.map(Math.abs) }, q);
    }
    const share = 2 ** -24 * (sides.reduce((sum, { basis }) => sum + (basis?.K ?? 0), 0) + rank + q + 16);
    term.bound = term.bound.map((size) => size * share);
    if (magnitudeType !== null) term.magnitude = next(magnitudeType, 1, module.out);
    task.terms.set(module.name, term);
  }
  for (const [name, role, type, shape, indices] of parameters) {
    const [rows, width] = shape.length === 1 ? [1, shape[0]] : [shape[0], shape.slice(1).reduce((a, b) => a * b, 1)];
    task.parameters.push({ name, role, shape, indices, values: next(type, rows, width) });
  }
  return task;
}

function expand({ kind, K, dimension, width, values }, rank, coefficients, mean) {
  const [exact, size] = [new Float64Array(rank * dimension), new Float64Array(rank * dimension)];
  for (let r = 0; r < (kind === 2 ? 1 : rank); r++) {
    for (let i = 0; i < width; i++) {
      for (let k = 0; k < K; k++) {
        const product = coefficients[r * K + k] * values[k * width + i];
        exact[r * width + i] += product;
        size[r * width + i] += Math.abs(product);
      }
      if (!mean) continue;
      exact[r * width + i] += values[K * width + i];
      size[r * width + i] += Math.abs(values[K * width + i]);
    }
  }
  return { exact, size };
}

function addProduct(term, A, B, rank) {
  for (let k = 0; k < rank; k++) {
    for (let o = 0; o < term.out; o++) {
      for (let i = 0; i < term.in; i++) {
        term.delta[o * term.in + i] += B.exact[k * term.out + o] * A.exact[k * term.in + i];
        term.bound[o * term.in + i] += B.size[k * term.out + o] * A.size[k * term.in + i];
      }
    }
  }
}
