/**
 * Counts tokens of src and bindings without comments, in all and by folder.
 *
 *     node test/tools/tokens.js [ROOT]
 *
 * Tokens do not depend on line breaks, so a formatter changes nothing. For the same reason a comma in front of a closing bracket does
 * not count. `onnx_pb.ts` is generated and left out.
 */
import { execFileSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { dirname, join } from "node:path";
import ts from "typescript";

/** Number of tokens of a source text. */
export function countTokens(/** @type {string} */ text) {
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

/** Tokens by folder ("src/pack", "bindings") below a checkout's root, largest first. */
export function tokensByFolder(/** @type {string} */ root) {
  const files = execFileSync("git", ["ls-files", "src", "bindings"], { cwd: root, encoding: "utf8" }).split("\n");
  /** @type {Map<string, number>} */
  const folders = new Map();
  for (const file of files) {
    if (!file.endsWith(".ts") || file.endsWith("onnx_pb.ts")) continue;
    const folder = dirname(file).split("/").slice(0, 2).join("/");
    folders.set(folder, (folders.get(folder) ?? 0) + countTokens(readFileSync(join(root, file), "utf8")));
  }
  return new Map([...folders].sort((a, b) => b[1] - a[1]));
}

if (process.argv[1] === import.meta.filename) {
  const folders = tokensByFolder(process.argv[2] ?? ".");
  console.log(`${[...folders.values()].reduce((sum, n) => sum + n, 0)} tokens`);
  for (const [folder, tokens] of folders) console.log(`${String(tokens).padStart(7)} ${folder}`);
}
