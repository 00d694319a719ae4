/**
 * Arguments of a benchmark: options by name, `--json` and `--help`; others are refused by name. Importing this file
 * forbids telemetry.
 */
import { basename } from "node:path";
import { parseArgs } from "node:util";

// onnxruntime-node reads it with its first session: src/cli/main.ts says why.
process.env["ORT_DISABLE_TELEMETRY"] ??= "1";

/**
 * @template T
 * @typedef {{ help: string, value?: string, missing: T, read(text: string): T }} Option
 *   value: what `--help` calls it, absent for a flag; missing: without the option; read: throws Error for a wrong value
 */

/** @param {string} help @returns {Option<boolean>} */
export const flag = (help) => ({ help, missing: false, read: () => true });

/**
 * @template {string | undefined} [D=undefined]
 * @param {string} value
 * @param {string} help
 * @param {D} [missing]
 * @returns {Option<string | D>}
 */
export const text = (value, help, missing) => ({
  help,
  value,
  missing: /** @type {D} */ (missing),
  read: (given) => given,
});

/**
 * @template {number | undefined} [D=undefined]
 * @param {string} help
 * @param {D} [missing]
 * @param {number} [least] it may be. Default: 0
 * @returns {Option<number | D>}
 */
export const number = (help, missing, least = 0) => ({
  help,
  value: "N",
  missing: /** @type {D} */ (missing),
  read(given) {
    const found = Number(given);
    if (given.trim() === "" || !(found >= least)) throw new Error(`expected a number from ${least}, got "${given}"`);
    return found;
  },
});

/**
 * @template {string} const T
 * @template {T | undefined} [D=undefined]
 * @param {readonly T[]} among
 * @param {string} help
 * @param {D} [missing]
 * @returns {Option<T | D>}
 */
export const choice = (among, help, missing) => ({
  help,
  value: among.join("|"),
  missing: /** @type {D} */ (missing),
  read(given) {
    const found = among.find((one) => one === given);
    if (found === undefined) throw new Error(`expected ${among.join(", ")}, got "${given}"`);
    return found;
  },
});

/**
 * Reads the options of the command line; prints help and exits 0 for `--help`, names an error and exits 2 otherwise.
 * @template {Record<string, Option<unknown>>} O
 * @param {string} question that the benchmark answers
 * @param {O} [options]
 * @returns {{ json: boolean } & { [K in keyof O]: O[K] extends Option<infer T> ? T : never }}
 */
export function readArguments(question, options = /** @type {O} */ ({})) {
  const all = { ...options, json: flag("print one JSON object"), help: flag("print this") };
  try {
    const { values } = parseArgs({
      options: Object.fromEntries(
        Object.entries(all).map(([name, { value }]) => [name, { type: value ? "string" : "boolean" }]),
      ),
    });
    if (values.help) {
      process.stdout.write(`${help(question, all)}\n`);
      process.exit(0);
    }
    const read = Object.entries(all).map(([name, option]) => [name, valueOf(name, option, values[name])]);
    return Object.fromEntries(read);
  } catch (error) {
    // Node's message goes on about positional arguments with a dash; there are none here.
    const [reason] = /** @type {Error} */ (error).message.split(". ");
    process.stderr.write(`${scriptName()}: ${reason}; see --help\n`);
    process.exit(2);
  }
}

/** @param {string} name @param {Option<unknown>} option @param {unknown} given */
function valueOf(name, option, given) {
  if (given === undefined) return option.missing;
  try {
    return option.read(String(given));
  } catch (error) {
    throw new Error(`--${name}: ${/** @type {Error} */ (error).message}`);
  }
}

const scriptName = () => basename(process.argv[1] ?? "", ".js");

/** @param {string} question @param {Record<string, Option<unknown>>} options */
function help(question, options) {
  const names = Object.entries(options).map(([name, { value }]) => `--${name}${value ? ` ${value}` : ""}`);
  const width = Math.max(...names.map(({ length }) => length));
  const lines = Object.values(options).map(({ help, value, missing }, i) => {
    const without = value && missing !== undefined ? ` Default: ${missing}.` : "";
    return `  ${names[i].padEnd(width)}  ${help}.${without}`;
  });
  return [`npm run bench ${scriptName()} [options]`, "", question, "", ...lines].join("\n");
}
