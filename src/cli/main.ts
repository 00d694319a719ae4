#!/usr/bin/env node
/**
 * The command line: `eigenlora COMMAND …`. Exits 0, 1 (failed) or 2 (usage). Each command is declared in a file of its own.
 */
import { EigenLoraError } from "../errors.ts";
import { VERSION } from "../version.ts";
import { add } from "./add.ts";
import { attach } from "./attach.ts";
import { bench } from "./bench.ts";
import type { Result } from "./command.ts";
import { Command, CommanderError } from "./commander.ts";
import { distill } from "./distill.ts";
import { exportTask } from "./export.ts";
import { fold } from "./fold.ts";
import { inspect } from "./inspect.ts";
import { learn } from "./learn.ts";
import { UsageError } from "./options.ts";
import { createOutput } from "./output.ts";
import { pack } from "./pack.ts";
import { assemble, project } from "./project.ts";
import { remove } from "./remove.ts";
import { merge, shard } from "./shard.ts";
import { verify } from "./verify.ts";

/** In the order of the help. */
const COMMANDS = [
  ...[pack, inspect, verify, add, remove, distill, learn, exportTask, fold, attach],
  ...[shard, merge, project, assemble, bench],
];

/** @param print takes help and version */
function createProgram(print: (text: string) => void): Command {
  const program = new Command("eigenlora")
    .description("Many LoRA adapters on one base model.")
    .version(VERSION, "-v, --version", "Print the version.")
    .option("--json", "Print one JSON object, whatever comes.")
    .helpOption("-h, --help", "Print this help.")
    .helpCommand(false)
    .addHelpText("after", "\nHelp of a command: eigenlora COMMAND --help. Exit codes: 0, 1 failed, 2 usage.")
    // Options behind a command are the command's own.
    .enablePositionalOptions()
    .configureHelp({ helpWidth: 80, subcommandTerm: (command) => command.name() })
    .configureOutput({ writeOut: print, writeErr: print, outputError: () => undefined })
    .exitOverride();
  program
    .command("help [COMMAND]")
    .summary("print the help of a command")
    .action(async (name: string | undefined) => {
      const found = name === undefined ? program : program.commands.find((command) => command.name() === name);
      await (found ? found.help() : program.parseAsync([name!], { from: "user" }));
    });
  return program;
}

async function main(argv: readonly string[]): Promise<void> {
  const json = argv.includes("--json");
  let printed = "";
  const program = createProgram((text) => {
    printed += text;
  });
  const print = ({ json: object, text, exitCode = 0 }: Result): void => {
    process.exitCode = exitCode;
    process.stdout.write(json ? `${JSON.stringify(object)}\n` : `${text.join("\n")}\n`);
  };
  for (const attach of COMMANDS) attach(program, createOutput(json), print);
  try {
    await program.parseAsync(argv, { from: "user" });
  } catch (error) {
    if (error instanceof CommanderError && printed !== "") {
      const { exitCode, code } = error;
      const answer = code === "commander.version" ? { version: VERSION } : { help: printed };
      // Help that nobody asked for.
      const failed = { ...answer, error: { tag: "usage", message: "missing COMMAND" } };
      print({ json: exitCode ? failed : answer, text: [printed.trimEnd()], exitCode: exitCode ? 2 : 0 });
    } else {
      const named = argv.find((word) => !word.startsWith("-"));
      fail(error, json, program.commands.find((command) => command.name() === named)?.name());
    }
  }
}

/** What the parser says, in our words. */
function wordsOf({ message }: CommanderError): string {
  return message
    .replace(/^error: /, "")
    .replace(/required argument '(.*)'/, "$1")
    .replace(/\n\(Did you mean (.*)\?\)/, "; did you mean $1?");
}

function fail(error: unknown, json: boolean, command: string | undefined): void {
  const usage = error instanceof UsageError || error instanceof CommanderError;
  const known = usage || error instanceof EigenLoraError || error instanceof RangeError || error instanceof TypeError;
  const said = error instanceof CommanderError ? wordsOf(error) : (error as Error).message;
  const message = usage && command ? `${command}: ${said}` : said;
  if (json) {
    const fields = error instanceof EigenLoraError ? { ...error } : {};
    const tag = usage ? "usage" : error instanceof EigenLoraError ? error.tag : "failed";
    process.stdout.write(`${JSON.stringify({ error: { ...fields, tag, message } })}\n`);
  } else {
    process.stderr.write(`eigenlora: ${known ? message : ((error as Error).stack ?? message)}\n`);
    if (usage) process.stderr.write(`See eigenlora ${command ? `${command} ` : ""}--help.\n`);
  }
  process.exitCode = usage ? 2 : 1;
}

await main(process.argv.slice(2));
