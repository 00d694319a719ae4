/**
 * When work is done: turns of the event loop within long work, so that a page stays alive and an abort is heard; and the order of calls,
 * which may overlap each other, and changes, which come one after the other.
 */

/** Milliseconds of work after which the others have a turn: with the piece that is under way then, less than a frame. */
const SHARE = 3;

/** Milliseconds since some time: by a clock that is never set, where the engine has one. */
export const now = (): number => (globalThis.performance ?? Date).now();

/** Asked between two pieces of work. */
export type Pause = () => Promise<void> | undefined;

/**
 * Asked between two pieces of work, gives undefined, or a pause to wait for before the next one. Short work is never held up.
 * @returns a function whose promises are rejected once `signal` is aborted
 */
export function pacer(signal?: AbortSignal): Pause {
  let started = now();
  return () => {
    if (now() - started < SHARE) return undefined;
    return turn().then(() => {
      throwIfAborted(signal);
      started = now();
    });
  };
}

/**
 * Does work that yields between its pieces, with pauses.
 * @returns its result, or a promise of it once there was a pause
 */
export function paced<T>(work: Iterator<void, T>, pause: Pause): T | Promise<T> {
  for (;;) {
    const step = work.next();
    if (step.done) return step.value;
    const turn = pause();
    if (turn) return turn.then(() => paced(work, pause));
  }
}

/** Does all of such work at once. @returns its result */
export function atOnce<T>(work: Iterator<void, T>): T {
  let step = work.next();
  while (!step.done) step = work.next();
  return step.value;
}

/** Throws the reason of a signal once it is aborted. React Native's signals have no such method. */
export function throwIfAborted(signal: AbortSignal | undefined): void {
  if (signal?.aborted) throw reasonOf(signal);
}

/** The reason of an aborted signal; an `AbortError` where it has none, as in React Native. */
export function reasonOf({ reason }: AbortSignal): unknown {
  return reason ?? Object.assign(new Error("This operation was aborted"), { name: "AbortError" });
}

/** Lets everything else that waits in the event loop have its turn. */
export function turn(): Promise<void> {
  return new Promise((resolve) => {
    // Bare shells have no timers either, and no other work.
    if (!globalThis.MessageChannel) return void (globalThis.setTimeout?.(resolve) ?? resolve());
    // A message, since timers are slowed down: to 4 ms each, in hidden pages to a second.
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(0);
  });
}

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
