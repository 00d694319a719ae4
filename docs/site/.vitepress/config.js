/**
 * Configures `npm run site`, which makes a site of README, docs, examples and the API reference: VitePress, with search
 * in the page and a check of links. The pages stay where they are. The first page is docs/site/home.md, the side bar
 * the index in docs/README.md.
 */
import { copyFileSync, readdirSync, readFileSync } from "node:fs";
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

/** The page that the site opens on. Links in it are relative to its own folder. */
const HOME = "docs/site/home.md";

/** Sections of docs/README.md, each with the pages that it lists. */
const guide = read("docs/README.md")
  .split(/^## /m)
  .slice(1)
  .map((section) => ({
    text: section.slice(0, section.indexOf("\n")),
    items: [...section.matchAll(/\]\(([^)]*\.md)\)/g)].map(([, page]) => itemOf(join("docs", page))),
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

/**
 * Leads links to the pages of the site, and makes plain text of those to other files; gives pictures their size, and
 * empty cells no head.
 * @param {any} md markdown-it
 */
function adjust(md) {
  md.core.ruler.push("adjust", (/** @type {any} */ { tokens, env }) => {
    const home = env.relativePath === "index.md";
    const folder = home ? posix.dirname(HOME) : posix.dirname(env.relativePath);
    for (const [i, { children, type }] of tokens.entries()) {
      if (type === "th_open" && !tokens[i + 1].content) tokens[i].tag = tokens[i + 2].tag = "td";
      let dropped = false;
      for (const token of children ?? []) {
        if (token.type === "link_open") {
          const href = token.attrGet("href");
          dropped = !/^([a-z]+:|#|[^#]*\.md(#|$))/.test(href);
          if (!/^([a-z]+:|#)/.test(href)) {
            const target = join(folder, href);
            const mapped = /^README\.md/.test(target) ? target : target.replace(/README\.md(?=#|$)/, "index.md");
            token.attrSet("href", home ? mapped : posix.relative(folder, mapped));
          }
        }
        if (token.type === "image" && token.attrGet("src").endsWith(".png")) {
          const png = readFileSync(join(root, folder, token.attrGet("src")));
          token.attrSet("width", png.readUInt32BE(16));
          token.attrSet("height", png.readUInt32BE(20));
        }
        if (dropped && /^link_(open|close)$/.test(token.type)) Object.assign(token, { type: "text", content: "" });
      }
    }
  });
}

/**
 * Ranks the three routes above reference pages, and these above the rest. It runs in the page.
 * @param {string} id address of a section
 */
const boostDocument = (id) =>
  /^\/(docs\/(api|research)|benchmarks|[A-Z])/.test(id) ? 0.5 : /\/docs\/(use|pack|train)/.test(id) ? 2 : 1;

/**
 * @param {string} page path from the root
 * @returns {string} its first sentences as plain text, up to what search engines show
 */
function descriptionOf(page) {
  const paragraph =
    read(page)
      .split(/\n\n+/)
      .find((text) => /^(?!```)[\p{L}*`].*[.?]\s*$/su.test(text)) ?? "";
  const text = paragraph.replaceAll(/\[([^\]]*)\]\([^)]*\)|[*`]/g, "$1").replaceAll("\n", " ");
  return text.slice(0, 200).replace(/(?<=[.?]) [^.?]*$/, "");
}

/**
 * Changes to files of VitePress 1.6.4. No fonts to load. In the search, for those who hear it: space between two words,
 * a dialog that is no button, options that are links and hold none.
 * @type {Record<string, [RegExp, string][]>}
 */
const MENDS = {
  "fonts.css": [[/.+/s, ""]],
  "VPNavBarSearchButton.vue": [[/(?=<span class="DocSearch-Button-Keys">)/, "{{ ' ' }}"]],
  "VPLocalSearchBox.vue": [
    [/role="button"\s+:aria-owns=[^>]*aria-haspopup="listbox"/, 'role="dialog"'],
    [
      /(:id="'localsearch-item-' \+ index"\s+:aria-selected="[^"]*")\s+role="option"(.*?):aria-label="[^"]*"/s,
      'role="none"$2$1 role="option"',
    ],
    [/<kbd(?= :aria-label)/g, '<kbd role="img"'],
  ],
};
const mend = {
  name: "mend",
  enforce: "pre",
  /** @param {string} code @param {string} id */
  transform(code, id) {
    return MENDS[posix.basename(id)]?.reduce((text, [wrong, right]) => {
      if (text.search(wrong) < 0) throw new Error(`${id} has nothing like ${wrong}`);
      return text.replace(wrong, right);
    }, code);
  },
};

export default {
  title: "EigenLoRA Edge",
  description: "Many LoRA adapters of one model in one small file",
  head: [
    ["link", { rel: "icon", href: "data:," }], // none; a browser would ask for one
    ["style", {}, ":root { --vp-code-lang-color: var(--vp-c-text-2) }"], // dark enough to read
  ],
  appearance: { disableTransition: false }, // switching it off lays out the page three times more as it opens
  srcDir: root,
  outDir: join(root, ".site"),
  srcExclude: ["{test,dist,.tap}/**", "**/node_modules/**"],
  rewrites: { [HOME]: "index.md", ":folder(.*)/README.md": ":folder/index.md" },
  cleanUrls: false,
  transformPageData: (/** @type {{ filePath: string }} */ { filePath }) => ({ description: descriptionOf(filePath) }),
  buildEnd: (/** @type {{ outDir: string }} */ { outDir }) => {
    copyFileSync(join(root, "dist/viewer.html"), join(outDir, "viewer.html"));
    copyFileSync(join(root, "examples/tasks.eigen"), join(outDir, "tasks.eigen"));
  },
  markdown: {
    anchor: { slugify },
    config: adjust,
    theme: { light: "github-light-high-contrast", dark: "github-dark-default" },
  },
  vite: { plugins: [mend] },
  themeConfig: {
    search: {
      provider: "local",
      options: {
        miniSearch: { searchOptions: { boostDocument } },
        translations: { button: { buttonAriaLabel: "Search K" } }, // as it is to be seen, with the key
      },
    },
    outline: [2, 3],
    nav: [
      { text: "Use", link: "/docs/use" },
      { text: "Pack", link: "/docs/pack" },
      { text: "Train", link: "/docs/train" },
      { text: "All pages", link: "/docs/" },
      { text: "API", link: "/docs/api/" },
      { text: "Format", link: "/SPEC" },
      { text: "Changes", link: "/CHANGELOG" },
    ],
    sidebar: { "/docs/api/": api, "/": guide },
  },
};
