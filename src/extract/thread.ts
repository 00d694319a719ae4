/**
 * A thread that extracts modules (`createExtractor` of extractor.ts), started by `openThread` of threads-node.ts. Not a
 * module to import.
 */
import { parentPort } from "node:worker_threads";
import { createAnswerer } from "./extractor.ts";

const answer = await createAnswerer();
parentPort!.on("message", async (question) => parentPort!.postMessage(await answer(question)));
