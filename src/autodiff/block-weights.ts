/**
 * Weights in blocks of 4 or 8 bits (MatMulNBits), in products of many rows and their gradients. They stay packed: a
 * product unpacks their rows one part at a time, and frees each part before the next.
 *
 * A byte of 4-bit weights w = 16 · u + l holds two neighbouring columns, l first. Bytes become floats in one pass, and
 * so do upper halves; the lower ones are w − 16 · u. Either side of a product can take that difference, so that they
 * are never unpacked; it costs a digit of f32.
 */
import { FLOAT, UINT8 } from "../onnx/linear.ts";
import { type Graph, intOf } from "../onnx/model.ts";
import { CONTRIBUTED, NodeEdits, PREFIX } from "../onnx/nodes.ts";
import type { NodeProto } from "../onnx/protobuf.ts";
import { Emitter } from "./emit.ts";

/** Most elements unpacked at once: 32 MB. That is all of a layer, or a part of a vocabulary. */
const MOST_UNPACKED = 2 ** 23;

/** A weight [N, K] in blocks along K: bytes [N, count, bytes of a block], and a scale for each block. */
export interface BlockWeight {
  readonly N: number;
  readonly K: number;
  readonly bits: 4 | 8;
  readonly block: number;
  /** Blocks in a row; the last one may be padded. */
  readonly count: number;
  readonly packed: string;
  readonly scales: string;
  /** Dimensions of the scales: [N · count] or [N, count]. */
  readonly shape: readonly (number | undefined)[];
  /** Zeros of the blocks: bytes packed as the weight, row by row. Undefined where all are the middle, 2^(bits − 1). */
  readonly zeros: string | undefined;
}

/**
 * An int64 vector that becomes available during the run. Runtimes would copy weights when they load them, or unpack all
 * of them first.
 */
type Late = (numbers: readonly number[]) => string;

/** @returns the weight that a MatMulNBits multiplies by, or why it is not known here */
export function blocksOf(
  node: NodeProto,
  known: (value: string) => { readonly dims: readonly (number | undefined)[]; readonly bytes: boolean },
): BlockWeight | string {
  const [, packed, scales, zeros = "", order = ""] = node.input as [string, string, string, string?, string?];
  if (order !== "") return "has its columns in another order (g_idx)";
  const bits = intOf(node, "bits", 4);
  if (bits !== 4 && bits !== 8) return `has weights of ${bits} bits`;
  if (zeros !== "" && !known(zeros).bytes) return "has zero points that are no bytes";
  const K = intOf(node, "K");
  const N = intOf(node, "N");
  const block = intOf(node, "block_size");
  return {
    ...{ N, K, bits, block, count: Math.ceil(K / block), packed, scales, shape: known(scales).dims },
    zeros: zeros || undefined,
  };
}

/** Takes a weight in parts of rows, one after the other. @param take is told what the part before gave */
export function inParts<T>({ N, K }: BlockWeight, take: (from: number, to: number, before: T | undefined) => T): T {
  const rows = Math.max(1, Math.min(N, Math.floor(MOST_UNPACKED / K)));
  let last = take(0, Math.min(rows, N), undefined);
  for (let from = rows; from < N; from += rows) last = take(from, Math.min(from + rows, N), last);
  return last;
}

/**
 * Unpacks rows of a weight.
 * @returns bytes, and for 4 bits their upper halves: [to − from, count · bytes of a block] each
 */
export function unpacked(emit: Emitter, blocks: BlockWeight, from: number, to: number, late: Late): readonly string[] {
  const { N, bits, block, count } = blocks;
  const [rows, width] = [to - from, (block * bits) / 8];
  const part = rows < N;
  const some = part ? emit.op("Slice", blocks.packed, late([from]), [to], [0]) : blocks.packed;
  // A block is a row, so that bytes, zero and scale become floats in one pass.
  const bytes = emit.reshape(some, late([-1, width]));
  const all = String(blocks.shape) === String(N * count) ? blocks.scales : emit.reshape(blocks.scales, [N * count]);
  const scales = part ? emit.slice(all, 0, from * count, to * count) : all;
  const floats = (values: string, each: number): string => {
    const of = zerosOf(emit, blocks, each, rows);
    const zeros = part && blocks.zeros ? emit.slice(of, 0, from * count, to * count) : of;
    const made = emit.op("DequantizeLinear", values, scales, zeros, { axis: 0 });
    return emit.reshape(made, late([-1, count * width]));
  };
  // A byte's zero is 16 · z + z.
  return bits === 8 ? [floats(bytes, 1)] : [floats(bytes, 17), floats(upperHalves(emit, bytes), 1)];
}

