/**
 * Makes a model's file without its weights, for runtimes that read these from the original file: the protobuf as it is, except that large
 * tensors of the main graph point to their place in the file. Reads only what lies between the weights.
 */
import type { ByteSource, ReadOptions } from "../source.ts";

/** Tensors below this size stay in the protobuf. */
const LEAST_BYTES = 4096;
const WINDOW = 16_384;

/** Numbers of the fields that matter here, in `ModelProto`, `GraphProto` and `TensorProto`. */
const [GRAPH, INITIALIZER, RAW_DATA, EXTERNAL_DATA, DATA_LOCATION] = [7, 5, 9, 13, 14];
const [VARINT, FIXED64, BYTES, FIXED32] = [0, 1, 2, 5];

/** A range of the file, or new bytes. */
type Piece = readonly [start: number, end: number] | Uint8Array;

/** A field of a message: `at` its tag, `body` its content. */
interface Field {
  readonly number: number;
  readonly wire: number;
  readonly at: number;
  readonly body: number;
  readonly end: number;
}

/**
 * @param location name under which tensors refer to the file
 * @returns undefined where the file is no such protobuf; reading it whole then reports the error
 * @throws SourceError when the file cannot be read
 */
export async function skeletonOf(
  source: ByteSource,
  location: string,
  options: ReadOptions = {},
): Promise<Uint8Array | undefined> {
  const reader = new FieldReader(source, options);
  const pieces: Piece[] = [];
  for await (const field of reader.fields(0, source.byteLength!)) {
    if (field.number !== GRAPH || field.wire !== BYTES) {
      pieces.push([field.at, field.end]);
      continue;
    }
    const graph: Piece[] = [];
    for await (const inner of reader.fields(field.body, field.end)) {
      const isLarge = inner.number === INITIALIZER && inner.wire === BYTES && inner.end - inner.body > LEAST_BYTES;
      const tensor = isLarge ? await tensorOf(reader, inner, location) : [];
      graph.push(...(tensor.length > 0 ? message(INITIALIZER, tensor) : [[inner.at, inner.end] as const]));
    }
    pieces.push(...message(GRAPH, graph));
  }
  if (reader.damaged) return undefined;
  return assembled(source, pieces, options);
}

/** @returns nothing where the tensor stays as it is */
async function tensorOf(reader: FieldReader, { body, end }: Field, location: string): Promise<Piece[]> {
  const pieces: Piece[] = [];
  let data: Field | undefined;
  for await (const field of reader.fields(body, end)) {
    const isData = field.number === RAW_DATA && field.wire === BYTES && field.end - field.body > LEAST_BYTES;
    if (isData) data = field;
    else pieces.push([field.at, field.end]);
  }
  if (!data) return [];
  const entries = { location, offset: String(data.body), length: String(data.end - data.body) };
  for (const [key, value] of Object.entries(entries)) {
    pieces.push(...message(EXTERNAL_DATA, [...message(1, [utf8(key)]), ...message(2, [utf8(value)])]));
  }
  pieces.push(Uint8Array.from([...varint(DATA_LOCATION * 8 + VARINT), 1]));
  return pieces;
}

function utf8(text: string): Uint8Array {
  return new TextEncoder().encode(text);
}

/** A field that holds bytes. */
function message(number: number, content: readonly Piece[]): Piece[] {
  const length = content.reduce((sum, piece) => sum + lengthOf(piece), 0);
  return [Uint8Array.from([...varint(number * 8 + BYTES), ...varint(length)]), ...content];
}

function lengthOf(piece: Piece): number {
  return piece instanceof Uint8Array ? piece.length : piece[1] - piece[0];
}

function varint(value: number): number[] {
  const bytes = [];
  for (; value > 127; value = Math.floor(value / 128)) bytes.push((value % 128) + 128);
  return [...bytes, value];
}

/** Reads neighbouring ranges together. */
async function assembled(source: ByteSource, pieces: readonly Piece[], options: ReadOptions): Promise<Uint8Array> {
  const out = new Uint8Array(pieces.reduce((sum, piece) => sum + lengthOf(piece), 0));
  let at = 0;
  for (let i = 0; i < pieces.length; ) {
    const piece = pieces[i++]!;
    if (piece instanceof Uint8Array) {
      out.set(piece, at);
      at += piece.length;
      continue;
    }
    let [start, end] = piece;
    for (let next = pieces[i]; next && !(next instanceof Uint8Array) && next[0] === end; next = pieces[++i])
      end = next[1];
    out.set(await source.read(start, end - start, options), at);
    at += end - start;
  }
  return out;
}

/** Reads the fields of messages, a window at a time. */
class FieldReader {
  /** True if the bytes are no protobuf, or end too early. */
  damaged = false;
  readonly #source: ByteSource;
  readonly #options: ReadOptions;
  #window: Uint8Array = new Uint8Array(0);
  #start = 0;

  constructor(source: ByteSource, options: ReadOptions) {
    this.#source = source;
    this.#options = options;
  }

  async *fields(start: number, end: number): AsyncGenerator<Field> {
    for (let at = start; at < end && !this.damaged; ) {
      const tag = await this.#varint(at, end);
      const [wire, number] = [tag.value % 8, Math.floor(tag.value / 8)];
      const length = wire === BYTES ? await this.#varint(tag.end, end) : { value: 0, end: tag.end };
      const body = length.end;
      const stop =
        wire === VARINT
          ? (await this.#varint(body, end)).end
          : body + (wire === BYTES ? length.value : wire === FIXED64 ? 8 : wire === FIXED32 ? 4 : Number.NaN);
      this.damaged ||= number === 0 || !(stop <= end);
      if (this.damaged) return;
      yield { number, wire, at, body, end: stop };
      at = stop;
    }
  }

  async #varint(at: number, end: number): Promise<{ value: number; end: number }> {
    let value = 0;
    for (let i = 0; i < 10 && at + i < end; i++) {
      const byte = await this.#byte(at + i);
      value += (byte % 128) * 128 ** i;
      if (byte < 128) return { value, end: at + i + 1 };
    }
    this.damaged = true;
    return { value: 0, end };
  }

  async #byte(at: number): Promise<number> {
    if (at < this.#start || at >= this.#start + this.#window.length) {
      const length = Math.min(WINDOW, this.#source.byteLength! - at);
      this.#window = await this.#source.read(at, length, this.#options);
      this.#start = at;
    }
    return this.#window[at - this.#start]!;
  }
}
