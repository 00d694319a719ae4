/**
 * The operations of a backend on linear memory: expand, project, fold and scale as `src/backends/backend.ts` defines
 * them. Loops over pointers: no objects, no checks; the caller has checked every range.
 */
import { decode, encode, packedBytes, rowBytes, scaleBytes } from "./convert";
import { accumulate, bytes, multiply, spread, total, zero } from "./lanes";
import { F16, F32, PANEL, PANEL_VALUES, SUMS } from "./layout";
import { multiplyAdd, multiplyAddHalves } from "./multiply";

/** Columns of the basis that are decoded at a time at least: whole bytes in every type, whole tiles in every build. */
@inline const BASIS_COLUMNS: i32 = 32;

/** Rows of the basis that are decoded at a time. */
@inline const BASIS_ROWS: i32 = PANEL_VALUES / BASIS_COLUMNS;

/** Rows and columns of a weight that are decoded at a time where it is not updated in place. */
@inline const ROWS: i32 = 16;
@inline const COLUMNS: i32 = 256;

/**
 * Bytes from row to row of a panel of weights: no power of two, since a cache holds few lines that are so far apart.
 */
@inline const PANEL_STRIDE: usize = 4 * COLUMNS + 64;

/** Decodes basis[k.., j..] into the panel: [part, columns] f32, `step` apart. */
function decodePanel(
  type: i32, basis: usize, rows: i32, width: i32, k: i32, j: i32, part: i32, columns: i32, step: i32,
): void {
  const stride = rowBytes(type, width);
  let from = basis + scaleBytes(type, rows) + <usize>k * stride + packedBytes(type, j);
  let to = PANEL;
  for (let row = k; row < k + part; row++) {
    decode(type, from, basis + 2 * <usize>row, to, columns);
    from += stride;
    to += <usize>step << 2;
  }
}

/**
 * out[i, j] = Σ_k coefficients[i, k]·basis[k, j], i < rank, k < rows, from ≤ j < to, or that much more with `add`.
 * `from` is a multiple of 32. The basis is decoded once, in panels; bases of more than 256 rows are summed in parts of
 * 256.
 */
export function expand(
  type: i32, out: usize, coefficients: usize, basis: usize, rank: i32, rows: i32, width: i32, add: bool, from: i32,
  to: i32,
): void {
  for (let i = 0; !add && i < rank; i++)
    memory.fill(out + (<usize>i * <usize>width + <usize>from << 2), 0, <usize>(to - from) << 2);
  // An odd number of cache lines, where there is room.
  const step = max(BASIS_COLUMNS, (PANEL_VALUES / max(rows, 1) & -BASIS_COLUMNS) - 16), wide = step & -BASIS_COLUMNS;
  for (let j = from; j < to; j += wide) {
    const columns = min(wide, to - j);
    const at = out + (<usize>j << 2);
    for (let k = 0; k < rows; k += BASIS_ROWS) {
      const part = min(BASIS_ROWS, rows - k);
      decodePanel(type, basis, rows, width, k, j, part, columns, step);
      multiplyAdd(
        at, at, <usize>width << 2, coefficients + (<usize>k << 2), <usize>rows << 2, 4, PANEL, <usize>step << 2, part,
        rank, columns,
      );
    }
  }
}

/** Σ of `count` products of f32, as far as they fill whole V from `from` on. */
@inline
function dot<V>(x: usize, y: usize, from: i32, count: i32): f32 {
  const step = <i32>(bytes<V>() / 4);
  let sum = zero<V>();
  for (let j = from; j + step <= count; j += step) {
    const at = <usize>j << 2;
    sum = accumulate<V>(sum, load<V>(x + at), load<V>(y + at));
  }
  return total<V>(sum);
}

/** out[i, k] = Σ_j x[i, j]·basis[k, j], i < count, k < rows, j < width, all f32. */
export function project(out: usize, x: usize, basis: usize, count: i32, rows: i32, width: i32): void {
  const whole = ASC_FEATURE_SIMD ? width & ~3 : 0;
  const step = <usize>width << 2;
  for (let i = 0; i < count; i++, x += step) {
    let row = basis;
    for (let k = 0; k < rows; k++, row += step, out += 4) {
      let sum = dot<f32>(x, row, whole, width);
      if (ASC_FEATURE_SIMD) sum += dot<v128>(x, row, 0, whole);
      store<f32>(out, sum);
    }
  }
}

