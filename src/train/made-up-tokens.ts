/**
 * Questions for a language model, made of words. Where the task says how it is asked (`template` of its metadata), they are written so, and
 * the model's answers are what it is asked for. Where it does not, half of them are lines of words, and the model goes on from the others.
 */
import type { TaskMetadata } from "../format/format.ts";
import type { BatchFeeds } from "../session/tokens.ts";
import type { Row, Tokens } from "./examples.ts";
import { madeUpTexts, type Words } from "./made-up-lines.ts";
import { type Distribution, drawnFrom, likeliest } from "./probabilities.ts";

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

type TokenRow = Row<BatchFeeds> & { readonly tokens: Tokens };

interface Asking {
  /** Rows of texts, asked at every token but the first. */
  readonly rowsOf: (texts: readonly string[]) => Promise<Row<BatchFeeds>[]>;
  /** What comes after rows that are asked at their last token. */
  readonly next: (rows: readonly Row<BatchFeeds>[]) => AsyncIterable<[Row<BatchFeeds>, Distribution]>;
  readonly random: () => number;
}

/** Makes questions, with the positions that are asked. */
export async function tokenQuestions(
  words: Words,
  count: number,
  metadata: TaskMetadata,
  asking: Asking,
): Promise<Row<BatchFeeds>[]> {
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

/** How a task is asked, and what ends its answers. */
interface Template {
  readonly prompt: (input: string) => string;
  readonly end: string;
}

/** The `template` of a task's metadata, with other strings of it filled in; undefined where it says nothing beside the input. */
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
    const asked = new Map<Row<BatchFeeds>, number>(open.map(([i, row]) => [atEnd(row), i]));
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
