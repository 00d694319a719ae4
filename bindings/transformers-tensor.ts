/**
 * The class of tensors of the onnxruntime that a pipeline of transformers.js runs. What runs return is of another class where
 * that package is there twice. Part of `eigenlora/transformers`, without an entry of its own.
 */
import { described } from "../src/arguments.ts";
import type { PipelineModel, PipelineOrt } from "./transformers-model.ts";
import type { TransformersPipeline } from "./transformers-shared.ts";

type TensorClass = PipelineOrt["Tensor"];

/** A tensor of transformers.js, around one of onnxruntime. */
interface Wrapped {
  readonly ort_tensor?: object | undefined;
}

const OWN = '`Tensor` of "@huggingface/transformers"';

/**
 * @param given transformers.js's own class, or onnxruntime's
 * @throws TypeError when it is neither
 */
export function tensorClass(pipe: TransformersPipeline, given: unknown): TensorClass {
  return given === undefined ? shownBy(pipe) : within(given);
}

function within(given: unknown): TensorClass {
  let cause: unknown;
  try {
    const made = new (given as new (...of: unknown[]) => Wrapped & { readonly dims?: unknown })(
      "float32",
      new Float32Array(1),
      [1],
    ) as Wrapped & {
      readonly dims?: unknown;
    };
    const inner = made.ort_tensor?.constructor;
    if (inner) return inner as TensorClass;
    // An array of numbers has no dimensions, a tensor of another library no such argument.
    if (Array.isArray(made.dims) && made.dims.join() === "1") return given as TensorClass;
  } catch (error) {
    cause = error;
  }
  const name = typeof given === "function" && given.name ? `"${given.name}"` : described(given);
  throw new TypeError(`attachPack: Tensor: expected the class ${OWN}, got ${name}`, { cause });
}

/** The class of what the pipeline makes: its tokenizer, or the model where it begins a text. */
function shownBy({ tokenizer, model }: TransformersPipeline): TensorClass {
  const tokenize = tokenizer as ((text: string) => { input_ids?: Wrapped }) | null | undefined;
  const begin = (model as PipelineModel & { _prepare_decoder_input_ids_for_generation?: Beginning })
    ._prepare_decoder_input_ids_for_generation;
  const ways: (() => Wrapped | undefined)[] = [
    // No text at all: any other may hold words that a small vocabulary lacks.
    () => tokenize?.("").input_ids,
    // Pictures have no tokenizer. Nothing runs here: it is one number as a tensor.
    () => begin?.call(model, { batch_size: 1, model_kwargs: {}, decoder_start_token_id: 0 }).input_ids,
  ];
  let cause: unknown;
  for (const way of ways) {
    try {
      const Tensor = way()?.ort_tensor?.constructor;
      if (Tensor) return Tensor as TensorClass;
    } catch (error) {
      cause ??= error;
    }
  }
  const message = `attachPack: nothing of the pipeline shows onnxruntime's class of tensors; pass { Tensor }, ${OWN}`;
  throw new TypeError(message, cause === undefined ? undefined : { cause });
}

type Beginning = (options: object) => { readonly input_ids: Wrapped };
