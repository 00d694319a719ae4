/**
 * Options of commands: the table of a command gives their values, checks, conflicts and help. Those of several commands
 * are here.
 */
import { nearest } from "../errors.ts";
import type { ComponentSelection, Gauge } from "../extract/components.ts";
import { fromIntegrity } from "../format/fields.ts";
import { DTYPES, type Dtypes } from "../tensor/dtypes.ts";

/** A wrong command line: exit code 2. */
export class UsageError extends Error {
  readonly tag = "usage";
}

/**
 * Purpose of a name that may be one of the Hugging Face Hub: a single file, by its path in a repository; a repository
 * of adapters or a base; a model to run, with its other files; or the weights of a model, which may be named by their
 * folder. `own` is a file that the command changes, so it must be on the disk.
 */
export type ReadAs = "file" | "repository" | "model" | "weights" | "own";

/** An option; its name is that of the property which holds it, in kebab case. */
export interface OptionSpec<T> {
  readonly help: string;
  /** Placeholder of its value in help; a switch has none. */
  readonly value?: string;
  /** Its short form in front, as "-o, ". */
  readonly short?: string;
  readonly group?: string;
  /** Listed by `--help --all` only. */
  readonly rare?: boolean;
  readonly required?: boolean;
  /** The option has no effect unless one of these is given. */
  readonly needs?: readonly string[];
  /** Reason by name of an option that cannot be given together with this one. */
  readonly excludes?: Readonly<Record<string, string>>;
  readonly reads?: ReadAs;
  readonly default?: T;
  /** @throws UsageError with the values that are accepted */
  parse(text: string, flag: string, before: T | undefined): T;
}

export type Options = Readonly<Record<string, OptionSpec<unknown>>>;

/** Values of options, as a command gets them. */
export type Values<O extends Options> = { readonly [K in keyof O]: O[K] extends OptionSpec<infer T> ? T : never };

export type Maybe<T> = OptionSpec<T | undefined>;

/** `privateTerms` → `--private-terms` */
export function flagOf(name: string): string {
  return `--${name.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`;
}

/** Adds the same fields to several options. */
export function each<O extends Options>(fields: Partial<Omit<OptionSpec<never>, "parse">>, options: O): O {
  return Object.fromEntries(Object.entries(options).map(([name, spec]) => [name, { ...spec, ...fields }])) as O;
}

/** Puts options under a heading of their own in help. */
export function group<O extends Options>(heading: string, options: O): O {
  return each({ group: `${heading}:` }, options);
}

/** Options that exclude each other. */
export function oneOf<O extends Options>(options: O): O {
  const excludes = Object.fromEntries(Object.keys(options).map((name) => [name, ""]));
  const entries = Object.entries(options).map(([name, spec]) => {
    const { [name]: _, ...others } = excludes;
    return [name, { ...spec, excludes: { ...others, ...spec.excludes } }];
  });
  return Object.fromEntries(entries) as O;
}

export function byDefault<T>(value: NoInfer<T>, spec: Maybe<T>): OptionSpec<T> {
  return { ...spec, default: value } as OptionSpec<T>;
}

export function required<T>(spec: OptionSpec<T>): OptionSpec<Exclude<T, undefined>> {
  return { ...spec, required: true } as OptionSpec<Exclude<T, undefined>>;
}

export function toggle(help: string): OptionSpec<boolean> {
  return { help, default: false, parse: () => true };
}

export function text(value: string, help: string, reads?: ReadAs): Maybe<string> {
  return { value, help, ...(reads && { reads }), parse: (given) => given };
}

/** Destination of a command. */
export function output(value: string, help: string): OptionSpec<string> {
  return required({ ...text(value, help), short: "-o, " });
}

/** An option that may be given several times. */
export function list(value: string, help: string): OptionSpec<readonly string[]> {
  return {
    value,
    help: `${help} May be given again.`,
    default: [],
    parse: (given, _, before = []) => [...before, given],
  };
}

/** A number's range, with its name in messages. */
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
    throw new UsageError(`${flag} ${given}: expected ${expected}`);
  };
  return { value, help, parse };
}

