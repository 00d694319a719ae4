/**
 * Reads an ONNX model and the files next to it, as bytes. Their meaning is the concern of `model.ts`. Of a large model
 * it reads the bytes between the weights alone: large tensors of the main graph point to their place in the file, for
 * runtimes that read them from there.
 */
import { FormatError } from "../errors.ts";
import { addressOf, openSource, watchedOf } from "../open-source.ts";
import type { OnProgress } from "../progress.ts";
import {
  type AbortOptions,
  type ByteSource,
  type FetchOptions,
  joined,
  type ReadOptions,
  readAll,
  type SourceInput,
} from "../source.ts";
import { sum } from "../tensor/dtypes.ts";
import { type OnnxModel, parseModel } from "./model.ts";
import { BYTES, create, FIXED32, FIXED64, toBinary, VARINT } from "./protobuf.ts";
import { LEAST_DETACHED, type OpenExternal, point } from "./tensors.ts";

/** Options for reading a model and the files next to it. */
export interface ModelOptions extends FetchOptions, AbortOptions {
  /**
   * Receives the progress of files, but not of bytes in memory or in the Hub's cache. A `progress_callback` of
   * transformers.js will do.
   */
  readonly onProgress?: OnProgress | undefined;
  /**
   * Chooses the file that the model calls `location` ("model.onnx_data"). Default: the file of that name next to a
   * model given as a path or URL.
   */
  external?: ((location: string) => SourceInput | Promise<SourceInput>) | undefined;
}

/** A model in memory. */
export interface ModelFile {
  readonly model: OnnxModel;
  /** The whole file, or the model without its weights; its tensors are views of it. */
  readonly bytes: Uint8Array;
  /** Folder of all files that the model's tensors point into. Undefined where it is unknown, or was not asked for. */
  readonly folder: string | undefined;
  /** Opens a file next to the model, once. Undefined when their place is unknown. */
  readonly external: OpenExternal | undefined;
  /** Closes the files next to the model. */
  close(): Promise<void>;
}

/** Smaller files are read at once. */
const LEAST_APART = 2 ** 23;

/**
 * Reads and parses a model.
 * @param options `weightsApart`: weights of a file on disk stay there, for a runtime that reads them itself
 * @throws FormatError, SourceError when it is no ONNX model or cannot be read
 */
export async function readModel(
  input: SourceInput,
  options: ModelOptions & { readonly weightsApart?: boolean | undefined } = {},
): Promise<ModelFile> {
  const { onProgress } = options;
  const opened = await openFile(input, options, "model");
  const locate = options.external ?? siblingsOf(input, opened.name);
  const apart =
    options.weightsApart === true && !options.external && locate !== undefined && opened.folder !== undefined;
  // The runtime reads the weights: there is no telling how many bytes are needed here.
  const total = apart ? (): undefined => undefined : undefined;
  // A download into the Hub's cache was told already.
  const told = async (source: ByteSource): Promise<ByteSource> =>
    (!/^hf:/.test(source.name) && (await watchedOf(source, "model", onProgress, total))) || source;
  const source = await told(opened);
  const bytes = await readBytes(source, options, apart).finally(() => source.close?.());
  const model = await parsed(bytes, source.name);
  const files = new Map<string, Promise<ByteSource>>();
  const external = (location: string): Promise<ByteSource> => {
    let file = files.get(location);
    if (!file) {
      file = Promise.resolve(locate!(location)).then(async (found) => {
        const opened = await openFile(found, options, "external");
        // Weights that were left in the model's own file: that is told already.
        return opened.name === source.name ? opened : told(opened);
      });
      files.set(location, file);
      // A failure is not kept: the next read may find the file.
      file.catch(() => files.delete(location));
    }
    return file;
  };
  return {
    model,
    bytes,
    folder: apart ? source.folder : undefined,
    external: locate && external,
    async close() {
      const settled = await Promise.allSettled(files.values());
      files.clear();
      await Promise.all(settled.map((file) => file.status === "fulfilled" && file.value.close?.()));
    },
  };
}

/**
 * Opens a file of a model: one of the Hugging Face Hub from the Hub's cache, where there is one, since it is read
 * whole.
 */
async function openFile(input: SourceInput, options: ModelOptions, where: string): Promise<ByteSource> {
  const { openHub } = typeof input === "string" && /^hf:/i.test(input) ? await import("#hub") : {};
  return openHub ? openHub(input as string, { ...options, stage: "model" }) : openSource(input, options, where);
}

async function readBytes(source: ByteSource, options: ReadOptions, apart: boolean): Promise<Uint8Array> {
  if (apart && source.byteLength! >= LEAST_APART) {
    const skeleton = await skeletonOf(source, source.name.replace(/^.*[/\\]/, ""), options);
    if (skeleton) return skeleton;
  }
  return readAll(source, options);
}

async function parsed(bytes: Uint8Array, name: string): Promise<OnnxModel> {
  try {
    const model = parseModel(bytes, name);
    const isFused = model.proto.graph!.node.some(
      ({ domain, opType }) => opType === "Attention" && domain === "com.microsoft",
    );
    return isFused ? (await import("./packed.ts")).unfuse(model) : model;
  } catch (error) {
    const { wrongKind } = await import("../format/kind.ts");
    throw await wrongKind(
      error,
      { name, byteLength: bytes.length, read: async (_, n) => bytes.subarray(0, n) },
      "an ONNX model",
    );
  }
}

/** Finds files next to a model on disk or at a URL; undefined for bytes, blobs and sources, which have no place. */
function siblingsOf(input: SourceInput, model: string): ((location: string) => SourceInput) | undefined {
  if (!(typeof input === "string" || input instanceof URL) || /^(blob|data):/i.test(String(input))) return undefined;
  // The name of a file on the Hub says the commit that it is of.
  const place = /^hf:/.test(model) ? model : input;
  return (location) => {
    // The model's author chooses the file: it must not lie outside the model's folder.
    if (/^[/\\]|^[a-z]+:|(^|[/\\])\.\.([/\\]|$)/i.test(location)) {
      const message = `lie at "${location}", outside the model's folder; give them with the option \`external\``;
      throw new FormatError(message, { file: model, part: "external data" });
    }
    const url = place instanceof URL || /^hf:/i.test(place) ? place : (addressOf(place, "model") ?? place);
    if (!(url instanceof URL)) return url.replace(/[^/\\]*$/, "") + location;
    // An address would read escapes, tabs and queries into the name.
    return new URL(location.split("/").map(encodeURIComponent).join("/"), url);
  };
}

// A model's file without its weights.

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
