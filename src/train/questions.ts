/**
 * Answers of adapters. An adapter's own factors and head take the place of those that a pack's coefficients make, in the session that
 * trains tasks. Distilling reduces the divergence between the two answers; packing is judged by it.
 */

import type { Adapter } from "../adapters/adapter.ts";
import { TaskError } from "../errors.ts";
import type { TaskMetadata } from "../format/format.ts";
import type { Session } from "../session/session.ts";
import type { BatchFeeds } from "../session/tokens.ts";
import { shuffle } from "../tensor/random.ts";
import type { Term } from "../tensor/term.ts";
import { type AnsweredRow, answers } from "./objective.ts";
import { layersOf, zerosOf } from "./state.ts";
import {
  type Distribution,
  drawnFrom,
  type Example,
  likeliest,
  type Row,
  type Supervision,
  type Tokens,
  type Unlabelled,
} from "./supervision.ts";
import { headInputs, sessionModel, type TaskWeights, type TrainableModel } from "./trainable-model.ts";
import { type TrainedModule, TrainedTerms } from "./trained-terms.ts";

/** Questions to a model: texts, inputs, or a trainer's examples. Labels in examples are ignored. */
export interface Questions {
  /** Plain text of the kind that the task will see. A language model is asked at every token. */
  readonly texts?: readonly string[] | undefined;
  /** The model's inputs, a batch of one for each question, instead of texts. */
  readonly feeds?: readonly BatchFeeds[] | undefined;
  /** Examples instead of texts. A language model is asked at the tokens of completions. */
  readonly examples?: readonly Example[] | undefined;
}

/** @throws TypeError unless questions are given in one way */
export function questionsOf(where: string, { texts, feeds, examples }: Questions): readonly Example[] {
  const ways = Object.entries({ texts, feeds, examples }).flatMap(([name, one]) => (one === undefined ? [] : [name]));
  if (ways.length !== 1) throw new TypeError(`${where}: got ${ways.join(" and ") || "no texts"}, expected one of them`);
  return examples ?? texts?.map((text) => ({ text })) ?? feeds!.map((own): Unlabelled => ({ feeds: own }));
}

export interface AskOptions {
  /** Name of the public function, for messages. */
  readonly where: string;
  readonly supervision: Supervision;
  readonly signal?: AbortSignal | undefined;
}

/**
 * Makes a model and the weights with which it answers as the adapter itself.
 * @param head the layers that the adapter brings; empty where the model's own outputs are the logits
 * @throws TaskError when the adapter changes a module that the pack lacks
 */
export async function adapterWeights(
  session: Session,
  adapter: Adapter,
  head: readonly string[],
): Promise<{ readonly model: TrainableModel; readonly weights: TaskWeights }> {
  // Destructured here rather than in the parameter list, so that internal names stay out of the declarations.
  const { trainable, pack } = session;
  const modules: TrainedModule[] = [];
  const terms = new Map<string, Term>();
  for (const one of adapter.modules.values()) {
    const { name, in: width, out, rank } = one;
    const module = pack.modules.find((known) => known.name === name);
    if (module?.in !== width || module.out !== out)
      throw new TaskError(`${adapter.file} adapts "${name}" [${out}, ${width}], which the pack does not`, {
        task: adapter.id,
      });
    modules.push({ name, in: width, out, privateRank: rank });
    const { A, Bt, magnitude } = await one.read();
    if (magnitude)
      throw new TaskError(`${adapter.file} has a DoRA magnitude of "${name}": it cannot be asked here`, {
        task: adapter.id,
      });
    terms.set(name, { rank, A, Bt });
  }
  const beside = adapter.saved.find(({ role }) => role !== "saved");
  if (beside)
    throw new TaskError(`${adapter.file} brings "${beside.name}" (${beside.role}): it cannot be asked here`, {
      task: adapter.id,
    });
  const layers = headInputs(trainable!, head);
  const saved = (module: string | undefined, part: string) =>
    adapter.saved.find(({ name }) => name === `${module}.${part}`);
  const last = layers.find(({ out }) => out === undefined);
  const labels = Array.from({ length: saved(last?.module, "weight")?.shape[0] ?? 0 }, (_, i) => String(i));
  const model = await sessionModel(trainable!, new TrainedTerms(modules), layers, labels);
  const numbers = zerosOf(model.head);
  for (const { layer, weight, bias } of layersOf(model.head, numbers)) {
    const { module, own } = layer;
    // Tensors that the adapter lacks come from the model.
    weight.set((await saved(module, "weight")?.read()) ?? own?.weight ?? []);
    bias.set((await saved(module, "bias")?.read()) ?? own?.bias ?? []);
  }
  return { model, weights: { terms, ...numbers } };
}

