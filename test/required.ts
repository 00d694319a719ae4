/**
 * What tests need beside Node: where Chromium is, and which of such things must be present. A test that misses one is
 * skipped by name; it fails where EIGENLORA_REQUIRE (names between spaces or commas) lists it.
 */
import { existsSync } from "node:fs";

export const required: ReadonlySet<string> = new Set(
  (process.env["EIGENLORA_REQUIRE"] ?? "").split(/[\s,]+/).filter((name) => name !== ""),
);

export const chromium: string | undefined = [
  "/usr/bin/chromium",
  "/usr/bin/chromium-browser",
  "/usr/bin/google-chrome",
].find((p) => existsSync(p));
