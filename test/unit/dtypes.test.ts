import { readFile } from "node:fs/promises";
import fc from "fast-check";
import t from "tap";
import { noise } from "../support/compare.ts";
import { dtypes as d, encodeTensor, openSafetensors, openSource, uniform } from "../support/internals/base.ts";
import { createWasmProducts } from "../support/internals/pack.ts";
import { data } from "../support/packs.ts";
import { runs } from "../support/required.ts";

t.test("f16 and bf16 agree with numpy and torch", async (t) => {
  const file = await openSafetensors(await openSource(await readFile(data("goldens/dtypes.safetensors"))));
  const half = await file.readF32("half");
  for (let i = 0; i < 65536; i++) {
    if (!Object.is(d.f16ToF32(i), half[i])) t.fail(`half ${i}: ${d.f16ToF32(i)} instead of ${half[i]}`);
  }
  const values = await file.readF32("values");
  const bits = async (name: string): Promise<Uint16Array> => new Uint16Array((await file.read(name)).slice().buffer);
  const [f16, bf16] = [await bits("f16"), await bits("bf16")];
  let wrong = 0;
  values.forEach((v, i) => {
    if (d.f32ToF16(v) !== f16[i]) wrong++;
    if (d.f32ToBf16(v) !== bf16[i]) wrong++;
    if (d.bf16ToF32(bf16[i]!) !== Number(new Float32Array(new Uint32Array([bf16[i]! << 16]).buffer)[0])) wrong++;
  });
  t.ok(values.length > 10_000);
  t.equal(wrong, 0);
  t.ok(Number.isNaN(d.f16ToF32(d.f32ToF16(NaN))));
  t.ok(Number.isNaN(d.bf16ToF32(d.f32ToBf16(NaN))));
});

t.test(
  "encode and decode: floats within their rounding, integers within half a step or, of few bits, losing no more than that",
  async (t) => {
    const steps: Record<d.Dtype, number> = {
      f32: 2 ** -24,
      f16: 2 ** -11,
      bf16: 2 ** -8,
      int8: 0.5 / 127,
      int4: 0.5 / 7,
      int3: 0.5 / 3,
    };
    t.doesNotThrow(() =>
      fc.assert(
        fc.property(
          fc.constantFrom(...d.DTYPES),
          fc.integer({ min: 0, max: 5 }),
          fc.integer({ min: 1, max: 19 }),
          fc.infiniteStream(fc.float({ min: -100, max: 100, noNaN: true })),
          (type, rows, width, stream) => {
            const values = Float32Array.from({ length: rows * width }, () => stream.next().value);
            const bytes = encodeTensor(type, values, rows, width);
            if (bytes.length !== d.tensorBytes(type, rows, width)) return false;
            const back = d.decodeTensor(type, bytes, rows, width);
            for (let r = 0; r < rows; r++) {
              const row = values.subarray(r * width, (r + 1) * width);
              const peak = row.reduce((p, v) => Math.max(p, Math.abs(v)), 0);
              // The f16 scale is rounded up by at most 2⁻¹⁰ of itself, or by a subnormal's step.
              const allowed = d.isQuantized(type)
                ? peak * steps[type] * 1.002 + 2 ** -23 * 127
                : peak * steps[type] + 2 ** -24;
              const off = row.map((v, i) => Math.abs(v - back[r * width + i]!));
              const whole = type === "int4" || type === "int3" ? clippingNothing(row, 0.5 / steps[type]) : Infinity;
              if (
                whole < Infinity
                  ? off.reduce((sum, v) => sum + v * v, 0) > whole * (1 + 1e-12)
                  : off.some((v) => v > allowed)
              )
                return false;
            }
            return true;
          },
        ),
        { seed: 1, numRuns: runs(600) },
      ),
    );
  },
);

/** Σ(v − v')² with the least f16 scale that clips nothing. */
function clippingNothing(row: Float32Array, largest: number): number {
  const wanted = row.reduce((p, v) => Math.max(p, Math.abs(v)), 0) / largest;
  const half = d.f32ToF16(wanted);
  const scale = d.f16ToF32(d.f16ToF32(half) < wanted ? half + 1 : half) || 1;
  return row.reduce(
    (sum, v) => sum + (v - scale * Math.max(-largest, Math.min(largest, Math.round(v / scale)))) ** 2,
    0,
  );
}

t.test("of few bits the scale is the one that loses least, not the one that clips nothing", (t) => {
  const random = uniform(5);
  const row = Float32Array.from({ length: 384 }, () => random() + random() + random() + random() - 2);
  for (const [type, largest, most] of [
    ["int3", 3, 0.7],
    ["int4", 7, 0.95],
  ] as const) {
    const back = d.decodeTensor(type, encodeTensor(type, row, 1, 384), 1, 384);
    const lost = row.reduce((sum, v, i) => sum + (v - back[i]!) ** 2, 0);
    t.ok(lost < most * clippingNothing(row, largest), `${type}: ${lost}`);
    const peak = row.reduce((p, v) => Math.max(p, Math.abs(v)), 0);
    for (let s = 0.3; s <= 1; s += 0.001) {
      const scale = (s * peak) / largest;
      const other = row.reduce(
        (sum, v) => sum + (v - scale * Math.max(-largest, Math.min(largest, Math.round(v / scale)))) ** 2,
        0,
      );
      t.ok(lost <= 1.02 * other, `${s}`);
    }
  }
  t.end();
});

t.test("rows put to their places, in either direction, are what is decoded, times the factor", async (t) => {
  t.doesNotThrow(() =>
    fc.assert(
      fc.property(
        fc.constantFrom(...d.DTYPES),
        fc.integer({ min: 1, max: 5 }),
        fc.integer({ min: 1, max: 40 }),
        fc.boolean(),
        fc.constantFrom(1, 0.7, -2),
        fc.infiniteStream(fc.float({ min: -100, max: 100, noNaN: true })),
        (type, rows, width, turned, factor, stream) => {
          const values = Float32Array.from({ length: rows * width }, () => stream.next().value);
          const bytes = encodeTensor(type, values, rows, width);
          const expected = d.decodeTensor(type, bytes, rows, width).map((value) => value * factor);
          // Two other rows lie above, one below.
          const rank = rows + 3;
          const out = new Float32Array(rank * width).fill(7);
          const places = turned ? { at: 2, down: 1, along: rank } : { at: 2 * width, down: width, along: 1 };
          d.placeTensor(type, bytes, rows, width, out, places, factor);
          return out.every((value, place) => {
            const [row, column] = turned
              ? [place % rank, Math.floor(place / rank)]
              : [Math.floor(place / width), place % width];
            return Object.is(value, row < 2 || row > rows + 1 ? 7 : expected[(row - 2) * width + column]);
          });
        },
      ),
    ),
  );
});

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
