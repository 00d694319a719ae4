/**
 * Packs that were written before SPEC.md was final, and break one of its rules. Loaded when a pack is refused.
 */
import { FormatError } from "../errors.ts";

/**
 * What is wrong with a file, and that it is an old one, where it says so.
 * @param directory bytes of the directory, whether it can be read or not
 */
export function saidOfOld(error: unknown, directory: Uint8Array): unknown {
  if (!(error instanceof FormatError)) return error;
  const producer = /producer.(eigenlora 0\.1\.\d+)/s.exec(String.fromCharCode(...directory.subarray(0, 65_536)))?.[1];
  if (producer === undefined) return error;
  const { file, part } = error;
  const message = error.message.slice(`${file}, ${part}: `.length);
  return new FormatError(`${message}; written by a version before 1.0 (${producer}): make the pack again`, {
    ...{ file, part },
    cause: error,
  });
}
