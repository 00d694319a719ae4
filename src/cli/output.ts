/**
 * What the command line prints: one JSON object on stdout, or text for people; progress on stderr, as one line that changes or, where
 * that is no terminal, as a line now and then. All of it goes through `printable`.
 */
import type { Adapter } from "../adapters/adapter.ts";

/** Where a command's output goes. */
export interface Output {
  /**
   * Shows how far a long piece of work is, and how long it will still take.
   * @param detail what there is to say besides, which may change from call to call
   */
  progress(what: string, done: number, of: number, ...detail: string[]): void;
  /** Says what is being done, where nothing can be counted. */
  phase(what: string): void;
  /** Says that the work goes on if `progress` has been silent for long. Call it now and then. */
  beat(): void;
  warn(message: string): void;
  /** Takes away the line that changes, before anything else is printed. */
  clear(): void;
}

/** Where text goes. */
export interface Stream {
  /** Whether somebody watches. */
  readonly isTTY?: boolean;
  /** Width of a terminal, in characters. */
  readonly columns?: number;
  write(text: string): unknown;
}

/** Milliseconds after which a file or pipe hears again that the work goes on. */
const SILENCE = 5000;

/**
 * @param stderr takes warnings and progress
 * @param json nothing of them is printed: the object says what there is to say
 * @param now milliseconds
 */
export function createOutput(json: boolean, stderr: Stream = process.stderr, now: () => number = Date.now): Output {
  const started = now();
  const estimate = createEstimate(now);
  let [told, last] = [started, "working"];
  const tell = (line: string): void => {
    if (json || stderr.isTTY || now() - told < SILENCE) return;
    told = now();
    stderr.write(`${line}\n`);
  };
  let shown = "";
  const show = (line: string): void => {
    if (json || !stderr.isTTY || line === shown) return;
    shown = line;
    // What a terminal has wrapped stays when the line changes.
    stderr.write(`\r\u001b[K${line.slice(0, (stderr.columns ?? 80) - 1)}`);
  };
  const clear = (): void => show("");
  return {
    clear,
    progress(what, done, of, ...detail) {
      const left = estimate(what, done, of);
      last = printable([...detail, `${what} ${done} of ${of}`].join(", "));
      const line = [last, ...left].join(", ");
      tell(line);
      if (done >= of) clear();
      else if (now() - started >= 500) show(line);
    },
    phase(what) {
      last = printable(what);
      show(last);
    },
    beat() {
      tell(`${last}, ${Math.round((now() - started) / 1000)} s so far`);
    },
    warn(message) {
      clear();
      if (!json) stderr.write(`${paragraph(`warning: ${message}`)}\n`);
    },
  };
}

/**
 * One line as it may reach a terminal. Names come from files: what would move the cursor, change colours, begin a line or turn the
 * direction of writing is spelt out as in JSON, so JSON stays what it was.
 */