/**
 * Answers of the adapter itself, row by row.
 * @param head as in `adapterWeights`
 * @throws TaskError as `adapterWeights`
 */
export async function* askAdapter(
  session: Session,
  adapter: Adapter,
  head: readonly string[],
  rows: readonly Row[],
  { where, supervision, signal, features }: AskOptions & { readonly features?: boolean | undefined },
): AsyncGenerator<AnsweredRow> {
  const { model, weights } = await adapterWeights(session, adapter, head);
  for await (const one of answers({ model, supervision }, rows, weights, { signal, features })) {
    const each = one.logits[0]!.length;
    if (!Number.isInteger(each) || each < 2)
      throw new TypeError(`${where}: the model gives ${each} logits for a text, expected [texts, labels]`);
    yield one;
  }
}

/** An answer that is small enough to keep. */
export interface AdapterAnswer {
  readonly distributions: readonly Distribution[];
  readonly features: Float32Array | undefined;
}

/** Answers of the adapter by row. */
export async function answersOf(...of: Parameters<typeof askAdapter>): Promise<Map<Row, AdapterAnswer>> {
  const { supervision } = of[4];
  const found = new Map<Row, AdapterAnswer>();
  for await (const { row, logits, features } of askAdapter(...of))
    found.set(row, { distributions: logits.map(supervision.distribution), features });
  return found;
}

// Questions that the program makes, where a user gives no text: words of the tokenizer's vocabulary in no order, among them those of the
// names of tasks and labels. Most of a classifier's are crossed, round by round, from the lines whose answers came closest to each label,
// since lines at random hardly reach some. Those of a language model: `made-up-tokens.ts`.

/** The share of a crossed line's words that are drawn anew. */
const DRAWN = 0.3;
/** Lines that are crossed for a label: those that came closest to it. */
const CLOSEST = 12;
/**
 * A classifier's lines: the share that is drawn at random, and the rounds in which the others are crossed from all lines before. Chosen with
 * their length and number by KL on test rows of eight tasks of own-seed and of hub, among twelve settings.
 */
const AT_RANDOM = 0.2;
const ROUNDS = 8;

/**
 * Makes questions for an adapter, with its answers.
 * @param head the layers that the adapter brings
 */
export async function madeUpQuestions(
  session: Session,
  adapter: Adapter,
  head: readonly string[],
  { words, count, random }: { readonly words: Words; readonly count: number; readonly random: () => number },
  { where, supervision, ...how }: AskOptions & { readonly features?: boolean | undefined },
): Promise<Map<Row, AdapterAnswer>> {
  const { model, weights } = await adapterWeights(session, adapter, head);
  const found = new Map<Row, AdapterAnswer>();
  const ask = async (rows: readonly Row[]): Promise<void> => {
    for await (const { row, logits, features } of answers({ model, supervision }, rows, weights, how))
      found.set(row, { distributions: logits.map(supervision.distribution), features });
  };
  const rowsOf = (texts: readonly string[]): Promise<Row[]> =>
    supervision.ask(
      texts.map((text): Example => ({ text })),
      where,
    );
  if (session.inputNames.includes("decoder_input_ids"))
    throw new TypeError(
      `${where}: no text can be made for a model with a decoder of its own: give prompts and completions`,
    );
  if (supervision.tokens) {
    async function* next(rows: readonly Row[]): AsyncGenerator<[Row, Distribution]> {
      for await (const { row, logits } of answers({ model, supervision }, rows, weights, how))
        yield [row, supervision.distribution(logits[0]!)];
    }
    await ask(await tokenQuestions(words, count, adapter.metadata, { rowsOf, next, random }));
    return found;
  }
  await ask(await rowsOf(madeUpTexts(words, Math.ceil(count * AT_RANDOM), random)));
  for (let round = 0; round < ROUNDS; round++) {
    const lines = Math.ceil((count - found.size) / (ROUNDS - round));
    await ask(await rowsOf(crossed(found, words, lines, random)));
  }
  return found;
}

