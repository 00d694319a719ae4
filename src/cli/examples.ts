/**
 * Texts from a file: plain, one on each line; labelled, as JSON lines or a table of two columns; or prompts with completions, or
 * chats, as JSON lines. Every line is checked, and a wrong one named.
 */

import type { Adapter } from "../adapters/adapter.ts";
import { nearest } from "../arguments.ts";
import { SourceError } from "../errors.ts";
import { templateOf } from "../train/questions.ts";
import type { Message } from "../train/supervision.ts";
import { readText } from "./files.ts";

/** Texts, one on each line or in `{"text": "…"}`, without what is there twice. @throws SourceError */
async function readLines(path: string): Promise<string[]> {
  const at = refuser(path);
  const lines = linesOf(await readContent(path));
  const json = firstObject(lines) !== undefined;
  const texts = lines.map(({ line, text }) => {
    if (!json) return text.trim();
    const object = parsed(text, '{"text": "…"}', (message) => at(line, message));
    if (typeof object["text"] === "string") return object["text"].trim();
    throw at(line, `expected "text", ${OTHERS}; got ${keysOf(object)}`);
  });
  const different = [...new Set(texts)].filter((text) => text !== "");
  if (different.length === 0) throw new SourceError("has no text; expected one on each line", { file: path });
  return different;
}

/** A file's text. @throws SourceError where it cannot be read, or is one list of JSON */
async function readContent(path: string): Promise<string> {
  const content = (await readText(path)).replace(/^\uFEFF/, "");
  if (!/\.jsonl?$/.test(path) || !content.trimStart().startsWith("[")) return content;
  throw new SourceError("is a list; expected JSON lines, an object on each", { file: path });
}

/** Lines that are not empty, with their numbers. */
function linesOf(content: string): { line: number; text: string }[] {
  const lines = content.split(/\r?\n/);
  return lines.map((text, i) => ({ line: i + 1, text })).filter(({ text }) => text.trim() !== "");
}

/** The object on the first line; undefined where that is plain text. */
function firstObject(lines: readonly { readonly text: string }[]): Record<string, unknown> | undefined {
  try {
    return objectIn(lines[0]?.text ?? "");
  } catch {
    return undefined;
  }
}

/** The object that JSON holds; undefined for anything else. @throws SyntaxError */
function objectIn(text: string): Record<string, unknown> | undefined {
  const value: unknown = JSON.parse(text);
  return typeof value === "object" && value !== null && !Array.isArray(value)
    ? (value as Record<string, unknown>)
    : undefined;
}

/** What an object has, for a message. */
function keysOf(object: Readonly<Record<string, unknown>>): string {
  const keys = Object.keys(object).map((key) => JSON.stringify(key));
  return keys.length > 0 ? keys.join(", ") : "{}";
}

/** What a model is asked: texts, or examples with completions, whose tokens are asked for. */
export type Asked =
  | { readonly texts: readonly string[]; readonly examples?: undefined }
  | { readonly examples: readonly Completion[]; readonly texts?: undefined };

/** Lines of text; or JSON lines, with texts or completions. @throws SourceError */
export async function readQuestions(path: string): Promise<Asked> {
  const examples = await readCompletions(path);
  return examples ? { examples } : { texts: await readLines(path) };
}

/** Whether prompts are asked, which must not be cut: those of examples, or of templates where questions are made. */
export function asksPrompts(
  { texts, examples }: { readonly texts?: unknown; readonly examples?: unknown },
  adapters: readonly Pick<Adapter, "metadata">[],
): boolean {
  if (texts) return false;
  return examples !== undefined || adapters.some(({ metadata }) => templateOf(metadata) !== undefined);
}

/** What a language model learns from. */
export type Completion = { readonly prompt: string; readonly completion: string } | { readonly messages: Message[] };

/**
 * Reads `{"prompt": "…", "completion": "…"}` or `{"messages": [{"role": "…", "content": "…"}, …]}` on each line.
 * @returns undefined where the first line has none of these keys
 * @throws SourceError naming the line, what was expected and what was found
 */
