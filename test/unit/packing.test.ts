/** Measures that make packing fast and small in memory change no byte of a pack. */

import { readAdapters } from "eigenlora/node";
import t from "tap";
import { noise } from "../support/compare.ts";
import { encodeTensor } from "../support/internals/base.ts";
import { createWasmProducts } from "../support/internals/pack.ts";
import { data } from "../support/packs.ts";

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
