/**
 * Products with weights in blocks of 4 or 8 bits. The weights stay as they are: what comes back takes their rows unpacked, a part
 * of them at a time, each gone before the next is made.
 */
import { CONTRIBUTED } from "../../onnx/nodes.ts";
import type { NodeGradient, Rule } from "../node-gradient.ts";

/** Elements that are unpacked at once: 32 MB. All of a layer, a part of a vocabulary. */
const MOST_UNPACKED = 2 ** 23;

const matMulNBits: Rule = {
  inputs: [0],
  backward(node) {
    const { emit } = node;
    if (node.has(4)) return node.refuse("has its columns in another order (g_idx), which gradients do not pass");
    const bits = node.int("bits") ?? 4;
    if (bits !== 4 && bits !== 8) return node.refuse(`has weights of ${bits} bits, which gradients do not pass`);
    const [K, N, block] = [node.int("K")!, node.int("N")!, node.int("block_size")!];
    const blocks = Math.ceil(K / block);
    const g = node.rank(node.y) === 2 ? node.g : emit.rows(node.g);
    const packed = emit.op("Reshape", [node.x(1), emit.ints([N, (blocks * block * bits) / 8])]);
    const scales = emit.op("Reshape", [node.x(2), emit.ints([N, blocks])]);
    // Integers beside the weights, or any numbers.
    const integers = node.has(3) && node.type(node.x(3)) === "uint8";
    const zeros = integers ? [emit.op("Reshape", [node.x(3), emit.ints([N, Math.ceil((blocks * bits) / 8)])])] : [];
    const rows = Math.max(1, Math.min(N, Math.floor(MOST_UNPACKED / K)));
    let sum: string | undefined;
    for (let from = 0; from < N; from += rows) {
      const to = Math.min(from + rows, N);
      const places = emit.op("Range", [emit.int(from), emit.int(to), emit.int(1)]);
      // Known in the run alone, and behind the part before: runtimes would unpack constant weights when they load them.
      const late = emit.add(places, sum === undefined ? node.late() : emit.late(sum, 0));
      const attributes = { bits, block_size: block, gather_axis: 0, quantize_axis: 1 };
      const unpacked = emit.op("GatherBlockQuantized", [packed, late, scales, ...zeros], attributes, CONTRIBUTED);
      const part = rows < N ? emit.slice(g, 1, from, to) : g;
      sum = emit.op("Gemm", [part, unpacked, ...(sum === undefined ? [] : [sum])]);
    }
    if (node.has(3) && !integers) sum = moved(node, sum!, g, scales, { bits, block, blocks, N });
    if (blocks * block > K) sum = emit.slice(sum!, 1, 0, K);
    node.rank(node.y) === 2 ? node.give(0, sum!) : node.giveReshaped(0, sum!);
  },
};

/** Where zero is no integer: (q − zero) · scale is (q − middle) · scale and, in all of a block, (middle − zero) · scale. */
function moved(
  node: NodeGradient,
  sum: string,
  g: string,
  scales: string,
  { bits, block, blocks, N }: { bits: number; block: number; blocks: number; N: number },
): string {
  const { emit } = node;
  const zeros = emit.op("Reshape", [node.x(3), emit.ints([N, blocks])]);
  const by = emit.op("Gemm", [g, emit.mul(emit.sub(2 ** (bits - 1), zeros), scales)]);
  const apart = emit.op("Reshape", [sum, emit.ints([0, blocks, block])]);
  return emit.op("Reshape", [emit.add(apart, emit.unsqueeze(by, [2])), emit.ints([0, blocks * block])]);
}

export const QUANTIZED: readonly (readonly [string, Rule])[] = [[`${CONTRIBUTED}.MatMulNBits`, matMulNBits]];
