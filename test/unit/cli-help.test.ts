/** The command line's own texts: help of every command, versions, and unknown words. */
import { readFile } from "node:fs/promises";
import t from "tap";
import { run } from "../support/command-line.ts";
import { fromRoot, workIn } from "../support/folder.ts";
import { COMMAND_LINE } from "../support/internals/cli.ts";

const list = (await run("--help")).stdout;
const commands = list
  .slice(list.indexOf("Commands:"))
  .split("\n")
  .flatMap((line) => /^ {2}([a-z]+)/.exec(line)?.[1] ?? []);

t.test("a short list, and help of each command that fits 80 columns", async (t) => {
  t.same(
    commands.sort(),
    "add attach check compact distill export fold help hub inspect keygen learn pack remove sign verify view".split(
      " ",
    ),
  );
  t.ok(list.split("\n").length <= 40, "short");
  const below = ["shard", "merge", "project", "assemble"].map((name) => `hub ${name}`);
  for (const command of ["", ...commands, ...below, "pack --all"]) {
    const asked = [...command.split(" "), "--help"].filter((word) => word !== "");
    const { status, stdout, stderr } = await run(...asked);
    t.match({ status, stderr }, { status: 0, stderr: "" }, command);
    const wide = stdout.split("\n").filter((line) => line.length > 80);
    t.same(wide, [], `${command}: within 80 columns`);
    t.match(stdout, new RegExp(`^Usage: eigenlora ${command.replace(" --all", "")}`), "it says how it is called");
    t.notMatch(stdout, /undefined|\[object|unless given/, command);
  }
});

t.test("each help has an example, whose words are known", async (t) => {
  workIn(t);
  const below = ["shard", "merge", "project", "assemble"].map((name) => `hub ${name}`);
  for (const command of [...commands, ...below]) {
    const { stdout } = await run(...command.split(" "), "--help");
    const [, example = ""] = /\nExample:\n {2}eigenlora (.+)\n$/.exec(stdout) ?? [];
    t.ok(example.startsWith(command), `${command}: ${example}`);
    const { stderr } = await run(...example.split(" "));
    t.notMatch(stderr, /unknown|missing|too many|needs|expected/, example);
  }
});

t.test("every way to ask for help and version", async (t) => {
  const help = (await run("pack", "--help")).stdout;
  t.match(help, /--model <MODEL.onnx>\s+The smallest pack whose tasks answer/);
  for (const asked of [
    ["pack", "-h"],
    ["help", "pack"],
    ["pack", "--help", "-o", "x"],
  ])
    t.equal((await run(...asked)).stdout, help, asked.join(" "));
  const all = (await run("pack", "--help", "--all")).stdout;
  const flags = (text: string) => text.split("\n").filter((line) => /^ {2}-/.test(line)).length;
  t.match(all, /Default:\s+as\s+--dtype\s+says/);
  t.ok(flags(help) <= 14 && flags(all) <= 24, `${flags(help)} options of ${flags(all)}`);
  t.match(help, /more options: --help --all/);
  t.equal((await run("help", "pack", "--all")).stdout, all);
  t.match((await run("help", "hub", "shard")).stdout, /^Usage: eigenlora hub shard/);
  for (const asked of [["-h"], ["help"]]) t.equal((await run(...asked)).stdout, list, asked.join(" "));
  t.same(JSON.parse((await run("pack", "--help", "--json")).stdout), { help });
  t.same(JSON.parse((await run("help", "pack", "--json")).stdout), { help });
  const { version } = JSON.parse(await readFile(fromRoot("package.json"), "utf8"));
  for (const flag of ["-v", "--version"]) t.match(await run(flag), { status: 0, stdout: `${version}\n`, stderr: "" });
  t.same(JSON.parse((await run("--version", "--json")).stdout), { version });
});

t.test("what is missing, unknown or too much is named, with the nearest", async (t) => {
  const cases: [string[], string][] = [
    [["pack"], "pack: missing ADAPTER_OR_FOLDER"],
    [["pack", "x"], "pack: missing --output"],
    [["learn", "p.eigen", "-o", "x"], "learn: missing EXAMPLES"],
    [["remove", "p.eigen"], "remove: missing TASK"],
    [["pakc", "x"], "unknown command 'pakc'; did you mean pack?"],
    [["help", "pakc"], "unknown command 'pakc'; did you mean pack?"],
    [["xyzzy"], "unknown command 'xyzzy'"],
    [["pack", "x", "--dtpye", "f16"], "pack: unknown option '--dtpye'; did you mean --dtype?"],
    [["verify", "p.eigen", "--jsn"], "verify: unknown option '--jsn'; did you mean --json?"],
    [["inspect", "a", "b"], "inspect: too many arguments for 'inspect'. Expected 1 argument but got 2."],
    [["pack", "x", "-o"], "pack: option '-o, --output <PACK>' argument missing"],
    [["pack", "x", "--model", "--text", "t"], "pack: --model needs a value, got the option --text"],
    [["pack", "x", "--k", "-3"], "pack: --k -3: expected a whole number from 1"],
    [["pack", "x", "--k", ""], "pack: --k : expected a whole number from 1"],
    [["pack", "x", "--as", "new"], "pack: --as new: expected OLD=NEW"],
    [["hub", "shard", "x", "--gauge", "even"], "hub shard: --gauge even: expected as-trained or balanced"],
    [["fold", "p.eigen", "-o", "x", "--base", "b"], "fold: missing --task"],
    [["hub", "shard"], "hub shard: missing ADAPTER_OR_FOLDER"],
  ];
  for (const [args, message] of cases) {
    const { status, stdout, stderr } = await run(...args);
    t.match({ status, stdout }, { status: 2, stdout: "" }, args.join(" "));
    const command = /^([a-z ]+): /.exec(message)?.[1];
    t.equal(stderr, `eigenlora: ${message}\nSee eigenlora ${command ? `${command} ` : ""}--help.\n`);
    const json = await run(...args, "--json");
    if (args.at(-1) === "-o") continue; // The flag would otherwise be the value of -o.
    t.match({ status: json.status, stderr: json.stderr }, { status: 2, stderr: "" }, args.join(" "));
    t.same(JSON.parse(json.stdout), { error: { tag: "usage", message } });
  }
});

t.test("nothing but the bundled parser: the package has one dependency", async (t) => {
  const bundle = await readFile(new URL("commander.js", COMMAND_LINE), "utf8");
  t.notMatch(bundle, /from ?"commander"/);
  t.match(bundle, /The MIT License[\s\S]*Copyright \(c\) 2011 TJ Holowaychuk/, "its licence comes with it");
});
