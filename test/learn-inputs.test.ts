/**
 * Texts as batches: each text is tokenised once, and batches equal the tokenizer's own to the bit.
 */
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { type BatchFeeds, createTrainer, type Encode } from "eigenlora/train";
import t from "tap";
import { createBatcher, uniform } from "./internals.ts";
import { LABELS, tiny } from "./learning.ts";
import { data } from "./packs.ts";
import { packages, without } from "./required.ts";
import { GOLDENS, NODE } from "./sessions.ts";

interface Style {
  readonly front?: boolean;
  /** Lengths are multiples of this. */
  readonly multiple?: number;
  /** Whether positions go on through the padding. */
  readonly positions?: boolean;
  /** An input of three dimensions. */
  readonly features?: boolean;
}

const NAMES = ["input_ids", "attention_mask", "token_type_ids", "position_ids", "features"];

/** A tokenizer of letters that counts the texts it is given. */
function letters({ front = false, multiple = 1, positions = false, features = false }: Style): {
  encode(texts: readonly string[]): BatchFeeds;
  asked: string[];
} {
  const asked: string[] = [];
  const encode = (texts: readonly string[]): BatchFeeds => {
    asked.push(...texts);
    const width = multiple * Math.ceil(Math.max(...texts.map(({ length }) => length)) / multiple);
    const filled = (pad: number, of: (text: string) => number[]): BatchFeeds[string] => {
      const rows = texts.map((text) => {
        const padding = Array<number>(width - text.length).fill(pad);
        return front ? [...padding, ...of(text)] : [...of(text), ...padding];
      });
      return { type: "int64", dims: [texts.length, width], data: BigInt64Array.from(rows.flat(), BigInt) };
    };
    return {
      input_ids: filled(7, (text) => [...text].map((letter) => letter.charCodeAt(0))),
      attention_mask: filled(0, (text) => Array<number>(text.length).fill(1)),
      token_type_ids: filled(0, (text) => Array<number>(text.length).fill(0)),
      ...(positions && {
        position_ids: {
          ...{ type: "int64", dims: [texts.length, width] },
          data: BigInt64Array.from(
            texts.flatMap(() => [...Array(width).keys()]),
            BigInt,
          ),
        },
      }),
      ...(features && {
        features: { type: "float32", dims: [texts.length, width, 1], data: new Float32Array(texts.length * width) },
      }),
    };
  };
  return { encode, asked };
}

const plain = (feeds: BatchFeeds): unknown =>
  Object.entries(feeds).map(([name, { type, dims, data }]) => [name, type, [...dims], [...(data as BigInt64Array)]]);

for (const [name, style, once] of [
  ["padding behind", {}, true],
  ["padding in front", { front: true }, true],
  ["lengths that are multiples of four", { multiple: 4 }, true],
  ["one length", { multiple: 32 }, true],
  ["positions that go on through the padding", { positions: true }, false],
  ["inputs of three dimensions", { features: true }, false],
] as [string, Style, boolean][]) {
  t.test(`a tokenizer with ${name}`, async (t) => {
    const random = uniform(1);
    const texts = Array.from({ length: 24 }, (_, i) => "abcdefghijklmnopqrstuvwx".slice(0, 2 + (i % 17)) + i);
    const { encode, asked } = letters(style);
    const inputs = createBatcher(encode, NAMES);
    const rows = texts.map((text) => ({ text }));
    await inputs.lengths(rows);
    for (let i = 0; i < 20; i++) {
      const some = rows.filter(() => random() < 0.3);
      if (some.length === 0) continue;
      const expected = letters(style).encode(some.map(({ text }) => text));
      t.same(plain(await inputs.batch(some)), plain(expected));
    }
    const more = asked.length - texts.length;
    t.ok(once ? more <= 2 : more > 40, `${more} texts more than there are`);
    const before = asked.length;
    await inputs.lengths(rows);
    t.equal(asked.length, before, "known texts are not encoded again");
    await inputs.batch([{ text: "new" }, { text: "newer" }]);
    t.equal(asked.length, before + 2);
  });
}

const folder = packages("@huggingface/transformers");
const skip = without("transformers", folder);

t.test(
  "a tokenizer of transformers.js, as it is; one that is not told to pad is refused with what to do",
  { skip },
  async (t) => {
    const { AutoTokenizer, env } = await import(pathToFileURL(join(folder, "dist/transformers.node.mjs")).href);
    Object.assign(env, { localModelPath: data("."), allowRemoteModels: false });
    const tokenizer = (await AutoTokenizer.from_pretrained("minilm")) as Encode & { model_max_length: number };
    const texts = ["a tool", "a graphical front end for the version control system git", "tool ".repeat(4000)];
    const rows = texts.map((text) => ({ text }));
    const inputs = createBatcher(tokenizer, ["input_ids", "attention_mask"]);
    await inputs.lengths(rows);
    const { input_ids, ...others } = await inputs.batch(rows);
    t.same(Object.keys(others), ["attention_mask"], "nothing that the model does not take");
    t.same(input_ids!.dims, [3, tokenizer.model_max_length], "padded, and cut to what the model takes");
    const lines = createBatcher((some) => tokenizer(some, {} as never, []), NAMES);
    await t.rejects(lines.lengths(rows), {
      name: "TypeError",
      message: /encode: .*encode: tokenizer.*padding: true, truncation: true/,
    });
  },
);

t.test("a fit tokenises each text once, and again none", async (t) => {
  const session = await tiny(NODE);
  t.teardown(() => session.close());
  const length = GOLDENS.feeds["input_ids"]![0]!.length;
  const texts = Array.from({ length: 16 }, (_, i) => String.fromCharCode(97 + i).repeat(1 + (i % length)));
  let count = 0;
  const encode: Encode = (some) => {
    count += some.length;
    const width = Math.max(...some.map((text) => text.length));
    const dims = [some.length, width];
    const filled = (of: (text: string) => number): BatchFeeds[string] => ({
      ...{ type: "int64", dims },
      data: BigInt64Array.from(
        some.flatMap((text) => Array.from({ length: width }, (_, i) => (i < text.length ? of(text) : 0))),
        BigInt,
      ),
    });
    const values = { input_ids: (text: string) => text.charCodeAt(0) - 90, attention_mask: () => 1 };
    return Object.fromEntries(
      session.inputNames.map((name) => [name, filled(values[name as keyof typeof values] ?? (() => 0))]),
    );
  };
  const trainer = await createTrainer(session, { labels: LABELS, encode });
  const known = texts.map((text, i) => ({ text, label: i % 2 }));
  for await (const _ of trainer.fit(known, { epochs: 2, batch: 8, holdout: 0.25 }));
  t.equal(count, texts.length + 2, "two show how it pads");
  for await (const _ of trainer.fit(known, { epochs: 2, batch: 8 }));
  await trainer.predict(known);
  t.equal(count, texts.length + 2);
});
