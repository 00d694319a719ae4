/**
 * Weights in blocks of 4 or 8 bits (MatMulNBits), in products of many rows and their gradients. They stay packed: a product unpacks their
 * rows one part at a time, and frees each part before the next.
 *
 * A byte of 4-bit weights w = 16 · u + l holds two neighbouring columns, l first. Bytes become floats in one pass, and so do upper halves; the
 * lower ones are w − 16 · u. Either side of a product can take that difference, so that they are never unpacked; it costs a digit of f32.
 */
import { FLOAT, UINT8 } from "../onnx/linear.ts";
import { attribute, type Graph } from "../onnx/model.ts";
import { CONTRIBUTED, PREFIX } from "../onnx/nodes.ts";
import type { NodeProto } from "../onnx/onnx_pb.ts";
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
  /** Zeros of the blocks: bytes packed as the weight, row by row, or floats. Undefined where all are the middle, 2^(bits − 1). */
  readonly zeros: { readonly name: string; readonly bytes: boolean } | undefined;
}

/** An int64 vector that becomes available during the run. Runtimes would copy weights when they load them, or unpack all of them first. */
type Late = (numbers: readonly number[]) => string;

/**
 * @param known a weight's dimensions, and whether it is of bytes
 * @returns what a MatMulNBits multiplies by, or why it is not known here
 */
