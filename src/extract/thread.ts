/**
 * A thread that extracts modules (`createExtractor` of extractor.ts), started by `openThread` of threads-node.ts. Not a module to import.
 */
import { parentPort } from "node:worker_threads";
import { bytesOf, createAnswerer } from "./extractor.ts";
import { freeWith, letGo } from "./garbage.ts";
import { collectGarbage } from "./threads-node.ts";

/** How often the numbers of a question are written to arrays that are left of it. */
const COPIES = 4;

freeWith(collectGarbage);
const answer = await createAnswerer();
parentPort!.on("message", async (question) => {
  const bytes = bytesOf(question);
  parentPort!.postMessage(await answer(question));
  // Later, when the question is not held here any more.
  setImmediate(letGo, COPIES * bytes);
});
