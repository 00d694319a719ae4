/**
 * Training examples: checked before anything runs, split into training set and hold-out, cut into batches with targets. Knows no model.
 */
import { checkList, nearest } from "../arguments.ts";
import { shuffle } from "../tensor/random.ts";
import { type Distribution, largest } from "./probabilities.ts";

/** One message of a chat, in the form that chat templates take. */
export interface Message {
  readonly role: string;
  readonly content: string;
}

/**
 * One training example. `Feeds` are a runtime's inputs for it, a batch of one.
 *
 * - Models that give a row of logits for each text: `text` or `feeds`, with a `label` or a `target`.
 * - Language models: `prompt` and `completion`; or `messages`; or `text`, with every token learned; or `feeds` and `classes`.
 * - Models that label tokens: `words` and `labels`; or `feeds` and `classes`.
 */
export interface Example<Feeds = unknown> {
  /** Input of the trainer's `encode`. */
  readonly text?: string | undefined;
  /** Input of a language model; not learned. */
  readonly prompt?: string | undefined;
  /** Continuation of the prompt: learned, together with its end. */
  readonly completion?: string | undefined;
  /** A chat, written by the tokenizer's template. The last message, the assistant's, is learned. */
  readonly messages?: readonly Message[] | undefined;
  /** Words; the first token of each has a label. */
  readonly words?: readonly string[] | undefined;
  /** Labels of the words; null: none. */
  readonly labels?: readonly (string | null)[] | undefined;
  /** Class of each position of `feeds`: for a language model, the next token. -1: none. */
  readonly classes?: ArrayLike<number> | undefined;
  /** Model inputs instead of a text. */
  readonly feeds?: Feeds | undefined;
  /** A label by name, or its number. */
  readonly label?: string | number | undefined;
  /** Probability of each label, for instance another model's answer, instead of a label. */
  readonly target?: ArrayLike<number> | undefined;
  /** Weight in the loss. Default: 1. */
  readonly weight?: number | undefined;
}

/** Question to a classifier. */
export type Unlabelled<Feeds> = Pick<Example<Feeds>, "text" | "feeds">;

/** Token ids, the positions where the model is asked, and the answers wanted there. */
export interface Tokens {
  /** Token ids; those of the decoder where there is one. */
  readonly ids: readonly number[];
  /** Token ids of the encoder, where there is one. */
  readonly source?: readonly number[] | undefined;
  /** Positions of answers, in order. */
  readonly at: readonly number[];
  /** Wanted answer at each position. */
  readonly wanted: readonly Distribution[];
}

/** A checked example. */
export interface Row<Feeds = unknown> {
  readonly tokens?: Tokens | undefined;
  readonly text: string | undefined;
  readonly feeds: Feeds | undefined;
  /** Number of the label; the most probable one of a target. */
  readonly label: number;
  readonly target?: ArrayLike<number> | undefined;
  /** Wanted inputs of the head's last layer. */
  readonly features?: Float32Array | undefined;
  readonly weight: number;
}

/**
 * Checks examples of a classifier.
 * @param encodes whether texts can be encoded
 * @throws RangeError for an unknown label, invalid probabilities, one label only, an empty text, an invalid weight
 * @throws TypeError for an example without text or feeds, or without label or target, and for texts where nothing encodes them
 */