const OR = new Intl.ListFormat("en-GB", { type: "disjunction" });

export function choice<const T extends string>(choices: readonly T[], help: string): Maybe<T> {
  const parse = (given: string, flag: string): T => {
    const found = choices.find((word) => word === given);
    if (found === undefined) throw new UsageError(`${flag} ${given}: expected ${OR.format(choices)}`);
    return found;
  };
  return { value: choices.join("|"), help, parse };
}

/** `LEFT=RIGHT`, any number of times. @param cut which of several "=" separates the two */
function assignments(value: string, help: string, cut: "first" | "last"): OptionSpec<ReadonlyMap<string, string>> {
  return {
    value,
    help: `${help} May be given again.`,
    default: new Map(),
    parse(given, flag, before = new Map()) {
      const at = cut === "first" ? given.indexOf("=") : given.lastIndexOf("=");
      if (at < 1 || at === given.length - 1) throw new UsageError(`${flag} ${given}: expected ${value}`);
      return new Map([...before, [given.slice(0, at), given.slice(at + 1)]]);
    },
  };
}

// Options of several commands.

export const force: OptionSpec<boolean> = toggle("Replace existing files.");
export const as: OptionSpec<ReadonlyMap<string, string>> = assignments(
  "OLD=NEW",
  "Rename a task; OLD is its folder or id.",
  "last",
);
export const task: Maybe<string> = text("ID", "The task.");
export const key: Maybe<string> = text("KEY.pem", "Sign what is written with this Ed25519 key.");
const READ_FOR =
  "Adapters of kohya and llama.cpp may need it: its folder, config.json, a list of names, a safetensors or GGUF file. PiSSA and OLoRA need weights.";
export const base: Maybe<string> = text(
  "MODEL",
  `The base model. A safetensors file has its names and shapes checked, and its fingerprints stored. ${READ_FOR}`,
  "repository",
);
export const readFor: Maybe<string> = text("MODEL", `The base model. ${READ_FOR}`, "repository");
export const anyBase: OptionSpec<boolean> = toggle("Accept adapters that name different base models.");

/** Hashes of tasks to refuse; `Run` enforces it. */
export const revoked: OptionSpec<readonly string[]> = {
  ...list("sha256-…", "Refuse a task with this hash, as inspect --json and verify print it."),
  parse(given, flag, before = []) {
    try {
      fromIntegrity(given);
    } catch (error) {
      throw new UsageError(`${flag}: ${(error as Error).message}`);
    }
    return [...before, given];
  },
};

/** Limit of expansion without a base; `Run` enforces it. */
export const maxExpansion: Maybe<number> = {
  ...number("N", "How many times the bytes stored for it a task may become. Default: 1024.", {
    expected: "a number above 0",
    holds: (n) => n > 0,
  }),
  rare: true,
};

export const gauge: Maybe<Gauge> = choice(
  ["as-trained", "balanced"],
  "Balanced: rewrite each pair as U√S, √SVᵀ first. Default: as-trained, or balanced where another option needs it.",
);
export const rank: Maybe<number> = number("N", "Keep the N strongest directions of each adapter and module.", from(1));

/** Number formats of these parts of a pack. */
export function dtype(...parts: readonly (keyof Dtypes)[]): Maybe<Partial<Dtypes>> {
  const each = parts.length > 1 ? `; or for each part, as ${parts.map((part) => `${part}=f16`).join(",")}` : "";
  return {
    value: "TYPE",
    help: `Number format: ${DTYPES.join(", ")}${each}. Default: f16.`,
    parse(given, flag) {
      const pairs = given.includes("=")
        ? given.split(",").map((pair) => pair.split("="))
        : parts.map((part) => [part, given]);
      const checked = (word = "", words: readonly string[]): string => {
        if (words.includes(word)) return word;
        throw new UsageError(`${flag} ${given}: "${word}" is not one of ${words.join(", ")}`);
      };
      return Object.fromEntries(pairs.map(([part, word]) => [checked(part, parts), checked(word, DTYPES)]));
    },
  };
}

