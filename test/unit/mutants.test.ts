import { readFile } from "node:fs/promises";
import t from "tap";
import { check, meaningsOf, runMutants } from "../support/mutants/run.js";
import { lacking, pythonLacks, soak } from "../support/required.ts";
import { repair } from "../vectors/format.js";

const COUNT = soak ? 1_000_000 : 500;
const noPython = pythonLacks("numpy");

t.test(
  `${COUNT} mutants with right checksums: refused by name, or read as SPEC.md says`,
  { timeout: soak ? 7_200_000 : 280_000 },
  async (t) => {
    const { refused, folded, wrong } = await runMutants(1, COUNT, !noPython);
    t.same(wrong.slice(0, 5), []);
    t.ok(refused > COUNT / 2 && refused < COUNT, `${refused} were refused`);
    if (!noPython) t.ok(folded > COUNT / 5, `${folded} were folded`);
  },
);

t.test("the comparison with SPEC.md is not easily content", { skip: lacking("peft", noPython) }, async (t) => {
  // A byte of a tensor, and it says which weight.
  const bytes = new Uint8Array(await readFile(new URL("../vectors/valid/minimal.eigen", import.meta.url)));
  for (const wasm of [false, true]) {
    t.equal(await check({ bytes }, meaningsOf([{ bytes }])[0], wasm), undefined);
    for (const at of [0x782, 0x792, 0x7d6, 0x7da]) {
      const other = bytes.slice();
      other[at]! ^= 1;
      repair(other);
      t.match(
        await check({ bytes }, meaningsOf([{ bytes: other }])[0], wasm),
        /layer\[\d, \d\] is .*expected/,
        `byte ${at}`,
      );
    }
  }
});
