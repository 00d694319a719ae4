/**
 * Starts each test file (.taprc): its tests wait until the file has been read to its end. tap runs a file's teardown once the tests that it
 * knows are over; skipped tests are over at once, even while the file still prepares the tests below them.
 */
import "./required.ts";
import { pathToFileURL } from "node:url";
import { isMainThread } from "node:worker_threads";

if (isMainThread) {
  const { default: t } = await import("tap");
  t.waitOn(import(pathToFileURL(process.argv[1]!).href));
}
