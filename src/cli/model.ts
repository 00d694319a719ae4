/**
 * What commands need that run a model: onnxruntime and a tokenizer. Both are optional peers of the package, loaded when they are
 * used.
 */
import { existsSync } from "node:fs";
import { dirname, join } from "node:path";
import { createEigenSession, type EigenSession } from "../../bindings/onnxruntime.ts";
import type { Ort } from "../../bindings/ort.ts";
import { BackendError, BaseMismatchError, SourceError } from "../errors.ts";
import type { Pack } from "../pack/pack.ts";
import type { BatchFeeds } from "../train/batch.ts";
import type { Encode } from "../train/inputs.ts";
import { readJson } from "./files.ts";
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

export const tokens: OptionSpec<number | undefined> = number("N", "Cut texts to N tokens. Default: 128.", from(1));
export const tokenizer: OptionSpec<string | undefined> = text(
  "FILE",
  "The model's tokenizer. Default: tokenizer.json beside the model or one folder above. Needs @huggingface/tokenizers.",
);

/**
 * Loads onnxruntime, and the tokenizer of a model: tokenizer.json beside it, or one folder above, as where models lie in onnx/; or
 * where `tokenizer` says. tokenizer_config.json beside that is used where it is there.
 * @throws BackendError when a package is not installed, SourceError when there is no tokenizer
 */
export async function openModel(
  command: string,
  model: string,
  { tokens = 128, tokenizer: named }: ModelOptions,
): Promise<OpenedModel> {
  const ort = await peer<Ort>(command, "onnxruntime-node", () => import("onnxruntime-node"));
  // It warns of initializers that nothing uses.
  (ort.env as { logLevel?: string }).logLevel = "error";
  const load = () => import("@huggingface/tokenizers");
  const { Tokenizer } = await peer<Tokenizers>(command, "@huggingface/tokenizers", load);
  const tokenizer = named ?? tokenizerOf(model);
  if (!existsSync(tokenizer)) {
    const where = named === undefined ? ", nor one folder above" : "";
    const message = `there is no tokenizer${where}; say where its tokenizer.json is with --tokenizer`;
    throw new SourceError(message, { file: tokenizer });
  }
  const config = join(dirname(tokenizer), "tokenizer_config.json");
  const made = new Tokenizer(await readJson(tokenizer), existsSync(config) ? await readJson(config) : {});
  const encode: Encode = (texts, _, inputs) => {
    const rows = texts.map((one) => {
      const { ids } = made.encode(one);
      // The last token closes the text, wherever it is cut.
      return ids.length > tokens ? [...ids.slice(0, tokens - 1), ids.at(-1)!] : ids;
    });
    const unknown = inputs.find((name) => !INPUTS.has(name));
    if (unknown === undefined) return feedsOf(inputs, rows);
    const message = `the model takes "${unknown}", which a tokenizer does not give: use eigenlora/train with feeds of your own`;
    throw new BaseMismatchError(message, { module: unknown });
  };
  return { ort, encode };
}

/** Where a model's tokenizer is; beside it where there is none. */
function tokenizerOf(model: string): string {
  const [beside, above] = [".", ".."].map((folder) => join(dirname(model), folder, "tokenizer.json"));
  return !existsSync(beside!) && existsSync(above!) ? above! : beside!;
}

/** The same with a session that can be trained, and the encoder of its model. */
export async function openTrainable(
  command: string,
  model: string,
  pack: Pack,
  options: ModelOptions & Values<typeof match>,
  run: Run,
): Promise<{ session: EigenSession; encode: Encode }> {
  const { names, ignore, anyBase } = options;
  const { ort, encode } = await openModel(command, model, options);
  refuseUnknown(names, pack.modules, pack.name);
  const session = await createEigenSession(ort, model, pack, { trainable: true, names, ignore, anyBase });
  run.closing(session);
  return { session, encode };
}

/** A package that only some commands need. @throws BackendError naming it */
async function peer<T>(command: string, name: string, load: () => Promise<unknown>): Promise<T> {
  const found = await load().catch((cause: Error) => {
    const message = `${command} needs the package ${name}: npm install ${name} (${cause.message})`;
    throw new BackendError(message, { backend: name, cause });
  });
  return found as T;
}

/** A tokenizer of @huggingface/tokenizers, as far as it is used. */
interface Tokenizers {
  readonly Tokenizer: new (rules: unknown, config: unknown) => { encode(text: string): { ids: number[] } };
}

/** What a tokenizer gives, of a token. */
const INPUTS = new Map<string, (id: number) => bigint>([
  ["input_ids", BigInt],
  ["attention_mask", () => 1n],
  ["token_type_ids", () => 0n],
]);

/** Token ids as a model's inputs, padded to the longest row. */
function feedsOf(inputs: readonly string[], rows: readonly number[][]): BatchFeeds {
  const width = Math.max(...rows.map(({ length }) => length));
  const dims = [rows.length, width];
  const feeds = inputs.map((name) => {
    const data = new BigInt64Array(rows.length * width);
    for (const [r, row] of rows.entries()) data.set(row.map(INPUTS.get(name)!), r * width);
    return [name, { type: "int64", dims, data }];
  });
  return Object.fromEntries(feeds) as BatchFeeds;
}
