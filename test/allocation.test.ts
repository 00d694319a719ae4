/**
 * Bit allocation, compared with every combination of choices where there are few enough to try them all.
 */
import type { Dtype } from "eigenlora";
import fc from "fast-check";
import t from "tap";
import { allocateBytes, allocateError, type Spectrum, tensorBytes } from "./internals.ts";

const SHARES: readonly (readonly [Dtype, number])[] = [
  ["int4", 0.0105],
  ["int8", 4.3e-5],
];
const ONLY = SHARES.map(([dtype]) => dtype);

/** Every choice of one spectrum: bytes and squared error. */
function choices({ singular, in: inputs, out }: Spectrum): { bytes: number; lost: number; key: string }[] {
  const all = singular.reduce((sum, value) => sum + value ** 2, 0);
  const found = [{ bytes: 0, lost: all, key: "none" }];
  for (const [dtype, share] of SHARES) {
    for (let rank = 1; rank <= singular.length; rank++) {
      const kept = singular.slice(0, rank);
      const left = singular.slice(rank).reduce((sum, value) => sum + value ** 2, 0);
      const along = kept.reduce((sum, value) => sum + value, 0);
      const bytes = tensorBytes(dtype, rank, inputs) + tensorBytes(dtype, rank, out) + 8;
      found.push({ bytes, lost: left + (2 * share * along ** 2) / rank, key: `${rank} ${dtype}` });
    }
  }
  return found;
}

const spectrum = (module: string, task: string): fc.Arbitrary<Spectrum> =>
  fc
    .record({
      values: fc.array(fc.double({ min: 0.01, max: 10, noNaN: true }), { minLength: 1, maxLength: 3 }),
      out: fc.integer({ min: 8, max: 64 }),
    })
    .map(({ values, out }) => {
      const singular = values.sort((a, b) => b - a);
      return { task, module, in: 32, out, singular, square: singular.reduce((sum, value) => sum + value ** 2, 0) };
    });

/** Bytes and error of an allocation, by the formula. */
function costOf(spectra: readonly Spectrum[], allocation: ReturnType<typeof allocateError>["allocation"]) {
  let [bytes, lost] = [0, 0];
  for (const one of spectra) {
    const chosen = allocation.get(one.task)?.get(one.module);
    const choice = choices(one).find(({ key }) => key === (chosen ? `${chosen.rank} ${chosen.dtype}` : "none"))!;
    bytes += choice.bytes;
    lost += choice.lost;
  }
  return { bytes, lost };
}

t.test("nothing that loses as little takes fewer bytes, of all combinations", async () => {
  fc.assert(
    fc.property(
      spectrum("a", "t"),
      spectrum("b", "t"),
      fc.double({ min: 0.02, max: 0.9, noNaN: true }),
      (a, b, allowed) => {
        const spectra = [a, b];
        const { allocation, bytes, short } = allocateError(spectra, () => allowed, ONLY);
        const found = costOf(spectra, allocation);
        if (found.bytes !== bytes) throw new Error(`${bytes} bytes said, ${found.bytes} taken`);
        const square = a.square + b.square;
        if (short.length === 0 && found.lost > allowed ** 2 * square * (1 + 1e-9))
          throw new Error("above what is allowed");
        for (const x of choices(a))
          for (const y of choices(b))
            if (x.lost + y.lost <= found.lost * (1 - 1e-9) && x.bytes + y.bytes < bytes)
              throw new Error(`${x.key} and ${y.key}: ${x.bytes + y.bytes} < ${bytes}`);
      },
    ),
  );
});

t.test("a task counts by what it loses of itself, however large it is", async (t) => {
  const of = (task: string, scale: number): Spectrum => {
    const singular = [4, 2, 1].map((value) => value * scale);
    return { task, module: "m", in: 64, out: 64, singular, square: 21 * scale ** 2 };
  };
  const spectra = [of("large", 1000), of("small", 1e-3)];
  for (const { allocation } of [allocateError(spectra, () => 0.2), allocateBytes(spectra, 300)])
    t.same(allocation.get("large"), allocation.get("small"));
  const { allocation, bytes } = allocateBytes(spectra, 300);
  t.ok(bytes <= 300 && allocation.size === 2);
  t.equal(allocateBytes(spectra, 10).allocation.size, 0);
  t.same(allocateError(spectra, () => 1e-9, ["int4"]).short, ["large", "small"]);
  t.same(allocateError([{ ...of("still", 0), singular: [0] }], () => 0.1).short, [], "nothing to lose");
});
