/**
 * Shared by the tests of pipelines: transformers.js on the tiny models of test/data/pipelines, and packs for them.
 * EIGENLORA_RUNTIMES names a folder in which `npm install @huggingface/transformers@4.3.1` was run.
 */
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { openPack, type Pack } from "eigenlora";
import type { PipelineModel } from "eigenlora/transformers";
import type { Test } from "tap";
import { data, LOSSLESS, packOf } from "./packs.ts";
import { packages, without } from "./required.ts";
import { difference } from "./sessions.ts";

const folder = packages("@huggingface/transformers");
export const skip: string | false = without("transformers", folder);

/** The parts of transformers.js' Tensor that are used here. */
export interface Tensor {
  dims: number[];
  data: ArrayLike<number>;
  ort_tensor: object;
  tolist(): never[];
  normalize(power: number, dimension: number): Tensor;
}
export interface Pipe {
  (...inputs: unknown[]): Promise<never>;
  model: PipelineModel & {
    (inputs: object): Promise<Record<string, Tensor>>;
    generate(options: object): Promise<{ tolist(): bigint[][] }>;
    dispose(): Promise<unknown>;
    sessions: Record<string, { release(): Promise<void> }>;
    config: { id2label?: Record<number, string>; label2id?: Record<string, number> };
  };
  tokenizer(texts: string | string[], options?: object): Record<string, Tensor>;
  processor(input: unknown): Promise<Record<string, Tensor>>;
  dispose(): Promise<void>;
}
export interface Transformers {
  env: object;
  pipeline(task: string, model: string, options?: object): Promise<Pipe>;
  Tensor: new (type: string, data: unknown, dims: number[]) => Tensor;
  RawImage: new (data: Uint8ClampedArray, width: number, height: number, channels: number) => object;
  mean_pooling(states: Tensor, mask: Tensor): Tensor;
  TextStreamer: new (tokenizer: unknown, options: object) => { put(value: unknown): void; end(): void };
  AutoTokenizer: Loader<Pipe["tokenizer"]>;
  AutoProcessor: Loader<Pipe["processor"]>;
  CLIPTextModelWithProjection: Loader<Pipe["model"]>;
  CLIPVisionModelWithProjection: Loader<Pipe["model"]>;
}
interface Loader<What> {
  from_pretrained(id: string, options?: object): Promise<What>;
}

/** Folders of transformers.js, and of the models by id. */
export const PACKAGE: string = folder;
export const MODELS: string = data("pipelines");

let loaded: Transformers | undefined;
export async function transformers(models: string = MODELS): Promise<Transformers> {
  if (!loaded) {
    loaded = (await import(pathToFileURL(join(folder, "dist/transformers.node.mjs")).href)) as Transformers;
  }
  Object.assign(loaded.env, { localModelPath: models, allowRemoteModels: false });
  return loaded;
}

/** A lossless pack of a model's adapters. */
export async function packBytes(model: string): Promise<Uint8Array<ArrayBuffer>> {
  const base = data(`pipelines/${model}/base.safetensors`);
  return (await packOf([`pipelines/${model}/adapters`], { ...LOSSLESS, base })).bytes;
}

export async function packOn(model: string): Promise<Pack> {
  return openPack(await packBytes(model));
}

export async function pipelineOn(task: string, model: string, options: object = {}): Promise<Pipe> {
  return (await transformers()).pipeline(task, model, { dtype: "fp32", ...options });
}

/** A sum of sines. */
export interface Sound {
  waves: [amplitude: number, step: number][];
  samples: number;
}
export interface Generation<Prompt> {
  task: string;
  prompt: Prompt;
  ids: number[];
  logits: number[];
}

/** Generations by PEFT. @param path under test/data */
export async function generations<Prompt = string>(path: string): Promise<Generation<Prompt>[]> {
  return JSON.parse(await readFile(data(path), "utf8")) as Generation<Prompt>[];
}

/** Tokens that the model generates for a prompt, without the first, at which it starts. */
export async function generate(pipe: Pipe, prompt: string): Promise<number[]> {
  const ids = await pipe.model.generate({ ...pipe.tokenizer(prompt), max_new_tokens: 12 });
  return ids.tolist()[0]!.map(Number).slice(1);
}

/**
 * Text of tokens, which are printable ASCII in order, the space last.
 * @param special number of tokens before them, which have no text
 */
export function textOf(ids: readonly number[], special: number): string {
  const letter = (at: number): string => (at < 0 ? "" : at === 94 ? " " : String.fromCharCode(33 + at));
  return ids.map((id) => letter(id - special)).join("");
}

interface Goldens {
  labels: string[];
  answers: Record<string, Record<"logits" | "text" | "image", number[]>>;
}
export async function goldens(model: string): Promise<Goldens> {
  return JSON.parse(await readFile(data(`pipelines/${model}/goldens.json`), "utf8")) as Goldens;
}

export interface Answer {
  label: string;
  score: number;
}

/** Softmax of each row of logits, by label, the likeliest first. */
export function ranked(logits: readonly number[], labels: readonly string[]): Answer[][] {
  const rows = Array.from({ length: logits.length / labels.length }, (_, row) =>
    logits.slice(row * labels.length, (row + 1) * labels.length),
  );
  return rows.map((row) => {
    const sum = row.reduce((all, one) => all + Math.exp(one), 0);
    const answers = labels.map((label, i) => ({ label, score: Math.exp(row[i]!) / sum }));
    return answers.sort((a, b) => b.score - a.score);
  });
}

/** Checks for the same labels in the same order, with the same scores. */
export function sameAnswers(
  t: Pick<Test, "same" | "ok">,
  found: readonly Answer[][],
  expected: readonly Answer[][],
  what: string,
): void {
  const labels = (rows: readonly Answer[][]): string[][] => rows.map((row) => row.map(({ label }) => label));
  const scores = (rows: readonly Answer[][]): number[] => rows.flat().map(({ score }) => score);
  t.same(labels(found), labels(expected), what);
  t.ok(difference(scores(found), scores(expected)) < 1e-5, `${what}: scores`);
}
