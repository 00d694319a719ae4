/**
 * How `npm run docs` makes docs/api from the doc comments: one page of Markdown for each subpath of package.json. The
 * pages are not committed, since they say nothing that the sources do not; the gate checks that they can be made
 * without a warning.
 */
import { readFileSync } from "node:fs";
import { Comment, Converter } from "typedoc";

/** @type {{ exports: Record<string, { types?: string }> }} */
const { exports } = JSON.parse(readFileSync(new URL("../package.json", import.meta.url), "utf8"));

/** Source file, as "src/build.ts", to subpath. */
const entries = new Map(
  Object.entries(exports).flatMap(([key, { types }]) =>
    types ? [[types.replace(/^\.\/dist\/(.*)\.d\.ts$/, "$1.ts"), key.replace(/^\./, "eigenlora")]] : [],
  ),
);

/**
 * Calls a module what it is imported as, and says what the head of its file says.
 * @param {import("typedoc").Reflection} module
 */
function introduce(module) {
  const file = [`${module.name}.ts`, `${module.name}/index.ts`].find((path) => entries.has(path));
  if (!file) throw new Error(`${module.name} is no subpath of package.json`);
  module.name = /** @type {string} */ (entries.get(file));
  const head = /^\/\*\*([\s\S]*?)\*\//.exec(readFileSync(new URL(`../${file}`, import.meta.url), "utf8"))?.[1];
  const text = head
    ?.replace(/^ *\* ?/gm, "")
    .trim()
    .replace(/\s+/g, " ");
  if (text) module.comment = new Comment([{ kind: "text", text }]);
}

export default {
  name: "EigenLoRA Edge: API reference",
  tsconfig: "../tsconfig.json",
  entryPoints: [...entries.keys()].map((file) => `../${file}`),
  plugin: [
    "typedoc-plugin-markdown",
    /** @param {import("typedoc").Application} app */
    (app) => app.converter.on(Converter.EVENT_RESOLVE_BEGIN, ({ project }) => project.children?.forEach(introduce)),
  ],
  out: "api",
  readme: "none",
  router: "module",
  disableSources: true,
  excludeInternal: true,
  excludeExternals: true,
  excludePrivate: true,
  hideBreadcrumbs: true,
  hidePageHeader: true,
  hideGroupHeadings: false,
  useCodeBlocks: true,
  expandParameters: true,
  indexFormat: "table",
  parametersFormat: "table",
  interfacePropertiesFormat: "table",
  classPropertiesFormat: "table",
  typeDeclarationFormat: "table",
  propertyMembersFormat: "table",
  validation: { notExported: false, invalidLink: true, notDocumented: false },
  treatWarningsAsErrors: true,
};
