/**
 * The argument checks of every backend. A job that passes reads and writes inside its blocks only; what it computes is
 * the backend's business. Sizes are checked as doubles: a product too large to be exact is too large for any block.
 */
import { DTYPES, type Dtype, rowBytes, tensorBytes } from "../tensor/dtypes.ts";
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

/** @throws RangeError naming the count or slice at fault; TypeError for an unknown type */
export function checkExpand({ dtype, rank, rows, width, out, coefficients, basis }: ExpandJob): void {
  checkProducts(dtype, { rank, rows, width }, out, rank * width, "coefficients", coefficients, rank * rows, basis);
}

/** @throws RangeError naming the count or slice at fault; TypeError for an unknown type */
export function checkProject({ dtype, count, rows, width, out, x, basis }: ProjectJob): void {
  checkProducts(dtype, { count, rows, width }, out, count * rows, "x", x, count * width, basis);
}

/** Products of f32 numbers with a tensor [rows, width]. */
function checkProducts(
  type: Dtype,
  counts: { rows: number; width: number } & Record<string, number>,
  out: Slice,
  outLength: number,
  numbersName: string,
  numbers: Slice,
  numbersLength: number,
  basis: Slice,
): void {
  checkType(type, DTYPES);
  for (const [name, count] of Object.entries(counts)) checkCount(name, count);
  checkSlice("out", out, 4 * outLength, 4);
  for (const [name, slice, bytes] of [
    [numbersName, numbers, 4 * numbersLength],
    ["basis", basis, tensorBytes(type, counts.rows, counts.width)],
  ] as const) {
    checkSlice(name, slice, bytes, 4);
    checkApart("out", out, 4 * outLength, name, slice, bytes);
  }
}

/** @throws RangeError naming the count or slice at fault; TypeError for an unknown type */
export function checkFold(job: FoldJob): void {
  const weight = checkProduct(job);
  const { out, base } = job;
  checkSlice("out", out, weight, rowBytes(job.dtype, 1));
  if (out.block !== base.block || out.byteOffset !== base.byteOffset) {
    checkApart("out", out, weight, "base", base, weight);
  }
  checkApart("out", out, weight, "left", job.left, 4 * job.rank * job.rows);
  checkApart("out", out, weight, "right", job.right, 4 * job.rank * job.columns);
  for (const [name, scale, count] of [
    ["rowScale", job.rowScale, job.rows],
    ["columnScale", job.columnScale, job.columns],
  ] as const) {
    if (scale === undefined) continue;
    checkSlice(name, scale, 4 * count, 4);
    checkApart("out", out, weight, name, scale, 4 * count);
  }
}

/** @throws RangeError naming the count or slice at fault; TypeError for an unknown type */
export function checkScale(job: ScaleJob): void {
  const weight = checkProduct(job);
  const bytes = 4 * (job.axis === "rows" ? job.rows : job.columns);
  checkSlice("out", job.out, bytes, 4);
  checkSlice("magnitude", job.magnitude, bytes, 4);
  checkApart("out", job.out, bytes, "magnitude", job.magnitude, bytes);
  checkApart("out", job.out, bytes, "base", job.base, weight);
  checkApart("out", job.out, bytes, "left", job.left, 4 * job.rank * job.rows);
  checkApart("out", job.out, bytes, "right", job.right, 4 * job.rank * job.columns);
}

/** What fold and scale share. Returns the bytes from the first to the last element of a weight, rows' gaps included. */
function checkProduct(job: Omit<FoldJob, "out">): number {
  checkType(job.dtype, FLOAT_TYPES);
  checkCount("rank", job.rank);
  checkCount("rows", job.rows);
  checkCount("columns", job.columns);
  checkCount("stride", job.stride);
  if (job.stride < job.columns) throw new RangeError(`stride must be ≥ columns ${job.columns}, got ${job.stride}`);
  const size = rowBytes(job.dtype, 1);
  const weight = job.rows === 0 ? 0 : ((job.rows - 1) * job.stride + job.columns) * size;
  checkSlice("base", job.base, weight, size);
  checkSlice("left", job.left, 4 * job.rank * job.rows, 4);
  checkSlice("right", job.right, 4 * job.rank * job.columns, 4);
  return weight;
}

function checkType(type: Dtype, allowed: readonly Dtype[]): void {
  if (!allowed.includes(type)) throw new TypeError(`type must be one of ${allowed.join(", ")}, got ${String(type)}`);
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