/** Zeros of blocks as bytes, `each` times. @returns [N · count]; [rows · count] of middles */
function zerosOf(emit: Emitter, { N, count, bits, zeros }: BlockWeight, each: number, rows: number): string {
  if (!zeros) return emit.op("Expand", emit.byte(each * 2 ** (bits - 1)), [rows * count]);
  if (bits === 8) return emit.reshape(zeros, [N * count]);
  // Runtimes compute this when they load it, which they do not with QLinearAdd.
  const bytes = emit.toFloat(emit.reshape(zeros, [N, Math.ceil(count / 2), 1]));
  const upper = emit.op("Floor", emit.mul(bytes, 1 / 16));
  const both = emit.concat([emit.sub(bytes, emit.mul(16, upper)), upper], 2);
  const own = emit.slice(emit.op("Flatten", both, { axis: 1 }), 1, 0, count);
  return emit.reshape(emit.cast(emit.mul(each, own), UINT8), [N * count]);
}

/** Upper halves of bytes: (w − 7.5) / 16, rounded, which is exact. BitShift takes five times as long. */
function upperHalves(emit: Emitter, bytes: string): string {
  const [zero, fifteen] = [emit.byte(0), emit.byte(15)];
  return emit.op(`${CONTRIBUTED}.QLinearAdd`, bytes, 1, zero, zero, 0.5, fifteen, 16, zero);
}

/**
 * Makes vectors of scales that only such products read, in place. They take both shapes; reshaped ones would be second
 * copies.
 */
export function flattenScales({ proto: main, initializers, consumers }: Graph): void {
  // The shape of an input is declared.
  const declared = new Set(main.input.map(({ name }) => name));
  for (const { opType, input } of main.node) {
    const scales = opType === "MatMulNBits" && !declared.has(input[2]!) ? initializers.get(input[2]!) : undefined;
    const users = consumers.get(input[2] ?? "") ?? [];
    if (!scales || !users.every((use) => use.node.opType === "MatMulNBits" && use.input === 2)) continue;
    scales.dims = [scales.dims.reduce((a, b) => a * b, 1n)];
  }
}

/**
 * Writes products with weights in blocks as products with floats, in place. onnxruntime's own make a second copy of
 * each weight, and gradients need the first one too. Without that copy they unpack a whole vocabulary at once, and take
 * one and a half times as long.
 */
export function unpackProducts(
  { proto: main, initializers }: Graph,
  opset: number,
  rankOf: (value: string) => number | undefined,
): void {
  const emit = new Emitter(main, opset, `${PREFIX}/unpacked`);
  const edits = new NodeEdits();
  const typeOf = (value: string): number | undefined => initializers.get(value)?.dataType;
  for (const node of main.node) {
    if (node.opType !== "MatMulNBits" || node.domain !== CONTRIBUTED) continue;
    const blocks = blocksOf(node, (value) => ({
      dims: initializers.get(value)?.dims.map(Number) ?? [],
      bytes: typeOf(value) === UINT8,
    }));
    if (typeof blocks === "string" || typeOf(blocks.scales) !== FLOAT) continue;
    const [x, , , , , bias = ""] = node.input as [string, ...string[]];
    const rank = rankOf(x);
    emit.replace(edits, main, node, () => {
      const made =
        rank === undefined
          ? emit.unrows(product(emit, emit.rows(x), 2, blocks), x, [blocks.N])
          : product(emit, x, rank, blocks);
      return bias === "" ? made : emit.add(made, bias);
    });
  }
  edits.apply();
}

/** The product of x, of some rank, with a weight: [… , N]. */
function product(emit: Emitter, x: string, rank: number, blocks: BlockWeight): string {
  const { K, block, bits, count } = blocks;
  const missing = count * block - K;
  const before = Array<number>(rank - 1).fill(0);
  const all = missing > 0 ? emit.op("Pad", x, [...before, 0, ...before, missing]) : x;
  const sides = bits === 8 ? [all] : pairs(emit, all, count * block);
  const by = (side: string, weight: string): string =>
    emit.op(`${CONTRIBUTED}.FusedMatMul`, side, weight, { transB: 1 });
  const parts = inParts<readonly string[]>(blocks, (from, to, before = []) => {
    const weights = unpacked(emit, blocks, from, to, (numbers) => emit.late(numbers, before.at(-1) ?? x));
    return [...before, weights.map((weight, i) => by(sides[i]!, weight)).reduce((a, b) => emit.add(a, b))];
  });
  return emit.concat(parts, -1);
}

/** Operands of x for bytes, and for upper halves: l · x + u · y = w · x + u · (y − 16 · x) for columns x and y. */
function pairs(emit: Emitter, x: string, K: number): readonly string[] {
  const column = (from: number): string => emit.op("Slice", x, [from], [K], [-1], [2]);
  const [even, odd] = [column(0), column(1)];
  return [even, emit.sub(odd, emit.mul(16, even))];
}