export const k: Maybe<number> = number("N", "Number of components per module and side.", from(1));
export const energy: Maybe<number> = number(
  "P",
  "As many components as keep this share of the squared singular values. Default: 0.9.",
  { expected: "a share above 0, at most 1, such as 0.9 or 90%", holds: (n) => n > 0 && n <= 1 },
);

export function selection({
  k,
  energy = 0.9,
}: Partial<Record<"k" | "energy", number | undefined>>): ComponentSelection {
  return k === undefined ? { kind: "energy", share: energy } : { kind: "k", k };
}

export const names: OptionSpec<ReadonlyMap<string, string>> = assignments(
  "MODULE=WEIGHT",
  "The model's name for a module that is not found.",
  "first",
);
export const match: {
  names: OptionSpec<ReadonlyMap<string, string>>;
  ignore: OptionSpec<readonly string[]>;
  anyBase: OptionSpec<boolean>;
} = {
  names,
  ignore: list("NAME", "Leave out a parameter or module of the tasks, such as classifier."),
  anyBase: toggle("Accept a model whose weights do not match the pack's fingerprints."),
};

export const runsOn: {
  tokens: Maybe<number>;
  tokenizer: Maybe<string>;
} = {
  tokens: number(
    "N",
    "Cut texts to N tokens; a prompt with its completion may not be longer. Default: 128; 512 for completions and templates.",
    from(1),
  ),
  tokenizer: text(
    "FILE",
    "The model's tokenizer. Default: tokenizer.json beside the model or one folder above. Needs @huggingface/tokenizers.",
  ),
};

export const judged: {
  minutes: Maybe<number>;
  text: Maybe<string>;
  agreement: Maybe<number>;
} & typeof runsOn = each(
  { needs: ["model"] },
  {
    minutes: number(
      "N",
      "Begin no further task after so many minutes. Tasks that are left are stored as without a model, and the exit code is 3. Default: no limit.",
      POSITIVE,
    ),
    text: text(
      "LINES.txt",
      "Text like that of the tasks, one on each line, or JSON lines as learn takes them; never your test data. Default: made of the words of the model's tokenizer.",
    ),
    ...each(
      { rare: true },
      {
        agreement: number(
          "P",
          "The least agreement of a task's answers with its adapter's; others are stored closer. Default: 0.96 of labels, 0.98 of a language model's answers, 0.99 of all tokens of texts.",
          SHARE,
        ),
        ...runsOn,
      },
    ),
  },
);

/** @throws UsageError for a name of no module: a typing error would map nothing without a word */
export function refuseUnknown(
  names: ReadonlyMap<string, string>,
  modules: Iterable<{ readonly name: string }>,
  file: string,
): void {
  const known = new Set(names.size > 0 ? [...modules].map(({ name }) => name) : []);
  for (const module of names.keys()) {
    if (known.has(module)) continue;
    const close = nearest(module, known);
    const found = close.length > 0 ? `; the nearest are ${close.join(", ")}` : "";
    throw new UsageError(`--names ${module}=…: ${file} adapts no such module${found}`);
  }
}

/** Options that the library calls by another name. */
const ALIASES: ReadonlyMap<string, string> = new Map([
  ["keys", "key"],
  ["rename", "as"],
]);

/**
 * A message of the library, with flags of a command in place of its options: `` `name` ``, `` `name: value` `` or
 * `name: value`.
 */
export function inFlags(message: string, options: Options): string {
  const option = /(?:the option )?`(\w+)(?:: ([\w.]+))?`|\b(\w+): (true|[\d.]+|\["[^"]*"\])/g;
  // The library has no such option for a base.
  const said = options["names"]
    ? message.replace("let the base list them by the module's", "map them with `names`")
    : message;
  return said.replaceAll(option, (said, quoted?: string, first?: string, plain = quoted, value = first) => {
    const name = ALIASES.get(plain) ?? plain;
    const spec = options[name];
    if (!spec) return said;
    const word =
      value === "true"
        ? undefined
        : (value?.replace(/^\["|"\]$/g, "") ?? (spec.value?.includes("=") ? spec.value : undefined));
    return word === undefined ? flagOf(name) : `${flagOf(name)} ${word}`;
  });
}
