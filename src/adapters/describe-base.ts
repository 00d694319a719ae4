/**
 * Reads facts of a base model (base-facts.ts) from its folder, config.json, a safetensors file or its index, a list of names, or a GGUF
 * file. Reads headers, no weights.
 */
import { readdir } from "node:fs/promises";
import { basename, dirname, extname, join } from "node:path";
import { AdapterError } from "../errors.ts";
import { refuseOtherKinds } from "../files-node.ts";
import { openSource } from "../open-source.ts";
import { openGguf } from "../tensor/gguf.ts";
import { type BaseFacts, factsOfConfig, isCount } from "./base-facts.ts";
import { MODELS } from "./diffusers-keys.ts";
import { kind } from "./find.ts";
import { readJson } from "./json-file.ts";
import { openSafetensors } from "./safetensors.ts";

const CONFIG = "config.json";

/**
 * Reads names, heads and architecture of a base model, for formats that leave them to it.
 * @param path of its folder, config.json, a list of names in JSON, a safetensors file or index, or a GGUF file
 * @throws AdapterError for other files; FormatError and SourceError for files that cannot be read
 */
export async function describeBase(path: string): Promise<BaseFacts> {
  const found = await kind(path);
  if (found === undefined) await refuseOtherKinds(path, "a file or a folder");
  if (found === undefined) throw new AdapterError("does not exist or cannot be read; check the path", { file: path });
  if (found === "folder") return describeFolder(path);
  if (extname(path) === ".gguf") return describeGguf(path);
  if (extname(path) === ".json") return describeJson(path);
  if (extname(path) === ".safetensors") return { names: await namesIn(path), ...(await factsBeside(path)) };
  const expected =
    "expected its folder, config.json, a list of names in JSON, a safetensors file, its index, or a GGUF file";
  throw new AdapterError(`says nothing of a base model; ${expected}`, { file: path });
}

/** Describes a model, or a pipeline, whose models lie in folders of their own. */
async function describeFolder(folder: string): Promise<BaseFacts> {
  const names = await namesInFolder(folder);
  for (const model of MODELS)
    for (const name of await namesInFolder(join(folder, model))) names.push(`${model}.${name}`);
  const config = join(folder, CONFIG);
  const facts = (await kind(config)) === "file" ? factsOfConfig(await readJson(config)) : undefined;
  if (names.length === 0 && facts === undefined) {
    throw new AdapterError(`holds neither ${CONFIG} nor safetensors files of a model`, { file: folder });
  }
  return { names: names.length > 0 ? names : undefined, ...facts };
}

async function namesInFolder(folder: string): Promise<string[]> {
  if ((await kind(folder)) !== "folder") return [];
  const files = (await readdir(folder)).filter((name) => extname(name) === ".safetensors").sort();
  return (await Promise.all(files.map((name) => namesIn(join(folder, name))))).flat();
}

async function namesIn(path: string): Promise<string[]> {
  const file = await openSafetensors(path);
  await file.close();
  return [...file.tensors.keys()];
}

async function factsBeside(path: string): Promise<BaseFacts> {
  const config = join(dirname(path), CONFIG);
  return (await kind(config)) === "file" ? (factsOfConfig(await readJson(config)) ?? {}) : {};
}

/** Reads config.json, the index of a model in several files, or a list of names. */
async function describeJson(path: string): Promise<BaseFacts> {
  const json = await readJson(path);
  if (Array.isArray(json) && json.every((name) => typeof name === "string")) return { names: json };
  const map = (json as { weight_map?: unknown } | null)?.weight_map;
  if (typeof map === "object" && map !== null) return { names: Object.keys(map), ...(await factsBeside(path)) };
  const facts = factsOfConfig(json);
  if (facts) return facts;
  const expected = "expected num_attention_heads, weight_map, or a list of names";
  throw new AdapterError(`${basename(path)} says nothing of a base model; ${expected}`, { file: path });
}

async function describeGguf(path: string): Promise<BaseFacts> {
  const source = await openSource(path);
  try {
    const { fields } = await openGguf(source);
    const architecture = String(fields.get("general.architecture"));
    const heads = fields.get(`${architecture}.attention.head_count`);
    const kvHeads = fields.get(`${architecture}.attention.head_count_kv`) ?? heads;
    if (isCount(heads) && isCount(kvHeads)) return { heads, kvHeads, architecture };
    throw new AdapterError(`has no ${architecture}.attention.head_count that is one number`, { file: path });
  } finally {
    await source.close?.();
  }
}
