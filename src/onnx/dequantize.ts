/**
 * Values of quantised weights, decoded as the operators that use them do: MatMulNBits, DequantizeLinear, MatMulInteger
 * after DynamicQuantizeLinear, QLinearMatMul. They serve fingerprints and the base's heads; products are computed by
 * the runtime.
 */

import type { WeightAt } from "../core/mismatch.ts";
import { FormatError } from "../errors.ts";
import type { ReadOptions } from "../source.ts";
import { bf16ToF32, elementsOf, f16ToF32 } from "../tensor/dtypes.ts";
import { producer, UINT8 } from "./linear.ts";
import { type Graph, intOf, type OnnxModel, type Use } from "./model.ts";
import { matrixShape, type OnnxParameter, partSize, partStart, type Stored } from "./modules.ts";
import type { NodeProto } from "./protobuf.ts";
import type { ModelFile } from "./read.ts";
import { INTEGERS, readTensor } from "./tensors.ts";

type Values = (i: number) => number;

/**
 * Values of a quantised weight; undefined where it is quantised in an unknown way.
 * @throws FormatError, SourceError as `readTensor`
 */
export async function readQuantizedWeight(
  file: ModelFile,
  parameter: Stored,
  options?: ReadOptions,
): Promise<WeightAt | undefined> {
  const [out, inputs] = matrixShape(parameter) ?? [0, 0];
  const read = readerOf(file, options);
  const use = parameter.uses[0];
  if (use?.node.opType === "MatMulNBits") return nBits(read, use.node);
  return affine(read, file.model, parameter, use, parameter.layout === "in-out", out, inputs);
}

/**
 * Reads a vector as f32, stored as floats or behind a DequantizeLinear.
 * @throws FormatError, SourceError as `readTensor`
 */
export async function readVector(
  file: ModelFile,
  parameter: OnnxParameter,
  options?: ReadOptions,
): Promise<Float32Array> {
  const { model } = file;
  const { name, initializer } = parameter;
  const read = readerOf(file, options);
  const values = await read(initializer);
  const node = dequantizeOf(model, initializer);
  const scales = values?.integer ? await read(node?.input[1]) : undefined;
  const zeros = await read(node?.input[2]);
  const count = parameter.shape.length === 0 ? 1 : partSize(parameter);
  const from = partStart(parameter);
  if (!values || (values.integer && !scales)) {
    const message = `"${name}" is of a type that is not read here; tasks that change it need a model where it is float`;
    throw new FormatError(message, { file: model.name, part: `initializer ${initializer}` });
  }
  const valueAt = (of: TensorValues | undefined, i: number, otherwise: number): number =>
    of ? of.at(of.shape.length === 0 || of.shape[0] === 1 ? 0 : i) : otherwise;
  return Float32Array.from({ length: count }, (_, n) => {
    const i = from + n;
    return (values.at(i) - valueAt(zeros, i, 0)) * valueAt(scales, i, 1);
  });
}

interface TensorValues {
  at: Values;
  shape: readonly number[];
  bytes: Uint8Array;
  integer: boolean;
}

/** Reads an initializer; undefined when none has this name, or its type is not supported. */
type Read = (name: string | undefined) => Promise<TensorValues | undefined>;

function readerOf({ model, external }: ModelFile, options: ReadOptions | undefined): Read {
  return async (name) => {
    const tensor = name ? model.graph.initializers.get(name) : undefined;
    if (!tensor) return undefined;
    const { data, dtype, shape } = await readTensor(tensor, model.name, external, options);
    const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
    const integer = INTEGERS.get(tensor.dataType);
    const count = elementsOf(shape);
    const needed = Math.ceil((count * (integer?.bits ?? (dtype === "f32" ? 32 : 16))) / 8);
    if (data.length < needed) {
      throw new FormatError(`needs ${needed} bytes, found ${data.length}: damaged, export the model again`, {
        file: model.name,
        part: `initializer ${name}`,
      });
    }
    if (integer) return { at: integersIn(data, integer.bits, integer.signed), shape, bytes: data, integer: true };
    if (dtype === "other") return undefined;
    const at: Values =
      dtype === "f32"
        ? (i) => view.getFloat32(4 * i, true)
        : (i) => (dtype === "f16" ? f16ToF32 : bf16ToF32)(view.getUint16(2 * i, true));
    return { at, shape, bytes: data, integer: false };
  };
}

/** Unpacks integers, low bits first. */
function integersIn(bytes: Uint8Array, bits: number, signed: boolean): Values {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (bits === 32) return (i) => view.getInt32(4 * i, true);
  if (bits === 16) return (i) => (signed ? view.getInt16(2 * i, true) : view.getUint16(2 * i, true));
  const half = 2 ** (bits - 1);
  return (i) => {
    const bit = i * bits;
    const value = (view.getUint8(Math.floor(bit / 8)) >> (bit & 7)) & (2 ** bits - 1);
    return signed && value >= half ? value - 2 * half : value;
  };
}

/**
 * Decodes B [N, blocks, block_size · bits / 8], scales [N · blocks], and zero points packed by row, 2^(bits − 1) by
 * default.
 */
