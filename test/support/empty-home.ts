/**
 * An empty home folder for processes: files that a library writes unasked show up in it. onnxruntime writes nothing where CI is set, so
 * of this process's environment only PATH is passed on.
 */
import { readdir } from "node:fs/promises";
import type { Test } from "tap";
import { folderFor } from "./folder.ts";

/** @returns the environment of a process, and a list of files and folders that were written, by path */
export async function emptyHome(
  t: Test,
): Promise<{ env: { HOME: string; PATH: string | undefined }; written: () => Promise<string[]> }> {
  const home = folderFor(t);
  return { env: { HOME: home, PATH: process.env["PATH"] }, written: () => readdir(home, { recursive: true }) };
}
