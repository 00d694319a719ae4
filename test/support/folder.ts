/** Files of the repository, and folders that a test works in. */
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import type { Test } from "tap";

/** Absolute path of a file of the repository. */
export const fromRoot = (path: string): string => fileURLToPath(new URL(`../../${path}`, import.meta.url));

/** Makes a folder, which is removed at the end of the test. @returns its path */
export function folderFor(t: Pick<Test, "teardown">): string {
  const folder = mkdtempSync(join(tmpdir(), "eigenlora-test-"));
  t.teardown(() => rmSync(folder, { recursive: true, force: true, maxRetries: 5, retryDelay: 200 }));
  return folder;
}

/** Makes a folder that is the current one during the test, for relative paths. @returns its path */
export function workIn(t: Pick<Test, "teardown">): string {
  const before = process.cwd();
  const folder = folderFor(t);
  process.chdir(folder);
  t.teardown(() => process.chdir(before));
  return folder;
}
