/**
 * Requirements of tests beside Node: where Chromium is, which of them must be present, and how much of a matrix is run. A test without
 * its requirement is skipped by name; it fails where EIGENLORA_REQUIRE (names between spaces or commas) lists it.
 */
import { existsSync } from "node:fs";

export const required: ReadonlySet<string> = new Set(
  (process.env["EIGENLORA_REQUIRE"] ?? "").split(/[\s,]+/).filter((name) => name !== ""),
);

/** Whether this run is the soak's, which takes the whole of each matrix; the gate takes a case of each kind. See test/soak-tests.js. */
export const soak: boolean = process.env["EIGENLORA_SOAK"] === "1";

/** How many cases of a property, or mutants, are tried: `all` in the soak, a quarter in the gate. */
export const runs = (all: number): number => (soak ? all : Math.ceil(all / 4));

export const chromium: string | undefined = [
  "/usr/bin/chromium",
  "/usr/bin/chromium-browser",
  "/usr/bin/google-chrome",
].find((p) => existsSync(p));
