/**
 * Own code, since re2js takes 46 kB after gzip where this takes 2, and reads `\w`, `\d`, `\s` and `{,n}` otherwise than Python does.
 *
 * The regular expressions by which PEFT gives modules a rank and a scale of their own (`get_pattern_key` of peft/utils/other.py:
 * `re.match(r"(.*\.)?(PATTERN)$", name)`, the first match counts). Patterns come from untrusted files, and the engines of JavaScript and
 * Python backtrack, which can take exponential time. Here a pattern becomes a nondeterministic automaton that is in all its states at
 * once (Thompson, CACM 11(6), 1968): time grows with pattern × name.
 *
 * Supported: literals, escaped punctuation, `.`, `[…]`, `\d \w \s \D \W \S`, groups `(…)` and `(?:…)`, `|`, `* + ? {m,n}` and
 * their lazy forms, `^` and `$`, each as Python reads it in names without control characters. Lookaround and backreferences have no
 * such automaton, and are refused.
 */

/** Longest pattern, in characters. Patterns of people and of PEFT are mostly names of modules. */
const MAX_LENGTH = 1024;
/** Most states of a pattern: `x{1000}` has one for each copy. */
const MAX_STATES = 8192;
/** Most steps for all names of an adapter, which take seconds. 6 000 modules with a pattern for each need most of them. */
const MAX_STEPS = 300_000_000;

/** Refuses a pattern. @param why ends a sentence about it, and says what to do */
type RefusePattern = (pattern: string, why: string) => Error;

/** Values by pattern. */
export class NamePatterns<T> {
  readonly #patterns: { readonly pattern: string; readonly value: T; readonly automaton: Automaton }[];
  readonly #refuse: RefusePattern;
  readonly #most: number;
  #steps = 0;

  /**
   * @param most steps for all names
   * @throws the error that `refuse` makes, for a pattern that is invalid or not supported
   */
  constructor(
    entries: readonly (readonly [pattern: string, value: T])[],
    refuse: RefusePattern,
    most: number = MAX_STEPS,
  ) {
    this.#refuse = refuse;
    this.#most = most;
    this.#patterns = entries.map(([pattern, value]) => ({ pattern, value, automaton: compile(pattern, refuse) }));
  }

