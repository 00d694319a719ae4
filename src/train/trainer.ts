/**
 * The training loop: batches in, steps of AdamW, the best state kept. It knows numbers and examples; the model, and how a batch
 * becomes its inputs, come with the subject that it is given.
 */
import { checkList, checkOptions } from "../arguments.ts";
import { TaskError } from "../errors.ts";
import type { TaskBlob } from "../format/format.ts";
import type { TaskToWrite } from "../format/layout.ts";
import { uniform } from "../tensor/random.ts";
import { type Example, type Row, toBatches, type Unlabelled } from "./examples.ts";
import type { Score } from "./lessons.ts";
import { checkNumbers } from "./limits.ts";
import { answers, evaluate, type ObjectiveOptions, pointOf, score } from "./objective.ts";
import { MeanDivergence, softmax } from "./probabilities.ts";
import { learnedTask, type TaskFileOptions, taskFile } from "./result.ts";
import { checkGradients, stopped } from "./self-test.ts";
import { readDonor, type Start, startState } from "./start.ts";
import { copyOf, type OptimizerOptions, optimizerOf, type State } from "./state.ts";
import { type Stepped, stepsOf, type TaskSteps } from "./steps.ts";
import type { Subject } from "./subject.ts";

const OPTIONS = [
  ...(["epochs", "steps", "batch", "holdout", "signal", "smoothing", "temperature", "dtype"] as const),
  ...(["learningRates", "weightDecay", "clip", "warmup", "decay"] as const),
] as const;
const TASK_OPTIONS = ["id", "dtype", "metadata"] as const;

/** Options of every trainer. */
export interface TrainerOptions {
  /** Names of the new task's labels, two at least. Language models have none. */
  readonly labels?: readonly string[] | undefined;
  /** Where coefficients begin, and a LoRA that is made of components. Default: "auto", "fresh" for a LoRA. */
  readonly init?: Start | undefined;
  /** The same seed gives the same numbers on the same provider. Default: 0. */
  readonly seed?: number | undefined;
}

/** Options of a trainer's `fit`. */
export interface FitOptions extends ObjectiveOptions, OptimizerOptions {
  /** Passes over the examples. Default: 8. */
  readonly epochs?: number | undefined;
  /** Steps in all, instead of whole passes. */
  readonly steps?: number | undefined;
  /** Examples of a step. Default: 16. */
  readonly batch?: number | undefined;
  /** Share of each label's examples that each epoch is judged by; then the best epoch is kept. Default: 0. */
  readonly holdout?: number | undefined;
  /** Stops between two steps; what was learned so far stays, as at the end. */
  readonly signal?: AbortSignal | undefined;
}

/** @internal What a caller of `fitRows` knows. */
export interface Tested {
  /** Whether gradients of the same graph were held against the loss already. */
  readonly tested?: boolean;
}

/** What one step did. */
export interface TrainingStep {
  /** From 1, and how many there are. */
  readonly step: number;
  readonly steps: number;
  readonly epoch: number;
  readonly loss: number;
  /** Of the gradient before clipping. */
  readonly norm: number;
  /** After the last step of an epoch, where there is a hold-out. */
  readonly holdout?: Score;
}

/** Steps with which "auto" compares two starts. */
const TRIAL_STEPS = 6;

/** A loss that is so many times the first one's size is no training any more. */
const EXPLODED = 20;

/** Learns one task. Made by `createTrainer`. */
export class Trainer<Feeds = unknown> {
  readonly #subject: Subject<Feeds>;
  readonly #init: Start;
  readonly #random: () => number;
  #state: State | undefined;
  #tested = false;
  #busy = false;

  /** @internal Use `createTrainer`. @throws RangeError for fewer than two labels, or two alike */
  constructor(subject: Subject<Feeds>, { init, seed = 0 }: Omit<TrainerOptions, "labels">) {
    const { labels, lessons, terms } = subject;
    const none = labels.length === 0 && lessons.tokens;
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
    this.#subject = subject;
    this.#init = init ?? (coefficients ? "auto" : "fresh");
    this.#random = uniform(seed);
  }

  /** Empty for a language model. */
  get labels(): readonly string[] {
    return this.#subject.labels;
  }

  /** How many numbers are trained: of terms, of the head, and of components where they are trained. */
  get size(): { readonly terms: number; readonly head: number; readonly components: number } {
    const { machine, terms } = this.#subject;
    const head = machine.head.reduce((sum, { in: inputs, out, bias }) => sum + out * (inputs + Number(bias)), 0);
    return { terms: terms.ofTasks, head, components: terms.size - terms.ofTasks };
  }

