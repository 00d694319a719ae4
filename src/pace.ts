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
    return (async () => {
      // Most switches are short. Where that part cannot be had, as without a network, a timer does.
      const part = await import("./turn.ts").catch(() => undefined);
      await (part ? part.turn() : new Promise((resolve) => setTimeout(resolve)));
      signal?.throwIfAborted();
      started = now();
    })();
  };
}