/** Decodes base[i.., j..] into the panel and adds the product there: [rows, columns] f32, PANEL_STRIDE apart. */
function updatePanel(
  type: i32, base: usize, stride: usize, left: usize, leftStep: usize, right: usize, rightStep: usize, rank: i32,
  rows: i32, columns: i32,
): void {
  let to = PANEL;
  for (let i = 0; i < rows; i++) {
    decode(type, base, 0, to, columns);
    base += stride;
    to += PANEL_STRIDE;
  }
  multiplyAdd(PANEL, PANEL, PANEL_STRIDE, left, 4, leftStep, right, rightStep, rank, rows, columns);
}

/** values[j] = values[j]·row·columns[j]; a null pointer stands for ones. */
function scaleRow<V>(values: usize, row: usize, columns: usize, from: i32, count: i32): i32 {
  const step = <i32>(bytes<V>() / 4);
  let j = from;
  for (; j + step <= count; j += step) {
    const at = <usize>j << 2;
    let value = load<V>(values + at);
    if (row) value = multiply<V>(value, spread<V>(row));
    if (columns) value = multiply<V>(value, load<V>(columns + at));
    store<V>(values + at, value);
  }
  return j;
}

/** Folds in panels, for weights that are not updated in place. */
function foldPanels(
  type: i32, out: usize, base: usize, step: usize, rows: i32, columns: i32, left: usize, leftStep: usize, right: usize,
  rightStep: usize, rank: i32, rowScale: usize, columnScale: usize,
): void {
  for (let i = 0; i < rows; i += ROWS) {
    const m = min(ROWS, rows - i);
    for (let j = 0; j < columns; j += COLUMNS) {
      const n = min(COLUMNS, columns - j);
      const at = <usize>i * step + packedBytes(type, j);
      updatePanel(
        type, base + at, step, left + (<usize>i << 2), leftStep, right + (<usize>j << 2), rightStep, rank, m, n,
      );
      for (let row = 0; row < m; row++) {
        const values = PANEL + <usize>row * PANEL_STRIDE;
        if (rowScale || columnScale) {
          const r = rowScale ? rowScale + (<usize>(i + row) << 2) : 0;
          const c = columnScale ? columnScale + (<usize>j << 2) : 0;
          const done = ASC_FEATURE_SIMD ? scaleRow<v128>(values, r, c, 0, n) : 0;
          scaleRow<f32>(values, r, c, done, n);
        }
        encode(type, values, out + at + <usize>row * step, n);
      }
    }
  }
}

/**
 * out[i, j] = (base[i, j] + Σ_k left[k, i]·right[k, j])·rowScale[i]·columnScale[j], rounded to `type` once. Strides in
 * elements. Null scales stand for ones; with rank 0 and no scales bytes are copied as they are.
 */
export function fold(
  type: i32, out: usize, base: usize, stride: i32, rows: i32, columns: i32, left: usize, right: usize, rank: i32,
  rowScale: usize, columnScale: usize, leftStride: i32, rightStride: i32,
): void {
  const step = packedBytes(type, stride);
  const leftStep = <usize>leftStride << 2, rightStep = <usize>rightStride << 2;
  if (!rowScale && !columnScale) {
    if (rank == 0) {
      if (out == base) return;
      const length = packedBytes(type, columns);
      if (step == length) memory.copy(out, base, length * <usize>rows);
      else for (let i = 0; i < rows; i++, out += step, base += step) memory.copy(out, base, length);
      return;
    }
    if (type == F32) {
      return multiplyAdd(out, base, step, left, 4, leftStep, right, rightStep, rank, rows, columns);
    }
    if (ASC_FEATURE_SIMD && type == F16) {
      const done = multiplyAddHalves(out, base, step, left, leftStep, right, rightStep, rank, rows, columns);
      const at = <usize>done << 1;
      out += at;
      base += at;
      right += 2 * at;
      columns -= done;
    }
  }
  foldPanels(
    type, out, base, step, rows, columns, left, leftStep, right, rightStep, rank, rowScale, columnScale,
  );
}

