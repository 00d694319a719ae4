/**
 * Bytes of an initializer, wherever ONNX stores them: `raw_data`, the typed lists, or a file next to the model. They
 * are returned as in `raw_data`: little-endian, row-major. Values are not converted.
 */

import { FormatError, SourceError } from "../errors.ts";
import type { ByteSource, ReadOptions } from "../source.ts";
import { elementsOf, type FloatDtype } from "../tensor/dtypes.ts";
import type { OnnxModel } from "./model.ts";
import type { TensorProto } from "./protobuf.ts";

/** `TensorProto.DataType` of the float types that weights may have. */
const FLOATS: ReadonlyMap<number, FloatDtype> = new Map([
  [1, "f32"],
  [10, "f16"],
  [16, "bf16"],
]);
const BYTES: Record<FloatDtype, number> = { f32: 4, f16: 2, bf16: 2 };

/** Bits and signedness of `TensorProto.DataType`: uint8, int8, uint16, int16, int32, uint4, int4. */
export const INTEGERS: ReadonlyMap<number, { bits: number; signed: boolean }> = new Map([
  [2, { bits: 8, signed: false }],
  [3, { bits: 8, signed: true }],
  [4, { bits: 16, signed: false }],
  [5, { bits: 16, signed: true }],
  [6, { bits: 32, signed: true }],
  [21, { bits: 4, signed: false }],
  [22, { bits: 4, signed: true }],
]);

/** `TensorProto.DataLocation.EXTERNAL`. */
export const EXTERNAL = 1;

/**
 * Least size of tensors that leave the protobuf; smaller ones are shapes and axes, which runtimes read while loading.
 */
export const LEAST_DETACHED = 4096;

/** Points a tensor to its bytes in a file. */
export function point(tensor: TensorProto, location: string, offset: number, length: number): void {
  const entries = { location, offset: String(offset), length: String(length) };
  tensor.externalData = Object.entries(entries).map(([key, value]) => ({ key, value }));
  tensor.dataLocation = EXTERNAL;
  tensor.rawData = new Uint8Array(0);
}

/**
 * Files next to the model, by its names of them: the last byte that is used.
 * @throws FormatError when a tensor does not say where it is
 */
export function externalFiles({ name: file, graph }: OnnxModel): Map<string, number> {
  const found = new Map<string, number>();
  for (const tensor of [...graph.scopes.keys()].flatMap(({ initializer }) => initializer)) {
    if (tensor.dataLocation !== EXTERNAL) continue;
    const { location, offset, length } = placeOf(tensor, file, 0);
    found.set(location, Math.max(found.get(location) ?? 0, offset + length));
  }
  return found;
}

export interface OnnxTensorType {
  /** "other" for integers, quantised and all further types. */
  readonly dtype: FloatDtype | "other";
  readonly shape: readonly number[];
}

/** An initializer and its bytes: a view of the model or of the external file where these hold them in that form. */
interface TensorBytes extends OnnxTensorType {
  readonly data: Uint8Array;
}

/** Opens the file that an initializer's `location` names. */
export type OpenExternal = (location: string) => Promise<ByteSource>;

const partOf = (tensor: TensorProto): string => `initializer ${tensor.name}`;

/** @throws FormatError when the dimensions are negative or their product is no safe integer */
export function tensorType(tensor: TensorProto, file: string): OnnxTensorType {
  const shape = tensor.dims.map(Number);
  let count = 1;
  for (const size of shape) {
    count *= size;
    if (!(size >= 0 && Number.isSafeInteger(4 * count))) {
      const message = `has the impossible shape [${shape.join(", ")}]: damaged, export the model again`;
      throw new FormatError(message, { file, part: partOf(tensor) });
    }
  }
  return { dtype: FLOATS.get(tensor.dataType) ?? "other", shape };
}

/**
 * Reads an initializer's bytes. Their number is not checked for "other" types.
 * @throws FormatError, SourceError when there are more or fewer than the shape needs, a type is not read, or a file is
 *   missing
 */
export async function readTensor(
  tensor: TensorProto,
  file: string,
  external?: OpenExternal,
  options?: ReadOptions,
): Promise<TensorBytes> {
  const type = tensorType(tensor, file);
  const expected = type.dtype === "other" ? undefined : BYTES[type.dtype] * elementsOf(type.shape);
  const checkLength = (found: number): void => {
    if (expected === undefined || found === expected) return;
    const what = `${type.dtype} [${type.shape.join(", ")}]`;
    throw new FormatError(`${what} needs ${expected} bytes, found ${found}: damaged, export the model again`, {
      file,
      part: partOf(tensor),
    });
  };
  if (tensor.dataLocation !== EXTERNAL) {
    const data = embedded(tensor, file, type);
    checkLength(data.length);
    return { ...type, data };
  }
  const bits = INTEGERS.get(tensor.dataType)?.bits;
  const ofIntegers = bits && Math.ceil((bits * elementsOf(type.shape)) / 8);
  const { location, offset, length } = placeOf(tensor, file, expected ?? ofIntegers);
  checkLength(length);
  if (!external) {
    const message = `${partOf(tensor)} lies in the file "${location}"; give that with the option \`external\``;
    throw new SourceError(message, { file });
  }
  const source = await external(location);
  return { ...type, data: await source.read(offset, length, options) };
}

function embedded(tensor: TensorProto, file: string, { dtype, shape }: OnnxTensorType): Uint8Array {
  const { rawData, floatData, int32Data, dataType } = tensor;
  if (rawData.length > 0 || shape.includes(0)) return rawData;
  const size = dtype === "other" ? (INTEGERS.get(dataType)?.bits ?? 0) / 8 : BYTES[dtype];
  if (size < 1) {
    const message = `its data type ${dataType} is read from raw_data only; save the model with ONNX's tools`;
    throw new FormatError(message, { file, part: partOf(tensor) });
  }
  const list = dtype === "f32" ? floatData : int32Data;
  const data = new Uint8Array(list.length * size);
  const view = new DataView(data.buffer);
  for (const [i, value] of list.entries()) {
    if (dtype === "f32") view.setFloat32(4 * i, value, true);
    // The smaller integer, or the half, is in the low bits of the int32.
    else if (size === 1) view.setUint8(i, value);
    else if (size === 2) view.setUint16(2 * i, value, true);
    else view.setInt32(4 * i, value, true);
  }
  return data;
}

/** Range of external data. @param expected length where none is given */
function placeOf(tensor: TensorProto, file: string, expected: number | undefined) {
  const entries = new Map(tensor.externalData.map(({ key, value }) => [key, value]));
  const location = entries.get("location") ?? "";
  const offset = Number(entries.get("offset") ?? 0);
  const length = Number(entries.get("length") ?? expected);
  if (location === "" || ![offset, length].every((value) => Number.isSafeInteger(value) && value >= 0)) {
    const found = [...entries].map(([key, value]) => `${key} "${value}"`).join(", ") || "nothing";
    throw new FormatError(`its external data need a location, an offset ≥ 0 and a length ≥ 0, found ${found}`, {
      file,
      part: partOf(tensor),
    });
  }
  return { location, offset, length };
}
