/**
 * The order of what is asked for: calls, which may overlap each other, and changes, which come one after the other.
 */

/** Changes, one after the other. */
export class Changes {
  protected changed: Promise<unknown> = Promise.resolve();

  /** Does `work` after the changes asked for before, whether or not they succeed. */
  change<Result>(work: () => Promise<Result>): Promise<Result> {
    const change = this.changed.then(work);
    // Not the promise itself, which would keep the result.
    this.changed = change.then(nothing, nothing);
    return change;
  }
}

/** Calls and changes. Each call sees the changes asked for before it and none that is asked for later. */
export class Queue extends Changes {
  readonly #calls = new Set<Promise<unknown>>();

  /** Does `work` after the changes asked for before, whether or not they succeed. Later changes may overlap it. */
  call<Result>(work: () => Promise<Result>): Promise<Result> {
    const call = this.changed.then(work);
    this.#track(call);
    return call;
  }

  /**
   * Does `work` after the changes asked for before. Calls asked for before may still be under way.
   * @param after called once those have ended, when `work` has succeeded
   */
  override change<Result>(work: () => Promise<Result>, after?: (result: Result) => unknown): Promise<Result> {
    const calls = [...this.#calls];
    const change = super.change(work);
    if (after) this.#track(Promise.all([change, ...calls]).then(([result]) => after(result)));
    return change;
  }

  /** Does `work` after the calls and changes asked for before, and before those asked for later. */
  alone<Result>(work: () => Promise<Result>): Promise<Result> {
    const calls = [...this.#calls];
    return this.change(async () => {
      await Promise.all(calls);
      // Code that awaits one of the calls goes on before anything changes, however many microtasks that takes.
      await new Promise((resolve) => setTimeout(resolve));
      return work();
    });
  }

  /** Resolves when nothing is under way any more. */
  async end(): Promise<void> {
    do {
      await this.changed;
      await Promise.all(this.#calls);
    } while (this.#calls.size > 0);
  }

  #track(work: Promise<unknown>): void {
    const settled: Promise<unknown> = work.then(nothing, nothing).then(() => this.#calls.delete(settled));
    this.#calls.add(settled);
  }
}

function nothing(): void {}
