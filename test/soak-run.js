/**
 * Runs what takes too long for the tests, one after the other: switches on every backend, the whole matrices of some tests, sessions,
 * pairs of writers, Next.js, families of models, a real language model, files that attack what reads them, and mutants.
 *
 * usage: npm run soak [-- --fuzz COUNT]      COUNT mutants. Default: 1 000 000
 */
import { spawnSync } from "node:child_process";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

const { fuzz } = parseArgs({ options: { fuzz: { type: "string", default: "1000000" } } }).values;

for (const [script, ...args] of [
  ["soak.js"],
  ["soak-tests.js"],
  ["soak-session.js"],
  ["soak-writers.js"],
  ["soak-next.js"],
  ["soak-families.js"],
  ["soak-llm.js"],
  ["soak-fuzz.js", fuzz],
]) {
  console.log(`\n${script} ${args.join(" ")}`);
  const path = fileURLToPath(new URL(`${script}`, import.meta.url));
  const { status } = spawnSync(process.execPath, [path, ...args], { stdio: "inherit" });
  if (status !== 0) process.exit(status ?? 1);
}
