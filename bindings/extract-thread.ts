/**
 * A thread that extracts modules (`createExtractor` of src/extract/extractor.ts), started by `openThread` of node.ts. Not a module to
 * import.
 */
import { parentPort } from "node:worker_threads";
import { createAnswerer } from "../src/extract/extractor.ts";

const answer = await createAnswerer();
parentPort!.on("message", async (question) => parentPort!.postMessage(await answer(question)));
