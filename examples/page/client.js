/**
 * Calls into the worker as promises. Knows nothing of what is called.
 */

/**
 * @typedef {{ what: string, done?: number, total?: number }} Progress
 */

/**
 * @template Calls functions of a worker, by name
 * @typedef {{ call<Name extends keyof Calls>(call: Name, ...args: Calls[Name] extends (...args: infer Args) => any ?
 *   Args : never): Calls[Name] extends (...args: never[]) => infer Answer ? Answer : never }} Caller
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
 * @template [Calls=import("./worker.js").Calls]
 * @param {string} url
 * @param {Record<string, (detail: any) => void>} on what the worker reports by itself
 * @returns {Caller<Calls>}
 */
export function startWorker(url, on) {
  const worker = new Worker(url, { type: "module" });
  /** @type {Map<number, { resolve(value: any): void, reject(error: Error): void }>} */
  const waiting = new Map();
  let next = 0;
  let heard = false;
  /** Why no call will ever be answered. @type {WorkerFailure | undefined} */
  let dead;
  worker.onmessage = ({ data }) => {
    heard = true;
    if (data.event) return on[data.event](data.detail);
    const call = waiting.get(data.id);
    waiting.delete(data.id);
    if (data.error) call?.reject(new WorkerFailure(data.error));
    else call?.resolve(data.value);
  };
  // The script itself failed to load or to start; no call will ever be answered.
  worker.onerror = ({ message = "worker.js cannot be loaded" }) => {
    const failure = new WorkerFailure({ message, tag: "worker" });
    if (!heard) dead = failure;
    for (const { reject } of waiting.values()) reject(failure);
    waiting.clear();
  };
  return {
    call(call, ...args) {
      const id = next++;
      const answer = new Promise((resolve, reject) => (dead ? reject(dead) : waiting.set(id, { resolve, reject })));
      worker.postMessage({ id, call, args });
      return /** @type {any} */ (answer);
    },
  };
}
