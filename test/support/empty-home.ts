/**
 * An empty home folder for processes: files that a library writes unasked show up in it. onnxruntime writes nothing where CI is set, so
 * of this process's environment only PATH is passed on.
 */
import { readdir } from "node:fs/promises";
import type { Test } from "tap";
import { folderFor } from "./folder.ts";

export interface EmptyHome {
  readonly env: { readonly HOME: string; readonly PATH: string | undefined };
  /** Lists files and folders that were written, by path. */
  readonly written: () => Promise<string[]>;
}

export async function emptyHome(t: Test): Promise<EmptyHome> {
  const home = folderFor(t);
  return { env: { HOME: home, PATH: process.env["PATH"] }, written: () => readdir(home, { recursive: true }) };
}
