/**
 * What formats leave to the base model (base-facts.ts), from whatever of it somebody has on disk: its folder, config.json, a
 * safetensors file or its index, a list of names, or a GGUF file. Reads headers, no weights.
 */
import { readdir } from "node:fs/promises";
import { basename, dirname, extname, join } from "node:path";
import { AdapterError } from "../errors.ts";
import { openSource } from "../open-source.ts";
import { openGguf } from "../tensor/gguf.ts";
import { type BaseFacts, headsOfConfig, isCount } from "./base-facts.ts";
import { MODELS } from "./diffusers-keys.ts";
import { kind } from "./find.ts";
import { readJson } from "./json-file.ts";
import { openSafetensors } from "./safetensors.ts";

const CONFIG = "config.json";

/** @throws AdapterError for what is none of these; FormatError and SourceError for files that cannot be read */
export async function describeBase(path: string): Promise<BaseFacts> {
  const found = await kind(path);
  if (found === undefined) throw new AdapterError("does not exist or cannot be read; check the path", { file: path });
  if (found === "folder") return describeFolder(path);
  if (extname(path) === ".gguf") return describeGguf(path);
  if (extname(path) === ".json") return describeJson(path);
  if (extname(path) === ".safetensors") return { names: await namesIn(path), ...(await headsBeside(path)) };
  const expected =
    "expected its folder, config.json, a list of names in JSON, a safetensors file, its index, or a GGUF file";
  throw new AdapterError(`says nothing of a base model; ${expected}`, { file: path });
}

/** Of a model, or of a pipeline, whose models lie in folders of their own. */
async function describeFolder(folder: string): Promise<BaseFacts> {
  const names = await namesInFolder(folder);
  for (const model of MODELS)
    for (const name of await namesInFolder(join(folder, model))) names.push(`${model}.${name}`);
  const config = join(folder, CONFIG);
  const heads = (await kind(config)) === "file" ? headsOfConfig(await readJson(config)) : undefined;
  if (names.length === 0 && heads === undefined) {
    throw new AdapterError(`holds neither ${CONFIG} nor safetensors files of a model`, { file: folder });
  }
  return { names: names.length > 0 ? names : undefined, ...heads };
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

async function headsBeside(path: string): Promise<BaseFacts> {
  const config = join(dirname(path), CONFIG);
  return (await kind(config)) === "file" ? (headsOfConfig(await readJson(config)) ?? {}) : {};
}

/** config.json, the index of a model in several files, or a list of names. */
async function describeJson(path: string): Promise<BaseFacts> {
  const json = await readJson(path);
  if (Array.isArray(json) && json.every((name) => typeof name === "string")) return { names: json };
  const map = (json as { weight_map?: unknown } | null)?.weight_map;
  if (typeof map === "object" && map !== null) return { names: Object.keys(map), ...(await headsBeside(path)) };
  const heads = headsOfConfig(json);
  if (heads) return heads;
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
    if (isCount(heads) && isCount(kvHeads)) return { heads, kvHeads };
    throw new AdapterError(`has no ${architecture}.attention.head_count that is one number`, { file: path });
  } finally {
    await source.close?.();
  }
}
