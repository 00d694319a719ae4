/**
 * Entropy-coded sections: they decode byte for byte, damage is found, and
 * packs made with a step match their options.
 */
import type { TensorRef } from "eigenlora";
import { openPack } from "eigenlora";
import { buildPack, planAppend, projectAdapters } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import t from "tap";
import { fromRoot } from "../support/folder.ts";
import { atOnce, decodeTensor, encodeTensor, normal, uniform } from "../support/internals/base.ts";
import {
  type Coder,
  code,
  decodeSection,
  Encoder,
  encodeSection,
  FIRST_TABLES,
  freshDecoder,
  isCoded,
  mostDecoded,
  wasmFloats,
  type wasmWork,
} from "../support/internals/format.ts";
import { allOf, freshPack } from "../support/internals/pack.ts";
import { createWasmBackend } from "../support/internals/runtime.ts";
import { concat } from "../support/packs.ts";
import { runs } from "../support/required.ts";

/** Numbers of tables, as `coded.ts` has them behind those of integers. */
const MORE = 66;
const SHAPE = 69;
const LITERALS: number = 71;
const LENGTH: number = 72;
const DISTANCE: number = 73;

const OWN_SEED = fromRoot("test/data/adapters/own-seed");

/**
 * Decodes a section with both decoders.
 * @throws FormatError when both refuse it for the same reason, a plain Error when they differ
 */
async function decode(bytes: Uint8Array, part = "part", before?: Uint8Array, expected?: number): Promise<Uint8Array> {
  const how = { file: "file", part, ...(before && { before }), expected };
  const said = await Promise.all(
    [how, { ...how, by: () => undefined }].map((how) => decodeSection(bytes, how).catch((error: Error) => error)),
  );
  const [fast, plain] = said as [Uint8Array | Error, Uint8Array | Error];
  if (fast instanceof Error && plain instanceof Error && fast.message === plain.message) throw fast;
  if (fast instanceof Error || plain instanceof Error || !Buffer.from(fast).equals(plain))
    throw new Error(`the decoders differ: ${String(fast).slice(0, 200)} | ${String(plain).slice(0, 200)}`);
  return fast;
}

/** A section of random tensors and bytes between them. */
function randomSection(seed: number): { section: Uint8Array; tensors: TensorRef[]; step: 4 | 16 } {
  const random = uniform(seed);
  const noise = (): number => normal(random);
  const step = random() < 0.5 ? 4 : 16;
  const tensors: TensorRef[] = [];
  const parts: { at: number; bytes: Uint8Array }[] = [];
  let end = Math.floor(random() * 200);
  parts.push({ at: 0, bytes: Uint8Array.from({ length: end }, () => 65 + Math.floor(random() * 3)) });
  for (let run = 0; run < 1 + random() * 4; run++) {
    const dtype = (["int8", "int4", "int3", "f16", "f32"] as const)[Math.floor(random() * 5)]!;
    const rows = 1 + Math.floor(random() * 6);
    // One run in six may have so many integers that frequencies are given.
    const width = Math.floor(random() * (random() < 1 / 6 ? 3000 : 70));
    const spread = 2 ** (random() * 8 - 4);
    for (let count = 0; count < 1 + random() * 4; count++) {
      const values = Float32Array.from({ length: rows * width }, () => spread * noise());
      const steps = random() < 0.5 ? new Float32Array(rows).fill(random()) : undefined;
      const bytes = encodeTensor(dtype, values, rows, width, steps);
      const at = Math.ceil(end / step) * step;
      tensors.push({ dtype, rows, width, byteOffset: at, byteLength: bytes.length });
      parts.push({ at, bytes });
      end = at + bytes.length;
    }
  }
  const section = new Uint8Array(end);
  for (const { at, bytes } of parts) section.set(bytes, at);
  return { section, tensors, step };
}

t.test("any section comes back", async (t) => {
  let coded = 0;
  const count = runs(300);
  for (let seed = 0; seed < count; seed++) {
    const { section, tensors, step } = randomSection(seed);
    // Bytes before a section may share content with it or not.
    const before = seed % 2 ? randomSection(seed % 4 === 1 ? seed : seed + 1).section.subarray(0, 300) : undefined;
    const bytes = encodeSection(section, tensors, step, before);
    if (!bytes) continue;
    coded++;
    if (!Buffer.from(await decode(bytes, "part", before)).equals(section)) t.fail(`seed ${seed}`);
  }
  t.ok(coded > 0.6 * count, `${coded} of ${count} were smaller coded`);
});

