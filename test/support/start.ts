/**
 * Starts each test file (.taprc): its tests wait until the file has been read to its end. tap runs a file's teardown
 * once the tests that it knows are over; skipped tests are over at once, even while the file still prepares the tests
 * below them. In the gate's second run (test/tools/gate.sh), tests that passed in its first are skipped: they have the
 * same name there only if they do the same.
 */

import { existsSync, readFileSync } from "node:fs";
import { join, relative } from "node:path";
import { pathToFileURL } from "node:url";
import { isMainThread } from "node:worker_threads";
import { passed } from "./required.ts";

/** Names of the tests that passed, with nothing skipped inside them. @param results of a file, as tap writes them */
function passedIn(results: string): Set<string> {
  const names = new Set<string>();
  let whole = true;
  for (const line of readFileSync(results, "utf8").split("\n")) {
    if (line.startsWith("# Subtest: ")) whole = true;
    else if (/^ +ok .*[^\\]# SKIP/.test(line)) whole = false;
    const name = /^ok \d+ - (.*) # time=/.exec(line)?.[1];
    if (name !== undefined && whole) names.add(name.replace(/\\([\\#])/g, "$1"));
  }
  return names;
}

if (isMainThread) {
  const { default: t } = await import("tap");
  const file = process.argv[1]!;
  const results = passed && join(passed, `${relative(process.cwd(), file)}.tap`);
  if (results && existsSync(results)) {
    const names = passedIn(results);
    const { test } = t as { test: (name: string, ...rest: unknown[]) => unknown };
    const left = (name: string, ...rest: unknown[]) =>
      test.call(t, name, ...(names.has(name) ? [{ skip: "passed before" }] : rest));
    Object.assign(t, { test: left });
  }
  t.waitOn(import(pathToFileURL(file).href));
}
