/**
 * Replaces tap in browsers. Has the parts of tap's `Test` that suites use, and records findings for a tap test to
 * report. Not a runner: tests run one after the other, and nothing is printed.
 */

/** The parts of a test that suites use, of tap's or of this one. */
export interface SuiteTest {
  test(name: string, run: (t: SuiteTest) => Promise<void> | void): unknown;
  teardown(run: () => unknown): void;
  comment(text: string): void;
  pass(...message: Message): boolean;
  fail(...message: Message): boolean;
  ok(value: unknown, ...message: Message): boolean;
  equal(found: unknown, expected: unknown, ...message: Message): boolean;
  strictSame(found: unknown, expected: unknown, ...message: Message): boolean;
  throws(run: () => unknown, wanted: Wanted, ...message: Message): unknown;
  rejects(promise: Promise<unknown>, wanted: Wanted, ...message: Message): Promise<unknown>;
}

type Message = [] | [string];

/** The class of an error, or its properties: a regular expression matches, anything else is equal. */
type Wanted = ErrorConstructor | { message: RegExp; name?: string; tag?: string };

/** A finding: an assertion, the end of a test, or a comment. */
export interface Finding {
  kind: "assertion" | "end" | "comment";
  /** Names of the surrounding tests and its own, outermost first. */
  name: string;
  /** Description of the fault; undefined where there is none. */
  fault: string | undefined;
}

/** Hands findings on to a test. @returns the number of assertions that hold */
export function report(t: Pick<SuiteTest, "fail" | "comment">, findings: readonly Finding[]): number {
  for (const { kind, name, fault } of findings) {
    if (fault !== undefined) t.fail(`${name}: ${fault}`);
    else if (kind === "comment") t.comment(name);
  }
  return findings.filter(({ kind, fault }) => kind === "assertion" && fault === undefined).length;
}

/** Runs a test with its subtests. */
export async function record(name: string, run: (t: SuiteTest) => Promise<void> | void): Promise<Finding[]> {
  const findings: Finding[] = [];
  const inner: [name: string, run: typeof run][] = [];
  const teardowns: (() => unknown)[] = [];
  const pending: Promise<unknown>[] = [];

  function note(good: boolean, message: string, fault: () => string, kind: Finding["kind"] = "assertion"): boolean {
    findings.push({ kind, name: `${name} > ${message}`, fault: good ? undefined : fault().slice(0, 2000) });
    return good;
  }

  function refusal(error: unknown, wanted: Wanted, message: string): boolean {
    return note(fits(error, wanted), message, () => `got ${text(error)}, expected ${text(wanted)}`);
  }

  const t: SuiteTest = {
    test: (name, run) => inner.push([name, run]),
    teardown: (run) => void teardowns.unshift(run),
    comment: (text) => void note(true, text, String, "comment"),
    pass: (message = "pass") => note(true, message, String),
    fail: (message = "fail") => note(false, message, () => "failed"),
    ok: (value, message = "ok") => note(Boolean(value), message, () => `got ${text(value)}`),
    equal: (found, expected, message = "equal") =>
      note(same(found, expected), message, () => `got ${text(found)}, expected ${text(expected)}`),
    strictSame: (found, expected, message = "the same") =>
      note(strictlySame(found, expected), message, () => `got ${text(found)}, expected ${text(expected)}`),
    throws(run, wanted, message = "throws") {
      try {
        run();
      } catch (error) {
        return refusal(error, wanted, message);
      }
      return note(false, message, () => "nothing was thrown");
    },
    rejects(promise, wanted, message = "rejects") {
      const settled = promise.then(
        () => note(false, message, () => "it was fulfilled"),
        (error: unknown) => refusal(error, wanted, message),
      );
      pending.push(settled);
      return settled;
    },
  };

  try {
    await run(t);
    await Promise.all(pending);
    for (const test of inner) findings.push(...(await record(`${name} > ${test[0]}`, test[1])));
    for (const teardown of teardowns) await teardown();
    note(true, "ends", String, "end");
  } catch (error) {
    note(false, "ends", () => (error instanceof Error ? `${error.message}\n${error.stack}` : text(error)), "end");
  }
  return findings;
}

/** Compares values, with NaN equal to itself. */
function same(a: unknown, b: unknown): boolean {
  return a === b || (Number.isNaN(a) && Number.isNaN(b));
}

/** Compares kind and elements. @throws TypeError for values without elements that are not equal */
function strictlySame(a: unknown, b: unknown): boolean {
  if (same(a, b)) return true;
  if (!isList(a) || !isList(b)) return false;
  return a.constructor === b.constructor && a.length === b.length && a.every((value, i) => strictlySame(value, b[i]));
}

function isList(value: unknown): value is unknown[] {
  return Array.isArray(value) || (ArrayBuffer.isView(value) && !(value instanceof DataView));
}

function fits(error: unknown, wanted: Wanted): boolean {
  if (!(error instanceof Error)) return false;
  if (typeof wanted === "function") return error instanceof wanted;
  return Object.entries(wanted).every(([key, value]) => {
    const found = (error as unknown as Record<string, unknown>)[key];
    return value instanceof RegExp ? value.test(String(found)) : found === value;
  });
}

function text(value: unknown): string {
  if (value instanceof Error) return `${value.name}: ${value.message}`;
  if (typeof value === "function") return value.name;
  if (isList(value)) return `[${Array.from(value).join()}]`;
  if (typeof value !== "object" || value === null) return String(value);
  return Object.entries(value)
    .map(([key, value]) => `${key} ${value}`)
    .join(", ");
}