/** Lines for each label in turn, going on from the round before, crossed from two of those whose answers came closest to it. */
function crossed(asked: ReadonlyMap<Row, AdapterAnswer>, words: Words, count: number, random: () => number): string[] {
  const all = [...asked].map(([{ text }, { distributions }]) => ({
    text: text!,
    probabilities: distributions[0]!.probabilities,
  }));
  const labels = all[0]!.probabilities.length;
  const closest = Array.from({ length: labels }, (_, label) =>
    [...all].sort((a, b) => b.probabilities[label]! - a.probabilities[label]!).slice(0, CLOSEST),
  );
  return Array.from({ length: count }, (_, i) => {
    const near = closest[(asked.size + i) % labels]!;
    const both = [pick(near, random), pick(near, random)].flatMap(({ text }) => text.split(" "));
    const mixed = shuffle(
      both.map((word) => (random() < DRAWN ? draw(words, random) : word)),
      random,
    );
    return mixed.slice(0, lengthOf(random)).join(" ");
  });
}

// Lines of words in no order: of the tokenizer's vocabulary, and of the names of tasks and labels.

/** A tokenizer of transformers.js or of @huggingface/tokenizers, as far as words are read from it. */
interface Vocabulary {
  get_vocab?(withAdded?: boolean): ReadonlyMap<string, number> | Readonly<Record<string, number>>;
  decode?(ids: number[]): string;
}

/** Words to make questions of. */
export interface Words {
  /** Whole words of the vocabulary, by number: vocabularies are made from frequent words to rare ones. */
  readonly all: readonly string[];
  /** Words of names. */
  readonly names: readonly string[];
}

/** Words of a line. */
const [SHORTEST, LONGEST] = [3, 12];
/**
 * A word of rank r is drawn in proportion to 1 ÷ (r + FREQUENT): as in text (B. Mandelbrot, 1953), but less steeply, so that lines are not
 * made of articles and prepositions.
 */
const FREQUENT = 30;
/** The share of words that are taken from names. */
const NAMED = 0.1;

/**
 * Words of a tokenizer, and of the names of tasks and their labels.
 * @throws TypeError for a tokenizer that does not tell its vocabulary
 */
export function wordsOf(where: string, encode: unknown, known: readonly Pick<Adapter, "id" | "metadata">[]): Words {
  const all = vocabularies.get(encode as object) ?? wholeWords(where, encode);
  vocabularies.set(encode as object, all);
  const names = known.flatMap(({ id, metadata }) => [id, ...labelsOf(metadata)]);
  return { all, names: [...new Set(names.flatMap((name) => name.match(/\p{Lu}?[\p{Ll}\p{Lo}]+|\p{Lu}{2,}/gu) ?? []))] };
}

/** Words by tokenizer: each adapter of a pack asks for them. */
const vocabularies = new WeakMap<object, readonly string[]>();

