/** What packs are written with, byte for byte what msgpackr writes. */
import { Packr } from "msgpackr";
import t from "tap";
import { decode } from "../dist/src/format/messagepack.js";
import { pack } from "../dist/src/format/write-messagepack.js";

const oracle = new Packr({ useRecords: false, variableMapSize: true });
const expected = (value: unknown): Uint8Array => Uint8Array.from(oracle.pack(value));

t.test("numbers at every limit", async (t) => {
  const limits = [0, 1, 31, 32, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2 ** 31 - 1, 2 ** 31, 2 ** 32 - 1];
  const more = [
    2 ** 32,
    2 ** 53 - 1,
    0.5,
    -0.5,
    1e-300,
    Number.MAX_VALUE,
    -33,
    -129,
    -32769,
    -(2 ** 31) - 1,
    -(2 ** 31),
  ];
  for (const value of [...limits, ...limits.map((one) => -one), ...more])
    t.same(pack(value), expected(value), `${value}`);
});

t.test("strings, arrays and maps of every length", async (t) => {
  for (const length of [0, 1, 10, 11, 15, 16, 31, 32, 85, 86, 255, 256, 21845, 65535, 65536, 70000]) {
    for (const letter of ["a", "é", "字", "😀"]) {
      const text = letter.repeat(length);
      t.ok(Buffer.from(pack(text)).equals(expected(text)), `${length} times ${letter}`);
    }
    const items = Array.from({ length }, (_, i) => i);
    t.ok(Buffer.from(pack(items)).equals(expected(items)), `${length} items`);
    const map = new Map(items.map((i) => [`key ${i}`, i]));
    t.ok(Buffer.from(pack(map)).equals(expected(map)), `a Map of ${length}`);
    t.ok(Buffer.from(pack(Object.fromEntries(map))).equals(expected(Object.fromEntries(map))), `${length} keys`);
  }
});

t.test("what is put together, and undefined", async (t) => {
  const value = { a: null, b: [true, false, { c: "d", e: [[], {}] }], f: -1.25, long: ["x".repeat(300)] };
  t.same(pack(value), expected(value));
  t.same(pack({ a: undefined, b: 1 }), expected({ b: 1 }));
});

t.test("what readers refuse is written as nothing that they take", async (t) => {
  const refused: unknown[] = [new Date(0), new Uint8Array(3), new Set([1]), 5n, Symbol("a"), () => 1];
  for (const value of refused)
    t.throws(() => decode(pack({ value }), "x", "part", "path"), { tag: "format", message: /0xc1/ });
});
