/** safetensors: files that the reader accepts and refuses; the writer's files obey the same rules. */
import { readFileSync } from "node:fs";
import { type ByteSource, FormatError, SourceError } from "eigenlora";
import fc from "fast-check";
import t from "tap";
import { bytesOf } from "../support/adapters.ts";
import { fromRoot } from "../support/folder.ts";
import { elementsOf, openSafetensors, type SafetensorsEntry, writeSafetensors } from "../support/internals/base.ts";
import { runs } from "../support/required.ts";

const golden = new Uint8Array(readFileSync(fromRoot("test/data/goldens/peft/plain/base.safetensors")));

function source(bytes: Uint8Array, name = "some.safetensors"): ByteSource {
  return {
    name,
    byteLength: bytes.length,
    async read(offset, length) {
      if (offset + length > bytes.length) throw new SourceError("ends too early", { file: name });
      return bytes.subarray(offset, offset + length);
    },
  };
}

/** A file with this header, JSON unless a string or bytes, followed by `data`: zeros or these bytes. */
function file(header: unknown, data: number | Uint8Array = 0): Uint8Array {
  const json =
    header instanceof Uint8Array ? header : Buffer.from(typeof header === "string" ? header : JSON.stringify(header));
  const bytes = typeof data === "number" ? new Uint8Array(data) : data;
  const out = new Uint8Array(8 + json.length + bytes.length);
  new DataView(out.buffer).setBigUint64(0, BigInt(json.length), true);
  out.set(json, 8);
  out.set(bytes, 8 + json.length);
  return out;
}

const f32 = (begin: number, end: number, shape: unknown = [(end - begin) / 4]): object => ({
  dtype: "F32",
  shape,
  data_offsets: [begin, end],
});

t.test("a file of the reference implementation", async (t) => {
  const opened = await openSafetensors(source(golden));
  t.equal(opened.byteLength, golden.length);
  t.equal(opened.tensors.size, 4);
  const name = "bert.encoder.layer.1.attention.self.value.weight";
  const place = opened.tensors.get(name)!;
  t.same(place.shape, [48, 48]);
  t.equal(place.byteLength, 48 * 48 * 4);
  const bytes = await opened.read(name);
  t.same(bytes, golden.subarray(place.byteOffset, place.byteOffset + place.byteLength));
  const values = await opened.readF32(name);
  t.equal(values[47], new DataView(golden.buffer).getFloat32(place.byteOffset + 4 * 47, true));
});

t.test("decodes every float type, and leaves others as bytes", async (t) => {
  const data = new Uint8Array(47);
  const view = new DataView(data.buffer);
  view.setFloat64(0, 1 / 3, true);
  view.setFloat32(8, 0.1, true);
  [0x3c00, 0xc000, 0x0001].forEach((half, i) => view.setUint16(12 + 2 * i, half, true)); // f16 1, -2, 2^-24
  [0x3f80, 0xc040, 0x0080].forEach((half, i) => view.setUint16(18 + 2 * i, half, true)); // bf16 1, -3, 2^-126
  view.setBigInt64(24, -5n, true);
  data.set([1, 2, 3], 44);
  const bytes = file(
    {
      __metadata__: { format: "pt", note: "ü" },
      f64: { dtype: "F64", shape: [1], data_offsets: [0, 8] },
      f32: { dtype: "F32", shape: [], data_offsets: [8, 12] },
      f16: { dtype: "F16", shape: [3, 1], data_offsets: [12, 18] },
      bf16: { dtype: "BF16", shape: [3], data_offsets: [18, 24] },
      i64: { dtype: "I64", shape: [1], data_offsets: [24, 32] },
      i32: { dtype: "I32", shape: [1, 2], data_offsets: [32, 40] },
      i16: { dtype: "I16", shape: [2], data_offsets: [40, 44] },
      i8: { dtype: "I8", shape: [1], data_offsets: [44, 45] },
      u8: { dtype: "U8", shape: [1], data_offsets: [45, 46] },
      bool: { dtype: "BOOL", shape: [1], data_offsets: [46, 47] },
      empty: { dtype: "F32", shape: [0, 7], data_offsets: [47, 47] },
    },
    data,
  );
  const opened = await openSafetensors(source(bytes));
  t.same(
    [...opened.metadata],
    [
      ["format", "pt"],
      ["note", "ü"],
    ],
  );
  t.same([...(await opened.readF32("f64"))], [Math.fround(1 / 3)]);
  t.same([...(await opened.readF32("f32"))], [Math.fround(0.1)]);
  t.same([...(await opened.readF32("f16"))], [1, -2, 2 ** -24]);
  t.same([...(await opened.readF32("bf16"))], [1, -3, 2 ** -126]);
  t.equal((await opened.readF32("empty")).length, 0);
  const i64 = await opened.read("i64");
  t.equal(new DataView(i64.buffer, i64.byteOffset).getBigInt64(0, true), -5n);
  t.same([...(await opened.read("u8"))], [2]);
  for (const name of ["i64", "i32", "i16", "i8", "u8", "bool"]) {
    await t.rejects(opened.readF32(name), { tag: "format", part: `tensor ${name}`, message: /expected F32/ });
  }
  await t.rejects(opened.read("toString"), { tag: "format", message: /tensor toString: is not in the file/ });
});

