/** Patterns of adapter_config.json: they match what Python's `re` matches, in time that no pattern makes exponential. */
import { execFileSync } from "node:child_process";
import fc from "fast-check";
import t from "tap";
import { NamePatterns } from "../support/internals/pack.ts";
import { python, runs, skip } from "../support/required.ts";

const refuse = (pattern: string, why: string): Error => new SyntaxError(`${pattern} ${why}`);
const patternsOf = <T>(...entries: [string, T][]): NamePatterns<T> => new NamePatterns(entries, refuse);
const matches = (pattern: string, name: string): boolean => patternsOf([pattern, true]).find(name) === true;

/** The same; undefined for a pattern that may take too long. */
function matchesInTime(pattern: string, name: string): boolean | undefined {
  try {
    return matches(pattern, name);
  } catch (error) {
    if (/may take too long/.test((error as Error).message)) return undefined;
    throw error;
  }
}

/** PEFT's question to Python, asked of JavaScript's engine: the same for ASCII. */
const byEngine = (pattern: string, name: string): boolean => new RegExp(`^(.*\\.)?(${pattern})$`).test(name);

t.test("what each construct matches", async (t) => {
  const name = "model.layers.12.self_attn.q_proj";
  const cases: [pattern: string, matched: boolean][] = [
    ["q_proj", true],
    ["self_attn.q_proj", true],
    ["proj", false],
    ["layers", false],
    ["^q_proj", false],
    ["^model\\.layers\\.12\\.self_attn\\.q_proj$", true],
    ["^model.*", true],
    [".*attn.*", true],
    ["[qkv]_proj", true],
    ["[^qkv]_proj", false],
    ["(q|k|v)_proj", true],
    ["q_proj|k_proj", true],
    ["layers\\.\\d+\\.self_attn\\.(?:q|v)_proj", true],
    ["layers.[0-9]{2}.*", true],
    ["layers.[0-9]{3}.*", false],
    ["layers.1{1,}2{,1}.+", true],
    ["layers.(1[0-5]|[2-9])\\..*q_proj", true],
    ["\\w+", true],
    ["\\W+", false],
    ["q\\_pro[]j]", true],
    ["q\\_pro[]x[j]", true],
    ["q{,}_proj", true],
    ["(q_proj)?", true],
    ["(k_proj)?", false],
    [".*?q_proj??", true],
    ["x+x+y", false],
    ["", false],
  ];
  for (const [pattern, matched] of cases) t.equal(matches(pattern, name), matched, pattern);
  t.equal(matches("", "ends."), true);
  t.equal(matches("c\\+\\(d\\)", "c+(d)"), true);
  t.equal(matches("c+(d)", "c+(d)"), true, "PEFT looks up what nothing matches");
  t.equal(matches("\\w", "é"), true, "by Unicode, as Python");
  t.equal(matches("\\d", "٣"), true);
  t.equal(matches("\\s", "\ufeff"), false);
  t.equal(matches(".", "😀"), true, "a character is one, however many units it has");
});

t.test("the first pattern counts, and a key that is a number must not matter", async (t) => {
  t.equal(patternsOf(["q|v", 1], ["q", 2]).find("a.q"), 1);
  t.equal(patternsOf(["k", 1], ["q", 2]).find("a.q"), 2);
  t.equal(patternsOf(["k", 1]).find("a.q"), undefined);
  t.equal(patternsOf(["0", 1], ["mlp.0", 1]).find("mlp.0"), 1);
  t.equal(patternsOf(["0", 1], ["mlp.1", 2]).find("mlp.0"), 1);
  t.throws(() => patternsOf(["0", 1], ["mlp.*", 2]).find("mlp.0"), {
    message: /^0 matches mlp.0 as another one does; /,
  });
});

