/**
 * Makes a model's file without its weights, for runtimes that read these from the original file: large tensors of the main graph point to
 * their place in the file. Reads only the bytes between the weights.
 */

import { type ByteSource, joined, type ReadOptions } from "../source.ts";
import { sum } from "../tensor/dtypes.ts";
import { BYTES, create, FIXED32, FIXED64, toBinary, VARINT } from "./protobuf.ts";
import { LEAST_DETACHED, point } from "./tensors.ts";

const WINDOW = 16_384;

/** Numbers of the fields on the way to a tensor's bytes: of `ModelProto`, `GraphProto` and `TensorProto`. */
const PATH = { graph: 7, initializer: 5, rawData: 9 };
const FIELDS: readonly number[] = Object.values(PATH);

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
 */
export async function skeletonOf(
  source: ByteSource,
  location: string,
  options: ReadOptions = {},
): Promise<Uint8Array | undefined> {
  const reader = new FieldReader(source, options);
  /** @param depth of the message on the way to a tensor's bytes */
  const piecesOf = async (start: number, end: number, depth: number): Promise<Uint8Array[]> => {
    const pieces: Uint8Array[] = [];
    // The last place that is given counts.
    const place = create("TensorProto");
    for await (const { number, wire, at, body, end: stop } of reader.fields(start, end)) {
      const isLarge = number === FIELDS[depth] && wire === BYTES && stop - body > LEAST_DETACHED;
      if (!isLarge) pieces.push(await reader.bytes(at, stop));
      else if (number !== PATH.rawData) pieces.push(...message(number, await piecesOf(body, stop, depth + 1)));
      else point(place, location, body, stop - body);
    }
    return [...pieces, toBinary("TensorProto", place)];
  };
  const pieces = await piecesOf(0, source.byteLength!, 0);
  return reader.damaged ? undefined : joined(pieces);
}

function message(number: number, content: readonly Uint8Array[]): Uint8Array[] {
  const length = sum(content, (piece) => piece.length);
  return [Uint8Array.from([...varint(number * 8 + BYTES), ...varint(length)]), ...content];
}

function varint(value: number): number[] {
  const bytes = [];
  for (; value > 127; value = Math.floor(value / 128)) bytes.push((value % 128) + 128);
  return [...bytes, value];
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
      const wire = tag.value % 8;
      const number = Math.floor(tag.value / 8);
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

  async bytes(at: number, end: number): Promise<Uint8Array> {
    const from = at - this.#start;
    if (from >= 0 && end - this.#start <= this.#window.length) return this.#window.subarray(from, end - this.#start);
    return this.#source.read(at, end - at, this.#options);
  }
}