t.test("a source that learns its size from its first read", async (t) => {
  let size: number | undefined;
  const reads: number[][] = [];
  const opened = await openSafetensors({
    name: "https://example.org/a.safetensors",
    get byteLength() {
      return size;
    },
    async read(offset, length) {
      size = golden.length;
      reads.push([offset, length]);
      return golden.subarray(offset, offset + length);
    },
  });
  t.equal(opened.tensors.size, 4);
  t.same(reads, [
    [0, 8],
    [8, new DataView(golden.buffer).getUint32(0, true)],
  ]);
  const silent = { ...source(golden), byteLength: undefined };
  await t.rejects(openSafetensors(silent), { tag: "source", message: /size/ });
});

t.test("a header of any depth is read in one pass, up to its limits", async (t) => {
  t.setTimeout(120_000);
  const long = "n\\u0061me ".repeat(2 ** 12);
  const place = JSON.stringify(f32(0, 4));
  const named = await openSafetensors(source(file(`{"__metadata__":{"a":"${long}"},"${long}":${place}}`, 4)));
  t.equal(named.metadata.get("a"), "name ".repeat(2 ** 12));
  t.ok(named.tensors.has("name ".repeat(2 ** 12)));
  await t.rejects(openSafetensors(source(file(`{"${long}":${place},"${long}":${place}}`, 4))), {
    tag: "format",
    message: /names "name name .*… twice/,
  });
  const deep = (open: string, close: string): string => `{"a":${open.repeat(10 ** 6)}1${close.repeat(10 ** 6)}}`;
  for (const text of [deep("[", "]"), deep('{"a":', "}"), "[".repeat(10 ** 7)]) {
    await t.rejects(openSafetensors(source(file(text))), {
      tag: "format",
      message: /^some.safetensors, (header|tensor a): /,
    });
  }
  const count = runs(300_000);
  const empty = JSON.stringify(f32(0, 0));
  const large = source(file(`{${Array.from({ length: count }, (_, i) => `"t${i}":${empty}`)}}`));
  const many = await openSafetensors(large, { maxHeaderBytes: large.byteLength });
  t.equal(many.tensors.size, count);
  const reads: number[] = [];
  const counted = {
    ...large,
    read: async (at: number, length: number) => (reads.push(length), large.read(at, length)),
  };
  await t.rejects(openSafetensors(counted, { maxHeaderBytes: 1e6 }), {
    tag: "format",
    part: "header",
    message: /has \d+ bytes, at most 1000000 are read; save its tensors in several files/,
  });
  t.same(reads, [8], "a header that is too large is not read");
  const shape = `{"a":{"dtype":"F32","shape":[${"0,".repeat(40_000)}0],"data_offsets":[0,0]}}`;
  await t.rejects(openSafetensors(source(file(shape))), {
    message: /tensor a: takes more than 65536 bytes of the header/,
  });
});

t.test("truncated anywhere", async (t) => {
  const headerEnd = 8 + new DataView(golden.buffer).getUint32(0, true);
  const lengths = Array.from({ length: headerEnd + 1 }, (_, i) => i);
  for (let length = headerEnd + 1; length < golden.length; length += 61) lengths.push(length);
  lengths.push(golden.length - 1);
  for (const length of lengths) {
    const error = await openSafetensors(source(golden.subarray(0, length), "cut.safetensors")).catch((e: unknown) => e);
    const named = error instanceof FormatError && error.file === "cut.safetensors";
    if (!named || !error.message.includes("download it again")) t.fail(`length ${length}: ${String(error)}`);
  }
  t.ok(lengths.length > headerEnd);
});

