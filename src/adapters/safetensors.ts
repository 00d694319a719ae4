/** Opens safetensors files from a path, URL, Blob, buffer or ByteSource. */
import { wrongKind } from "../format/kind.ts";
import { openSource } from "../open-source.ts";
import type { ByteSource, FetchOptions, SourceInput } from "../source.ts";
import { type HeaderOptions, openSafetensors as readHeader, type SafetensorsFile } from "../tensor/safetensors.ts";

/** A safetensors file that is open until it is closed. */
export interface OpenSafetensors extends SafetensorsFile {
  /** Closes the source of the file. */
  close(): Promise<void>;
  [Symbol.asyncDispose](): Promise<void>;
}

/**
 * Opens a safetensors file: reads and checks its header. Tensors are read later, one range each.
 * @param input path, URL (read by HTTP ranges), Blob, ArrayBuffer or any ByteSource
 * @throws SourceError when bytes cannot be read, FormatError when a rule of the format is broken
 * @example
 * const file = await openSafetensors("adapter_model.safetensors");
 * for (const [name, { shape }] of file.tensors) console.log(name, shape);
 * await file.close();
 */
export async function openSafetensors(
  input: SourceInput,
  options: FetchOptions & HeaderOptions = {},
): Promise<OpenSafetensors> {
  const file = await openFile(input, readHeader, "a safetensors file", options, "openSafetensors");
  return { ...file, [Symbol.asyncDispose]: file.close };
}

/**
 * Opens a file with one of the readers of src/tensor; closes its source if that fails.
 * @param expected kind of file, for messages
 * @param where the public function, for messages
 */
export async function openFile<F>(
  input: SourceInput,
  read: (source: ByteSource, options: HeaderOptions) => Promise<F>,
  expected: string,
  options: FetchOptions & HeaderOptions = {},
  where?: string,
): Promise<F & Pick<OpenSafetensors, "close">> {
  const source = await openSource(input, options, where);
  const close = async (): Promise<void> => source.close?.();
  try {
    return { ...(await read(source, options)), close };
  } catch (error) {
    const refused = await wrongKind(error, source, expected);
    await close();
    throw refused;
  }
}
