/**
 * Patterns of adapter_config.json: they match what Python's `re` matches, in time that no pattern makes exponential.
 */
import { execFileSync } from "node:child_process";
import { createRuntime } from "eigenlora";
import { readPeft } from "eigenlora/build";
import fc from "fast-check";
import t from "tap";
import { bytesOf, entries, type Spec } from "../support/adapters.ts";
import { NamePatterns } from "../support/internals/pack.ts";
import { NameMatcher } from "../support/internals/runtime.ts";
import { LOSSLESS, packed } from "../support/packs.ts";
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

/** Constructs that the random patterns below lack, and names as people write them. */
t.test("what constructs match", async (t) => {
  const name = "model.layers.12.self_attn.q_proj";
  const cases: [pattern: string, matched: boolean][] = [
    ["q_proj", true],
    ["self_attn.q_proj", true],
    ["proj", false],
    ["^model\\.layers\\.12\\.self_attn\\.q_proj$", true],
    ["layers\\.\\d+\\.self_attn\\.(?:q|v)_proj", true],
    ["layers.1{1,}2{,1}.+", true],
    ["layers.(1[0-5]|[2-9])\\..*q_proj", true],
    ["q\\_pro[]j]", true],
    ["q\\_pro[]x[j]", true],
    ["q{,}_proj", true],
    [".*?q_proj??", true],
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
  const asked = 4 * runs(4000);
  t.ok(both > asked / 16 && both < 0.75 * asked, `${both} of ${asked} match`);
  t.ok(late < asked / 6, `${late} are refused, since they may take too long`);
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

/** Names in newer and older checkpoints, as transformers 5.24 maps them when it loads a checkpoint. */
const PAIRS = [
  ["vit.layers.3.attention.q_proj", "vit.encoder.layer.3.attention.attention.query"],
  ["vit.layers.3.attention.o_proj", "vit.encoder.layer.3.attention.output.dense"],
  ["vit.layers.3.mlp.fc1", "vit.encoder.layer.3.intermediate.dense"],
  ["vit.layers.3.mlp.fc2", "vit.encoder.layer.3.output.dense"],
  ["dinov2.encoder.layer.0.attention.v_proj", "dinov2.encoder.layer.0.attention.attention.value"],
  ["dinov2.encoder.layer.0.attention.o_proj", "dinov2.encoder.layer.0.attention.output.dense"],
  ["swin.encoder.layers.1.blocks.0.attention.k_proj", "swin.encoder.layers.1.blocks.0.attention.self.key"],
  ["swin.encoder.layers.1.blocks.0.mlp.fc2", "swin.encoder.layers.1.blocks.0.output.dense"],
  ["segformer.stages.1.blocks.0.attention.q_proj", "segformer.encoder.block.1.0.attention.self.query"],
  ["decode_head.linear_projections.1.proj", "decode_head.linear_c.1.proj"],
  ["segformer.stages.1.blocks.0.mlp.fc1", "segformer.encoder.block.1.0.mlp.dense1"],
  ["model.language_model.layers.0.self_attn.q_proj", "language_model.model.layers.0.self_attn.q_proj"],
  ["model.vision_tower.encoder.layers.0.mlp.fc1", "vision_tower.vision_model.encoder.layers.0.mlp.fc1"],
  ["model.language_model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"],
] as const;

t.test("one finds the other, both ways, with and without segments in front", async (t) => {
  const [now, former] = [0, 1].map((side) => PAIRS.slice(0, -1).map((pair) => `${pair[side]}.weight`));
  for (const [from, to] of [
    [now!, former!],
    [former!, now!],
  ] as const) {
    const matcher = new NameMatcher(to);
    const behind = new NameMatcher(to.map((name) => `base.${name}`));
    for (const [i, name] of from.entries()) {
      t.same(matcher.find(name), { name: to[i] });
      t.same(behind.find(name), { name: `base.${to[i]}` });
    }
  }
  const [whole, alone] = PAIRS.at(-1)!;
  t.same(new NameMatcher([`${alone}.bias`, `${alone}.weight`]).find(`${whole}.weight`), { name: `${alone}.weight` });
  t.same(new NameMatcher([`${whole}.weight`]).find(`${alone}.weight`), { name: `${whole}.weight` });
});

t.test("its own name comes first; another layer is never found; several are ambiguous", async (t) => {
  const [now, former] = [`${PAIRS[0][0]}.weight`, `${PAIRS[0][1]}.weight`];
  t.same(new NameMatcher([former, now]).find(now), { name: now });
  t.same(new NameMatcher([former, now]).find(former), { name: former });
  for (const other of ["vit.encoder.layer.4.attention.attention.query", "vit.encoder.layer.3.attention.attention.key"])
    t.match(new NameMatcher([`${other}.weight`]).find(now), { ambiguous: false });
  const several = new NameMatcher([`a.${former}`, `b.${former}`]).find(now);
  t.strictSame("ambiguous" in several && [several.ambiguous, several.candidates()], [
    true,
    [`a.${former}`, `b.${former}`],
  ]);
  // Names that agree only in part do not match.
  t.match(new NameMatcher(["vit.encoder.layer.3.attention.attention.query_norm.weight"]).find(now), {
    ambiguous: false,
  });
});

/** An adapter of one layer of width 4 and rank 1: ΔW = alpha · b aᵀ. */
async function adapterOf(module: string) {
  const lora = (side: "A" | "B", shape: number[]): Spec => ({
    [`base_model.model.${module}.lora_${side}.weight`]: [shape],
  });
  const tensors = await bytesOf(entries({ ...lora("A", [1, 4]), ...lora("B", [4, 1]) }));
  const config = { peft_type: "LORA", r: 1, lora_alpha: 2, target_modules: ["q_proj"] };
  return readPeft({ id: "task", file: "task", config, tensors });
}

t.test("a pack of an adapter by version 5, on a checkpoint by version 4", async (t) => {
  const [now, former] = PAIRS[0];
  const weights = Float32Array.from({ length: 16 }, (_, i) => Math.sin(1 + i));
  const baseOf = (data: Float32Array<ArrayBuffer>) =>
    new Map([[`${former}.weight`, { dtype: "f32" as const, shape: [4, 4], data }]]);
  const adapter = await adapterOf(now);
  const pack = await packed([adapter], { ...LOSSLESS, base: baseOf(weights.slice()) });
  t.teardown(() => pack.close());
  const folded = weights.slice();
  const runtime = await createRuntime(pack, { base: baseOf(folded) });
  await runtime.switchTask("task");
  for (const [i, value] of folded.entries()) {
    const delta = 2 * (1 + Math.floor(i / 4)) * (1 + (i % 4));
    t.ok(Math.abs(value - (weights[i]! + delta)) < 1e-5, `${i}`);
  }
  await runtime.switchTask(null);
  t.same(folded, weights);
  await runtime.close();
  const other = baseOf(weights.map((value) => Math.cos(5 * value)));
  await t.rejects(createRuntime(pack, { base: other }), { name: "BaseMismatchError" }, "its fingerprint tells another");
});
