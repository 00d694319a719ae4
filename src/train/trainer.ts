/**
 * The training loop: batches in, steps of AdamW, the best state kept. It knows numbers and examples; the setup brings the model and the
 * way from a batch to its inputs.
 */

import { checkChoice, checkList, checkOptions } from "../arguments.ts";
import type { TaskBlob, TaskMetadata } from "../format/format.ts";
import { throwIfAborted } from "../pace.ts";
import type { AbortOptions } from "../source.ts";
import { shuffle, uniform } from "../tensor/random.ts";
import { checkNumbers } from "./checks.ts";
import { type Example, type Row, toBatches, type Unlabelled } from "./examples.ts";
import { layersOf } from "./head.ts";
import {
  answers,
  checkGradients,
  evaluate,
  type Featured,
  type ObjectiveOptions,
  rounded,
  score,
  stopped,
  type TrainingSetup,
  weightsOf,
} from "./objective.ts";
import { MeanDivergence, softmax } from "./probabilities.ts";
import { readDonor, type Start, startState } from "./start.ts";
import { copyOf, type OptimizerOptions, optimizerOf, type State } from "./state.ts";
import {
  type LearnedTaskOptions,
  learnedTask,
  type Stepped,
  stepsOf,
  type TaskFileOptions,
  type TaskSteps,
  taskFile,
} from "./stored-task.ts";
import type { Score } from "./supervision.ts";

const OPTIONS = [
  ...(["epochs", "steps", "batch", "holdout", "signal", "smoothing", "temperature", "dtype"] as const),
  ...(["learningRates", "weightDecay", "clip", "warmup", "decay"] as const),
] as const;
const TASK_OPTIONS = ["id", "dtype", "metadata"] as const;
/** What a learned task loses of its ΔW when it is stored: it has learned what its examples need, and noise beside it. */
const LEARNED_ERROR = 0.3;

/** Options of every trainer. */
export interface TrainerOptions {
  /** Names of the new task's labels, at least two. Language models have none. */
  readonly labels?: readonly string[] | undefined;
  /** Start of coefficients, and of a LoRA that is made from components. Default: "auto"; "fresh" for a LoRA. */
  readonly init?: Start | undefined;
  /** The same seed gives the same numbers on the same provider. Default: 0. */
  readonly seed?: number | undefined;
}

/** Options of a trainer's `fit`. */
export interface FitOptions extends ObjectiveOptions, OptimizerOptions {
  /** Passes over the examples. Default: 8. */
  readonly epochs?: number | undefined;
  /** Number of steps, instead of whole passes. */
  readonly steps?: number | undefined;
  /** Examples per step. Default: 16. */
  readonly batch?: number | undefined;
  /** Share of each label's examples that judges each epoch; the best epoch is then kept. Default: 0. */
  readonly holdout?: number | undefined;
  /** Stops between two steps; the best or last state stays, as at the end. */
  readonly signal?: AbortSignal | undefined;
}

/** @internal Knowledge of a caller of `fitRows`. */
export interface Tested {
  /** Whether gradients of the same graph were checked before. */
  readonly tested?: boolean;
}

/** Report of one step. */
export interface TrainingStep {
  /** Number of the step, from 1; `steps` is their total. */
  readonly step: number;
  readonly steps: number;
  readonly epoch: number;
  readonly loss: number;
  /** Norm of the gradient before clipping. */
  readonly norm: number;
  /** Score on the hold-out, after the last step of an epoch. */
  readonly holdout?: Score;
}

/** Steps that "auto" compares two starts with. */
const TRIAL_STEPS = 6;

/** Factor by which a loss may exceed the first one before training counts as diverged. */
const EXPLODED = 20;

/** Learns one task. Made by `createTrainer`. */
export class Trainer<Feeds = unknown> {
  readonly #setup: TrainingSetup<Feeds>;
  readonly #init: Start;
  readonly #random: () => number;
  #state: State | undefined;
  #tested = false;
  #busy = false;

