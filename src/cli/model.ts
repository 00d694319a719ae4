/**
 * Shared by commands that run a model: onnxruntime and a tokenizer, which are optional peers of the package; the texts
 * that a model is asked or taught, whose wrong lines are named; and outcomes that are kept so that a command which was
 * stopped goes on.
 */

import { createHash } from "node:crypto";
import { createReadStream, existsSync } from "node:fs";
import { readdir, rm, rmdir } from "node:fs/promises";
import { dirname, join, relative } from "node:path";
import { createEigenSession, type EigenSession } from "../../bindings/onnxruntime.ts";
import type { Ort } from "../../bindings/ort-engine.ts";
import type { Adapter } from "../adapters/adapter.ts";
import { filesOf } from "../adapters/formats.ts";
import type { Pack } from "../core/pack.ts";
import { BackendError, BaseMismatchError, SourceError } from "../errors.ts";
import { type Encode, encoderOf, type PlainTokenizer } from "../session/tokens.ts";
import { toUtf8 } from "../text.ts";
import type { FinishedOutcomes } from "../train/distill.ts";
import { templateOf } from "../train/questions.ts";
import { followsFromTokens, type Message } from "../train/supervision.ts";
import { type Run, weightFiles } from "./command.ts";
import { readJson, readText, stat, writeWhole } from "./files.ts";
import { type match, refuseUnknown, type runsOn, type Values } from "./options.ts";
import type { Output } from "./output.ts";

type ModelOptions = Values<typeof runsOn>;

interface OpenedModel {
  readonly ort: Ort;
  /** @throws BaseMismatchError for an input of the model that a tokenizer does not give */
  readonly encode: Encode;
}

/** Installing onnxruntime-node fetches files for GPUs, and fails where a proxy blocks them. */
export const WITHOUT_NUGET =
  "where that cannot reach NuGet: ONNXRUNTIME_NODE_INSTALL=skip npm install onnxruntime-node";

/** onnxruntime-node. @throws BackendError when it is not installed */
export async function openRuntime(command: string): Promise<Ort> {
  const ort = await peer<Ort>(command, "onnxruntime-node", () => import("onnxruntime-node"));
  // It warns of initializers that nothing uses.
  (ort.env as { logLevel?: string }).logLevel = "error";
  return ort;
}

/** A package that only some commands need. @throws BackendError naming it */
async function peer<T>(command: string, name: string, load: () => Promise<unknown>): Promise<T> {
  return (await load().catch((cause: Error) => {
    const skip = name === "onnxruntime-node" ? `; ${WITHOUT_NUGET}` : "";
    const message = `${command} needs the package ${name}: npm install ${name}${skip} (${cause.message})`;
    throw new BackendError(message, { backend: name, cause });
  })) as T;
}

/** @huggingface/tokenizers, as far as it is used. */
interface Tokenizers {
  readonly Tokenizer: new (
    rules: unknown,
    config: unknown,
  ) => PlainTokenizer & {
    decode(ids: number[]): string;
    get_vocab(withAdded?: boolean): Map<string, number>;
  };
}

/** @huggingface/jinja, as far as it is used. */
interface Jinja {
  readonly Template: new (text: string) => { render(values: object): string };
}

/**
 * Loads onnxruntime, and the tokenizer of a model with tokenizer_config.json and chat_template.jinja where they lie in
 * its folder.
 * @param whole texts are prompts with completions, which must not be cut
 * @throws BackendError when a package is not installed, SourceError when there is no tokenizer
 */
