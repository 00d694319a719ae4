/**
 * The plain-JS backend: the oracle of the tests, and what runs where there is no WebAssembly. Plain loops over typed
 * arrays. Sums are rounded to f32 after every step, in the order of the scalar and SIMD kernels, so that results are
 * theirs to the bit.
 */

import { BackendError } from "../errors.ts";
import {
  bf16ToF32,
  decodePart,
  type FloatDtype,
  f16ToF32,
  f32ToBf16,
  f32ToF16,
  rowBytes,
  tensorBytes,
} from "../tensor/dtypes.ts";
import {
  type Backend,
  CpuBackend,
  type ExpandJob,
  type FoldJob,
  type Owner,
  type ProjectJob,
  type ScaleJob,
  type Slice,
  tilesOf,
  type WeightJob,
  weightBytes,
} from "./backend.ts";

const { fround } = Math;

/** Products of a piece of work: some milliseconds. */
const PIECE = 2 ** 19;

/** A backend whose blocks are `ArrayBuffer`s. Operations run when called. */
export function createJsBackend(): Backend {
  return new JsBackend();
}

class JsBackend extends CpuBackend<ArrayBuffer> {
  readonly name = "js";
  readonly variant = "js";
  /** The basis at work, decoded. Kept, so that a switch allocates nothing once the largest was seen. */
  #decoded = new Float32Array(0);

  protected claim(byteLength: number, owner: Owner): ArrayBuffer {
    try {
      return new ArrayBuffer(byteLength);
    } catch (cause) {
      throw new BackendError(`js: no memory for ${byteLength} bytes (${owner})`, { backend: "js", cause });
    }
  }

  protected release(): void {}

  protected bytesAt(place: ArrayBuffer, byteOffset: number, byteLength: number): Uint8Array {
    return new Uint8Array(place, byteOffset, byteLength);
  }

  protected beyond(): number {
    return this.#decoded.byteLength;
  }

  override close(): void {
    super.close();
    this.#decoded = new Float32Array(0);
  }

