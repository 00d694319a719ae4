/**
 * The training loop: batches in, steps of Adam, the best state kept. It knows numbers and examples; the setup brings
 * the model and the way from a batch to its inputs.
 */

import type { Pack } from "../core/pack.ts";
import { parseTaskFile } from "../core/read-task-file.ts";
import { checkChoice, checkList, checkOptions, TaskError } from "../errors.ts";
import { plainTask } from "../format/coded.ts";
import { parseTask } from "../format/directory.ts";
import { encodeTaskFile } from "../format/encode.ts";
import { moduleOf, readTensor, type TaskBlob, type TaskMetadata } from "../format/format.ts";
import { paced, pacer, throwIfAborted } from "../pace.ts";
import { storedTask } from "../pack/write.ts";
import type { OnProgress } from "../progress.ts";
import type { Session } from "../session/session.ts";
import { checkTokenizer, type Tokenizer } from "../session/tokens.ts";
import type { AbortOptions } from "../source.ts";
import { mean, sum } from "../tensor/dtypes.ts";
import { normal, shuffle, uniform } from "../tensor/random.ts";
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
import {
  copyOf,
  type HeadLayer,
  type LayerNumbers,
  layersOf,
  type OptimizerOptions,
  optimizerOf,
  type State,
  stateLike,
  zerosOf,
} from "./state.ts";
import {
  type LearnedTaskOptions,
  learnedTask,
  type Stepped,
  smallTask,
  stepsOf,
  type TaskFileOptions,
  type TaskSteps,
} from "./stored-task.ts";
import {
  type Example,
  likeliest,
  MeanDivergence,
  type Row,
  type Score,
  type SequenceOptions,
  type Supervision,
  softmax,
  splitHoldout,
  supervisionOf,
  toBatches,
  type Unlabelled,
} from "./supervision.ts";
import { checkNumbers, checkSession, headInputs, sessionModel } from "./trainable-model.ts";
import { sharedRows, type TrainedModule, type TrainedParameter, TrainedTerms, tensorOf } from "./trained-terms.ts";

const OPTIONS = [
  ...(["epochs", "steps", "batch", "holdout", "signal", "temperature", "dtype"] as const),
  ...(["learningRates", "clip", "warmup", "decay"] as const),
] as const;
const TASK_OPTIONS = ["id", "dtype", "metadata"] as const;
/** Share of its ΔW that a learned task loses when it is stored: it has learned noise, too. */
const LEARNED_ERROR = 0.3;

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
  /** Stops between two steps: `fit` throws the signal's reason, and the best or last state stays. */
  readonly signal?: AbortSignal | undefined;
}

/** @internal Options of `fitRows`. */
export interface FitRowsOptions extends FitOptions, Stepped, Featured {
  /** Gradients of the same graph were checked before. */
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

const TRIAL_STEPS = 6;

/** Factor by which a loss may exceed the first one before training counts as diverged. */
const EXPLODED = 20;

/** Learns one task. Made by `createTrainer`. */
export class Trainer {
  readonly #setup: TrainingSetup;
  readonly #init: Start;
  readonly #random: () => number;
  #state: State | undefined;
  #tested = false;
  #busy = false;

  /** @internal Use `createTrainer`. @throws RangeError for fewer than two labels, or two alike */
  constructor(setup: TrainingSetup, { init, seed = 0 }: Pick<CreateTrainerOptions, "init" | "seed">) {
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
    const head = sum(model.head, ({ in: inputs, out, bias }) => out * (inputs + Number(bias !== undefined)));
    return { terms: terms.size, head };
  }

