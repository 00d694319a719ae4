/**
 * The part of ONNX's schema (onnx-ml.proto of ONNX 1.23) that this package reads and writes, and the wire format of protocol buffers.
 * Fields that are left out here stay with their message and are written back as they were. A general library for protocol buffers takes a
 * third of a session's bundle, for these eleven messages.
 */
import { fromUtf8, toUtf8 } from "../text.ts";

/** Fields that the schema does not name, tags included. */
interface Proto {
  $unknown?: Uint8Array[] | undefined;
}

export interface ModelProto extends Proto {
  irVersion: bigint;
  producerName: string;
  producerVersion: string;
  graph?: GraphProto | undefined;
  opsetImport: OperatorSetIdProto[];
  metadataProps: StringStringEntryProto[];
}

export interface GraphProto extends Proto {
  node: NodeProto[];
  name: string;
  initializer: TensorProto[];
  input: ValueInfoProto[];
  output: ValueInfoProto[];
  valueInfo: ValueInfoProto[];
}

export interface NodeProto extends Proto {
  input: string[];
  output: string[];
  name: string;
  opType: string;
  attribute: AttributeProto[];
  domain: string;
  metadataProps: StringStringEntryProto[];
}

export interface AttributeProto extends Proto {
  name: string;
  f: number;
  i: bigint;
  s: Uint8Array;
  t?: TensorProto | undefined;
  g?: GraphProto | undefined;
  floats: number[];
  ints: bigint[];
  strings: Uint8Array[];
  graphs: GraphProto[];
  type: number;
}

export interface TensorProto extends Proto {
  dims: bigint[];
  dataType: number;
  floatData: number[];
  int32Data: number[];
  name: string;
  rawData: Uint8Array;
  externalData: StringStringEntryProto[];
  dataLocation: number;
}

export interface ValueInfoProto extends Proto {
  name: string;
  type?: TypeProto | undefined;
}

export interface TypeProto extends Proto {
  value: { case: "tensorType"; value: TensorType } | { case: undefined; value?: undefined };
}

interface TensorType extends Proto {
  elemType: number;
  shape?: TensorShapeProto | undefined;
}

interface TensorShapeProto extends Proto {
  dim: Dimension[];
}

interface Dimension extends Proto {
  value:
    | { case: "dimValue"; value: bigint }
    | { case: "dimParam"; value: string }
    | { case: undefined; value?: undefined };
}

export interface OperatorSetIdProto extends Proto {
  domain: string;
  version: bigint;
}

export interface StringStringEntryProto extends Proto {
  key: string;
  value: string;
}

type Scalar = "int32" | "int64" | "float" | "string" | "bytes";

/** A "case" is stored as `value: { case: NAME, value }`. */
interface Field {
  readonly number: number;
  readonly name: string;
  readonly type: Scalar | (() => Schema);
  readonly kind: "one" | "list" | "packed" | "case";
}

/** The fields of a message, in the order of their numbers. */
export interface Schema<M extends Proto = Proto> {
  readonly fields: readonly Field[];
  readonly byNumber: ReadonlyMap<number, Field>;
  /** What a message has where a field is missing: its prototype. A field that is the message's own was given, and is written. */
  readonly defaults: object;
  /** Never present: ties the schema to the type. */
  readonly message?: M;
}

const DEFAULTS = { int32: 0, int64: 0n, float: 0, string: "", bytes: new Uint8Array(0) };

function schema<M extends Proto>(
  fields: Readonly<Record<string, readonly [number: number, type: Field["type"], kind?: Field["kind"]]>>,
): Schema<M> {
  const all = Object.entries(fields).map(([name, [number, type, kind = "one"]]) => ({ number, name, type, kind }));
  const defaults: Record<string, unknown> = {};
  for (const { name, type, kind } of all)
    if (kind === "case") defaults["value"] = { case: undefined };
    else if (kind === "one" && typeof type === "string") defaults[name] = DEFAULTS[type];
  return { fields: all, byNumber: new Map(all.map((field) => [field.number, field])), defaults };
}

const EntrySchema: Schema<StringStringEntryProto> = schema({ key: [1, "string"], value: [2, "string"] });

export const OperatorSetIdProtoSchema: Schema<OperatorSetIdProto> = schema({
  domain: [1, "string"],
  version: [2, "int64"],
});