export function printable(line: string): string {
  return line.replace(
    /[\p{Cc}\p{Bidi_Control}\u2028\u2029]/gu,
    (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}

/** A message that may have several lines. Those behind the first are indented, so that none passes for a message of its own. */
export function paragraph(message: string): string {
  return message.split("\n").map(printable).join("\n  ");
}

/** Warns of what adapters' files say. @returns the warnings */
export function warnOf(adapters: readonly Adapter[], out: Output): string[] {
  const all = adapters.flatMap(({ id, warnings }) => warnings.map((warning) => `${id}: ${warning}`));
  for (const warning of all) out.warn(warning);
  return all;
}

/** A listener that shows how many of something are done. */
export function counting(out: Output, what: string): (done: number, of: number) => void {
  return (done, of) => out.progress(what, done, of);
}

/** An estimate from less than this is not shown. */
const SHORTEST = 2000;

/**
 * What says how long the rest of a piece of work takes, at the rate since its first report.
 * @param now milliseconds
 * @returns a function of reports → [] or [the time left]; a new `what` is a new piece
 */
export function createEstimate(now: () => number = Date.now): (what: string, done: number, of: number) => string[] {
  let [piece, since, before] = ["", 0, 0];
  return (what, done, of) => {
    if (what !== piece) [piece, since, before] = [what, now(), done];
    const gone = now() - since;
    if (done <= before || gone < SHORTEST) return [];
    return [timeLeft((gone / 1000 / (done - before)) * (of - done))];
  };
}

/** Seconds as people read them. */
export function timeLeft(seconds: number): string {
  return `${seconds < 90 ? `${Math.ceil(seconds)} s` : `${Math.ceil(seconds / 60)} min`} left`;
}

/** Bytes as people read them; 1 kB = 1000 B. */
export function bytes(n: number): string {
  if (n < 1000) return `${n} B`;
  const unit = n < 1e6 ? "kB" : n < 1e9 ? "MB" : "GB";
  const value = n / (n < 1e6 ? 1e3 : n < 1e9 ? 1e6 : 1e9);
  return `${value.toFixed(value < 10 ? 2 : 1)} ${unit}`;
}

export function mean(numbers: readonly number[]): number {
  return sum(numbers) / Math.max(numbers.length, 1);
}

export function sum(numbers: readonly number[]): number {
  return numbers.reduce((a, b) => a + b, 0);
}

export function percent(share: number): string {
  return `${(100 * share).toFixed(1)} %`;
}

/** Rows as the lines of a text table; the first row is the head. Columns of numbers are aligned right. */
export function table(rows: readonly (readonly (string | number)[])[]): string[] {
  const columns = rows[0]!.map((_, c) => {
    const cells = rows.map((row) => printable(String(row[c])));
    const width = cells.reduce((most, { length }) => Math.max(most, length), 0);
    const right = cells.slice(1).every((cell) => /^[-+]?[\d.,]+( ?[a-zA-Z%×]*)?$/.test(cell));
    cells.splice(1, 0, "-".repeat(width));
    return cells.map((cell) => (right ? cell.padStart(width) : cell.padEnd(width)));
  });
  return columns[0]!.map((_, r) =>
    columns
      .map((cells) => cells[r])
      .join("  ")
      .trimEnd(),
  );
}

/** What was lost on the way into a pack, by task. */
export function lossTable(rows: readonly { id: string; total: number; max: number }[]): string[] {
  return table([
    ["task", "ΔW error", "largest module"],
    ...rows.map(({ id, total, max }) => [id, percent(total), percent(max)]),
  ]);
}

/** @param breakEven from how many tasks on a pack is smaller than its adapters; null: never */
export function sharing(breakEven: number | null): string {
  if (breakEven === null) return "A pack like this is never smaller than its adapters, however many tasks there are.";
  const from = breakEven > 1 ? `${breakEven} tasks` : "the first task";
  return `A pack like this is smaller than its adapters from ${from} on.`;
}

/** "1 task", "2 tasks". @param more the plural, where it is not the word with an s */
export function count(n: number, noun: string, more = `${noun}s`): string {
  return `${n} ${n === 1 ? noun : more}`;
}

/** "3 to 5", or "4" where both are the same. */
export function range(least: number, most: number): string {
  return least === most ? `${most}` : `${least} to ${most}`;
}

/** @param ratio how many times smaller something is; below 1 it is larger */
export function smaller(ratio: number): string {
  const times = (ratio < 1 ? 1 / ratio : ratio).toFixed(1);
  return times === "1.0" ? "as large" : `${times}× ${ratio < 1 ? "larger" : "smaller"}`;
}

/** What the process took so far: of the clock, of the cores, of memory. */
export function resources(): { seconds: number; coreSeconds: number; peakMemoryBytes: number } {
  const { userCPUTime, systemCPUTime, maxRSS } = process.resourceUsage();
  return {
    seconds: performance.now() / 1000,
    coreSeconds: (userCPUTime + systemCPUTime) / 1e6,
    peakMemoryBytes: maxRSS * 1024,
  };
}