function wholeWords(where: string, encode: unknown): string[] {
  const { get_vocab, decode } = (encode ?? {}) as Vocabulary;
  if (!get_vocab || !decode)
    throw new TypeError(
      `${where}: expected texts or examples, or a tokenizer with get_vocab and decode in \`encode\`, to make texts from its words`,
    );
  const found = get_vocab.call(encode, false);
  const tokens = found instanceof Map ? [...found] : Object.entries(found as Readonly<Record<string, number>>);
  tokens.sort(([, a], [, b]) => a - b);
  // Byte-level and SentencePiece vocabularies mark where a word begins.
  const marked = tokens.filter(([token]) => /^[Ġ▁]/.test(token));
  const whole = marked.length > 0 ? marked : tokens;
  const all = whole.flatMap(([token, id]) => {
    if (!/\p{L}{2}/u.test(token)) return [];
    const word = decode.call(encode, [id]).trim();
    return /^[\p{L}\p{M}]{2,}$/u.test(word) ? [word] : [];
  });
  if (all.length === 0) throw new TypeError(`${where}: the vocabulary of \`encode\` has no words; give texts`);
  return all;
}

function labelsOf({ labels }: { readonly labels?: unknown }): string[] {
  return Array.isArray(labels) ? labels.filter((label) => typeof label === "string") : [];
}

/** Lines of words. @param length how many words a line has */
export function madeUpTexts(
  words: Words,
  count: number,
  random: () => number,
  length: (random: () => number) => number = lengthOf,
): string[] {
  return Array.from({ length: count }, () =>
    Array.from({ length: length(random) }, () => draw(words, random)).join(" "),
  );
}

function draw({ all, names }: Words, random: () => number): string {
  if (names.length > 0 && random() < NAMED) return pick(names, random);
  // The inverse of the distribution: log(rank + FREQUENT) is uniform.
  const rank = FREQUENT * ((all.length + FREQUENT) / FREQUENT) ** random() - FREQUENT;
  return all[Math.min(all.length - 1, Math.floor(rank))]!;
}

function pick<T>(all: readonly T[], random: () => number): T {
  return all[Math.floor(random() * all.length)]!;
}

function lengthOf(random: () => number): number {
  return SHORTEST + Math.floor(random() * (LONGEST - SHORTEST + 1));
}

// Questions for a language model, made of words. Where the task says how it is asked (`template` of its metadata), they are written so, and
// the model's answers are what it is asked for. Where it does not, half of them are lines of words, and the model goes on from the others.

/** Words of an input that a template takes: few are likelier, since most inputs are names and terms. */
const MOST_INPUT = 6;
/** The share of such words that are numbers. */
const NUMBERS = 0.1;
/** Most digits of a number. */
const DIGITS = 4;
/** The share of lines that the model does not go on from, where no template is known. */
const ALONE = 0.5;
/** Words of a line that it goes on from. */
const BEGUN = 4;
/** Tokens that it says at most. Twice as many take three times as long. */
const SAID = 8;

type TokenRow = Row & { readonly tokens: Tokens };

interface Asking {
  /** Rows of texts, asked at every token but the first. */
  readonly rowsOf: (texts: readonly string[]) => Promise<Row[]>;
  /** The answers to rows that are asked at their last token. */
  readonly next: (rows: readonly Row[]) => AsyncIterable<[Row, Distribution]>;
  readonly random: () => number;
}

/** Makes questions, with the positions that are asked. */
async function tokenQuestions(words: Words, count: number, metadata: TaskMetadata, asking: Asking): Promise<Row[]> {
  const { random } = asking;
  const rowsOf = asking.rowsOf as (texts: readonly string[]) => Promise<TokenRow[]>;
  const template = templateOf(metadata);
  if (template) {
    const inputs = madeUpTexts(words, count, random, () => 1 + Math.floor(MOST_INPUT * random() ** 2));
    const prompts = await rowsOf(inputs.map((input) => template.prompt(withNumbers(input, random))));
    const said = await goOn(prompts, asking, likeliest, await lastOf(template, rowsOf));
    return said.map((row, i) => askedFrom(row, idsOf(prompts[i]!).length - 1));
  }
  const lines = await rowsOf(madeUpTexts(words, Math.ceil(ALONE * count), random));
  const begun = await rowsOf(madeUpTexts(words, count - lines.length, random).map(beginning));
  const said = await goOn(begun, asking, (answer) => likeliest(drawnFrom(answer, random)));
  return [...lines, ...said.map((row) => askedFrom(row, 0))];
}

