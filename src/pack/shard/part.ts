/**
 * A part: one machine's share of a pack that is too large for it, as a file (SPEC.md, appendix B). It is a safetensors file with a
 * description and a checksum of its header and of every tensor, so that any safetensors reader can look into it. It is not a cache:
 * a part says what it was made from, and its owner decides what to make again.
 */
import { FormatError } from "../../errors.ts";
import { crc32c, decode, type Value } from "../../format/fields.ts";
import { kindOfSource } from "../../format/kind.ts";
import { pack } from "../../format/msgpackr.ts";
import { openSource } from "../../open-source.ts";
import { atOnce } from "../../pace.ts";
import type { SourceInput } from "../../source.ts";
import { openSafetensors, type SafetensorsFile } from "../../tensor/safetensors.ts";
import { type SafetensorsEntry, writeSafetensors } from "../../tensor/safetensors-writer.ts";
import { parseJson } from "../../tensor/tensor-file.ts";

/** What a part holds: statistics of adapters, or tasks on a basis. */
export type PartKind = "statistics" | "tasks";

/** A part may list as many tasks as a pack, each with a tensor of its own. */
const MOST_HEADER = 100_000_000;
/** Key of the description in the file's metadata. */
const ABOUT = "eigenlora part";
/** The last tensor, whatever the others are called: CRC-32C of the header, then of each tensor in the order of the file. */
const CHECKSUMS = "~checksums";

/** What writes a kind of part, and what takes it. */
const USES = {
  statistics: "sharding and merging write it, merging takes it",
  tasks: "projecting or distilling writes it, assembling takes it",
} as const;

/** Values a description may hold: what JSON can say. */
export type About = Readonly<Record<string, unknown>>;

/**
 * The bytes of a part, one tensor at a time.
 * @param made a digest of everything the part depends on: the same digest is the same part
 */
export async function* writePart(
  kind: PartKind,
  made: string,
  about: About,
  entries: readonly SafetensorsEntry[],
): AsyncGenerator<Uint8Array, void> {
  const checksums: number[] = [];
  const last: SafetensorsEntry = {
    name: CHECKSUMS,
    dtype: "U8",
    shape: [4 * (entries.length + 1)],
    read() {
      const view = new DataView(new ArrayBuffer(4 * checksums.length));
      checksums.forEach((crc, i) => view.setUint32(4 * i, crc, true));
      return new Uint8Array(view.buffer);
    },
  };
  const description = JSON.stringify({ kind, version: 1, made, ...about });
  for await (const chunk of writeSafetensors([...entries, last], new Map([[ABOUT, description]]))) {
    checksums.push(crc32c(chunk));
    yield chunk;
  }
}

/** An open part. Tensors are checked whenever they are read. */
export interface Part {
  /** Path, for messages. */
  readonly file: string;
  /** The digest given to `writePart`. */
  readonly made: string;
  readonly about: Value;
  readonly tensors: SafetensorsFile["tensors"];
  readonly byteLength: number;
  /** @throws FormatError for a tensor that is missing or damaged */
  read(name: string): Promise<Uint8Array>;
  /** Reads everything. @throws FormatError when something is damaged */
  verify(): Promise<void>;
  close(): Promise<void>;
}

/**
 * Opens a part and checks its description.
 * @param kind refuses the other kind, where it is given
 * @throws FormatError when the file is no part, of the other kind, truncated or damaged; SourceError when it cannot be read
 */
