/**
 * Start of each test file (.taprc): test/support/start.ts, and test/support/required.ts, which finds no tool where
 * EIGENLORA_BARE=1 is set.
 */
import { spawnSync } from "node:child_process";
import { readdirSync, readFileSync } from "node:fs";
import { mkdir, writeFile } from "node:fs/promises";
import { dirname, join, relative } from "node:path";
import { fileURLToPath } from "node:url";
import t, { type Test } from "tap";
import { folderFor } from "../support/folder.ts";

const root = fileURLToPath(new URL("../..", import.meta.url));

/** Runs a test file as tap does. @returns its exit code and output */
function started(t: Test, code: string, env: NodeJS.ProcessEnv = {}): { status: number | null; stdout: string } {
  const folder = t.testdir({ "case.test.ts": code });
  const own = Object.fromEntries(Object.entries(process.env).filter(([name]) => !/^(TAP|_TAPJS)/.test(name)));
  const args = [
    "--import=./test/support/load-typescript.js",
    "--import=./test/support/start.ts",
    join(folder, "case.test.ts"),
  ];
  return spawnSync(process.execPath, args, { cwd: root, encoding: "utf8", env: { ...own, ...env } });
}

t.test("no teardown comes before the tests below what a file still prepares", async (t) => {
  const { status, stdout } = started(
    t,
    `import { setTimeout as pause } from "node:timers/promises";
import t from "tap";
let torn = false;
t.teardown(() => { torn = true; });
t.test("skipped, so over at once", { skip: "not here" }, () => {});
await pause(100);
t.test("prepared later", async (t) => t.notOk(torn));`,
  );
  t.equal(status, 0, { stdout });
  t.match(stdout, /ok 2 - prepared later/);
});

t.test("a file that fails while it prepares fails", async (t) => {
  const { status, stdout } = started(
    t,
    `import t from "tap";
t.test("fine", async (t) => t.pass());
await Promise.reject(new Error("no base"));`,
  );
  t.equal(status, 1);
  t.match(stdout, /not ok .*no base/);
});

t.test("EIGENLORA_PASSED leaves out what passed, and nothing of which a part was skipped", async (t) => {
  const code = `import t from "tap";
for (const name of ["passed", "in part", "failed", "new # 1"]) t.test(name, async (t) => t.pass());`;
  const passed = folderFor(t);
  const results = join(passed, relative(root, t.testdirName), "case.test.ts.tap");
  await mkdir(dirname(results), { recursive: true });
  const part = "# Subtest: in part\n    ok 1 - a # SKIP no tool\nok 2 - in part # time=1ms\n";
  await writeFile(results, `ok 1 - passed # time=1ms\n${part}not ok 3 - failed # time=1ms\n`);
  const { status, stdout } = started(t, code, { EIGENLORA_PASSED: passed });
  t.equal(status, 0, { stdout });
  t.same(stdout.match(/^ok .* # SKIP/gm), ["ok 1 - passed # SKIP"]);
});

t.test("EIGENLORA_BARE=1 hides every tool that is here", async (t) => {
  const code = `import t from "tap";
import { find, packages, python, pythonLacks, without } from ${JSON.stringify(join(root, "test/support/required.ts"))};
t.comment(JSON.stringify([find(process.execPath), without("node", process.execPath), pythonLacks("sys"), packages(), "EIGENLORA_SMOLLM2" in process.env]));`;
  const given = { PYTHON: "python-of-mine", EIGENLORA_RUNTIMES: "/runtimes", EIGENLORA_SMOLLM2: "/smollm2" };
  const told = (env: object): unknown => JSON.parse(/\[.*\]/.exec(started(t, code, { ...given, ...env }).stdout)![0]);
  t.match(told({ EIGENLORA_BARE: "" }), [process.execPath, false, /^python-of-mine /, "/runtimes/node_modules", true]);
  t.match(told({ EIGENLORA_BARE: "1" }), [null, /^node is not here/, /^\/bare\//, "/bare/node_modules", false]);
});

t.test("a test runs on one runtime or backend, which its name tells: another one is not left out with it", (t) => {
  const LOOP = /^.*\bof (?:(?:ORTS|RUNTIMES)\b|await backends\(\)).*\n(?:.*\n){0,5}/gm;
  for (const folder of ["unit", "models"]) {
    for (const file of readdirSync(join(root, "test", folder)))
      for (const [loop] of readFileSync(join(root, "test", folder, file), "utf8").matchAll(LOOP))
        t.match(loop, /\bt\.test\(`[^`]*\$\{/, file);
  }
  t.end();
});

t.test("tests look for tools by required.ts alone", async (t) => {
  const found = readdirSync(join(root, "test"), { recursive: true, encoding: "utf8" })
    .filter((file) => file.endsWith(".ts") && file !== "support/required.ts")
    .filter((file) => /\benv\W+(PYTHON|EIGENLORA_\w+)|"python\d"/.test(readFileSync(join(root, "test", file), "utf8")));
  t.same(found, []);
});
