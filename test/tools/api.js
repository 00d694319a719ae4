/**
 * The package's exports: the declarations of every subpath as published, in one committed Markdown file. A change of
 * the surface changes that file, so a review sees it.
 *
 *     npm run api        writes docs/api-report.md (after a build)
 *
 * `test/pages/api.test.ts` fails when the file is out of date, and when a signature names a type of the package that a
 * user cannot import.
 */
import { readFileSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import ts from "typescript";

const root = fileURLToPath(new URL("../..", import.meta.url));
export const REPORT = fileURLToPath(new URL("../../docs/api-report.md", import.meta.url));

/**
 * @typedef {{ subpath: string, name: string, text: string, documented: boolean, examples: string[], from?: string }}
 *   Export `from`: the subpath above that has the same export; its examples stand there.
 * @typedef {{ exports: Export[], hidden: string[] }} Surface `hidden`: names in signatures that no subpath exports, as
 *   "subpath: Export uses Name".
 */

/** Subpaths with types: their import names and declaration files. @returns {{ subpath: string, file: string }[]} */
export function subpaths() {
  /** @type {{ exports: Record<string, { types?: string }> }} */
  const { exports } = JSON.parse(readFileSync(`${root}package.json`, "utf8"));
  return Object.entries(exports).flatMap(([key, target]) =>
    target.types ? [{ subpath: key.replace(/^\./, "eigenlora"), file: `${root}${target.types.slice(2)}` }] : [],
  );
}

/** Reads the declarations of all subpaths. @returns {Surface} */
export function surface() {
  const entries = subpaths();
  const program = ts.createProgram(
    entries.map(({ file }) => file),
    {
      module: ts.ModuleKind.Node20,
      target: ts.ScriptTarget.ES2022,
      lib: ["lib.es2023.d.ts", "lib.dom.d.ts"],
      types: [],
    },
  );
  const checker = program.getTypeChecker();
  const resolve = (/** @type {ts.Symbol} */ symbol) =>
    symbol.flags & ts.SymbolFlags.Alias ? checker.getAliasedSymbol(symbol) : symbol;
  const modules = entries.map(({ subpath, file }) => {
    const source = program.getSourceFile(file);
    const module = source && checker.getSymbolAtLocation(source);
    if (!module) throw new Error(`${subpath}: ${file} is not there or exports nothing; run "npm run build" first`);
    const symbols = checker
      .getExportsOfModule(module)
      .map((symbol) => ({ name: symbol.name, symbol: resolve(symbol) }));
    return { subpath, symbols: symbols.sort((a, b) => (a.name < b.name ? -1 : 1)) };
  });
  const known = new Set(modules.flatMap(({ symbols }) => symbols.map(({ symbol }) => symbol)));
  const printer = ts.createPrinter({ removeComments: true });
  /** @type {Surface} */
  const found = { exports: [], hidden: [] };
  /** @type {Map<ts.Symbol, string>} */
  const first = new Map();
  for (const { subpath, symbols } of modules) {
    for (const { name, symbol } of symbols) {
      const from = first.get(symbol);
      if (from === undefined) first.set(symbol, subpath);
      const nodes = (symbol.declarations ?? []).map((node) =>
        ts.isVariableDeclaration(node) ? node.parent.parent : node,
      );
      const text = nodes.map((node) => printer.printNode(ts.EmitHint.Unspecified, node, node.getSourceFile()));
      const documented = symbol.getDocumentationComment(checker).length > 0;
      found.exports.push({
        subpath,
        name,
        text: text.join("\n").replace(/^ +/gm, (s) => s.slice(s.length / 2)),
        documented,
        examples: from === undefined ? nodes.flatMap(examplesOf) : [],
        ...(from !== undefined && { from }),
      });
      for (const hidden of hiddenNames(nodes, known, checker, resolve)) {
        found.hidden.push(`${subpath}: ${name} uses ${hidden}`);
      }
    }
  }
  return found;
}

/**
 * Names of the package's own declarations that some nodes refer to and that are not known.
 * @param {ts.Node[]} nodes
 * @param {Set<ts.Symbol>} known
 * @param {ts.TypeChecker} checker
 * @param {(symbol: ts.Symbol) => ts.Symbol} resolve
 * @returns {Set<string>}
 */
function hiddenNames(nodes, known, checker, resolve) {
  /** @type {Set<string>} */
  const names = new Set();
  const visit = (/** @type {ts.Node} */ node) => {
    if (ts.isIdentifier(node)) {
      const at = checker.getSymbolAtLocation(node);
      const symbol = at && resolve(at);
      const file = symbol?.declarations?.[0]?.getSourceFile();
      // Only what stands at the top of a file: parameters, members and type parameters need no import.
      const top = symbol?.declarations?.some(
        // A namespace is declared by a file, which has no parent.
        ({ parent }) => parent && (ts.isSourceFile(parent) || ts.isVariableDeclarationList(parent)),
      );
      if (symbol && top && file?.fileName.startsWith(`${root}dist/`) && !known.has(symbol)) names.add(node.text);
    }
    ts.forEachChild(node, visit);
  };
  nodes.forEach(visit);
  return names;
}

/** Code of the `@example`s of a declaration and of its members. @param {ts.Node} node @returns {string[]} */
function examplesOf(node) {
  const members = ts.isClassDeclaration(node) || ts.isInterfaceDeclaration(node) ? node.members : [];
  const tags = ts.getJSDocTags(node).filter(({ tagName }) => tagName.text === "example");
  return [...tags.map(({ comment }) => ts.getTextOfJSDocComment(comment) ?? ""), ...members.flatMap(examplesOf)];
}

/** The report as Markdown. */
export function report(/** @type {Surface} */ { exports }) {
  const parts = [
    "<!-- not run: declarations, compared with the sources by test/pages/api.test.ts -->\n\n# API report\n\nEvery export of every subpath, made by `npm run api` from the published declarations. Explanations are in the doc " +
      "comments, which editors show, and which `npm run docs` makes pages of.\n",
  ];
  for (const subpath of new Set(exports.map((e) => e.subpath))) {
    parts.push(`## ${subpath}\n`, "```ts");
    const own = exports.filter((e) => e.subpath === subpath);
    for (const { text, from } of own) if (from === undefined) parts.push(text);
    for (const from of new Set(own.flatMap((e) => e.from ?? []))) {
      const names = own.filter((e) => e.from === from).map((e) => e.name);
      parts.push(`export { ${names.join(", ")} } from "${from}";`);
    }
    parts.push("```\n");
  }
  return parts.join("\n");
}

if (process.argv[1] === import.meta.filename) {
  const found = surface();
  writeFileSync(REPORT, report(found));
  console.log(`${found.exports.length} exports of ${subpaths().length} subpaths: docs/api-report.md`);
  const bare = found.exports.filter((e) => !e.documented).map((e) => `${e.subpath}: ${e.name}`);
  if (bare.length > 0) console.log(`Without a doc comment:\n  ${bare.join("\n  ")}`);
  if (found.hidden.length > 0) console.log(`In signatures, but not exported:\n  ${found.hidden.join("\n  ")}`);
}
