/** Reads JSON files beside adapters and models. */
import { readFile, stat } from "node:fs/promises";
import { AdapterError } from "../errors.ts";
import { parseJson } from "../tensor/tensor-file.ts";

/** Room for a pattern for each of 100 000 modules; a larger file is no configuration, and would fill the memory. */
const MAX_JSON_BYTES = 16 * 1024 * 1024;

/** @throws AdapterError when there is no such file, it is too large, or holds what `parseJson` refuses */
export async function readJson(path: string): Promise<unknown> {
  const bytes = (await stat(path).catch(() => undefined))?.size ?? 0;
  if (bytes > MAX_JSON_BYTES) {
    throw new AdapterError(`has ${bytes} bytes, ${MAX_JSON_BYTES} at most are read; shorten it`, { file: path });
  }
  const text = await readFile(path, "utf8").catch((cause: unknown) => {
    throw new AdapterError(`cannot be read: ${(cause as Error).message}`, { file: path, cause });
  });
  try {
    return parseJson(text);
  } catch (cause) {
    throw new AdapterError(`${(cause as Error).message}; correct it or save it again`, { file: path, cause });
  }
}
