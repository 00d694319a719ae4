/**
 * Words and English of the source: one declaration for each exported type, and comments that begin with a noun or a
 * verb.
 */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import t from "tap";
import ts from "typescript";
import { PAGES } from "../support/blocks.ts";
import { fromRoot } from "../support/folder.ts";

const root = fromRoot("");

/** Names that still have several declarations, with the reason. */
const SEVERAL: Readonly<Record<string, string>> = {
  Slice: "core and sessions: a range of a block, a part of a packed layer",
  Target: "packing and CLI",
  Components: "packing and ONNX: `inject` takes it by that name",
  Side: "packing and format",
  Plan: "format and sessions",
  SessionOptions: "bindings and sessions",
};

/** Folders whose comments are checked. */
const FOLDERS = ["src", "bindings", "assembly", "kernels", "examples", "test", "benchmarks"];

const PREPOSITION = /^(as|at|beside|by|for|from|in|of|on|to|with|without)\b/i;
const RIDDLE = /\b(whoever|of which|of so many)\b/i;

/**
 * Words of an earlier house for which the field has others (the list in CONTRIBUTING.md). Words that are ordinary
 * English too (way, kind, found, apart) cannot be told from these by a pattern and are left to the reader.
 */
const PRIVATE =
  /\b(gauges?|brings|brought|own rows|rows of (its|their) own|private (terms?|rows)|carriers?|grafts?|grafted|workbench|lent|shelf|letGo|judges?|made-up|given frequencies|homeless|twins?|settles?|settled|tells|told|heard|somebody|nobody|(this|that|one|a|each|either|other|both) sides?)\b/i;

