/**
 * The errors this package throws: one abstract parent, seven kinds. Each is told by its `tag`, so that a check works
 * across bundles and realms where `instanceof` does not. And checks of what a caller passes to a public function: a
 * wrong argument is a plain `TypeError` or `RangeError`, which says it by name, with what to write instead.
 */

/**
 * Parent of every error thrown on purpose. `cause` holds what was caught, if anything. `At` are its fields; a file, and
 * the part of it, stand in front of the message.
 */
export abstract class EigenLoraError<At extends object = object> extends Error {
  /** Which of the seven kinds this is. */
  abstract readonly tag: "adapter" | "format" | "trust" | "source" | "base" | "task" | "backend";

  constructor(message: string, at: At & { cause?: unknown }) {
    const { cause, ...fields } = at as { file?: string; part?: string; cause?: unknown };
    const place = fields.part === undefined ? fields.file : `${fields.file}, ${fields.part}`;
    super(place === undefined ? message : `${place}: ${message}`, cause === undefined ? undefined : { cause });
    // Fields are declared by the subclasses, not defined: a definition would overwrite what is assigned here.
    for (const [name, value] of Object.entries(fields)) if (value !== undefined) Object.assign(this, { [name]: value });
  }
}

/** An adapter cannot be represented as a canonical adapter. Fix the file named, or convert it as the message says. */
export class AdapterError extends EigenLoraError<{ file: string; field?: string }> {
  readonly tag = "adapter";
  override get name(): string {
    return "AdapterError";
  }
  /** Path or name of the offending file. */
  declare readonly file: string;
  /** The tensor or configuration field at fault, where there is one. */
  declare readonly field?: string;
}

/** Bytes are not what their format says: truncated, damaged, lying or of an unknown version. Fetch or pack again. */
export class FormatError extends EigenLoraError<{ file: string; part: string }> {
  readonly tag = "format";
  override get name(): string {
    return "FormatError";
  }
  /** Name of the source that was read. */
  declare readonly file: string;
  /** The part of the file at fault: "window", "directory", "bases", "task sst2", … */
  declare readonly part: string;
}

/**
 * A pack or task file is not what the caller trusts: another hash, not signed, signed by a stranger, revoked. Do not
 * use it.
 */
export class TrustError extends EigenLoraError<{ file: string }> {
  readonly tag = "trust";
  override get name(): string {
    return "TrustError";
  }
  /** Path or URL of the file. */
  declare readonly file: string;
}

/**
 * Bytes could not be read: network, disk, a server that misbehaves, a file that changed. `transient` says if a retry
 * may help.
 */
export class SourceError extends EigenLoraError<{
  file: string;
  status?: number;
  transient?: boolean;
  retryAfter?: number;
}> {
  readonly tag = "source";
  override get name(): string {
    return "SourceError";
  }
  /** Name of the source: path, or URL without its query. */
  declare readonly file: string;
  /** HTTP status, where the source is a URL that answered. */
  declare readonly status?: number;
  /** True when the same may work later: a network fault, a busy server. It was tried again already. */
  declare readonly transient?: boolean;
  /** Milliseconds after which the server wants to be asked again. */
  declare readonly retryAfter?: number;
}

/** Pack and base model do not belong together: a module is missing, ambiguous, of another shape or of another model. */
export class BaseMismatchError extends EigenLoraError<{
  module: string;
  expected?: unknown;
  found?: unknown;
  candidates?: readonly string[];
}> {
  readonly tag = "base";
  override get name(): string {
    return "BaseMismatchError";
  }
  /** The adapted module at fault. */
  declare readonly module: string;
  declare readonly expected?: unknown;
  declare readonly found?: unknown;
  /** Nearest names in the base, where the name was at fault. */
  declare readonly candidates?: readonly string[];
}

/** A task cannot be used as asked: unknown id, duplicate id, a blend its kind does not allow. The active task stays. */
export class TaskError extends EigenLoraError<{ task: string; nearest?: readonly string[]; loss?: number }> {
  readonly tag = "task";
  override get name(): string {
    return "TaskError";
  }
  declare readonly task: string;
  /** Ids of the tasks most like the one asked for, nearest first. */
  declare readonly nearest?: readonly string[];
  /** The share of its ΔW that the task would lose, where that is too much. */
  declare readonly loss?: number;
}

/** No backend could start, or the one in use failed. `reasons` says what each one tried said. */
export class BackendError extends EigenLoraError<{ backend: string; reasons?: readonly string[] }> {
  readonly tag = "backend";
  override get name(): string {
    return "BackendError";
  }
  declare readonly backend: string;
  declare readonly reasons: readonly string[];

  constructor(message: string, at: { backend: string; reasons?: readonly string[]; cause?: unknown }) {
    super(message, { reasons: [], ...at });
  }
}

// Checks of arguments: unknown options, words that are none of the choices, and values that are something else than
// expected.

/** A list of all keys of `Options`; a list that lacks one does not compile. */
type AllKeys<Options, Names extends readonly string[]> = [Exclude<keyof Options, Names[number]>] extends [never]
  ? Names
  : { readonly "the list of known options lacks": Exclude<keyof Options, Names[number]> };

