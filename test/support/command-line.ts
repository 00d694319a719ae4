/**
 * Runs the command line in the process of a test: dozens of calls need no dozens of processes. Exit codes, streams and signals of
 * processes are tested on processes.
 */
import { rm } from "node:fs/promises";
import type { Test } from "tap";
import { runProgram } from "./internals/cli.ts";

/** Output and exit code of a command. */
export interface Ended {
  readonly status: number;
  readonly stdout: string;
  readonly stderr: string;
}

export async function run(...args: string[]): Promise<Ended> {
  const said = { stdout: "", stderr: "" };
  const stream = (name: "stdout" | "stderr") => ({ write: (text: string) => (said[name] += text) });
  return { status: await runProgram(args, stream("stdout"), stream("stderr")), ...said };
}

/** Runs with --json; exactly one object on stdout, nothing on stderr. @throws Error with any other exit code */
export async function json(status: number, ...args: string[]): Promise<Record<string, any>> {
  const result = await run(...args, "--json");
  if (result.status !== status)
    throw new Error(`${args.join(" ")}: exit ${result.status}\n${result.stdout}${result.stderr}`);
  if (result.stderr !== "") throw new Error(`stderr: ${result.stderr}`);
  return JSON.parse(result.stdout);
}

/** Makes a folder the current one for relative paths, and removes it at the end. */
export function workIn(t: Test, folder: string): void {
  const before = process.cwd();
  process.chdir(folder);
  t.teardown(() => {
    process.chdir(before);
    return rm(folder, { recursive: true, maxRetries: 5, retryDelay: 200 });
  });
}