  #floats(name: string, slice: Slice, length: number): Float32Array {
    return new Float32Array(this.place(name, slice, 4 * length), slice.byteOffset, length);
  }

  #elements(name: "base" | "out", slice: Slice, job: WeightJob): Elements {
    return elements(job.dtype, this.bytes(name, slice, weightBytes(job), rowBytes(job.dtype, 1)));
  }

  *expanding(job: ExpandJob): Generator<void> {
    const { dtype, rank, rows, width, add } = job;
    const out = this.#floats("out", job.out, rank * width);
    const coefficients = this.#floats("coefficients", job.coefficients, rank * rows);
    const encoded = this.bytes("basis", job.basis, tensorBytes(dtype, rows, width), 4);
    if (this.#decoded.length < rows * width) this.#decoded = new Float32Array(rows * width);
    const basis = this.#decoded;
    for (const part of tilesOf(rows, width, 0, PIECE)) {
      decodePart(dtype, encoded, rows, width, part, basis);
      yield;
    }
    const sums = new Float32Array(add ? width : 0);
    for (const [i, m, j, n] of tilesOf(rank, width, rows, PIECE)) {
      for (let row = i; row < i + m; row++) {
        const to = out.subarray(row * width + j, row * width + j + n);
        // What is there is added last, so that a small sum is made at its own magnitude.
        const update = add ? sums.subarray(0, n) : to;
        addProduct(update.fill(0), coefficients, row * rows, 1, basis.subarray(j), width, rows);
        if (add) for (let c = 0; c < n; c++) to[c]! += update[c]!;
      }
      yield;
    }
  }

  project(job: ProjectJob): void {
    const { count, rows, width } = job;
    const out = this.#floats("out", job.out, count * rows);
    const x = this.#floats("x", job.x, count * width);
    const basis = this.#floats("basis", job.basis, rows * width);
    for (let i = 0; i < count; i++) {
      for (let k = 0; k < rows; k++) {
        let sum = 0;
        for (let j = 0; j < width; j++) sum += x[i * width + j]! * basis[k * width + j]!;
        out[i * rows + k] = sum;
      }
    }
  }

  *folding(job: FoldJob): Generator<void> {
    const { rows, columns, stride, rowScale, columnScale } = job;
    const out = this.#elements("out", job.out, job);
    const scaleOfRow = rowScale && this.#floats("rowScale", rowScale, rows);
    const scaleOfColumn = columnScale && this.#floats("columnScale", columnScale, columns);
    if (job.rank === 0 && !scaleOfRow && !scaleOfColumn) {
      const { raw } = this.#elements("base", job.base, job);
      for (let at = 0; at < rows * stride; at += stride) out.raw.set(raw.subarray(at, at + columns), at);
      return;
    }
    yield* this.#product(job, (row, i, j) => {
      if (scaleOfRow) for (let c = 0; c < row.length; c++) row[c]! *= scaleOfRow[i]!;
      if (scaleOfColumn) for (let c = 0; c < row.length; c++) row[c]! *= scaleOfColumn[j + c]!;
      out.write(i * stride + j, row);
    });
  }

  *scaling(job: ScaleJob): Generator<void> {
    const byRow = job.axis === "rows";
    const length = byRow ? job.rows : job.columns;
    const magnitude = this.#floats("magnitude", job.magnitude, length);
    const out = this.#floats("out", job.out, length);
    const sums = new Float64Array(length);
    yield* this.#product(job, (row, i, j) => {
      for (let c = 0; c < row.length; c++) sums[byRow ? i : j + c]! += row[c]! * row[c]!;
    });
    for (let i = 0; i < length; i++) {
      const scale = sums[i] === 0 ? 0 : magnitude[i]! / Math.sqrt(sums[i]!);
      const size = Math.abs(Math.fround(scale));
      out[i] = scale === 0 || (size >= 2 ** -126 && size < Infinity) ? scale : NaN;
    }
  }

  /**
   * Calls `use` with all rows of base + leftᵀ·right in f32, or parts of them from column j on. The array is the same
   * each time.
   */
  *#product(job: WeightJob, use: (row: Float32Array, i: number, j: number) => void): Generator<void> {
    const { rank, rows, columns, stride } = job;
    const base = this.#elements("base", job.base, job);
    const left = this.#floats("left", job.left, rank * rows);
    const right = this.#floats("right", job.right, rank * columns);
    const values = new Float32Array(columns);
    const sums = new Float32Array(columns);
    for (const [first, m, j, n] of tilesOf(rows, columns, rank, PIECE)) {
      const row = values.subarray(0, n);
      const update = sums.subarray(0, n);
      const part = right.subarray(j);
      for (let i = first; i < first + m; i++) {
        base.read(i * stride + j, row);
        update.fill(0);
        addProduct(update, left, i, rows, part, columns, rank);
        for (let c = 0; c < n; c++) row[c]! += update[c]!;
        use(row, i, j);
      }
      yield;
    }
  }
}

/** The elements of a weight, as numbers and as they lie in memory. */
interface Elements {
  readonly raw: Float32Array | Uint16Array;
  read(at: number, row: Float32Array): void;
  write(at: number, row: Float32Array): void;
}

function elements(type: FloatDtype, { buffer, byteOffset, byteLength }: Uint8Array): Elements {
  if (type === "f32") {
    const raw = new Float32Array(buffer, byteOffset, byteLength / 4);
    return {
      raw,
      read: (at, row) => row.set(raw.subarray(at, at + row.length)),
      write: (at, row) => raw.set(row, at),
    };
  }
  const raw = new Uint16Array(buffer, byteOffset, byteLength / 2);
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

/**
 * out[j] += Σ_k left[start + k·step]·right[k·stride + j], four columns at a time so that their sums stay in registers.
 */
function addProduct(
  out: Float32Array,
  left: Float32Array,
  start: number,
  step: number,
  right: Float32Array,
  stride: number,
  rank: number,
): void {
  const width = out.length;
  let j = 0;
  for (; j + 4 <= width; j += 4) {
    let a = out[j]!;
    let b = out[j + 1]!;
    let c = out[j + 2]!;
    let d = out[j + 3]!;
    for (let k = 0, l = start, r = j; k < rank; k++, l += step, r += stride) {
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
    for (let k = 0; k < rank; k++) sum = fround(sum + fround(left[start + k * step]! * right[k * stride + j]!));
    out[j] = sum;
  }
}
