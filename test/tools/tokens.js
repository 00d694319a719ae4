/**
 * Counts tokens without comments, of the product (src and bindings) by folder, and of the tests. Fails above the
 * numbers that package.json allows: a change that adds code raises them, or removes as much.
 *
 *     node test/tools/tokens.js
 *
 * Tokens do not depend on line breaks, so a formatter changes nothing. For the same reason a comma in front of a
 * closing bracket does not count. `onnx_pb.ts` is generated and left out.
 */
import { execFileSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { dirname } from "node:path";
import ts from "typescript";

/** Number of tokens of a source text. */
function countTokens(/** @type {string} */ text) {
  const source = ts.createSourceFile("file.ts", text, ts.ScriptTarget.Latest, true);
  /** @type {string[]} */
  const tokens = [];
  const visit = (/** @type {ts.Node} */ node) => {
    // Doc comments are nodes of the tree too.
    if (node.kind >= ts.SyntaxKind.FirstJSDocNode && node.kind <= ts.SyntaxKind.LastJSDocNode) return;
    const children = node.getChildren(source);
    if (children.length > 0) children.forEach(visit);
    else if (node.getText(source) !== "") tokens.push(node.getText(source));
  };
  visit(source);
  return tokens.filter((token, i) => !(token === "," && /^[)\]}]$/.test(tokens[i + 1] ?? ""))).length;
}

/** Tokens by folder ("src/pack", "bindings") below some folders, largest first. @param {string[]} places */
function tokensByFolder(...places) {
  const files = execFileSync("git", ["ls-files", ...places], { encoding: "utf8" }).split("\n");
  /** @type {Map<string, number>} */
  const folders = new Map();
  for (const file of files) {
    if (!/\.[jt]s$/.test(file) || file.endsWith("onnx_pb.ts")) continue;
    const folder = dirname(file).split("/").slice(0, 2).join("/");
    folders.set(folder, (folders.get(folder) ?? 0) + countTokens(readFileSync(file, "utf8")));
  }
  return new Map([...folders].sort((a, b) => b[1] - a[1]));
}

const { tokens: most } = JSON.parse(readFileSync("package.json", "utf8"));
for (const [name, places] of Object.entries({ product: ["src", "bindings"], tests: ["test"] })) {
  const folders = tokensByFolder(...places);
  const total = [...folders.values()].reduce((sum, tokens) => sum + tokens, 0);
  console.log(`${name}: ${total} tokens of at most ${most[name]}`);
  for (const [folder, tokens] of folders) console.log(`${String(tokens).padStart(7)} ${folder}`);
  if (total > most[name]) process.exitCode = 1;
}