export async function openPart(input: SourceInput, kind?: PartKind): Promise<Part> {
  const source = await openSource(input, {}, "part");
  const file = source.name;
  const fail = (part: string, message: string): never => {
    throw new FormatError(message, { file, part });
  };
  const damaged = (part: string): never =>
    fail(part, "its checksum does not match: the part is damaged, make it again");
  try {
    const found = await kindOfSource(source);
    if (found === "an EigenLoRA task file") fail("header", "this is a task file, not a part: add it to a pack");
    if (found !== undefined && found !== "a safetensors file")
      fail("header", `this is ${found}, not a part${kind ? `: ${USES[kind]}` : ""}`);
    const tensors = await openSafetensors(source, { maxHeaderBytes: MOST_HEADER });
    const text = tensors.metadata.get(ABOUT);
    if (text === undefined) fail("header", `this is not a part${kind ? `: ${USES[kind]}` : ""}`);
    const places = [...tensors.tensors].sort(
      ([, a], [, b]) => a.byteOffset - b.byteOffset || a.byteLength - b.byteLength,
    );
    const [name, { byteLength }] = places.pop() ?? ["", { byteLength: 0 }];
    if (name !== CHECKSUMS || byteLength !== 4 * (places.length + 1))
      fail("checksums", "they are missing: the part is damaged, make it again");
    const sums = await tensors.read(CHECKSUMS);
    const view = new DataView(sums.buffer, sums.byteOffset, sums.length);
    const start = places[0]?.[1].byteOffset ?? tensors.tensors.get(CHECKSUMS)!.byteOffset;
    if (crc32c(await source.read(0, start)) !== view.getUint32(0, true)) damaged("header");
    const checksums = new Map(places.map(([tensor], i) => [tensor, view.getUint32(4 * (i + 1), true)]));
    const about: Value = describe(text!, file);
    const holds = oneOf(about.get("kind"), ["statistics", "tasks"]);
    const version = about.get("version").integer(1, Number.MAX_SAFE_INTEGER);
    about.check(version === 1, () => `version ${version}, but this reader knows version 1; update eigenlora`);
    if (kind && kind !== holds) fail("header", `it holds ${holds} (${USES[holds]}), expected ${kind}: ${USES[kind]}`);
    const read = async (tensor: string): Promise<Uint8Array> => {
      const bytes = await tensors.read(tensor);
      if (crc32c(bytes) !== checksums.get(tensor)) damaged(`tensor ${tensor}`);
      return bytes;
    };
    return {
      file,
      made: about.get("made").string(64),
      about,
      tensors: tensors.tensors,
      byteLength: tensors.byteLength,
      read,
      async verify() {
        for (const tensor of checksums.keys()) await read(tensor);
      },
      close: async () => source.close?.(),
    };
  } catch (error) {
    await source.close?.();
    throw error;
  }
}

/** Opens a part of one kind and reads its description; it is closed where that fails. */
export async function readPart<T>(input: SourceInput, kind: PartKind, read: (part: Part) => T): Promise<T> {
  const part = await openPart(input, kind);
  try {
    return read(part);
  } catch (error) {
    await part.close();
    throw error;
  }
}

/** JSON as a `Value`. A part may list more tasks than a pack. */
function describe(text: string, file: string): Value {
  try {
    return atOnce(decode(pack(parseJson(text)), file, "header", "description", 64, Infinity));
  } catch (cause) {
    throw new FormatError(`its description ${(cause as Error).message}`, { file, part: "header", cause });
  }
}

/** A word of the description. @throws FormatError when it is none of `words` */
export function oneOf<T extends string>(value: Value, words: readonly T[]): T {
  const found = value.string(64);
  const known = words.find((word) => word === found);
  if (known !== undefined) return known;
  throw new FormatError(`${value.path}: "${found}" is unknown here; update eigenlora`, {
    file: value.file,
    part: value.part,
  });
}

/** A tensor's values. @param bytes of a little-endian F64 tensor, at any alignment */
export function toF64(bytes: Uint8Array): Float64Array {
  const aligned = bytes.byteOffset % 8 === 0 ? bytes : new Uint8Array(bytes);
  return new Float64Array(aligned.buffer, aligned.byteOffset, bytes.length / 8);
}

export function toBytes(values: Float64Array | Uint32Array): Uint8Array {
  return new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
}
