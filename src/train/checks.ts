/**
 * Checks of options and sessions that training functions take.
 */
import { checkArgument } from "../arguments.ts";
import type { Session } from "../session/session.ts";

type Kind = "whole" | "count" | "share" | "between" | "positive" | "unlimited" | "rate";

/** What a number must be: words for the message, and a test. */
const LIMITS: Readonly<Record<Kind, readonly [expected: string, valid: (value: number) => boolean]>> = {
  whole: ["a whole number ≥ 1", (value) => Number.isInteger(value) && value >= 1],
  count: ["a whole number ≥ 0", (value) => Number.isInteger(value) && value >= 0],
  share: ["a number from 0 to less than 1", (value) => value >= 0 && value < 1],
  between: ["a number between 0 and 1", (value) => value > 0 && value < 1],
  positive: ["a number above 0", (value) => value > 0 && value < Infinity],
  unlimited: ["a number above 0, or Infinity", (value) => value > 0],
  rate: ["a number ≥ 0", (value) => value >= 0 && value < Infinity],
};

/**
 * @param where the public function, for the message
 * @param options undefined values are skipped; their defaults apply
 * @throws RangeError naming the option, what is expected and what was found
 */
export function checkNumbers<Options extends object>(
  where: string,
  options: Options,
  limits: { readonly [Name in keyof Options]?: Kind },
): void {
  for (const [name, kind] of Object.entries<Kind>(limits as Record<string, Kind>)) {
    const [expected, valid] = LIMITS[kind];
    const value: unknown = options[name as keyof Options];
    if (value !== undefined && !(typeof value === "number" && valid(value)))
      throw new RangeError(`${where}: ${name}: expected ${expected}, got ${String(value)}`);
  }
}

/** @throws TypeError when `session` is not a session, or was made without `trainable: true` */
export function checkSession(where: string, session: Session): void {
  checkArgument(where, session, "a session (await createEigenSession(…))", "trainable");
  if (session.trainable) return;
  throw new TypeError(`${where}: this session cannot be trained; create it with trainable: true`);
}