export async function openModel(
  command: string,
  model: string,
  { tokens: most, tokenizer: named }: Pick<ModelOptions, "tokens" | "tokenizer">,
  whole = false,
): Promise<OpenedModel> {
  const tokens = most ?? (whole ? 512 : 128);
  const ort = await openRuntime(command);
  const { Tokenizer } = await peer<Tokenizers>(
    command,
    "@huggingface/tokenizers",
    () => import("@huggingface/tokenizers"),
  );
  if (!existsSync(model)) throw new SourceError("cannot be read: there is no such file (ENOENT)", { file: model });
  const file = named ?? tokenizerOf(model);
  const fail = (message: string, cause?: unknown): never => {
    throw new SourceError(message, { file, cause });
  };
  if (!existsSync(file)) {
    const where = named === undefined ? ", nor one folder above" : "";
    fail(`there is no tokenizer${where}; say where its tokenizer.json is with --tokenizer`);
  }
  const inFolder = (name: string): string => join(dirname(file), name);
  const has = (name: string): boolean => existsSync(inFolder(name));
  const config = (has("tokenizer_config.json") ? await readJson(inFolder("tokenizer_config.json")) : {}) as Record<
    string,
    unknown
  >;
  const rules = await readJson(file);
  let tokenizer: InstanceType<typeof Tokenizer>;
  try {
    tokenizer = new Tokenizer(rules, config);
  } catch (cause) {
    const advice = "expected the tokenizer.json of the model";
    return fail(`holds no tokenizer: ${(cause as Error).message}; ${advice}`, cause);
  }
  const encode: Encode = async (texts, { add_special_tokens: special }, inputs) => {
    const unknown = inputs.find((name) => !followsFromTokens(name));
    if (unknown !== undefined) {
      const message = `the model takes "${unknown}", which a tokenizer does not give: use eigenlora/train with feeds of your own`;
      throw new BaseMismatchError(message, { module: unknown });
    }
    const feeds = await encoderOf(tokenizer, inputs, whole ? Infinity : tokens)(texts, special);
    const length = feeds["input_ids"]!.dims[1]!;
    if (length <= tokens) return feeds;
    throw new RangeError(
      `${JSON.stringify(texts[0]!.slice(0, 40))}… has ${length} tokens, more than --tokens ${tokens}`,
    );
  };
  const template =
    config["chat_template"] ??
    (has("chat_template.jinja") ? await readText(inFolder("chat_template.jinja")) : undefined);
  const words = { get_vocab: tokenizer.get_vocab.bind(tokenizer), decode: tokenizer.decode.bind(tokenizer) };
  return { ort, encode: Object.assign(encode, words, chatOf(command, config, template)) };
}

/** The end of a text and the writing of a chat, as tokenizers of transformers.js have them. */
function chatOf(command: string, config: Readonly<Record<string, unknown>>, template: unknown): object {
  const token = (name: string): unknown => {
    const found = config[name];
    return typeof found === "object" && found !== null ? (found as { content?: unknown }).content : found;
  };
  const eos_token = token("eos_token");
  if (typeof template !== "string") return { eos_token };
  const apply_chat_template = async (messages: unknown, options: { add_generation_prompt: boolean }) => {
    const { Template } = await peer<Jinja>(command, "@huggingface/jinja", () => import("@huggingface/jinja"));
    const { add_generation_prompt } = options;
    return new Template(template).render({ messages, add_generation_prompt, bos_token: token("bos_token"), eos_token });
  };
  return { eos_token, apply_chat_template };
}

/** The path of a model's tokenizer: in its folder, or one above, as where models lie in onnx/. */
export function tokenizerOf(model: string): string {
  const [here, above] = [".", ".."].map((folder) => join(dirname(model), folder, "tokenizer.json"));
  return !existsSync(here!) && existsSync(above!) ? above! : here!;
}

/** A session that can be trained, and the encoder of texts for its model. */
export async function openTrainable(
  command: string,
  model: string,
  pack: Pack,
  options: ModelOptions & Values<typeof match>,
  run: Run,
  whole = false,
): Promise<{ session: EigenSession; encode: Encode }> {
  const { names, ignore, anyBase } = options;
  const { ort, encode } = await openModel(command, model, options, whole);
  refuseUnknown(names, pack.modules, pack.name);
  const session = await createEigenSession(ort, model, pack, { trainable: true, names, ignore, anyBase });
  return { session: run.closing(session), encode };
}

// Outcomes that are kept. Files count by their content: another model or adapter may have come to lie at the same
// place.

