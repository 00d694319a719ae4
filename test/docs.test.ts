/** The documents: links lead somewhere, the index lists every page, and docs/api is what the doc comments say. */
import { execFile } from "node:child_process";
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import t from "tap";
import { run } from "./command-line.ts";

const root = fileURLToPath(new URL("..", import.meta.url));
const read = (path: string): string => readFileSync(join(root, path), "utf8");

/** Markdown files of a folder, by path from the root. */
function pagesIn(folder: string): string[] {
  return readdirSync(join(root, folder))
    .filter((file) => file.endsWith(".md"))
    .map((file) => join(folder, file));
}

t.test("relative links lead to a file, and to a heading in it", async (t) => {
  const broken: string[] = [];
  for (const page of [...pagesIn("."), ...pagesIn("docs")]) {
    const text = read(page).replace(/^```[\s\S]*?^```/gm, "");
    for (const [, target] of text.matchAll(/\]\(([^)\s]+)\)/g)) {
      if (/^[a-z]+:/.test(target!)) continue;
      const [path, anchor] = target!.split("#") as [string, string?];
      const file = path === "" ? page : join(dirname(page), path);
      if (!existsSync(join(root, file))) broken.push(`${page}: ${target}`);
      else if (anchor && !anchorsOf(read(file)).has(anchor)) broken.push(`${page}: ${target}`);
    }
  }
  t.same(broken, []);
});

/** The anchors that GitHub makes of headings. */
function anchorsOf(text: string): Set<string> {
  return new Set(
    [...text.matchAll(/^#+ (.*)$/gm)].map(([, heading]) =>
      heading!
        .toLowerCase()
        .replace(/[^\p{L}\p{N} _-]/gu, "")
        .replaceAll(" ", "-"),
    ),
  );
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
  const apps = readdirSync(join(root, "examples")).map((app) => `examples/${app}/README.md`);
  const pages = ["README.md", ...pagesIn("docs"), ...apps.filter((page) => existsSync(join(root, page)))];
  for (const page of pages) {
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
  const pages = readdirSync(join(root, "docs")).filter((file) => file.endsWith(".md") && file !== "README.md");
  t.same(
    pages.filter((file) => !index.includes(`(${file})`)),
    [],
  );
});

t.test("docs/api is what the doc comments say", async (t) => {
  const out = mkdtempSync(join(tmpdir(), "eigenlora-api-"));
  t.teardown(() => rmSync(out, { recursive: true }));
  const typedoc = join(root, "node_modules/typedoc/bin/typedoc");
  await promisify(execFile)(process.execPath, [typedoc, "--options", "docs/typedoc.config.js", "--out", out], {
    cwd: root,
  });
  const files = (folder: string): string[] =>
    readdirSync(folder, { recursive: true, encoding: "utf8" })
      .filter((file) => file.endsWith(".md"))
      .sort();
  t.same(files(join(root, "docs/api")), files(out), "the same pages");
  const stale = files(out).filter((file) => readFileSync(join(out, file), "utf8") !== read(join("docs/api", file)));
  t.same(stale, [], 'after a change of doc comments, run "npm run docs"');
});