  /**
   * The value of the first pattern that matches the name of a module; undefined where none does.
   * @throws the error that `refuse` makes, when that pattern is not supported or finding it takes too long
   */
  find(name: string): T | undefined {
    const codes = codesOf(name);
    let first: { pattern: string; value: T } | undefined;
    for (const { pattern, value, automaton } of this.#patterns) {
      const before = automaton.steps;
      const matched = automaton.matches(codes);
      this.#steps += automaton.steps - before;
      if (this.#steps > this.#most)
        throw this.#refuse(pattern, "takes too long for the modules there are; write fewer patterns");
      if (!matched) continue;
      // JavaScript objects put numeric keys in front, wherever they were in the file.
      if (first === undefined && !/^\d+$/.test(pattern)) return value;
      if (first !== undefined && first.value !== value) {
        throw this.#refuse(first.pattern, `matches ${name} as another one does; give each module one pattern`);
      }
      first ??= { pattern, value };
    }
    // PEFT looks the name itself up where nothing matches it.
    return (first ?? this.#patterns.find(({ pattern }) => pattern === name))?.value;
  }
}

const codesOf = (text: string): number[] => Array.from(text, (character) => character.codePointAt(0)!);

type CharacterTest = (code: number) => boolean;
type PlaceTest = (index: number, length: number) => boolean;

/** One state: left on a character that `test` accepts, or without one, if the place in the name is the one that `at` asks for. */
interface State {
  readonly test?: CharacterTest;
  readonly at?: PlaceTest;
  to: readonly number[];
}

const DOT = 46;

/** Runs a pattern over names backwards: most patterns are names, and names differ most near their end. */
class Automaton {
  /** States visited by all runs. */
  steps = 0;
  readonly #states: readonly State[];
  readonly #start: number;
  /** The accepting state. */
  readonly #accept: number;
  /** Round in which each state was last put on a list, so that it is followed once per round. */
  readonly #listed: Int32Array;
  /** States of this round and of the next. */
  #now: Int32Array;
  #next: Int32Array;
  #round = 0;

  constructor(states: readonly State[], start: number, accept: number) {
    this.#states = states;
    this.#start = start;
    this.#accept = accept;
    this.#listed = new Int32Array(states.length).fill(-1);
    this.#now = new Int32Array(states.length);
    this.#next = new Int32Array(states.length);
  }

  /** Whether all of a name, or the rest behind one of its dots, matches. */
  matches(codes: readonly number[]): boolean {
    const listed = this.#listed;
    let count = 1;
    this.#now[0] = this.#start;
    // The round before has listed states for one that never came.
    listed[this.#start] = this.#round += 2;
    for (let index = codes.length; index >= 0 && count > 0; index--) {
      const [now, next, round] = [this.#now, this.#next, this.#round];
      let following = 0;
      while (count > 0) {
        const state = now[--count]!;
        this.steps++;
        if (state === this.#accept && (index === 0 || codes[index - 1] === DOT)) return true;
        const { test, at, to } = this.#states[state]!;
        if (test) {
          if (index === 0 || !test(codes[index - 1]!)) continue;
          for (const one of to) {
            if (listed[one] === round + 1) continue;
            listed[one] = round + 1;
            next[following++] = one;
          }
        } else if (!at || at(index, codes.length)) {
          for (const one of to) {
            if (listed[one] === round) continue;
            listed[one] = round;
            now[count++] = one;
          }
        }
      }
      this.#now = next;
      this.#next = now;
      this.#round++;
      count = following;
    }
    return false;
  }
}

/** Adds the states of a part of the pattern, followed by the state `next`. @returns the first state of the part */
type Fragment = (next: number) => number;

function compile(pattern: string, refuse: RefusePattern): Automaton {
  const compiler = new Compiler(pattern, (why) => refuse(pattern, `${why}; write the modules' names instead`));
  return compiler.automaton();
}

const among =
  (expression: RegExp): CharacterTest =>
  (code) =>
    expression.test(String.fromCodePoint(code));
const not =
  (test: CharacterTest): CharacterTest =>
  (code) =>
    !test(code);
/** Classes of characters as Python defines them for a `str`, without control characters. A byte order mark is no space to Python. */
const CLASSES: ReadonlyMap<string, CharacterTest> = new Map(
  (
    [
      ["d", among(/\p{Nd}/u)],
      ["w", among(/[\p{L}\p{N}_]/u)],
      ["s", among(/[^\S\ufeff]/u)],
    ] as const
  ).flatMap(([letter, test]) => [
    [letter, test],
    [letter.toUpperCase(), not(test)],
  ]),
);

/** Compiles a pattern to an automaton by recursive descent. */
class Compiler {
  readonly #pattern: readonly string[];
  readonly #refuse: (why: string) => Error;
  readonly #states: State[] = [];
  #at = 0;

  constructor(pattern: string, refuse: (why: string) => Error) {
    this.#pattern = [...pattern];
    this.#refuse = refuse;
  }

  /** @throws the error that `refuse` makes */
  automaton(): Automaton {
    const { length } = this.#pattern;
    if (length > MAX_LENGTH) throw this.#refuse(`has ${length} characters, ${MAX_LENGTH} at most are read`);
    const part = this.#alternatives();
    if (this.#at < length) throw this.#refuse('has a ")" without "("');
    const accept = this.#add({ to: [] });
    const start = part(accept);
    return new Automaton(this.#states, start, accept);
  }

  #add(state: State): number {
    if (this.#states.length === MAX_STATES)
      throw this.#refuse(`has more than ${MAX_STATES} parts, repetitions counted`);
    return this.#states.push(state) - 1;
  }

  get #next(): string | undefined {
    return this.#pattern[this.#at];
  }

  #take(character: string): boolean {
    if (this.#next !== character) return false;
    this.#at++;
    return true;
  }

  #alternatives(): Fragment {
    const all = [this.#sequence()];
    while (this.#take("|")) all.push(this.#sequence());
    return all.length === 1 ? all[0]! : (next) => this.#add({ to: all.map((part) => part(next)) });
  }

  #sequence(): Fragment {
    const parts: Fragment[] = [];
    while (this.#next !== undefined && this.#next !== "|" && this.#next !== ")") parts.push(this.#repeated());
    // Backwards: the last part of the pattern is met first.
    return (next) => parts.reduce((to, part) => part(to), next);
  }

  #repeated(): Fragment {
    const isPlace = this.#next === "^" || this.#next === "$";
    const part = this.#atom();
    const times = this.#times();
    if (!times) return part;
    if (isPlace) throw this.#refuse('repeats "^" or "$"');
    // A lazy repetition matches what a greedy one does.
    this.#take("?");
    if (this.#next === "+" || this.#times()) throw this.#refuse("repeats a repetition, or is possessive");
    const [least, most] = times;
    return (next) => this.#repeat(part, least, most, next);
  }

  #repeat(part: Fragment, least: number, most: number, next: number): number {
    let to = next;
    let copies = least;
    if (most === Infinity) {
      to = this.#add({ to: [] });
      const again = part(to);
      this.#states[to]!.to = [again, next];
      if (least > 0) [to, copies] = [again, least - 1];
    } else for (let i = least; i < most; i++) to = this.#add({ to: [part(to), next] });
    // A state of its own for each copy, so that copies of nothing count too.
    for (; copies > 0; copies--) to = this.#add({ to: [part(to)] });
    return to;
  }

  /** Reads the least and most times of a repetition, where one begins. */
  #times(): [number, number] | undefined {
    if (this.#take("*")) return [0, Infinity];
    if (this.#take("+")) return [1, Infinity];
    if (this.#take("?")) return [0, 1];
    if (!this.#take("{")) return undefined;
    const end = this.#pattern.indexOf("}", this.#at);
    const [, least = "", comma = "", most = ""] =
      /^(\d*)(,?)(\d*)$/.exec(this.#pattern.slice(this.#at, Math.max(this.#at, end)).join("")) ?? [];
    const times: [number, number] = [Number(least), most ? Number(most) : comma ? Infinity : Number(least)];
    if (least + most === "" || times[0] > times[1])
      throw this.#refuse('has a "{" that begins no repetition such as {2} or {1,3}');
    this.#at = end + 1;
    return times;
  }

  #atom(): Fragment {
    const character = this.#next!;
    if ("*+?{".includes(character)) throw this.#refuse(`has nothing to repeat before "${character}"`);
    this.#at++;
    switch (character) {
      case "(":
        return this.#group();
      case "[":
        return this.#one(this.#set());
      case ".":
        return this.#one(() => true);
      case "^":
        return (next) => this.#add({ at: (index) => index === 0, to: [next] });
      case "$":
        return (next) => this.#add({ at: (index, length) => index === length, to: [next] });
      case "\\":
        return this.#one(this.#escape());
      default:
        return this.#one(character.codePointAt(0)!);
    }
  }

  #one(item: number | CharacterTest): Fragment {
    const test = testOf(item);
    return (next) => this.#add({ test, to: [next] });
  }

  #group(): Fragment {
    if (this.#take("?") && !this.#take(":")) throw this.#refuse(`has a group "(?${this.#next ?? ""}"`);
    const part = this.#alternatives();
    if (!this.#take(")")) throw this.#refuse('has a "(" without ")"');
    return part;
  }

  /** Reads a set in brackets. A "]" that comes first is one of the characters. */
  #set(): CharacterTest {
    const negated = this.#take("^");
    const tests: CharacterTest[] = [];
    do {
      const from = this.#member();
      if (this.#next !== "-" || this.#pattern[this.#at + 1] === "]") {
        tests.push(testOf(from));
        continue;
      }
      this.#at++;
      const to = this.#member();
      if (typeof from !== "number" || typeof to !== "number" || from > to)
        throw this.#refuse("has a range that is none");
      tests.push((code) => from <= code && code <= to);
    } while (!this.#take("]"));
    const some: CharacterTest = (code) => tests.some((test) => test(code));
    return negated ? not(some) : some;
  }

  #member(): number | CharacterTest {
    const character = this.#next;
    if (character === undefined) throw this.#refuse('has a "[" without "]"');
    this.#at++;
    return character === "\\" ? this.#escape() : character.codePointAt(0)!;
  }

  #escape(): number | CharacterTest {
    const character = this.#next;
    if (character === undefined) throw this.#refuse("ends in a backslash");
    this.#at++;
    const test = CLASSES.get(character);
    if (!test && /[A-Za-z\d]/.test(character)) throw this.#refuse(`has "\\${character}"`);
    return test ?? character.codePointAt(0)!;
  }
}

function testOf(item: number | CharacterTest): CharacterTest {
  return typeof item === "number" ? (code) => code === item : item;
}
