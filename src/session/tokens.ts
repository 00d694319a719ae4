/**
 * Texts as a model's inputs, by a tokenizer as it is: one of transformers.js, one of @huggingface/tokenizers, or a
 * function of one's own.
 */
import { checkOptions, described } from "../errors.ts";
import type { Engine, Tensors } from "./engine.ts";

/** Inputs of a batch by name: tensors of the runtime, or objects with their fields (transformers.js). */
export type BatchFeeds = Readonly<
  Record<string, { readonly type?: string; readonly dims: readonly number[]; readonly data: unknown }>
>;

/** Options of encoding: those of a tokenizer of transformers.js. */
export interface EncodeHow {
  readonly padding: true;
  readonly truncation: true;
  readonly add_special_tokens?: boolean;
  readonly max_length?: number;
}

/**
 * Turns texts into a model's inputs, one row each, padded to the longest. A tokenizer of transformers.js works as it
 * is, since `how` holds its options.
 * @param inputs names of the model's inputs
 */
export type Encode = (texts: string[], how: EncodeHow, inputs: readonly string[]) => BatchFeeds | Promise<BatchFeeds>;

/** A tokenizer of @huggingface/tokenizers, as far as it is used. */
export interface PlainTokenizer {
  encode(
    text: string,
    options: { readonly add_special_tokens?: boolean; readonly return_token_type_ids: true },
  ): { readonly ids: readonly number[]; readonly token_type_ids?: readonly number[] };
}

/**
 * Turns texts into a model's inputs: a tokenizer of transformers.js or of @huggingface/tokenizers as it is, or a
 * function.
 */
export type Tokenizer = Encode | PlainTokenizer;

/** Texts as inputs by name, int64 [texts, tokens]. @param special adds special tokens. Default: true */
export type EncodeTexts = (texts: readonly string[], special?: boolean) => Promise<BatchFeeds>;

/**
 * @param where the public function and its option, for the message
 * @throws TypeError when `given` cannot encode texts
 */
export function checkTokenizer(where: string, given: unknown): asserts given is Tokenizer {
  if (typeof given === "function" || typeof (given as Partial<PlainTokenizer> | null)?.encode === "function") return;
  const expected = "a tokenizer of transformers.js or @huggingface/tokenizers, or a function from texts to inputs";
  throw new TypeError(`${where}: expected ${expected}, got ${described(given)}`);
}

/** @param most tokens of a text, special ones too. Default: the tokenizer's `model_max_length` */
export function encoderOf(tokenizer: Tokenizer, inputs: readonly string[], most?: number): EncodeTexts {
  if (typeof tokenizer !== "function") {
    return async (texts, special = true) => plainFeeds(tokenizer, texts, special, most ?? longestOf(tokenizer));
  }
  return async (texts, special) => {
    const how: EncodeHow = {
      ...{ padding: true, truncation: true },
      ...(special === false && { add_special_tokens: false }),
      ...(most !== undefined && { max_length: most }),
    };
    return checkFeeds(await tokenizer([...texts], how, inputs));
  };
}

/** The text that ends what a language model says; undefined where the tokenizer does not tell it. */
export function endOf(tokenizer: Tokenizer | undefined): string | undefined {
  const { eos_token } = (tokenizer ?? {}) as { readonly eos_token?: unknown };
  return textOf(eos_token ?? configOf(tokenizer)["eos_token"]);
}

/** @throws TypeError when an `encode` of a user's own gives something else than tensors */
function checkFeeds(feeds: BatchFeeds): BatchFeeds {
  const all = typeof feeds === "object" && feeds ? Object.entries(feeds) : [];
  const bad = all.find(([, input]) => !(Array.isArray(input?.dims) && ArrayBuffer.isView(input.data)));
  if (all.length > 0 && !bad) return feeds;
  const found = bad ? `"${bad[0]}": ${described(bad[1])}` : described(feeds);
  throw new TypeError(
    `encode: expected the model's inputs by name, each { dims: [texts, tokens], data: a typed array }, got ${found}`,
  );
}

/** The tokenizer_config.json that a tokenizer was made with. */
function configOf(tokenizer: unknown): Readonly<Record<string, unknown>> {
  return (tokenizer as { readonly config?: Readonly<Record<string, unknown>> } | undefined)?.config ?? {};
}

/** A token of tokenizer_config.json: its text, or an object that holds it. */
function textOf(token: unknown): string | undefined {
  const text = (token as { readonly content?: unknown } | null | undefined)?.content ?? token;
  return typeof text === "string" ? text : undefined;
}

/** The number of a token that the configuration names. */
function idOf(tokenizer: PlainTokenizer, name: "pad_token" | "unk_token"): number | undefined {
  const { token_to_id: find } = tokenizer as { token_to_id?(token: string): number | undefined };
  return find?.call(tokenizer, textOf(configOf(tokenizer)[name]) ?? "");
}