export async function readCompletions(path: string): Promise<Completion[] | undefined> {
  const lines = linesOf(await readContent(path));
  const keys = Object.keys(firstObject(lines) ?? {});
  const cut = /^\s*\{\s*"(prompt|completion|messages)"/.test(lines[0]?.text ?? "");
  if (!cut && !keys.some((key) => COMPLETION.includes(key))) return undefined;
  const expected = '{"prompt": "…", "completion": "…"} or {"messages": […]}';
  return lines.map(({ line, text }) => {
    const refuse = (message: string): SourceError => refuser(path)(line, message);
    return completionOf(parsed(text, expected, refuse), refuse);
  });
}

const COMPLETION = ["prompt", "completion", "messages"];
/** What a line may have instead of a text. */
const OTHERS = 'or "prompt" and "completion", or "messages"';

function completionOf(object: Readonly<Record<string, unknown>>, refuse: (message: string) => SourceError): Completion {
  const { prompt, completion, messages } = object;
  if (Array.isArray(messages)) {
    const wrong = messages.find((one) => typeof one?.role !== "string" || typeof one?.content !== "string");
    if (wrong !== undefined) throw refuse(`expected messages with "role" and "content", got ${found(wrong)}`);
    if (messages.at(-1)?.role !== "assistant")
      throw refuse(`expected the assistant's message at the end, got ${found(messages.at(-1)?.role)}`);
    return { messages };
  }
  for (const key of ["prompt", "completion"]) {
    const value = object[key];
    if (typeof value === "string") continue;
    throw refuse(`expected "${key}" with a string, got ${value === undefined ? keysOf(object) : found(value)}`);
  }
  if ((completion as string).trim() === "") throw refuse("its completion is empty");
  return { prompt, completion } as Completion;
}

function refuser(path: string): Refuse {
  return (line, message) => new SourceError(`line ${line}: ${message}`, { file: path });
}

export interface LabelledText {
  readonly text: string;
  readonly label: string;
}

/** One row of the file, and on which line it begins. */
interface Row {
  readonly line: number;
  readonly text: unknown;
  readonly label: unknown;
}

/**
 * Reads `{"text": "…", "label": "…"}` on each line; or `label<TAB>text`, or in a file named .csv `label,text`, whose first line
 * may name the columns in either order.
 * @param known the labels that there may be. Default: those of the file, in the order in which they appear
 * @throws SourceError naming the line, what was expected and what was found
 */
export async function readExamples(
  path: string,
  known: readonly string[] | undefined,
): Promise<{ examples: LabelledText[]; labels: readonly string[] }> {
  const at = refuser(path);
  const whole = await readContent(path);
  const rows = whole.trimStart().startsWith("{")
    ? jsonRows(whole, at)
    : tableRows(whole, path.endsWith(".csv") ? "," : "\t", at);
  const seen = new Set<string>();
  const examples = rows.map(({ line, text, label }): LabelledText => {
    if (typeof text !== "string") throw at(line, `expected "text" with a string, got ${found(text)}`);
    if (text.trim() === "") throw at(line, "its text is empty");
    if (typeof label !== "string" && typeof label !== "number")
      throw at(line, `expected "label" with a string, got ${found(label)}`);
    const name = String(label).trim();
    if (name === "") throw at(line, "its label is empty");
    if (known && !known.includes(name)) {
      const [close] = nearest(name, known);
      const meant = close === undefined ? "" : `; did you mean ${close}?`;
      throw at(line, `the label "${name}" is none of --labels ${known.join(",")}${meant}`);
    }
    seen.add(name);
    return { text, label: name };
  });
  if (seen.size < 2) {
    const [only] = seen;
    const message =
      only === undefined
        ? "has no examples; expected a text and its label on each line"
        : `all ${examples.length} examples have the label "${only}"; at least two labels are needed`;
    throw new SourceError(message, { file: path });
  }
  return { examples, labels: known ?? [...seen] };
}

type Refuse = (line: number, message: string) => SourceError;

function found(value: unknown): string {
  return value === undefined ? "none" : JSON.stringify(value);
}

function jsonRows(content: string, at: Refuse): Row[] {
  return linesOf(content).map(({ line, text }) => {
    const object = parsed(text, '{"text": "…", "label": "…"}', (message) => at(line, message));
    const { text: words, label } = object;
    if (words === undefined) throw at(line, `expected "text" and "label", ${OTHERS}; got ${keysOf(object)}`);
    return { line, text: words, label };
  });
}

/** The object that a line holds. */
function parsed(line: string, expected: string, refuse: (message: string) => SourceError): Record<string, unknown> {
  let object: Record<string, unknown> | undefined;
  try {
    object = objectIn(line);
  } catch (cause) {
    throw refuse(`is not valid JSON: ${(cause as Error).message}; expected ${expected}`);
  }
  if (object) return object;
  throw refuse(`expected ${expected}, got ${line.slice(0, 40)}`);
}

function tableRows(content: string, separator: "," | "\t", at: Refuse): Row[] {
  const records = separator === "," ? quotedRecords(content, at) : plainRecords(content);
  const head = records[0]?.cells.map((cell) => cell.trim().toLowerCase()) ?? [];
  const named = head.includes("text") && head.includes("label");
  const [labelAt, textAt] = named ? [head.indexOf("label"), head.indexOf("text")] : [0, 1];
  const columns = named ? head.length : 2;
  return records.slice(named ? 1 : 0).map(({ line, cells }) => {
    if (cells.length !== columns) {
      const form = named ? head.join(separator) : `label${separator}text`;
      const expected = form.replaceAll("\t", "<TAB>");
      throw at(line, `expected ${expected}, found ${cells.length} column${cells.length === 1 ? "" : "s"}`);
    }
    return { line, label: cells[labelAt], text: cells[textAt] };
  });
}

interface Cells {
  line: number;
  cells: string[];
}

function plainRecords(content: string): Cells[] {
  const records = content.split(/\r?\n/).map((text, i) => ({ line: i + 1, cells: text.split("\t") }));
  return records.filter(({ cells }) => cells.length > 1 || cells[0]!.trim() !== "");
}

/** RFC 4180: a cell in quotes may hold commas, line ends and doubled quotes. */
function quotedRecords(content: string, at: Refuse): Cells[] {
  const records: Cells[] = [];
  let line = 1;
  let record: Cells = { line, cells: [] };
  const cell = /("(?:[^"]|"")*"|[^",\r\n]*)(,|\r?\n|$)/y;
  while (cell.lastIndex < content.length) {
    const start = cell.lastIndex;
    const match = cell.exec(content);
    if (!match) throw at(line, `a quote is out of place: ${content.slice(start, start + 40).split(/\r?\n/)[0]}`);
    const [, value = "", end = ""] = match;
    record.cells.push(value.startsWith('"') ? value.slice(1, -1).replaceAll('""', '"') : value);
    line += match[0].split("\n").length - 1;
    if (end === "," && cell.lastIndex < content.length) continue;
    if (end === ",") record.cells.push("");
    if (record.cells.length > 1 || record.cells[0]!.trim() !== "") records.push(record);
    record = { line, cells: [] };
  }
  return records;
}
