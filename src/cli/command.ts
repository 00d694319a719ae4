/**
 * How a command is declared: its arguments, its options and what it does, in one place. main.ts attaches it to the program.
 */
import { type Command, Option } from "./commander.ts";
import { flagOf, type OptionSpec, type Options, UsageError, type Values } from "./options.ts";
import type { Output } from "./output.ts";

/** What a command gives back. */
export interface Result {
  /** What `--json` prints; the keys are a contract. */
  readonly json: Readonly<Record<string, unknown>>;
  /** Lines for people. */
  readonly text: readonly string[];
  /** 1 when the command ran but its verdict is bad. Default: 0. */
  readonly exitCode?: number;
}

interface Closable {
  close?(): unknown;
}

/** What a command has beside its arguments. */
export interface Run extends Output {
  /** Closes `thing` when the command ends, however it ends; what was opened last goes first. */
  closing<T extends Closable>(thing: T): T;
}

interface Declaration<A extends readonly string[], O extends Options> {
  /** Name and arguments, as `add <PACK> <ADAPTER...>`. */
  readonly usage: string;
  /** In a few words, for the list of commands. */
  readonly does: string;
  /** What else its own help says. */
  readonly details?: string;
  readonly options: O;
  run(args: A, options: Values<O>, run: Run): Promise<Result>;
}

/** Adds a command to the program. `done` gets its result once all is closed. */
export type Attach = (program: Command, out: Output, done: (result: Result) => void) => void;

/** @throws UsageError from the command when a required option is missing or has a wrong value */
export function command<A extends readonly string[], O extends Options>(declared: Declaration<A, O>): Attach {
  const { usage, does, details, options } = declared;
  return (program, out, done) => {
    const made = program.command(usage).summary(does);
    made.description([`${does[0]!.toUpperCase()}${does.slice(1)}.`, ...(details ? [details] : [])].join(" "));
    for (const [name, spec] of Object.entries(options)) made.addOption(toOption(flagOf(name), spec));
    made.option("--json", "Print one JSON object.").action(async () => {
      const opened: Closable[] = [];
      const closing = <T extends Closable>(thing: T): T => {
        opened.push(thing);
        return thing;
      };
      let result: Result;
      try {
        // The parser has seen to it that there are as many arguments as `usage` says.
        result = await declared.run(made.args as string[] & A, valuesOf(options, made.opts()), { ...out, closing });
      } finally {
        for (const thing of opened.reverse()) await thing.close?.();
      }
      done(result);
    });
  };
}

function toOption(flag: string, { value, short, help, otherwise, group, hidden, parse }: OptionSpec<unknown>): Option {
  const says = typeof otherwise === "string" || typeof otherwise === "number" ? ` Default: ${otherwise}.` : "";
  const option = new Option(`${short ? `-${short}, ` : ""}${flag}${value ? ` <${value}>` : ""}`, help + says);
  if (hidden) option.hideHelp();
  if (group) option.helpGroup(group);
  return value
    ? option.argParser((text: string, before: unknown) => {
        // Else `--model --text lines.txt` would take the next option for a file.
        if (text.startsWith("--")) throw new UsageError(`${flag} needs a value, got the option ${text}`);
        return parse(text, flag, before);
      })
    : option;
}

function valuesOf<O extends Options>(options: O, given: Readonly<Record<string, unknown>>): Values<O> {
  const values = Object.entries(options).map(([name, { required, otherwise }]) => {
    if (required && given[name] === undefined) throw new UsageError(`missing ${flagOf(name)}`);
    return [name, given[name] ?? otherwise];
  });
  return Object.fromEntries(values) as Values<O>;
}