/** Outcomes as files of a folder, by all that they depend on. */
export function finishedIn(folder: string, settings: unknown): FinishedOutcomes & { nameOf(key: string): string } {
  const text = JSON.stringify(settings);
  const nameOf = (key: string): string => join(folder, createHash("sha256").update(text).update(key).digest("hex"));
  return {
    nameOf,
    async read(key) {
      const path = nameOf(key);
      return existsSync(path) ? readText(path) : undefined;
    },
    write: async (key, json) => void (await writeWhole(nameOf(key), [toUtf8(json)])),
  };
}

/** Removes outcomes, of earlier settings too, and their folder unless something else is in it. */
export async function removeFinished(folder: string): Promise<void> {
  for (const name of await readdir(folder).catch(() => []))
    if (/^[0-9a-f]{64}(\.[0-9a-f]{8}\.tmp)?$/.test(name)) await rm(join(folder, name));
  await rmdir(folder).catch(() => undefined);
}

/** Digests of the files of adapters, whatever their folders are called and their files dated. */
export async function contents(adapters: readonly Adapter[], out: Output): Promise<[id: string, digest: string][]> {
  const digests: [string, string][] = [];
  for (const [i, adapter] of adapters.entries()) {
    digests.push([adapter.id, await digestOf(filesOf(adapter), adapter.file)]);
    out.progress({ stage: "reading", done: i + 1, total: adapters.length, unit: "adapters" });
  }
  return digests;
}

/** Digest of a model with the files of its weights, and of its tokenizer. */
export async function modelDigest(model: string, tokenizer: string = tokenizerOf(model)): Promise<string> {
  const folder = dirname(model);
  const weights = stat(model)?.isFile() ? (await weightFiles(model)).sort() : [];
  return digestOf([model, ...weights.map((name) => join(folder, name)), tokenizer], folder);
}

/** Names and contents of files. Whatever needs one that is missing reports that. */
async function digestOf(paths: readonly string[], folder: string): Promise<string> {
  const hash = createHash("sha256");
  for (const path of paths.filter((path) => stat(path)?.isFile())) {
    hash.update(`${relative(folder, path)}\n`);
    for await (const chunk of createReadStream(path)) hash.update(chunk as Uint8Array);
  }
  return hash.digest("hex");
}

// Texts: plain, one on each line, or JSON lines with texts, labelled texts, prompts with completions, or chats.

interface LabelledText {
  readonly text: string;
  readonly label: string;
}

type Completion = { readonly prompt: string; readonly completion: string } | { readonly messages: Message[] };

/** Questions for a model: texts, or examples with completions, whose tokens are asked for. */
export type Asked =
  | { readonly texts: readonly string[]; readonly examples?: undefined }
  | { readonly examples: readonly Completion[]; readonly texts?: undefined };

/** Lines of text; or JSON lines, with texts or completions. @throws SourceError */
export async function readQuestions(path: string): Promise<Asked> {
  const lines = await linesOf(path);
  if (hasCompletions(lines)) return { examples: lines.map(completionOf) };
  const isJson = lines[0]?.object !== undefined;
  const texts = lines.map((line) => (isJson ? textOf(line, "text", `{"text": "…"}, ${COMPLETION}`) : line.text).trim());
  if (texts.length === 0) throw new SourceError("has no text; expected one on each line", { file: path });
  return { texts: [...new Set(texts)] };
}

/** True when prompts are asked, which must not be cut: those of examples, or of templates where questions are made. */
export function asksPrompts(
  { texts, examples }: { readonly texts?: unknown; readonly examples?: unknown },
  adapters: readonly Pick<Adapter, "metadata">[],
): boolean {
  if (texts) return false;
  return examples !== undefined || adapters.some(({ metadata }) => templateOf(metadata) !== undefined);
}

/**
 * Reads examples to learn from: `{"text": "…", "label": "…"}`, `{"prompt": "…", "completion": "…"}` or `{"messages":
 * […]}` on each line.
 * @returns labels in the order in which they appear; none with completions
 * @throws SourceError naming the line, what was expected and what was found
 */
