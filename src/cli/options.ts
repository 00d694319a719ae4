/**
 * Options of commands: their help and their values, checked before any file is touched; and those that several commands have.
 */

import type { ComponentSelection } from "../extract/components.ts";
import type { Gauge } from "../extract/subspace.ts";
import { fromIntegrity } from "../format/hash.ts";
import { DTYPES, type Dtypes } from "../tensor/dtypes.ts";

/** "a, b or c" */
const OR = new Intl.ListFormat("en-GB", { type: "disjunction" });

/** A wrong command line: exit code 2. */
export class UsageError extends Error {
  readonly tag = "usage";
}

/**
 * What a command reads of a name, which may be one of the Hugging Face Hub: one file, by its path in a repository; adapters or a base,
 * which a repository's name alone stands for, too; or a model to be run, with all that lies beside it, or the weights of one, which a folder
 * that holds them stands for. A file that the command changes is one's own: it may not lie there.
 */
export type ReadAs = "file" | "repository" | "model" | "weights" | "own";

/** An option; its name is that of the property which holds it, in kebab case. */
export interface OptionSpec<T> {
  readonly help: string;
  /** How help calls its value; a switch has none. */
  readonly value?: string;
  /** Its other name in front, as "-o, ". */
  readonly short?: string;
  /** Heading in help. */
  readonly group?: string;
  /** Seldom needed: in the help of `--help --all` alone. */
  readonly rare?: boolean;
  readonly required?: boolean;
  /** What is read of the file or repository that it names, which may lie on the Hugging Face Hub. */
  readonly reads?: ReadAs;
  /** What it is when it is not given. */
  readonly otherwise?: T;
  /** @throws UsageError saying what was expected */
  parse(text: string, flag: string, before: T | undefined): T;
}

export type Options = Readonly<Record<string, OptionSpec<unknown>>>;

/** What a command gets of its options. */
export type Values<O extends Options> = { readonly [K in keyof O]: O[K] extends OptionSpec<infer T> ? T : never };

type Maybe<T> = OptionSpec<T | undefined>;

/** `privateTerms` → `--private-terms` */
export function flagOf(name: string): string {
  return `--${name.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`;
}

/** Puts options under a heading of their own in help. */
export function group<O extends Options>(heading: string, options: O): O {
  const entries = Object.entries(options).map(([name, spec]) => [name, { ...spec, group: `${heading}:` }]);
  return Object.fromEntries(entries) as O;
}

/** Leaves options to the help of `--help --all`. */
export function rarely<O extends Options>(options: O): O {
  return Object.fromEntries(Object.entries(options).map(([name, spec]) => [name, { ...spec, rare: true }])) as O;
}

/** The option with a value for when it is not given, which help tells. */
export function byDefault<T>(otherwise: NoInfer<T>, spec: Maybe<T>): OptionSpec<T> {
  return { ...spec, otherwise } as OptionSpec<T>;
}

export function required<T>(spec: OptionSpec<T>): OptionSpec<Exclude<T, undefined>> {
  return { ...spec, required: true } as OptionSpec<Exclude<T, undefined>>;
}

/** An option without a value. */
export function toggle(help: string): OptionSpec<boolean> {
  return { help, otherwise: false, parse: () => true };
}

export function text(value: string, help: string): Maybe<string> {
  return { value, help, parse: (given) => given };
}

/** The option, as a name of what the command reads. */
export function reading<T>(reads: ReadAs, spec: OptionSpec<T>): OptionSpec<T> {
  return { ...spec, reads };
}

/** Where a command writes to. */
export function output(value: string, help: string): OptionSpec<string> {
  return required({ ...text(value, help), short: "-o, " });
}

/** Belongs to commands that write new files. */
export const force: OptionSpec<boolean> = toggle("Replace existing files.");

/** An option that may be given several times. */
export function list(value: string, help: string): OptionSpec<readonly string[]> {
  return { value, help, otherwise: [], parse: (given, _, before = []) => [...before, given] };
}

