/**
 * Reads facts of a base model (base-facts.ts) from its folder, config.json, a safetensors file or its index, a list of names, or a GGUF
 * file, on the disk or on the Hugging Face Hub. Reads headers, no weights.
 */
import { basename, dirname, extname, join } from "node:path";
import { AdapterError } from "../errors.ts";
import type { HubOptions } from "../http/hub.ts";
import { openGguf } from "../tensor/gguf.ts";
import { type BaseFacts, factsOfConfig, isCount } from "./base-facts.ts";
import { MODELS } from "./diffusers.ts";
import { openSafetensors } from "./safetensors.ts";
import { readJson, type Tree, treeAt } from "./tree.ts";

const CONFIG = "config.json";

/**
 * Reads names, heads and architecture of a base model, for formats that leave them to it.
 * @param given path of its folder, config.json, a list of names in JSON, a safetensors file or index, or a GGUF file; or a name of the Hub
 * @throws AdapterError for other files; FormatError and SourceError for files that cannot be read
 */
export async function describeBase(given: string, options: HubOptions = {}): Promise<BaseFacts> {
  const { tree, path } = await treeAt(given, { ...options, stage: "model" });
  if ((await tree.kind(path)) === "folder") return describeFolder(path, tree);
  if (extname(path) === ".gguf") return describeGguf(path, tree);
  if (extname(path) === ".json") return describeJson(path, tree);
  if (extname(path) === ".safetensors") return { names: await namesIn(path, tree), ...(await factsBeside(path, tree)) };
  const expected =
    "expected its folder, config.json, a list of names in JSON, a safetensors file, its index, or a GGUF file";
  throw new AdapterError(`says nothing of a base model; ${expected}`, { file: tree.nameOf(path) });
}

/** Describes a model, or a pipeline, whose models lie in folders of their own. */
async function describeFolder(folder: string, tree: Tree): Promise<BaseFacts> {
  const names = await namesInFolder(folder, tree);
  for (const model of MODELS)
    for (const name of await namesInFolder(join(folder, model), tree)) names.push(`${model}.${name}`);
  const facts = await factsIn(folder, tree);
  if (names.length === 0 && facts === undefined) {
    const message = `holds neither ${CONFIG} nor safetensors files of a model`;
    throw new AdapterError(message, { file: tree.nameOf(folder) });
  }
  return { names: names.length > 0 ? names : undefined, ...facts };
}

async function namesInFolder(folder: string, tree: Tree): Promise<string[]> {
  if ((await tree.kind(folder)) !== "folder") return [];
  const files = (await tree.names(folder)).filter((name) => extname(name) === ".safetensors").sort();
  return (await Promise.all(files.map((name) => namesIn(join(folder, name), tree)))).flat();
}

async function namesIn(path: string, tree: Tree): Promise<string[]> {
  const file = await openSafetensors(await tree.open(path));
  await file.close();
  return [...file.tensors.keys()];
}

async function factsIn(folder: string, tree: Tree): Promise<BaseFacts | undefined> {
  const config = join(folder, CONFIG);
  return (await tree.kind(config)) === "file" ? factsOfConfig(await jsonAt(config, tree)) : undefined;
}

const factsBeside = async (path: string, tree: Tree): Promise<BaseFacts> => (await factsIn(dirname(path), tree)) ?? {};

async function jsonAt(path: string, tree: Tree): Promise<unknown> {
  await tree.get([path]);
  return readJson(path);
}

/** Reads config.json, the index of a model in several files, or a list of names. */
async function describeJson(path: string, tree: Tree): Promise<BaseFacts> {
  const json = await jsonAt(path, tree);
  if (Array.isArray(json) && json.every((name) => typeof name === "string")) return { names: json };
  const map = (json as { weight_map?: unknown } | null)?.weight_map;
  if (typeof map === "object" && map !== null) return { names: Object.keys(map), ...(await factsBeside(path, tree)) };
  const facts = factsOfConfig(json);
  if (facts) return facts;
  const expected = "expected num_attention_heads, weight_map, or a list of names";
  throw new AdapterError(`${basename(path)} says nothing of a base model; ${expected}`, { file: path });
}

async function describeGguf(path: string, tree: Tree): Promise<BaseFacts> {
  const source = await tree.open(path);
  try {
    const { fields } = await openGguf(source);
    const architecture = String(fields.get("general.architecture"));
    const heads = fields.get(`${architecture}.attention.head_count`);
    const kvHeads = fields.get(`${architecture}.attention.head_count_kv`) ?? heads;
    if (isCount(heads) && isCount(kvHeads)) return { heads, kvHeads, architecture };
    throw new AdapterError(`has no ${architecture}.attention.head_count that is one number`, {
      file: tree.nameOf(path),
    });
  } finally {
    await source.close?.();
  }
}
