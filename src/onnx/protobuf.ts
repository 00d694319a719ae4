/**
 * The part of ONNX's schema (onnx-ml.proto of ONNX 1.23) that this package reads and writes, and the wire format of
 * protocol buffers. Fields that are left out here stay with their message and are written back as they were. A general
 * library for protocol buffers takes a third of a session's bundle, for these eleven messages.
 */
import { fromUtf8, toUtf8 } from "../text.ts";

/** Fields that the schema does not name, tags included. */
interface Proto {
  $unknown?: Uint8Array[] | undefined;
}

export interface ModelProto extends Proto {
  irVersion: bigint;
  producerName: string;
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
  ints: bigint[];
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
  tensorType?: TensorType | undefined;
}

interface TensorType extends Proto {
  elemType: number;
  shape?: TensorShapeProto | undefined;
}

interface TensorShapeProto extends Proto {
  dim: Dimension[];
}

interface Dimension extends Proto {
  dimValue?: bigint | undefined;
  dimParam?: string | undefined;
}

export interface OperatorSetIdProto extends Proto {
  domain: string;
  version: bigint;
}

export interface StringStringEntryProto extends Proto {
  key: string;
  value: string;
}

/** Fields of each message: number, type and name. Members of a `oneof` are optional fields. */
const SCHEMA = `
ModelProto { 1 int64 irVersion, 2 string producerName, 7 GraphProto graph,
  8 repeated OperatorSetIdProto opsetImport, 14 repeated StringStringEntryProto metadataProps }
GraphProto { 1 repeated NodeProto node, 2 string name, 5 repeated TensorProto initializer,
  11 repeated ValueInfoProto input, 12 repeated ValueInfoProto output, 13 repeated ValueInfoProto valueInfo }
NodeProto { 1 repeated string input, 2 repeated string output, 3 string name, 4 string opType,
  5 repeated AttributeProto attribute, 7 string domain, 9 repeated StringStringEntryProto metadataProps }
AttributeProto { 1 string name, 2 float f, 3 int64 i, 4 bytes s, 5 TensorProto t, 6 GraphProto g,
  8 repeated int64 ints, 11 repeated GraphProto graphs, 20 int32 type }
TensorProto { 1 repeated int64 dims, 2 int32 dataType, 4 packed float floatData, 5 packed int32 int32Data,
  8 string name, 9 bytes rawData, 13 repeated StringStringEntryProto externalData, 14 int32 dataLocation }
ValueInfoProto { 1 string name, 2 TypeProto type }
TypeProto { 1 Tensor tensorType }
Tensor { 1 int32 elemType, 2 TensorShapeProto shape }
TensorShapeProto { 1 repeated Dimension dim }
Dimension { 1 optional int64 dimValue, 2 optional string dimParam }
OperatorSetIdProto { 1 string domain, 2 int64 version }
StringStringEntryProto { 1 string key, 2 string value }`;

interface Field {
  readonly number: number;
  readonly name: string;
  /** A scalar, or the name of a message. */
  readonly type: string;
  readonly kind: "" | "repeated" | "packed" | "optional";
}

/** The messages that are made and read by themselves. */
interface Messages {
  readonly ModelProto: ModelProto;
  readonly GraphProto: GraphProto;
  readonly NodeProto: NodeProto;
  readonly AttributeProto: AttributeProto;
  readonly TensorProto: TensorProto;
  readonly ValueInfoProto: ValueInfoProto;
  readonly OperatorSetIdProto: OperatorSetIdProto;
}

/** The fields of a message, in the order of their numbers. */
interface Schema {
  readonly fields: readonly Field[];
  readonly byNumber: ReadonlyMap<number, Field>;
  /**
   * Values of missing fields: the prototype of messages. A field that is the message's own was given, and is written.
   */
  readonly defaults: object;
}

const SCALARS: Readonly<Record<string, unknown>> = {
  int32: 0,
  int64: 0n,
  float: 0,
  string: "",
  bytes: new Uint8Array(0),
};

const SCHEMAS: ReadonlyMap<string, Schema> = new Map(
  [...SCHEMA.matchAll(/(\w+) \{([^}]*)\}/g)].map(([, message, body]) => {
    const found = [...body!.matchAll(/(\d+) (?:(repeated|packed|optional) )?(\w+) (\w+)/g)];
    const fields = found.map(
      ([, number, kind = "", type, name]) => ({ number: Number(number), name, type, kind }) as Field,
    );
    const defaults: Record<string, unknown> = {};
    for (const { name, type, kind } of fields) if (kind === "" && type in SCALARS) defaults[name] = SCALARS[type];
    return [message!, { fields, byNumber: new Map(fields.map((field) => [field.number, field])), defaults }];
  }),
);

/** Values that `create` accepts for a field. */
type InitField<F> = F extends Uint8Array | bigint | boolean | string | number | undefined
  ? F
  : F extends readonly (infer Item)[]
    ? InitField<Item>[]
    : F extends Proto
      ? Init<F>
      : F;