function filesIn(folder: string, ending: RegExp): string[] {
  return readdirSync(join(root, folder), { recursive: true, encoding: "utf8" })
    .map((file) => `${folder}/${file.replaceAll("\\", "/")}`)
    .filter((file) => ending.test(file) && !/node_modules|\/data\//.test(file));
}

function parse(file: string): ts.SourceFile {
  return ts.createSourceFile(file, readFileSync(join(root, file), "utf8"), ts.ScriptTarget.Latest, true);
}

const sources = ["src", "bindings"].flatMap((folder) => filesIn(folder, /\.ts$/)).map(parse);

/** Types, classes, interfaces and enums that a file exports. */
function exportedTypes(source: ts.SourceFile): string[] {
  return source.statements.flatMap((statement) => {
    if (
      !ts.isTypeAliasDeclaration(statement) &&
      !ts.isInterfaceDeclaration(statement) &&
      !ts.isClassDeclaration(statement) &&
      !ts.isEnumDeclaration(statement)
    )
      return [];
    const exported = statement.modifiers?.some(({ kind }) => kind === ts.SyntaxKind.ExportKeyword);
    return exported && statement.name ? [statement.name.text] : [];
  });
}

t.test("an exported type has a name of its own", async (t) => {
  const files = new Map<string, Set<string>>();
  for (const source of sources)
    for (const name of exportedTypes(source)) files.set(name, (files.get(name) ?? new Set()).add(source.fileName));
  const several = new Map([...files].filter(([, all]) => all.size > 1));
  const wrong = [...several].filter(([name]) => !(name in SEVERAL));
  t.same(
    wrong.map(([name, all]) => `${name}: ${[...all].join(", ")}`),
    [],
  );
  const left = Object.keys(SEVERAL).filter((name) => !several.has(name));
  t.same(left, [], "no exception is left over");
});

/** Comments of a file: blocks, and lines that follow each other as one. */
function commentsOf(file: string): { line: number; text: string }[] {
  const source = parse(file);
  const { text } = source;
  const ranges = new Map<number, ts.CommentRange>();
  const visit = (node: ts.Node): void => {
    const around = [
      ...(ts.getLeadingCommentRanges(text, node.pos) ?? []),
      ...(ts.getTrailingCommentRanges(text, node.end) ?? []),
    ];
    for (const range of around) ranges.set(range.pos, range);
    node.getChildren(source).forEach(visit);
  };
  visit(source);
  const found: { line: number; last: number; text: string }[] = [];
  for (const { pos, end, kind } of [...ranges.values()].sort((a, b) => a.pos - b.pos)) {
    const [line, last] = [pos, end].map((at) => source.getLineAndCharacterOfPosition(at).line + 1) as [number, number];
    const raw = text.slice(pos, end);
    const before = found.at(-1);
    if (kind === ts.SyntaxKind.SingleLineCommentTrivia) {
      const own = text.slice(text.lastIndexOf("\n", pos) + 1, pos).trim() === "";
      if (own && before?.last === line - 1)
        Object.assign(before, { last, text: `${before.text} ${raw.slice(2).trim()}` });
      else found.push({ line, last: own ? last : 0, text: raw.slice(2).trim() });
    } else {
      const lines = raw.replace(/^\/\*+|\*\/$/g, "").replace(/^[ \t]*\*/gm, "");
      found.push({ line, last: 0, text: lines.replace(/\s+/g, " ").trim() });
    }
  }
  return found;
}

/** Comments of a shader or a Python script: lines that follow each other as one. */
function lineCommentsOf(file: string): { line: number; text: string }[] {
  const lines = readFileSync(join(root, file), "utf8").split("\n");
  const own = lines.map((line) => /^\s*(?:\/\/|#) ?(.*)/.exec(line)?.[1]);
  return own.flatMap((text, i) => (text && !own[i - 1] ? [{ line: i + 1, text }] : []));
}

const files = FOLDERS.flatMap((folder) => filesIn(folder, /\.(ts|js|mjs|wgsl|py)$/));
const comments = files.flatMap((file) =>
  (/\.(wgsl|py)$/.test(file) ? lineCommentsOf : commentsOf)(file).map((comment) => ({ file, ...comment })),
);

t.test("comments begin with a noun or a verb, and state facts", async (t) => {
  const wrong = comments.flatMap(({ file, line, text }) =>
    PREPOSITION.test(text) || RIDDLE.test(text) ? [`${file}:${line}: ${text.slice(0, 80)}`] : [],
  );
  t.same(wrong, []);
});

/** Sentences of error messages, reports and helps: texts of at least three words in the product's sources. */
function messagesOf(source: ts.SourceFile): { file: string; line: number; text: string }[] {
  const messages: { file: string; line: number; text: string }[] = [];
  const visit = (node: ts.Node): void => {
    if (ts.isStringLiteralLike(node) || ts.isTemplateExpression(node)) {
      const text = ts.isTemplateExpression(node)
        ? [node.head, ...node.templateSpans.map(({ literal }) => literal)].map((part) => part.text).join("…")
        : node.text;
      const line = source.getLineAndCharacterOfPosition(node.getStart(source)).line + 1;
      if (/\S+\s+\S+\s+\S/.test(text)) messages.push({ file: source.fileName, line, text });
    }
    ts.forEachChild(node, visit);
  };
  visit(source);
  return messages;
}
const messages = sources.flatMap(messagesOf);

/** Pronouns and participles that say nothing as names. */
const PRONOUNS = new Set(["one", "own", "some", "all", "those", "made", "found", "how", "kept", "before"]);

/** Names of variables and parameters, and pairs that are declared by a list of values: `const [a, b] = [x, y]`. */
const declarations = sources.flatMap((source) => {
  const places: { file: string; line: number; text: string; isPair: boolean }[] = [];
  const visit = (node: ts.Node): void => {
    if (ts.isVariableDeclaration(node) || ts.isParameter(node) || ts.isBindingElement(node)) {
      const isPair =
        ts.isVariableDeclaration(node) &&
        ts.isArrayBindingPattern(node.name) &&
        !!node.initializer &&
        ts.isArrayLiteralExpression(node.initializer);
      const line = source.getLineAndCharacterOfPosition(node.getStart(source)).line + 1;
      if (isPair || ts.isIdentifier(node.name))
        places.push({ file: source.fileName, line, text: node.name.getText(source), isPair });
    }
    ts.forEachChild(node, visit);
  };
  visit(source);
  return places;
});

/** A text without code: names of options, fields and files are what they are. */
const prose = (text: string): string =>
  text.replace(/```[\s\S]*?```|`[^`]*`|\]\([^)]*\)|--[\w-]+|@\w+ (\{[^}]*\} )?\w+/g, " ");

/** Places of a kind, by folder, for a comment: who mends a folder sees what is left. */
function byFolder(places: readonly { file: string }[]): string {
  const counts = new Map<string, number>();
  for (const { file } of places) {
    const folder = file.split("/").slice(0, 2).join("/");
    counts.set(folder, (counts.get(folder) ?? 0) + 1);
  }
  return [...counts].map(([folder, count]) => `${folder} ${count}`).join(", ");
}

/**
 * A rule of CONTRIBUTING.md, "English", with the number of places that still break it. The number only falls: lower it
 * when you mend some.
 */
interface Rule {
  readonly title: string;
  readonly ceiling: number;
  readonly places: readonly { file: string; line: number; text: string }[];
}
const RULES: readonly Rule[] = [
  {
    title: "comments wrap at 120 columns",
    ceiling: 0,
    places: files
      .filter((file) => !/^(examples|benchmarks)/.test(file))
      .flatMap((file) =>
        readFileSync(join(root, file), "utf8")
          .split("\n")
          .flatMap((text, i) =>
            text.length > 120 && /^ *(\/\/|\/?\*+ |#)/.test(text) ? [{ file, line: i + 1, text }] : [],
          ),
      ),
  },
  {
    title: 'comments do not begin with "What", "Whether" or "How"',
    ceiling: 19,
    places: comments.filter(({ text }) => /^(What|Whether|How)\b/.test(text)),
  },
  {
    title: 'nothing is "beside" in comments',
    ceiling: 20,
    places: comments.filter(({ text }) => /\bbesides?\b/i.test(prose(text))),
  },
  {
    title: "comments use the field's words",
    ceiling: 330,
    places: comments.filter(({ text }) => PRIVATE.test(prose(text))),
  },
  {
    title: "messages use the field's words",
    ceiling: 51,
    places: messages.filter(({ text }) => PRIVATE.test(prose(text)) || /\bbeside\b/i.test(prose(text))),
  },
  {
    title: "names are nouns and verbs, never pronouns",
    ceiling: 712,
    places: declarations.filter(({ text }) => PRONOUNS.has(text)),
  },
  {
    title: "values are declared one by one, not as a list",
    ceiling: 105,
    places: declarations.filter(({ isPair }) => isPair),
  },
];
for (const { title, ceiling, places } of RULES) {
  t.test(title, async (t) => {
    t.comment(`${places.length} places: ${byFolder(places)}`);
    const shown = places.map(({ file, line, text }) => `${file}:${line}: ${text.trim().slice(0, 80)}`);
    t.ok(places.length <= ceiling, `${places.length} places, ${ceiling} at most`, { places: shown.slice(0, 20) });
  });
}

t.test("documents use the field's words", async (t) => {
  const pages = ["README.md", "SECURITY.md", "SPEC.md", ...PAGES.filter((page) => page !== "README.md")];
  const wrong = pages.flatMap((page) => {
    if (/^docs\/(research\/|api-report|glossary)/.test(page)) return [];
    const text = prose(readFileSync(join(root, page), "utf8"));
    return text
      .split("\n")
      .flatMap((line) => (PRIVATE.test(line) || /\bbesides?\b/i.test(line) ? [`${page}: ${line}`] : []));
  });
  t.same(wrong, []);
});
