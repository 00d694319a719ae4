/**
 * The command line as a whole: all commands, help, version, and what becomes of errors. Each command is declared in a file of its
 * own.
 */

import { reasonOf } from "../disk.ts";
import { EigenLoraError } from "../errors.ts";
import { VERSION } from "../version.ts";
import { attach } from "./attach.ts";
import { bench } from "./bench.ts";
import { add, compact, remove } from "./change.ts";
import { check } from "./check.ts";
import type { Result } from "./command.ts";
import { Command, CommanderError } from "./commander.ts";
import { distill } from "./distill.ts";
import { exportTask } from "./export.ts";
import { fold } from "./fold.ts";
import { hub } from "./hub.ts";
import { inspect } from "./inspect.ts";
import { learn } from "./learn.ts";
import { UsageError } from "./options.ts";
import { createOutput, paragraph, printable, type Stream } from "./output.ts";
import { pack } from "./pack.ts";
import { keygen, sign } from "./sign.ts";
import { verify } from "./verify.ts";
import { view } from "./view.ts";

/** All commands, in the order of the help. */
const COMMANDS = [
  pack,
  inspect,
  view,
  verify,
  add,
  remove,
  compact,
  distill,
  learn,
  exportTask,
  fold,
  check,
  attach,
  keygen,
  sign,
  hub,
  bench,
];

const HELP: ReadonlySet<string> = new Set(["help", "-h", "--help"]);

/** @param print takes help and version */
function createProgram(print: (text: string) => void): Command {
  const program = new Command("eigenlora")
    .description("Many LoRA adapters of one base model in one small file.")
    .version(VERSION, "-v, --version", "Print the version.")
    .option("--json", "Print one JSON object, even on errors.")
    .helpOption("-h, --help", "Print this help.")
    .helpCommand(false)
    .addHelpText(
      "after",
      "\nHelp for a command: eigenlora COMMAND --help.\nExit codes: 0 done, 1 failed, 2 wrong usage, 3 out of --minutes, 130 Ctrl-C.",
    )
    // Options behind a command are the command's own.
    .enablePositionalOptions()
    .configureHelp({ helpWidth: 80, subcommandTerm: (command) => command.name() })
    .configureOutput({ writeOut: print, writeErr: print, outputError: () => undefined })
    .exitOverride();
  program
    .command("help [COMMAND...]")
    .summary("Print the help of a command.")
    .option("--json", "Print one JSON object.")
    .option("--all", "List all its options.")
    .addHelpText("after", "\nExample:\n  eigenlora help pack --all")
    .action(async (names: string[]) => {
      const found = named(program, names);
      await (found ? found.help() : program.parseAsync(names, { from: "user" }));
    });
  return program;
}

/** The command of these words, such as hub shard; undefined where there is none. */
function named(program: Command, words: readonly string[]): Command | undefined {
  return words.reduce<Command | undefined>(
    (command, word) => command?.commands.find((one) => one.name() === word),
    program,
  );
}

/** Lists options that are seldom needed too. */
function listAll(command: Command): void {
  for (const option of command.options) option.hidden = false;
  for (const one of command.commands) listAll(one);
}

/**
 * Runs a command line.
 * @param argv what comes behind `eigenlora`
 * @returns the exit code: 0, 1 (failed), 2 (usage), 3 (out of time) or 130 (interrupted)
 */
export async function runProgram(argv: readonly string[], stdout: Stream, stderr: Stream): Promise<number> {
  const json = argv.includes("--json");
  let printed = "";
  let code = 0;
  const program = createProgram((text) => {
    printed += text;
  });
  const out = createOutput(json, stderr);
  const print = (object: object, lines: readonly string[]): unknown =>
    stdout.write(`${(json ? [JSON.stringify(object)] : lines).map(printable).join("\n")}\n`);
  const beat = setInterval(out.beat, 1000);
  const done = (result: Result | number): void => {
    // What waits for Ctrl-C from here on has nothing more to say.
    clearInterval(beat);
    out.clear();
    if (typeof result === "number") code = result;
    else {
      code = result.exitCode ?? 0;
      print(result.json, result.text);
    }
  };
  for (const attach of COMMANDS) attach(program, out, done);
  // Words that are not known are compared with all options, those that are seldom needed too.
  if (argv.includes("--all") || !argv.some((word) => HELP.has(word))) listAll(program);
  try {
    // Others print their version for either letter.
    await program.parseAsync(argv[0] === "-V" ? ["--version", ...argv.slice(1)] : argv, { from: "user" });
    return code;
  } catch (error) {
    if (!(error instanceof CommanderError && printed !== "")) {
      const words = argv.filter((word) => !word.startsWith("-") && word !== "help");
      const command = named(program, words.slice(0, 2)) ?? named(program, words.slice(0, 1));
      const { object, text, exitCode } = failure(error, command);
      out.clear();
      if (json) print({ error: object }, []);
      else stderr.write(text);
      return code || exitCode;
    }
    const answer = error.code === "commander.version" ? { version: VERSION } : { help: printed };
    // Help that nobody asked for: there was no command.
    const unasked = error.exitCode === 0 ? {} : { error: { tag: "usage", message: "missing COMMAND" } };
    print({ ...answer, ...unasked }, printed.trimEnd().split("\n"));
    return error.exitCode === 0 ? 0 : 2;
  } finally {
    clearInterval(beat);
  }
}

/** What the parser says, in our words. */
function wordsOf({ message, code }: CommanderError, command: Command | undefined): string {
  const excess = command?.args.slice(command.registeredArguments.length).join(" --task ");
  if (code === "commander.excessArguments" && command?.options.some(({ long }) => long === "--task"))
    return `too many arguments; did you mean --task ${excess}?`;
  return message
    .replace(/^error: /, "")
    .replace(/required argument '(.*)'/, "$1")
    .replace(/\n\(Did you mean (.*)\?\)/, "; did you mean $1?");
}

/** An error as `--json` and as people see it. */
function failure(error: unknown, command: Command | undefined): { object: object; text: string; exitCode: number } {
  const usage = error instanceof UsageError || error instanceof CommanderError;
  const ours = error instanceof EigenLoraError;
  const { path } = error as NodeJS.ErrnoException;
  const known = usage || ours || path !== undefined || error instanceof RangeError || error instanceof TypeError;
  const system = path === undefined ? (error as Error).message : `${path}: ${reasonOf(error)}`;
  const said = error instanceof CommanderError ? wordsOf(error, command) : system;
  const name = command?.parent?.parent ? `${command.parent.name()} ${command.name()}` : command?.name();
  const message = usage && name ? `${name}: ${said}` : said;
  const advice = usage ? `See eigenlora ${name ? `${name} ` : ""}--help.\n` : "";
  const tag = usage ? "usage" : ours ? error.tag : "failed";
  return {
    object: { ...(ours ? error : {}), tag, message },
    text: `${paragraph(`eigenlora: ${known ? message : ((error as Error).stack ?? message)}`)}\n${advice}`,
    exitCode: usage ? 2 : 1,
  };
}
