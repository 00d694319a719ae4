/**
 * Starts a benchmark: `npm run bench -- NAME [OPTIONS...]`. Without a name, or with --help, lists them.
 */
import { spawnSync } from "node:child_process";
import { readdirSync } from "node:fs";
import { basename, join } from "node:path";

const folders = [import.meta.dirname, join(import.meta.dirname, "research")];
const files = folders.flatMap((folder) => readdirSync(folder).map((name) => join(folder, name)));
const scripts = new Map(
  files
    .filter((file) => file.endsWith(".js") && file !== import.meta.filename)
    .map((file) => [basename(file, ".js"), file]),
);
const [name = "--help", ...options] = process.argv.slice(2);
const script = scripts.get(name);
if (script) {
  const { status, signal } = spawnSync(process.execPath, ["--expose-gc", script, ...options], { stdio: "inherit" });
  process.exitCode = status ?? (signal === "SIGINT" ? 130 : 1);
} else {
  console.error(`npm run bench NAME, one of ${[...scripts.keys()].join(", ")}`);
  process.exitCode = name === "--help" ? 0 : 2;
}
