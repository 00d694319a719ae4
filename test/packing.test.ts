/** Measures that make packing fast and small in memory change no byte of a pack. */

import { type Adapter, type BuildOptions, buildPack, searchPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import t from "tap";
import { noise } from "./compare.ts";
import {
  buildStreamed,
  createExtractor,
  createWasmProducts,
  encodeTensor,
  gathered,
  openAdapters,
  packRows,
  piecesOf,
  recipeOf,
  searchStreamed,
  sharedModules,
} from "./internals.ts";
import { concat, data } from "./packs.ts";

const names = ["debtags-role", "debtags-use", "debtags-interface"];
const adapters = await readAdapters(names.map((name) => data(`adapters/own-seed/${name}`)));
t.teardown(() => Promise.all(adapters.map((adapter) => adapter.close())));

t.test("WebAssembly finds the scales that the plain loop finds", async (t) => {
  const rows: [string, Float64Array][] = [
    ...[1, 2, 63, 64, 65, 768, 1281].map((width): [string, Float64Array] => [`noise of ${width}`, noise(width, width)]),
    ["a few that stand out", noise(500, 7).map((value, i) => (i % 97 === 0 ? 9 * value : value ** 3))],
    // Halves round upwards, those below zero too.
    ["halves", Float64Array.from({ length: 29 }, (_, i) => (i - 14) / 2)],
    ["just below a half", Float64Array.of(7, 0.49999999999999994, -0.49999999999999994, -0.5, 0.5, -1e-20)],
    ["nothing", new Float64Array(10)],
    ["next to nothing", Float64Array.of(1e-9, -1e-8, 1e-300)],
  ];
  for (const variant of ["scalar", "simd"] as const) {
    const { findScale } = await createWasmProducts({ variant });
    for (const [name, row] of rows) {
      for (const type of ["int3", "int4", "int8"] as const) {
        const plain = encodeTensor(type, row, 1, row.length);
        t.strictSame(
          encodeTensor(type, row, 1, row.length, undefined, findScale),
          plain,
          `${variant}, ${type}: ${name}`,
        );
      }
    }
  }
});

const WAYS: Record<string, BuildOptions> = {
  components: { select: { kind: "k", k: 3 } },
  "each task by itself": { select: { kind: "k", k: 0 }, rank: 2 },
  coded: { select: { kind: "k", k: 2 }, step: 0.1 },
};

t.test("a pack whose blobs lie elsewhere until it is written is the same", async (t) => {
  let put = 0;
  const scratch = {
    async put(bytes: Uint8Array) {
      put++;
      const copy = bytes.slice();
      bytes.fill(0);
      return async () => copy;
    },
  };
  for (const [name, options] of Object.entries(WAYS)) {
    const [whole, streamed] = [await buildPack(adapters, options), await buildStreamed(adapters, options, scratch)];
    t.equal(put, adapters.length, name);
    put = 0;
    const { chunks, report } = await gathered(streamed);
    t.ok(Buffer.from(concat(chunks)).equals(concat(whole.chunks)), name);
    t.strictSame(report, whole.report, `${name}: the report`);
  }
  for (const goal of [{ kind: "error", max: 0.3 } as const, { kind: "bytes", max: 60_000 } as const]) {
    const [whole, streamed] = [await searchPack(adapters, { goal }), await searchStreamed(adapters, { goal }, scratch)];
    const { chunks, report } = await gathered(streamed);
    t.ok(Buffer.from(concat(chunks)).equals(concat(whole.chunks)), `searched, ${goal.kind}`);
    t.strictSame(report, whole.report);
  }
});

t.test("what is encoded again with other steps is what would have been at first", async (t) => {
  const extractor = await createExtractor();
  const read = new Map<string, number>();
  const watched = adapters.map((adapter) => counting(adapter, read));
  const opened = await openAdapters("buildPack", watched, {}, extractor);
  const recipe = recipeOf({ select: { kind: "k", k: 0 }, step: 0.05 });
  const [first, second] = [new Map(names.map((id) => [id, 0.02])), new Map(names.map((id) => [id, 0.03]))];
  second.set(names[0]!, 0.02);
  const again = await packRows(
    opened,
    recipe,
    {
      async choose(_, encode) {
        await encode(first);
        read.clear();
        const found = await encode(second);
        t.notOk(read.has(names[0]!), "of the first nothing has changed");
        read.clear();
        await encode(second);
        t.equal(read.size, 0, "nothing is read where nothing has changed");
        return found;
      },
    },
    undefined,
  );
  const fresh = await packRows(opened, recipe, { choose: (_, encode) => encode(second) }, undefined);
  const [one, other] = [await gathered(again), await gathered(fresh)];
  t.ok(Buffer.from(concat(one.chunks)).equals(concat(other.chunks)));
  t.strictSame(one.report, other.report);
  await extractor.close();
});

/** The adapter, with counted reads of its modules. */
function counting(adapter: Adapter, read: Map<string, number>): Adapter {
  const all = [...adapter.modules].map(([name, module]): [string, typeof module] => [
    name,
    {
      ...module,
      read: () => {
        read.set(adapter.id, (read.get(adapter.id) ?? 0) + 1);
        return module.read();
      },
    },
  ]);
  return { ...adapter, modules: new Map(all) };
}

t.test("pieces of a module are its owners in their order, a few at a time", async (t) => {
  const many = Array.from({ length: 100 }, (_, i) => ({ ...adapters[i % 3]!, id: `${i}` }));
  const [module] = sharedModules(many).values();
  const pieces = piecesOf(module!);
  t.ok(pieces.length > 1);
  t.strictSame(
    pieces.flatMap(({ owners }) => owners.map(({ id }) => id)),
    many.map(({ id }) => id),
  );
  const lossesAlone = async (some: readonly Adapter[]) =>
    (await buildPack(some, { select: { kind: "k", k: 0 }, rank: 1 })).report.errors;
  const alone = await lossesAlone(many.slice(0, 3));
  t.strictSame((await lossesAlone(many)).slice(0, 3), alone, "what one loses does not depend on the others");
});
