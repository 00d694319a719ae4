/**
 * How commands find the modules of a pack in a base or a model: the options that they share, and what the library says of its own
 * options, in their words.
 */
import { nearest } from "../arguments.ts";
import { assignments, list, type OptionSpec, type Options, toggle, UsageError } from "./options.ts";
import type { Run } from "./run.ts";

export const names: OptionSpec<ReadonlyMap<string, string>> = assignments(
  "MODULE=WEIGHT",
  "The model's name for a module that is not found. May be given again.",
  "first",
);
/** Options of commands that put a pack on a model. */
export const match: {
  names: OptionSpec<ReadonlyMap<string, string>>;
  ignore: OptionSpec<readonly string[]>;
  anyBase: OptionSpec<boolean>;
} = {
  names,
  ignore: list("NAME", "Leave out a parameter or module of the tasks, such as classifier. May be given again."),
  anyBase: toggle("Accept a model whose weights do not match the pack's fingerprints."),
};

/** @throws UsageError for a name of no module: a typing error would map nothing without a word */
export function refuseUnknown(
  names: ReadonlyMap<string, string>,
  modules: Iterable<{ readonly name: string }>,
  file: string,
): void {
  if (names.size === 0) return;
  const known = new Set([...modules].map(({ name }) => name));
  for (const module of names.keys()) {
    if (known.has(module)) continue;
    const close = nearest(module, known);
    const found = close.length > 0 ? `; the nearest are ${close.join(", ")}` : "";
    throw new UsageError(`--names ${module}=…: ${file} adapts no such module${found}`);
  }
}

/**
 * Checks the arguments of commands that take a model and a pack.
 * @throws UsageError when each stands where the other should
 */
export async function refuseSwapped(model: string, pack: string, run: Run): Promise<void> {
  const [first, second] = [await run.kindOf(model), await run.kindOf(pack)];
  if (first !== "an EigenLoRA pack" || second !== "an ONNX model") return;
  throw new UsageError(`${model} is ${first} and ${pack} ${second}; did you swap the two? The model comes first`);
}

/** What the library calls its options, and what they are here. */
const WORDS: readonly (readonly [option: string, said: RegExp, flag: string])[] = [
  ["names", /the option `names`/g, "--names MODULE=WEIGHT"],
  ["names", /let the base list them by the module's/g, "map them with --names MODULE=WEIGHT"],
  ["ignore", /ignore: \["([^"]*)"\]/g, "--ignore $1"],
  ["anyBase", /anyBase: true/g, "--any-base"],
  ["base", /pass `base`/g, "pass --base"],
  ["maxExpansion", /open the pack with maxExpansion: /g, "give --max-expansion "],
  ["as", /with rename/g, "with --as"],
  ["maxLoss", /pass `maxLoss: ([\d.]+)`/g, "allow it with --max-loss $1"],
  ["beside", /, or leave it out with the option `modules`/g, ""],
  ["key", /and `keys` were given/g, "and --key was given"],
  ["key", /none of `keys`/g, "none of those given with --key"],
];

/** A message of the library in the words of a command with these options. */
export function inFlags(message: string, options: Options): string {
  let said = message;
  for (const [option, theirs, flag] of WORDS) if (option in options) said = said.replaceAll(theirs, flag);
  return said;
}