  /** @internal Use `createTrainer`. @throws RangeError for fewer than two labels, or two alike */
  constructor(setup: TrainingSetup<Feeds>, { init, seed = 0 }: Omit<TrainerOptions, "labels">) {
    const { labels, supervision, terms } = setup;
    const none = labels.length === 0 && supervision.tokens;
    if (!none && (labels.length < 2 || new Set(labels).size < labels.length || labels.includes(""))) {
      throw new RangeError(
        `labels: expected two at least, all different and none empty, got ${JSON.stringify(labels)}`,
      );
    }
    const coefficients = terms.modules.some(({ shared }) => shared);
    if (init === "fresh" && coefficients)
      throw new RangeError(
        'init: "fresh" is for factors (train: "lora"); coefficients begin from "mean", "random" or a task',
      );
    this.#setup = setup;
    this.#init = init ?? (coefficients ? "auto" : "fresh");
    this.#random = uniform(seed);
  }

  /** Names of the labels; empty for a language model. */
  get labels(): readonly string[] {
    return this.#setup.labels;
  }

  /** Counts of trained numbers: in terms, in the head. */
  get size(): { readonly terms: number; readonly head: number } {
    const { model, terms } = this.#setup;
    const head = model.head.reduce((sum, { in: inputs, out, bias }) => sum + out * (inputs + Number(bias)), 0);
    return { terms: terms.size, head };
  }

  /**
   * Trains; yields once for each step. A later call continues where the one before ended. Leaving the loop, or aborting, keeps what was
   * learned so far: with a hold-out, the best epoch.
   * @throws RangeError, TypeError when an example cannot be learned from, before anything runs
   * @throws BackendError when gradients are wrong, or the loss is no longer a number: the last good state is kept
   * @example
   * for await (const { step, steps, loss } of trainer.fit(examples, { epochs: 8 })) console.log(`${step}/${steps}: ${loss}`);
   */
  async *fit(examples: readonly Example<Feeds>[], options: FitOptions = {}): AsyncGenerator<TrainingStep, void, void> {
    const { supervision, model } = this.#setup;
    checkOptions("fit", options, OPTIONS);
    checkNumbers("fit", options, {
      ...({ epochs: "whole", steps: "whole", batch: "whole", holdout: "share", smoothing: "share" } as const),
      ...({ temperature: "positive", weightDecay: "rate", clip: "unlimited", warmup: "count" } as const),
    });
    const rates = { terms: "rate", privateTerms: "rate", head: "rate", inner: "rate" } as const;
    checkNumbers("fit: learningRates", options.learningRates ?? {}, rates);
    checkChoice("fit: decay", options.decay ?? "none", ["none", "linear", "cosine"]);
    if ((options.temperature ?? 1) !== 1 && !model.head.some(({ last }) => last))
      throw new RangeError("fit: a temperature needs a trainer with a head that makes the logits");
    if (examples?.length === 0) throw new RangeError("fit: there are no examples");
    yield* this.fitRows(await supervision.check(examples), options);
  }

