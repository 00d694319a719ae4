/**
 * The regular expressions by which PEFT gives modules a rank and a scale of their own (`get_pattern_key` of peft/utils/other.py:
 * `re.match(r"(.*\.)?(PATTERN)$", name)`, the first match counts). Patterns come from untrusted files, and engines backtrack, which can
 * take exponential time. So repeated groups are refused, and the ways to match what is left are counted before the engine runs.
 *
 * Supported: literals, escaped punctuation, `.`, `[…]`, `\d \w \s \D \W \S`, groups `(…)` and `(?:…)` and their `?`, `|`,
 * `* + ? {m,n}` of a character and their lazy forms, `^` and `$`, each as Python reads it in names without control characters.
 */

/** Longest pattern, in characters. Patterns of people and of PEFT are mostly names of modules. */
const MAX_LENGTH = 1024;
/** Most characters compared for all names of an adapter, which take seconds. 6 000 modules with a pattern for each need a quarter. */
const MAX_COMPARED = 1e10;

/** Refuses a pattern. @param why ends a sentence about it, and says what to do */
type RefusePattern = (pattern: string, why: string) => Error;

interface Compiled {
  readonly expression: RegExp;
  /** Combinations of alternatives and of bounded repetitions. */
  readonly ways: number;
  /** Number of repetitions without a bound. */
  readonly unbounded: number;
}

/** Values by pattern. */
export class NamePatterns<T> {
  readonly #patterns: readonly (readonly [pattern: string, value: T, compiled: Compiled])[];
  readonly #refuse: RefusePattern;
  #compared = 0;

  /** @throws the error that `refuse` makes, for a pattern that is invalid or not supported */
  constructor(entries: readonly (readonly [pattern: string, value: T])[], refuse: RefusePattern) {
    this.#refuse = refuse;
    this.#patterns = entries.map(([pattern, value]) => [
      pattern,
      value,
      compile(pattern, (why) => refuse(pattern, `${why}; write the modules' names instead`)),
    ]);
  }

  /**
   * The value of the first pattern that matches the name of a module; undefined where none does.
   * @throws the error that `refuse` makes, where several patterns match, or all together may take too long
   */
  find(name: string): T | undefined {
    const starts = [0, ...[...name.matchAll(/\./g)].map(({ index }) => index + 1)];
    let first: { pattern: string; value: T } | undefined;
    for (const [pattern, value, { expression, ways, unbounded }] of this.#patterns) {
      for (const start of starts) this.#compared += pattern.length * ways * splits(name.length - start, unbounded);
      if (this.#compared > MAX_COMPARED)
        throw this.#refuse(pattern, "may take too long for the modules there are; write fewer patterns, or names");
      if (!expression.test(name)) continue;
      // JavaScript objects put numeric keys in front, wherever they were in the file.
      if (first === undefined && !/^\d+$/.test(pattern)) return value;
      if (first !== undefined && first.value !== value)
        throw this.#refuse(first.pattern, `matches ${name} as another one does; give each module one pattern`);
      first ??= { pattern, value };
    }
    // PEFT looks the name itself up where nothing matches it.
    return first?.value ?? this.#patterns.find(([pattern]) => pattern === name)?.[1];
  }
}

/** Ways to divide `length` characters among some repetitions and the rest: a binomial coefficient. */
function splits(length: number, repetitions: number): number {
  let ways = 1;
  for (let i = 1; i <= repetitions; i++) ways *= (length + i) / i;
  return ways;
}

/** Classes as Python defines them for a `str`, as members of a set. A byte order mark is no space to Python. */
const CLASSES: ReadonlyMap<string, string> = new Map([
  ["\\d", "\\p{Nd}"],
  ["\\w", "\\p{L}\\p{N}_"],
  ["\\s", "\\p{White_Space}"],
]);
/** The beginning of a group, a set, an escape, a repetition, or any other character. */
const PIECE = /\((?:\?.?)?|\[\^?\]?(?:\\.|[^\]\\])*\]|\\.|(?:[*+?]|\{\d*,?\d*\})\??|./gsu;
const REPETITION = /^(?:([*+?])|\{(\d*)(,?)(\d*)\})\??$/;

