/**
 * Reads an `.onnx_adapter` of ONNX Runtime into the canonical form. Its parameters are inputs of a model, [in, r] and
 * [r, out], with the exporter's names; names that end in `lora_A.weight` and `lora_B.weight`, as Olive and PEFT write
 * them, are read. The format has no scale, which is part of a factor. Portable: folders are read in folder.ts.
 */

import { FormatError } from "../errors.ts";
import type { ByteSource, ReadOptions } from "../source.ts";
import { elementsOf } from "../tensor/dtypes.ts";
import { decodeFloats, isFloatDtype, type TensorFile, type TensorInfo } from "../tensor/safetensors.ts";
import { transpose } from "../tensor/term.ts";
import {
  type Adapter,
  type AdapterFile,
  checkAdapter,
  type Exportable,
  type FactorMatrix,
  f32Bytes,
  factorsOf,
  openFile,
  readAdapterFile,
  refuseModule,
  refuseSaved,
} from "./adapter.ts";
import { assembleLora, type LoraKey, sortTensors, transposeMatrices } from "./named-lora.ts";
import { parsePeftKey } from "./peft.ts";

/**
 * Opens an adapter: checks the names, shapes and types of all parameters. Values are read, and checked, when a module's
 * `read` is called.
 * @throws AdapterError naming the parameter that is no factor of a LoRA, and what to do
 * @throws FormatError when the file breaks its format; SourceError when it cannot be read
 * @example
 * const adapter = await readOnnxAdapter({ id: "rhymes", file: "rhymes.onnx_adapter", tensors: "rhymes.onnx_adapter" });
 */
export async function readOnnxAdapter(files: AdapterFile): Promise<Adapter> {
  return readAdapterFile(
    files,
    (input) => openFile(input, openOnnxAdapter, "an adapter of ONNX Runtime"),
    (found) => {
      const tensors = transposeMatrices(found, /./);
      const expected =
        "expected names that end in lora_A.weight and lora_B.weight, with the module in front. Names of inputs are up to who " +
        "exported the model: give the adapter that the file was made from";
      const parts = sortTensors(tensors, parseKey, () => expected);
      return assembleLora(tensors, parts, () => 1);
    },
  );
}

function parseKey(name: string): LoraKey | undefined {
  const { name: module = "", part } = parsePeftKey(name) ?? {};
  return part === "A" || part === "B" ? { module, part } : undefined;
}

// The `.onnx_adapter` format of ONNX Runtime (onnxruntime/lora/adapter_format/adapter_schema.fbs): a FlatBuffer of
// named tensors, which are inputs of a model. Trusts nothing: every offset is checked against the file before it is
// followed.

/** "TORT", of every file; versions that are read. */
const IDENTIFIER = "TORT";
const VERSION = 1;
const MOST_DIMS = 8;
const MOST_NAME_BYTES = 4096;

/** Names of ONNX's tensor types, as safetensors has them, and bytes of an element. */
const TYPES: ReadonlyMap<number, readonly [dtype: string, bytes: number]> = new Map([
  [1, ["F32", 4]],
  [10, ["F16", 2]],
  [11, ["F64", 8]],
  [16, ["BF16", 2]],
]);

/** Fields of the tables, in the order of the schema. */
const [FORMAT_VERSION, , , PARAMETERS] = [0, 1, 2, 3];
const [NAME, DIMS, TYPE, DATA] = [0, 1, 2, 3];

interface Parameter extends TensorInfo {
  readonly byteOffset: number;
  readonly byteLength: number;
}

function flatBuffer(source: ByteSource, byteLength: number, options: ReadOptions | undefined) {
  const fail = (message: string): FormatError =>
    new FormatError(`${message}; damaged, save the adapter again`, { file: source.name, part: "FlatBuffer" });
  const bytes = async (at: number, length: number): Promise<DataView> => {
    if (!(at >= 0 && at + length <= byteLength)) throw fail(`points at byte ${at}, but the file has ${byteLength}`);
    const found = length === 0 ? new Uint8Array(0) : await source.read(at, length, options);
    return new DataView(found.buffer, found.byteOffset, found.byteLength);
  };
  const u32 = async (at: number): Promise<number> => (await bytes(at, 4)).getUint32(0, true);
  const follow = async (at: number): Promise<number> => at + (await u32(at));
  /** Places of a table's fields; undefined for one that is left out. */
  const fields = async (table: number): Promise<(field: number) => number | undefined> => {
    const vtable = table - (await bytes(table, 4)).getInt32(0, true);
    const size = (await bytes(vtable, 2)).getUint16(0, true);
    if (size < 4 || size % 2 !== 0) throw fail(`the table at byte ${table} has a wrong list of fields`);
    const list = await bytes(vtable, size);
    return (field) => {
      const at = 4 + 2 * field;
      const offset = at + 2 <= size ? list.getUint16(at, true) : 0;
      return offset === 0 ? undefined : table + offset;
    };
  };
  /** A vector's elements: their number, and where the first is. */
  const vector = async (at: number | undefined, size: number): Promise<{ length: number; first: number }> => {
    if (at === undefined) return { length: 0, first: 0 };
    const start = await follow(at);
    const length = await u32(start);
    if (start + 4 + length * size > byteLength) throw fail(`a list at byte ${start} ends behind the file`);
    return { length, first: start + 4 };
  };
  return { fail, bytes, u32, follow, fields, vector };
}