/** The prompt of a task, and the text that ends its answers. */
interface Template {
  readonly prompt: (input: string) => string;
  readonly end: string;
}

/** The `template` of a task's metadata, with other strings of it filled in; undefined where it is the input alone. */
export function templateOf({ template, input: _, output: __, ...facts }: TaskMetadata): Template | undefined {
  if (typeof template !== "string") return undefined;
  const filled = template.replace(/\{(\w+)\}/g, (name, key) => (typeof facts[key] === "string" ? facts[key] : name));
  const [asked, end = ""] = filled.split("{output}");
  if (!asked!.includes("{input}") || asked!.trim() === "{input}") return undefined;
  // A space before an answer belongs to its first token.
  return { prompt: (input) => asked!.trimEnd().replaceAll("{input}", () => input), end };
}

function withNumbers(input: string, random: () => number): string {
  const number = (): string => String(Math.floor(10 ** (DIGITS * random())));
  return input.replace(/\S+/g, (word) => (random() < NUMBERS ? number() : word));
}

/** The token that ends an answer; undefined where the template names none. */
async function lastOf({ end }: Template, rowsOf: (texts: readonly string[]) => Promise<TokenRow[]>) {
  if (end.trim() === "") return undefined;
  const [without, whole] = await rowsOf(["a a", `a a${end}`]);
  return idsOf(whole!)[idsOf(without!).length];
}

function beginning(text: string): string {
  return text.split(" ").slice(0, BEGUN).join(" ");
}

/** Rows with what the model says after them, until it ends. @param choose the token that is said */
async function goOn(
  begun: readonly TokenRow[],
  { next }: Asking,
  choose: (answer: Distribution) => number,
  end?: number,
): Promise<TokenRow[]> {
  const rows = [...begun];
  for (let said = 0; said < SAID; said++) {
    const open = [...rows.entries()].filter(([, row]) => said === 0 || idsOf(row).at(-1) !== end);
    if (open.length === 0) break;
    const asked = new Map<Row, number>(open.map(([i, row]) => [atEnd(row), i]));
    for await (const [row, answer] of next([...asked.keys()]))
      rows[asked.get(row)!] = longer(row as TokenRow, choose(answer));
  }
  return rows;
}

const ANY: Distribution = { probabilities: [1], classes: [0] };

/** All ids of a row, with the last that is wanted. */
function idsOf({ tokens: { ids, wanted } }: TokenRow): readonly number[] {
  return [...ids, Number(wanted.at(-1)!.classes![0])];
}

function askedAt(row: TokenRow, ids: readonly number[], at: readonly number[]): TokenRow {
  return { ...row, tokens: { ids, at, wanted: at.map((i) => ({ ...ANY, classes: [ids[i + 1] ?? 0] })) } };
}

/** The row asked what comes after its last token. */
function atEnd(row: TokenRow): TokenRow {
  const ids = idsOf(row);
  return askedAt(row, ids, [ids.length - 1]);
}

/** The row that was asked for its end, with what was answered. */
function longer(row: TokenRow, id: number): TokenRow {
  const ids = [...row.tokens.ids, id];
  return { ...row, tokens: { ids: ids.slice(0, -1), at: [ids.length - 2], wanted: [{ ...ANY, classes: [id] }] } };
}

/** The row asked for every token behind the one at `from`. */
function askedFrom(row: TokenRow, from: number): TokenRow {
  const ids = idsOf(row).slice(0, -1);
  return askedAt(
    row,
    ids,
    [...ids.keys()].filter((i) => i >= from),
  );
}
