/**
 * Texts as batches: each text is tokenised once, and batches equal the tokenizer's own to the bit.
 */
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import type { BatchFeeds, Encode } from "eigenlora/train";
import t from "tap";
import { labelSupervision } from "../support/internals/learn.ts";
import { data } from "../support/packs.ts";
import { packages, without } from "../support/required.ts";

interface Style {
  readonly front?: boolean;
  /** Lengths are multiples of this. */
  readonly multiple?: number;
  /** True if positions go on through the padding. */
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

t.test("a batch is the tokenizer's own; known texts are not measured again", async (t) => {
  const texts = Array.from({ length: 24 }, (_, i) => "abcdefghijklmnopqrstuvwx".slice(0, 2 + (i % 17)) + i);
  const { encode, asked } = letters({ front: true, positions: true, features: true });
  const inputs = labelSupervision(encode, NAMES, new Set(), []);
  const rows = await inputs.ask(
    texts.map((text) => ({ text })),
    "a batch",
  );
  const lengths = await inputs.lengths(rows);
  t.ok(lengths.get(rows[16]!)! > lengths.get(rows[0]!)!);
  t.same(plain(await inputs.feeds(rows.slice(3, 9))), plain(encode(texts.slice(3, 9))));
  const before = asked.length;
  await inputs.lengths(rows);
  t.equal(asked.length, before);
});

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
    const inputs = labelSupervision(tokenizer, ["input_ids", "attention_mask"], new Set(), []);
    const rows = await inputs.ask(
      texts.map((text) => ({ text })),
      "a batch",
    );
    await inputs.lengths(rows);
    const { input_ids, ...others } = await inputs.feeds(rows);
    t.same(Object.keys(others), ["attention_mask"], "nothing that the model does not take");
    t.same(input_ids!.dims, [3, tokenizer.model_max_length], "padded, and cut to what the model takes");
    const lines = labelSupervision((some) => tokenizer(some, {} as never, []), NAMES, new Set(), []);
    await lines.lengths(rows);
    await t.rejects(lines.feeds(rows), {
      name: "TypeError",
      message: /encode: .*encode: tokenizer.*padding: true, truncation: true/,
    });
  },
);