export function checkExamples<Feeds>(
  examples: readonly Example<Feeds>[],
  labels: readonly string[],
  encodes: boolean,
): Row<Feeds>[] {
  checkList("fit", examples, "examples");
  const rows = examples.map(({ text, feeds, label, target, weight = 1 }, i): Row<Feeds> => {
    const at = `example ${i}`;
    if ((label === undefined) === (target === undefined))
      throw new TypeError(`${at}: expected a label or a target, got ${target ? "both" : "neither"}`);
    if (target) checkTarget(target, labels.length, at);
    const number = target ? largest(target) : typeof label === "number" ? label : labels.indexOf(label!);
    if (labels[number] === undefined) {
      const [close] = nearest(label as string, labels);
      const advice = close === undefined ? `they are ${labels.join(", ")}` : `did you mean ${close}?`;
      throw new RangeError(`${at}: the label ${JSON.stringify(label)} is none of the trainer's; ${advice}`);
    }
    if (text === undefined && feeds === undefined) throw new TypeError(`${at}: has neither text nor feeds`);
    if (feeds === undefined && text!.trim() === "") throw new RangeError(`${at}: its text is empty`);
    if (feeds === undefined && !encodes) throw new TypeError(`${at}: is a text, and the trainer has no \`encode\``);
    if (!(weight >= 0 && weight < Infinity))
      throw new RangeError(`${at}: its weight is ${weight}, expected a number ≥ 0`);
    return { text: feeds === undefined ? text : undefined, feeds, label: number, target, weight };
  });
  const seen = new Set(rows.filter(({ weight }) => weight > 0).map(({ label }) => label));
  // Targets differ between texts even where one label is the most probable in all of them.
  if (seen.size < 2 && !rows.some(({ target, weight }) => target && weight > 0)) {
    const which = seen.size === 0 ? "no label" : `one label only, "${labels[[...seen][0]!]}"`;
    throw new RangeError(`the ${rows.length} examples have ${which}; at least two labels are needed`);
  }
  return rows;
}

function checkTarget(target: ArrayLike<number>, labels: number, at: string): void {
  if (target.length !== labels)
    throw new RangeError(`${at}: its target has ${target.length} probabilities, there are ${labels} labels`);
  const values = Array.from(target);
  const bad = values.find((value) => !(value >= 0 && value < Infinity));
  if (bad !== undefined) throw new RangeError(`${at}: its target has the probability ${bad}, expected numbers ≥ 0`);
  const sum = values.reduce((a, b) => a + b, 0);
  if (Math.abs(sum - 1) > 1e-3)
    throw new RangeError(`${at}: the probabilities of its target sum to ${sum}, expected 1`);
}

/**
 * Takes a share of every label's examples as hold-out, but leaves at least two of each label.
 * @param share from 0 to less than 1
 */
export function splitHoldout<T extends { label: number }>(
  rows: readonly T[],
  share: number,
  random: () => number,
): { train: T[]; holdout: T[] } {
  const train: T[] = [];
  const holdout: T[] = [];
  for (const label of [...new Set(rows.map((row) => row.label))].sort((a, b) => a - b)) {
    const of = rows.filter((row) => row.label === label);
    const count = Math.max(0, Math.min(Math.round(of.length * share), of.length - 2));
    const shuffled = shuffle(of, random);
    holdout.push(...shuffled.slice(0, count));
    train.push(...shuffled.slice(count));
  }
  return { train, holdout };
}

/** Batches that are cut from rows sorted by length: few, so that chance remains; enough to pad little. */
const SORTED = 8;

/** Cuts all rows into shuffled batches of rows with similar lengths. */
export function toBatches<T>(
  rows: readonly T[],
  size: number,
  lengths: ReadonlyMap<T, number>,
  random: () => number,
): T[][] {
  const order = shuffle([...rows], random);
  const batches: T[][] = [];
  for (let from = 0; from < order.length; from += SORTED * size) {
    const some = order.slice(from, from + SORTED * size).sort((a, b) => lengths.get(a)! - lengths.get(b)!);
    for (let at = 0; at < some.length; at += size) batches.push(some.slice(at, at + size));
  }
  return shuffle(batches, random);
}

/**
 * Targets [rows, labels] of a batch. A row sums to its weight; `smoothing` of it is spread over all labels. Weights are relative: those
 * of a batch have the mean 1.
 */
export function targetsOf(
  rows: readonly Pick<Row, "label" | "target" | "weight">[],
  labels: number,
  smoothing: number,
): Float32Array<ArrayBuffer> {
  const targets = new Float32Array(rows.length * labels);
  const mean = rows.reduce((sum, { weight }) => sum + weight, 0) / rows.length || 1;
  for (const [i, { label, target, weight }] of rows.entries()) {
    const all = weight / mean;
    for (let c = 0; c < labels; c++) {
      const wanted = target ? target[c]! : Number(c === label);
      targets[i * labels + c] = all * (smoothing / labels + (1 - smoothing) * wanted);
    }
  }
  return targets;
}
