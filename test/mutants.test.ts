import { readFile } from "node:fs/promises";
import t from "tap";
import { check, runMutants, tally } from "./mutants/run.js";
import { runs } from "./required.ts";

/** Number of mutants; `npm run soak` makes a million, or another number. */
const COUNT = runs(2_000);

t.test(`${COUNT} mutants with right checksums: refused by name, or what they mean`, { timeout: 280_000 }, async (t) => {
  const { taken, folded, refused, forms, wrong } = await runMutants(1, COUNT);
  t.comment(`${taken} were taken, ${folded} of them folded; ${refused} were refused`);
  t.comment(
    Object.entries(forms)
      .map(([form, count]) => `${form}: ${count}`)
      .join(", "),
  );
  t.same(wrong.slice(0, 5), []);
  t.ok(refused > COUNT / 2 && folded > COUNT / 5, "both sides are reached");
  t.ok(
    Object.values(forms).every((count) => count > 0),
    "every form of a pack is among those that were folded",
  );
});

t.test("the judge is not easily content: a byte of a tensor, and it says which weight", async (t) => {
  const bytes = new Uint8Array(await readFile(new URL("vectors/valid/minimal.eigen", import.meta.url)));
  for (const wasm of [false, true]) {
    t.equal(await check(bytes, undefined, wasm, tally()), undefined);
    for (const at of [0x782, 0x792, 0x7d6, 0x7da]) {
      const other = bytes.slice();
      other[at]! ^= 1;
      t.match(await check(bytes, undefined, wasm, tally(), other), /layer\[\d, \d\] is .*expected/, `byte ${at}`);
    }
  }
});
