/**
 * What commands need that run a model: onnxruntime and a tokenizer. Both are optional peers of the package, loaded when they are
 * used.
 */
import { readFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import type { Ort } from "../../bindings/ort-engine.ts";
import { BackendError, BaseMismatchError, SourceError } from "../errors.ts";
import type { BatchFeeds } from "../train/batch.ts";

/** From texts to the inputs of a model, one row each. */
export type Encode = (texts: string[]) => BatchFeeds;

/** @throws BackendError when it is not installed */
export async function loadRuntime(command: string): Promise<Ort> {
  const ort = await peer<Ort>(command, "onnxruntime-node", () => import("onnxruntime-node"));
  // It warns of initializers that nothing uses.
  (ort.env as { logLevel?: string }).logLevel = "error";
  return ort;
}

/** A package that only some commands need. @throws BackendError naming it */
async function peer<T>(command: string, name: string, load: () => Promise<unknown>): Promise<T> {
  const found = await load().catch((cause: Error) => {
    throw new BackendError(`${command} needs the package ${name}: npm install ${name} (${cause.message})`, {
      backend: name,
      cause,
    });
  });
  return found as T;
}

/** A tokenizer of @huggingface/tokenizers, as far as it is used. */
interface Tokenizers {
  readonly Tokenizer: new (rules: object, config: object) => { encode(text: string): { ids: number[] } };
}

/** What a tokenizer gives. */
const INPUTS = ["input_ids", "attention_mask", "token_type_ids"];

/**
 * Reads a tokenizer: tokenizer.json beside the model, or where `tokenizer` says; tokenizer_config.json beside it is used
 * where it is there.
 * @param most tokens of a text
 * @returns the encoder for a model, by the names of its inputs
 * @throws BackendError when the package is not installed, SourceError when there is no tokenizer
 */
export async function loadTokenizer(
  command: string,
  ort: Ort,
  model: string,
  tokenizer: string | undefined,
  most: number,
): Promise<(inputs: readonly string[]) => Encode> {
  const { Tokenizer } = await peer<Tokenizers>(
    command,
    "@huggingface/tokenizers",
    () => import("@huggingface/tokenizers"),
  );
  const path = tokenizer ?? join(dirname(model), "tokenizer.json");
  const rules = await readJson(path);
  if (!rules)
    throw new SourceError("there is no tokenizer; say where its tokenizer.json is with --tokenizer", { file: path });
  const made = new Tokenizer(rules, (await readJson(join(dirname(path), "tokenizer_config.json"))) ?? {});
  const Tensor = ort.Tensor as unknown as new (
    type: "int64",
    data: BigInt64Array,
    dims: number[],
  ) => BatchFeeds[string];
  return (inputs) => {
    const unknown = inputs.find((name) => !INPUTS.includes(name));
    if (unknown !== undefined) {
      throw new BaseMismatchError(
        `the model takes "${unknown}", which a tokenizer does not give: use eigenlora/${command} with feeds of your own`,
        {
          module: unknown,
        },
      );
    }
    return (texts) => {
      const rows = texts.map((text) => {
        const { ids } = made.encode(text);
        // The last token closes the text, wherever it is cut.
        return ids.length > most ? [...ids.slice(0, most - 1), ids[ids.length - 1]!] : ids;
      });
      const width = Math.max(...rows.map(({ length }) => length));
      const values = new Map(INPUTS.map((name) => [name, new BigInt64Array(rows.length * width)]));
      rows.forEach((row, r) => {
        values.get("input_ids")!.set(row.map(BigInt), r * width);
        values.get("attention_mask")!.fill(1n, r * width, r * width + row.length);
      });
      return Object.fromEntries(
        inputs.map((name) => [name, new Tensor("int64", values.get(name)!, [rows.length, width])]),
      );
    };
  };
}

async function readJson(path: string): Promise<object | undefined> {
  const text = await readFile(path, "utf8").catch(() => undefined);
  try {
    return text === undefined ? undefined : (JSON.parse(text) as object);
  } catch (cause) {
    throw new SourceError(`is no JSON: ${(cause as Error).message}`, { file: path, cause });
  }
}
