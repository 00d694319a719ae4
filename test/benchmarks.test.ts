/** Every benchmark lists its options, and refuses unknown ones. Nothing is measured. */
import { execFile } from "node:child_process";
import { readdirSync } from "node:fs";
import { writeFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { openPack } from "eigenlora";
import t from "tap";
import { choice, flag, number, type Option, text } from "../benchmarks/lib/arguments.js";
import { blendedPack } from "../benchmarks/lib/llm-memory.js";
import { decodeTensor } from "./internals.ts";
import { packOf } from "./packs.ts";

const folder = new URL("../benchmarks/", import.meta.url);
const scripts = ["", "research/"].flatMap((under) =>
  readdirSync(new URL(under, folder))
    .filter((name) => name.endsWith(".js"))
    .map((name) => `${under}${name}`),
);

interface Ended {
  code: number | undefined;
  stdout: string;
  stderr: string;
}

const GIVEN = [["--help"], ["--speling", "3"]];
/** One process for all benchmarks, so that their imports are loaded once. */
const child = fileURLToPath(new URL("./benchmarks-child.js", import.meta.url));
const ran = promisify(execFile)(process.execPath, [child, folder.href, JSON.stringify(scripts), JSON.stringify(GIVEN)]);
const ended = ran.then(({ stdout }) => JSON.parse(stdout) as Record<string, [help: Ended, wrong: Ended]>);

for (const script of scripts) {
  t.test(script, async (t) => {
    const name = script.replace("research/", "").replace(".js", "");
    const [help, wrong] = (await ended)[script]!;
    t.equal(help.code, 0, help.stderr);
    t.match(help.stdout, new RegExp(`^eigenlora bench ${name} \\[options\\]\n\n[\\s\\S]+\n {2}--json `));
    t.equal(wrong.code, 2);
    t.match(wrong.stderr, `${name}: Unknown option '--speling'; see --help`);
    t.equal(wrong.stdout, "");
  });
}

t.test("values of options", (t) => {
  const refuses = (option: Option<unknown>, given: string, why: string) =>
    t.throws(() => option.read(given), new Error(why));
  t.equal(number("", 3).missing, 3);
  t.equal(number("").read("0.5"), 0.5);
  refuses(number("", 3, 1), "0", 'expected a number from 1, got "0"');
  refuses(number(""), "many", 'expected a number from 0, got "many"');
  refuses(number(""), "", 'expected a number from 0, got ""');
  t.equal(choice(["a", "b"], "").read("b"), "b");
  refuses(choice(["a", "b"], ""), "c", 'expected a, b, got "c"');
  t.same([text("FILE", "").read("x"), flag("").read(""), flag("").missing], ["x", true, false]);
  t.end();
});

t.test("made-up skills lie between real ones", async (t) => {
  const folder = t.testdir({});
  const [file, more] = [`${folder}/two.eigen`, `${folder}/more.eigen`];
  const { bytes } = await packOf(["decoder/adapters/upper", "decoder/adapters/lower"], { select: { kind: "k", k: 4 } });
  await writeFile(file, bytes);
  await writeFile(more, await blendedPack(file, 7));
  const pack = await openPack(more);
  t.same([...pack.tasks.keys()].sort(), ["blend 2", "blend 3", "blend 4", "blend 5", "blend 6", "lower", "upper"]);
  const first = async (id: string): Promise<number> => {
    const { bytes, terms } = await pack.load(id);
    const { dtype, rows, width, byteOffset, byteLength } = terms[0]!.A!.tensor;
    return decodeTensor(dtype, bytes.subarray(byteOffset, byteOffset + byteLength), rows, width)[0]!;
  };
  const [upper, lower] = [await first("upper"), await first("lower")];
  t.not(upper, lower);
  for (let i = 2; i < 7; i++) {
    const value = await first(`blend ${i}`);
    t.ok(
      value >= Math.min(upper, lower) - 1e-3 && value <= Math.max(upper, lower) + 1e-3,
      `${lower}, ${value}, ${upper}`,
    );
  }
  await pack.close();
});
