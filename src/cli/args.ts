/**
 * Arguments of the command line: what is allowed, and values checked before any file is touched.
 */
import { resolve } from "node:path";
import { parseArgs } from "node:util";
import type { ComponentSelection } from "../extract/options.ts";
import type { Dtypes } from "../tensor/dtypes.ts";
import { DTYPES, type Dtype } from "../tensor/dtypes.ts";

/** A wrong command line: exit code 2. */
export class UsageError extends Error {
  readonly tag = "usage";
}

/** Options by name, each with whether it takes a value and, in help, how that value is called. */
export type OptionTable = Readonly<
  Record<string, { value?: string; short?: string; multiple?: boolean; help: string }>
>;

export interface Arguments {
  positionals: string[];
  /** Last value of an option. */
  text(name: string): string | undefined;
  /** All values of an option that may be given several times. */
  list(name: string): string[];
  flag(name: string): boolean;
}

/** @throws UsageError for an unknown option, a missing value, or more or fewer positionals than allowed */
export function parse(args: readonly string[], table: OptionTable, min: number, max: number = min): Arguments {
  const options = Object.fromEntries(
    Object.entries(table).map(([name, { value, short, multiple }]) => [
      name,
      {
        type: value ? ("string" as const) : ("boolean" as const),
        ...(short ? { short } : {}),
        multiple: multiple ?? false,
      },
    ]),
  );
  try {
    const { values, positionals } = parseArgs({ args: [...args], options, allowPositionals: true, strict: true });
    if (positionals.length < min || positionals.length > max) {
      const wanted = max === min ? `${min}` : max === Infinity ? `at least ${min}` : `${min} to ${max}`;
      throw new UsageError(`expected ${wanted} arguments, got ${positionals.length}`);
    }
    return {
      positionals,
      text: (name) => values[name] as string | undefined,
      list: (name) => (values[name] as string[] | undefined) ?? [],
      flag: (name) => values[name] === true,
    };
  } catch (error) {
    throw error instanceof UsageError ? error : new UsageError((error as Error).message);
  }
}

/** @throws UsageError when the option is missing */
export function required(args: Arguments, name: string): string {
  const value = args.text(name);
  if (value === undefined) throw new UsageError(`--${name} is missing`);
  return value;
}

/** @throws UsageError when the value is no whole number from 1 */
export function wholeNumber(args: Arguments, name: string, otherwise: number): number {
  const text = args.text(name) ?? String(otherwise);
  if (!/^[1-9]\d*$/.test(text)) throw new UsageError(`--${name} ${text}: expected a whole number from 1`);
  return Number(text);
}

/** @throws UsageError when the value is no number that `check` allows */
export function number(
  args: Arguments,
  name: string,
  otherwise: number,
  check: (n: number) => boolean,
  what: string,
): number {
  const text = args.text(name);
  if (text === undefined) return otherwise;
  if (text.trim() === "" || !check(Number(text))) throw new UsageError(`--${name} ${text}: expected ${what}`);
  return Number(text);
}

/** @throws UsageError when --output would replace what it is made of */
export function refuseOverwriting(target: string, path: string): void {
  if (resolve(target) !== resolve(path)) return;
  throw new UsageError(`--output ${target}: that would overwrite what it is made of; choose another name`);
}

/** @throws UsageError when the value is none of the choices */
export function choice<T extends string>(args: Arguments, name: string, choices: readonly T[], otherwise: T): T {
  const value = args.text(name) ?? otherwise;
  if (!(choices as readonly string[]).includes(value)) {
    throw new UsageError(`--${name} ${value}: expected ${choices.join(" or ")}`);
  }
  return value as T;
}

/** --k N, --energy P or --error E; 90 % of the energy unless given. @throws UsageError for two of them, or a bad number */
export function selection(args: Arguments): ComponentSelection {
  const given = ["k", "energy", "error"].filter((name) => args.text(name) !== undefined);
  if (given.length > 1) throw new UsageError(`--${given.join(" and --")} exclude each other`);
  if (given[0] === "k") return { kind: "k", k: wholeNumber(args, "k", 1) };
  if (given[0] === "error")
    return { kind: "error", max: number(args, "error", NaN, (n) => n > 0 && n < 1, "a share between 0 and 1") };
  if (given[0] === "energy") {
    return { kind: "energy", share: number(args, "energy", NaN, (n) => n > 0 && n <= 1, "a share above 0, at most 1") };
  }
  return { kind: "energy", share: 0.9 };
}

/** --dtype f16, or --dtype basis=f16,coefficients=f32,head=f16. @throws UsageError for an unknown part or type */
export function storage(text: string | undefined): Partial<Dtypes> {
  if (text === undefined) return {};
  const type = (word: string): Dtype => {
    if (!(DTYPES as readonly string[]).includes(word)) {
      throw new UsageError(`--dtype ${text}: "${word}" is not one of ${DTYPES.join(", ")}`);
    }
    return word as Dtype;
  };
  if (!text.includes("=")) return { basis: type(text), coefficients: type(text), head: type(text) };
  const types: Partial<Record<keyof Dtypes, Dtype>> = {};
  for (const assignment of text.split(",")) {
    const [part = "", word = ""] = assignment.split("=");
    if (part !== "basis" && part !== "coefficients" && part !== "head") {
      throw new UsageError(`--dtype ${text}: "${part}" is not one of basis, coefficients, head`);
    }
    types[part] = type(word);
  }
  return types;
}

/** --as OLD=NEW, any number of times. @throws UsageError when one is not of this form */
export function renames(args: Arguments): Map<string, string> {
  return new Map(
    args.list("as").map((text) => {
      const cut = text.lastIndexOf("=");
      if (cut < 1 || cut === text.length - 1) throw new UsageError(`--as ${text}: expected OLD=NEW`);
      return [text.slice(0, cut), text.slice(cut + 1)];
    }),
  );
}
