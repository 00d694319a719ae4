/**
 * The order of runs and changes: a run works on the state that the changes asked for before it have made, whatever is
 * asked for while it waits or runs; a state that has been replaced goes when the runs on it are through.
 */
export class Timeline<State> {
  #latest: Promise<State>;
  readonly #running = new Set<Promise<unknown>>();

  constructor(first: State) {
    this.#latest = Promise.resolve(first);
  }

  /** Calls `use` with the state of now. */
  run<Result>(use: (state: State) => Promise<Result>): Promise<Result> {
    const run = this.#latest.then(use);
    this.#track(run);
    return run;
  }

  /**
   * Replaces the state after the changes asked for before. When `make` fails, the state stays.
   * @param retire what to do with the old state, once nothing runs on it
   */
  change(make: (old: State) => Promise<State>, retire?: (old: State) => Promise<void>): Promise<State> {
    const before = this.#latest;
    const runs = [...this.#running];
    const made = before.then(make);
    this.#latest = made.catch(() => before);
    const retired = made.then(async () => {
      await Promise.all(runs);
      await retire?.(await before);
    });
    this.#track(retired);
    return made;
  }

  /** The last state, when everything is through. */
  async end(): Promise<State> {
    for (;;) {
      const state = await this.#latest;
      if (this.#running.size === 0) return state;
      await Promise.all(this.#running);
    }
  }

  #track(work: Promise<unknown>): void {
    const settled: Promise<unknown> = work.catch(() => undefined).then(() => this.#running.delete(settled));
    this.#running.add(settled);
  }
}