export const DimensionSchema: Schema<Dimension> = schema({
  dimValue: [1, "int64", "case"],
  dimParam: [2, "string", "case"],
});

const ShapeSchema: Schema<TensorShapeProto> = schema({ dim: [1, () => DimensionSchema, "list"] });

const TensorTypeSchema: Schema<TensorType> = schema({ elemType: [1, "int32"], shape: [2, () => ShapeSchema] });

const TypeSchema: Schema<TypeProto> = schema({ tensorType: [1, () => TensorTypeSchema, "case"] });

export const ValueInfoProtoSchema: Schema<ValueInfoProto> = schema({
  name: [1, "string"],
  type: [2, () => TypeSchema],
});

export const TensorProtoSchema: Schema<TensorProto> = schema({
  dims: [1, "int64", "list"],
  dataType: [2, "int32"],
  floatData: [4, "float", "packed"],
  int32Data: [5, "int32", "packed"],
  name: [8, "string"],
  rawData: [9, "bytes"],
  externalData: [13, () => EntrySchema, "list"],
  dataLocation: [14, "int32"],
});

export const AttributeProtoSchema: Schema<AttributeProto> = schema({
  name: [1, "string"],
  f: [2, "float"],
  i: [3, "int64"],
  s: [4, "bytes"],
  t: [5, () => TensorProtoSchema],
  g: [6, () => GraphProtoSchema],
  floats: [7, "float", "list"],
  ints: [8, "int64", "list"],
  strings: [9, "bytes", "list"],
  graphs: [11, () => GraphProtoSchema, "list"],
  type: [20, "int32"],
});

export const NodeProtoSchema: Schema<NodeProto> = schema({
  input: [1, "string", "list"],
  output: [2, "string", "list"],
  name: [3, "string"],
  opType: [4, "string"],
  attribute: [5, () => AttributeProtoSchema, "list"],
  domain: [7, "string"],
  metadataProps: [9, () => EntrySchema, "list"],
});

export const GraphProtoSchema: Schema<GraphProto> = schema({
  node: [1, () => NodeProtoSchema, "list"],
  name: [2, "string"],
  initializer: [5, () => TensorProtoSchema, "list"],
  input: [11, () => ValueInfoProtoSchema, "list"],
  output: [12, () => ValueInfoProtoSchema, "list"],
  valueInfo: [13, () => ValueInfoProtoSchema, "list"],
});

export const ModelProtoSchema: Schema<ModelProto> = schema({
  irVersion: [1, "int64"],
  producerName: [2, "string"],
  producerVersion: [3, "string"],
  graph: [7, () => GraphProtoSchema],
  opsetImport: [8, () => OperatorSetIdProtoSchema, "list"],
  metadataProps: [14, () => EntrySchema, "list"],
});

/** Values that `create` accepts for a field. */
type InitField<F> = F extends Uint8Array | bigint | boolean | string | number | undefined
  ? F
  : F extends readonly (infer Item)[]
    ? InitField<Item>[]
    : F extends { case: infer Case extends string; value: infer Value }
      ? { case: Case; value: InitField<Value> }
      : F extends Proto
        ? Init<F>
        : F;

/** A message, or some of its fields. */
type Init<M extends Proto> = M | { [Key in Exclude<keyof M, keyof Proto>]?: InitField<M[Key]> };

type Fields = Record<string, unknown>;

/** Makes a message of the given fields; the others have default values. */
export function create<M extends Proto>(schema: Schema<M>, init?: NoInfer<Init<M>>): M {
  const message: Fields = Object.create(schema.defaults);
  const given = (init ?? {}) as Fields;
  for (const { name, type, kind } of schema.fields) {
    const made = (value: unknown): unknown => {
      if (typeof type === "string" || Object.getPrototypeOf(value) === type().defaults) return value;
      return create(type(), value as Proto);
    };
    if (kind === "case") {
      const { value: chosen } = given as { value?: { case?: string; value?: unknown } };
      if (chosen?.case === name) message["value"] = { case: name, value: made(chosen.value) };
      continue;
    }
    const value = given[name];
    if (kind === "one") {
      if (value !== undefined) message[name] = made(value);
    } else {
      const list = (value ?? []) as unknown[];
      message[name] = typeof type === "string" ? list : list.map(made);
    }
  }
  return message as M;
}

