/** Opens safetensors files from a path, URL, Blob, buffer or ByteSource. */
import { openSource } from "../open-source.ts";
import type { FetchOptions, ReadOptions, SourceInput } from "../source.ts";
import { openSafetensors as readHeader, type SafetensorsFile } from "../tensor/safetensors.ts";

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
  options: FetchOptions & ReadOptions = {},
): Promise<OpenSafetensors> {
  const source = await openSource(input, options, "openSafetensors");
  const close = async (): Promise<void> => source.close?.();
  try {
    return { ...(await readHeader(source, options)), close, [Symbol.asyncDispose]: close };
  } catch (error) {
    await close();
    throw error;
  }
}
