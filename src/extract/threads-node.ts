/** Threads of Node, Deno and Bun: what `#threads` of package.json is where the condition `node` is set. */
import type { Thread } from "./threads-web.ts";

/**
 * Starts a thread for extraction.
 * @throws Error when it cannot be started; from `ask` when it ends before it has answered
 */
export async function openThread(): Promise<Thread> {
  const { Worker } = await import("node:worker_threads");
  // Flags of this process stay with it: some, as --eval, would stop a thread. A small heap will do, since arrays lie
  // outside it.
  const options = { execArgv: [], resourceLimits: { maxYoungGenerationSizeMb: 4 } };
  const worker = new Worker(new URL("./thread.js", import.meta.url), options);
  let answered: (answer: unknown) => void = () => {};
  let failed: (cause: unknown) => void = () => {};
  let ended: Error | undefined;
  const end = (cause: unknown): void => {
    ended ??= new Error("a thread that extracts modules has ended; try again with fewer workers", { cause });
    failed(ended);
  };
  worker
    .on("message", (answer) => answered(answer))
    .on("error", end)
    .on("exit", end);
  return {
    ask: (question, owned) =>
      new Promise((resolve, reject) => {
        if (ended) throw ended;
        answered = resolve;
        failed = reject;
        worker.postMessage(question, owned);
      }),
    close: async () => void (await worker.terminate()),
  };
}
