/**
 * What commands need that run a model: onnxruntime and a tokenizer. Both are optional peers of the package, loaded when they are
 * used.
 */

import { existsSync } from "node:fs";
import { dirname, join } from "node:path";
import { createEigenSession, type EigenSession } from "../../bindings/onnxruntime.ts";
import type { Ort } from "../../bindings/ort.ts";
import { createEngine } from "../../bindings/ort-engine.ts";
import type { Pack } from "../core/pack.ts";
import { BackendError, BaseMismatchError, SourceError } from "../errors.ts";
import type { Engine } from "../session/engine.ts";
import { type Encode, encoderOf, type PlainTokenizer } from "../session/tokens.ts";
import { followsFromTokens } from "../train/supervision.ts";
import { readJson, readText } from "./files.ts";
import { type match, refuseUnknown } from "./matching.ts";
import { from, number, type OptionSpec, text, type Values } from "./options.ts";
import type { Run } from "./run.ts";

interface ModelOptions {
  readonly tokens: number | undefined;
  readonly tokenizer: string | undefined;
}

/** What a command runs a model with. */
export interface OpenedModel {
  readonly ort: Ort;
  /** @throws BaseMismatchError for an input of the model that a tokenizer does not give */
  readonly encode: Encode;
}

export const tokens: OptionSpec<number | undefined> = number(
  "N",
  "Cut texts to N tokens; a prompt with its completion may not be longer. Default: 128; 512 for completions and templates.",
  from(1),
);
export const tokenizer: OptionSpec<string | undefined> = text(
  "FILE",
  "The model's tokenizer. Default: tokenizer.json beside the model or one folder above. Needs @huggingface/tokenizers.",
);

/** What a command runs the model on. */
export const runsOn: { provider: OptionSpec<string | undefined>; threads: OptionSpec<number | undefined> } = {
  provider: text(
    "NAME",
    "What runs the model, where this build of onnxruntime-node has it: cpu, webgpu, cuda, dml or coreml. Default: cpu.",
  ),
  threads: number("N", "Threads that run the model. Default: one for each core.", from(1)),
};

/** The engine that runs a model. */
export function engineOf(ort: Ort, options: Values<typeof runsOn>): Engine {
  return createEngine(ort, sessionOf(options));
}

/** What sessions are created with. Its type depends on which onnxruntime it is. */
function sessionOf({ provider, threads }: Values<typeof runsOn>): never {
  return {
    ...(provider === undefined ? {} : { executionProviders: [provider] }),
    ...(threads === undefined ? {} : { intraOpNumThreads: threads }),
  } as never;
}

/**
 * Loads onnxruntime, and the tokenizer of a model: tokenizer.json beside it, or one folder above, as where models lie in onnx/; or
 * where `tokenizer` says. tokenizer_config.json and chat_template.jinja beside that are used where they are there.
 * @param whole texts are prompts with completions, which must not be cut
 * @throws BackendError when a package is not installed, SourceError when there is no tokenizer
 */
export async function openModel(
  command: string,
  model: string,
  { tokens: most, tokenizer: named }: ModelOptions,
  whole = false,
): Promise<OpenedModel> {
  const tokens = most ?? (whole ? 512 : 128);
  const ort = await peer<Ort>(command, "onnxruntime-node", () => import("onnxruntime-node"));
  // It warns of initializers that nothing uses.
  (ort.env as { logLevel?: string }).logLevel = "error";
  const load = () => import("@huggingface/tokenizers");
  const tokenizers = await peer<Tokenizers>(command, "@huggingface/tokenizers", load);
  if (!existsSync(model)) throw new SourceError("cannot be read: there is no such file (ENOENT)", { file: model });
  const tokenizer = named ?? tokenizerOf(model);
  if (!existsSync(tokenizer)) {
    const where = named === undefined ? ", nor one folder above" : "";
    const message = `there is no tokenizer${where}; say where its tokenizer.json is with --tokenizer`;
    throw new SourceError(message, { file: tokenizer });
  }
  const beside = join(dirname(tokenizer), "tokenizer_config.json");
  const config = (existsSync(beside) ? await readJson(beside) : {}) as Record<string, unknown>;
  const made = openTokenizer(tokenizers, await readJson(tokenizer), config, tokenizer);
  const encode: Encode = async (texts, { add_special_tokens: special }, inputs) => {
    const unknown = inputs.find((name) => !followsFromTokens(name));
    if (unknown !== undefined) {
      const message = `the model takes "${unknown}", which a tokenizer does not give: use eigenlora/train with feeds of your own`;
      throw new BaseMismatchError(message, { module: unknown });
    }
    const feeds = await encoderOf(made, inputs, whole ? Infinity : tokens)(texts, special);
    const length = feeds["input_ids"]!.dims[1]!;
    if (length <= tokens) return feeds;
    throw new RangeError(
      `${JSON.stringify(texts[0]!.slice(0, 40))}… has ${length} tokens, more than --tokens ${tokens}`,
    );
  };
  const template = config["chat_template"] ?? (await templateBeside(tokenizer));
  const words = { get_vocab: made.get_vocab.bind(made), decode: made.decode.bind(made) };
  return { ort, encode: Object.assign(encode, words, tellsMore(command, config, template)) };
}

