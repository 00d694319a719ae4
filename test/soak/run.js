/**
 * The soak: tests that take a part of their cases elsewhere, with all of them, then Next.js, the families of models,
 * and the files that ask for the most time and memory. Hours.
 *
 * usage: npm run soak [-- NAME...]      tests by name, such as session-gpu, and "next", "families", "attacks/read",
 * "attacks/expand". Default: all
 */
import { spawnSync } from "node:child_process";
import { readdirSync, readFileSync } from "node:fs";
import { basename, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = fileURLToPath(new URL("..", import.meta.url));
const ENDING = ".test.ts";
const tests = readdirSync(here, { recursive: true, encoding: "utf8" })
  .filter((file) => file.endsWith(ENDING))
  .filter((file) =>
    /\b(soak|runs|modesOn)\b[^}]*\} from "[^"]*\/(required|sessions)\.ts"/.test(readFileSync(join(here, file), "utf8")),
  );
const nameOf = (/** @type {string} */ file) => basename(file, ENDING);
const scripts = ["next", "families", "attacks/read", "attacks/expand"];

const all = [...tests.map(nameOf), ...scripts];
const names = process.argv.length > 2 ? process.argv.slice(2) : all;
const unknown = names.filter((name) => !all.includes(name));
if (unknown.length > 0) throw new RangeError(`${unknown.join(", ")}: expected some of ${all.join(", ")}`);

const files = tests.filter((file) => names.includes(nameOf(file))).map((file) => join(here, file));
const commands = scripts.filter((name) => names.includes(name)).map((name) => [join(here, `soak/${name}.js`)]);
if (files.length > 0) commands.unshift(["node_modules/tap/dist/esm/run.mjs", "--timeout=7200", ...files]);
for (const command of commands) {
  const { status } = spawnSync(process.execPath, command, {
    cwd: fileURLToPath(new URL("../..", import.meta.url)),
    stdio: "inherit",
    env: { ...process.env, EIGENLORA_SOAK: "1" },
  });
  if (status !== 0) process.exitCode = status ?? 1;
}
