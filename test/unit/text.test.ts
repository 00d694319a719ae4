/** Our own UTF-8 and base64, compared with the web platform's, which not every engine has. */
import t from "tap";
import { fromBase64, fromUtf8, toBase64, toUtf8 } from "../support/internals/base.ts";

const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** Result of a function; undefined where it throws. */
function attempt<T>(work: () => T): T | undefined {
  try {
    return work();
  } catch {
    return undefined;
  }
}

t.test("UTF-8 is read as strictly as by TextDecoder", (t) => {
  // First and last of every range that the standard distinguishes.
  const edges = [
    ...[0x00, 0x41, 0x7f, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc0, 0xc1, 0xc2],
    ...[0xdf, 0xe0, 0xe1, 0xec, 0xed, 0xee, 0xef, 0xf0, 0xf1, 0xf3, 0xf4, 0xf5, 0xf8, 0xff],
  ];
  const differ: number[][] = [];
  const check = (...bytes: number[]): void => {
    const all = Uint8Array.from(bytes);
    if (attempt(() => fromUtf8(all)) !== attempt(() => decoder.decode(all))) differ.push(bytes);
  };
  for (const a of edges) {
    check(a);
    for (const b of edges) {
      check(a, b);
      for (const c of edges) check(a, b, c);
      if (a >= 0xf0) for (const c of [0x7f, 0x80, 0xbf, 0xc0]) for (const d of [0x7f, 0x80, 0xbf]) check(a, b, c, d);
    }
  }
  t.same(differ, []);
  const long = "\ufeffa%41é€😀".repeat(10_000);
  t.equal(fromUtf8(new TextEncoder().encode(long)), long);
  t.end();
});

t.test("every character is written as by TextEncoder", (t) => {
  let differ = 0;
  for (let code = 0; code <= 0x10ffff; code += code < 0x3000 || (code >= 0xd700 && code < 0xe100) ? 1 : 251) {
    const text = `a${String.fromCodePoint(code)}`;
    if (Buffer.compare(toUtf8(text), new TextEncoder().encode(text)) !== 0) differ++;
  }
  t.equal(differ, 0, "halves of surrogate pairs too");
  t.end();
});

t.test("base64", (t) => {
  for (let length = 0; length < 70; length++) {
    const bytes = Uint8Array.from({ length }, (_, i) => (i * 89 + length * 31) & 255);
    const text = Buffer.from(bytes).toString("base64");
    t.equal(toBase64(bytes), text);
    t.same(fromBase64(text), bytes);
    t.same(fromBase64(text.replace(/=+$/, "")), bytes, "without its padding, as in a JWK");
  }
  for (const text of ["a", "abcde", "ab=", "a===", "ab=c", "a b=", "====", "=", "ab==cd==", "ab_d", "äbcd"])
    t.throws(() => fromBase64(text), { message: "it is not base64" }, text);
  t.end();
});