/** @throws SourceError naming the file that holds no tokenizer */
function openTokenizer({ Tokenizer }: Tokenizers, rules: unknown, config: unknown, file: string) {
  try {
    return new Tokenizer(rules, config);
  } catch (cause) {
    const message = `holds no tokenizer: ${(cause as Error).message}; expected the tokenizer.json of the model`;
    throw new SourceError(message, { file, cause });
  }
}

/** What a tokenizer of transformers.js tells beside ids: what ends a text, and how a chat is written. */
function tellsMore(command: string, config: Readonly<Record<string, unknown>>, template: unknown): object {
  const token = (name: string): unknown => {
    const found = config[name];
    return typeof found === "object" && found !== null ? (found as { content?: unknown }).content : found;
  };
  const eos_token = token("eos_token");
  if (typeof template !== "string") return { eos_token };
  const apply_chat_template = async (
    messages: unknown,
    { add_generation_prompt }: { add_generation_prompt: boolean },
  ) => {
    const { Template } = await peer<Jinja>(command, "@huggingface/jinja", () => import("@huggingface/jinja"));
    const more = { add_generation_prompt, bos_token: token("bos_token"), eos_token };
    return new Template(template).render({ messages, ...more });
  };
  return { eos_token, apply_chat_template };
}

/** The chat template in a file of its own. */
async function templateBeside(tokenizer: string): Promise<string | undefined> {
  const path = join(dirname(tokenizer), "chat_template.jinja");
  return existsSync(path) ? readText(path) : undefined;
}

/** Where a model's tokenizer is; beside it where there is none. */
export function tokenizerOf(model: string): string {
  const [beside, above] = [".", ".."].map((folder) => join(dirname(model), folder, "tokenizer.json"));
  return !existsSync(beside!) && existsSync(above!) ? above! : beside!;
}

/** A session that can be trained, and the encoder of texts for its model. */
export async function openTrainable(
  command: string,
  model: string,
  pack: Pack,
  options: ModelOptions & Values<typeof match> & Values<typeof runsOn>,
  run: Run,
  whole = false,
): Promise<{ session: EigenSession; encode: Encode }> {
  const { names, ignore, anyBase } = options;
  const { ort, encode } = await openModel(command, model, options, whole);
  refuseUnknown(names, pack.modules, pack.name);
  const matching = { names, ignore, anyBase };
  const how = { trainable: true, session: sessionOf(options), ...matching };
  const session = await createEigenSession(ort, model, pack, how);
  run.closing(session);
  return { session, encode };
}

/** The installation fetches files for GPUs, which a proxy may keep from it; it fails then. */
export const WITHOUT_NUGET =
  "where that cannot reach NuGet: ONNXRUNTIME_NODE_INSTALL=skip npm install onnxruntime-node";

/** A package that only some commands need. @throws BackendError naming it */
async function peer<T>(command: string, name: string, load: () => Promise<unknown>): Promise<T> {
  const found = await load().catch((cause: Error) => {
    const skip = name === "onnxruntime-node" ? `; ${WITHOUT_NUGET}` : "";
    const message = `${command} needs the package ${name}: npm install ${name}${skip} (${cause.message})`;
    throw new BackendError(message, { backend: name, cause });
  });
  return found as T;
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