/**
 * @param where the public function, for the message
 * @param known all options there are; the compiler refuses a list that lacks one
 * @throws TypeError when `options` is no plain object or has an option that is not known
 * @example
 * checkOptions("openPack", options, ["signal", "fetch"]);
 */
export function checkOptions<Options extends object, const Names extends readonly (keyof Options & string)[]>(
  where: string,
  options: Options,
  known: Names & AllKeys<Options, Names>,
): void {
  if (!isPlain(options)) throw new TypeError(`${where}: expected an object of options, got ${described(options)}`);
  for (const name of Object.keys(options)) {
    if ((known as Names).includes(name as Names[number])) continue;
    const [meant] = nearest(name, known as Names);
    const advice = meant ? `did you mean "${meant}"?` : `known are ${(known as Names).join(", ")}`;
    throw new TypeError(`${where}: unknown option "${name}"; ${advice}`);
  }
}

/** Tells if a value is an object written as a literal, of whatever realm: no array, promise, map or file. */
export function isPlain(value: unknown): value is Record<string, unknown> {
  if (typeof value !== "object" || !value) return false;
  const prototype: unknown = Object.getPrototypeOf(value);
  return !prototype || !Object.getPrototypeOf(prototype);
}

/**
 * @param name of the option or argument
 * @param choices of at least two words
 * @throws RangeError when `value` is none of the choices
 */
export function checkChoice(name: string, value: unknown, choices: readonly string[]): void {
  if (choices.includes(value as string)) return;
  const words = choices.map(described);
  const last = words.pop();
  throw new RangeError(`${name}: expected ${words.join(", ")} or ${last}, got ${described(value)}`);
}

/**
 * @param expected what the argument should be, and where to get it: "an open pack (await openPack(…))"
 * @param member something that every such object has
 * @throws TypeError when `value` is no object with that member
 */
export function checkArgument(where: string, value: unknown, expected: string, member: string): void {
  if (typeof value === "object" && value && member in value) return;
  throw new TypeError(`${where}: expected ${expected}, got ${described(value)}`);
}

/** @throws TypeError when `pack` is not what `openPack` resolves to */
export function checkPack(where: string, pack: unknown): void {
  checkArgument(where, pack, "an open pack (await openPack(…))", "basisId");
}

/**
 * @param expected what the list should hold, and where to get it: "adapters (await readAdapters(…))"
 * @throws TypeError when `value` is no list
 */
export function checkList(where: string, value: unknown, expected: string): void {
  if (!Array.isArray(value)) throw new TypeError(`${where}: expected a list of ${expected}, got ${described(value)}`);
}

/** A value for a message: what it is, and what is wrong where that can be told. */
export function described(value: unknown): string {
  if (typeof value === "string") return JSON.stringify(value);
  if (typeof value !== "object" || !value) return typeof value === "function" ? "a function" : String(value);
  if (typeof (value as PromiseLike<unknown>).then === "function") return "a promise; did you forget await?";
  return `an object (${(value as Partial<object>).constructor?.name ?? "plain"})`;
}

/**
 * Longer names are alike only where one contains the other: the steps of an edit distance are the product of both
 * lengths.
 */
const MOST_COMPARED = 100;
/** A letter or two are in every other name. */
const LEAST_CONTAINED = 3;
/** The share of the longer name that may differ. */
const MOST_DIFFERENT = 0.45;

/**
 * Up to three of `names` most like `name`, nearest first: one of the two contains the other, or the edit distance is
 * small.
 */
export function nearest(name: string, names: Iterable<string>): string[] {
  // A caller without types may pass anything.
  name = String(name);
  const scored: [number, string][] = [];
  for (const other of names) {
    const [short, long] = name.length < other.length ? [name, other] : [other, name];
    const longer = long.length - short.length;
    const most = MOST_DIFFERENT * long.length;
    let distance = longer;
    if (short.length >= LEAST_CONTAINED && long.includes(short)) distance /= 4;
    else if (longer <= most) distance = long.length > MOST_COMPARED ? Infinity : editDistance(name, other);
    if (distance <= most) scored.push([distance, other]);
  }
  return scored
    .sort((a, b) => a[0] - b[0] || (a[1] < b[1] ? -1 : 1))
    .slice(0, 3)
    .map(([, other]) => other);
}

/** Letters put in, left out, changed, or swapped with their neighbour. */
function editDistance(a: string, b: string): number {
  const rows = [Array.from({ length: b.length + 1 }, (_, j) => j)];
  for (let i = 1; i <= a.length; i++) {
    const above = rows[i - 1]!;
    const row = [i];
    for (let j = 1; j <= b.length; j++) {
      const change = above[j - 1]! + (a[i - 1] === b[j - 1] ? 0 : 1);
      const swap = a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1] ? rows[i - 2]![j - 2]! + 1 : change;
      row.push(Math.min(change, swap, above[j]! + 1, row[j - 1]! + 1));
    }
    rows.push(row);
  }
  return rows[a.length]![b.length]!;
}

/** The first few names, and the number of others. */
export function listed(names: readonly string[], most = 5): string {
  return names.slice(0, most).join(", ") + (names.length > most ? `, and ${names.length - most} more` : "");
}
