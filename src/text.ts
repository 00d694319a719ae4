/**
 * UTF-8, base64 and hexadecimal digits without TextEncoder, TextDecoder, atob and btoa: Hermes, QuickJS and the shells
 * of other engines lack some of them. `escape` and `unescape` are old, but no engine lacks them: they make a character
 * of each byte %XX, and of %XX a byte, and `decodeURIComponent` is strict about UTF-8.
 */

/** UTF-8 of a text. Half a surrogate pair becomes U+FFFD, as in TextEncoder. */
export function toUtf8(text: string): Uint8Array<ArrayBuffer> {
  const bytes = unescape(encodeURIComponent(text.replace(/[\ud800-\udfff]/gu, "\ufffd")));
  return Uint8Array.from(bytes, (byte) => byte.charCodeAt(0));
}

/**
 * The text of UTF-8; a byte order mark is a character like any other.
 * @throws URIError or TypeError when it is not UTF-8
 */
export function fromUtf8(bytes: Uint8Array): string {
  // TextDecoder reads long texts ten times as fast, where there is one.
  if (bytes.length > PIECE && typeof TextDecoder !== "undefined")
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  const text = fromLatin1(bytes);
  return utf8Until(bytes, 0, bytes.length, 0x80) === bytes.length ? text : decodeURIComponent(escape(text));
}

/** A character for each byte, of the same number. */
export function fromLatin1(bytes: Uint8Array): string {
  let text = "";
  // Engines limit the arguments of a call.
  for (let at = 0; at < bytes.length; at += PIECE)
    text += String.fromCharCode.apply(null, bytes.subarray(at, at + PIECE) as unknown as number[]);
  return text;
}

const PIECE = 1 << 12;

/**
 * Reads UTF-8 without making a text of it.
 * @param most of a first byte. Default: all that there are
 * @returns where the first character begins that is wrong or not whole; `end` where there is none
 */
export function utf8Until(bytes: Uint8Array, at: number, end: number, most = 0xf5): number {
  while (at < end) {
    const lead = bytes[at]!;
    const more = lead < 0x80 ? 0 : lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : 3;
    if (lead >= most || (lead >= 0x80 && lead < 0xc2) || at + more >= end) return at;
    // Overlong forms, halves of pairs, and what is beyond U+10FFFF are told by the second byte.
    const second = more > 0 ? bytes[at + 1]! : 0x80;
    const low = lead === 0xe0 ? 0xa0 : lead === 0xf0 ? 0x90 : 0x80;
    const high = lead === 0xed ? 0x9f : lead === 0xf4 ? 0x8f : 0xbf;
    if (second < low || second > high) return at;
    for (let i = 2; i <= more; i++) if ((bytes[at + i]! & 0xc0) !== 0x80) return at;
    at += more + 1;
  }
  return at;
}

const DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

export function toBase64(bytes: Uint8Array): string {
  let text = "";
  let bits = 0;
  let count = 0;
  for (const byte of bytes) {
    bits = (bits << 8) | byte;
    for (count += 8; count >= 6; ) text += DIGITS[(bits >> (count -= 6)) & 63];
  }
  if (count > 0) text += DIGITS[(bits << (6 - count)) & 63];
  while (text.length % 4 > 0) text += "=";
  return text;
}

/** @throws RangeError when it is not base64; the padding may be missing */
export function fromBase64(text: string): Uint8Array<ArrayBuffer> {
  const digits = text.replace(/={1,2}$/, "");
  const padded = digits === text || text.length % 4 === 0;
  if (!padded || !/^[A-Za-z0-9+/]*$/.test(digits) || digits.length % 4 === 1) throw new RangeError("it is not base64");
  const bytes: number[] = [];
  let bits = 0;
  let count = 0;
  for (const digit of digits) {
    bits = (bits << 6) | DIGITS.indexOf(digit);
    count += 6;
    if (count >= 8) bytes.push((bits >> (count -= 8)) & 255);
  }
  return Uint8Array.from(bytes);
}

export function toHex(bytes: Uint8Array): string {
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
