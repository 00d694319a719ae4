/**
 * Tests that take a part of their cases in `npm test`, with all of them: each that asks for `soak`, `runs` or `modesOn`. Some twenty
 * minutes.
 *
 * usage: node test/soak-tests.js [NAME...]      tests by name, such as session-gpu. Default: all of them
 */
import { spawnSync } from "node:child_process";
import { readdirSync, readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";

const here = fileURLToPath(new URL(".", import.meta.url));
const ENDING = ".test.ts";
const tests = readdirSync(here)
  .filter((file) => file.endsWith(ENDING))
  .filter((file) =>
    /\b(soak|runs|modesOn)\b[^}]*\} from "\.\/(required|sessions)\.ts"/.test(readFileSync(here + file, "utf8")),
  )
  .map((file) => file.slice(0, -ENDING.length));

const names = process.argv.slice(2);
const unknown = names.filter((name) => !tests.includes(name));
if (unknown.length > 0) throw new RangeError(`${unknown.join(", ")}: expected some of ${tests.join(", ")}`);
const { status } = spawnSync(
  process.execPath,
  [
    "node_modules/tap/dist/esm/run.mjs",
    "--timeout=1800",
    ...(names.length > 0 ? names : tests).map((name) => `test/${name}${ENDING}`),
  ],
  {
    cwd: fileURLToPath(new URL("..", import.meta.url)),
    stdio: "inherit",
    env: { ...process.env, EIGENLORA_SOAK: "1" },
  },
);
process.exitCode = status ?? 1;
