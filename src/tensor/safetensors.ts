/**
 * The safetensors format (github.com/huggingface/safetensors, "Format"): 8 bytes of header length, a JSON header, raw
 * little-endian tensors. The reader trusts nothing: every rule of the reference's `validate` is checked before a tensor
 * is read. It does not know what the tensors mean; writing is `safetensors-writer.ts`.
 */

import { FormatError, SourceError } from "../errors.ts";
import type { ByteSource, ReadOptions } from "../source.ts";
import { fromUtf8 } from "../text.ts";
import { bf16ToF32, f16ToF32 } from "./dtypes.ts";
import { isFloatDtype, parseJson, show, type TensorFile, type TensorInfo } from "./tensor-file.ts";

/** Where one tensor lies. */
export interface SafetensorsTensor extends TensorInfo {
  /** Counted from the beginning of the file. */
  readonly byteOffset: number;
  readonly byteLength: number;
}

/** An opened file: names and places of its tensors, values on demand. */
export interface SafetensorsFile extends TensorFile {
  /** Tensors in the order of the header. */
  readonly tensors: ReadonlyMap<string, SafetensorsTensor>;
  /** `__metadata__` of the header. */
  readonly metadata: ReadonlyMap<string, string>;
  /**
   * The tensor's bytes, as they are in the file. May be a view of shared memory: do not write to it.
   * @throws FormatError when there is no such tensor; SourceError when the bytes cannot be had
   */
  read(name: string, options?: ReadOptions): Promise<Uint8Array>;
}

/** Cap of the reference implementation; guards against allocating what a damaged length field asks for. */
const MAX_HEADER_BYTES = 100_000_000;

/** Bits of one element, by dtype. */
export const SAFETENSORS_BITS: ReadonlyMap<string, number> = new Map([
  ...["F64", "I64", "U64", "C64"].map((dtype) => [dtype, 64] as const),
  ...["F32", "I32", "U32"].map((dtype) => [dtype, 32] as const),
  ...["F16", "BF16", "I16", "U16"].map((dtype) => [dtype, 16] as const),
  ...["F8_E5M2", "F8_E4M3", "F8_E8M0", "I8", "U8", "BOOL"].map((dtype) => [dtype, 8] as const),
  ...["F6_E2M3", "F6_E3M2"].map((dtype) => [dtype, 6] as const),
  ["F4", 4],
]);

/** Bytes of a tensor, or undefined when it is not a whole number of bytes or not a safe integer. */
export function tensorByteLength(bits: number, shape: readonly number[]): number | undefined {
  let count = 1;
  for (const size of shape) {
    count *= size;
    if (!Number.isSafeInteger(count)) return undefined;
  }
  const total = count * bits;
  return Number.isSafeInteger(total) && total % 8 === 0 ? total / 8 : undefined;
}

/**
 * Reads and checks the header; tensors are read later, one range each.
 * @throws FormatError when a rule of the format is broken, naming the tensor, what was expected and what was found
 * @throws SourceError when the bytes cannot be had
 */
export async function openSafetensors(source: ByteSource, options?: ReadOptions): Promise<SafetensorsFile> {
  const file = source.name;
  const fail = (part: string, message: string, cause?: unknown): FormatError =>
    new FormatError(message, { file, part, cause });

  if (source.byteLength !== undefined && source.byteLength < 8) {
    throw fail("header", `has ${source.byteLength} bytes, a safetensors file has at least 8; download it again`);
  }
  const prefix = await source.read(0, 8, options);
  const byteLength = source.byteLength;
  if (byteLength === undefined) throw new SourceError("does not say its size after the first read", { file });

  const prefixView = new DataView(prefix.buffer, prefix.byteOffset, 8);
  const headerLength = prefixView.getUint32(0, true) + prefixView.getUint32(4, true) * 2 ** 32;
  if (headerLength > MAX_HEADER_BYTES) {
    throw fail("header", `is larger than the ${MAX_HEADER_BYTES} bytes that are allowed; not a safetensors file`);
  }
  if (8 + headerLength > byteLength) {
    const end = 8 + headerLength;
    throw fail("header", `ends at byte ${end}, but the file has ${byteLength}; truncated, download it again`);
  }
  const header = parseHeader(await source.read(8, headerLength, options), fail);

  const dataStart = 8 + headerLength;
  const tensors = new Map<string, SafetensorsTensor>();
  let metadata: ReadonlyMap<string, string> = new Map();
  for (const [name, value] of Object.entries(header)) {
    if (name === "__metadata__") metadata = checkMetadata(value, fail);
    else tensors.set(name, checkTensor(name, value, dataStart, fail));
  }
  checkCoverage(tensors, dataStart, byteLength, fail);

  const find = (name: string): SafetensorsTensor => {
    const tensor = tensors.get(name);
    if (tensor === undefined) throw fail(`tensor ${name}`, `is not in the file, which holds ${tensors.size} tensors`);
    return tensor;
  };
  const read = async (name: string, readOptions?: ReadOptions): Promise<Uint8Array> => {
    const { byteOffset, byteLength: length } = find(name);
    return length === 0 ? new Uint8Array(0) : source.read(byteOffset, length, readOptions);
  };
  return {
    name: file,
    byteLength,
    tensors,
    metadata,
    read,
    async readF32(name, readOptions) {
      const { dtype } = find(name);
      if (!isFloatDtype(dtype)) {
        throw fail(`tensor ${name}`, `is ${dtype}, expected F32, F16, BF16 or F64; convert it to one of these`);
      }
      return decodeFloats(dtype, await read(name, readOptions));
    },
  };
}

