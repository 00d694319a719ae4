/**
 * The plain-JS backend: the oracle of the tests, and what runs where there is no WebAssembly. Plain loops over typed
 * arrays. Sums are rounded to f32 after every step, in the order of the scalar and SIMD kernels, so that results are
 * theirs to the bit.
 */

import { BackendError } from "../errors.ts";
import {
  bf16ToF32,
  type Dtype,
  decodeTensor,
  type FloatDtype,
  f16ToF32,
  f32ToBf16,
  f32ToF16,
  tensorBytes,
} from "../tensor/dtypes.ts";
import type { Backend, Block, ExpandJob, FoldJob, Owner, ProjectJob, ScaleJob, Slice } from "./backend.ts";
import { checkApart, checkCount, checkExpand, checkFold, checkProject, checkScale, checkSlice } from "./checks.ts";

const { fround } = Math;

interface JsBlock extends Block {
  readonly buffer: ArrayBuffer;
  readonly owner: Owner;
}

/** A backend whose blocks are `ArrayBuffer`s. Operations run when called. */
export function createJsBackend(): Backend {
  const blocks = new Map<Block, JsBlock>();
  // The basis at work, decoded. Kept, so that a switch allocates nothing once the largest was seen.
  let decoded = new Float32Array(0);

  function decode(type: Dtype, basis: Slice, rows: number, width: number): Float32Array {
    const encoded = bytes("basis", basis, tensorBytes(type, rows, width));
    if (decoded.length < rows * width) decoded = new Float32Array(rows * width);
    decodeTensor(type, encoded, rows, width, decoded);
    return decoded;
  }

  function held(name: string, slice: Slice): ArrayBuffer {
    const block = blocks.get(slice.block);
    if (block === undefined) throw new TypeError(`${name}.block is not held by this backend; was it freed?`);
    return block.buffer;
  }

  function bytes(name: string, slice: Slice, byteLength: number): Uint8Array {
    const buffer = held(name, slice);
    checkSlice(name, slice, byteLength);
    return new Uint8Array(buffer, slice.byteOffset, byteLength);
  }

  function floats(name: string, slice: Slice, length: number): Float32Array {
    return new Float32Array(held(name, slice), slice.byteOffset, length);
  }

  function product(job: Omit<FoldJob, "out">): Product {
    const { rank, rows, columns } = job;
    return {
      base: elements(job.dtype, held("base", job.base), job.base.byteOffset, job),
      left: floats("left", job.left, rank * rows),
      right: floats("right", job.right, rank * columns),
      rank,
      rows,
      columns,
      stride: job.stride,
    };
  }

  return {
    name: "js",
    variant: "js",

    allocate(byteLength: number, owner: Owner): Block {
      checkCount("byteLength", byteLength, Number.MAX_SAFE_INTEGER);
      let buffer: ArrayBuffer;
      try {
        buffer = new ArrayBuffer(byteLength);
      } catch (cause) {
        throw new BackendError(`js: no memory for ${byteLength} bytes (${owner})`, { backend: "js", cause });
      }
      const block: JsBlock = { byteLength, buffer, owner };
      blocks.set(block, block);
      return block;
    },

    free(block: Block): void {
      blocks.delete(block);
    },

    upload(to: Slice, source: Uint8Array): void {
      bytes("to", to, source.byteLength).set(source);
    },

    copy(from: Slice, to: Slice, byteLength: number): void {
      const source = bytes("from", from, byteLength);
      const target = bytes("to", to, byteLength);
      checkApart("to", to, byteLength, "from", from, byteLength);
      target.set(source);
    },

    view(at: Slice, byteLength: number): Uint8Array {
      return bytes("at", at, byteLength);
    },

    expand(job: ExpandJob): void {
      checkExpand(job);
      const { rank, rows, width } = job;
      const out = floats("out", job.out, rank * width);
      const coefficients = floats("coefficients", job.coefficients, rank * rows);
      const basis = decode(job.dtype, job.basis, rows, width);
      const before = job.add ? out.slice() : undefined;
      out.fill(0);
      for (let i = 0; i < rank; i++) {
        addProduct(out.subarray(i * width, (i + 1) * width), coefficients, i * rows, 1, basis, rows);
      }
      // Last, so that a small sum is made at its own magnitude.
      before?.forEach((value, i) => (out[i]! += value));
    },

    project(job: ProjectJob): void {
      checkProject(job);
      const { count, rows, width } = job;
      const out = floats("out", job.out, count * rows);
      const x = floats("x", job.x, count * width);
      const basis = decode(job.dtype, job.basis, rows, width);
      for (let i = 0; i < count; i++) {
        for (let k = 0; k < rows; k++) {
          let sum = 0;
          for (let j = 0; j < width; j++) sum += x[i * width + j]! * basis[k * width + j]!;
          out[i * rows + k] = sum;
        }
      }
    },

    fold(job: FoldJob): void {
      checkFold(job);
      const { rows, columns, stride, rowScale, columnScale } = job;
      const from = product(job);
      const out = elements(job.dtype, held("out", job.out), job.out.byteOffset, job);
      const scaleOfRow = rowScale && floats("rowScale", rowScale, rows);
      const scaleOfColumn = columnScale && floats("columnScale", columnScale, columns);
      if (job.rank === 0 && !scaleOfRow && !scaleOfColumn) {
        const source = from.base.raw;
        for (let at = 0; at < rows * stride; at += stride) out.raw.set(source.subarray(at, at + columns), at);
        return;
      }
      forEachRow(from, (row, i) => {
        if (scaleOfRow) for (let j = 0; j < columns; j++) row[j]! *= scaleOfRow[i]!;
        if (scaleOfColumn) for (let j = 0; j < columns; j++) row[j]! *= scaleOfColumn[j]!;
        out.write(i * stride, row);
      });
    },

    scale(job: ScaleJob): void {
      checkScale(job);
      const { rows, columns } = job;
      const byRow = job.axis === "rows";
      const length = byRow ? rows : columns;
      const magnitude = floats("magnitude", job.magnitude, length);
      const out = floats("out", job.out, length);
      const sums = new Float64Array(length);
      forEachRow(product(job), (row, i) => {
        for (let j = 0; j < columns; j++) sums[byRow ? i : j]! += row[j]! * row[j]!;
      });
      for (let i = 0; i < length; i++) out[i] = sums[i] === 0 ? 0 : magnitude[i]! / Math.sqrt(sums[i]!);
    },

    finish(): void {},

    memory(): Record<Owner, number> & { reserved: number } {
      const total = { basis: 0, coefficients: 0, pristine: 0, active: 0, scratch: 0, reserved: decoded.byteLength };
      for (const { owner, byteLength } of blocks.values()) total[owner] += byteLength;
      return total;
    },

    close(): void {
      blocks.clear();
      decoded = new Float32Array(0);
    },
  };
}