t.test("damage is found, and nothing grows beyond bounds", async (t) => {
  const random = uniform(3);
  const sectionOf = (rows: number, width: number): [section: Uint8Array, bytes: Uint8Array] => {
    const values = Float32Array.from({ length: rows * width }, () => normal(random));
    const section = encodeTensor("int4", values, rows, width, new Float32Array(rows).fill(0.7));
    const tensor = { dtype: "int4", rows, width, byteOffset: 0, byteLength: section.length } as const;
    return [section, encodeSection(section, [tensor], 4)!];
  };
  const [section, bytes] = sectionOf(8, 300);
  // This one has given frequencies.
  const [, many] = sectionOf(3, 1500);
  let [refused, other] = [0, 0];
  const count = runs(4000);
  for (let i = 0; i < count; i++) {
    const damaged = (i % 4 ? bytes : many).slice();
    for (let n = 0; n < 1 + random() * 3; n++)
      damaged[Math.floor(random() * damaged.length)]! ^= 1 << Math.floor(random() * 8);
    try {
      await decode(damaged);
      other++;
    } catch (error) {
      if ((error as { tag?: string }).tag !== "format") t.fail(String((error as Error).stack));
      refused++;
    }
  }
  t.ok(
    refused > 0.9 * count,
    `${refused} refused, ${other} read as something else, which the checksum of a section finds`,
  );
  for (let length = 0; length < bytes.length; length += 7)
    await t.rejects(decode(bytes.subarray(0, length)), /file, part: as it is coded, /);
  const former = Uint8Array.of(...new TextEncoder().encode("CODE"), ...bytes.subarray(4));
  t.ok(isCoded(former), "a section of 1.1 is known as one");
  await t.rejects(decode(former), /of another version: pack the adapters again/);
  const bomb = bytes.slice();
  new DataView(bomb.buffer).setUint32(4, 0xffffffff, true);
  await t.rejects(decode(bomb, "bases"), /becomes 4294967295 bytes, of \d+ that are stored/);
  await t.rejects(decode(bytes, "bases", undefined, section.length + 1), /its tensors need \d+/);
});

t.test("streams that no encoder writes: both decoders say the same", async (t) => {
  const random = uniform(11);
  const known = randomSection(2).section;
  let [read, refused, many] = [0, 0, 0];
  // A level has those of 0, of 1 to 15, and of all others.
  const frequencies = Uint16Array.from({ length: 15 * 17 }, (_, i) => (i % 17 === 0 ? 600 : i % 17 < 16 ? 40 : 248));
  const count = runs(8000);
  for (let seed = 0; seed < count; seed++) {
    const encoder = new Encoder();
    const skew = 1 + random() * 4;
    // One in sixteen is a tensor of given frequencies, with few random decisions: thousands of them would never be
    // right.
    const wide = seed % 16 === 0;
    const dtype = (["int8", "int4", "int3"] as const)[seed % 3]!;
    const shape = [2 + Math.floor(random() * 3), 2100 + Math.floor(random() * 400)] as const;
    const values = Float32Array.from({ length: wide ? shape[0] * shape[1] : 0 }, () => 2 * normal(random));
    const section = wide ? encodeTensor(dtype, values, ...shape) : new Uint8Array(Math.floor(random() ** 3 * 3000));
    const run = { dtype, rows: shape[0], width: shape[1], count: 1, step: 4, given: true, byteOffset: 0 } as const;
    let possible = (_level: number, _symbol: number): boolean => false;
    let changed = false;
    const given = (): boolean => {
      const kept = wide && random() < 0.9998;
      changed ||= !kept;
      return kept;
    };
    // Fills a section with random decisions, and codes them.
    const chance: Coder = {
      get lane() {
        return encoder.lane;
      },
      set lane(lane) {
        encoder.lane = lane;
      },
      give: (frequencies) => {
        possible = (level, symbol) => frequencies[level * 17 + Math.abs(symbol)]! > 0;
        encoder.give(frequencies);
      },
      given: (level, value) => {
        const wanted = given() ? value : Math.floor(random() * 32) - 16;
        // A frequency before it may have become 0.
        const symbols = [wanted, ...Array.from({ length: 17 }, (_, i) => -i)];
        return encoder.given(level, symbols.find((symbol) => possible(level, symbol))!);
      },
      symbol: (table, value) => {
        // A decision before it may have made it −1.
        if (given()) return encoder.symbol(table, Math.max(0, value));
        // Shapes and lengths that fit are small.
        const most = random() < 0.1 || ![SHAPE, LITERALS, LENGTH, DISTANCE].includes(table) ? 8 : 2;
        const other = Number(table === SHAPE) + Math.floor(most * random() ** skew);
        return encoder.symbol(table, table === MORE && random() < 0.2 ? 7 : Math.min(7, other));
      },
      bits: (count, value) =>
        encoder.bits(count, given() ? value : Math.floor(random() * (count === 2 ? 3.1 : 2 ** count))),
    };
    const before = known.subarray(0, seed % 100);
    const refuse = (fault: string): never => {
      throw new Error(fault);
    };
    let whole = true;
    try {
      const plan = { runs: [run], frequencies, copyAt: () => undefined };
      const pieces = code(chance, section, refuse, before, wide ? plan : undefined);
      while (!pieces.next().done);
    } catch {
      whole = false;
    }
    const bytes = encoder.finish(section.length);
    try {
      const found = await decode(bytes, "part", before);
      // Coding adds to what is there, and so tells what was decided only where nothing was.
      if (!whole || !(wide || Buffer.from(found).equals(section))) t.fail(`seed ${seed}`);
      read++;
      if (wide) many++;
    } catch (error) {
      // A tensor of another shape leaves bytes as they were, which a decoder does not know.
      const sound = whole && (!wide || !changed) && section.length <= mostDecoded(bytes.length);
      if ((error as { tag?: string }).tag !== "format" || sound) t.fail(`seed ${seed}: ${(error as Error).stack}`);
      refused++;
    }
  }
  t.ok(
    read > count / 20 && refused > count / 20 && many > count / 400,
    `${read} read, ${many} of them with given frequencies, ${refused} refused`,
  );
});

