/**
 * SHA-256, by the platform's WebCrypto, and hashes as text: "sha256-" and base64, as in the `integrity` attribute of a web page (W3C
 * Subresource Integrity).
 */
import { fromBase64, toBase64 } from "../text.ts";

/**
 * SHA-256 of the parts, one behind the other. Parts that lie so in memory are not copied.
 * @throws TypeError where the platform has no WebCrypto
 */
export async function sha256(first: Uint8Array, ...rest: readonly Uint8Array[]): Promise<Uint8Array<ArrayBuffer>> {
  if (!globalThis.crypto?.subtle) {
    throw new TypeError("SHA-256 needs WebCrypto (crypto.subtle), which is missing here; pages have it over https");
  }
  const parts = [first, ...rest];
  const length = parts.reduce((sum, part) => sum + part.length, 0);
  const adjacent = parts.every(({ buffer, byteOffset }, i) => {
    const before = parts[i - 1];
    return !before || (buffer === before.buffer && byteOffset === before.byteOffset + before.length);
  });
  let all = new Uint8Array(first.buffer as ArrayBuffer, first.byteOffset, adjacent ? length : 0);
  if (!adjacent) {
    all = new Uint8Array(length);
    let at = 0;
    for (const part of parts) {
      all.set(part, at);
      at += part.length;
    }
  }
  return new Uint8Array(await crypto.subtle.digest("SHA-256", all));
}

/** The same as text. */
export async function integrityOf(first: Uint8Array, ...rest: readonly Uint8Array[]): Promise<string> {
  return toIntegrity(await sha256(first, ...rest));
}

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
