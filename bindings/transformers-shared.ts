/**
 * State that all packs on one model of transformers.js share: the order of its calls and their switches, which of its sessions has
 * which pack, and the label names in its configuration. Part of `eigenlora/transformers`, without an entry of its own.
 */
import { Queue } from "../src/queue.ts";
import { type Held, hold } from "./hold.ts";
import { ConfigLabels } from "./transformers-labels.ts";
import type { PipelineModel, PipelineSession } from "./transformers-model.ts";

/** What `pipeline()` of transformers.js gives, as far as it is needed here. */
export interface TransformersPipeline {
  readonly model: PipelineModel;
  readonly tokenizer?: unknown;
}

/** One of the pipeline's sessions that a pack is on. */
export interface Taken {
  /** The pack's name. */
  readonly pack: string;
  /** The pipeline's own, released or not: it tells what to make another of. */
  readonly own: PipelineSession;
}

/** Models that have packs. */
const models = new WeakMap<object, Shared>();

// Functions of their own make what stays while a pack is attached: a closure keeps all that the function around it has given to
// any closure, and that must not be a model's bytes.

/** The state that packs on a pipeline's model share. Every `join` needs a `leave`. */
export function join(pipe: TransformersPipeline): Shared {
  const { model } = pipe;
  const shared = models.get(model) ?? new Shared(model);
  models.set(model, shared);
  shared.enter(pipe);
  return shared;
}

/** Made by `join`. */
export class Shared {
  /** Calls of the pipelines, and switches of all packs. */
  readonly queue: Queue = new Queue();
  /** Sessions that have a pack, by the pipeline's names. */
  readonly taken: Map<string, Taken> = new Map();
  readonly labels: ConfigLabels;
  readonly #model: PipelineModel;
  readonly #inner: Held<PipelineModel>;
  readonly #outer = new Map<TransformersPipeline, Held<TransformersPipeline>>();
  #packs = 0;

  constructor(model: PipelineModel) {
    this.#model = model;
    this.labels = new ConfigLabels(model.config);
    this.#inner = hold(model, ["_call", "forward", "generate"], this.#enter);
  }

  readonly #enter: Queue["call"] = (work) => this.queue.call(work);

  enter(pipe: TransformersPipeline): void {
    this.#packs++;
    if (this.#outer.has(pipe)) return;
    this.#outer.set(pipe, hold(pipe, ["_call"], this.#enter, { model: this.#inner.inside }));
  }

  /** The last one out gives the model and its pipelines their methods back. */
  leave(): void {
    if (--this.#packs > 0) return;
    for (const { free } of this.#outer.values()) free();
    this.#inner.free();
    models.delete(this.#model);
  }
}
