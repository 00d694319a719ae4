/**
 * Values that examples in doc comments and documents assume, by name: "the pack", "your tokenizer". Each is made when
 * an example uses it, in a folder with the files that `test/pages/examples.test.ts` puts there. Examples in doc
 * comments whose values are absent are only type-checked; a page marks such a block.
 */
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";
import { createRuntime, openPack } from "eigenlora";
import { readAdapters } from "eigenlora/node";
import { createEigenSession, createEigenSessions } from "eigenlora/onnxruntime";
import { createTrainer } from "eigenlora/train";
import { attachPack } from "eigenlora/transformers";
import * as onnxruntime from "onnxruntime-node";

/** Thrown for values that a test machine lacks. */
export class Absent extends Error {}

/** @returns {never} */
function absent(/** @type {string} */ what) {
  throw new Absent(what);
}

const NAME = "bert.encoder.layer.0.attention.self.query";
const WIDTH = 32;
/** Most tokens that the model takes. */
const LENGTH = 12;
const LABELS = ["spam", "fine"];
const WORDS = ["one", "two", "three", "four"];
const TEXTS = [
  "cheap pills",
  "see you at noon",
  "you have won",
  "the train is late",
  "free money",
  "lunch is ready",
  "click here",
  "call home",
];

/** Encodes letters as tokens, for a model with 64 of them. */
function encode(/** @type {readonly string[]} */ texts) {
  const length = Math.min(LENGTH, Math.max(...texts.map((text) => text.length)));
  /** @param {(text: string, at: number) => number} value */
  const tensor = (value) => {
    const data = BigInt64Array.from(
      texts.flatMap((text) => Array.from({ length }, (_, at) => BigInt(value(text, at)))),
    );
    return { data, dims: [texts.length, length] };
  };
  return {
    input_ids: tensor((text, at) => (at < text.length ? text.charCodeAt(at) % 64 : 0)),
    attention_mask: tensor((text, at) => Number(at < text.length)),
    token_type_ids: tensor(() => 0),
  };
}

/** @returns {import("onnxruntime-common").InferenceSession.FeedsType} */
function feeds() {
  return Object.fromEntries(
    Object.entries(encode(TEXTS.slice(0, 3))).map(([name, { data, dims }]) => [
      name,
      new onnxruntime.Tensor("int64", data, dims),
    ]),
  );
}

/** Rows for a layer of the model. @returns {import("eigenlora").View} */
function rows() {
  return { dtype: "f32", shape: [3, WIDTH], data: new Uint8Array(4 * 3 * WIDTH), byteOffset: 0 };
}

const session = async () =>
  createEigenSession(onnxruntime, "model.onnx", await openPack("tasks.eigen"), { trainable: true });

/** transformers.js, with the models of the current folder. @returns {Promise<any>} */
async function transformers() {
  const name = "@huggingface/transformers";
  const found = await import(
    pathToFileURL(`${process.cwd()}/node_modules/${name}/dist/transformers.node.mjs`).href
  ).catch(() => absent("transformers.js"));
  Object.assign(found.env, { localModelPath: "models/", allowRemoteModels: false });
  return found;
}

/** @type {Promise<any> | undefined} */
let opened;
/** The pipeline of one example. @returns {Promise<any>} */
function pipe() {
  opened ??= transformers().then(({ pipeline }) => pipeline("text-classification", "my-model", { dtype: "fp16" }));
  return opened;
}
/** Forgets what belongs to one example. */
export const forget = () => (opened = undefined);

export const values = {
  ort: () => onnxruntime,
  model: () => "model.onnx",
  feeds,
  pack: () => openPack("tasks.eigen"),
  writing: () => openPack("rhymes.eigen"),
  skills: () => openPack("skills.eigen"),
  models: async () =>
    createEigenSessions(
      onnxruntime,
      { encoder: "encoder.onnx", decoder: "decoder.onnx" },
      await openPack("skills.eigen"),
    ),
  input_ids: () => new onnxruntime.Tensor("int64", [5n, 9n, 13n, 1n], [1, 4]),
  attention_mask: () => new onnxruntime.Tensor("int64", [1n, 1n, 1n, 1n], [1, 4]),
  decode:
    () => async (/** @type {unknown} */ _decoder, /** @type {unknown} */ _hidden, /** @type {unknown} */ _mask) => [""],
  runtime: async () => createRuntime(await openPack("tasks.eigen"), { mode: "core" }),
  session,
  trainer: async () => createTrainer(await session(), { labels: LABELS, encode }),
  adapters: () => readAdapters(["my-adapters"]),
  adapter: async () => /** @type {import("eigenlora/build").Adapter} */ ((await readAdapters(["my-adapters"]))[0]),
  encode: () => encode,
  newcomers: async () => {
    const known = await readAdapters(["my-adapters"]);
    return readAdapters(["my-adapters"], { rename: new Map(known.map(({ id }) => [id, `new-${id}`])) });
  },
  tokenizer: () =>
    Object.assign((/** @type {string[]} */ texts) => encode(texts), {
      eos_token: "|",
      get_vocab: () => new Map(WORDS.map((word, id) => [word, id])),
      decode: (/** @type {number[]} */ [id]) => WORDS[Number(id)],
    }),
  labels: () => LABELS,
  texts: () => TEXTS,
  examples: () => TEXTS.map((text, i) => ({ text, label: /** @type {string} */ (LABELS[i % 2]) })),
  signal: () => new AbortController().signal,
  show: () => (/** @type {number} */ _share, /** @type {number} */ _loss) => {},
  name: () => NAME,
  /** @returns {Float32Array} */
  queryWeights: () => absent("a model of that size"),
  bytes: () => new Uint8Array(4),
  x: rows,
  y: rows,
  base64: () => readFileSync("tasks.eigen").toString("base64"),
  writeFile: () => async (/** @type {string} */ _path, /** @type {unknown} */ _chunks) => {},
  /** @returns {import("eigenlora").DeviceBuffer} */
  buffer: () => absent("a WebGPU device"),
  /** @returns {import("eigenlora").DeviceHandle} */
  device: () => absent("a WebGPU device"),
  accuracy: () => async (/** @type {unknown} */ _session, /** @type {string} */ _id) => 0.9,
  /** @returns {typeof globalThis.self} */
  self: () => absent("a worker"),
  /** @returns {any} */
  tf: () => absent("TF.js"),
  /** @returns {any} */
  layersModel: () => absent("TF.js"),
  /** @returns {any} */
  jax: () => absent("jax-js"),
  /** @returns {any} */
  params: () => absent("jax-js"),
  /** @returns {any} */
  predict: () => absent("jax-js"),
  /** @returns {any} */
  RNFS: () => absent("React Native"),
  uri: () => "tasks.eigen",
  size: () => 1,
  /** @returns {import("eigenlora/react-native/onnxruntime").ModelFiles} */
  files: () => absent("React Native"),
  /** @returns {any} */
  longText: () => absent("a language model"),
  /** @returns {any} */
  question: () => absent("a language model"),
  /** @returns {any} */
  pastOf: () => absent("a language model"),
  /** The environment of a worker. @returns {any} */
  env: () => absent("a worker"),
  /** @returns {Promise<any>} */
  pipeline: async () => (await transformers()).pipeline,
  pipe,
  tasks: async () => attachPack(await pipe(), await openPack("tasks.eigen"), { model: "my-model" }),
};
