/**
 * Runs the command line in the process of a test: dozens of calls need no dozens of processes. Exit codes, streams and
 * signals of processes are tested on processes.
 */
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

/**
 * Words of a command as a user types them. A value is one word, or part of one, whatever it holds; a list is its words.
 */
export function words(
  text: TemplateStringsArray,
  ...values: readonly (string | number | readonly string[])[]
): string[] {
  const marked = text.raw.map((part, i) => (i < values.length ? `${part}\0${i}\0` : part)).join("");
  return marked.split(/\s+/).flatMap((word) => {
    const list = /^\0(\d+)\0$/.exec(word) && values[Number(word.slice(1, -1))];
    return Array.isArray(list) ? list : word.replace(/\0(\d+)\0/g, (_, i) => String(values[Number(i)]));
  });
}