t.test("floats of a decoded tensor by WebAssembly are those of decodeTensor, turned or not", (t) => {
  const random = uniform(21);
  const same = (a: Float32Array, b: Float32Array): boolean =>
    Buffer.from(a.slice().buffer).equals(Buffer.from(b.buffer));
  for (let i = 0; i < 300; i++) {
    const dtype = (["int8", "int4", "int3"] as const)[i % 3]!;
    const [rows, width] = [1 + Math.floor(random() * 20), 1 + Math.floor(random() ** 3 * 5000)];
    const values = Float32Array.from({ length: rows * width }, () => normal(random));
    const bytes = encodeTensor(dtype, values, rows, width);
    const plain = decodeTensor(dtype, bytes, rows, width);
    const turned = plain.map((_, at) => plain[(at % rows) * width + Math.floor(at / rows)]!);
    if (!same(wasmFloats(dtype, bytes, rows, width, false)!, plain)) t.fail(`${dtype} [${rows}, ${width}]`);
    if (!same(wasmFloats(dtype, bytes, rows, width, true)!, turned)) t.fail(`${dtype} [${rows}, ${width}], turned`);
  }
  t.ok(wasmFloats("int8", new Uint8Array(8), 1, 4, true)!.every((value) => value === 0));
  t.equal(wasmFloats("int8", new Uint8Array(8), 2 ** 20, 2 ** 10, false), undefined, "more than it has memory for");
  t.end();
});

/** A coded section of nearly the largest size: one tensor whose integers are mostly 0. */
function sparse(rows: number, width: number, share: number): Uint8Array {
  const random = uniform(4);
  const values = Float32Array.from({ length: rows * width }, () => (random() < share ? 1 : 0));
  const section = encodeTensor("int8", values, rows, width, new Float32Array(rows).fill(1));
  const tensor = { dtype: "int8", rows, width, byteOffset: 0, byteLength: section.length } as const;
  const bytes = encodeSection(section, [tensor], 4)!;
  if (!(section.length > 13 * bytes.length)) throw new Error(`${section.length} of ${bytes.length}`);
  return bytes;
}

t.test("long work is done in pieces, which a signal ends", async (t) => {
  const bytes = sparse(16, 100_000, 0.09);
  const wrong = bytes.slice();
  wrong[wrong.length - 1]! ^= 1;
  for (const by of [undefined, () => undefined]) {
    const how = { file: "file", part: "part", ...(by && { by }) };
    // Others have a turn while it is decoded, whether it is right or not.
    for (const [of, expected] of [
      [bytes, /^$/],
      [wrong, /as it is coded, /],
    ] as const) {
      let turns = 0;
      let going = true;
      const others = (async () => {
        for (; going; turns++) await new Promise((resolve) => setImmediate(resolve));
      })();
      const message = await decodeSection(of, how).then(
        () => "",
        (error: Error) => error.message,
      );
      going = false;
      await others;
      t.match(message, expected);
      if (by) t.ok(turns > 1, `${turns} turns`);
    }
    const controller = new AbortController();
    const work = decodeSection(bytes, { ...how, signal: controller.signal });
    controller.abort(new Error("enough"));
    await (by ? t.rejects(work, /^enough$/) : work.catch(() => {}));
  }
});

