/**
 * The order of calls and changes where a call is more than one run of a model: a pipeline that reads label names after
 * its run, a generation of many tokens. A change waits for the calls asked for before it, and calls asked for after it
 * wait for the change. Runs of a session have an order of their own: `timeline.ts`.
 */
export class Turns {
  #changed: Promise<unknown> = Promise.resolve();
  readonly #calls = new Set<Promise<unknown>>();

  /** Does `work` after the changes asked for before, whether or not they succeed. Calls overlap. */
  call<Result>(work: () => Promise<Result>): Promise<Result> {
    const call = this.#changed.then(work);
    const settled: Promise<unknown> = call.catch(() => undefined).then(() => this.#calls.delete(settled));
    this.#calls.add(settled);
    return call;
  }

  /** Does `work` after the calls and changes asked for before, and before those asked for later. */
  change<Result>(work: () => Promise<Result>): Promise<Result> {
    const calls = [...this.#calls];
    const change = this.#changed.then(async () => {
      await Promise.all(calls);
      // Whoever awaited one of the calls goes on before anything changes, however many microtasks that takes.
      await new Promise((resolve) => setTimeout(resolve));
      return work();
    });
    this.#changed = change.catch(() => undefined);
    return change;
  }
}