/** Types of fields on the wire. */
const VARINT = 0;
const FIXED64 = 1;
const BYTES = 2;
const FIXED32 = 5;

function wireOf(type: Field["type"]): number {
  if (type === "int32" || type === "int64") return VARINT;
  return type === "float" ? FIXED32 : BYTES;
}

/** Most messages inside each other, as in other readers of protocol buffers. */
const DEEPEST = 100;

/**
 * Reads a message. Its `bytes` fields are views of `bytes`.
 * @throws Error when the bytes are no such message
 */
export function fromBinary<M extends Proto>(schema: Schema<M>, bytes: Uint8Array): M {
  return new Reader(bytes).message(schema, bytes.length, create(schema), 0) as M;
}

class Reader {
  readonly #bytes: Uint8Array;
  readonly #view: DataView;
  #at = 0;
  #high = 0;

  constructor(bytes: Uint8Array) {
    this.#bytes = bytes;
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  }

  message({ byNumber }: Schema, end: number, into: Proto, depth: number): Proto {
    if (depth > DEEPEST) throw new Error(`its messages lie more than ${DEEPEST} deep`);
    const message = into as Fields;
    while (this.#at < end) {
      const start = this.#at;
      const tag = this.#varint(end);
      const number = tag >>> 3;
      const wire = tag & 7;
      const field = byNumber.get(number);
      const list = field?.kind === "list" || field?.kind === "packed";
      const isPacked = list && wire === BYTES && wireOf(field.type) !== BYTES;
      if (!field || (wire !== wireOf(field.type) && !isPacked)) {
        this.#skip(number, wire, end);
        into.$unknown ??= [];
        into.$unknown.push(this.#bytes.subarray(start, this.#at));
        continue;
      }
      const { name, type, kind } = field;
      if (list) {
        const values = message[name] as unknown[];
        if (isPacked)
          for (const stop = this.#length(end); this.#at < stop; ) values.push(this.#value(type, stop, depth));
        else values.push(this.#value(type, end, depth));
      } else if (kind === "case") message["value"] = { case: name, value: this.#value(type, end, depth) };
      // A message that comes in several parts is one.
      else message[name] = this.#value(type, end, depth, message[name]);
    }
    return into;
  }

  #value(type: Field["type"], end: number, depth: number, old?: unknown): unknown {
    if (type === "int32" || type === "int64") {
      const low = this.#varint(end);
      if (type === "int32") return low;
      return this.#high === 0 ? BigInt(low >>> 0) : (BigInt(this.#high) << 32n) | BigInt(low >>> 0);
    }
    if (type === "float") return this.#view.getFloat32(this.#take(4, end), true);
    const stop = this.#length(end);
    if (typeof type !== "string")
      return this.message(type(), stop, (old as Proto | undefined) ?? create(type()), depth + 1);
    const start = this.#take(stop - this.#at, stop);
    return type === "bytes" ? this.#bytes.subarray(start, stop) : this.#text(start, stop);
  }

  /** Reads a number of at most 64 bits. @returns the low half, signed; `#high` is the other */
  #varint(end: number): number {
    let low = 0;
    let high = 0;
    for (let shift = 0; shift < 70; shift += 7) {
      const byte = this.#bytes[this.#take(1, end)]!;
      const bits = byte & 127;
      if (shift < 32) low |= bits << shift;
      if (shift >= 28) high |= shift < 32 ? bits >> (32 - shift) : bits << (shift - 32);
      if (byte >= 128) continue;
      this.#high = high;
      return low;
    }
    throw new Error("a number has more than 64 bits");
  }

  /** @returns where the bytes end whose length comes here */
  #length(end: number): number {
    const low = this.#varint(end);
    const stop = this.#at + (low >>> 0);
    if (this.#high !== 0 || stop > end) throw new Error(`${stop - end} bytes are missing`);
    return stop;
  }

  /** Names are short and ASCII: a decoder would take most of the time that reading takes. */
  #text(start: number, end: number): string {
    let text = "";
    for (let i = start; i < end && end - start < 128; i++) {
      const byte = this.#bytes[i]!;
      if (byte > 127) break;
      text += String.fromCharCode(byte);
    }
    return text.length === end - start ? text : textOf(this.#bytes.subarray(start, end));
  }

  /** Passes over bytes. @returns where they began */
  #take(count: number, end: number): number {
    const at = this.#at;
    if (at + count > end) throw new Error(`${at + count - end} bytes are missing`);
    this.#at = at + count;
    return at;
  }

  #skip(number: number, wire: number, end: number): void {
    if (number === 0) throw new Error("a field has no number");
    if (wire === VARINT) this.#varint(end);
    else if (wire === FIXED64) this.#take(8, end);
    else if (wire === FIXED32) this.#take(4, end);
    else if (wire === BYTES) this.#at = this.#length(end);
    else throw new Error(`a field has the wire type ${wire}`);
  }
}