/** Belongs to commands that give tasks on. `Run` sees to it. */
export const revoked: OptionSpec<readonly string[]> = {
  ...list("sha256-…", "Refuse a task with this hash, as inspect --json and verify print it. May be given again."),
  parse(given, flag, before = []) {
    try {
      fromIntegrity(given);
    } catch (error) {
      throw new UsageError(`${flag}: ${(error as Error).message}`);
    }
    return [...before, given];
  },
};

/** A number's range, and how a message calls it. */
export interface Range {
  readonly expected: string;
  holds(n: number): boolean;
}

export const POSITIVE: Range = { expected: "a number above 0", holds: (n) => n > 0 && n < Infinity };
export const SHARE: Range = {
  expected: "a share between 0 and 1, such as 0.15 or 15%",
  holds: (n) => n > 0 && n < 1,
};

/** Whole numbers from `least` on. */
export function from(least: number): Range {
  return { expected: `a whole number from ${least}`, holds: (n) => Number.isSafeInteger(n) && n >= least };
}

export function number(value: string, help: string, { expected, holds }: Range): Maybe<number> {
  const parse = (given: string, flag: string): number => {
    const [, percent] = /share/.test(expected) ? (/^([\d.]+) ?%$/.exec(given) ?? []) : [];
    const found = percent === undefined ? Number(given) : Number(percent) / 100;
    if (given.trim() !== "" && holds(found)) return found;
    const meant = /share/.test(expected) && found > 1 && holds(found / 100) ? `; did you mean ${found / 100}?` : "";
    throw new UsageError(`${flag} ${given}: expected ${expected}${meant}`);
  };
  return { value, help, parse };
}

/** Belongs to commands that expand tasks without a base. `Run` sees to it. */
export const maxExpansion: Maybe<number> = {
  ...number("N", "How many times the bytes stored for it a task may become. Default: 1024.", {
    expected: "a number above 0",
    holds: (n) => n > 0,
  }),
  rare: true,
};

export function choice<const T extends string>(choices: readonly T[], help: string): Maybe<T> {
  const parse = (given: string, flag: string): T => {
    const found = choices.find((one) => one === given);
    if (found === undefined) throw new UsageError(`${flag} ${given}: expected ${OR.format(choices)}`);
    return found;
  };
  return { value: choices.join("|"), help, parse };
}

/**
 * `LEFT=RIGHT`, any number of times.
 * @param cut which "=" parts them, where there are several: that side may hold none
 */
export function assignments(
  value: string,
  help: string,
  cut: "first" | "last",
): OptionSpec<ReadonlyMap<string, string>> {
  return {
    value,
    help,
    otherwise: new Map(),
    parse(given, flag, before = new Map()) {
      const at = cut === "first" ? given.indexOf("=") : given.lastIndexOf("=");
      if (at < 1 || at === given.length - 1) throw new UsageError(`${flag} ${given}: expected ${value}`);
      return new Map([...before, [given.slice(0, at), given.slice(at + 1)]]);
    },
  };
}

/** The flags of those options that were given. */
export function given<O extends object>(options: O, ...names: readonly (keyof O & string)[]): string[] {
  return names.filter((name) => options[name] !== undefined && options[name] !== false).map(flagOf);
}

/** The flag of the one that was given, if any. @throws UsageError when several were */
export function exclusive<O extends object>(options: O, ...names: readonly (keyof O & string)[]): string | undefined {
  const flags = given(options, ...names);
  if (flags.length > 1) throw new UsageError(`${flags.join(" and ")} exclude each other`);
  return flags[0];
}

export const as: OptionSpec<ReadonlyMap<string, string>> = assignments(
  "OLD=NEW",
  "Rename a task; OLD is its folder or id. May be given again.",
  "last",
);
export const task: OptionSpec<string> = required(text("ID", "The task."));
/** Belongs to commands that write packs. */
export const key: Maybe<string> = text("KEY.pem", "Sign what is written with this Ed25519 key.");
const READ_FOR =
  "Adapters of kohya and llama.cpp may need it: its folder, config.json, a list of names, a safetensors or GGUF file. PiSSA and OLoRA need weights.";