const place = JSON.stringify(f32(0, 4));
const hostile: [name: string, bytes: Uint8Array, message: RegExp][] = [
  [
    "header length beyond the cap",
    file(new Uint8Array(8)).fill(0xff, 0, 8),
    /is larger than the 100000000 bytes that are allowed/,
  ],
  ["header length beyond the file", file("{}").fill(99, 0, 1), /header: ends at byte 107, but the file has 10; trunc/],
  ["header of length 0", file(""), /does not begin with "{"/],
  ["header with leading space", file(" {}"), /does not begin with "{"/],
  ["not UTF-8", file(new Uint8Array([0x7b, 0x22, 0xff, 0x22, 0x7d])), /not UTF-8/],
  ["byte order mark", file("\ufeff{}"), /does not begin/],
  ["not JSON", file("{nope}"), /not valid JSON/],
  ["JSON with text behind", file("{} x"), /not valid JSON/],
  ["tensor named twice", file(`{"a":${place},"a":${place}}`, 4), /"a" twice/],
  ["tensor named twice, escaped", file(`{"a":${place},"\\u0061":${place}}`, 4), /"a" twice/],
  ["field named twice", file(`{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}`, 4), /"shape" twice/],
  ["metadata not an object", file({ __metadata__: ["pt"] }), /__metadata__: is not a JSON object/],
  ["metadata not strings", file({ __metadata__: { format: 1 } }), /format is 1, expected a string/],
  ["tensor null", file({ a: null }), /tensor a: is null/],
  ["dtype unknown", file({ a: { ...f32(0, 4), dtype: "F31" } }, 4), /tensor a: has dtype "F31", expected one of F64/],
  ["dtype of Object.prototype", file({ a: { ...f32(0, 4), dtype: "constructor" } }, 4), /has dtype "constructor"/],
  ["dtype missing", file({ a: { shape: [1], data_offsets: [0, 4] } }, 4), /has dtype missing/],
  ["shape negative", file({ a: f32(0, 4, [-1, -1]) }, 4), /shape \[-1,-1\]/],
  ["shape fractional", file({ a: f32(0, 4, [0.5, 2]) }, 4), /shape \[0.5,2\]/],
  ["shape a string", file({ a: f32(0, 4, "1") }, 4), /shape "1"/],
  ["shape of strings", file({ a: f32(0, 4, ["1"]) }, 4), /shape \["1"\]/],
  ["shape unsafe", file({ a: f32(0, 4, [2 ** 53]) }, 4), /shape/],
  ["shape overflows", file({ a: f32(0, 4, [2 ** 32, 2 ** 32]) }, 4), /overflows/],
  ["shape overflows to a small product", file({ a: f32(0, 4, [2 ** 40, 2 ** 40, 0]) }, 4), /overflows/],
  ["bytes overflow", file({ a: f32(0, 4, [2 ** 52]) }, 4), /overflows/],
  ["not a whole byte", file({ a: { dtype: "F4", shape: [3], data_offsets: [0, 2] } }, 2), /whole number of bytes/],
  ["offsets reversed", file({ a: f32(4, 0, [1]) }, 4), /data_offsets \[4,0\]/],
  ["offsets negative", file({ a: f32(-4, 0, [1]) }, 4), /data_offsets \[-4,0\]/],
  ["three offsets", file({ a: { ...f32(0, 4), data_offsets: [0, 4, 4] } }, 4), /data_offsets \[0,4,4\]/],
  ["offsets larger than the shape", file({ a: f32(0, 8, [1]) }, 8), /takes 4 bytes, but its data_offsets span 8/],
  ["offsets smaller than the shape", file({ a: f32(0, 4, [2]) }, 4), /takes 8 bytes, but its data_offsets span 4/],
  ["overlap", file({ a: f32(0, 8), b: f32(4, 12) }, 12), /tensor b: begins at byte \d+, expected \d+: it overlaps/],
  ["one tensor inside another", file({ a: f32(0, 12), b: f32(4, 8) }, 12), /tensor b: .* overlaps/],
  ["same bytes twice", file({ a: f32(0, 4), b: f32(0, 4) }, 4), /overlaps/],
  ["hole", file({ a: f32(0, 4), b: f32(8, 12) }, 12), /tensor b: .* hole before it/],
  ["hole at the beginning", file({ a: f32(4, 8) }, 8), /tensor a: .* hole before it/],
  ["bytes behind the last tensor", file({ a: f32(0, 4) }, 5), /1 more bytes follow/],
  ["no tensors, but bytes", file({}, 4), /4 more bytes follow/],
  ["tensor beyond the end", file({ a: f32(0, 8) }, 4), /end at byte \d+, but the file has \d+; truncated/],
];
for (const [name, bytes, message] of hostile) {
  t.test(`refuses: ${name}`, async (t) => {
    await t.rejects(openSafetensors(source(bytes)), { tag: "format", file: "some.safetensors", message });
  });
}

