/**
 * SHA-256, by the platform's WebCrypto. Loaded by what writes packs, and by readers that were given a hash or a key.
 */
import { toIntegrity } from "./integrity.ts";

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
