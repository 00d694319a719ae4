/**
 * No threads are started in browsers, workers and React Native: extraction is done where it is asked for. `#threads` of
 * package.json is this file unless the condition `node` is set.
 */

/** Answers one question after the other, in a thread of its own. */
export interface Thread {
  /** @param owned buffers of the question that the asker gives away */
  ask(question: unknown, owned: readonly ArrayBuffer[]): Promise<unknown>;
  close(): Promise<void>;
}

/** Starts a thread; undefined where there are none. */
export const openThread: (() => Promise<Thread>) | undefined = undefined;
