/**
 * Answers of adapters as the teacher: to questions of the user, or to synthetic ones, one part to learn from and one to
 * evaluate by. An adapter's own factors and head take the place of those that a pack's coefficients make, in the
 * session that trains tasks. Distilling reduces the divergence between the two answers; packing is judged by it.
 */

import type { Adapter } from "../adapters/adapter.ts";
import type { TaskInfo } from "../core/pack.ts";
import { TaskError } from "../errors.ts";
import type { TaskBlob, TaskMetadata } from "../format/format.ts";
import type { Session } from "../session/session.ts";
import { type BatchFeeds, checkTokenizer, type Tokenizer } from "../session/tokens.ts";
import type { AbortOptions } from "../source.ts";
import { shuffle, uniform } from "../tensor/random.ts";
import type { Term } from "../tensor/term.ts";
import { answers } from "./objective.ts";
import { layersOf, zerosOf } from "./state.ts";
import {
  certain,
  type Distribution,
  drawnFrom,
  type Example,
  likeliest,
  type Row,
  type SequenceOptions,
  type Supervision,
  supervisionOf,
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

/** A task of the pack that can be distilled, with the layers of its head. */
export interface Distillable {
  readonly id: string;
  readonly entry: TaskInfo;
  readonly blob: TaskBlob;
  readonly head: readonly string[];
}

/** Options of the questions that an adapter answers as the teacher. */
export interface TeachOptions extends Questions, SequenceOptions {
  /**
   * Turns texts into the model's inputs, one row each: a tokenizer of transformers.js or @huggingface/tokenizers as it
   * is, which tells its words too, or a function.
   */
  readonly encode?: Tokenizer | undefined;
  /** Texts per step. Default: 8. Many small steps gain more than few large ones. */
  readonly batch?: number | undefined;
  /**
   * Most steps; they end earlier where questions held back gain no more. Default: 240. 0: coefficients are solved once,
   * nothing is trained.
   */
  readonly steps?: number | undefined;
  /** Share of the texts held back to evaluate by. Default: an eighth. */
  readonly holdout?: number | undefined;
  /** Default: 0. */
  readonly seed?: number | undefined;
  readonly signal?: AbortSignal | undefined;
}

/** Answers of an adapter. */
export interface TeacherOutputs {
  readonly supervision: Supervision;
  /** Numbers of the labels; none for language models. */
  readonly labels: string[];
  /** Questions to learn from, and those held back, with the adapter's answers. */
  readonly train: readonly Row[];
  readonly holdout: readonly Row[];
  /** True for questions that are synthetic, not the user's. */
  readonly synthetic: boolean;
  /** Questions ask for labels, the tokens of answers, or all tokens of texts. */
  readonly asked: "labels" | "answers" | "texts";
}

const LEAST_TEXTS = 8;
export const BATCH = 8;
/** Batches that show how answers depend on coefficients, before any step. */
export const BATCHES_TO_SOLVE = 24;
/** Most synthetic questions to learn from: more of them taught no more. */
const MOST_SYNTHETIC = 1024;
const SYNTHETIC_HOLDOUT = 128;

/**
 * Asks the adapter and turns its answers into targets.
 * @throws TaskError when the task has other labels than the adapter, or fewer than two
 */
export async function teacherOutputs(
  session: Session,
  adapter: Adapter,
  { id, blob, head }: Distillable,
  options: TeachOptions,
): Promise<TeacherOutputs> {
  const { steps = 240, batch = BATCH, holdout: share = 0.125, seed = 0, signal } = options;
  const supervision = supervisionOf(session, { ...options, labels: [] });
  const teacher: Teacher = { ...(await adapterWeights(session, adapter, head)), supervision, signal };
  // Texts that no step would use are not asked.
  const most = Math.max(steps, BATCHES_TO_SOLVE) * batch;
  const given = questionsOf(options);
  let train: Row[];
  let holdout: Row[];
  if (given) {
    const count = Math.max(LEAST_TEXTS, Math.ceil(most / (1 - share)));
    const questions = shuffle([...given], uniform(seed)).slice(0, count);
    const rows = await supervision.ask(questions, "distill");
    const asked = await ask(teacher, rows);
    const answered = rows.map((row) => asked.get(row)!);
    const held = Math.min(Math.max(2, Math.round(share * rows.length)), rows.length - 2);
    holdout = answered.slice(0, held);
    train = answered.slice(held);
  } else {
    const words = wordsOf(options.encode, [...session.pack.tasks.values(), adapter]);
    if (session.inputNames.includes("decoder_input_ids"))
      throw new TypeError("no text can be made for a model with a decoder of its own: give prompts and completions");
    const made = (count: number, seed: number): Promise<Row[]> =>
      syntheticQuestions(teacher, adapter.metadata, words, count, uniform(seed));
    // Made separately, so that no line to evaluate by is crossed from one to learn from.
    train = await made(Math.min(most, MOST_SYNTHETIC), seed);
    holdout = await made(SYNTHETIC_HOLDOUT, seed + 1);
  }
  const last = headInputs(session.trainable!, head).find(({ out }) => out === undefined);
  const weight = adapter.saved.find(({ name }) => name === `${last?.module}.weight`);
  // A language model has none.
  const count = weight?.shape[0] ?? (supervision.tokens ? 0 : train[0]!.wanted[0]!.probabilities.length);
  if (count === 1) {
    const message = `task "${id}" cannot be distilled: the model gives one number for a text, and answers are compared by two labels at least`;
    throw new TaskError(message, { task: id });
  }
  const stored = blob.parameters.find(({ name }) => name === `${last?.module}.weight`)?.shape[0];
  if (stored !== undefined && stored !== count) {
    const message = `task "${id}" has ${stored} labels, ${adapter.file} ${count}: it was not made of this adapter`;
    throw new TaskError(message, { task: id });
  }
  const labels = Array.from({ length: count }, (_, i) => String(i));
  const wholeTexts = given ? options.texts !== undefined : !templateOf(adapter.metadata);
  const asked = !supervision.tokens ? "labels" : wholeTexts ? "texts" : "answers";
  return { supervision, labels, train, holdout, synthetic: !given, asked };
}

/** The user's questions; undefined where there are none. @throws TypeError for questions in several ways */
function questionsOf({ texts, feeds, examples }: Questions): readonly Example[] | undefined {
  const ways = Object.entries({ texts, feeds, examples }).flatMap(([name, value]) =>
    value === undefined ? [] : [name],
  );
  if (ways.length > 1) throw new TypeError(`got ${ways.join(" and ")}, expected one of them`);
  return examples ?? texts?.map((text) => ({ text })) ?? feeds?.map((feeds): Unlabelled => ({ feeds }));
}

/** Checks the questions, where there are some. @throws TypeError, RangeError when they are too few or empty */
export function checkQuestions(options: TeachOptions): void {
  if (options.encode !== undefined) checkTokenizer("encode", options.encode);
  else if (!options.feeds) throw new TypeError("texts need `encode`, a tokenizer");
  const given = questionsOf(options);
  if (!given) return;
  if (given.length < LEAST_TEXTS)
    throw new RangeError(`expected ${LEAST_TEXTS} texts at least, and some hundreds to gain by; got ${given.length}`);
  const empty = given.findIndex(({ text }) => text?.trim() === "");
  if (empty >= 0) throw new RangeError(`text ${empty} is empty`);
}

/** A model that answers as an adapter itself. */
interface Teacher extends AbortOptions {
  readonly model: TrainableModel;
  readonly weights: TaskWeights;
  readonly supervision: Supervision;
}

async function ask({ weights, ...teacher }: Teacher, rows: readonly Row[]): Promise<Map<Row, Row>> {
  const { distribution } = teacher.supervision;
  const asked = new Map<Row, Row>();
  for await (const { row, logits, features } of answers(teacher, rows, weights, { ...teacher, features: true }))
    asked.set(row, { ...row, wanted: logits.map(distribution), features });
  return asked;
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
  const refuse = (what: string): TaskError =>
    new TaskError(`${adapter.file} ${what}: it cannot be asked here`, { task: adapter.id });
  for (const adapted of adapter.modules.values()) {
    const { name, in: width, out, rank } = adapted;
    const module = pack.modules.find((known) => known.name === name);
    if (module?.in !== width || module.out !== out)
      throw new TaskError(`${adapter.file} adapts "${name}" [${out}, ${width}], which the pack does not`, {
        task: adapter.id,
      });
    modules.push({ name, in: width, out, privateRank: rank });
    const { A, Bt, magnitude } = await adapted.read();
    if (magnitude) throw refuse(`has a DoRA magnitude of "${name}"`);
    terms.set(name, { rank, A, Bt });
  }
  const other = adapter.saved.find(({ role }) => role !== "saved");
  if (other) throw refuse(`brings "${other.name}" (${other.role})`);
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

// Questions that the program makes, where a user gives no text: words of the tokenizer's vocabulary in no order, among
// them those of the names of tasks and labels. Most of a classifier's are crossed, round by round, from the lines whose
// answers came closest to each label, since lines at random hardly reach some.

/** The share of a crossed line's words that are drawn anew. */
const DRAWN = 0.3;
/** Lines that are crossed for a label: those that came closest to it. */
const CLOSEST = 12;
/**
 * A classifier's lines: the share that is drawn at random, and the rounds in which the others are crossed from all
 * lines before. Chosen with their length and number by KL on test rows of eight tasks of own-seed and of hub, among
 * twelve settings.
 */
const AT_RANDOM = 0.2;
const ROUNDS = 8;

async function syntheticQuestions(
  teacher: Teacher,
  metadata: TaskMetadata,
  words: Words,
  count: number,
  random: () => number,
): Promise<Row[]> {
  const { supervision } = teacher;
  const rowsOf = (texts: readonly string[]): Promise<Row[]> =>
    supervision.ask(
      texts.map((text): Example => ({ text })),
      "distill",
    );
  const asked: Row[] = [];
  const learn = async (rows: readonly Row[]) => asked.push(...(await ask(teacher, rows)).values());
  if (supervision.tokens) await learn(await tokenQuestions(teacher, metadata, words, count, rowsOf, random));
  else {
    await learn(await rowsOf(syntheticTexts(words, Math.ceil(count * AT_RANDOM), random)));
    for (let round = 0; round < ROUNDS; round++) {
      const lines = Math.ceil((count - asked.length) / (ROUNDS - round));
      await learn(await rowsOf(crossed(asked, words, lines, random)));
    }
  }
  return asked;
}

/**
 * Lines for each label in turn, going on from the round before, crossed from two of those whose answers came closest to
 * it.
 */
function crossed(asked: readonly Row[], words: Words, count: number, random: () => number): string[] {
  const labels = asked[0]!.wanted[0]!.probabilities.length;
  const likely = ({ wanted }: Row, label: number): number => wanted[0]!.probabilities[label]!;
  const closest = Array.from({ length: labels }, (_, label) =>
    [...asked].sort((a, b) => likely(b, label) - likely(a, label)).slice(0, CLOSEST),
  );
  return Array.from({ length: count }, (_, i) => {
    const near = closest[(asked.length + i) % labels]!;
    const both = [pick(near, random), pick(near, random)].flatMap(({ text }) => text!.split(" "));
    const mixed = both.map((word) => (random() < DRAWN ? draw(words, random) : word));
    return shuffle(mixed, random).slice(0, lengthOf(random)).join(" ");
  });
}

// Lines of words in no order: of the tokenizer's vocabulary, and of the names of tasks and labels.

/** A tokenizer of transformers.js or of @huggingface/tokenizers, as far as words are read from it. */
interface Vocabulary {
  get_vocab?(withAdded?: boolean): ReadonlyMap<string, number> | Readonly<Record<string, number>>;
  decode?(ids: number[]): string;
}

interface Words {
  /** Whole words of the vocabulary, by number: vocabularies are made from frequent words to rare ones. */
  readonly all: readonly string[];
  readonly names: readonly string[];
}

const SHORTEST = 3;
const LONGEST = 12;
/**
 * A word of rank r is drawn in proportion to 1 ÷ (r + FREQUENT): as in text (B. Mandelbrot, 1953), but less steeply, so
 * that lines are not made of articles and prepositions.
 */
const FREQUENT = 30;
const NAMED = 0.1;

/**
 * Words of a tokenizer, and of the names of tasks and their labels.
 * @throws TypeError for a tokenizer that does not tell its vocabulary
 */
function wordsOf(encode: unknown, known: readonly Pick<Adapter, "id" | "metadata">[]): Words {
  const all = vocabularies.get(encode as object) ?? wholeWords(encode);
  vocabularies.set(encode as object, all);
  const names = known.flatMap(({ id, metadata }) => [id, ...labelsOf(metadata)]);
  return { all, names: [...new Set(names.flatMap((name) => name.match(/\p{Lu}?[\p{Ll}\p{Lo}]+|\p{Lu}{2,}/gu) ?? []))] };
}

/** Words by tokenizer: each adapter of a pack asks for them. */
const vocabularies = new WeakMap<object, readonly string[]>();

function wholeWords(encode: unknown): string[] {
  const { get_vocab, decode } = (encode ?? {}) as Vocabulary;
  if (!get_vocab || !decode)
    throw new TypeError(
      `expected texts or examples, or a tokenizer with get_vocab and decode in \`encode\`, to make texts from its words`,
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
  if (all.length === 0) throw new TypeError(`the vocabulary of \`encode\` has no words; give texts`);
  return all;
}

function labelsOf({ labels }: { readonly labels?: unknown }): string[] {
  return Array.isArray(labels) ? labels.filter((label) => typeof label === "string") : [];
}

/** Lines of words. @param length gives the number of words of a line */
function syntheticTexts(
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

// Questions for a language model, made of words. If the task's metadata has a `template`, questions follow it, and the
// tokens of the model's answers are compared. Otherwise half of the questions are lines of words, and the model
// continues the rest.

/** Words of an input that a template takes: few are likelier, since most inputs are names and terms. */
const MOST_INPUT = 6;
/** The share of such words that are numbers. */
const NUMBERS = 0.1;
const DIGITS = 4;
/** The share of lines that the model does not go on from, where no template is known. */
const ALONE = 0.5;
const BEGUN = 4;
/** Tokens that it says at most. Twice as many take three times as long. */
const SAID = 8;

/** Rows of texts, asked at every token but the first. */
type RowsOf = (texts: readonly string[]) => Promise<readonly Row[]>;

async function tokenQuestions(
  teacher: Teacher,
  metadata: TaskMetadata,
  words: Words,
  count: number,
  rowsOf: RowsOf,
  random: () => number,
): Promise<Row[]> {
  const template = templateOf(metadata);
  if (template) {
    const inputs = syntheticTexts(words, count, random, () => 1 + Math.floor(MOST_INPUT * random() ** 2));
    const prompts = await rowsOf(inputs.map((input) => template.prompt(withNumbers(input, random))));
    const said = await goOn(prompts, teacher, likeliest, await lastOf(template, rowsOf));
    return said.map((row, i) => askedFrom(row, idsOf(prompts[i]!).length - 1));
  }
  const lines = await rowsOf(syntheticTexts(words, Math.ceil(ALONE * count), random));
  const begun = await rowsOf(syntheticTexts(words, count - lines.length, random).map(beginning));
  const said = await goOn(begun, teacher, (answer) => likeliest(drawnFrom(answer, random)));
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
async function lastOf({ end }: Template, rowsOf: RowsOf): Promise<number | undefined> {
  if (end.trim() === "") return undefined;
  const [without, whole] = await rowsOf(["a a", `a a${end}`]);
  return idsOf(whole!)[idsOf(without!).length];
}

function beginning(text: string): string {
  return text.split(" ").slice(0, BEGUN).join(" ");
}

/** Rows with the tokens that the model says after them, until it ends. @param choose the token that is said */
async function goOn(
  begun: readonly Row[],
  { weights, ...teacher }: Teacher,
  choose: (answer: Distribution) => number,
  end?: number,
): Promise<Row[]> {
  const rows = [...begun];
  for (let said = 0; said < SAID; said++) {
    const open = [...rows.entries()].filter(([, row]) => said === 0 || idsOf(row).at(-1) !== end);
    if (open.length === 0) break;
    const asked = new Map<Row, number>(open.map(([i, row]) => [askedAt(row, idsOf(row), [idsOf(row).length - 1]), i]));
    for await (const { row, logits } of answers(teacher, [...asked.keys()], weights, teacher)) {
      const next = choose(teacher.supervision.distribution(logits[0]!));
      rows[asked.get(row)!] = { ...row, wanted: [certain(next)] };
    }
  }
  return rows;
}

/** All ids of a row, with the last that is wanted. */
function idsOf({ tokens, wanted }: Row): readonly number[] {
  return [...tokens!.ids, Number(wanted.at(-1)!.classes![0])];
}

function askedAt(row: Row, ids: readonly number[], at: readonly number[]): Row {
  return { ...row, tokens: { ids, at }, wanted: at.map((i) => certain(ids[i + 1] ?? 0)) };
}

/** The row asked for every token behind the one at `from`. */
function askedFrom(row: Row, from: number): Row {
  const ids = idsOf(row).slice(0, -1);
  const at = [...ids.keys()].filter((i) => i >= from);
  return askedAt(row, ids, at);
}