  /**
   * Trains; yields once for each step. A later call continues where the one before ended. Leaving the loop, or
   * aborting, keeps what was learned so far: with a hold-out, the best epoch.
   * @throws RangeError, TypeError when an example cannot be learned from, before anything runs
   * @throws BackendError when gradients are wrong, or the loss is no longer a number: the last good state is kept
   * @example
   * for await (const { step, steps, loss } of trainer.fit(examples, { epochs: 8 })) console.log(`${step}/${steps}:
   * ${loss}`);
   */
  async *fit(examples: readonly Example[], options: FitOptions = {}): AsyncGenerator<TrainingStep, void, void> {
    const { supervision, model } = this.#setup;
    checkOptions("fit", options, OPTIONS);
    checkNumbers("fit", options, {
      ...({ epochs: "whole", steps: "whole", batch: "whole", holdout: "share" } as const),
      ...({ temperature: "positive", clip: "unlimited", warmup: "count" } as const),
    });
    const rates = { terms: "rate", privateTerms: "rate", head: "rate", inner: "rate" } as const;
    checkNumbers("fit: learningRates", options.learningRates ?? {}, rates);
    checkChoice("fit: decay", options.decay ?? "none", ["none", "linear"]);
    if ((options.temperature ?? 1) !== 1 && !model.head.some(({ last }) => last))
      throw new RangeError("fit: a temperature needs a trainer with a head that makes the logits");
    if (examples?.length === 0) throw new RangeError("fit: there are no examples");
    yield* this.fitRows(await supervision.check(examples), options);
  }