type Fail = (part: string, message: string, cause?: unknown) => FormatError;

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function parseHeader(bytes: Uint8Array, fail: Fail): Record<string, unknown> {
  if (bytes[0] !== 0x7b) throw fail("header", `does not begin with "{"; not a safetensors file`);
  let text: string;
  try {
    text = fromUtf8(bytes);
  } catch (cause) {
    throw fail("header", "is not UTF-8; damaged, download it again", cause);
  }
  let header: unknown;
  try {
    header = parseJson(text);
  } catch (cause) {
    throw fail("header", `${(cause as Error).message}; damaged, download it again`, cause);
  }
  if (!isObject(header)) throw fail("header", "is not a JSON object; not a safetensors file");
  return header;
}

function checkMetadata(value: unknown, fail: Fail): Map<string, string> {
  const metadata = new Map<string, string>();
  if (!isObject(value)) throw fail("__metadata__", "is not a JSON object");
  for (const [key, text] of Object.entries(value)) {
    if (typeof text !== "string") throw fail("__metadata__", `${key} is ${show(text)}, expected a string`);
    metadata.set(key, text);
  }
  return metadata;
}

export function isSize(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 0;
}

function checkTensor(name: string, value: unknown, dataStart: number, fail: Fail): SafetensorsTensor {
  const part = `tensor ${name}`;
  if (!isObject(value)) throw fail(part, `is ${show(value)}, expected {dtype, shape, data_offsets}`);
  const { dtype, shape, data_offsets: offsets } = value;
  const bits = typeof dtype === "string" ? SAFETENSORS_BITS.get(dtype) : undefined;
  if (bits === undefined) {
    throw fail(part, `has dtype ${show(dtype)}, expected one of ${[...SAFETENSORS_BITS.keys()].join(", ")}`);
  }
  if (!Array.isArray(shape) || !shape.every(isSize)) {
    throw fail(part, `has shape ${show(shape)}, expected an array of integers ≥ 0`);
  }
  if (!Array.isArray(offsets) || offsets.length !== 2 || !offsets.every(isSize) || offsets[0]! > offsets[1]!) {
    throw fail(part, `has data_offsets ${show(offsets)}, expected [begin, end] with 0 ≤ begin ≤ end`);
  }
  const expected = tensorByteLength(bits, shape);
  const found = offsets[1]! - offsets[0]!;
  if (expected === undefined) {
    throw fail(part, `${dtype} [${shape.join(", ")}] overflows or is not a whole number of bytes; save the file again`);
  }
  if (expected !== found) {
    throw fail(part, `${dtype} [${shape.join(", ")}] takes ${expected} bytes, but its data_offsets span ${found}`);
  }
  return { dtype: dtype as string, shape, byteOffset: dataStart + offsets[0]!, byteLength: found };
}

/** Tensors lie one after another, without overlap or hole, up to the last byte: no byte is hidden or read twice. */
function checkCoverage(
  tensors: ReadonlyMap<string, SafetensorsTensor>,
  dataStart: number,
  byteLength: number,
  fail: Fail,
): void {
  const inOrder = [...tensors].sort(([, a], [, b]) => a.byteOffset - b.byteOffset || a.byteLength - b.byteLength);
  let end = dataStart;
  for (const [name, tensor] of inOrder) {
    if (tensor.byteOffset !== end) {
      const what = tensor.byteOffset < end ? "it overlaps the one before" : "there is a hole before it";
      const begins = `begins at byte ${tensor.byteOffset}, expected ${end}`;
      throw fail(`tensor ${name}`, `${begins}: ${what}; save the file again`);
    }
    end += tensor.byteLength;
  }
  if (end > byteLength) {
    throw fail("tensors", `end at byte ${end}, but the file has ${byteLength}; truncated, download it again`);
  }
  if (end < byteLength) {
    const extra = byteLength - end;
    throw fail("tensors", `end at byte ${end}, but ${extra} more bytes follow; damaged, download the file again`);
  }
}

/** Little-endian F32, F64, F16 or BF16 as f32. */
export function decodeFloats(dtype: string, bytes: Uint8Array): Float32Array<ArrayBuffer> {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const count = bytes.byteLength / (SAFETENSORS_BITS.get(dtype)! / 8);
  const out = new Float32Array(count);
  if (dtype === "F32") for (let i = 0; i < count; i++) out[i] = view.getFloat32(4 * i, true);
  else if (dtype === "F64") for (let i = 0; i < count; i++) out[i] = view.getFloat64(8 * i, true);
  else if (dtype === "F16") for (let i = 0; i < count; i++) out[i] = f16ToF32(view.getUint16(2 * i, true));
  else for (let i = 0; i < count; i++) out[i] = bf16ToF32(view.getUint16(2 * i, true));
  return out;
}
