/**
 * Checks the map of the house against the imports of src and bindings: an import points down, there are no circles, and
 * tests reach inside by one list.
 */
import { readdirSync, readFileSync } from "node:fs";
import { dirname, join, normalize } from "node:path";
import t from "tap";
import ts from "typescript";
import { fromRoot } from "../support/folder.ts";

const root = fromRoot("");

/** Lowest first. A file belongs to the first entry that it is or lies in. */
const LAYERS: readonly (readonly string[])[] = [
  ["src/errors.ts", "src/events.ts", "src/globals.ts", "src/text.ts", "src/pace.ts", "src/work.ts"],
  ["src/source.ts", "src/progress.ts", "src/http/", "src/open-source.ts", "src/files-node.ts", "src/files-web.ts"],
  ["src/tensor/"],
  ["src/format/"],
  ["src/cache/"],
  ["src/backends/", "src/webgpu.ts"],
  ["src/core/"],
  ["src/extract/"],
  ["src/adapters/"],
  ["src/pack/shard/", "src/pack/"],
  ["src/onnx/"],
  ["src/autodiff/"],
  ["src/session/"],
  ["src/train/"],
  ["bindings/"],
  // Exports of subpaths that are not one file of a layer.
  ["src/index.ts", "src/browser.ts", "src/build.ts", "src/node.ts"],
  ["src/cli/"],
];

const files = ["src", "bindings"].flatMap((folder) =>
  readdirSync(join(root, folder), { recursive: true, encoding: "utf8" })
    .filter((file) => file.endsWith(".ts"))
    .map((file) => `${folder}/${file.replaceAll("\\", "/")}`),
);
const sources = new Map(
  files.map((file) => [
    file,
    ts.createSourceFile(file, readFileSync(join(root, file), "utf8"), ts.ScriptTarget.Latest, true),
  ]),
);

/** Files that a file imports by a relative path: statements, types and `import()`. */
function importsOf(source: ts.SourceFile): string[] {
  const found = new Set<string>();
  const visit = (node: ts.Node): void => {
    const specifier =
      ts.isImportDeclaration(node) || ts.isExportDeclaration(node)
        ? node.moduleSpecifier
        : ts.isCallExpression(node) && node.expression.kind === ts.SyntaxKind.ImportKeyword
          ? node.arguments[0]
          : ts.isImportTypeNode(node) && ts.isLiteralTypeNode(node.argument)
            ? node.argument.literal
            : undefined;
    if (specifier && ts.isStringLiteral(specifier) && specifier.text.startsWith(".")) {
      found.add(normalize(join(dirname(source.fileName), specifier.text)).replaceAll("\\", "/"));
    }
    ts.forEachChild(node, visit);
  };
  visit(source);
  return [...found].filter((file) => sources.has(file));
}
const imports = new Map([...sources].map(([file, source]) => [file, importsOf(source)]));

function layerOf(file: string): number {
  return LAYERS.findIndex((places) =>
    places.some((place) => file === place || (place.endsWith("/") && file.startsWith(place))),
  );
}

/** Circles of a graph, each once, as the names along it. */
function circles(graph: ReadonlyMap<string, readonly string[]>): string[] {
  const state = new Map<string, "open" | "done">();
  const found: string[] = [];
  const walk = (name: string, path: readonly string[]): void => {
    if (state.get(name) === "done") return;
    if (state.get(name) === "open") {
      found.push([...path.slice(path.indexOf(name)), name].join(" → "));
      return;
    }
    state.set(name, "open");
    for (const next of graph.get(name) ?? []) walk(next, [...path, name]);
    state.set(name, "done");
  };
  for (const name of graph.keys()) walk(name, []);
  return found;
}

t.test("every file has a place on the map", async (t) => {
  t.same(
    files.filter((file) => layerOf(file) < 0),
    [],
  );
});

t.test("an import points down", async (t) => {
  const climbs = [...imports].flatMap(([file, targets]) =>
    targets.filter((target) => layerOf(target) > layerOf(file)).map((target) => `${file} → ${target}`),
  );
  t.same(climbs, []);
});

t.test("no circle of files", async (t) => {
  t.same(circles(imports), []);
});

t.test("no circle of folders", async (t) => {
  // A folder inside a layer's folder belongs to that layer.
  const folderOf = (file: string): string =>
    file
      .split("/")
      .slice(0, file.startsWith("src/") ? 2 : 1)
      .join("/");
  const folders = new Map<string, string[]>();
  for (const [file, targets] of imports) {
    const folder = folderOf(file);
    const others = targets.map(folderOf).filter((other) => other !== folder);
    folders.set(folder, [...new Set([...(folders.get(folder) ?? []), ...others])]);
  }
  t.same(circles(folders), []);
});

t.test("tests name what is built in support/internals alone", async (t) => {
  const folder = join(root, "test");
  const named = readdirSync(folder, { recursive: true, encoding: "utf8" })
    .filter((file) => /\.[jt]s$/.test(file) && !/node_modules|internals\//.test(file))
    // The command and the entries, which package.json names, are allowed.
    .filter((file) =>
      /["'`/]dist\/(src|bindings)\/(?!cli\/main\.js|index\.js)/.test(readFileSync(join(folder, file), "utf8")),
    );
  t.same(named, []);
});

t.test("a page names benchmarks that exist", async (t) => {
  const scripts = ["benchmarks", "benchmarks/research"].flatMap((folder) => readdirSync(join(root, folder)));
  const pages = readdirSync(join(root, "docs"), { recursive: true, encoding: "utf8" }).map((name) => `docs/${name}`);
  for (const page of ["README.md", "SECURITY.md", "CONTRIBUTING.md", ...pages].filter((name) => name.endsWith(".md")))
    for (const [, name] of readFileSync(join(root, page), "utf8").matchAll(/npm run bench (?:-- )?([a-z][\w-]*)/g))
      t.ok(scripts.includes(`${name}.js`), `${page}: ${name}`);
});
