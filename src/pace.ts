/**
 * When work is done: turns of the event loop within long work, so that a page stays alive and an abort is heard; and
 * changes, which come one after the other.
 */

/**
 * Milliseconds of work after which the others have a turn: with the piece that is under way then, less than a frame.
 */
const SHARE = 3;

/** Milliseconds since some time: by a clock that is never set, where the engine has one. */
export const now = (): number => (globalThis.performance ?? Date).now();

/** Asked between two pieces of work. */
export type Pause = () => Promise<void> | undefined;

/**
 * Asked between two pieces of work, gives undefined, or a pause to wait for before the next one. Short work is never
 * held up.
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
export function reasonOf(signal: AbortSignal): unknown {
  return signal.reason ?? Object.assign(new Error("This operation was aborted"), { name: "AbortError" });
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

function nothing(): void {}
