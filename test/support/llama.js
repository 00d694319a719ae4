/**
 * Answers of llama.cpp, by node-llama-cpp: probabilities of the token that follows four others. Started by
 * test/unit/export.test.ts with the library's folder, and pairs of a model and an adapter ("" for none); prints a list
 * of numbers for each pair as JSON.
 */
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [library = "", ...files] = process.argv.slice(2);
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(join(library, "dist/index.js")).href);
const llama = await getLlama({ gpu: false, build: "never", skipDownload: true, logLevel: LlamaLogLevel.error });

/** @type {number[][]} */
const answers = [];
for (let i = 0; i < files.length; i += 2) {
  const [modelPath, filePath] = files.slice(i, i + 2);
  const model = await llama.loadModel({ modelPath });
  const lora = filePath && { lora: { adapters: [{ filePath, scale: 1 }] } };
  const context = await model.createContext({ contextSize: 64, threads: 1, flashAttention: false, ...lora });
  const sequence = context.getSequence();
  const tokens = [10, 60, 100, [200, { generateNext: { probabilities: true } }]];
  /** @type {{ next: { probabilities: Map<number, number> } } | undefined} */
  const last = (await sequence.controlledEvaluate(tokens)).at(-1);
  answers.push(Array.from({ length: 256 }, (_, token) => last?.next.probabilities.get(token) ?? 0));
  await context.dispose();
  await model.dispose();
}
process.stdout.write(JSON.stringify(answers), () => process.exit());
