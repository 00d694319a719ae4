/**
 * docs/research/families.md shows the findings of the last whole run of test/soak/families.js (test/soak/families/results/results.json), for the
 * families that test/soak/families/models.py makes now, within the tolerances of that run. The run itself takes minutes and PyTorch: `npm run
 * soak`.
 */
import { readFileSync } from "node:fs";
import t from "tap";
import { REFUSALS } from "../soak/families/refusals.js";
import { type Results, render } from "../soak/families/table.js";

/** Tolerances of families/run.js, which needs a model to run. */
const EXACT = 1e-5;
const OF_PLAIN = 8;
const read = (path: string): string => readFileSync(new URL(path, import.meta.url), "utf8");
const results = JSON.parse(read("../soak/families/results/results.json")) as Results;

t.test("the page is what the run has found", async (t) => {
  t.equal(read("../../docs/research/families.md"), render(results), "run node test/soak/families.js --write");
});

t.test("the run knew every family", async (t) => {
  const made = [...read("../soak/families/models.py").matchAll(/^(?:family|lm|classifier)\("[^"]+", "([^"]+)"/gm)].map(
    ([, title]) => title!,
  );
  t.ok(made.length >= 40);
  t.same(
    results.rows.map(({ title }) => title),
    made,
  );
});

t.test("nothing is off by more than allowed, and nothing else is refused", async (t) => {
  const causes = new Set(REFUSALS.map(({ cause }) => cause));
  for (const { title, results: exports } of results.rows) {
    for (const { exporter, format, plain, modes, rows } of exports) {
      for (const outcome of [...Object.values(modes), ...Object.values(rows)]) {
        const where = `${title}, ${exporter}, ${format}: ${JSON.stringify(outcome)}`;
        if (typeof outcome !== "number") t.ok(causes.has(outcome.refused), where);
        else t.ok(outcome <= (format === "f32" || format === "q4" ? EXACT : OF_PLAIN * plain), where);
      }
      t.same(Object.keys(modes), ["core", "factors", "folded"]);
    }
  }
  for (const [name, off] of Object.entries(results.latents)) t.ok(off <= 1e-4, name);
});
