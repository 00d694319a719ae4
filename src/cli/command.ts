/**
 * How a command is declared: its arguments, its options and what it does, in one place. main.ts attaches it to the program.
 */
import { SourceError } from "../errors.ts";
import { type Command, Option } from "./commander.ts";
import { inFlags } from "./matching.ts";
import { flagOf, type OptionSpec, type Options, type ReadAs, UsageError, type Values } from "./options.ts";
import type { Output } from "./output.ts";
import { Run } from "./run.ts";

/** What a command gives back. */
export interface Result {
  /** What `--json` prints; the keys are a contract. */
  readonly json: Readonly<Record<string, unknown>>;
  /** Lines for people, each of them one. */
  readonly text: readonly string[];
  /** 1 when the command ran but its verdict is bad. Default: 0, or 130 after a Ctrl-C. */
  readonly exitCode?: number;
  /** The command goes on after it has printed, until this is settled. */
  readonly until?: Promise<unknown>;
}

/** The exit code after a Ctrl-C, as shells have it: 128 and the number of the signal. */
export const INTERRUPTED = 130;

interface Declaration<A extends readonly string[], O extends Options> {
  /** Name and arguments, as `add <PACK> <ADAPTER...>`. */
  readonly usage: string;
  /** A line in the list of commands. */
  readonly does: string;
  /** What else its own help says. */
  readonly details?: string;
  /** A call of it, without "eigenlora". */
  readonly example: string;
  readonly options: O;
  /** What is read of each argument that names a file; the last holds for all that follow. */
  readonly reads?: readonly (ReadAs | undefined)[];
  run(args: A, options: Values<O>, run: Run, out: Output): Promise<Result>;
}

/**
 * Adds a command to the program. `done` gets its result once all is closed, or an exit code where nothing is left to
 * print, or an error is still to come.
 */
export type Attach = (program: Command, out: Output, done: (result: Result | number) => void) => void;

/** @throws UsageError from the command when a required option is missing or has a wrong value */
export function command<A extends readonly string[], O extends Options>(declared: Declaration<A, O>): Attach {
  const { usage, does, details = "", example, options } = declared;
  return (program, out, done) => {
    const made = program.command(usage).summary(does).description(`${does} ${details}`);
    for (const [name, spec] of Object.entries(options)) made.addOption(toOption(flagOf(name), spec));
    made.addHelpText("after", () => {
      const rare = made.options.filter(({ hidden }) => hidden).length;
      const more = rare > 0 ? [`\n${rare} more options: --help --all`] : [];
      return [...hubText(declared), ...more, `\nExample:\n  eigenlora ${example}`].join("\n");
    });
    made.option("--json", "Print one JSON object.").action(async () => {
      const run = new Run(out, made.opts());
      let result: Result;
      try {
        // The parser has seen to it that there are as many arguments as `usage` says.
        const args = (await takeArguments(made.args, declared.reads, run)) as string[] & A;
        const values = await takeOptions(options, valuesOf(options, made.opts()), run);
        result = await declared.run(args, values, run, out);
        if (result.until) {
          done(result);
          await result.until;
          return;
        }
      } catch (error) {
        run.fail();
        if (run.interrupted) done(INTERRUPTED);
        // The library speaks of its own options.
        if (error instanceof Error) error.message = inFlags(error.message, options) + hintOf(error, run);
        throw error;
      } finally {
        await run.close();
      }
      done(run.interrupted ? { ...result, exitCode: INTERRUPTED } : result);
    });
  };
}

function toOption(
  flag: string,
  { value, short = "", help, otherwise, group, rare, parse }: OptionSpec<unknown>,
): Option {
  const says = ["string", "number"].includes(typeof otherwise) ? `${help} Default: ${otherwise}.` : help;
  const option = new Option(`${short}${flag}${value ? ` <${value}>` : ""}`, says);
  // Else `--no-open` would be the way to switch `--open` off.
  option.negate = false;
  if (rare) option.hideHelp();
  if (group) option.helpGroup(group);
  if (!value) return option;
  return option.argParser((text: string, before: unknown) => {
    // Else `--model --text lines.txt` would take the next option for a file.
    if (text.startsWith("--")) throw new UsageError(`${flag} needs a value, got the option ${text}`);
    return parse(text, flag, before);
  });
}

/** What help says of names of the Hugging Face Hub. */
function hubText<O extends Options>({
  options,
  reads = [],
}: Pick<Declaration<never, O>, "options" | "reads">): string[] {
  const all = [...reads, ...Object.values(options).map((spec) => spec.reads)];
  if (all.includes("repository") || all.includes("model"))
    return ["\nAdapters and models may lie on the Hugging Face Hub: org/name, or", "hf:org/name@revision/path."];
  return all.includes("file") || all.includes("weights")
    ? ["\nIt may lie on the Hugging Face Hub: hf:org/name@revision/file."]
    : [];
}

/** Files and repositories that were named, as the command reads them. */
function takeArguments(
  given: readonly string[],
  reads: readonly (ReadAs | undefined)[] = [],
  run: Run,
): Promise<string[]> {
  const what = (i: number): ReadAs | undefined => reads[Math.min(i, reads.length - 1)];
  return inTurn(given, (one, i) => taken(one, what(i), run));
}

async function takeOptions<O extends Options>(options: O, values: Values<O>, run: Run): Promise<Values<O>> {
  const entries = await inTurn(Object.entries(values), async ([name, value]) => {
    const { reads } = options[name]!;
    const all = Array.isArray(value)
      ? await inTurn(value, (one) => taken(one, reads, run))
      : await taken(value, reads, run);
    return [name, all];
  });
  return Object.fromEntries(entries) as Values<O>;
}

async function taken<T>(value: T, reads: ReadAs | undefined, run: Run): Promise<T> {
  return typeof value === "string" && reads ? ((await run.take(value, reads)) as T) : value;
}

/** One after the other, so that progress and errors are of one. */
async function inTurn<T, R>(all: readonly T[], step: (one: T, i: number) => Promise<R>): Promise<R[]> {
  const done: R[] = [];
  for (const [i, one] of all.entries()) done.push(await step(one, i));
  return done;
}

/** Says what a mistyped path was taken for. */
function hintOf(error: Error, { guessed }: Run): string {
  const name = guessed.find((one) => error instanceof SourceError && error.message.includes(one.replace(/@.*/, "")));
  return name === undefined
    ? ""
    : `. There is no file or folder ${name} here, so it was taken for a repository of the Hugging Face Hub`;
}

function valuesOf<O extends Options>(options: O, given: Readonly<Record<string, unknown>>): Values<O> {
  const values = Object.entries(options).map(([name, { required, otherwise }]) => {
    if (required && given[name] === undefined) throw new UsageError(`missing ${flagOf(name)}`);
    return [name, given[name] ?? otherwise];
  });
  return Object.fromEntries(values) as Values<O>;
}
