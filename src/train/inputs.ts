/**
 * Examples as batches of a model's inputs. Each text is tokenised once: a batch is put together from its rows, padded as the
 * tokenizer itself pads. How it does is seen on the shortest and the longest text, encoded together. Where that does not explain
 * the padding (positions that go on through it, say), batches are encoded as they come.
 */
import { type BatchFeeds, checkShapes, joinFeeds, shapesOf } from "./batch.ts";
import type { Unlabelled } from "./examples.ts";

/**
 * Texts as a model's inputs, one row each, padded to the longest of them. A tokenizer of transformers.js will do as it is, since `how`
 * is what it is to be told.
 * @param inputs names of the model's inputs
 */
export type Encode = (
  texts: string[],
  how: { readonly padding: true; readonly truncation: true; readonly add_special_tokens?: boolean },
  inputs: readonly string[],
) => BatchFeeds | Promise<BatchFeeds>;

/** What a tokenizer is told. */
export const PADDED = { padding: true, truncation: true } as const;

/** Rows as batches. `Feeds` are one batch of a model's inputs. */
export interface Inputs<Feeds> {
  /** Whether texts can be encoded. */
  readonly encodes: boolean;
  /**
   * Encodes rows for later batches, and tells how long each is, in any unit: rows of like lengths go into one batch, since they are
   * padded to the longest.
   */
  lengths<R extends Unlabelled<Feeds>>(rows: readonly R[]): Promise<ReadonlyMap<R, number>>;
  /** What rows of one batch have alike: texts are padded, the inputs of a caller's feeds must have the same dimensions. */
  alike(row: Unlabelled<Feeds>): string;
  /** @throws TypeError when the rows cannot be put into one batch */
  batch(rows: readonly Unlabelled<Feeds>[]): Promise<Feeds>;
}

/** Fills rows up in front or behind, with one value for each input. */
interface Padding {
  readonly front: boolean;
  readonly values: ReadonlyMap<string, number>;
}

/** @param names of the model's inputs: what else a tokenizer gives is left out */
export function createInputs(encodeTexts: Encode | undefined, names: readonly string[]): Inputs<BatchFeeds> {
  const encode = async (texts: string[]): Promise<BatchFeeds> => {
    const feeds = await encodeTexts!(texts, PADDED, names);
    return Object.fromEntries(Object.entries(feeds).filter(([name]) => names.includes(name)));
  };
  /** Batches of one, by text. */
  const encoded = new Map<string, BatchFeeds>();
  let padding: Padding | undefined;
  /** The most places that padding was seen to fill. */
  let seen = 0;

  const learnPadding = async (short: string, long: string): Promise<void> => {
    const [a, b] = [encoded.get(short)!, encoded.get(long)!];
    const gap = sizeOf(b) - sizeOf(a);
    if (gap <= seen) return;
    seen = gap;
    padding = paddingOf(a, b, await encode([short, long]).catch(refuseUnpadded));
  };

  return {
    encodes: encodeTexts !== undefined,

    async lengths(rows) {
      checkShapes(rows.flatMap(({ feeds }) => (feeds ? [feeds] : [])));
      for (const { text } of rows) {
        if (text !== undefined && !encoded.has(text)) encoded.set(text, await encode([text]));
      }
      const lengths = new Map(rows.map((row) => [row, sizeOf(row.feeds ?? encoded.get(row.text!)!)]));
      const texts = rows.filter(({ text }) => text !== undefined).sort((a, b) => lengths.get(a)! - lengths.get(b)!);
      if (texts.length > 0) await learnPadding(texts[0]!.text!, texts.at(-1)!.text!);
      return lengths;
    },

    alike: ({ feeds }) => (feeds ? shapesOf(feeds) : ""),

    async batch(rows) {
      const texts = rows.flatMap(({ text }) => text ?? []);
      if (texts.length === 0) return joinFeeds(rows.map(({ feeds }) => feeds!));
      if (texts.length < rows.length)
        throw new TypeError("a batch of texts and feeds together; give all examples in one way");
      const known = texts.map((text) => encoded.get(text)).filter((one) => one !== undefined);
      const padded = known.length === texts.length ? padAlike(known, padding) : undefined;
      return padded ? joinFeeds(padded) : encode(texts);
    },
  };
}

function refuseUnpadded(cause: unknown): never {
  throw new TypeError(
    "encode: texts of different lengths were not encoded together; pass the tokenizer itself (encode: tokenizer), or have it pad: " +
      `tokenizer(texts, { padding: true, truncation: true }). It said: ${(cause as Error).message}`,
    { cause },
  );
}

function sizeOf(feeds: BatchFeeds): number {
  return Math.max(...Object.values(feeds).map(({ dims }) => dims.reduce((a, b) => a * b, 1)));
}

/** How `pair`, the texts of `short` and `long` encoded together, is padded; undefined where one value does not explain it. */
function paddingOf(short: BatchFeeds, long: BatchFeeds, pair: BatchFeeds): Padding | undefined {
  const same = ([name, { dims, data }]: [string, BatchFeeds[string]], other: BatchFeeds): boolean =>
    dims.join() === other[name]!.dims.join() && String(data) === String(other[name]!.data);
  for (const front of [false, true]) {
    const values = new Map<string, number>();
    for (const [name, { dims, data }] of Object.entries(pair)) {
      const [own, width] = [short[name]?.dims.at(-1), dims.at(-1)!];
      if (own !== width) values.set(name, (data as Float32Array)[front ? 0 : width - 1]!);
    }
    const made = padAlike([short, long], { front, values });
    if (made && Object.entries(joinFeeds(made)).every((one) => same(one, pair))) return { front, values };
  }
  return undefined;
}

/** Batches of one, each input as long as the longest of them; undefined where padding does not make them so. */
function padAlike(all: readonly BatchFeeds[], padding: Padding | undefined): BatchFeeds[] | undefined {
  const padded = all.map((): Record<string, BatchFeeds[string]> => ({}));
  for (const name of Object.keys(all[0]!)) {
    const width = Math.max(...all.map((feeds) => feeds[name]?.dims.at(-1) ?? NaN));
    const longest = all.find((feeds) => feeds[name]?.dims.at(-1) === width)?.[name]?.dims.join();
    for (const [i, feeds] of all.entries()) {
      const one = feeds[name];
      padded[i]![name] = one!;
      if (one && one.dims.join() === longest) continue;
      const value = padding?.values.get(name);
      if (one?.dims.slice(0, -1).join() !== "1" || value === undefined || !ArrayBuffer.isView(one.data))
        return undefined;
      const own = one.data as unknown as Float32Array;
      const data = new (own.constructor as Float32ArrayConstructor)(width).fill(value);
      data.set(own, padding!.front ? width - own.length : 0);
      padded[i]![name] = { ...(one.type === undefined ? {} : { type: one.type }), dims: [1, width], data };
    }
  }
  return padded;
}