/** @param refuse makes an error of a reason */
function compile(pattern: string, refuse: (why: string) => Error): Compiled {
  if (pattern.length > MAX_LENGTH) throw refuse(`has ${pattern.length} characters, ${MAX_LENGTH} at most are read`);
  let source = "";
  let unbounded = 0;
  /** Ways of the open groups, the innermost last: those of earlier alternatives, and of this one. */
  const open = [{ earlier: 0, ways: 1 }];
  let before: "nothing" | "character" | "group" | "place" | "repetition" = "nothing";
  for (const [piece] of pattern.matchAll(PIECE)) {
    const repetition = REPETITION.exec(piece);
    if (repetition) {
      if (before === "nothing") throw refuse(`has nothing to repeat before "${piece[0]}"`);
      if (before === "place") throw refuse('repeats "^" or "$"');
      if (before === "repetition") throw refuse("repeats a repetition, or is possessive");
      if (before === "group" && repetition[1] !== "?") throw refuse("repeats a group");
      const [, sign, from = "", comma = "", to = ""] = repetition;
      const least = sign === "+" ? 1 : Number(from);
      const most = sign === "?" ? 1 : sign || (comma && !to) ? Infinity : Number(to || from);
      if (least > most || (!sign && from + to === ""))
        throw refuse('has a "{" that begins no repetition such as {2} or {1,3}');
      if (most === Infinity) unbounded++;
      else open.at(-1)!.ways *= most - least + 1;
      // A lazy repetition matches what a greedy one does.
      source += sign ?? `{${from || 0}${comma}${to}}`;
      before = "repetition";
    } else if (piece.startsWith("(")) {
      if (piece !== "(" && piece !== "(?:") throw refuse(`has a group "${piece}"`);
      open.push({ earlier: 0, ways: 1 });
      source += "(?:";
      before = "nothing";
    } else if (piece === ")") {
      const { earlier, ways } = open.pop()!;
      if (open.length === 0) throw refuse('has a ")" without "("');
      open.at(-1)!.ways *= earlier + ways;
      source += ")";
      before = "group";
    } else if (piece === "|") {
      const { earlier, ways } = open.pop()!;
      open.push({ earlier: earlier + ways, ways: 1 });
      source += "|";
      before = "nothing";
    } else {
      before = piece === "^" || piece === "$" ? "place" : "character";
      source += before === "place" || piece === "." ? piece : characterOf(piece, refuse);
    }
  }
  if (open.length > 1) throw refuse('has a "(" without ")"');
  const [{ earlier, ways }] = open as [{ earlier: number; ways: number }];
  return { expression: new RegExp(`(?:^|\\.)(?:${source})$`, "su"), ways: earlier + ways, unbounded };
}

/** One character or set, as JavaScript writes it. */
function characterOf(piece: string, refuse: (why: string) => Error): string {
  if (piece.length > 1 && piece.startsWith("[")) return setOf(piece, refuse);
  if (piece === "[") throw refuse('has a "[" without "]"');
  if (piece === "{") throw refuse('has a "{" that begins no repetition such as {2} or {1,3}');
  if (piece === "\\") throw refuse("ends in a backslash");
  const members = CLASSES.get(piece.toLowerCase());
  return members ? `[${piece === piece.toLowerCase() ? "" : "^"}${members}]` : literal(piece, refuse);
}

/** A set in brackets. A "]" that comes first is one of its characters. */
function setOf(piece: string, refuse: (why: string) => Error): string {
  const [, negated = "", inside = ""] = /^\[(\^?)(.*)\]$/su.exec(piece)!;
  if (inside === "") throw refuse('has a "[" without "]"');
  const members = inside.replace(/(\\.|.)(?:-(\\.|.))?/gsu, (_, from: string, to?: string) => {
    if (to === undefined) return CLASSES.get(from) ?? literal(from, refuse);
    if (CLASSES.has(from) || CLASSES.has(to) || plain(from) > plain(to)) throw refuse("has a range that is none");
    return `${literal(from, refuse)}-${literal(to, refuse)}`;
  });
  return `[${negated}${members}]`;
}

/** A character that may be escaped, by its number. */
function literal(piece: string, refuse: (why: string) => Error): string {
  if (/^\\[A-Za-z\d]/.test(piece)) throw refuse(`has "${piece}"`);
  return `\\u{${plain(piece).toString(16)}}`;
}

const plain = (piece: string): number => piece.codePointAt(/^\\./s.test(piece) ? 1 : 0)!;