  /** @internal Trains with examples that were checked. */
  async *fitRows(rows: readonly Row[], options: FitRowsOptions): AsyncGenerator<TrainingStep, void, void> {
    this.#occupy("fit");
    const { terms, supervision, model } = this.#setup;
    const { epochs = 8, batch = 16, signal } = options;
    let best: { loss: number; state: State } | undefined;
    try {
      const labelOf = ({ wanted }: Row): number => (supervision.tokens ? 0 : likeliest(wanted[0]!));
      const { train, holdout } = splitHoldout(rows, labelOf, options.holdout ?? 0, this.#random);
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

  /**
   * Chooses a state to begin from; "auto" takes a few steps from each start and keeps the one with the smaller loss.
   */
  async #start(train: readonly Row[], batch: number, options: FitOptions): Promise<State> {
    const { pack, origin, terms, model } = this.#setup;
    const { temperature, signal } = options;
    const init = this.#init;
    const from = async (start: "mean" | "random" | "fresh" | { readonly task: string }): Promise<State> => {
      const donor = typeof start === "object" ? await readDonor(pack, start.task) : start;
      return startState(this.#setup, donor, this.#random, signal);
    };
    if (init !== "auto") return from(init);
    if (pack.tasks.size === 0 || !origin.modules.some(({ shared }) => shared)) return from("random");
    // Rows come label by label. Their order is drawn apart from the trainer's own numbers, so that a start by name is
    // the same.
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
   * Scores the task's current answers: the mean loss in nats over texts or learned tokens, and the share of examples
   * with the right answer. A completion is right if all its tokens are.
   * @throws RangeError, TypeError as `fit`
   */
  async score(examples: readonly Example[], { signal }: AbortOptions = {}): Promise<Score> {
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

  /**
   * @internal How far the task's answers are from the targets of rows.
   * @param how its numbers are rounded first; not where it is empty
   */
  async compare(
    rows: readonly Row[],
    { dtype = {}, stored }: Pick<ObjectiveOptions, "dtype"> & Stepped = {},
  ): Promise<Pick<MeanDivergence, "mean" | "agreement">> {
    const found = new MeanDivergence();
    const weights = weightsOf(this.#setup, rounded(this.#setup, this.#learned(), dtype, stored));
    for await (const { row, logits } of answers(this.#setup, rows, weights)) {
      found.add(row.wanted, logits);
    }
    return found;
  }

  /**
   * Predicts probabilities [labels] of each text or feed with the current task.
   * @throws TypeError for models that answer token by token: `score` judges them, and a session with the task answers
   */
  async predict(examples: readonly Unlabelled[], { signal }: AbortOptions = {}): Promise<Float32Array[]> {
    checkList("predict", examples, "examples");
    const { supervision } = this.#setup;
    if (supervision.tokens)
      throw new TypeError("predict: the model answers token by token; take `score`, or add the task to the session");
    const weights = weightsOf(this.#setup, this.#learned());
    const rows = await supervision.ask(examples, "predict");
    const found = new Map<Row, Float32Array>();
    for await (const { row, logits } of answers(this.#setup, rows, weights, { signal }))
      found.set(row, softmax(logits[0]!));
    return rows.map((row) => found.get(row)!);
  }

  /** Writes the task as a file of its own: a few kilobytes, for `session.addTask`, `pack.addTask`, or to send. */
  async task({ error = LEARNED_ERROR, ...options }: LearnedTaskOptions = {}): Promise<Uint8Array<ArrayBuffer>> {
    checkOptions("task", options, TASK_OPTIONS);
    if (!(error > 0 && error < 1)) throw new RangeError(`task: error: expected a number between 0 and 1, got ${error}`);
    const state = this.#learned();
    const { pack, terms, model } = this.#setup;
    if (options.dtype || pack.directory.basis.step === undefined) return this.taskFile(options);
    const { id = "task" } = options;
    const numbers = { terms: terms.expand(state.parameters), head: layersOf(model.head, state) };
    return smallTask(pack, { id, metadata: this.#metadata(options), ...numbers }, error);
  }

  /** @internal Writes the task as a file, with integers of given steps. */
  taskFile(options: TaskFileOptions & Stepped): Uint8Array<ArrayBuffer> {
    const { pack, terms, model } = this.#setup;
    const named = { ...options, metadata: this.#metadata(options) };
    // Coded if the pack's tasks are, so that adding it keeps its bytes.
    const { entry, blob } = storedTask(pack, learnedTask(pack, terms, this.#learned(), model.head, named));
    return encodeTaskFile(entry, pack.basisId, blob);
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

// Makes a trainer on a session. One copy of the weights learns and answers, in the session; the trainer holds only the
// numbers of the task.

/** Options of `createTrainer`. */
export interface CreateTrainerOptions extends SequenceOptions, AbortOptions {
  /** Names of the new task's labels, at least two. Language models have none. */
  readonly labels?: readonly string[] | undefined;
  /** Start of coefficients, and of a LoRA that is made from components. Default: "auto"; "fresh" for a LoRA. */
  readonly init?: Start | undefined;
  /** The same seed gives the same numbers on the same provider. Default: 0. */
  readonly seed?: number | undefined;
  /**
   * Turns texts into the model's inputs, one row each: a tokenizer of transformers.js or @huggingface/tokenizers as it
   * is, or a function. Not needed for examples with feeds.
   */
  readonly encode?: Tokenizer | undefined;
  /**
   * "coefficients": over the pack's components. "lora": factors of every module, which begin as without a pack, or from
   * its components if `init` says so. Default: "coefficients".
   */
  readonly train?: "coefficients" | "lora" | undefined;
  /**
   * Rows of coefficients of each side, or rank of the factors. Default: as in the task to start from, or most of the
   * pack's first tasks.
   */
  readonly rank?: number | undefined;
  /**
   * Rank-1 terms of each module in addition to the coefficients, for what the components lack. Default: as many as the
   * task to start from has in the module, else none.
   */
  readonly privateTerms?: number | undefined;
  /** Names of the modules to train. Default: those of the task to start from, else all of the pack. */
  readonly modules?: readonly string[] | undefined;
  /**
   * Layers to train whole, among those that the session was created to train: their names, or the name of a module that
   * holds them. `false`: none. Default: all. One of them has a row for each label.
   */
  readonly head?: string | readonly string[] | false | undefined;
  /** Receives the progress of reading the pack's components. Not called for sources in memory. */
  readonly onProgress?: OnProgress | undefined;
}

/**
 * Makes a trainer on a session.
 * @param session created with `trainable: true`
 * @throws TypeError for a session that is not trainable, or an `encode` that cannot encode texts; RangeError for
 *   impossible labels, ranks, modules or heads
 * @example
 * const trainer = await createTrainer(session, { labels: ["spam", "fine"], encode: tokenizer });
 * for await (const { loss } of trainer.fit(examples)) console.log(loss);
 * await session.addTask("mine", await trainer.task());
 */
export async function createTrainer(session: Session, options: CreateTrainerOptions): Promise<Trainer> {
  checkSession("createTrainer", session);
  checkOptions("createTrainer", options, [
    ...(["labels", "init", "seed", "encode", "train", "rank", "privateTerms", "modules", "head"] as const),
    ...(["end", "decoderStart", "signal", "onProgress"] as const),
  ]);
  if (options.labels !== undefined || !session.trainable!.graph.tokens)
    checkList("createTrainer: labels", options.labels!, 'names, such as ["spam", "fine"]');
  if (options.encode !== undefined) checkTokenizer("createTrainer: encode", options.encode);
  return makeTrainer(session, options, supervisionOf(session, options));
}

/** Makes a trainer with a supervision that may already hold encoded texts. */
export async function makeTrainer(
  session: Session,
  options: CreateTrainerOptions,
  supervision: Supervision,
): Promise<Trainer> {
  const { pack, trainable } = session;
  const source = trainable!;
  const { train = "coefficients", labels = [] } = options;
  checkChoice("train", train, ["coefficients", "lora"]);
  if (typeof options.init === "string") checkChoice("init", options.init, ["auto", "mean", "random", "fresh"]);
  checkNumbers("createTrainer", options, { rank: "whole", privateTerms: "count", decoderStart: "count" });
  // Language models have no head to train: their logits are over the vocabulary.
  const head = headInputs(source, labels.length === 0 ? false : options.head);
  const leftOut = new Set(session.leftOut);
  const here = pack.modules.flatMap(({ name }) => (leftOut.has(name) ? [] : [name]));
  const absent = options.modules?.find((name) => leftOut.has(name));
  if (absent !== undefined) throw new RangeError(`modules: "${absent}" was left out of this session`);
  const modules = await trainedModules(pack, options, here);
  const origin = new TrainedTerms(modules);
  const factors = modules.map(({ shared, privateRank, ...one }) => ({
    ...one,
    privateRank: privateRank + (shared?.rank ?? 0),
  }));
  const terms = train === "lora" ? new TrainedTerms(factors) : origin;
  const model = await sessionModel(source, terms, head, labels);
  return new Trainer({ pack, model, supervision, terms, origin, labels: [...labels] }, options);
}

/**
 * Lists what is trained of each module, over the pack's components.
 * @param here names of the modules that the session has
 */
async function trainedModules(
  pack: Pack,
  { modules, init, privateTerms, signal, onProgress, ...options }: CreateTrainerOptions,
  here: readonly string[],
): Promise<TrainedModule[]> {
  const { rank = await usualRank(pack) } = options;
  const unknown = modules?.find((name) => !pack.modules.some((module) => module.name === name));
  if (unknown !== undefined) throw new RangeError(`modules: the pack has no "${unknown}"`);
  const from =
    typeof init === "object" && pack.tasks.has(init.task) ? await pack.load(init.task, { signal }) : undefined;
  const first = options.rank === undefined ? from : undefined;
  const adapted = (from?.terms ?? []).map(({ module }) => pack.modules[module]!.name);
  const some = modules ?? (adapted.length > 0 ? here.filter((name) => adapted.includes(name)) : here);
  const section = await pack.bases({ signal, onProgress });
  try {
    return pack.modules.flatMap((module, index): TrainedModule[] => {
      const { name, in: inputs, out } = module;
      if (!some.includes(name)) return [];
      const own = first?.terms.find((term) => term.module === index);
      const shared = sharedRows(module, section.bytes, rank, own);
      const privateRank = privateTerms ?? own?.privateRank ?? 0;
      return [
        { name, in: inputs, out, shared, privateRank: shared ? privateRank : Math.max(privateRank, own ? 0 : rank) },
      ];
    });
  } finally {
    section.close();
  }
}

// Starting values of training. The coefficients of a pack's tasks show where useful ones lie. Their mean is a start for
// tasks trained from one seed, whose rows correspond; random ones with their spread are for tasks with seeds of their
// own (the paper's zero-shot). Rows must differ at the start: identical rows get identical gradients for ever.

/**
 * Kinds of starts. "auto" tries mean and random for a few steps and takes the better one. "fresh" begins as PEFT does,
 * without the pack, for factors that are trained themselves.
 */
export type Start = "auto" | "mean" | "random" | "fresh" | { readonly task: string };

/** Largest number of tasks that mean and spread are computed from. */
const MOST_DONORS = 64;

/** Standard deviation of fresh factors and heads, as in PyTorch. */
const SMALL = 0.02;

/** A task to start from. */
export interface Donor {
  readonly id: string;
  readonly blob: TaskBlob;
  /** Names of its head's rows, where it has some. */
  readonly labels: readonly string[] | undefined;
}

/**
 * Reads the task to start from.
 * @param task of the pack, or a task file made for it
 * @throws TaskError when there is no such task, or it belongs to another basis
 * @throws FormatError when the file is damaged
 */
export async function readDonor(pack: Pack, task: string | Uint8Array<ArrayBuffer>): Promise<Donor> {
  if (typeof task === "string") {
    const labels = pack.tasks.get(task)?.metadata.labels;
    if (pack.tasks.has(task)) return { id: task, blob: await pack.load(task), labels };
    throw new TaskError(`there is no task "${task}" to start from`, { task });
  }
  const file = "the task to begin with";
  const { id, basisId, blob, metadata } = parseTaskFile(task, file);
  if (basisId !== pack.basisId)
    throw new TaskError(`task "${id}" belongs to the basis ${basisId}, this pack has ${pack.basisId}`, { task: id });
  const plain = await plainTask(blob, { file, part: file, before: pack.directory.basisBytes });
  return { id, blob: await paced(parseTask(plain, pack.modules, file, { id }), pacer()), labels: metadata.labels };
}

/**
 * @throws TaskError when training would leave out a part of the task, or the trainer takes other components than the
 *   task
 */
function refuseOthers(pack: Pack, { modules }: TrainedTerms, head: readonly HeadLayer[], { id, blob }: Donor): void {
  const refuse = (what: string): TaskError =>
    new TaskError(`task "${id}" has ${what}, which this trainer does not have`, { task: id });
  const layers = new Set(head.map(({ module }) => module));
  const other = blob.parameters.find(({ role, name }) => role !== "saved" || !layers.has(moduleOf(name)));
  if (other) throw refuse(`"${other.name}" (${other.role})`);
  for (const { module, rank, A, B, ownA, ownBt, privateRank, magnitude } of blob.terms) {
    const { name } = pack.modules[module]!;
    const trained = modules.find((known) => known.name === name);
    if (!trained) throw refuse(`terms of "${name}"`);
    if (magnitude) throw refuse(`a DoRA magnitude of "${name}"`);
    if (privateRank > 0 && trained.privateRank === 0) throw refuse(`private terms of "${name}"`);
    if (rank === 0 || (A?.basis === 0 && B?.basis === 0 && !ownA && !ownBt)) continue;
    const { shared } = trained;
    const isSame =
      shared?.A?.index === A?.basis &&
      shared?.B?.index === B?.basis &&
      shared?.own.A === (ownA !== undefined) &&
      shared.own.B === (ownBt !== undefined);
    if (isSame) continue;
    const advice = pack.tasks.has(id) ? `: make one with \`init: { task: "${id}" }\`` : "";
    throw new TaskError(`task "${id}" has another share of the components of "${name}" than the trainer${advice}`, {
      task: id,
    });
  }
}

/** Makes the state to start from. @throws TaskError when the task to start from has another rank */
export async function startState(
  { pack, terms, origin, model: { head }, labels }: TrainingSetup,
  start: "mean" | "random" | "fresh" | Donor,
  random: () => number,
  signal?: AbortSignal,
): Promise<State> {
  const state = stateLike({ parameters: { length: terms.size }, ...zerosOf(head) });
  const donor = typeof start === "object" ? start : undefined;
  // A LoRA begins with the factors that coefficients make, unless the task to start from has factors of its own.
  const expands = origin !== terms && start !== "fresh" && (!donor || donor.blob.terms.some(({ rank }) => rank > 0));
  if (donor) refuseOthers(pack, expands ? origin : terms, head, donor);
  await fillStart(pack, terms, expands ? "random" : start, state.parameters, random, signal);
  if (expands) {
    const coefficients = new Float32Array(origin.size);
    await fillStart(pack, origin, start, coefficients, random, signal);
    for (const [module, { A, Bt }] of origin.expand(coefficients)) {
      terms.part(state.parameters, module, "privateA")?.set(A);
      terms.part(state.parameters, module, "privateB")?.set(Bt);
    }
  }
  startHead(head, donor, labels, state, random);
  return state;
}

/**
 * Copies each layer from the task to start from if the shapes agree; rows go to the labels of their names, where those
 * are the same. Otherwise the layer with the labels gets small random numbers, and the layers in front of it the
 * model's own.
 */
function startHead(
  head: readonly HeadLayer[],
  donor: Donor | undefined,
  labels: readonly string[],
  state: LayerNumbers,
  random: () => number,
): void {
  for (const { layer, weight, bias } of layersOf(head, state)) {
    const { module, in: inputs, out, own, last } = layer;
    const given = donor && savedTensor(donor.blob, `${module}.weight`, [out, inputs]);
    if (given) {
      const order = last ? orderOf(labels, donor.labels) : undefined;
      weight.set(inOrder(given, order));
      bias.set(inOrder(savedTensor(donor.blob, `${module}.bias`, [out]) ?? new Float32Array(0), order));
    } else if (own) {
      weight.set(own.weight);
      bias.set(own.bias);
    } else fillNormal(weight, random);
  }
}

/** Where each label is among others of the same names; undefined where names differ, or are in the same order. */
function orderOf(labels: readonly string[], others: readonly string[] | undefined): number[] | undefined {
  const order = labels.map((label) => others?.indexOf(label) ?? -1);
  return others?.length === labels.length && !order.includes(-1) ? order : undefined;
}

function inOrder(values: Float32Array, order: readonly number[] | undefined): Float32Array {
  const width = order && values.length / order.length;
  if (!width) return values;
  return Float32Array.from(values, (_, i) => values[order[Math.floor(i / width)]! * width + (i % width)]!);
}

function savedTensor({ parameters, bytes }: TaskBlob, name: string, shape: number[]): Float32Array | undefined {
  const found = parameters.find(
    (one) => one.role === "saved" && one.name === name && one.shape.join() === shape.join(),
  );
  return found && readTensor(bytes, found.tensor);
}

function fillNormal(values: Float32Array, random: () => number): void {
  for (let i = 0; i < values.length; i++) values[i] = SMALL * normal(random);
}

/** Writes starting values into all parameters. @throws TaskError when the task to start from has another rank */
async function fillStart(
  pack: Pack,
  terms: TrainedTerms,
  start: "mean" | "random" | "fresh" | Donor,
  out: Float32Array<ArrayBuffer>,
  random: () => number,
  signal?: AbortSignal,
): Promise<void> {
  const donors = await donorsOf(pack, terms, signal);
  for (const parameter of terms.parameters) {
    const { module, kind, dims } = parameter;
    const values = terms.part(out, module, kind)!;
    const given = typeof start === "object" ? tensorOf(pack, start.blob, parameter) : undefined;
    if (given && typeof start === "object") {
      if (given.rows !== dims[0]) {
        const which = kind.startsWith("private") ? "privateTerms" : "rank";
        throw new TaskError(
          `task "${start.id}" has ${which} ${given.rows} on "${module}", the trainer ${dims[0]}: leave \`rank\` and \`privateTerms\` out`,
          { task: start.id },
        );
      }
      readTensor(start.blob.bytes, given, values);
    } else if (kind === "privateB" || kind === "ownB") values.fill(0);
    else if (kind === "privateA" || kind === "ownA") fillNormal(values, random);
    // A module that the task leaves alone changes nothing at first.
    else if (typeof start === "object" && isStill(terms, parameter)) values.fill(0);
    else fillCoefficients(values, dims[1], donors.get(parameter), start === "mean", random);
  }
}

/**
 * Tells whether zeros in the place of these coefficients leave a module unchanged: of one factor, which has no mean.
 */
function isStill({ modules }: TrainedTerms, { module, kind }: TrainedParameter): boolean {
  const { A, B } = modules.find(({ name }) => name === module)!.shared!;
  return kind === (B && !B.mean ? "alphaB" : A && !A.mean ? "alphaA" : undefined);
}

/** Coefficients of each parameter in the pack's first tasks: [rank, K], or fewer rows. */
async function donorsOf(
  pack: Pack,
  terms: TrainedTerms,
  signal?: AbortSignal,
): Promise<Map<TrainedParameter, Float32Array[]>> {
  const all = new Map<TrainedParameter, Float32Array[]>();
  for (const blob of await firstTasks(pack, MOST_DONORS, signal)) {
    for (const parameter of terms.parameters) {
      const tensor = parameter.kind.startsWith("alpha") ? tensorOf(pack, blob, parameter) : undefined;
      const [rank, K] = parameter.dims;
      const given = tensor && readTensor(blob.bytes, tensor).subarray(0, rank * K);
      if (given) all.set(parameter, [...(all.get(parameter) ?? []), given]);
    }
  }
  return all;
}

/**
 * Fills in the mean of the tasks' coefficients; random numbers with their spread where no task has the row, or no mean
 * is wanted.
 */
function fillCoefficients(
  values: Float32Array,
  K: number,
  donors: readonly Float32Array[] | undefined,
  isMean: boolean,
  random: () => number,
): void {
  if (!donors) return fillNormal(values, random);
  const columns = Array.from({ length: K }, (_, k) => {
    const column = donors.flatMap((rows) => Array.from({ length: rows.length / K }, (_, i) => rows[i * K + k]!));
    const centre = mean(column);
    return { centre, deviation: Math.sqrt(Math.max(0, mean(column, (value) => value ** 2) - centre * centre)) };
  });
  for (let i = 0; i < values.length; i++) {
    const having = donors.filter(({ length }) => i < length);
    const { centre, deviation } = columns[i % K]!;
    values[i] = isMean && having.length > 0 ? mean(having, (rows) => rows[i]!) : centre + deviation * normal(random);
  }
}

/** Loads tasks all at once, so that a task that is removed meanwhile is still read. */
function firstTasks(pack: Pack, count: number, signal?: AbortSignal): Promise<TaskBlob[]> {
  return Promise.all([...pack.tasks.keys()].slice(0, count).map((id) => pack.load(id, { signal })));
}

/** The most frequent rank among a pack's first tasks; 8 where there are none. */
async function usualRank(pack: Pack): Promise<number> {
  const counts = new Map<number, number>();
  for (const { terms } of await firstTasks(pack, 8))
    for (const { A, rank } of terms) if (A) counts.set(rank, (counts.get(rank) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1])[0]?.[0] ?? 8;
}