/** A message, or some of its fields. */
type Init<M extends Proto> = M | { [Key in Exclude<keyof M, keyof Proto>]?: InitField<M[Key]> };

type Fields = Record<string, unknown>;

function isList(kind: Field["kind"]): boolean {
  return kind === "repeated" || kind === "packed";
}

/** Makes a message of the given fields; the others have default values. */
export function create<Name extends keyof Messages>(name: Name, init: Init<Messages[Name]> = {}): Messages[Name] {
  return made(SCHEMAS.get(name)!, init) as Messages[Name];
}

function made(schema: Schema, init: object): Proto {
  const message: Fields = Object.create(schema.defaults);
  for (const { name, type, kind } of schema.fields) {
    const value = (init as Fields)[name] ?? (isList(kind) ? [] : undefined);
    if (value === undefined) continue;
    const inner = type in SCALARS ? undefined : SCHEMAS.get(type)!;
    const whole = (value: unknown): unknown =>
      !inner || Object.getPrototypeOf(value) === inner.defaults ? value : made(inner, value as Proto);
    message[name] = isList(kind) && inner ? (value as unknown[]).map(whole) : whole(value);
  }
  return message;
}

export const VARINT = 0;
export const FIXED64 = 1;
export const BYTES = 2;
export const FIXED32 = 5;

function wireOf(type: string): number {
  if (type === "int32" || type === "int64") return VARINT;
  return type === "float" ? FIXED32 : BYTES;
}

/** Most messages inside each other, as in other readers of protocol buffers. */
const DEEPEST = 100;

/** Reads a message, whose `bytes` fields are views of `bytes`. @throws Error when they are no such message */
export function fromBinary<Name extends keyof Messages>(name: Name, bytes: Uint8Array): Messages[Name] {
  const schema = SCHEMAS.get(name)!;
  return new Reader(bytes).message(schema, bytes.length, made(schema, {}), 0) as Messages[Name];
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
      const list = field !== undefined && isList(field.kind);
      const isPacked = list && wire === BYTES && wireOf(field.type) !== BYTES;
      if (!field || (wire !== wireOf(field.type) && !isPacked)) {
        this.#skip(number, wire, end);
        into.$unknown ??= [];
        into.$unknown.push(this.#bytes.subarray(start, this.#at));
        continue;
      }
      const { name, type } = field;
      if (list) {
        const values = message[name] as unknown[];
        if (isPacked)
          for (const stop = this.#length(end); this.#at < stop; ) values.push(this.#value(type, stop, depth));
        else values.push(this.#value(type, end, depth));
      }
      // A message that comes in several parts is one.
      else message[name] = this.#value(type, end, depth, message[name]);
    }
    return into;
  }

  #value(type: string, end: number, depth: number, old?: unknown): unknown {
    if (type === "int32" || type === "int64") {
      const low = this.#varint(end);
      if (type === "int32") return low;
      return this.#high === 0 ? BigInt(low >>> 0) : (BigInt(this.#high) << 32n) | BigInt(low >>> 0);
    }
    if (type === "float") return this.#view.getFloat32(this.#take(4, end), true);
    const stop = this.#length(end);
    const schema = SCHEMAS.get(type);
    if (schema) return this.message(schema, stop, (old as Proto | undefined) ?? made(schema, {}), depth + 1);
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
export function toBinary<Name extends keyof Messages>(name: Name, message: Messages[Name]): Uint8Array<ArrayBuffer> {
  const schema = SCHEMAS.get(name)!;
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

  /** @returns the number of bytes that it takes */
  message({ fields }: Schema, from: Proto): number {
    const end = this.#at;
    const message = from as Fields;
    for (const bytes of [...(from.$unknown ?? [])].reverse()) this.#put(bytes);
    for (let i = fields.length - 1; i >= 0; i--) {
      const { number, name, type, kind } = fields[i]!;
      const value = Object.hasOwn(message, name) ? message[name] : undefined;
      if (value === undefined) continue;
      const values = isList(kind) ? (value as unknown[]) : [value];
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

  #value(type: string, value: unknown): void {
    const schema = SCHEMAS.get(type);
    if (schema) this.#varint(this.message(schema, value as Proto));
    else if (type === "float") this.#put(new Uint8Array(Float32Array.of(value as number).buffer));
    else if (type === "int32" || type === "int64") this.#varint(value as number | bigint);
    else if (type === "string" && /^[ -~]*$/.test(value as string)) this.#ascii(value as string);
    else {
      const bytes = type === "bytes" ? (value as Uint8Array) : toUtf8(value as string);
      this.#put(bytes);
      this.#varint(bytes.length);
    }
  }

  /** Names are ASCII: an encoder would take most of the time that writing takes. */
  #ascii(text: string): void {
    this.#at -= text.length;
    for (let i = 0; this.#bytes && i < text.length; i++) this.#bytes[this.#at + i] = text.charCodeAt(i);
    this.#varint(text.length);
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
