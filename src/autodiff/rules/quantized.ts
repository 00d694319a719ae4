/**
 * Products with weights in blocks of 4 or 8 bits.
 */
import { CONTRIBUTED } from "../../onnx/nodes.ts";
import { type BlockWeight, blocksOf, inParts, offsetsOf, unpacked } from "../block-weights.ts";
import type { Emitter } from "../emit.ts";
import type { NodeGradient, Rule } from "../node-gradient.ts";

const matMulNBits: Rule = {
  inputs: [0],
  backward(node) {
    const { emit } = node;
    const blocks = blocksOf(node.proto, (value) => ({ dims: node.dims(value), bytes: node.type(value) === "uint8" }));
    if (typeof blocks === "string") return node.refuse(`${blocks}, which gradients do not pass`);
    const { K, block, count } = blocks;
    const g = node.rank(node.y) === 2 ? node.g : emit.rows(node.g);
    const product = (emit.gathers ? byGather : byBytes)(node, g, blocks);
    const sum = withOffsets(node, g, product, blocks);
    const own = count * block > K ? emit.slice(sum, 1, 0, K) : sum;
    node.rank(node.y) === 2 ? node.give(0, own) : node.giveReshaped(0, own);
  },
};

/** Columns of g for rows of the weight. */
function columns(emit: Emitter, g: string, { N }: BlockWeight, from: number, to: number): string {
  return to - from < N ? emit.slice(g, 1, from, to) : g;
}

/**
 * Unpacks as the forward product does, for processors.
 * @returns [rows of g, count · block]
 */
function byBytes(node: NodeGradient, g: string, blocks: BlockWeight): string {
  const { emit } = node;
  const [whole, upper] = inParts<readonly string[]>(blocks, (from, to, before = []) => {
    const last = before.at(-1);
    const weights = unpacked(emit, blocks, from, to, (numbers) =>
      last === undefined ? node.late(numbers) : emit.late(numbers, last),
    );
    const products: string[] = [];
    for (const [i, weight] of weights.entries()) {
      const gradient = columns(emit, g, blocks, from, to);
      // One after the other, where there are many: what waits for its product takes memory.
      const waits = i > 0 && gradient !== g;
      const late = waits ? emit.op("Reshape", [gradient, emit.late([0, 0], products[i - 1]!)]) : gradient;
      const product = emit.op("MatMul", [late, weight]);
      products.push(before[i] === undefined ? product : emit.add(before[i], product));
    }
    return products;
  }) as [string, string | undefined];
  if (upper === undefined) return whole;
  const halves = [emit.sub(whole, emit.mul(16, upper)), upper].map((half) => emit.unsqueeze(half, [0]));
  const inPlace = emit.op("Transpose", [emit.concat(halves, 0)], { perm: [1, 2, 0] });
  return emit.op("Flatten", [inPlace], { axis: 1 });
}

/**
 * Unpacks with onnxruntime's operator, which knows of zeros that are bytes; for devices without other operators on bytes. On
 * processors it takes several times as long.
 * @returns [rows of g, count · block]
 */
function byGather(node: NodeGradient, g: string, blocks: BlockWeight): string {
  const { emit } = node;
  const { bits, block, count, N } = blocks;
  const packed = emit.op("Reshape", [blocks.packed, emit.ints([N, (count * block * bits) / 8])]);
  const scales = emit.op("Reshape", [blocks.scales, emit.ints([N, count])]);
  const { zeros: { name, bytes } = { name: "", bytes: false } } = blocks;
  const zeros = bytes ? [emit.op("Reshape", [name, emit.ints([N, Math.ceil((count * bits) / 8)])])] : [];
  const attributes = { bits, block_size: block, gather_axis: 0, quantize_axis: 1 };
  return inParts<string>(blocks, (from, to, before) => {
    const places = emit.op("Range", [emit.int(from), emit.int(to), emit.int(1)]);
    const late = emit.add(places, before === undefined ? node.late([0]) : emit.late([0], before, 0));
    const rows = emit.op("GatherBlockQuantized", [packed, late, scales, ...zeros], attributes, CONTRIBUTED);
    return emit.op("Gemm", [columns(emit, g, blocks, from, to), rows, before ?? []].flat());
  });
}

/** Adds what zeros that are floats give, which is equal within a block. @param sum [rows of g, count · block] */
function withOffsets(node: NodeGradient, g: string, sum: string, blocks: BlockWeight): string {
  const { emit } = node;
  const offsets = offsetsOf(emit, blocks);
  if (offsets === undefined) return sum;
  const apart = emit.op("Reshape", [sum, emit.ints([0, blocks.count, blocks.block])]);
  const by = emit.unsqueeze(emit.op("Gemm", [g, offsets]), [2]);
  return emit.op("Flatten", [emit.add(apart, by)], { axis: 1 });
}

export const QUANTIZED: readonly (readonly [string, Rule])[] = [[`${CONTRIBUTED}.MatMulNBits`, matMulNBits]];