t.test("no promise of WebAssembly is waited for: WebKit's workers may not settle it", async (t) => {
  const { section, tensors, step } = randomSection(1);
  const stored = encodeSection(section, tensors, step)!;
  const { Module, compile, instantiate } = WebAssembly;
  t.teardown(() => Object.assign(WebAssembly, { Module, compile, instantiate }));
  const never = (): Promise<never> => new Promise(() => {});
  Object.assign(WebAssembly, { compile: never, instantiate: never });
  const by = (work: typeof wasmWork): ReturnType<typeof wasmWork> =>
    work({
      ...{ stored, before: new Uint8Array(), size: section.length, tables: FIRST_TABLES },
      refuse: (fault) => t.fail(`${fault}`) as never,
    });
  t.ok(Buffer.from(atOnce(by((await freshDecoder()).wasmWork)!)).equals(section));
  for (const variant of ["scalar", "simd"] as const) t.equal((await createWasmBackend({ variant })).variant, variant);
  Object.assign(WebAssembly, { Module: undefined });
  t.equal(by((await freshDecoder()).wasmWork), undefined, "then JavaScript decodes");
  await t.rejects(createWasmBackend(), { tag: "backend", message: /is not a constructor/ });
});

t.test("sections that are decoded at the same time", async (t) => {
  const sections = [1, 2, 3, 4].map((seed) => randomSection(seed));
  const coded = sections.map(({ section, tensors, step }) => encodeSection(section, tensors, step));
  const large = sparse(4, 100_000, 0.09);
  const how = { file: "file", part: "part" };
  const [first, ...others] = await Promise.all([large, ...coded].map((bytes) => bytes && decodeSection(bytes, how)));
  t.ok(Buffer.from(first!).equals(await decode(large)));
  others.forEach((found, i) => t.ok(!found || Buffer.from(found).equals(sections[i]!.section)));
});

t.test(
  "a copy of a pack made with a step is the same, and a task that comes later is coded with that step",
  async (t) => {
    const adapters = await readAdapters([OWN_SEED]);
    t.teardown(async () => Promise.all(adapters.map((adapter) => adapter.close())));
    const some = adapters.slice(0, 12);
    const how = { gauge: "balanced", rank: 3, select: { kind: "k", k: 16 } } as const;
    const coded = await buildPack(some, { ...how, step: 0.025 });

    const pack = await openPack(concat(coded.chunks));
    t.ok(
      pack.directory.sections.every(({ coded }) => coded),
      "all sections are coded",
    );
    t.ok(Buffer.concat(await allOf((await freshPack(pack)).chunks)).equals(Buffer.concat(coded.chunks)));
    const dtype = { basis: "f16", coefficients: "f16", head: "int4" } as const;
    const newcomer = adapters[15]!;
    await t.rejects(projectAdapters(pack, [newcomer, newcomer], dtype), /has the id "\S+", as/);
    const [late] = await projectAdapters(pack, [newcomer], dtype, { maxLoss: 1 });
    const append = await planAppend(pack, [late!]);
    t.ok(isCoded(append.body.find((part) => part.length > 64)!));
    const bytes = Buffer.concat([Buffer.concat(coded.chunks), ...append.body]);
    Buffer.from(append.superblock).copy(bytes, append.superblockOffset);
    const grown = await openPack(new Uint8Array(bytes));
    const blob = await grown.load(newcomer.id);
    t.equal(blob.terms.length, pack.modules.length);
    const mean = [...grown.tasks.values()].slice(0, 12).reduce((sum, task) => sum + task.bytes / 12, 0);
    t.ok(grown.tasks.get(newcomer.id)!.bytes < 2 * mean, "about as large as the others");
    const make = (options: object): Promise<unknown> => buildPack(some, options);
    for (const step of [0, -1, NaN, 17]) await t.rejects(make({ step }), /step must be above 0 and at most 16/);
    await t.rejects(make({ step: 0.1, headStep: -1 }), /headStep must be above 0/);
  },
);
