/**
 * The command line as a whole: all commands, help, version, and what becomes of errors. Each command is declared in a file of its
 * own.
 */

import { EigenLoraError } from "../errors.ts";
import { reasonOf } from "../files-node.ts";
import { VERSION } from "../version.ts";
import { add } from "./add.ts";
import { attach } from "./attach.ts";
import { bench } from "./bench.ts";
import { check } from "./check.ts";
import type { Result } from "./command.ts";
import { Command, CommanderError } from "./commander.ts";
import { compact } from "./compact.ts";
import { distill } from "./distill.ts";
import { exportTask } from "./export.ts";
import { fold } from "./fold.ts";
import { inspect } from "./inspect.ts";
import { learn } from "./learn.ts";
import { UsageError } from "./options.ts";
import { createOutput, paragraph, printable, type Stream } from "./output.ts";
import { pack } from "./pack.ts";
import { assemble, project } from "./project.ts";
import { remove } from "./remove.ts";
import { merge, shard } from "./shard.ts";
import { keygen, sign } from "./sign.ts";
import { verify } from "./verify.ts";

/** In the order of the help. */
const COMMANDS = [
  ...[pack, inspect, verify, add, remove, compact, distill, learn, exportTask, fold, check, attach],
  ...[keygen, sign],
  ...[shard, merge, project, assemble, bench],
];

/** @param print takes help and version */
function createProgram(print: (text: string) => void): Command {
  const program = new Command("eigenlora")
    .description("Many LoRA adapters of one base model in one small file.")
    .version(VERSION, "-v, --version", "Print the version.")
    .option("--json", "Print one JSON object, even on errors.")
    .helpOption("-h, --help", "Print this help.")
    .helpCommand(false)
    .addHelpText("after", "\nHelp for a command: eigenlora COMMAND --help. Exit codes: 0, 1 failed, 2 usage.")
    // Options behind a command are the command's own.
    .enablePositionalOptions()
    .configureHelp({ helpWidth: 80, subcommandTerm: (command) => command.name() })
    .configureOutput({ writeOut: print, writeErr: print, outputError: () => undefined })
    .exitOverride();
  program
    .command("help [COMMAND]")
    .summary("Print the help of a command.")
    .option("--json", "Print one JSON object.")
    .action(async (name: string | undefined) => {
      const found = name === undefined ? program : program.commands.find((command) => command.name() === name);
      await (found ? found.help() : program.parseAsync([name!], { from: "user" }));
    });
  return program;
}

/**
 * Runs a command line.
 * @param argv what comes behind `eigenlora`
 * @returns the exit code: 0, 1 (failed) or 2 (usage)
 */
export async function runProgram(argv: readonly string[], stdout: Stream, stderr: Stream): Promise<number> {
  const json = argv.includes("--json");
  let [printed, code] = ["", 0];
  const program = createProgram((text) => {
    printed += text;
  });
  const out = createOutput(json, stderr);
  const print = (object: object, lines: readonly string[]): unknown =>
    stdout.write(`${(json ? [JSON.stringify(object)] : lines).map(printable).join("\n")}\n`);
  const done = (result: Result | number): void => {
    out.clear();
    if (typeof result === "number") code = result;
    else {
      code = result.exitCode ?? 0;
      print(result.json, result.text);
    }
  };
  for (const attach of COMMANDS) attach(program, out, done);
  const beat = setInterval(out.beat, 1000);
  try {
    // Others print their version for either letter.
    await program.parseAsync(argv[0] === "-V" ? ["--version", ...argv.slice(1)] : argv, { from: "user" });
    return code;
  } catch (error) {
    if (!(error instanceof CommanderError && printed !== "")) {
      const named = argv.find((word) => !word.startsWith("-") && word !== "help");
      const command = program.commands.find((one) => one.name() === named);
      const { object, text, exitCode } = failure(error, command);
      out.clear();
      if (json) print({ error: object }, []);
      else stderr.write(text);
      return exitCode;
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
function wordsOf({ message }: CommanderError): string {
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
  const said = error instanceof CommanderError ? wordsOf(error) : system;
  const name = command ? `${command.name()} ` : "";
  const message = usage && command ? `${command.name()}: ${said}` : said;
  const advice = usage ? `See eigenlora ${name}--help.\n` : "";
  const tag = usage ? "usage" : ours ? error.tag : "failed";
  return {
    object: { ...(ours ? error : {}), tag, message },
    text: `${paragraph(`eigenlora: ${known ? message : ((error as Error).stack ?? message)}`)}\n${advice}`,
    exitCode: usage ? 2 : 1,
  };
}