export async function readExamples(
  path: string,
): Promise<{ examples: LabelledText[]; labels: readonly string[] } | { examples: Completion[]; labels: undefined }> {
  const lines = await linesOf(path);
  if (hasCompletions(lines)) return { examples: lines.map(completionOf), labels: undefined };
  const seen = new Set<string>();
  const examples = lines.map((line): LabelledText => {
    const expected = `{"text": "…", "label": "…"}, ${COMPLETION}`;
    const text = textOf(line, "text", expected);
    const label = textOf(line, "label", expected).trim();
    seen.add(label);
    return { text, label };
  });
  if (seen.size >= 2) return { examples, labels: [...seen] };
  const [only] = seen;
  const message =
    only === undefined
      ? "has no examples; expected a text and its label on each line"
      : `all ${examples.length} examples have the label "${only}"; at least two labels are needed`;
  throw new SourceError(message, { file: path });
}

interface Line {
  readonly text: string;
  /** The JSON object that it holds, if any. */
  readonly object: Readonly<Record<string, unknown>> | undefined;
  /** Content, for a message: the keys of an object, or the beginning of the text. */
  readonly keys: string;
  wrong(message: string): SourceError;
}

/** @throws SourceError where the file cannot be read, or is one list of JSON */
async function linesOf(path: string): Promise<Line[]> {
  const content = (await readText(path)).replace(/^\uFEFF/, "");
  if (/\.jsonl?$/.test(path) && content.trimStart().startsWith("["))
    throw new SourceError("is a list; expected JSON lines, an object on each", { file: path });
  return content.split(/\r?\n/).flatMap((text, i) => {
    if (text.trim() === "") return [];
    let object: Line["object"];
    let keys = text.slice(0, 40);
    try {
      const value: unknown = JSON.parse(text);
      if (typeof value === "object" && value !== null && !Array.isArray(value)) {
        object = value as Record<string, unknown>;
        keys =
          Object.keys(object)
            .map((key) => JSON.stringify(key))
            .join(", ") || "{}";
      }
    } catch (cause) {
      keys = `what is not valid JSON: ${(cause as Error).message}`;
    }
    const wrong = (message: string): SourceError => new SourceError(`line ${i + 1}: ${message}`, { file: path });
    return [{ text, object, keys, wrong }];
  });
}

const COMPLETION = '{"prompt": "…", "completion": "…"} or {"messages": […]}';

/** Recognises JSON lines by the first one, which may be cut off. */
function hasCompletions([first]: readonly Line[]): boolean {
  const keys = Object.keys(first?.object ?? {}).map((key) => `{"${key}"`);
  return [first?.text ?? "", ...keys].some((text) => /^\s*\{\s*"(prompt|completion|messages)"/.test(text));
}

/** A text, or a label, in a line's object. @throws SourceError when it is none, or empty where that is not allowed */
function textOf({ object, keys, wrong }: Line, key: string, expected: string, mayBeEmpty = false): string {
  const value = object?.[key];
  if (value === undefined) throw wrong(`expected ${expected}, got ${keys}`);
  if (typeof value !== "string" && !(key === "label" && typeof value === "number"))
    throw wrong(`expected "${key}" with a string, got ${JSON.stringify(value)}`);
  if (`${value}`.trim() === "" && !mayBeEmpty) throw wrong(`its ${key} is empty`);
  return `${value}`;
}

function completionOf(line: Line): Completion {
  const messages = line.object?.["messages"];
  if (!Array.isArray(messages))
    return { prompt: textOf(line, "prompt", COMPLETION, true), completion: textOf(line, "completion", COMPLETION) };
  const odd = messages.find((said) => typeof said?.role !== "string" || typeof said?.content !== "string");
  if (odd !== undefined) throw line.wrong(`expected messages with "role" and "content", got ${JSON.stringify(odd)}`);
  const last = messages.at(-1)?.role;
  if (last !== "assistant") throw line.wrong(`expected the assistant's message at the end, got ${last ?? "none"}`);
  return { messages };
}