  /** @internal Trains with examples that were checked. */
  async *fitRows(
    rows: readonly Row<Feeds>[],
    options: FitOptions & Stepped & Tested & Featured,
  ): AsyncGenerator<TrainingStep, void, void> {
    this.#occupy("fit");
    const { terms, supervision, model } = this.#setup;
    const { epochs = 8, batch = 16, signal } = options;
    let best: { loss: number; state: State } | undefined;
    try {
      const { train, holdout } = supervision.split(rows, options.holdout ?? 0, this.#random);
      const lengths = await supervision.lengths(rows);
      const steps = options.steps ?? epochs * Math.ceil(train.length / batch);
      const state = (this.#state ??= await this.#start(train, batch, options));
      // The loss of rounded numbers is a staircase without a gradient, so exact numbers are checked.
      const exact = { ...options, dtype: undefined, stored: undefined };
      if (!this.#tested && !options.tested)
        await checkGradients(state, (at) => evaluate(this.#setup, train.slice(0, batch), at, exact));
      this.#tested = true;
      const optimizer = optimizerOf(state, terms, model.head, steps, options);
      let step = 0;
      let first: number | undefined;
      /** The last state with a sane loss. */
      let good = copyOf(state);
      for (let epoch = 1; step < steps; epoch++) {
        const batches = toBatches(train, batch, lengths, this.#random).slice(0, steps - step);
        for (const [at, some] of batches.entries()) {
          throwIfAborted(signal);
          const { loss, gradients } = await evaluate(this.#setup, some, state, options);
          first ??= loss;
          const sane = loss <= EXPLODED * (1 + first);
          if (sane) good = copyOf(state);
          const { norm, applied } = sane ? optimizer.step(gradients) : { norm: NaN, applied: false };
          if (!applied || !state.all.every(Number.isFinite)) {
            state.all.set(good.all);
            throw stopped(
              `step ${step + 1}: the loss is ${loss}, it was ${first} at first: training has gone astray. Take smaller learning rates`,
            );
          }
          step++;
          const judged =
            holdout.length > 0 && at === batches.length - 1
              ? await score(this.#setup, holdout, state, options)
              : undefined;
          if (judged && judged.loss < (best?.loss ?? Infinity)) best = { loss: judged.loss, state: copyOf(state) };
          yield { step, steps, epoch, loss, norm, ...(judged && { holdout: judged }) };
        }
      }
    } finally {
      this.#busy = false;
      // Callers may leave the loop or abort: the best epoch is kept in each case.
      if (best) this.#state!.all.set(best.state.all);
    }
  }

  /** Chooses a state to begin from; "auto" takes a few steps from each start and keeps the one with the smaller loss. */
  async #start(train: readonly Row<Feeds>[], batch: number, options: FitOptions): Promise<State> {
    const { pack, origin, terms, model } = this.#setup;
    const { temperature, signal } = options;
    const init = this.#init;
    const from = async (start: "mean" | "random" | "fresh" | { readonly task: string }): Promise<State> => {
      const donor = typeof start === "object" ? await readDonor(pack, start.task) : start;
      return startState(this.#setup, donor, this.#random, signal);
    };
    if (init !== "auto") return from(init);
    if (pack.tasks.size === 0 || !origin.modules.some(({ shared }) => shared)) return from("random");
    // Rows come label by label. Their order is drawn apart from the trainer's own numbers, so that a start by name is the same.
    const mixed = shuffle([...train], uniform(0));
    let best: { loss: number; state: State } | undefined;
    for (const start of ["mean", "random"] as const) {
      const state = await from(start);
      const trial = copyOf(state);
      const how = { ...options, warmup: 0, decay: "none" } as const;
      const optimizer = optimizerOf(trial, terms, model.head, TRIAL_STEPS, how);
      let loss = Infinity;
      for (let i = 0; i < TRIAL_STEPS; i++) {
        throwIfAborted(signal);
        const count = Math.min(batch, train.length);
        const rows = Array.from({ length: count }, (_, at) => mixed[(i * batch + at) % mixed.length]!);
        const made = await evaluate(this.#setup, rows, trial, { temperature });
        loss = made.loss;
        optimizer.step(made.gradients);
      }
      if (loss < (best?.loss ?? Infinity)) best = { loss, state };
    }
    return best?.state ?? from("random");
  }

  /**
   * Begins again from a task, with its head if the number of labels agrees; drops what was learned.
   * @param task of the pack, or a task file made for it
   * @throws TaskError when there is no such task, or it has another rank or basis
   * @throws FormatError when the file is damaged
   * @throws TypeError while `fit` or another `begin` is running
   */
  async begin(task: string | Uint8Array<ArrayBuffer>, { signal }: AbortOptions = {}): Promise<void> {
    this.#occupy("begin");
    try {
      this.#state = await startState(this.#setup, await readDonor(this.#setup.pack, task), this.#random, signal);
    } finally {
      this.#busy = false;
    }
  }

  /**
   * Scores the task's current answers: the mean loss in nats over texts or learned tokens, and the share of examples with the right
   * answer. A completion is right if all its tokens are.
   * @throws RangeError, TypeError as `fit`
   */
  async score(examples: readonly Example<Feeds>[], { signal }: AbortOptions = {}): Promise<Score> {
    const rows = await this.#setup.supervision.check(examples);
    return score(this.#setup, rows, this.#learned(), { signal });
  }

  /** @internal Replaces coefficients [rows, K]. */
  place(module: string, kind: "alphaA" | "alphaB", values: ArrayLike<number>): void {
    this.#setup.terms.part(this.#learned().parameters, module, kind)!.set(values);
  }

  /** @internal Steps of a stored task's integers, for `fitRows` and `task`. */
  stepsOf(blob: TaskBlob): TaskSteps | undefined {
    const { pack, terms, model } = this.#setup;
    return stepsOf(pack, terms, blob, model.head);
  }

  /** @internal How far the task's answers are from the targets of rows. @param how its numbers are rounded first; not where it is empty */
  async compare(
    rows: readonly Row<Feeds>[],
    { dtype = {}, stored }: Pick<ObjectiveOptions, "dtype"> & Stepped = {},
  ): Promise<Pick<MeanDivergence, "mean" | "agreement">> {
    const found = new MeanDivergence();
    const weights = weightsOf(this.#setup, rounded(this.#setup, this.#learned(), dtype, stored));
    for await (const { row, logits } of answers(this.#setup, rows, weights)) {
      found.add(this.#setup.supervision.wanted(row), logits);
    }
    return found;
  }

  /**
   * Predicts probabilities [labels] of each text or feed with the current task.
   * @throws TypeError for models that answer token by token: `score` judges them, and a session with the task answers
   */
  async predict(examples: readonly Unlabelled<Feeds>[], { signal }: AbortOptions = {}): Promise<Float32Array[]> {
    checkList("predict", examples, "examples");
    const { supervision } = this.#setup;
    if (supervision.tokens)
      throw new TypeError("predict: the model answers token by token; take `score`, or add the task to the session");
    const weights = weightsOf(this.#setup, this.#learned());
    const rows = await supervision.ask(examples, "predict");
    const found = new Map<Row<Feeds>, Float32Array>();
    for await (const { row, logits } of answers(this.#setup, rows, weights, { signal }))
      found.set(row, softmax(logits[0]!));
    return rows.map((row) => found.get(row)!);
  }

  /** Writes the task as a file of its own: a few kilobytes, for `session.addTask`, `pack.addTask`, or to send. */
  async task({ error = LEARNED_ERROR, ...options }: LearnedTaskOptions = {}): Promise<Uint8Array<ArrayBuffer>> {
    checkOptions("task", options, TASK_OPTIONS);
    if (!(error > 0 && error < 1)) throw new RangeError(`task: error: expected a number between 0 and 1, got ${error}`);
    const { parameters } = this.#learned();
    const { terms } = this.#setup;
    const { pack } = this.#setup;
    if (options.dtype || pack.directory.basis.step === undefined) return this.taskFile(options);
    const { smallTask } = await import("./small-task.ts");
    const head = layersOf(this.#setup.model.head, this.#learned());
    const learned = {
      id: options.id ?? "task",
      metadata: this.#metadata(options),
      terms: terms.expand(parameters),
      head,
    };
    return smallTask(pack, learned, error);
  }

  /** @internal Writes the task as a file, with integers of given steps. */
  taskFile(options: TaskFileOptions & Stepped): Uint8Array<ArrayBuffer> {
    const { pack, terms, model } = this.#setup;
    const named = { ...options, metadata: this.#metadata(options) };
    return taskFile(pack, learnedTask(pack, terms, this.#learned(), model.head, named));
  }

  #metadata({ metadata }: TaskFileOptions): TaskMetadata {
    const { labels } = this.#setup;
    return { ...(labels.length > 0 && { labels: [...labels] }), ...metadata };
  }

  #learned(): State {
    if (this.#state) return this.#state;
    throw new TypeError("this trainer has learned nothing yet: call fit first");
  }

  /** Marks the trainer as busy; the caller frees it. @throws TypeError while another call changes what is learned */
  #occupy(name: string): void {
    if (this.#busy) throw new TypeError(`${name}: this trainer is at work; wait for its end`);
    this.#busy = true;
  }
}