export function blocksOf(
  node: NodeProto,
  known: (value: string) => { readonly dims: readonly (number | undefined)[]; readonly bytes: boolean },
): BlockWeight | string {
  const int = (name: string, otherwise = 0): number => Number(attribute(node, name)?.i ?? otherwise);
  const [, packed, scales, zeros = "", order = ""] = node.input as [string, string, string, string?, string?];
  if (order !== "") return "has its columns in another order (g_idx)";
  const bits = int("bits", 4);
  if (bits !== 4 && bits !== 8) return `has weights of ${bits} bits`;
  const [K, N, block] = [int("K"), int("N"), int("block_size")];
  return {
    ...{ N, K, bits, block, count: Math.ceil(K / block), packed, scales, shape: known(scales).dims },
    zeros: zeros === "" ? undefined : { name: zeros, bytes: known(zeros).bytes },
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
 * Unpacks rows of a weight, as if all zeros were the middle.
 * @returns bytes, and for 4 bits their upper halves: [to − from, count · bytes of a block] each
 */
export function unpacked(emit: Emitter, blocks: BlockWeight, from: number, to: number, late: Late): readonly string[] {
  const { N, bits, block, count } = blocks;
  const [rows, width] = [to - from, (block * bits) / 8];
  const part = rows < N;
  const some = part ? emit.op("Slice", [blocks.packed, late([from]), emit.ints([to]), emit.ints([0])]) : blocks.packed;
  // A block is a row, so that bytes, zero and scale become floats in one pass.
  const bytes = emit.op("Reshape", [some, late([rows * count, width])]);
  const all = scalesOf(emit, blocks, [N * count]);
  const scales = part ? emit.slice(all, 0, from * count, to * count) : all;
  const floats = (values: string, zero: number): string => {
    const zeros = emit.op("Expand", [emit.byte(zero), emit.ints([rows * count])]);
    const made = emit.op("DequantizeLinear", [values, scales, zeros], { axis: 0 });
    return emit.op("Reshape", [made, late([rows, count * width])]);
  };
  if (bits === 8) return [floats(bytes, 128)];
  return [floats(bytes, 16 * 8 + 8), floats(upperHalves(emit, bytes), 8)];
}

/** Upper halves of bytes: (w − 7.5) / 16, rounded, which is exact. BitShift takes five times as long. */
function upperHalves(emit: Emitter, bytes: string): string {
  const [zero, fifteen] = [emit.byte(0), emit.byte(15)];
  return emit.op("QLinearAdd", [bytes, 1, zero, zero, 0.5, fifteen, 16, zero], {}, CONTRIBUTED);
}

/** Scales in another shape. */
function scalesOf(emit: Emitter, { scales, shape }: BlockWeight, to: readonly number[]): string {
  return String(shape) === String(to) ? scales : emit.op("Reshape", [scales, emit.ints(to)]);
}

/** What zeros off the middle add to all weights of a block: f32 [N, count]; undefined where none are. */
export function offsetsOf(emit: Emitter, blocks: BlockWeight): string | undefined {
  const { N, count, bits, zeros } = blocks;
  if (!zeros) return undefined;
  const shape = emit.ints([N, count]);
  const values = zeros.bytes ? integersOf(emit, blocks) : emit.toFloat(emit.op("Reshape", [zeros.name, shape]));
  return emit.mul(emit.sub(2 ** (bits - 1), values), scalesOf(emit, blocks, [N, count]));
}

/** Zeros [N, count] as floats, of bytes. */
function integersOf(emit: Emitter, { N, count, bits, zeros }: BlockWeight): string {
  const bytes = emit.op("Reshape", [zeros!.name, emit.ints([N, Math.ceil((count * bits) / 8), 1])]);
  const all = emit.toFloat(bytes);
  if (bits === 8) return emit.op("Flatten", [all], { axis: 1 });
  // Runtimes compute these when they load them, which they do not with QLinearAdd.
  const upper = emit.op("Floor", [emit.mul(all, 1 / 16)]);
  const both = emit.concat([emit.sub(all, emit.mul(16, upper)), upper], 2);
  return emit.slice(emit.op("Flatten", [both], { axis: 1 }), 1, 0, count);
}

/** Makes vectors of scales that only such products read, in place. They take both shapes; reshaped ones would be second copies. */
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
 * Writes products with weights in blocks as products with floats, in place. onnxruntime's own make a second copy of each weight, and
 * gradients need the first one too. Without that copy they unpack a whole vocabulary at once, and take one and a half times as long.
 * @param graph indexed in its current state
 * @param freeAxis an axis of a value that only the run tells; undefined where none is known
 */
export function unpackProducts(
  { proto: main, initializers }: Graph,
  opset: number,
  freeAxis: (value: string) => number | undefined,
): void {
  const emit = new Emitter(main, opset, `${PREFIX}/unpacked`);
  main.node = main.node.flatMap((node) => {
    if (node.opType !== "MatMulNBits" || node.domain !== CONTRIBUTED) return [node];
    const typeOf = (value: string): number | undefined => initializers.get(value)?.dataType;
    const blocks = blocksOf(node, (value) => ({
      dims: initializers.get(value)?.dims.map(Number) ?? [],
      bytes: typeOf(value) === UINT8,
    }));
    if (typeof blocks === "string" || typeOf(blocks.scales) !== FLOAT) return [node];
    if (blocks.zeros && ![UINT8, FLOAT].includes(typeOf(blocks.zeros.name) ?? 0)) return [node];
    const written = emit.nodes.length;
    const [x] = node.input as [string];
    const made = product(emit, x, blocks, freeAxis(x));
    const bias = node.input[5] ?? "";
    const shape = emit.concat([emit.slice(emit.op("Shape", [x]), 0, 0, -1), emit.ints([blocks.N])], 0);
    [node.opType, node.domain, node.attribute] = ["Reshape", "", []];
    node.input = [bias === "" ? made : emit.add(made, bias), shape];
    return [...emit.nodes.slice(written), node];
  });
}

/** The product of all rows of x with a weight: [rows, N]. */
function product(emit: Emitter, x: string, blocks: BlockWeight, axis: number | undefined): string {
  const { K, block, bits, count } = blocks;
  const missing = count * block - K;
  const flat = emit.rows(x);
  const all = missing > 0 ? emit.op("Pad", [flat, emit.ints([0, 0, 0, missing])]) : flat;
  const sides = bits === 8 ? [all] : pairs(emit, all, count * block);
  const parts = inParts<readonly string[]>(blocks, (from, to, before = []) => {
    const last = before.at(-1);
    const rows = axis === undefined ? undefined : 0;
    const late: Late = (numbers) => (last === undefined ? emit.late(numbers, x, axis) : emit.late(numbers, last, rows));
    const weights = unpacked(emit, blocks, from, to, late);
    let sum: string | undefined;
    for (const [i, weight] of weights.entries())
      sum = emit.op("Gemm", [sides[i]!, weight, sum ?? []].flat(), { transB: 1 });
    return [...before, sum!];
  });
  const product = emit.concat(parts, 1);
  const offsets = offsetsOf(emit, blocks);
  if (offsets === undefined) return product;
  const sums = emit.sum(emit.op("Reshape", [all, emit.ints([0, count, block])]), [2], false);
  return emit.op("Gemm", [sums, offsets, product], { transB: 1 });
}

/** What x [rows, K] multiplies bytes by, and upper halves: l · x + u · y = w · x + u · (y − 16 · x) for columns x and y. */
function pairs(emit: Emitter, x: string, K: number): readonly string[] {
  const each = emit.op("Reshape", [x, emit.ints([0, K / 2, 2])]);
  const [even, odd] = [0, 1].map((at) => emit.op("Gather", [each, emit.int(at)], { axis: 2 })) as [string, string];
  return [even, emit.sub(odd, emit.mul(16, even))];
}
