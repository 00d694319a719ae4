/**
 * Turns of the event loop within long work, so that a page stays alive and an abort is heard. They change nothing but when
 * things are done.
 */

/** Milliseconds of work after which the others have a turn. */
const SHARE = 30;

/**
 * What to ask between two pieces of work: undefined, or what to wait for before the next one. Short work is never held up.
 * @returns a function whose promises are rejected once `signal` is aborted
 */
export function pacer(signal?: AbortSignal): () => Promise<void> | undefined {
  let started = performance.now();
  return () => {
    if (performance.now() - started < SHARE) return undefined;
    return turn().then(() => {
      signal?.throwIfAborted();
      started = performance.now();
    });
  };
}

/** A message, since timers are slowed down: to 4 ms each, in hidden pages to a second. */
function turn(): Promise<void> {
  return new Promise((resolve) => {
    if (typeof MessageChannel === "undefined") {
      setTimeout(resolve);
      return;
    }
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(0);
  });
}
