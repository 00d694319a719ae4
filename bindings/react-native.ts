/**
 * `eigenlora/react-native`: packs that come with an app, or lie on the device. What opens and switches them is the same
 * as everywhere; React Native has no paths and no files of its own, so a file is read by the library that the app has
 * for that.
 */

import { described, SourceError } from "../src/errors.ts";
import { localSource } from "../src/open-source.ts";
import type { ByteSource } from "../src/source.ts";
import { fromBase64 as decode, toBase64 as encode } from "../src/text.ts";

/** A file, as the app's library reads it. */
export interface DeviceFile {
  /** Name for messages, such as its URI. */
  readonly name: string;
  /** Size in bytes. */
  readonly byteLength: number;
  /** `length` bytes from `offset`: bytes, or base64 of them. */
  read(offset: number, length: number): Promise<Uint8Array | ArrayBuffer | string>;
}

/**
 * Bytes of base64, as libraries for files and assets give them. Line breaks and spaces are passed over.
 * @throws TypeError when it is no text; RangeError when it is not base64
 * @example
 * const pack = await openPack(fromBase64(base64));
 */
export function fromBase64(text: string): Uint8Array<ArrayBuffer> {
  if (typeof text !== "string") throw new TypeError(`fromBase64: expected a string, got ${described(text)}`);
  return decode(text.replace(/\s+/g, ""));
}

/**
 * Base64 of bytes, as libraries for files take them.
 * @throws TypeError when it is no Uint8Array
 * @example
 * const text = toBase64(bytes);
 */
export function toBase64(bytes: Uint8Array): string {
  if (!(bytes instanceof Uint8Array)) throw new TypeError(`toBase64: expected a Uint8Array, got ${described(bytes)}`);
  return encode(bytes);
}

/**
 * A file on the device as a source for `openPack`, read part by part: the directory first, each task when it is
 * switched to.
 * @returns a source whose `read` throws SourceError when the library gives other than what was asked for
 * @throws TypeError when `file` is none
 * @example
 * const source = fileSource({
 *   name: uri,
 *   byteLength: size,
 *   read: (offset, length) => RNFS.read(uri, length, offset, "base64"),
 * });
 * const pack = await openPack(source);
 */
export function fileSource(file: DeviceFile): ByteSource {
  const { name, byteLength } = file;
  if (!Number.isSafeInteger(byteLength) || byteLength < 0 || typeof file.read !== "function")
    throw new TypeError(`fileSource: expected { name, byteLength, read }, got byteLength ${described(byteLength)}`);
  return localSource(name, byteLength, async (start, end) => {
    const length = end - start;
    const bytes = length === 0 ? new Uint8Array(0) : bytesOf(await readAs(file, start, length), name);
    if (bytes.length === length) return bytes;
    const message = `its \`read\` gave ${bytes.length} bytes, ${length} from ${start} were asked for`;
    throw new SourceError(message, { file: name });
  });
}

/** @throws SourceError with the library's error as its cause */
async function readAs(file: DeviceFile, offset: number, length: number): Promise<unknown> {
  try {
    return await file.read(offset, length);
  } catch (cause) {
    throw new SourceError(`cannot be read: ${(cause as Error).message}`, { file: file.name, cause });
  }
}

/** @throws SourceError when it is neither bytes nor base64 */
function bytesOf(given: unknown, file: string): Uint8Array {
  if (given instanceof Uint8Array) return given;
  if (given instanceof ArrayBuffer) return new Uint8Array(given);
  try {
    return fromBase64(given as string);
  } catch (cause) {
    throw new SourceError(`its \`read\` gave neither bytes nor base64: ${(cause as Error).message}`, { file, cause });
  }
}