function longestOf(tokenizer: PlainTokenizer): number {
  const most = configOf(tokenizer)["model_max_length"];
  return typeof most === "number" ? most : Infinity;
}

function plainFeeds(tokenizer: PlainTokenizer, texts: readonly string[], special: boolean, most: number): BatchFeeds {
  const rows = texts.map((text) => plainRow(tokenizer, text, special, most));
  const width = Math.max(...rows.map(({ ids }) => ids.length));
  const { padding_side } = configOf(tokenizer);
  const tensor = (of: (row: PlainRow) => readonly number[], fill: number): BatchFeeds[string] => {
    const data = new BigInt64Array(rows.length * width).fill(BigInt(fill));
    for (const [r, row] of rows.entries()) {
      const values = of(row);
      data.set(values.map(BigInt), r * width + (padding_side === "left" ? width - values.length : 0));
    }
    return { type: "int64", dims: [rows.length, width], data };
  };
  return {
    input_ids: tensor(({ ids }) => ids, idOf(tokenizer, "pad_token") ?? 0),
    attention_mask: tensor(({ ids }) => ids.map(() => 1), 0),
    token_type_ids: tensor(({ types }) => types, 0),
  };
}

interface PlainRow {
  readonly ids: readonly number[];
  readonly types: readonly number[];
}

/**
 * Encodes a text; one that is too long loses tokens of its own at the end, no special ones.
 * @throws TypeError for a word without a number: tokenizers of whole words give none, in spite of their `unk_token`
 */
function plainRow(tokenizer: PlainTokenizer, text: string, special: boolean, most: number): PlainRow {
  const known = (id = idOf(tokenizer, "unk_token")): number => {
    if (id !== undefined) return id;
    const part = JSON.stringify(text.slice(0, 40));
    throw new TypeError(
      `encode: the tokenizer has no number for a word of ${part}, and no unk_token in its configuration`,
    );
  };
  const tokens = (add_special_tokens: boolean): PlainRow => {
    const { ids, token_type_ids } = tokenizer.encode(text, { add_special_tokens, return_token_type_ids: true });
    return { ids: ids.map((id) => known(id)), types: token_type_ids ?? ids.map(() => 0) };
  };
  const row = tokens(special);
  if (row.ids.length <= most) return row;
  const own = tokens(false).ids;
  const before = Math.max(
    0,
    row.ids.findIndex((_, i) => own.every((id, j) => id === row.ids[i + j])),
  );
  const after = Math.min(most, row.ids.length - before - own.length);
  const cut = (values: readonly number[]): number[] => [
    ...values.slice(0, most - after),
    ...values.slice(values.length - after),
  ];
  return { ids: cut(row.ids), types: cut(row.types) };
}

/** Options of a session's `encode`. */
export interface EncodeOptions {
  /** Most tokens of a text, special ones too. Default: the tokenizer's `model_max_length`. */
  readonly maxTokens?: number | undefined;
}

/** Encodes texts as `Session.encode`. @param short names of the inputs that take int32 */
export async function feedsOfTexts(
  given: string | readonly string[],
  tokenizer: Tokenizer,
  options: EncodeOptions,
  inputs: readonly string[],
  engine: Engine,
  short: ReadonlySet<string>,
): Promise<Tensors> {
  checkTokenizer("encode: tokenizer", tokenizer);
  checkOptions("encode", options, ["maxTokens"]);
  const texts = typeof given === "string" ? [given] : given;
  if (!Array.isArray(texts) || texts.length === 0 || !texts.every((text) => typeof text === "string"))
    throw new TypeError(`encode: expected a text, or a list of some, got ${described(texts)}`);
  const { maxTokens: most } = options;
  if (most !== undefined && !(Number.isInteger(most) && most >= 1))
    throw new RangeError(`encode: maxTokens: expected a whole number ≥ 1, got ${described(most)}`);
  const feeds = await encoderOf(tokenizer, inputs, most)(texts);
  const taken = Object.entries(feeds).filter(([name]) => inputs.includes(name));
  if (taken.length === 0) {
    const names = Object.keys(feeds).join(", ");
    throw new TypeError(
      `encode: the model takes ${inputs.join(", ")}, the tokenizer gives ${names}: make feeds of these by yourself`,
    );
  }
  const tensors = taken.map(([name, { data, dims, type }]) =>
    short.has(name)
      ? [name, engine.tensor(Int32Array.from(data as BigInt64Array, Number), dims, "int32")]
      : [name, engine.tensor(data as BigInt64Array, dims, type)],
  );
  return Object.fromEntries(tensors);
}
