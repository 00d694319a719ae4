/** README's first example: as printed, and as a module for a model and a task of the tests. */
import { readFileSync } from "node:fs";
import { GOLDENS } from "./sessions.ts";

const readme = readFileSync(new URL("../../README.md", import.meta.url), "utf8");
const example = /```js\n([^`]*createEigenSession[^`]*)```/.exec(readme)?.[1];
if (!example) throw new Error("README.md has no example with createEigenSession");

/** The example as printed: a page and the files that it reads. */

const lines = example.split("\n").filter((line) => !/\bTokenizer\b|"tokenizer\.json"|files\.map/.test(line));
const isImport = (line: string): boolean => line.startsWith("import ");

/**
 * Code that exports `main(model)`, which returns the answer of task "two" to the feeds of the golden answers: no
 * tokenizer has those.
 */
export const MODULE = `${lines.filter(isImport).join("\n")}
const rows = ${JSON.stringify(["input_ids", "attention_mask", "token_type_ids"].map((name) => [name, GOLDENS.feeds[name]]))};
const tokenizer = () =>
  Object.fromEntries(rows.map(([name, all]) => [name, { dims: [all.length, all[0].length], data: BigInt64Array.from(all.flat(), BigInt) }]));
export async function main(model) {
  const answers = {};
${lines
  .filter((line) => !isImport(line))
  .map((line) => `  ${line.replace('"model.onnx"', "model").replace(/console\.log\(.*/, "answers[task] = scores;")}`)
  .join("\n")}
  await session.close();
  await pack.close();
  return answers.two;
}
`;
