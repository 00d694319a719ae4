/** The documents: links lead somewhere, pages are short, the index lists them all, and the API reference can be made of the doc comments. */
import { execFile } from "node:child_process";
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join, relative } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import t from "tap";
import { pagesIn } from "./blocks.ts";
import { run } from "./command-line.ts";
import { soak } from "./required.ts";
import { subpaths } from "./tools/api.js";

const root = fileURLToPath(new URL("..", import.meta.url));
const read = (path: string): string => readFileSync(join(root, path), "utf8");

/** Pages of `docs`, without the API reference, which is generated. */
const docs = pagesIn("docs").filter((page) => !page.startsWith("docs/api/"));
const examples = pagesIn("examples");
const top = readdirSync(root).filter((file) => file.endsWith(".md"));

/** Most words of a page, tables and code counted but not comments, so that it is read in five minutes. */
const WORDS = 1200;
/** Reference, made to be searched, and experiments. */
const LONG = /^docs\/(research\/.*|api-report|glossary)\.md$/;

/** Relative links of pages that lead to no file, or to no heading in it. @param from folder of the pages */
function brokenLinks(pages: readonly string[], from: string): string[] {
  const broken: string[] = [];
  for (const page of pages) {
    const text = readFileSync(join(from, page), "utf8").replace(/^```[\s\S]*?^```/gm, "");
    for (const [, target] of text.matchAll(/\]\(([^)\s]+)\)/g)) {
      if (/^[a-z]+:/.test(target!)) continue;
      const [path, anchor] = target!.split("#") as [string, string?];
      const file = join(from, path === "" ? page : join(dirname(page), path));
      if (!existsSync(file)) broken.push(`${page}: ${target}`);
      else if (anchor && !anchorsOf(readFileSync(file, "utf8")).has(anchor)) broken.push(`${page}: ${target}`);
    }
  }
  return broken;
}

t.test("relative links lead to a file, and to a heading in it", async (t) => {
  t.same(brokenLinks([...top, ...docs, ...examples], root), []);
});

const wordsOf = (text: string): number =>
  text
    .replace(/<!--.*?-->/g, "")
    .trim()
    .split(/\s+/).length;

t.test(`a page has at most ${WORDS} words; experiments are in docs/research`, async (t) => {
  const counted = docs.filter((page) => !LONG.test(page)).map((page) => [page, wordsOf(read(page))]);
  t.same(
    counted.filter(([, words]) => Number(words) > WORDS),
    [],
  );
  t.ok(counted.length > 30, `${counted.length} pages`);
});

t.test("an answer in docs/questions.md has at most 8 lines beside its code, and leads to a page", async (t) => {
  const answers = read("docs/questions.md").split(/^## /m).slice(1);
  const long = answers.filter((answer) => {
    const lines = answer
      .replace(/^```[\s\S]*?^```|^<!--.*-->$/gm, "")
      .trim()
      .split(/\n+/)
      .slice(1);
    return lines.length > 8 || !/→ \[/.test(answer);
  });
  t.same(
    long.map((answer) => answer.split("\n")[0]),
    [],
  );
  t.ok(answers.length > 10, `${answers.length} questions`);
});

/** Anchors of a page: its own, and those that GitHub makes of headings, where equal ones are numbered. */
function anchorsOf(text: string): Set<string> {
  const anchors = new Set([...text.matchAll(/<a id="([^"]+)">/g)].map(([, id]) => id!));
  for (const [, heading] of text.matchAll(/^#+ (.*)$/gm)) {
    const anchor = heading!
      .toLowerCase()
      .replace(/[^\p{L}\p{N} _-]/gu, "")
      .replaceAll(" ", "-");
    let free = anchor;
    for (let i = 1; anchors.has(free); i++) free = `${anchor}-${i}`;
    anchors.add(free);
  }
  return anchors;
}

t.test("commands of the documents exist, with their options", async (t) => {
  const helps = new Map<string, string>();
  const help = async (command: string): Promise<string> => {
    const known = helps.get(command);
    if (known !== undefined) return known;
    const { stdout } = await run(...command.split(" "), "--help", "--all");
    helps.set(command, stdout);
    return stdout;
  };
  const wrong: string[] = [];
  for (const page of ["README.md", ...docs, ...examples]) {
    const text = read(page).replaceAll("\\\n", " ");
    for (const [line, command, rest] of text.matchAll(/(?:^|`|npx )eigenlora ((?:hub )?[a-z]+)\b([^\n`#]*)/gm)) {
      const flags = [...rest!.matchAll(/ (--?[a-z][a-z-]*)/g)].map(([, flag]) => flag!);
      const said = await help(command!);
      const unknown = flags.filter((flag) => !new RegExp(`^ .*${flag}\\b(?!-)`, "m").test(said));
      if (said === "" || unknown.length > 0) wrong.push(`${page}: ${line} ${unknown.join(" ")}`);
    }
  }
  t.same(wrong, []);
  t.ok(helps.size > 15, `${helps.size} commands were found`);
});

t.test("docs/README.md lists every page", async (t) => {
  const index = read("docs/README.md");
  const pages = docs.map((page) => relative("docs", page)).filter((page) => page !== "README.md");
  t.same(
    pages.filter((page) => !index.includes(`(${page})`)),
    [],
  );
});

if (soak)
  t.test("the API reference can be made, without a warning", async (t) => {
    const out = mkdtempSync(join(tmpdir(), "eigenlora-api-"));
    t.teardown(() => rmSync(out, { recursive: true }));
    const typedoc = join(root, "node_modules/typedoc/bin/typedoc");
    // Fails on warnings, by its options.
    await promisify(execFile)(process.execPath, [typedoc, "--options", "docs/typedoc.config.js", "--out", out], {
      cwd: root,
    });
    const pages = readdirSync(out, { recursive: true, encoding: "utf8" }).filter((file) => file.endsWith(".md"));
    t.same(
      pages.sort(),
      ["README.md", ...subpaths().map(({ subpath }) => `${subpath}.md`)].sort(),
      "an index, and a page for each subpath",
    );
    t.same(brokenLinks(pages, out), []);
  });
