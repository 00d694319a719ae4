/** Every benchmark lists its options, and refuses unknown ones. Nothing is measured. */
import { execFile } from "node:child_process";
import { readdirSync } from "node:fs";
import { promisify } from "node:util";
import t from "tap";
import { fromRoot } from "../support/folder.ts";

const folder = new URL("../../benchmarks/", import.meta.url);
const scripts = ["", "research/"].flatMap((under) =>
  readdirSync(new URL(under, folder))
    .filter((name) => name.endsWith(".js") && name !== "run.js")
    .map((name) => `${under}${name}`),
);

interface Ended {
  code: number | undefined;
  stdout: string;
  stderr: string;
}

const GIVEN = [["--help"], ["--speling", "3"]];
/** One process for all benchmarks, so that their imports are loaded once. */
const child = fromRoot("test/support/benchmarks-child.js");
const ran = promisify(execFile)(process.execPath, [child, folder.href, JSON.stringify(scripts), JSON.stringify(GIVEN)]);
const ended = ran.then(({ stdout }) => JSON.parse(stdout) as Record<string, [help: Ended, wrong: Ended]>);

for (const script of scripts) {
  t.test(script, async (t) => {
    const name = script.replace("research/", "").replace(".js", "");
    const [help, wrong] = (await ended)[script]!;
    t.equal(help.code, 0, help.stderr);
    t.match(help.stdout, new RegExp(`^npm run bench ${name} \\[options\\]\n\n[\\s\\S]+\n {2}--json `));
    t.equal(wrong.code, 2);
    t.match(wrong.stderr, `${name}: Unknown option '--speling'; see --help`);
    t.equal(wrong.stdout, "");
  });
}
