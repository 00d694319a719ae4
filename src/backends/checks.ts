/**
 * The argument checks of every backend. A job that passes reads and writes inside its blocks only; what it computes is
 * the backend's business. Sizes are checked as doubles: a product too large to be exact is too large for any block.
 */
import { DTYPES, type Dtype, type FloatDtype, rowBytes, tensorBytes } from "../tensor/dtypes.ts";
import type { ExpandJob, FoldJob, ProjectJob, ScaleJob, Slice } from "./backend.ts";

/** Counts are 32-bit in the kernels. */
const MAX_COUNT = 0x7fffffff;

const FLOAT_TYPES: readonly Dtype[] = ["f32", "f16", "bf16"];

/** @throws RangeError unless `value` is a whole number from 0 to `max` */
export function checkCount(name: string, value: number, max: number = MAX_COUNT): void {
  if (!Number.isInteger(value) || value < 0 || value > max) {
    throw new RangeError(`${name} must be a whole number from 0 to ${max}, got ${value}`);
  }
}

/** @throws RangeError unless `byteLength` bytes from the slice lie in its block, at a multiple of `align` */
export function checkSlice(name: string, slice: Slice, byteLength: number, align = 1): void {
  const { byteOffset } = slice;
  if (!Number.isInteger(byteOffset) || byteOffset < 0 || byteOffset % align !== 0) {
    throw new RangeError(`${name}.byteOffset must be a multiple of ${align} ≥ 0, got ${byteOffset}`);
  }
  if (!(byteLength >= 0) || byteOffset + byteLength > slice.block.byteLength) {
    throw new RangeError(
      `${name} needs ${byteLength} bytes from offset ${byteOffset}; its block has ${slice.block.byteLength}`,
    );
  }
}

/** Bytes that a job reads or writes. */
type Range = readonly [name: string, slice: Slice | undefined, byteLength: number, align?: number];

/** @throws RangeError naming the count or slice at fault; TypeError for an unknown type */
export function checkExpand({ dtype, rank, rows, width, out, coefficients, basis }: ExpandJob): void {
  checkJob(dtype, DTYPES, { rank, rows, width }, out, 4 * rank * width, 4, [
    ["coefficients", coefficients, 4 * rank * rows],
    ["basis", basis, tensorBytes(dtype, rows, width)],
  ]);
}

/** @throws RangeError naming the count or slice at fault; TypeError for an unknown type */
export function checkProject({ dtype, count, rows, width, out, x, basis }: ProjectJob): void {
  checkJob(dtype, DTYPES, { count, rows, width }, out, 4 * count * rows, 4, [
    ["x", x, 4 * count * width],
    ["basis", basis, tensorBytes(dtype, rows, width)],
  ]);
}

/** @throws RangeError naming the count or slice at fault; TypeError for an unknown type */
export function checkFold(job: FoldJob): void {
  const { dtype, rows, columns, stride, out, base, rowScale, columnScale } = job;
  const bytes = weightBytes(dtype, rows, columns, stride);
  const scales: Range[] = [
    ["rowScale", rowScale, 4 * rows],
    ["columnScale", columnScale, 4 * columns],
  ];
  const inPlace = out.byteOffset === base.byteOffset;
  checkProduct(job, out, bytes, rowBytes(dtype, 1), scales, inPlace);
}

/** @throws RangeError naming the count or slice at fault; TypeError for an unknown type */
export function checkScale(job: ScaleJob): void {
  const bytes = 4 * (job.axis === "rows" ? job.rows : job.columns);
  checkProduct(job, job.out, bytes, 4, [["magnitude", job.magnitude, bytes]]);
}

/** What fold and scale share. @param inPlace whether the base is where the result goes */
function checkProduct(
  { dtype, rank, rows, columns, stride, base, left, right }: Omit<FoldJob, "out">,
  out: Slice,
  outBytes: number,
  outAlign: number,
  others: readonly Range[],
  inPlace = false,
): void {
  const inputs: Range[] = [
    ["base", base, weightBytes(dtype, rows, columns, stride), rowBytes(dtype, 1)],
    ["left", left, 4 * rank * rows],
    ["right", right, 4 * rank * columns],
    ...others,
  ];
  checkJob(dtype, FLOAT_TYPES, { rank, rows, columns, stride }, out, outBytes, outAlign, inputs, inPlace);
  if (stride < columns) throw new RangeError(`stride must be ≥ columns ${columns}, got ${stride}`);
}

/** From the first to the last element of a weight, rows' gaps included. */
function weightBytes(dtype: FloatDtype, rows: number, columns: number, stride: number): number {
  return rows === 0 ? 0 : ((rows - 1) * stride + columns) * rowBytes(dtype, 1);
}

function checkJob(
  dtype: Dtype,
  allowed: readonly Dtype[],
  counts: Readonly<Record<string, number>>,
  out: Slice,
  outBytes: number,
  outAlign: number,
  inputs: readonly Range[],
  inPlace = false,
): void {
  if (!allowed.includes(dtype)) throw new TypeError(`type must be one of ${allowed.join(", ")}, got ${dtype}`);
  for (const [name, count] of Object.entries(counts)) checkCount(name, count);
  for (const [name, slice, byteLength, align = 4] of inputs) if (slice) checkSlice(name, slice, byteLength, align);
  checkSlice("out", out, outBytes, outAlign);
  for (const [name, slice, byteLength] of inputs) {
    if (slice && !(inPlace && name === "base")) checkApart("out", out, outBytes, name, slice, byteLength);
  }
}

/** @throws RangeError when a result would overwrite what it is computed from */
export function checkApart(
  outName: string,
  out: Slice,
  outBytes: number,
  name: string,
  slice: Slice,
  byteLength: number,
): void {
  if (out.block !== slice.block || outBytes === 0 || byteLength === 0) return;
  if (out.byteOffset < slice.byteOffset + byteLength && slice.byteOffset < out.byteOffset + outBytes) {
    throw new RangeError(`${outName} overlaps ${name}`);
  }
}
