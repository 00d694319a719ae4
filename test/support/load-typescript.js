/**
 * Loads the tests: takes the types out of `.ts` files, and no more. tap's own loader starts a compiler in each process,
 * which takes a second of each test file. See .taprc.
 */
import { readFile } from "node:fs/promises";
import { register } from "node:module";
import { transform } from "esbuild";

// Hooks run in a thread of their own, which loads this file once more.
const HOOKS = "?hooks";
if (!import.meta.url.endsWith(HOOKS)) register(import.meta.url + HOOKS);

/** @type {import("node:module").LoadHook} */
export async function load(url, context, next) {
  if (!url.startsWith("file:") || !url.endsWith(".ts")) return next(url, context);
  const source = await readFile(new URL(url), "utf8");
  const { code } = await transform(source, { loader: "ts", target: "es2023", sourcemap: "inline", sourcefile: url });
  return { format: "module", source: code, shortCircuit: true };
}
