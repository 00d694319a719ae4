/**
 * Calls into the worker as promises. Knows nothing of what is called.
 */

/**
 * @typedef {import("./worker.js").Calls} Calls
 * @typedef {{ what: string, done?: number, total?: number }} Progress
 * @typedef {{ progress: Progress, step: import("./worker.js").Step }} Events what the worker reports by itself
 */

/** An error that the worker reports. `tag` is the kind of an EigenLoRA error, if it is one. */
export class WorkerFailure extends Error {
  /** @param {{ message: string, tag?: string }} error */
  constructor({ message, tag }) {
    super(message);
    this.tag = tag;
  }
}

/**
 * Starts the worker.
 * @param {string} url
 * @param {{ [Event in keyof Events]: (detail: Events[Event]) => void }} on
 */
export function startWorker(url, on) {
  const worker = new Worker(url, { type: "module" });
  /** @type {Map<number, { resolve(value: any): void, reject(error: Error): void }>} */
  const waiting = new Map();
  let next = 0;
  worker.onmessage = ({ data }) => {
    if (data.event) return on[/** @type {keyof Events} */ (data.event)](data.detail);
    const call = waiting.get(data.id);
    waiting.delete(data.id);
    if (data.error) call?.reject(new WorkerFailure(data.error));
    else call?.resolve(data.value);
  };
  // The script itself failed to load or to start; no call will ever be answered.
  worker.onerror = ({ message = "worker.js cannot be loaded" }) => {
    for (const { reject } of waiting.values()) reject(new WorkerFailure({ message, tag: "worker" }));
    waiting.clear();
  };
  return {
    /**
     * @template {keyof Calls} Name
     * @param {Name} call
     * @param {Parameters<Calls[Name]>} args
     * @returns {ReturnType<Calls[Name]>}
     */
    call(call, ...args) {
      const id = next++;
      const answer = new Promise((resolve, reject) => waiting.set(id, { resolve, reject }));
      worker.postMessage({ id, call, args });
      return /** @type {ReturnType<Calls[Name]>} */ (answer);
    },
  };
}
