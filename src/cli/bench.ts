/**
 * The command bench: starts a benchmark of a checkout. Benchmarks need the repository's data and peers, so they are not in the
 * package.
 */
import { spawnSync } from "node:child_process";
import { existsSync } from "node:fs";
import { fileURLToPath } from "node:url";
import type { Attach } from "./command.ts";
import { UsageError } from "./options.ts";

const BENCHMARKS = [
  "memory",
  "switch",
  "fold",
  "pack",
  "size",
  "extract",
  "shapes",
  "hub",
  "learn",
  "distill",
  "calibrate",
  "step",
  "few-shot",
  "paper",
];

/** Where the script of a benchmark may lie. */
const PLACES = ["", "research/"].flatMap((folder) => [`${folder}NAME.js`, `${folder}NAME/run.js`]);

export const bench: Attach = (program) => {
  program
    .command("bench <NAME> [OPTIONS...]")
    .summary("run a benchmark, in a checkout of the repository")
    .description(`Run a benchmark, in a checkout of the repository: ${BENCHMARKS.join(", ")}.`)
    .passThroughOptions()
    .action((name: string, options: string[]) => {
      process.exitCode = run(name, options);
    });
};

function run(name: string, options: readonly string[]): number {
  if (!BENCHMARKS.includes(name)) throw new UsageError(`${name}: expected ${BENCHMARKS.join(", ")}`);
  const script = PLACES.map((place) =>
    fileURLToPath(new URL(`../../../benchmarks/${place.replace("NAME", name)}`, import.meta.url)),
  ).find((path) => existsSync(path));
  if (!script) {
    throw new UsageError("the benchmarks come with the repository, not with the package: clone it and run this there");
  }
  return spawnSync(process.execPath, ["--expose-gc", script, ...options], { stdio: "inherit" }).status ?? 1;
}
