/**
 * What is undone when a command is stopped halfway: locks, and files beside their targets. What writes to disk does so in synchronous
 * steps (files.ts), so a signal is heard between two of them, never within one.
 */
const SIGNALS = ["SIGINT", "SIGTERM", "SIGHUP"] as const;

const steps = new Set<() => void>();

/**
 * Calls `step` when the process ends, by a signal or otherwise, before the function returned has been called.
 * @param step synchronous
 */
export function undoOnExit(step: () => void): () => void {
  if (steps.size === 0) listen("on");
  steps.add(step);
  return () => {
    if (steps.delete(step) && steps.size === 0) listen("off");
  };
}

/** Whether the next Ctrl-C is somebody's to answer. */
let gentle = false;

/**
 * Calls `step` at the first Ctrl-C, which ends nothing then; a second one does.
 * @returns a function that stops listening
 */
export function onInterrupt(step: () => void): () => void {
  const first = (): void => {
    // Other listeners hear the same signal first.
    setImmediate(forget);
    step();
  };
  const forget = (): void => {
    gentle = false;
    process.off("SIGINT", first);
  };
  gentle = true;
  process.once("SIGINT", first);
  return forget;
}

function listen(how: "on" | "off"): void {
  for (const signal of SIGNALS) process[how](signal, stop);
  process[how]("exit", undo);
}

/** Latest first. What cannot be undone must not keep the rest from it. */
function undo(): void {
  for (const step of [...steps].reverse()) {
    try {
      step();
    } catch {
      // The process ends; there is nobody left to be told.
    }
  }
  steps.clear();
}

/** Ends the process by the same signal, so that its parent sees why. */
function stop(signal: NodeJS.Signals): void {
  if (signal === "SIGINT" && gentle) return;
  undo();
  listen("off");
  process.kill(process.pid, signal);
}
