/**
 * The command bench: starts a benchmark of a checkout. Benchmarks need the repository's data and peers, so they are not in the
 * package.
 */
import { spawnSync } from "node:child_process";
import { existsSync, readdirSync } from "node:fs";
import { basename, join } from "node:path";
import { fileURLToPath } from "node:url";
import { type Attach, INTERRUPTED } from "./command.ts";
import { UsageError } from "./options.ts";

export const bench: Attach = (program, _, done) => {
  const scripts = benchmarks();
  const names = [...scripts.keys()].join(", ");
  program
    .command("bench <NAME> [OPTIONS...]")
    .summary("Run a benchmark, in a checkout of the repository.")
    .description(names ? `Run a benchmark: ${names}.` : "Run a benchmark, in a checkout of the repository.")
    .option("--json", "Print one JSON object.")
    .addHelpText("after", "\nExample:\n  eigenlora bench switch --live")
    .passThroughOptions()
    .action((name: string, options: string[], { json }: { json?: boolean }) => {
      if (!names)
        throw new UsageError(
          "the benchmarks come with the repository, not with the package: clone it and run this there",
        );
      const script = scripts.get(name);
      if (!script) throw new UsageError(`${name}: expected ${names}`);
      const { status, signal } = spawnSync(
        process.execPath,
        ["--expose-gc", script, ...options, ...(json ? ["--json"] : [])],
        {
          stdio: "inherit",
        },
      );
      done(status ?? (signal === "SIGINT" ? INTERRUPTED : 1));
    });
};

/** The scripts of a checkout, by name. */
function benchmarks(): Map<string, string> {
  const root = fileURLToPath(new URL("../../../benchmarks", import.meta.url));
  const folders = [root, join(root, "research")].filter((folder) => existsSync(folder));
  const files = folders.flatMap((folder) => readdirSync(folder).map((name) => join(folder, name)));
  return new Map(files.filter((file) => file.endsWith(".js")).map((file) => [basename(file, ".js"), file]));
}