/** out[i] = magnitude[i] / √sums[i]; 0 where the sum is 0, NaN where the quotient becomes no normal f32. */
function finishScale(out: usize, magnitude: usize, count: i32): void {
  for (let i = 0; i < count; i++) {
    const at = <usize>i << 2;
    const sum = load<f64>(SUMS + 2 * at);
    const exact = sum == 0 ? 0 : <f64>load<f32>(magnitude + at) / Math.sqrt(sum), scale = <f32>exact;
    // Neither the least exponent, of 0 and subnormals, nor the greatest, of infinity and NaN.
    const isNormal = (reinterpret<u32>(scale) + 0x800000 & 0x7f000000) != 0;
    store<f32>(out + at, exact == 0 || isNormal ? scale : NaN);
  }
}

/** The sum of squares of `count` f32. Four sums, so that additions need not wait for one another. */
function squares(values: usize, count: i32): f64 {
  let a: f64 = 0, b: f64 = 0, c: f64 = 0, d: f64 = 0, j = 0;
  for (; j + 4 <= count; j += 4, values += 16) {
    const w = <f64>load<f32>(values), x = <f64>load<f32>(values, 4);
    const y = <f64>load<f32>(values, 8), z = <f64>load<f32>(values, 12);
    a += w * w;
    b += x * x;
    c += y * y;
    d += z * z;
  }
  for (; j < count; j++, values += 4) a += <f64>load<f32>(values) * <f64>load<f32>(values);
  return a + b + (c + d);
}

/** out[i] = magnitude[i] / ‖(base + leftᵀ·right)[i, :]‖. */
export function scaleRows(
  type: i32, out: usize, magnitude: usize, base: usize, stride: i32, rows: i32, columns: i32, left: usize, right: usize,
  rank: i32, leftStride: i32, rightStride: i32,
): void {
  const step = packedBytes(type, stride);
  const leftStep = <usize>leftStride << 2, rightStep = <usize>rightStride << 2;
  for (let i = 0; i < rows; i += ROWS) {
    const m = min(ROWS, rows - i), at = <usize>i << 2;
    memory.fill(SUMS, 0, 8 * ROWS);
    for (let j = 0; j < columns; j += COLUMNS) {
      const n = min(COLUMNS, columns - j);
      updatePanel(
        type, base + <usize>i * step + packedBytes(type, j), step, left + at, leftStep, right + (<usize>j << 2),
        rightStep, rank, m, n,
      );
      for (let row = 0; row < m; row++) {
        const sum = SUMS + <usize>(row * 8);
        store<f64>(sum, load<f64>(sum) + squares(PANEL + <usize>row * PANEL_STRIDE, n));
      }
    }
    finishScale(out + at, magnitude + at, m);
  }
}

/** out[j] = magnitude[j] / ‖(base + leftᵀ·right)[:, j]‖. */
export function scaleColumns(
  type: i32, out: usize, magnitude: usize, base: usize, stride: i32, rows: i32, columns: i32, left: usize, right: usize,
  rank: i32, leftStride: i32, rightStride: i32,
): void {
  const step = packedBytes(type, stride);
  const leftStep = <usize>leftStride << 2, rightStep = <usize>rightStride << 2;
  for (let j = 0; j < columns; j += COLUMNS) {
    const n = min(COLUMNS, columns - j), at = <usize>j << 2;
    memory.fill(SUMS, 0, 8 * COLUMNS);
    for (let i = 0; i < rows; i += ROWS) {
      const m = min(ROWS, rows - i);
      updatePanel(
        type, base + <usize>i * step + packedBytes(type, j), step, left + (<usize>i << 2), leftStep, right + at,
        rightStep, rank, m, n,
      );
      for (let row = 0; row < m; row++) {
        let value = PANEL + <usize>row * PANEL_STRIDE, sum = SUMS;
        for (let column = 0; column < n; column++, value += 4, sum += 8) {
          const x = <f64>load<f32>(value);
          store<f64>(sum, load<f64>(sum) + x * x);
        }
      }
    }
    finishScale(out + at, magnitude + at, n);
  }
}