async function nBits(read: Read, node: NodeProto): Promise<WeightAt | undefined> {
  const inputs = intOf(node, "K");
  const out = intOf(node, "N");
  const bits = intOf(node, "bits", 4);
  const size = intOf(node, "block_size");
  const packed = await read(node.input[1]);
  const scales = await read(node.input[2]);
  const zeros = await read(node.input[3]);
  if (!packed || !scales || ![2, 4, 8].includes(bits) || size < 16 || node.input[4]) return undefined;
  const blocks = Math.ceil(inputs / size);
  const values = integersIn(packed.bytes, bits, false);
  // Each row of zero points is padded to whole bytes.
  const rowOfZeros = (Math.ceil((blocks * bits) / 8) * 8) / bits;
  const isWhole = packed.bytes.length * 8 >= out * blocks * size * bits && elementsOf(scales.shape) >= out * blocks;
  const isBased =
    !zeros ||
    (zeros.integer ? zeros.bytes.length * 8 >= out * rowOfZeros * bits : elementsOf(zeros.shape) >= out * blocks);
  if (!isWhole || !isBased) return undefined;
  const packedZeros = zeros?.integer ? integersIn(zeros.bytes, bits, false) : undefined;
  const zeroAt = (o: number, block: number): number =>
    packedZeros?.(o * rowOfZeros + block) ?? zeros?.at(o * blocks + block) ?? 2 ** (bits - 1);
  return (o, n) => {
    const block = Math.floor(n / size);
    const at = o * blocks + block;
    return (values(at * size + (n % size)) - zeroAt(o, block)) * scales.at(at);
  };
}

/** Decodes integers with scales and zero points: one for all, one for each column or row, or blocks along one axis. */
async function affine(
  read: Read,
  model: OnnxModel,
  { initializer, shape }: Stored,
  use: Use | undefined,
  transposed: boolean,
  out: number,
  inputs: number,
): Promise<WeightAt | undefined> {
  const quantization = scalesOf(model, initializer, use);
  const values = await read(initializer);
  const scales = await read(quantization?.scale);
  if (!quantization || !values || !scales || out * inputs === 0) return undefined;
  const zeros = await read(quantization.zero);
  const { axis, block } = quantization;
  const [rows, columns] = shape as [number, number];
  const count = elementsOf(scales.shape);
  const place = (row: number, column: number): number => {
    if (count === 1) return 0;
    if (block === 0) return axis === 0 ? row : column;
    return axis === 0
      ? Math.floor(row / block) * columns + column
      : row * Math.ceil(columns / block) + Math.floor(column / block);
  };
  const expected = block === 0 ? [1, axis === 0 ? rows : columns] : [place(rows - 1, columns - 1) + 1];
  if (!expected.includes(count)) return undefined;
  return (o, n) => {
    const [row, column] = transposed ? [n, o] : [o, n];
    const at = place(row, column);
    return (
      (values.at(row * columns + column) - (zeros ? zeros.at(zeros.shape.length === 0 ? 0 : at) : 0)) * scales.at(at)
    );
  };
}

/** Indices of the inputs that hold scale and zero of a weight, and its axis, by operator. */
const SCALES: ReadonlyMap<string, readonly [scale: number, zero: number, axis: number]> = new Map([
  ["QLinearConv", [4, 5, 0]],
  ["QLinearMatMul", [4, 5, 1]],
  ["DynamicQuantizeMatMul", [2, 3, 1]],
]);

/** Values that hold scale and zero of a quantised weight, their axis, and the size of a block; 0: no blocks. */
function scalesOf(model: OnnxModel, initializer: string, use: Use | undefined) {
  const { graph } = model;
  const take = ({ input }: NodeProto, scale: number, zero: number, axis: number, block = 0) => {
    return { scale: input[scale], zero: input[zero], axis: axis < 0 ? axis + 2 : axis, block };
  };
  const direct = dequantizeOf(model, initializer);
  if (direct) return take(direct, 1, 2, intOf(direct, "axis", 1), intOf(direct, "block_size"));
  if (!use) return undefined;
  const { node } = use;
  const known = SCALES.get(node.opType);
  const next = nextOf(graph, node);
  if (known) return take(node, ...known);
  switch (node.opType) {
    case "GatherBlockQuantized":
      // Bytes without zero points are centred, and may hold two numbers each; no known tool writes such.
      if (graph.initializers.get(initializer)?.dataType === UINT8) return undefined;
      return take(node, 2, 3, intOf(node, "quantize_axis", 1), intOf(node, "block_size", 128));
    case "Gather":
      return next?.opType === "DequantizeLinear" ? take(next, 1, 2, 0) : undefined;
    case "MatMulInteger":
    case "ConvInteger": {
      // A Cast, then a Mul by (scale of x · scale of the weight), which another Mul has computed.
      const factors = next && nextOf(graph, next)?.input.find((value) => value !== next.output[0]);
      const product = factors === undefined ? undefined : producer(model, use.graph, factors);
      return { ...take(node, -1, 3, 1), scale: product?.input.find((value) => graph.initializers.has(value)) };
    }
    default:
      return undefined;
  }
}

function dequantizeOf({ graph }: OnnxModel, initializer: string): NodeProto | undefined {
  return graph.consumers.get(initializer)?.find(({ node }) => node.opType === "DequantizeLinear")?.node;
}

function nextOf({ consumers }: Graph, { output: [value = ""] }: NodeProto): NodeProto | undefined {
  return consumers.get(value)?.[0]?.node;
}
