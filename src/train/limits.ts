/**
 * Numbers among options, checked by name.
 */

/** What a number must be, in words and as a test. */
export type Limit = readonly [expected: string, valid: (value: number) => boolean];

export const WHOLE: Limit = ["a whole number ≥ 1", (value) => Number.isInteger(value) && value >= 1];
export const COUNT: Limit = ["a whole number ≥ 0", (value) => Number.isInteger(value) && value >= 0];
export const SHARE: Limit = ["a number from 0 to less than 1", (value) => value >= 0 && value < 1];
export const POSITIVE: Limit = ["a number above 0", (value) => value > 0 && value < Infinity];
export const UNLIMITED: Limit = ["a number above 0, or Infinity", (value) => value > 0];
export const NOT_NEGATIVE: Limit = ["a number ≥ 0", (value) => value >= 0 && value < Infinity];

/**
 * @param where the public function, for the message
 * @param options undefined ones are left to their defaults
 * @throws RangeError naming the option, what is expected and what was found
 */
export function checkNumbers<Options extends object>(
  where: string,
  options: Options,
  limits: { readonly [Name in keyof Options]?: Limit },
): void {
  for (const [name, [expected, valid]] of Object.entries(limits as Record<string, Limit>)) {
    const value: unknown = options[name as keyof Options];
    if (value !== undefined && !(typeof value === "number" && valid(value)))
      throw new RangeError(`${where}: ${name}: expected ${expected}, got ${String(value)}`);
  }
}