  /**
   * Trains, one step for each value. A later call goes on from where the one before ended. Leaving the loop, or aborting, keeps what was
   * learned so far: the best epoch, where one was judged by a hold-out.
   * @throws RangeError, TypeError when an example cannot be learned from, before anything runs
   * @throws BackendError when gradients are wrong, or the loss is no number any more: the last good state is kept
   * @example
   * for await (const { step, steps, loss } of trainer.fit(examples, { epochs: 8 })) console.log(`${step}/${steps}: ${loss}`);
   */
  async *fit(examples: readonly Example<Feeds>[], options: FitOptions = {}): AsyncGenerator<TrainingStep, void, void> {
    const { lessons, machine } = this.#subject;
    checkOptions("fit", options, OPTIONS);
    checkNumbers("fit", options, {
      ...({ epochs: "whole", steps: "whole", batch: "whole", holdout: "share", smoothing: "share" } as const),
      ...({ temperature: "positive", weightDecay: "rate", clip: "unlimited", warmup: "count" } as const),
    });
    const rates = { terms: "rate", privateTerms: "rate", head: "rate", inner: "rate", components: "rate" } as const;
    checkNumbers("fit: learningRates", options.learningRates ?? {}, rates);
    if ((options.temperature ?? 1) !== 1 && !machine.head.some(({ last }) => last))
      throw new RangeError("fit: a temperature needs a trainer with a head that makes the logits");
    if (examples?.length === 0) throw new RangeError("fit: there are no examples");
    yield* this.fitRows(await lessons.check(examples), options);
  }

  /** @internal The same with examples that were checked. */
  async *fitRows(
    rows: readonly Row<Feeds>[],
    options: FitOptions & Stepped & Tested,
  ): AsyncGenerator<TrainingStep, void, void> {
    this.#occupy("fit");
    try {
      yield* this.#fit(rows, options);
    } finally {
      this.#busy = false;
    }
  }

