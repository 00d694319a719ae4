/**
 * How `npm run site` makes a site of README, docs, examples and the API reference: VitePress, with search in the page and a check of links.
 * The pages stay where they are. The side bar is the index in docs/README.md.
 */
import { readdirSync, readFileSync } from "node:fs";
import { posix } from "node:path";
import { fileURLToPath } from "node:url";

const { join } = posix;
const root = fileURLToPath(new URL("../../..", import.meta.url));

/** @param {string} page path from the root */
const read = (page) => readFileSync(join(root, page), "utf8");

/** @param {string} page @returns {{ text: string, link: string }} its first heading, and its place in the site */
function itemOf(page) {
  const text = (/^# (.*)$/m.exec(read(page))?.[1] ?? page).replaceAll(/[`\\]/g, "");
  return { text, link: `/${page.replace(/README\.md$/, "").replace(/\.md$/, "")}` };
}

/** Sections of docs/README.md, each with the pages that its table begins its rows with. */
const guide = read("docs/README.md")
  .split(/^## /m)
  .slice(1)
  .map((section) => ({
    text: section.slice(0, section.indexOf("\n")),
    collapsed: false,
    items: [...section.matchAll(/^\| \[[^\]]*\]\(([^)]*\.md)\)/gm)].map(([, page]) => itemOf(join("docs", page))),
  }));
const api = readdirSync(join(root, "docs/api"), { recursive: true, encoding: "utf8" })
  .filter((page) => page.endsWith(".md") && page !== "README.md")
  .map((page) => itemOf(join("docs/api", page)));

/** Makes the anchor that GitHub makes of a heading: links in the pages go by it. @param {string} heading */
const slugify = (heading) =>
  heading
    .toLowerCase()
    .replaceAll(/[^\p{L}\p{N} _-]/gu, "")
    .replaceAll(" ", "-");

/** Leads links to the pages of the site, and makes plain text of those to other files. @param {any} md markdown-it */
function relink(md) {
  md.core.ruler.push("relink", (/** @type {any} */ { tokens }) => {
    for (const { children } of tokens) {
      let dropped = false;
      for (const token of children ?? []) {
        if (token.type === "link_open") {
          const href = token.attrGet("href");
          dropped = !/^([a-z]+:|#|[^#]*\.md(#|$))/.test(href);
          if (!/^[a-z]+:/.test(href)) token.attrSet("href", href.replace(/README\.md(?=#|$)/, "index.md"));
        }
        if (dropped && /^link_(open|close)$/.test(token.type)) Object.assign(token, { type: "text", content: "" });
      }
    }
  });
}

/** Ranks questions above guides, and these above the rest. It runs in the page. @param {string} id address of a section */
const boostDocument = (id) =>
  /^\/(docs\/(api|research)|benchmarks|[A-Z])/.test(id) ? 0.5 : /\/questions/.test(id) ? 2 : 1;

export default {
  title: "EigenLoRA Edge",
  description: "Many LoRA adapters of one model in one small file",
  head: [["link", { rel: "icon", href: "data:," }]], // none; a browser would ask for one
  srcDir: root,
  outDir: join(root, ".site"),
  srcExclude: ["{test,dist,.tap}/**", "**/node_modules/**"],
  rewrites: { "README.md": "index.md", ":folder(.*)/README.md": ":folder/index.md" },
  cleanUrls: false,
  markdown: { anchor: { slugify }, config: relink },
  themeConfig: {
    search: { provider: "local", options: { miniSearch: { searchOptions: { boostDocument } } } },
    outline: [2, 3],
    nav: [
      { text: "Guide", link: "/docs/" },
      { text: "Questions", link: "/docs/questions" },
      { text: "API", link: "/docs/api/" },
      { text: "Format", link: "/SPEC" },
      { text: "Changes", link: "/CHANGELOG" },
    ],
    sidebar: [...guide, { text: "API", collapsed: true, items: api }],
  },
};
