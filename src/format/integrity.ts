/**
 * Hashes as text: "sha256-" and base64, as in the `integrity` attribute of a web page (W3C Subresource Integrity).
 */
import { fromBase64, toBase64 } from "../text.ts";

/** @param hash 32 bytes */
export function toIntegrity(hash: Uint8Array): string {
  return `sha256-${toBase64(hash)}`;
}

/**
 * @throws TypeError when it is not "sha256-" and the base64 of 32 bytes, written in the only way that `toIntegrity` writes it: hashes
 *   are compared as text
 */
export function fromIntegrity(text: string): Uint8Array<ArrayBuffer> {
  // The last letter before the padding holds four bits.
  if (!/^sha256-[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=$/.test(text)) {
    throw new TypeError(`expected "sha256-" and the base64 of 32 bytes, got ${JSON.stringify(text)}`);
  }
  return fromBase64(text.slice(7));
}
