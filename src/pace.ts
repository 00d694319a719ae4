/**
 * Turns of the event loop within long work, so that a page stays alive and an abort is heard. They change nothing but when
 * things are done.
 */

/** Milliseconds of work after which the others have a turn, where nothing else is said. */
const SHARE = 30;

/** Milliseconds since some time: by a clock that is never set, where the engine has one. */
export const now = (): number => (globalThis.performance ?? Date).now();

/**
 * What to ask between two pieces of work: undefined, or what to wait for before the next one. Short work is never held up.
 * @returns a function whose promises are rejected once `signal` is aborted
 */
export function pacer(signal?: AbortSignal, share: number = SHARE): () => Promise<void> | undefined {
  let started = now();
  return () => {
    if (now() - started < share) return undefined;
    return turn().then(() => {
      throwIfAborted(signal);
      started = now();
    });
  };
}

/** Milliseconds of reading after which the others have a turn: half of what a page may take for a frame. */
const FRAME = 8;

/** Does work in pieces; the others have a turn between them. Rejected with the reason of `signal` once it is aborted. */
export async function paced<T>(pieces: Generator<void, T>, signal?: AbortSignal): Promise<T> {
  const pause = pacer(signal, FRAME);
  for (;;) {
    const { done, value } = pieces.next();
    if (done) return value;
    const turn = pause();
    if (turn) await turn;
  }
}

/** Does work that could be done in pieces. */
export function atOnce<T>(pieces: Generator<void, T>): T {
  for (;;) {
    const { done, value } = pieces.next();
    if (done) return value;
  }
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
    if (typeof MessageChannel === "undefined") {
      // Bare shells have no timers either, and no other work.
      if (typeof setTimeout === "undefined") resolve();
      else setTimeout(resolve);
      return;
    }
    // A message, since timers are slowed down: to 4 ms each, in hidden pages to a second.
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(0);
  });
}
