/**
 * Examples as batches of a model's inputs. Each text is tokenised once; batches are put together from these rows, padded as the tokenizer
 * pads. Its padding is learned from the shortest and the longest text, encoded together. Where one value does not explain the padding
 * (positions that go on through it, say), batches are encoded by the tokenizer as they come.
 */
import { type BatchFeeds, encoderOf, type Tokenizer } from "../session/tokens.ts";
import { checkShapes, joinFeeds, shapesOf } from "./batch-feeds.ts";
import type { Unlabelled } from "./examples.ts";

/** Puts rows into batches. `Feeds` are one batch of a model's inputs. */
export interface Batcher<Feeds> {
  /** Whether texts can be encoded. */
  readonly encodes: boolean;
  /**
   * Encodes rows for later batches and measures their lengths, in any unit. Rows are padded to the longest of their batch, so batches
   * take rows of similar lengths.
   */
  lengths<R extends Unlabelled<Feeds>>(rows: readonly R[]): Promise<ReadonlyMap<R, number>>;
  /** Key of rows that fit into one batch. Texts are padded; feeds of callers must have the same dimensions. */
  alike(row: Unlabelled<Feeds>): string;
  /** @throws TypeError when the rows cannot be put into one batch */
  batch(rows: readonly Unlabelled<Feeds>[]): Promise<Feeds>;
}

/** Padding in front of a row or behind it, with one value for each input. */
interface Padding {
  readonly front: boolean;
  readonly values: ReadonlyMap<string, number>;
}

/**
 * @param names of the model's inputs; other outputs of a tokenizer are dropped
 * @param short those that take int32
 */
export function createBatcher(
  tokenizer: Tokenizer | undefined,
  names: readonly string[],
  short: ReadonlySet<string> = new Set(),
): Batcher<BatchFeeds> {
  const encodeTexts = tokenizer && encoderOf(tokenizer, names);
  const encode = async (texts: string[]): Promise<BatchFeeds> => {
    const feeds = await encodeTexts!(texts);
    const taken = Object.entries(feeds).filter(([name]) => names.includes(name));
    return Object.fromEntries(
      taken.map(([name, feed]) => {
        if (!short.has(name)) return [name, feed];
        return [name, { ...feed, type: "int32", data: Int32Array.from(feed.data as BigInt64Array, Number) }];
      }),
    );
  };
  /** Encoded texts, as batches of one. */
  const encoded = new Map<string, BatchFeeds>();
  let padding: Padding | undefined;
  /** Largest number of padded places seen so far. */
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

/** Explains how `pair`, `short` and `long` encoded together, is padded; undefined where one value for each input does not explain it. */
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

/** Pads batches of one so that each input is as long as the longest; undefined where that is impossible. */
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
