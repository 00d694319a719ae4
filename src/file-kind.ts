/**
 * What lies at a path, for Node, Deno and Bun. Asked before it is opened: opening a pipe waits for somebody who writes to it, and a
 * device may give bytes without end.
 */
import type { Stats } from "node:fs";
import { stat } from "node:fs/promises";
import { SourceError } from "./errors.ts";

/** What something that is no file is, in words. */
export function kindInWords(there: Stats): string {
  if (there.isDirectory()) return "a folder";
  return there.isFIFO() ? "a pipe" : there.isSocket() ? "a socket" : "a device";
}

/**
 * Links are followed. What is not there, or may not be seen, is left to whoever opens it.
 * @param expected in words
 * @throws SourceError when there is something that is neither a file nor, where one is expected too, a folder
 */
export async function refuseOtherKinds(path: string, expected: "a file" | "a file or a folder"): Promise<void> {
  const there = await stat(path).catch(() => undefined);
  if (!there || there.isFile() || (expected !== "a file" && there.isDirectory())) return;
  const how = there.isFIFO() ? "; save what comes out of it in a file first" : "";
  throw new SourceError(`is ${kindInWords(there)}, expected ${expected}${how}`, { file: path });
}