/** The elements of a weight, as numbers and as they lie in memory. */
interface Elements {
  readonly raw: Float32Array | Uint16Array;
  read(at: number, row: Float32Array): void;
  write(at: number, row: Float32Array): void;
}

/** base + leftᵀ·right, still to be computed. */
interface Product {
  base: Elements;
  left: Float32Array;
  right: Float32Array;
  rank: number;
  rows: number;
  columns: number;
  stride: number;
}

function elements(
  type: FloatDtype,
  buffer: ArrayBuffer,
  byteOffset: number,
  { rows, columns, stride }: { rows: number; columns: number; stride: number },
): Elements {
  const length = rows === 0 ? 0 : (rows - 1) * stride + columns;
  if (type === "f32") {
    const raw = new Float32Array(buffer, byteOffset, length);
    return {
      raw,
      read: (at, row) => row.set(raw.subarray(at, at + row.length)),
      write: (at, row) => raw.set(row, at),
    };
  }
  const raw = new Uint16Array(buffer, byteOffset, length);
  const decode = type === "f16" ? f16ToF32 : bf16ToF32;
  const encode = type === "f16" ? f32ToF16 : f32ToBf16;
  return {
    raw,
    read(at, row) {
      for (let j = 0; j < row.length; j++) row[j] = decode(raw[at + j]!);
    },
    write(at, row) {
      for (let j = 0; j < row.length; j++) raw[at + j] = encode(row[j]!);
    },
  };
}

/** Calls `use` with each row of base + leftᵀ·right in f32. The array is the same each time. */
function forEachRow(product: Product, use: (row: Float32Array, i: number) => void): void {
  const { base, left, right, rank, rows, columns, stride } = product;
  const row = new Float32Array(columns);
  const update = new Float32Array(columns);
  for (let i = 0; i < rows; i++) {
    base.read(i * stride, row);
    update.fill(0);
    addProduct(update, left, i, rows, right, rank);
    for (let j = 0; j < columns; j++) row[j]! += update[j]!;
    use(row, i);
  }
}

/** out[j] += Σ_k left[start + k·step]·right[k, j], four columns at a time so that their sums stay in registers. */
function addProduct(
  out: Float32Array,
  left: Float32Array,
  start: number,
  step: number,
  right: Float32Array,
  rank: number,
): void {
  const width = out.length;
  let j = 0;
  for (; j + 4 <= width; j += 4) {
    let a = out[j]!;
    let b = out[j + 1]!;
    let c = out[j + 2]!;
    let d = out[j + 3]!;
    for (let k = 0, l = start, r = j; k < rank; k++, l += step, r += width) {
      const x = left[l]!;
      a = fround(a + fround(x * right[r]!));
      b = fround(b + fround(x * right[r + 1]!));
      c = fround(c + fround(x * right[r + 2]!));
      d = fround(d + fround(x * right[r + 3]!));
    }
    out[j] = a;
    out[j + 1] = b;
    out[j + 2] = c;
    out[j + 3] = d;
  }
  for (; j < width; j++) {
    let sum = out[j]!;
    for (let k = 0; k < rank; k++) sum = fround(sum + fround(left[start + k * step]! * right[k * width + j]!));
    out[j] = sum;
  }
}
