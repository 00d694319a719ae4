import { readFileSync } from "node:fs";

/**
 * Milliseconds of CPU that the main thread has taken. Other programs on the machine take none of them, as they do of
 * the wall's clock.
 */
export function mainThread() {
  if (process.platform !== "linux") return process.cpuUsage().user / 1e3;
  return Number.parseInt(readFileSync(`/proc/self/task/${process.pid}/schedstat`, "utf8"), 10) / 1e6;
}
