/**
 * The documents: links lead somewhere, pages are short, the index lists them all, and typedoc can make the API
 * reference.
 */
import { execFile } from "node:child_process";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { dirname, join, relative } from "node:path";
import { promisify } from "node:util";
import t from "tap";
import { pagesIn } from "../support/blocks.ts";
import { run } from "../support/command-line.ts";
import { folderFor, fromRoot } from "../support/folder.ts";
import { soak } from "../support/required.ts";
import { subpaths } from "../tools/api.js";

const root = fromRoot("");
const read = (path: string): string => readFileSync(join(root, path), "utf8");

/** Pages of `docs`, without the API reference, which is generated. */
const docs = pagesIn("docs").filter((page) => !/^docs\/(api|site)\//.test(page));
const examples = pagesIn("examples");
const top = readdirSync(root).filter((file) => file.endsWith(".md"));

/** Most words of a page, tables and code included, so that it reads in ten minutes. */
const WORDS = 2000;
/** Most words of all pages together. */
const ALL_WORDS = 25_000;
/** Experiments and the generated list of declarations, which nobody reads from top to bottom. */
const LONG = /^docs\/(research\/.*|api-report)\.md$/;
/** The pages that lead from a question to an answer, linked first by README, the index and the site. */
const ROUTES = ["docs/use.md", "docs/pack.md", "docs/train.md"];

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

t.test(`a page has at most ${WORDS} words, all pages ${ALL_WORDS}; experiments are in docs/research`, async (t) => {
  const counted = docs.filter((page) => !LONG.test(page)).map((page) => ({ page, words: wordsOf(read(page)) }));
  const long = counted.filter(({ words }) => words > WORDS);
  t.same(long, []);
  const all = counted.reduce((sum, { words }) => sum + words, 0);
  t.ok(all <= ALL_WORDS, `${all} words`);
});

t.test("README, the index and the site's first page lead to the three routes", async (t) => {
  for (const page of ["README.md", "docs/README.md", "docs/site/home.md"]) {
    const text = read(page);
    for (const route of ROUTES)
      t.ok(text.includes(`](${relative(dirname(page), route)})`), `${page} leads to ${route}`);
  }
});

t.test("the map of the house in CONTRIBUTING.md has every folder, and no other", async (t) => {
  const folders = readdirSync(join(root, "src"), { withFileTypes: true }).filter((entry) => entry.isDirectory());
  const mapped = [...read("CONTRIBUTING.md").matchAll(/^\| `([\w/-]+\/)` /gm)].map(([, folder]) => folder!);
  const unmapped = folders.map(({ name }) => `src/${name}/`).filter((folder) => !mapped.includes(folder));
  t.same(unmapped, [], "not in the map");
  const absent = mapped.filter((folder) => !existsSync(join(root, folder)));
  t.same(absent, [], "not there");
});

t.test("paths of documents in sources, tests and examples exist", async (t) => {
  const code = ["src", "bindings", "test", "benchmarks", "examples"].flatMap((folder) =>
    readdirSync(join(root, folder), { recursive: true, encoding: "utf8" })
      .filter((file) => /\.(ts|js|py)$/.test(file) && !/node_modules/.test(file))
      .map((file) => `${folder}/${file}`),
  );
  const wrong = code.flatMap((file) =>
    [...read(file).matchAll(/(?<![\w/.-])docs\/[\w/-]+\.md/g)]
      .filter(([path]) => !existsSync(join(root, path)) && !/ggml/.test(read(file)))
      .map(([path]) => `${file}: ${path}`),
  );
  t.same(wrong, []);
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
  const unlisted = pages.filter((page) => !index.includes(`(${page})`));
  t.same(unlisted, []);
});

if (soak)
  t.test("the API reference can be made, without a warning", async (t) => {
    const out = folderFor(t);
    const typedoc = join(root, "node_modules/typedoc/bin/typedoc");
    // Fails on warnings, by its options.
    await promisify(execFile)(process.execPath, [typedoc, "--options", "docs/typedoc.config.js", "--out", out], {
      cwd: root,
    });
    const pages = readdirSync(out, { recursive: true, encoding: "utf8" }).filter((file) => file.endsWith(".md"));
    const expected = ["README.md", ...subpaths().map(({ subpath }) => `${subpath}.md`)];
    t.same(pages.sort(), expected.sort(), "an index, and a page for each subpath");
    t.same(brokenLinks(pages, out), []);
  });
