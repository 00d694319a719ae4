/**
 * Output of the command line: one JSON object on stdout, or text for people; progress on stderr, as one line that
 * changes or, where that is no terminal, as a line now and then. All of it goes through `printable`.
 */
import type { Adapter } from "../adapters/adapter.ts";
import type { WorkProgress } from "../work.ts";

export interface Output {
  /** Shows how far a long piece of work is, and how long it will still take. */
  progress(at: WorkProgress): void;
  /** Says what is being done, where nothing can be counted. */
  phase(what: string): void;
  warn(message: string): void;
  /** Takes away the line that changes, before anything else is printed. */
  clear(): void;
}

export interface Stream {
  /** True for a terminal. */
  readonly isTTY?: boolean;
  /** Width of a terminal, in characters. */
  readonly columns?: number;
  write(text: string): unknown;
}

/** Milliseconds that work takes before it is shown in a file or pipe, and in a terminal. */
const LONG = 5000;
const SHORT = 500;
/** Lines of one stage in a file or pipe. */
const LINES = 10;

/**
 * @param stderr takes warnings and progress: in a terminal one line that changes, elsewhere a line each tenth
 * @param json nothing of them is printed: the object says what there is to say
 * @param now milliseconds
 */
export function createOutput(json: boolean, stderr: Stream = process.stderr, now: () => number = Date.now): Output {
  const begun = now();
  // `tenth`: the last one that a file or pipe has, −1 while there is none.
  let stage = { name: "", since: begun, before: 0, tenth: -1 };
  const tell = (line: string): void => {
    if (!json) stderr.write(`${line}\n`);
  };
  let shown = "";
  const show = (line: string): void => {
    if (json || !stderr.isTTY || line === shown) return;
    shown = line;
    // A wrapped rest would stay when the line changes. A terminal that does not know its width reports 0.
    stderr.write(`\r\u001b[K${line.slice(0, (stderr.columns || 80) - 1)}`);
  };
  const clear = (): void => show("");
  return {
    clear,
    progress(at) {
      const { done, total } = at;
      if (at.stage !== stage.name) stage = { name: at.stage, since: now(), before: done, tenth: -1 };
      const gone = now() - stage.since;
      const line = printable([progressText(at), ...leftOf(at, stage.before, gone)].join(", "));
      if (done >= total && total > 0) clear();
      else if (now() - begun >= SHORT) show(line);
      const tenth = total > 0 ? Math.floor((LINES * done) / total) : 0;
      if (stderr.isTTY || tenth <= stage.tenth || (stage.tenth < 0 && gone < LONG)) return;
      stage.tenth = tenth;
      tell(line);
    },
    phase: (what) => show(printable(what)),
    warn(message) {
      clear();
      tell(paragraph(`warning: ${message}`));
    },
  };
}

/** "distilling sst2: 12 of 480 steps, 2 %" */
function progressText({ stage, done, total, unit, detail }: WorkProgress): string {
  const what = detail === undefined ? stage : `${stage} ${detail}`;
  const share = `${Math.floor((100 * done) / (total || 1))} %`;
  if (unit === "%") return `${what}: ${share}`;
  const amount = (n: number): string => (unit === "bytes" ? bytes(n) : `${n}`);
  const named = unit === "bytes" ? "" : ` ${unit}`;
  return total > 0
    ? `${what}: ${amount(done)} of ${amount(total)}${named}, ${share}`
    : `${what}: ${amount(done)}${named}`;
}

/**
 * One line as it may reach a terminal. Names come from files: what would move the cursor, change colours, begin a line
 * or turn the direction of writing is spelt out as in JSON, so JSON stays what it was.
 */
export function printable(line: string): string {
  return line.replace(
    /[\p{Cc}\p{Bidi_Control}\u2028\u2029]/gu,
    (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
}

/**
 * A message that may have several lines. Those behind the first are indented, so that none passes for a message of its
 * own.
 */
export function paragraph(message: string): string {
  return message.split("\n").map(printable).join("\n  ");
}

/** Warns of names that a user has given to weights, and no fingerprint confirms. */
export function warnOfNames(names: ReadonlyMap<string, string>, unconfirmed: readonly string[], out: Output): void {
  for (const module of unconfirmed) {
    const weight = names.get(module);
    if (weight !== undefined)
      out.warn(
        `--names ${module}=${weight}: no fingerprint confirms that weight; where it is another, answers are wrong. Make the pack with --base`,
      );
  }
}

/** Warns of what adapters' files say. @returns the warnings */
export function warnOf(adapters: readonly Adapter[], out: Output): string[] {
  const all = adapters.flatMap(({ id, warnings }) => warnings.map((warning) => `${id}: ${warning}`));
  for (const warning of all) out.warn(warning);
  return all;
}

/** An estimate from less than this is not shown. */
const SHORTEST = 2000;

/**
 * The time left, at the rate since the first report of a stage.
 * @param before what was done at that report
 * @param gone milliseconds since then
 * @returns nothing as long as it is not known
 */
export function leftOf({ done, total }: Pick<WorkProgress, "done" | "total">, before: number, gone: number): string[] {
  if (done <= before || gone < SHORTEST || total === 0 || done >= total) return [];
  return [timeLeft((gone / 1000 / (done - before)) * (total - done))];
}

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

/** Use of the clock, the cores and memory by this process. */
export function resources(): { seconds: number; coreSeconds: number; peakMemoryBytes: number } {
  const { userCPUTime, systemCPUTime, maxRSS } = process.resourceUsage();
  return {
    seconds: performance.now() / 1000,
    coreSeconds: (userCPUTime + systemCPUTime) / 1e6,
    peakMemoryBytes: maxRSS * 1024,
  };
}
