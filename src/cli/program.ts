/**
 * The program: its commands, help, version, and errors as people and `--json` see them. Only the command that was asked
 * for is loaded.
 */

import { EigenLoraError } from "../errors.ts";
import { reasonOf } from "../files-node.ts";
import { VERSION } from "../format/format.ts";
import type { Attach, Result } from "./command.ts";
import { Command, CommanderError } from "./commander.ts";
import { UsageError } from "./options.ts";
import { createOutput, paragraph, printable, type Stream } from "./output.ts";

/** Line in the list of commands, and module that exports the command by its name, in the order of the help. */
const COMMANDS: Readonly<Record<string, readonly [does: string, load: () => Promise<object>]>> = {
  pack: ["Make a pack of adapters.", () => import("./pack.ts")],
  inspect: ["Show what a pack holds: sections, tasks, modules and components.", () => import("./inspect.ts")],
  view: ["Show in a browser what a pack holds, or two packs side by side.", () => import("./view.ts")],
  verify: ["Verify checksums and limits, and with adapters the ΔW error of each task.", () => import("./verify.ts")],
  add: ["Add tasks to a pack, from adapters or task files.", () => import("./change.ts")],
  remove: ["Remove tasks from a pack.", () => import("./change.ts")],
  compact: ["Rewrite a pack in place, without the gaps that changes have left.", () => import("./change.ts")],
  distill: ["Train the tasks of a pack to answer plain text as their adapters do.", () => import("./distill.ts")],
  learn: [
    "Train a new task on labelled texts, or on prompts with completions, and write it as a task file.",
    () => import("./learn.ts"),
  ],
  export: [
    "Write a task as an adapter that PEFT, diffusers, llama.cpp or ONNX Runtime loads.",
    () => import("./export.ts"),
  ],
  fold: ["Merge a task into the weights of the base model.", () => import("./export.ts")],
  check: ["Say whether a pack works on a model, in which modes, and what it costs.", () => import("./check.ts")],
  attach: ["Write an ONNX model with the components inside.", () => import("./attach.ts")],
  keygen: ["Make an Ed25519 key pair to sign with.", () => import("./change.ts")],
  sign: ["Sign packs and task files with an Ed25519 key.", () => import("./change.ts")],
  hub: ["Commands for packs too large for one machine.", () => import("./hub.ts")],
};

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
      "\nHelp for a command: eigenlora COMMAND --help.\nPacks, adapters and models may lie on the Hugging Face Hub: hf:org/name@v1/path.\nExit codes: 0 done, 1 failed, 2 wrong usage, 3 out of --minutes, 130 Ctrl-C.",
    )
    // Options behind a command belong to the command.
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

function named(program: Command, words: readonly string[]): Command | undefined {
  return words.reduce<Command | undefined>(
    (command, word) => command?.commands.find((below) => below.name() === word),
    program,
  );
}

function listAll(command: Command): void {
  for (const option of command.options) option.hidden = false;
  for (const below of command.commands) listAll(below);
}

/**
 * Runs a command line.
 * @param argv what follows `eigenlora`
 * @returns the exit code: 0, 1 (failed), 2 (usage), 3 (out of time) or 130 (interrupted)
 */
export async function runProgram(argv: readonly string[], stdout: Stream, stderr: Stream): Promise<number> {
  const json = argv.includes("--json");
  const words = argv.filter((word) => !word.startsWith("-") && word !== "help");
  let printed = "";
  let code = 0;
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
  for (const [name, [does, load]] of Object.entries(COMMANDS)) {
    if (name === words[0]) ((await load()) as Record<string, Attach>)[name]!(program, does, out, done);
    else program.command(name).summary(does);
  }
  // Unknown words are compared with all options, the rare ones too.
  if (argv.includes("--all") || !argv.some((word) => HELP.has(word))) listAll(program);
  try {
    await program.parseAsync(argv, { from: "user" });
    return code;
  } catch (error) {
    if (!(error instanceof CommanderError && printed !== "")) {
      const command = named(program, words.slice(0, 2)) ?? named(program, words.slice(0, 1));
      const { object, text, exitCode } = failure(error, command);
      out.clear();
      if (json) print({ error: object }, []);
      else stderr.write(text);
      return code || exitCode;
    }
    const answer = error.code === "commander.version" ? { version: VERSION } : { help: printed };
    // Help without a request for it: there was no command.
    const unasked = error.exitCode === 0 ? {} : { error: { tag: "usage", message: "missing COMMAND" } };
    print({ ...answer, ...unasked }, printed.trimEnd().split("\n"));
    return error.exitCode === 0 ? 0 : 2;
  }
}

/** The parser's messages in our words. */
function wordsOf({ code, message }: CommanderError, command: Command | undefined): string {
  const isTask = code === "commander.excessArguments" && command?.options.some(({ long }) => long === "--task");
  return `${message}${isTask ? " A task is named with --task ID." : ""}`
    .replace(/^error: /, "")
    .replace(/required argument '(.*)'/, "$1")
    .replace(/\n\(Did you mean (.*)\?\)/, "; did you mean $1?");
}

/** Messages of the engine, where code of ours is wrong; a TypeError or RangeError of ours says what was given. */
const OF_V8 =
  /^(Cannot |Maximum call stack|Invalid (typed )?(array|string|DataView) |Reduce of empty|Offset is outside)|is not (a function|iterable|a constructor|defined)|called on (null|incompatible)|[Aa]ssignment to constant/;

function failure(error: unknown, command: Command | undefined): { object: object; text: string; exitCode: number } {
  const usage = error instanceof UsageError || error instanceof CommanderError;
  const ours = error instanceof EigenLoraError;
  const { path } = error as NodeJS.ErrnoException;
  const checked = (error instanceof RangeError || error instanceof TypeError) && !OF_V8.test(error.message);
  const known = usage || ours || path !== undefined || checked;
  const system = path === undefined ? (error as Error).message : `${path}: ${reasonOf(error)}`;
  const said = error instanceof CommanderError ? wordsOf(error, command) : system;
  const name = command?.parent?.parent ? `${command.parent.name()} ${command.name()}` : command?.name();
  const message = usage && name ? `${name}: ${said}` : said;
  const bug = "This is an error of eigenlora itself. Please report it, with the lines above.\n";
  const advice = usage ? `See eigenlora ${name ? `${name} ` : ""}--help.\n` : known ? "" : bug;
  const tag = usage ? "usage" : ours ? error.tag : "failed";
  return {
    object: { ...(ours ? error : {}), tag, message },
    text: `${paragraph(`eigenlora: ${known ? message : ((error as Error).stack ?? message)}`)}\n${advice}`,
    exitCode: usage ? 2 : 1,
  };
}
