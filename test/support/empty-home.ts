/**
 * An empty home folder for processes: files that a library writes unasked show up in it. onnxruntime writes nothing where CI is set, so
 * of this process's environment only PATH is passed on.
 */
import { mkdtemp, readdir, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Test } from "tap";

export interface EmptyHome {
  readonly env: { readonly HOME: string; readonly PATH: string | undefined };
  /** Lists files and folders that were written, by path. */
  readonly written: () => Promise<string[]>;
}

export async function emptyHome(t: Test): Promise<EmptyHome> {
  const home = await mkdtemp(join(tmpdir(), "eigenlora-home-"));
  t.teardown(() => rm(home, { recursive: true, maxRetries: 5, retryDelay: 200 }));
  return { env: { HOME: home, PATH: process.env["PATH"] }, written: () => readdir(home, { recursive: true }) };
}
