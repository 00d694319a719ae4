/**
 * Products of matrices. The transpose of a weight is never written as a node of its own: runtimes would fold it into a
 * second copy of the weight when they load the graph.
 */
import { attribute } from "../../onnx/model.ts";
import type { NodeGradient, Rule } from "../node-gradient.ts";

const matMul: Rule = {
  backward(node) {
    const { emit } = node;
    let { g } = node;
    let [a, b] = [node.x(0), node.x(1)];
    let [aDims, bDims] = [node.dims(a), node.dims(b)];
    const single = bDims.length === 3 && bDims[0] === 1;
    if (aDims.length >= 2 && (bDims.length === 2 || single)) {
      // The weight is a matrix: all rows of the other side are joined, so that no batch remains to sum over.
      const rows = (value: string): string => (node.rank(node.y) === 2 ? value : emit.rows(value));
      const da = (): string => {
        const matrix = single ? emit.op("Squeeze", [b, emit.ints([0])]) : gemmOf(node, b);
        return emit.op("Gemm", [rows(g), matrix], { transB: !single && turned(node, b) ? 0 : 1 });
      };
      if (node.wants(0)) node.rank(node.y) === 2 ? node.give(0, da()) : node.giveReshaped(0, da());
      const x = (): string => (aDims.length === 2 ? a : emit.rows(a));
      const db = (): string => emit.op("Gemm", [x(), rows(g)], { transA: 1 });
      // A factor has few columns, and their number is free. Its gradient is computed through the transpose, since products are fast for
      // long rows. The order matters: runtimes would fuse the Transpose into the Gemm.
      const thin = (): string =>
        emit.op("Transpose", [emit.unsqueeze(emit.op("Gemm", [rows(g), x()], { transA: 1 }), [0])], {
          perm: [0, 2, 1],
        });
      if (node.wants(1))
        node.give(
          1,
          !single ? db() : bDims[1] !== undefined && bDims[2] === undefined ? thin() : emit.unsqueeze(db(), [0]),
        );
      return;
    }
    // A vector is a matrix of one row or column.
    if (aDims.length === 1) [a, aDims, g] = [emit.unsqueeze(a, [0]), [1, ...aDims], emit.unsqueeze(g, [-2])];
    if (bDims.length === 1) [b, bDims, g] = [emit.unsqueeze(b, [1]), [...bDims, 1], emit.unsqueeze(g, [-1])];
    const yDims = node.dims(node.y);
    const vectors = (node.rank(node.x(0)) === 1 ? 1 : 0) + (node.rank(node.x(1)) === 1 ? 1 : 0);
    const batch = yDims.slice(0, yDims.length - 2 + vectors);
    const swapped = (value: string, rank: number): string => swapLast(node, value, rank);
    const one = (input: number, product: string, to: typeof aDims): void => {
      const summed = node.summed(product, [...batch, ...to.slice(-2)], to);
      if (node.rank(node.x(input)) === 1) node.giveReshaped(input, summed);
      else node.give(input, summed);
    };
    if (node.wants(0)) one(0, emit.op("MatMul", [g, swapped(b, bDims.length)]), aDims);
    if (node.wants(1)) one(1, emit.op("MatMul", [swapped(a, aDims.length), g]), bDims);
  },
};

const gemm: Rule = {
  backward(node) {
    const { emit, g } = node;
    const [a, b] = [node.x(0), node.x(1)];
    const [transA, transB] = [node.int("transA") ?? 0, node.int("transB") ?? 0];
    const alpha = { float: node.float("alpha", 1) };
    if (node.wants(0)) {
      node.give(
        0,
        transA
          ? emit.op("Gemm", [b, g], { alpha, transA: transB, transB: 1 })
          : emit.op("Gemm", [g, b], { alpha, transB: transB ? 0 : 1 }),
      );
    }
    if (node.wants(1)) {
      node.give(
        1,
        transB
          ? emit.op("Gemm", [g, a], { alpha, transA: 1, transB: transA })
          : emit.op("Gemm", [a, g], { alpha, transA: transA ? 0 : 1 }),
      );
    }
    const beta = node.float("beta", 1);
    node.giveSummed(2, () => (beta === 1 ? g : emit.mul(g, beta)));
  },
};

/** Whether a matrix is the Transpose of another, which is then used instead. */
function turned({ graph }: NodeGradient, value: string): boolean {
  const node = graph.producers.get(value);
  return node?.opType === "Transpose" && attribute(node, "perm")?.ints.join() !== "0,1";
}

function gemmOf(node: NodeGradient, matrix: string): string {
  return turned(node, matrix) ? node.graph.producers.get(matrix)!.input[0]! : matrix;
}

/** Swaps the last two dimensions. */
function swapLast({ emit }: NodeGradient, value: string, rank: number): string {
  return emit.op("Transpose", [value], { perm: [...Array(rank - 2).keys(), rank - 1, rank - 2] });
}

export const PRODUCTS: readonly (readonly [string, Rule])[] = [
  ["MatMul", matMul],
  ["Gemm", gemm],
];