/**
 * Reads and checks everything but the values.
 * @throws FormatError when a rule of the format is broken, SourceError when the bytes cannot be had
 */
export async function openOnnxAdapter(source: ByteSource, options?: ReadOptions): Promise<TensorFile> {
  const { name, byteLength = 0 } = source;
  const file = flatBuffer(source, byteLength, options);
  const refuse = (part: string, message: string): FormatError => new FormatError(message, { file: name, part });
  const start = byteLength < 8 ? undefined : await file.bytes(0, 8);
  const mark = start && String.fromCharCode(...[4, 5, 6, 7].map((at) => start.getUint8(at)));
  if (mark !== IDENTIFIER)
    throw refuse("header", `does not have "${IDENTIFIER}" at byte 4; not an adapter of ONNX Runtime`);
  const root = await file.fields(await file.follow(0));
  const version = root(FORMAT_VERSION) === undefined ? 0 : await file.u32(root(FORMAT_VERSION)!);
  if (version !== VERSION) throw refuse("header", `is of format version ${version}, expected ${VERSION}`);
  const list = await file.vector(root(PARAMETERS), 4);
  const tensors = new Map<string, Parameter>();
  for (let i = 0; i < list.length; i++) {
    const [key, parameter] = await readParameter(file, await file.follow(list.first + 4 * i), refuse);
    if (tensors.has(key)) throw refuse(`parameter ${key}`, "is there twice; save the adapter again");
    tensors.set(key, parameter);
  }
  return {
    name,
    byteLength,
    tensors,
    async readF32(key, readOptions) {
      const tensor = tensors.get(key);
      if (tensor === undefined) throw refuse(`parameter ${key}`, `is not in the file, which holds ${tensors.size}`);
      const { dtype, byteOffset, byteLength: length } = tensor;
      if (!isFloatDtype(dtype))
        throw refuse(`parameter ${key}`, `is of ${dtype}, expected FLOAT, FLOAT16, BFLOAT16 or DOUBLE; convert it`);
      return decodeFloats(dtype, length === 0 ? new Uint8Array(0) : await source.read(byteOffset, length, readOptions));
    },
  };
}

async function readParameter(
  file: ReturnType<typeof flatBuffer>,
  table: number,
  refuse: (part: string, message: string) => FormatError,
): Promise<[string, Parameter]> {
  const field = await file.fields(table);
  const text = await file.vector(field(NAME), 1);
  if (text.length === 0 || text.length > MOST_NAME_BYTES)
    throw file.fail(`a name has ${text.length} bytes, expected 1 to ${MOST_NAME_BYTES}`);
  const key = new TextDecoder().decode(await file.bytes(text.first, text.length));
  const dims = await file.vector(field(DIMS), 8);
  if (dims.length > MOST_DIMS)
    throw refuse(`parameter ${key}`, `has ${dims.length} dimensions, expected ${MOST_DIMS} at most`);
  const sizes = await file.bytes(dims.first, 8 * dims.length);
  const shape = Array.from({ length: dims.length }, (_, i) => Number(sizes.getBigInt64(8 * i, true)));
  const type = field(TYPE) === undefined ? 0 : await file.u32(field(TYPE)!);
  const data = await file.vector(field(DATA), 1);
  const [dtype, bytes] = TYPES.get(type) ?? [`ONNX type ${type}`, NaN];
  const expected = elementsOf(shape) * bytes;
  if (shape.some((size) => !Number.isSafeInteger(size) || size < 0) || (TYPES.has(type) && expected !== data.length))
    throw refuse(
      `parameter ${key}`,
      `${dtype} [${shape.join(", ")}] takes ${expected} bytes, but ${data.length} are there; save the adapter again`,
    );
  return [key, { dtype, shape, byteOffset: data.first, byteLength: data.length }];
}

/**
 * Makes the bytes of an .onnx_adapter file (f32), chunk by chunk: `MODULE.lora_A.weight` [in, r] and
 * `MODULE.lora_B.weight` [r, out]. Holds one adapter in memory.
 * @throws AdapterError for heads, biases, DoRA, convolutions and embeddings, which the format cannot hold
 */
