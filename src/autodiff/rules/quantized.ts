/**
 * Products with weights in blocks of 4 or 8 bits. The weights stay packed: the backward pass unpacks their rows one part at a time and
 * frees each part before the next.
 */
import { CONTRIBUTED } from "../../onnx/nodes.ts";
import type { Emitter } from "../emit.ts";
import type { NodeGradient, Rule } from "../node-gradient.ts";

/** Most elements unpacked at once: 32 MB. That is all of a layer, or a part of a vocabulary. */
const MOST_UNPACKED = 2 ** 23;

/** A weight [N, K] in blocks along K. */
interface Blocks {
  readonly N: number;
  readonly K: number;
  readonly bits: 4 | 8;
  readonly block: number;
  /** Blocks in a row; the last one may be padded. */
  readonly count: number;
  /** [N, count] */
  readonly scales: string;
}

const matMulNBits: Rule = {
  inputs: [0],
  backward(node) {
    const { emit } = node;
    if (node.has(4)) return node.refuse("has its columns in another order (g_idx), which gradients do not pass");
    const bits = node.int("bits") ?? 4;
    if (bits !== 4 && bits !== 8) return node.refuse(`has weights of ${bits} bits, which gradients do not pass`);
    const [K, N, block] = [node.int("K")!, node.int("N")!, node.int("block_size")!];
    const count = Math.ceil(K / block);
    const scales = emit.op("Reshape", [node.x(2), emit.ints([N, count])]);
    const blocks = { N, K, bits, block, count, scales } as const;
    const g = node.rank(node.y) === 2 ? node.g : emit.rows(node.g);
    let sum = emit.gathers ? byGather(node, g, blocks) : byShifts(node, g, blocks);
    if (count * block > K) sum = emit.slice(sum, 1, 0, K);
    node.rank(node.y) === 2 ? node.give(0, sum) : node.giveReshaped(0, sum);
  },
};

/** Multiplies g with all rows, one part after the other. @param part gives the product with rows `from` to `to` */
function inParts({ N, K }: Blocks, part: (from: number, to: number, before: string | undefined) => string): string {
  const rows = Math.max(1, Math.min(N, Math.floor(MOST_UNPACKED / K)));
  let sum = part(0, Math.min(rows, N), undefined);
  for (let from = rows; from < N; from += rows) sum = part(from, Math.min(from + rows, N), sum);
  return sum;
}

/** Columns of g for the rows of a part. */
function columns(emit: Emitter, g: string, { N }: Blocks, from: number, to: number): string {
  return to - from < N ? emit.slice(g, 1, from, to) : g;
}

/**
 * Unpacks with operators that all processors have: one product for each half of the bytes.
 * @returns [rows of g, count · block]
 */
function byShifts(node: NodeGradient, g: string, blocks: Blocks): string {
  const { emit } = node;
  const { bits, block, count, N } = blocks;
  const bytes = (block * bits) / 8;
  // Q · scale; the correction for the zero is equal within a block.
  const zeros = zerosOf(node, blocks);
  const by = emit.op("MatMul", [g, emit.neg(emit.mul(zeros, blocks.scales))]);
  // [halves, rows, count · bytes], the lower half of the bytes first.
  const products = inParts(blocks, (from, to, before) => {
    // The shape is known only during the run, after the part before: runtimes would unpack constant weights when they load them.
    const shape = [N, count, bytes];
    const late = before === undefined ? node.late(shape) : emit.late(shape, before, 1);
    const all = emit.op("Reshape", [node.x(1), late]);
    const part = to - from < N ? emit.slice(all, 0, from, to) : all;
    const scale = emit.unsqueeze(to - from < N ? emit.slice(blocks.scales, 0, from, to) : blocks.scales, [2]);
    const gradient = columns(emit, g, blocks, from, to);
    const halves = (bits === 8 ? [part] : nibbles(emit, part)).map((half) => {
      const rows = emit.op("Flatten", [emit.mul(emit.toFloat(half), scale)], { axis: 1 });
      return emit.unsqueeze(emit.op("MatMul", [gradient, rows]), [0]);
    });
    const product = emit.concat(halves, 0);
    return before === undefined ? product : emit.add(before, product);
  });
  const inPlace = emit.op("Transpose", [products], { perm: [1, 2, 0] });
  const apart = emit.op("Reshape", [inPlace, emit.ints([0, count, block])]);
  return emit.op("Flatten", [emit.add(apart, emit.unsqueeze(by, [2]))], { axis: 1 });
}

/** Splits bytes into lower and upper halves. */
function nibbles(emit: Emitter, bytes: string): readonly string[] {
  const four = emit.byte(4);
  const upper = emit.shift(bytes, four, "RIGHT");
  return [emit.shift(emit.shift(bytes, four, "LEFT"), four, "RIGHT"), upper];
}

/** Zeros of all blocks: f32 [N, count] or a number. */
function zerosOf(node: NodeGradient, { N, count, bits }: Blocks): string | number {
  const { emit } = node;
  if (!node.has(3)) return 2 ** (bits - 1);
  if (node.type(node.x(3)) !== "uint8") return emit.op("Reshape", [node.x(3), emit.ints([N, count])]);
  const bytes = emit.op("Reshape", [node.x(3), emit.ints([N, -1, 1])]);
  const each = (bits === 8 ? [bytes] : nibbles(emit, bytes)).map((half) => emit.toFloat(half));
  const row = emit.op("Flatten", [emit.concat(each, 2)], { axis: 1 });
  return emit.slice(row, 1, 0, count);
}

/**
 * Unpacks with onnxruntime's operator, for devices without shifts of bits; on processors it takes several times as long.
 * @returns [rows of g, count · block]
 */
function byGather(node: NodeGradient, g: string, blocks: Blocks): string {
  const { emit } = node;
  const { bits, block, count, N } = blocks;
  const packed = emit.op("Reshape", [node.x(1), emit.ints([N, (count * block * bits) / 8])]);
  // Zeros are integers packed as the weights, or plain numbers.
  const integers = node.has(3) && node.type(node.x(3)) === "uint8";
  const zeros = integers ? [emit.op("Reshape", [node.x(3), emit.ints([N, Math.ceil((count * bits) / 8)])])] : [];
  const attributes = { bits, block_size: block, gather_axis: 0, quantize_axis: 1 };
  const sum = inParts(blocks, (from, to, before) => {
    const places = emit.op("Range", [emit.int(from), emit.int(to), emit.int(1)]);
    const late = emit.add(places, before === undefined ? node.late([0]) : emit.late([0], before, 0));
    const rows = emit.op("GatherBlockQuantized", [packed, late, blocks.scales, ...zeros], attributes, CONTRIBUTED);
    return emit.op("Gemm", [columns(emit, g, blocks, from, to), rows, ...(before === undefined ? [] : [before])]);
  });
  if (!node.has(3) || integers) return sum;
  // (q − zero) · scale is (q − middle) · scale plus (middle − zero) · scale, which is equal within a block.
  const off = emit.sub(2 ** (bits - 1), emit.op("Reshape", [node.x(3), emit.ints([N, count])]));
  const by = emit.op("Gemm", [g, emit.mul(off, blocks.scales)]);
  const apart = emit.op("Reshape", [sum, emit.ints([0, count, block])]);
  return emit.op("Flatten", [emit.add(apart, emit.unsqueeze(by, [2]))], { axis: 1 });
}

export const QUANTIZED: readonly (readonly [string, Rule])[] = [[`${CONTRIBUTED}.MatMulNBits`, matMulNBits]];