  async *#fit(
    rows: readonly Row<Feeds>[],
    options: FitOptions & Stepped & Tested,
  ): AsyncGenerator<TrainingStep, void, void> {
    const { terms, lessons, machine } = this.#subject;
    const { epochs = 8, batch = 16, signal } = options;
    const { train, holdout } = lessons.split(rows, options.holdout ?? 0, this.#random);
    const lengths = await lessons.lengths(rows);
    const steps = options.steps ?? epochs * Math.ceil(train.length / batch);
    const state = (this.#state ??= await this.#start(train, batch, options));
    // A loss of rounded numbers is a staircase, which has no gradient to be held against.
    const exact = { ...options, dtype: undefined, stored: undefined };
    if (!this.#tested && !options.tested)
      await checkGradients(state, (at) => evaluate(this.#subject, train.slice(0, batch), at, exact));
    this.#tested = true;
    const optimizer = optimizerOf(state, terms, machine.head, steps, options);
    let step = 0;
    let first: number | undefined;
    let best: { loss: number; state: State } | undefined;
    /** The last state whose loss was one. */
    let good = copyOf(state);
    try {
      for (let epoch = 1; step < steps; epoch++) {
        const batches = toBatches(train, batch, lengths, this.#random).slice(0, steps - step);
        for (const [at, some] of batches.entries()) {
          signal?.throwIfAborted();
          const { loss, gradients } = await evaluate(this.#subject, some, state, options);
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
              ? await score(this.#subject, holdout, state, options)
              : undefined;
          if (judged && judged.loss < (best?.loss ?? Infinity)) best = { loss: judged.loss, state: copyOf(state) };
          yield { step, steps, epoch, loss, norm, ...(judged && { holdout: judged }) };
        }
      }
    } finally {
      // However it ends: the caller may leave, or abort.
      if (best) state.all.set(best.state.all);
    }
  }

  /** A state to begin from; "auto" takes a few steps from each start and keeps the one whose loss is smaller. */
  async #start(train: readonly Row<Feeds>[], batch: number, options: FitOptions): Promise<State> {
    const { pack, origin, terms, machine } = this.#subject;
    const { temperature, signal } = options;
    const init = this.#init;
    const from = async (start: "mean" | "random" | "fresh" | { readonly task: string }): Promise<State> => {
      const donor = typeof start === "object" ? await readDonor(pack, start.task) : start;
      return startState(this.#subject, donor, this.#random, signal);
    };
    if (init !== "auto") return from(init);
    if (pack.tasks.size === 0 || !origin.modules.some(({ shared }) => shared)) return from("random");
    let best: { loss: number; state: State } | undefined;
    for (const start of ["mean", "random"] as const) {
      const state = await from(start);
      const trial = copyOf(state);
      const how = { ...options, warmup: 0, decay: "none" } as const;
      const optimizer = optimizerOf(trial, terms, machine.head, TRIAL_STEPS, how);
      let loss = Infinity;
      for (let i = 0; i < TRIAL_STEPS; i++) {
        signal?.throwIfAborted();
        const count = Math.min(batch, train.length);
        const rows = Array.from({ length: count }, (_, at) => train[(i * batch + at) % train.length]!);
        const made = await evaluate(this.#subject, rows, trial, { temperature });
        loss = made.loss;
        optimizer.step(made.gradients);
      }
      if (loss < (best?.loss ?? Infinity)) best = { loss, state };
    }
    return best?.state ?? from("random");
  }

  /**
   * Begins again as a task is, its head too where that has as many labels; what was learned is dropped.
   * @param task of the pack, or a task file made for it
   * @throws TaskError when there is no such task, or it is of another rank or basis
   * @throws FormatError when the file is damaged
   * @throws TypeError while `fit` or another `begin` is at work
   */
  async begin(task: string | Uint8Array<ArrayBuffer>): Promise<void> {
    this.#occupy("begin");
    try {
      this.#state = await startState(this.#subject, await readDonor(this.#subject.pack, task), this.#random);
    } finally {
      this.#busy = false;
    }
  }

  /**
   * How good the task's answers are now: the mean loss in nats, of each text or of each token that is learned, and the share of
   * examples that are answered right, a completion by all its tokens.
   * @throws RangeError, TypeError as `fit`
   */
  async score(examples: readonly Example<Feeds>[]): Promise<Score> {
    const rows = await this.#subject.lessons.check(examples);
    return score(this.#subject, rows, this.#learned(), {});
  }

  /** @internal Puts coefficients [rows, K] in the place of those that there are. */
  place(module: string, kind: "alphaA" | "alphaB", values: ArrayLike<number>): void {
    this.#subject.terms.part(this.#learned().parameters, module, kind)!.set(values);
  }

  /** @internal Steps of the integers of a stored task, for `fitRows` and `task`. */
  stepsOf(blob: TaskBlob): TaskSteps | undefined {
    const { pack, terms, machine } = this.#subject;
    return stepsOf(pack, terms, blob, machine.head);
  }

  /** @internal Mean KL in nats of what rows ought to be answered and what the task answers. */
  async divergence(rows: readonly Row<Feeds>[]): Promise<number> {
    const found = new MeanDivergence();
    const point = pointOf(this.#subject, this.#learned());
    for await (const { row, logits } of answers(this.#subject, rows, point)) {
      found.add(this.#subject.lessons.wanted(row), logits);
    }
    return found.mean;
  }

  /**
   * Probabilities [labels] of each text or feed, as the task is now.
   * @throws TypeError for models that answer token by token: `score` judges them, and a session with the task answers
   */
  async predict(examples: readonly Unlabelled<Feeds>[]): Promise<Float32Array[]> {
    checkList("predict", examples, "examples");
    const { lessons } = this.#subject;
    if (lessons.tokens)
      throw new TypeError("predict: the model answers token by token; take `score`, or add the task to the session");
    const point = pointOf(this.#subject, this.#learned());
    const rows = await lessons.ask(examples, "predict");
    const found = new Map<Row<Feeds>, Float32Array>();
    for await (const { row, logits } of answers(this.#subject, rows, point)) found.set(row, softmax(logits[0]!));
    return rows.map((row) => found.get(row)!);
  }

  /** The task as a file of its own: a few kilobytes, for `session.addTask`, `pack.addTask`, or to be sent. */
  async task(options: TaskFileOptions = {}): Promise<Uint8Array<ArrayBuffer>> {
    checkOptions("task", options, TASK_OPTIONS);
    const { parameters } = this.#learned();
    const { terms } = this.#subject;
    const stored = new Float32Array(terms.size);
    terms.fillComponents(stored);
    if (parameters.some((value, i) => i >= terms.ofTasks && value !== stored[i])) {
      throw new TypeError(
        "task: components were trained too, so that the task is of no use beside the pack's; take trainer.pack()",
      );
    }
    return this.taskFile(options);
  }

  /** @internal The task as a file, with integers of given steps. */
  taskFile(options: TaskFileOptions & Stepped): Uint8Array<ArrayBuffer> {
    return taskFile(this.#subject.pack, this.#task(options));
  }

  /**
   * A pack of its own, where components were trained: the tasks that there were, solved again for the new components, and the new
   * one behind them. They lose a little by it: `eigenlora verify --against` tells how much.
   * @throws TaskError when there is a task of that id
   */
  async pack(options: TaskFileOptions = {}): Promise<Uint8Array<ArrayBuffer>> {
    checkOptions("pack", options, TASK_OPTIONS);
    const { pack, terms } = this.#subject;
    const { id = "task" } = options;
    const { repack } = await import("./repack.ts");
    // From here on as all is now: steps may be taken, and tasks added, while the pack is read.
    if (pack.tasks.has(id))
      throw new TaskError(`a task "${id}" already exists: give the new one another \`id\``, { task: id });
    return repack(pack, terms, this.#learned().parameters.slice(), this.#task(options));
  }

  #task({ metadata, ...options }: TaskFileOptions & Stepped): TaskToWrite {
    const { pack, terms, machine, labels } = this.#subject;
    const named = { ...options, metadata: { ...(labels.length > 0 && { labels: [...labels] }), ...metadata } };
    return learnedTask(pack, terms, this.#learned(), machine.head, named);
  }

  #learned(): State {
    if (this.#state) return this.#state;
    throw new TypeError("this trainer has learned nothing yet: call fit first");
  }

  /** Whoever calls it sets it free. @throws TypeError while another call changes what is learned */
  #occupy(name: string): void {
    if (this.#busy) throw new TypeError(`${name}: this trainer is at work; wait for its end`);
    this.#busy = true;
  }
}