/** Belongs to commands that check the base of adapters. */
export const base: Maybe<string> = reading(
  "repository",
  text(
    "MODEL",
    `The base model. A safetensors file has its names and shapes checked, and its fingerprints stored. ${READ_FOR}`,
  ),
);
/** Belongs to commands that only read adapters. */
export const readFor: Maybe<string> = reading("repository", text("MODEL", `The base model. ${READ_FOR}`));
export const gauge: Maybe<Gauge> = choice(
  ["as-trained", "balanced"],
  "Balanced: rewrite each pair as U√S, √SVᵀ first. Default: as-trained, or balanced where another option needs it.",
);
export const rank: Maybe<number> = number(
  "N",
  "Keep the N strongest directions of each adapter and module; needs the balanced gauge.",
  from(1),
);
export const normalize: OptionSpec<boolean> = toggle(
  "Give every task equal weight when components are found, however large its update.",
);
export const centering: Maybe<"keep" | "none"> = choice(
  ["keep", "none"],
  "Store the mean of the rows, or use none. Default: keep.",
);
/** Belongs to commands that bring adapters together. */
export const anyBase: OptionSpec<boolean> = toggle("Accept adapters that name different base models.");
const PARTS = ["basis", "coefficients", "head"];
/** Names of number formats in torch, onnxruntime and safetensors. */
const ELSEWHERE: ReadonlyMap<string, string> = new Map([
  ...["fp32", "float32", "float"].map((name) => [name, "f32"] as const),
  ...["fp16", "float16", "half"].map((name) => [name, "f16"] as const),
  ...["bfloat16", "bfp16"].map((name) => [name, "bf16"] as const),
  ...["8", "4", "3"].flatMap((bits) => ["i", "q"].map((letter) => [`${letter}${bits}`, `int${bits}`] as const)),
]);
const NUMBERS = `Number format: ${DTYPES.join(", ")}; or for each part, as basis=int4,coefficients=f16,head=f16.`;
export const dtype: Maybe<Partial<Dtypes>> = {
  value: "TYPE",
  help: `${NUMBERS} Default: f16.`,
  parse(given, flag) {
    const named = (word = ""): string => ELSEWHERE.get(word.toLowerCase()) ?? word;
    const assigned = given.includes("=")
      ? given
          .split(",")
          .map((assignment) => assignment.split("="))
          .map(([part, word]) => [part, named(word)])
      : PARTS.map((part) => [part, named(given)]);
    const check = (word: string, words: readonly string[]): void => {
      if (!words.includes(word)) throw new UsageError(`${flag} ${given}: "${word}" is not one of ${words.join(", ")}`);
    };
    for (const [part = "", word = ""] of assigned) {
      check(part, PARTS);
      check(word, DTYPES);
    }
    return Object.fromEntries(assigned) as Partial<Dtypes>;
  },
};

/** The same for a command that chooses by itself. */
export const dtypeOrChosen: Maybe<Partial<Dtypes>> = {
  ...dtype,
  help: `${NUMBERS} Default: in mode auto those that lose least for their bytes; f16 in the others.`,
};

/** How many components. */
export const amount: { k: Maybe<number>; energy: Maybe<number>; error: Maybe<number> } = {
  k: number("N", "Number of components per module and side.", from(1)),
  energy: number("P", "As many components as keep this share of the squared singular values. Default: 0.9.", {
    expected: "a share above 0, at most 1, such as 0.9 or 90%",
    holds: (n) => n > 0 && n <= 1,
  }),
  error: number("E", "Fewest bytes for which no task's ΔW error exceeds E.", SHARE),
};

/** @throws UsageError for two of them */
export function selection(options: Partial<Values<Pick<typeof amount, "k" | "energy">>>): ComponentSelection {
  exclusive(options, "k", "energy");
  const { k, energy = 0.9 } = options;
  return k === undefined ? { kind: "energy", share: energy } : { kind: "k", k };
}
