/**
 * Tokenizers as they are: of @huggingface/tokenizers and of transformers.js. They make feeds for a session, and learn
 * in a trainer.
 */
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { Tokenizer } from "@huggingface/tokenizers";
import { openPack } from "eigenlora";
import { readAdapters } from "eigenlora/node";
import { type BatchFeeds, createTrainer, distill, type Encode } from "eigenlora/train";
import t from "tap";
import { createEncoder, readReference, readTask } from "../../examples/minilm.js";
import { labelSupervision } from "../support/internals/learn.ts";
import { fitted, LABELS, tiny } from "../support/learning.ts";
import { data, LOSSLESS, packOf } from "../support/packs.ts";
import { packages, without } from "../support/required.ts";
import { type Feeds, NODE, type Options, open, WEB } from "../support/sessions.ts";

const json = async (path: string) => JSON.parse(await readFile(data(path), "utf8"));
const [RULES, CONFIG] = [await json("minilm/tokenizer.json"), await json("minilm/tokenizer_config.json")];
const tokenizer = new Tokenizer(RULES, CONFIG);
const { bytes } = await packOf(["adapters/own-seed/debtags-role"], LOSSLESS);

async function minilm(ort = NODE, options: Options = {}) {
  const session = await open(ort, data("minilm/model_fp16.onnx"), await openPack(bytes), { probe: false, ...options });
  t.teardown(() => session.close());
  return session;
}

/** Ids, masks and types of feeds as plain numbers, row by row. */
function rowsOf(feeds: unknown): Record<string, number[][]> {
  const rows = Object.entries(feeds as Feeds).map(([name, { data, dims }]) => {
    const values = Array.from(data as BigInt64Array, Number);
    return [name, Array.from({ length: dims[0]! }, (_, i) => values.slice(i * dims[1]!, (i + 1) * dims[1]!))];
  });
  return Object.fromEntries(rows);
}

t.test("a tokenizer of @huggingface/tokenizers makes feeds: PEFT's answers", async (t) => {
  const { test } = await readTask("debtags-role");
  const texts = test.slice(0, 16).map(([text]) => text);
  const { predictions } = (await readReference("own-seed")).get("debtags-role")!;
  for (const ort of [NODE, WEB]) {
    const session = await minilm(ort);
    await session.switchTask("debtags-role");
    const feeds = await session.encode(texts, tokenizer, { maxTokens: 32 });
    t.same(rowsOf(feeds), rowsOf((await createEncoder(ort))(texts)));
    const { data, dims } = (await session.run(feeds))["logits"]!;
    const found = texts.map((_, row) => {
      const values = [...(data as Float32Array).subarray(row * dims[1]!, (row + 1) * dims[1]!)];
      return values.indexOf(Math.max(...values));
    });
    t.same(found, predictions.slice(0, 16));
    const one = rowsOf(await session.encode(texts[0]!, tokenizer));
    t.same(one["input_ids"], [tokenizer.encode(texts[0]!).ids], "one text");
  }
});

t.test("a text that is too long loses its own tokens, and padding is as the tokenizer's files say", async (t) => {
  const session = await minilm();
  const ids = (text: string): number[] => tokenizer.encode(text, { add_special_tokens: false }).ids;
  const [long, short] = ["a fast mail reader for the terminal", "mail"];
  const [CLS, SEP] = [2, 3];
  const { input_ids, attention_mask } = rowsOf(await session.encode([long, short], tokenizer, { maxTokens: 6 }));
  t.same(input_ids, [
    [CLS, ...ids(long).slice(0, 4), SEP],
    [CLS, ...ids(short), SEP, 0, 0, 0],
  ]);
  t.same(attention_mask![1], [1, 1, 1, 0, 0, 0]);
  const most = rowsOf(await session.encode("tool ".repeat(2000), tokenizer))["input_ids"]![0]!;
  t.equal(most.length, CONFIG.model_max_length);
  t.equal(most.at(-1), SEP);
  const { sep_token, ...left } = { ...CONFIG, padding_side: "left", pad_token: { content: CONFIG.sep_token } };
  const other = rowsOf(await session.encode([long, short], new Tokenizer(RULES, left)));
  const width = other["input_ids"]![0]!.length;
  t.same(other["input_ids"]![1], [...Array(width - 3).fill(SEP), CLS, ...ids(short), SEP], sep_token);
  t.same(other["attention_mask"]![1], [...Array(width - 3).fill(0), 1, 1, 1]);
});

t.test("it learns in a trainer, as a function that encodes alike does", async (t) => {
  const { train } = await readTask("debtags-role");
  const examples = train.slice(0, 24).map(([text], i) => ({ text, label: i % 2 }));
  const encode = (await createEncoder(NODE)) as unknown as Encode;
  const losses: number[][] = [];
  const session = await minilm(NODE, { trainable: true });
  for (const one of [tokenizer, encode]) {
    const trainer = await createTrainer(session, { labels: ["even", "odd"], encode: one, seed: 3 });
    losses.push((await fitted(trainer, examples, { epochs: 2, batch: 8 }))[2]);
  }
  t.equal(losses[0]!.length, 6);
  t.same(losses[0], losses[1]);
});

t.test("what cannot encode is refused when it is given", async (t) => {
  const session = await tiny(NODE);
  t.teardown(() => session.close());
  const refused = { name: "TypeError", message: /encode.*: expected a tokenizer of transformers\.js or @huggingface/ };
  const adapters = await readAdapters([data("sessions/adapters")]);
  t.teardown(() => Promise.all(adapters.map((adapter) => adapter.close())));
  for (const encode of [5, {}, "minilm", null, Promise.resolve(tokenizer)] as never[]) {
    await t.rejects(createTrainer(session, { labels: LABELS, encode }), refused);
    await t.rejects(session.encode("a", encode), refused);
    await t.rejects(distill(session, { adapter: adapters[0]!, encode, texts: ["a"] }), refused);
  }
  await t.rejects(createTrainer(session, { labels: LABELS, encode: Promise.resolve(5) as never }), {
    message: /a promise; did you forget await\?/,
  });
  for (const texts of [5, [], [5], undefined] as never[])
    await t.rejects(session.encode(texts, tokenizer), { name: "TypeError", message: /encode: expected a text, or/ });
  for (const maxTokens of [0, 1.5, "9"] as never[])
    await t.rejects(session.encode("a", tokenizer, { maxTokens }), { name: "RangeError", message: /whole number ≥ 1/ });
});

const folder = packages("@huggingface/transformers");
const skip = without("transformers", folder);

t.test("a tokenizer of transformers.js makes the same feeds", { skip }, async (t) => {
  const { AutoTokenizer, env } = await import(pathToFileURL(join(folder, "dist/transformers.node.mjs")).href);
  Object.assign(env, { localModelPath: data("."), allowRemoteModels: false });
  const theirs = await AutoTokenizer.from_pretrained("minilm");
  const session = await minilm();
  const texts = ["a fast mail reader for the terminal", "first-person shooter with network play", "mail"];
  const feeds = await session.encode(texts, theirs);
  t.same(rowsOf(feeds), rowsOf(await session.encode(texts, tokenizer)));
  t.ok(feeds["input_ids"] instanceof NODE.Tensor, "tensors of the session's own runtime");
  t.equal(rowsOf(await session.encode(texts, theirs, { maxTokens: 4 }))["input_ids"]![0]!.length, 4);
});

/** Texts as batches: each text is tokenised once, and batches equal the tokenizer's own to the bit.
 */
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
