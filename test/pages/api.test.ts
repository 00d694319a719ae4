/** The package's exports are those in docs/api-report.md, and all of them can be imported. */
import { readFileSync } from "node:fs";
import t from "tap";
import { REPORT, report, surface } from "../tools/api.js";

const found = surface();

t.test("docs/api-report.md shows the published declarations", async (t) => {
  t.equal(readFileSync(REPORT, "utf8"), report(found), 'after a change that is meant, run "npm run api"');
});

t.test("what a signature names can be imported", async (t) => {
  t.same(found.hidden, []);
});

t.test("every export has a doc comment", async (t) => {
  t.same(
    found.exports.filter(({ documented }) => !documented).map(({ subpath, name }) => `${subpath}: ${name}`),
    [],
  );
});
