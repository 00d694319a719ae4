/** README's lines that put a pack on a model, as a module for a task and files of the tests. */
import { readFileSync } from "node:fs";
import { GOLDENS } from "./sessions.ts";

const readme = readFileSync(new URL("../README.md", import.meta.url), "utf8");
const example = /```js\n(import \* as ort from "onnxruntime-web";[^`]*createEigenSession[^`]*)```/.exec(readme)?.[1];
if (!example) throw new Error("README.md has no example with createEigenSession");
const lines = example.replace("debtags-role", "two").split("\n");
const isImport = (line: string): boolean => line.startsWith("import ");

/** Code that exports `main(model)`, which returns the answer to the feeds of the golden answers. */
export const MODULE = `${lines.filter(isImport).join("\n")}
function makeFeeds() {
  const make = ([name, rows]) => [name, new ort.Tensor("int64", BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0].length])];
  return Object.fromEntries(${JSON.stringify(["input_ids", "attention_mask", "token_type_ids"].map((name) => [name, GOLDENS.feeds[name]]))}.map(make));
}
export async function main(model) {
  const feeds = makeFeeds();
${lines
  .filter((line) => !isImport(line))
  .map((line) => `  ${line}`)
  .join("\n")}
  return [...logits.data];
}
`;