export async function onnxAdapterFile(adapter: Exportable): Promise<AsyncIterable<Uint8Array>> {
  checkAdapter("onnxAdapterFile", adapter);
  refuseSaved(adapter, "an .onnx_adapter file");
  const entries: OnnxAdapterEntry[] = [];
  for (const module of adapter.modules.values()) {
    const { name, layout } = module;
    if (layout === "conv" || layout === "embedding")
      throw refuseModule(adapter, name, `is stored as ${layout}, which an .onnx_adapter file has no place for`);
    const { A, B, magnitude } = await factorsOf(module);
    if (magnitude)
      throw refuseModule(adapter, name, "has a magnitude (DoRA), which an .onnx_adapter file has no place for");
    entries.push(turned(`${name}.lora_A.weight`, A), turned(`${name}.lora_B.weight`, B));
  }
  return writeOnnxAdapter(entries);
}

function turned(name: string, { shape: [rows = 0, columns = 0], values }: FactorMatrix): OnnxAdapterEntry {
  return { name, shape: [columns, rows], bytes: f32Bytes(transpose(values, rows, columns)) };
}

interface OnnxAdapterEntry {
  readonly name: string;
  readonly shape: readonly number[];
  /** Little-endian f32. */
  readonly bytes: Uint8Array;
}

const FLOAT = 1;
/** FlatBuffers have signed offsets of 32 bits. */
const MOST_BYTES = 2 ** 31 - 1;
/**
 * All tables have four fields of 4 bytes: bytes of the list of their places, and of a table with the way to that list.
 */
const [VTABLE, TABLE] = [12, 20];

/** Place of elements of 8 bytes behind a length of 4: the elements lie at a multiple of 8. */
const align = (at: number): number => at + ((12 - (at % 8)) % 8);

/**
 * The bytes of an adapter of ONNX Runtime, chunk by chunk: tables and names, then each parameter's values.
 * @throws RangeError when they take 2 GiB or more
 */
async function* writeOnnxAdapter(entries: readonly OnnxAdapterEntry[]): AsyncGenerator<Uint8Array, void> {
  // Offset of the root, identifier, the list of fields of all tables, the root; the list of parameters, and their
  // tables.
  const fields = 8;
  const root = fields + VTABLE;
  const list = root + TABLE;
  const tables = list + 4 + 4 * entries.length;
  const head: number[] = Array(tables + TABLE * entries.length).fill(0);
  const u32 = (place: number, value: number): void => {
    for (let i = 0; i < 4; i++) head[place + i] = (value >>> (8 * i)) & 255;
  };
  /** An offset is counted from where it stands. */
  const point = (place: number, to: number): void => u32(place, to - place);
  const padTo = (length: number): void => {
    while (head.length < length) head.push(0);
  };
  point(0, root);
  for (let i = 0; i < 4; i++) head[4 + i] = IDENTIFIER.charCodeAt(i);
  for (const [i, value] of [VTABLE, TABLE, 4, 8, 12, 16].entries()) head[fields + 2 * i] = value;
  u32(root, root - fields);
  for (const place of [4, 8, 12]) u32(root + place, VERSION);
  point(root + 16, list);
  u32(list, entries.length);
  for (const [i, { name, shape }] of entries.entries()) {
    const table = tables + TABLE * i;
    point(list + 4 + 4 * i, table);
    u32(table, table - fields);
    const text = new TextEncoder().encode(name);
    padTo(4 * Math.ceil(head.length / 4));
    point(table + 4, head.length);
    u32(head.length, text.length);
    head.push(...text, 0);
    padTo(align(head.length));
    point(table + 8, head.length);
    u32(head.length, shape.length);
    for (const size of shape) {
      u32(head.length, size);
      u32(head.length, 0);
    }
    u32(table + 12, FLOAT);
  }
  const places: number[] = [];
  let end = head.length;
  for (const [i, { bytes }] of entries.entries()) {
    places.push(align(end));
    point(tables + TABLE * i + 16, places[i]!);
    end = places[i]! + 4 + bytes.length;
  }
  if (end > MOST_BYTES)
    throw new RangeError(`writeOnnxAdapter: ${end} bytes, ${MOST_BYTES} at most fit into the format`);
  padTo(places[0] ?? end);
  yield Uint8Array.from(head);
  for (const [i, { bytes }] of entries.entries()) {
    const length = new Uint8Array(4);
    new DataView(length.buffer).setUint32(0, bytes.length, true);
    yield length;
    yield bytes;
    const behind = places[i]! + 4 + bytes.length;
    yield new Uint8Array((places[i + 1] ?? behind) - behind);
  }
}