t.test("what is refused, by name", async (t) => {
  const cases: [string, RegExp][] = [
    ["(?!x)q", /has a group "\(\?!"/],
    ["(?<=x)q", /has a group "\(\?<"/],
    ["(?P<x>q)", /has a group "\(\?P"/],
    ["(?i)q", /has a group "\(\?i"/],
    ["(?", /has a group "\(\?"/],
    ["(q)\\1", /has "\\1"/],
    ["\\bq", /has "\\b"/],
    ["\\Aq", /has "\\A"/],
    ["q\\", /is no regular expression/],
    ["(q", /is no regular expression/],
    ["q)", /has a "\)" without "\("/],
    ["[q", /has a "\[" without "\]"/],
    ["[^]", /has a "\[" without "\]"/],
    ["[]", /has a "\[" without "\]"/],
    ["[z-a]", /is no regular expression/],
    ["[\\d-z]", /is no regular expression/],
    ["*", /is no regular expression/],
    ["q|+", /is no regular expression/],
    ["^*q", /is no regular expression/],
    ["q*+", /is no regular expression/],
    ["q**", /is no regular expression/],
    ["q{2}{3}", /is no regular expression/],
    ["q{3,2}", /is no regular expression/],
    ["q{x}", /is no regular expression/],
    ["q{", /is no regular expression/],
    ["[\\W]", /has "\\W"/],
    ["q".repeat(1025), /has 1025 characters, 1024 at most/],
    ["(x+x+)+y", /repeats a group/],
    ["(x|x)*y", /repeats a group/],
    ["(((q{99}){99}){99}){99}", /repeats a group/],
    ["(){9999999999999}", /repeats a group/],
  ];
  for (const [pattern, message] of cases) {
    t.throws(() => patternsOf([pattern, 1]), { name: "SyntaxError", message }, pattern.slice(0, 40));
    t.throws(() => patternsOf([pattern, 1]), { message: /; write the modules' names instead$/ });
  }
});

const LETTERS = "ab.";
const character = fc.constantFrom(..."ab", "\\.", ".", "\\w", "\\d", "\\W", "[ab]", "[^a]", "[a-c.]", "[\\d_-]");
const { pattern } = fc.letrec<{ pattern: string; sequence: string; item: string; group: string }>((tie) => ({
  pattern: fc.array(tie("sequence"), { minLength: 1, maxLength: 3 }).map((all) => all.join("|")),
  sequence: fc.array(tie("item"), { maxLength: 4 }).map((all) => all.join("")),
  item: fc.oneof(
    { maxDepth: 2 },
    fc
      .tuple(character, fc.constantFrom("", "", "*", "+", "?", "{2}", "{1,2}", "{2,}", "+?"))
      .map((all) => all.join("")),
    fc.constantFrom("^", "$"),
    tie("group"),
  ),
  group: fc.tuple(fc.constantFrom("(", "(?:"), tie("pattern"), fc.constantFrom(")", ")?")).map((all) => all.join("")),
}));
const name = fc.string({ unit: fc.constantFrom(...LETTERS, "1", "_"), maxLength: 7 });

t.test("random patterns match what JavaScript's engine matches", async (t) => {
  let [both, late] = [0, 0];
  fc.assert(
    fc.property(pattern, fc.array(name, { minLength: 4, maxLength: 4 }), (pattern, names) => {
      for (const name of names) {
        const expected = byEngine(pattern, name);
        if (expected) both++;
        const found = matchesInTime(pattern, name);
        if (found === undefined) late++;
        else if (found !== (expected || pattern === name)) return false;
      }
      return true;
    }),
    { numRuns: runs(4000), seed: 1 },
  );
  t.ok(both > 1000 && both < 12_000, `${both} of 16000 match`);
  t.ok(late < 1600, `${late} are not tried`);
});

t.test("random patterns match what Python matches", async (t) => {
  const cases = fc.sample(fc.tuple(pattern, name), { numRuns: runs(4000), seed: 2 });
  const script = `import json, re, sys
print(json.dumps([bool(re.match(rf"(.*\\.)?({p})$", n)) for p, n in json.load(sys.stdin)]))`;
  let found: boolean[];
  try {
    found = JSON.parse(
      execFileSync(python, ["-c", script], { input: JSON.stringify(cases), encoding: "utf8", stdio: "pipe" }),
    );
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ENOENT") throw error;
    return skip(t, "python", `${python} is not there`);
  }
  t.equal(found.length, cases.length);
  const wrong = cases.filter(([pattern, name], i) => {
    const ours = matchesInTime(pattern, name);
    return ours !== undefined && ours !== (found[i] || pattern === name);
  });
  t.same(wrong, []);
});

t.test("no pattern takes long", async (t) => {
  const name = "x".repeat(1000);
  const hostile = [
    "(x*)*y",
    "(.*.*.*)*.*.*.*y",
    ".*.*.*y",
    "(?:x?)".repeat(170),
    "x?".repeat(500),
    "x*".repeat(500),
    "(x|x)".repeat(200),
    "x{1,9}".repeat(150),
    `${"(x|x)".repeat(24)}${"x".repeat(880)}y`,
    "[\\w.]+$y",
  ];
  for (const pattern of hostile) {
    for (const text of [name, `a.${name}`, `${name}y`, "x.".repeat(500)]) {
      const started = performance.now();
      try {
        patternsOf([pattern, 1]).find(text);
      } catch (error) {
        t.match((error as Error).message, /may take too long|repeats a group/, pattern.slice(0, 40));
      }
      const seconds = (performance.now() - started) / 1000;
      t.ok(seconds < 20, `${pattern.slice(0, 40)}: ${seconds.toFixed(2)} s`);
    }
  }
});

t.test("patterns of people are not refused for their ways", async (t) => {
  const names = Array.from({ length: 32 }, (_, i) => `base_model.model.layers.${i}.self_attn.q_proj`);
  const patterns = patternsOf(
    [".*\\.layers\\.\\d+\\..*(k|v|o)_proj", 1],
    [".*\\.layers\\.(1|2)\\d*\\.self_attn\\.[qk]_proj", 2],
  );
  t.equal(names.filter((name) => patterns.find(name) === 2).length, 1 + 1 + 10 + 10);
});

t.test("names of many modules, each a pattern, are found; more work than that is refused", async (t) => {
  const names = Array.from({ length: 1024 }, (_, i) => `model.layers.${i >> 7}.mlp.experts.${i & 127}.down_proj`);
  const patterns = patternsOf(...names.map((name, i): [string, number] => [name, i]));
  t.ok(names.every((name, i) => patterns.find(`base.${name}`) === i));
  const hostile = patternsOf(...Array.from({ length: 200 }, (_, i): [string, number] => [`.*.*y${i}x*`, i]));
  t.throws(
    () => {
      for (let i = 0; i < 1e6; i++) hostile.find("x".repeat(1000));
    },
    { message: /may take too long for the modules there are; write fewer patterns/ },
  );
});
