/** Measures that make packing fast and small in memory change no byte of a pack. */

import { type Adapter, type BuildOptions, buildPack, type PrivateChoice, searchPack } from "eigenlora/build";
import { readAdapters } from "eigenlora/node";
import t from "tap";
import { noise } from "./compare.ts";
import {
  buildStreamed,
  createExtractor,
  createWasmProducts,
  Draft,
  encodeTensor,
  gathered,
  openAdapters,
  recipeOf,
  searchStreamed,
} from "./internals.ts";
import { concat, data } from "./packs.ts";

const names = ["debtags-role", "debtags-use", "debtags-interface"];
const adapters = await readAdapters(names.map((name) => data(`adapters/own-seed/${name}`)));
t.teardown(() => Promise.all(adapters.map((adapter) => adapter.close())));
const modules = [...adapters[0]!.modules.keys()];

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
  "components and private terms": { select: { kind: "k", k: 2 }, gauge: "balanced", privateTerms: 2 },
  coded: { select: { kind: "k", k: 2 }, gauge: "balanced", privateTerms: 8, step: 0.1 },
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

/** Private terms by task and module. */
function allocation(choose: (task: number, module: number) => PrivateChoice | undefined) {
  return new Map(
    adapters.map(({ id }, task) => {
      const own = modules.flatMap((name, module) => {
        const choice = choose(task, module);
        return choice ? [[name, choice] as const] : [];
      });
      return [id, new Map(own)];
    }),
  );
}

t.test("what is extracted again with other private terms is what would have been at first", async (t) => {
  const first = allocation((task, module) => ({ rank: 1 + ((task + module) % 4), dtype: "int4" }));
  const second = allocation((task, module) => {
    if (module === 1) return undefined;
    if (task === 0) return { rank: 1 + (module % 4), dtype: "int4" };
    return { rank: 1 + ((task + module) % 4) + (module % 3 === 0 ? 1 : 0), dtype: task === 2 ? "int8" : "int4" };
  });
  const extractor = await createExtractor();
  for (const k of [0, 2]) {
    const options: BuildOptions = { gauge: "balanced", select: { kind: "k", k } };
    const read = new Map<string, number>();
    const watched = adapters.map((adapter) => counting(adapter, read));
    const opened = await openAdapters("buildPack", watched, {}, extractor);
    const draft = new Draft(opened, recipeOf(watched, options));
    await draft.encode({ privateTerms: first });
    read.clear();
    const losses = await draft.encode({ privateTerms: second });
    if (k === 0) t.equal(read.get(adapters[0]!.id), 1, "of the first only what it lost in one module");
    const again = await gathered(await draft.write());
    const fresh = await buildPack(adapters, { ...options, privateTerms: second });
    t.ok(Buffer.from(concat(again.chunks)).equals(concat(fresh.chunks)), `${k} components`);
    t.strictSame(again.report, fresh.report);
    t.strictSame(losses, fresh.report.errors);
    read.clear();
    await draft.encode({ privateTerms: second });
    t.equal(read.size, 0, "nothing is read where nothing has changed");
  }
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