/** Writes a message: fields in the order of their numbers, then those that the schema does not name. */
export function toBinary<M extends Proto>(schema: Schema<M>, message: M): Uint8Array<ArrayBuffer> {
  // Two passes: memory for a model's weights is not to be taken twice.
  const size = new Writer(undefined).message(schema, message);
  const bytes = new Uint8Array(size);
  new Writer(bytes).message(schema, message);
  return bytes;
}

/** Writes from the end, so that a message's length is known when it is due. Without bytes, it counts. */
class Writer {
  readonly #bytes: Uint8Array | undefined;
  #at: number;

  constructor(bytes: Uint8Array | undefined) {
    this.#bytes = bytes;
    this.#at = bytes?.length ?? 0;
  }

  /** @returns how many bytes it takes */
  message({ fields }: Schema, from: Proto): number {
    const end = this.#at;
    const message = from as Fields;
    for (const bytes of [...(from.$unknown ?? [])].reverse()) this.#put(bytes);
    for (let i = fields.length - 1; i >= 0; i--) {
      const { number, name, type, kind } = fields[i]!;
      let value = Object.hasOwn(message, name) ? message[name] : undefined;
      if (kind === "case") {
        const chosen = message["value"] as { case?: string; value?: unknown } | undefined;
        value = chosen?.case === name ? chosen.value : undefined;
      }
      if (value === undefined) continue;
      const values = kind === "list" || kind === "packed" ? (value as unknown[]) : [value];
      if (kind === "packed" && values.length === 0) continue;
      const stop = this.#at;
      for (let v = values.length - 1; v >= 0; v--) {
        this.#value(type, values[v]);
        if (kind !== "packed") this.#varint(number * 8 + wireOf(type));
      }
      if (kind !== "packed") continue;
      this.#varint(stop - this.#at);
      this.#varint(number * 8 + BYTES);
    }
    return end - this.#at;
  }

  #value(type: Field["type"], value: unknown): void {
    if (typeof type !== "string") this.#varint(this.message(type(), value as Proto));
    else if (type === "float") this.#put(new Uint8Array(Float32Array.of(value as number).buffer));
    else if (type === "int32" || type === "int64") this.#varint(value as number | bigint);
    else {
      const bytes = type === "bytes" ? (value as Uint8Array) : bytesOf(value as string);
      this.#put(bytes);
      this.#varint(bytes.length);
    }
  }

  #put(bytes: ArrayLike<number>): void {
    this.#at -= bytes.length;
    this.#bytes?.set(bytes, this.#at);
  }

  #varint(value: number | bigint): void {
    const bytes: number[] = [];
    let rest = Number(value);
    if (rest < 0 || rest > Number.MAX_SAFE_INTEGER) {
      let large = BigInt.asUintN(64, BigInt(value));
      for (; large > 127n; large >>= 7n) bytes.push(Number(large & 127n) | 128);
      rest = Number(large);
    }
    for (; rest > 127; rest = Math.floor(rest / 128)) bytes.push((rest % 128) | 128);
    bytes.push(rest);
    this.#put(bytes);
  }
}

/** The decoder of most engines replaces what is not UTF-8; some engines have none. */
function textOf(bytes: Uint8Array): string {
  if (typeof TextDecoder === "undefined") return fromUtf8(bytes);
  decoder ??= new TextDecoder("utf-8", { ignoreBOM: true });
  return decoder.decode(bytes);
}

let decoder: TextDecoder | undefined;

function bytesOf(text: string): Uint8Array {
  return typeof TextEncoder === "undefined" ? toUtf8(text) : new TextEncoder().encode(text);
}
