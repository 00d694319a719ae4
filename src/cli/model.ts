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
import { readJson } from "./files.ts";
import { from, number, type OptionSpec, text } from "./options.ts";
import type { Run } from "./run.ts";

/** From texts to the inputs of a model, one row each. */
export type Encode = (texts: string[]) => BatchFeeds;

interface ModelOptions {
  readonly tokens: number | undefined;
  readonly tokenizer: string | undefined;
}

/** What a command runs a model with. */
export interface OpenedModel {
  readonly ort: Ort;
  /**
   * The encoder for a model, by the names of its inputs.
   * @throws BaseMismatchError for an input that a tokenizer does not give
   */
  encodeFor(inputs: readonly string[]): Encode;
}

export const tokens: OptionSpec<number | undefined> = number("N", "Most tokens of a text. Default: 128.", from(1));
export const tokenizer: OptionSpec<string | undefined> = text(
  "FILE",
  "The model's tokenizer. Default: tokenizer.json beside the model. Needs @huggingface/tokenizers.",
);

/**
 * Loads onnxruntime, and the tokenizer of a model: tokenizer.json beside it, or where `tokenizer` says; tokenizer_config.json
 * beside that is used where it is there.
 * @throws BackendError when a package is not installed, SourceError when there is no tokenizer
 */
export async function openModel(
  command: string,
  model: string,
  { tokens = 128, tokenizer = join(dirname(model), "tokenizer.json") }: ModelOptions,
): Promise<OpenedModel> {
  const ort = await peer<Ort>(command, "onnxruntime-node", () => import("onnxruntime-node"));
  // It warns of initializers that nothing uses.
  (ort.env as { logLevel?: string }).logLevel = "error";
  const load = () => import("@huggingface/tokenizers");
  const { Tokenizer } = await peer<Tokenizers>(command, "@huggingface/tokenizers", load);
  if (!existsSync(tokenizer)) {
    const message = "there is no tokenizer; say where its tokenizer.json is with --tokenizer";
    throw new SourceError(message, { file: tokenizer });
  }
  const config = join(dirname(tokenizer), "tokenizer_config.json");
  const made = new Tokenizer(await readJson(tokenizer), existsSync(config) ? await readJson(config) : {});
  const idsOf = (one: string): number[] => {
    const { ids } = made.encode(one);
    // The last token closes the text, wherever it is cut.
    return ids.length > tokens ? [...ids.slice(0, tokens - 1), ids.at(-1)!] : ids;
  };
  const encodeFor = (inputs: readonly string[]): Encode => {
    const unknown = inputs.find((name) => !INPUTS.includes(name));
    if (unknown !== undefined) {
      const message = `the model takes "${unknown}", which a tokenizer does not give: use eigenlora/${command} with feeds of your own`;
      throw new BaseMismatchError(message, { module: unknown });
    }
    return (texts) => feedsOf(ort, inputs, texts.map(idsOf));
  };
  return { ort, encodeFor };
}

/** The same with a session that can be trained, and the encoder of its model. */
export async function openTrainable(
  command: string,
  model: string,
  pack: Pack,
  options: ModelOptions,
  run: Run,
): Promise<{ session: EigenSession; encode: Encode }> {
  const { ort, encodeFor } = await openModel(command, model, options);
  const session = await createEigenSession(ort, model, pack, { trainable: true });
  run.closing({ close: () => session.release() });
  return { session, encode: encodeFor(session.inputNames) };
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

/** What a tokenizer gives. */
const INPUTS = ["input_ids", "attention_mask", "token_type_ids"];

/** Token ids as a model's inputs, padded to the longest row. */
function feedsOf(ort: Ort, inputs: readonly string[], rows: readonly number[][]): BatchFeeds {
  const width = Math.max(...rows.map(({ length }) => length));
  const values = new Map(INPUTS.map((name) => [name, new BigInt64Array(rows.length * width)]));
  rows.forEach((row, r) => {
    values.get("input_ids")!.set(row.map(BigInt), r * width);
    values.get("attention_mask")!.fill(1n, r * width, r * width + row.length);
  });
  const Tensor = ort.Tensor as unknown as new (
    type: "int64",
    data: BigInt64Array,
    dims: number[],
  ) => BatchFeeds[string];
  return Object.fromEntries(inputs.map((name) => [name, new Tensor("int64", values.get(name)!, [rows.length, width])]));
}
