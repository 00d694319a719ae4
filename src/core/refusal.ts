/**
 * What becomes of a pack that is refused. Loaded when that happens.
 */
import { FormatError } from "../errors.ts";
import { wrongKind } from "../format/kind.ts";
import type { ByteSource } from "../source.ts";
import { fromLatin1 } from "../text.ts";

/**
 * What to throw for a FormatError or TrustError of a pack: of a file of another kind, or from before SPEC.md was final, that it is one. What a cache
 * keeps may be what is wrong, so it is cleared: the next try reads the file itself.
 * @param directory bytes of the directory as far as they are known, whether they can be read or not
 */
export async function refusal(
  error: Error,
  source: ByteSource,
  directory: Uint8Array = new Uint8Array(0),
): Promise<Error> {
  await source.clear?.().catch(() => undefined);
  if (!(error instanceof FormatError)) return error;
  if (error.part === "window") return (await wrongKind(error, source, "an EigenLoRA pack")) as Error;
  const text = fromLatin1(directory.subarray(0, 65_536));
  const producer = /producer.(eigenlora 0\.1\.\d+)/s.exec(text)?.[1];
  if (producer === undefined) return error;
  const { file, part } = error;
  const message = error.message.slice(`${file}, ${part}: `.length);
  return new FormatError(`${message}; written by a version before 1.0 (${producer}): make the pack again`, {
    ...{ file, part },
    cause: error,
  });
}