t.test("mutants of a good file open or are refused, and never read out of place", async (t) => {
  const headerEnd = 8 + new DataView(golden.buffer).getUint32(0, true);
  let opened = 0;
  await fc.assert(
    fc.asyncProperty(
      fc.array(fc.tuple(fc.nat(headerEnd - 1), fc.nat(255)), { minLength: 1, maxLength: 4 }),
      async (changes) => {
        const bytes = golden.slice();
        for (const [at, value] of changes) bytes[at] = value;
        try {
          const file = await openSafetensors(source(bytes));
          for (const { byteOffset, byteLength } of file.tensors.values()) {
            if (byteOffset < headerEnd || byteOffset + byteLength > bytes.length) throw new Error("out of place");
          }
          opened++;
        } catch (error) {
          if (!(error instanceof FormatError)) throw error;
        }
      },
    ),
    { numRuns: runs(3000), seed: 7 },
  );
  t.ok(opened > 0 && opened < 3000, `${opened} of 3000 opened`);
});

t.test("what is written is read back, aligned", async (t) => {
  const dtypes = { F64: 8, I64: 8, F32: 4, F16: 2, BF16: 2, I16: 2, U8: 1, BOOL: 1 };
  const entry = fc.record({
    name: fc.string({ unit: "grapheme", maxLength: 12 }).filter((name) => name !== "__metadata__"),
    dtype: fc.constantFrom(...(Object.keys(dtypes) as (keyof typeof dtypes)[])),
    shape: fc.array(fc.nat(4), { maxLength: 3 }),
  });
  await fc.assert(
    fc.asyncProperty(
      fc.uniqueArray(entry, { selector: ({ name }) => name, maxLength: 8 }),
      fc.option(fc.dictionary(fc.string(), fc.string()), { nil: undefined }),
      async (specs, notes) => {
        const contents = new Map(
          specs.map(({ name, dtype, shape }, i) => {
            const length = elementsOf(shape) * dtypes[dtype];
            return [name, Uint8Array.from({ length }, (_, j) => 31 * i + j)];
          }),
        );
        const entries = specs.map((spec) => ({ ...spec, read: () => contents.get(spec.name)! }));
        const bytes = await bytesOf(entries, new Map(Object.entries(notes ?? {})));
        const headerLength = new DataView(bytes.buffer).getUint32(0, true);
        const file = await openSafetensors(source(bytes));
        const { tensors, metadata } = file;
        if (headerLength % 8 !== 0 || tensors.size !== specs.length) throw new Error("header");
        for (const [key, text] of Object.entries(notes ?? {})) if (metadata.get(key) !== text) throw new Error(key);
        for (const { name, dtype, shape } of specs) {
          const tensor = tensors.get(name)!;
          if (tensor.dtype !== dtype || tensor.shape.join() !== shape.join()) throw new Error(name);
          if (tensor.byteOffset % dtypes[dtype] !== 0) throw new Error(`${name} is not aligned`);
          if (Buffer.compare(await file.read(name), contents.get(name)!) !== 0) throw new Error(`${name} differs`);
        }
      },
    ),
    { numRuns: runs(300), seed: 11 },
  );
  t.pass();
});

t.test("the writer holds one tensor at a time and refuses what it could not read", async (t) => {
  const entry = (name: string, dtype: string, shape: number[], length: number): SafetensorsEntry => ({
    name,
    dtype,
    shape,
    read: () => {
      reads.push(name);
      return new Uint8Array(length);
    },
  });
  const reads: string[] = [];
  const chunks = writeSafetensors([entry("b", "F32", [2], 8), entry("a", "F32", [1], 4)]);
  await chunks.next();
  t.same(reads, []);
  t.equal((await chunks.next()).value!.length, 4);
  t.same(reads, ["a"]);
  const twins = [entry("a", "F32", [1], 4), entry("a", "F32", [1], 4)];
  await t.rejects(bytesOf(twins), { name: "RangeError", message: /called a/ });
  await t.rejects(bytesOf([entry("__metadata__", "F32", [1], 4)]), { name: "RangeError" });
  await t.rejects(bytesOf([entry("a", "F33", [1], 4)]), { name: "RangeError", message: /a cannot be F33/ });
  await t.rejects(bytesOf([entry("a", "F32", [-1], 4)]), { name: "RangeError" });
  await t.rejects(bytesOf([entry("a", "F32", [2 ** 40, 2 ** 40], 4)]), { name: "RangeError" });
  await t.rejects(bytesOf([entry("a", "F32", [2], 4)]), { name: "RangeError", message: /a takes 8 bytes, got 4/ });
});
