/**
 * Requirements of tests beside Node. Every file, program and package outside the checkout that a test uses is looked
 * for here. A test without its requirement is skipped by name; it fails where EIGENLORA_REQUIRE (names between spaces
 * or commas) lists it. Under EIGENLORA_BARE=1 nothing is found, as on a machine that has nothing but Node.
 */
import { spawnSync } from "node:child_process";
import { existsSync } from "node:fs";
import { join } from "node:path";
import type { Test } from "tap";

const { env } = process;

/** True if tools are hidden, as on a machine that has nothing but Node. */
export const bare: boolean = env["EIGENLORA_BARE"] === "1";
if (bare) {
  // Benchmarks, drivers and child processes read these themselves. test/support/start.ts comes here before they do.
  for (const name of ["RUNTIMES", "SMOLLM2", "GRADIENTS"]) delete env[`EIGENLORA_${name}`];
  Object.assign(env, { PYTHON: "/bare/python3", VK_DRIVER_FILES: "/bare/vulkan" });
}

export const required: ReadonlySet<string> = new Set(
  (env["EIGENLORA_REQUIRE"] ?? "").split(/[\s,]+/).filter((name) => name !== ""),
);

/**
 * True if this run is the soak's, which takes the whole of each matrix; the gate takes a case of each kind. See
 * test/soak/run.js.
 */
export const soak: boolean = env["EIGENLORA_SOAK"] === "1";

/** True if every runtime and backend is tested; `npm test` takes onnxruntime-node, plain JavaScript and SIMD alone. */
export const whole: boolean = env["EIGENLORA_QUICK"] !== "1";

/**
 * Folder of tap's results of an earlier run; undefined where there is none. Tests that passed there are left out
 * (start.ts).
 */
export const passed: string | undefined = env["EIGENLORA_PASSED"];

/** How many cases of a property, or mutants, are tried: `all` in the soak, a quarter in the gate. */
export const runs = (all: number): number => (soak ? all : Math.ceil(all / 4));

/** Path of a file in EIGENLORA_RUNTIMES, a folder of packages that only tests need. */
export const runtimes = (path: string): string => join(env["EIGENLORA_RUNTIMES"] ?? "/bare", path);

/** Path of a file in the node_modules of EIGENLORA_RUNTIMES. */
export const packages = (path = ""): string => runtimes(join("node_modules", path));

/** Folder of gradient cases that were made before; undefined where they have to be made. */
export const gradients: string | undefined = env["EIGENLORA_GRADIENTS"];

/** The Python that PYTHON names. */
export const python: string = env["PYTHON"] ?? "python3";

/** Reason why Python cannot import these; undefined where it can. */
export function pythonLacks(...names: string[]): string | undefined {
  const { status, error, stderr } = spawnSync(python, ["-c", `import ${names.join(", ")}`], { encoding: "utf8" });
  if (status === 0) return undefined;
  return `${python} cannot import ${names.join(", ")}: ${error?.message ?? stderr.trim().split("\n").at(-1)}; set PYTHON`;
}

/** The first of these files that is here. */
export const find = (...paths: string[]): string | undefined => (bare ? undefined : paths.find((p) => existsSync(p)));

/** Reason to skip a test: the given one, if any; false where EIGENLORA_REQUIRE lists `name`, so that the test fails. */
export const lacking = (name: string, reason: string | undefined): string | false =>
  reason !== undefined && !required.has(name) && reason;

/** Reason to skip a test that needs these files; false where they are here, or must be. */
export const without = (name: string, ...files: string[]): string | false =>
  lacking(name, files.every((path) => find(path)) ? undefined : `${name} is not here; see CONTRIBUTING.md`);

/** Skips what is left of a test for a reason, or fails it where EIGENLORA_REQUIRE lists `name`. */
export function skip(t: Pick<Test, "pass" | "fail">, name: string, reason: string): void {
  if (required.has(name)) t.fail(reason);
  else t.pass(reason, { skip: reason });
}

export const chromium: string | undefined = find(
  "/usr/bin/chromium",
  "/usr/bin/chromium-browser",
  "/usr/bin/google-chrome",
);
