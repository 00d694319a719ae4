/**
 * The training loop: batches in, steps of AdamW, the best state kept. It knows parameters and examples; the model, and how a
 * batch becomes numbers, are the machine's that it is given.
 */
import { BackendError, type EigenLoraError, TaskError } from "../errors.ts";
import type { TaskMetadata } from "../format/format.ts";
import { parseTask } from "../format/task.ts";
import { parseTaskFile } from "../format/task-file.ts";
import type { Pack } from "../pack/pack.ts";
import { type Dtype, decodeTensor } from "../tensor/dtypes.ts";
import { encodeTensor } from "../tensor/encode.ts";
import { normal, uniform } from "../tensor/random.ts";
import { AdamW, type AdamWOptions, type StepReport } from "./adamw.ts";
import { checkExamples, type Example, holdBack, type Row, targetsOf, toBatches } from "./examples.ts";
import { type TaskDtypes, taskFile } from "./result.ts";
import { type Donor, Donors, headOf, newHead, type Start } from "./start.ts";
import type { Factors, Terms } from "./terms.ts";

/** All numbers that are trained: parameters of terms in one, weight [labels, in] and bias [labels] of the head. */
export interface State {
  readonly parameters: Float32Array<ArrayBuffer>;
  readonly weight: Float32Array<ArrayBuffer>;
  readonly bias: Float32Array<ArrayBuffer>;
}

/** A task as a model is fed with it: factors by module name, weight [labels, in] and bias [labels] of the head. */
export interface Point extends Omit<State, "parameters"> {
  readonly factors: ReadonlyMap<string, Factors>;
}

/** One run that learns. */
export interface MachineStep {
  readonly loss: number;
  /** [rows, labels] */
  readonly logits: Float32Array;
  /** As the point. */
  readonly gradients: Point;
}

/** A model that can be trained. `Feeds` are one batch of its inputs. */
export interface Machine<Feeds> {
  /** The layer that is trained whole; undefined where the model's own outputs are the logits. */
  readonly head: { readonly module: string; readonly in: number; readonly bias: boolean } | undefined;
  readonly encodes: boolean;
  /** @throws TypeError when the rows cannot be put into one batch */
  batch(rows: readonly Row<Feeds>[]): Promise<Feeds>;
  /** Of a row by itself, in any unit: rows of like lengths go into one batch, since they are padded to the longest. */
  length(row: Row<Feeds>): Promise<number>;
  /** Logits [rows, labels] alone. */
  answer(batch: Feeds, point: Point): Promise<Float32Array>;
  /** @param targets [rows, labels] */
  step(batch: Feeds, point: Point, targets: Float32Array<ArrayBuffer>): Promise<MachineStep>;
}

/** What a trainer trains. */
export interface Subject<Feeds> {
  readonly pack: Pack;
  readonly machine: Machine<Feeds>;
  readonly terms: Terms;
  /** Terms over the pack's components that factors begin from, where factors themselves are trained; else the same terms. */
  readonly origin: Terms;
}

export interface TrainerOptions {
  /** Names of the new task's labels, two at least. */
  readonly labels: readonly string[];
  /** Where coefficients begin, and a LoRA that is made of components: "auto" unless given, "fresh" for a LoRA. */
  readonly init?: Start | undefined;
  /** The same seed gives the same numbers on the same provider; 0 unless given. */
  readonly seed?: number | undefined;
}

export interface FitOptions {
  /** Passes over the examples; 8 unless given. */
  readonly epochs?: number | undefined;
  /** Steps in all, instead of whole passes. */
  readonly steps?: number | undefined;
  /** Examples of a step; 16 unless given. */
  readonly batch?: number | undefined;
  /** Share of each label's examples that is held back to judge each epoch; then the best epoch is kept. 0 unless given. */
  readonly holdout?: number | undefined;
  /** Learning rates of terms and head, 0.02 each unless given, and of components, 0.001. 0: it stays as it is. */
  readonly rates?: { readonly terms?: number; readonly head?: number; readonly components?: number } | undefined;
  /** Weight decay of both; 0 unless given. */
  readonly weightDecay?: number | undefined;
  /** Share of every target that is spread over all labels; 0 unless given. */
  readonly smoothing?: number | undefined;
  /** What logits are divided by where they meet targets; 1 unless given. Needs a head, which is where they are divided. */
  readonly temperature?: number | undefined;
  /**
   * The number formats that the task will be stored in: every step sees the numbers as they will be read, and changes those behind
   * them (straight-through). Of use with int8, int4 and int3. Exact numbers unless given.
   */
  readonly dtype?: TaskDtypes | undefined;
  /** Largest norm of a gradient; 1 unless given. */
  readonly clip?: number | undefined;
  /** Steps until the full rate is reached; a tenth of all unless given. */
  readonly warmup?: number | undefined;
  readonly decay?: AdamWOptions["decay"];
  /** Stops between two steps; what was learned so far stays. */
  readonly signal?: AbortSignal | undefined;
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
  /** After the last step of an epoch, on what was held back. */
  readonly holdout?: { readonly loss: number; readonly accuracy: number };
}

/** Steps with which "auto" compares two starts. */
const TRIAL_STEPS = 6;

/** Rows that run together at most: what the way back needs is kept of all of them, so that memory grows with their number. */
const MOST_ROWS = 16;

/** A loss that is so many times the first one's size is no training any more. */
const EXPLODED = 20;

/** Learns one task. Made by `createTrainer`. */
export class Trainer<Feeds = unknown> {
  readonly labels: readonly string[];
  readonly #subject: Subject<Feeds>;
  readonly #machine: Machine<Feeds>;
  readonly #init: Start;
  readonly #random: () => number;
  #state: State | undefined;
  #tested = false;
  #busy = false;

  /** @throws RangeError for fewer than two labels, or two alike */
  constructor(subject: Subject<Feeds>, { labels, init, seed = 0 }: TrainerOptions) {
    if (labels.length < 2 || new Set(labels).size < labels.length) {
      throw new RangeError(`labels: expected two at least, all different, got ${JSON.stringify(labels)}`);
    }
    const coefficients = subject.terms.modules.some(({ shared }) => shared);
    if (init === "fresh" && coefficients)
      throw new RangeError(
        'init: "fresh" is for factors (train: "lora"); coefficients begin from "mean", "random" or a task',
      );
    this.labels = [...labels];
    this.#subject = subject;
    this.#machine = subject.machine;
    this.#init = init ?? (coefficients ? "auto" : "fresh");
    this.#random = uniform(seed);
  }

  /** How many numbers are trained: of terms, of the head, and of components where they are trained. */
  get size(): { readonly terms: number; readonly head: number; readonly components: number } {
    const { machine, terms } = this.#subject;
    const head = machine.head ? this.labels.length * (machine.head.in + Number(machine.head.bias)) : 0;
    return { terms: terms.ofTasks, head, components: terms.size - terms.ofTasks };
  }

  /**
   * Trains, one step for each value. A later call goes on from where the one before ended. Leaving the loop, or aborting, keeps
   * what was learned so far.
   * @throws RangeError, TypeError when an example cannot be learned from, before anything runs
   * @throws BackendError when gradients are wrong, or the loss is no number any more: the last good state is kept
   * @example
   * for await (const { step, steps, loss } of trainer.fit(examples, { epochs: 8 })) console.log(`${step}/${steps}: ${loss}`);
   */
  async *fit(examples: readonly Example<Feeds>[], options: FitOptions = {}): AsyncGenerator<TrainingStep, void, void> {
    const { epochs = 8, batch = 16, holdout = 0, smoothing = 0, temperature = 1, signal } = options;
    whole("epochs", epochs);
    if (options.steps !== undefined) whole("steps", options.steps);
    whole("batch", batch);
    share("holdout", holdout);
    share("smoothing", smoothing);
    if (!(temperature > 0 && temperature < Infinity))
      throw new RangeError(`fit: temperature must be a number above 0, got ${temperature}`);
    if (temperature !== 1 && !this.#machine.head)
      throw new RangeError("fit: a temperature needs a trainer with a head");
    const rows = checkExamples(examples, this.labels, this.#machine.encodes);
    if (this.#busy) throw new TypeError("fit: this trainer is at work; wait for its end");
    this.#busy = true;
    try {
      const { train, held } = holdBack(rows, holdout, this.#random);
      const lengths = new Map<Row<Feeds>, number>();
      for (const row of train) lengths.set(row, await this.#machine.length(row));
      const steps = options.steps ?? epochs * Math.ceil(train.length / batch);
      const state = (this.#state ??= await this.#start(train, batch, options));
      // A loss of rounded numbers is a staircase, which has no gradient to be held against.
      if (!this.#tested) await this.#test(train.slice(0, batch), state, { ...options, dtype: undefined });
      this.#tested = true;
      const optimizer = this.#optimizer(state, steps, options);
      let step = 0;
      let first: number | undefined;
      let best: { loss: number; state: State } | undefined;
      /** The last state whose loss was one. */
      let good = copy(state);
      for (let epoch = 1; step < steps; epoch++) {
        const batches = toBatches(train, batch, lengths, this.#random);
        for (const [at, some] of batches.entries()) {
          if (step === steps) break;
          signal?.throwIfAborted();
          const { loss, gradients } = await this.#step(some, state, options);
          first ??= loss;
          const exploded = !(loss <= EXPLODED * (1 + first));
          if (!exploded) good = copy(state);
          const { norm, applied } = exploded ? { norm: NaN, applied: false } : optimizer.step(gradients);
          if (!applied || !finite(state)) {
            assign(state, best?.state ?? good);
            throw stopped(
              `step ${step + 1}: the loss is ${loss}, it was ${first} at first: training has gone astray. Take smaller rates`,
            );
          }
          step++;
          const judged =
            held.length > 0 && (at === batches.length - 1 || step === steps)
              ? await this.#judge(held, batch, options, state)
              : undefined;
          if (judged && judged.loss < (best?.loss ?? Infinity)) best = { loss: judged.loss, state: copy(state) };
          yield { step, steps, epoch, loss, norm, ...(judged ? { holdout: judged } : {}) };
        }
      }
      if (best) assign(state, best.state);
    } finally {
      this.#busy = false;
    }
  }

  #optimizer(
    state: State,
    steps: number,
    { rates = {}, weightDecay = 0, clip = 1, warmup = Math.floor(steps / 10), decay }: FitOptions,
  ): { step(gradients: State): StepReport } {
    const { terms = 0.02, head = 0.02, components = 0.001 } = rates;
    const { ofTasks } = this.#subject.terms;
    const groups = [
      { of: (all: State) => all.parameters.subarray(0, ofTasks), rate: terms, weightDecay },
      { of: (all: State) => all.parameters.subarray(ofTasks), rate: components, weightDecay: 0 },
      { of: (all: State) => all.weight, rate: head, weightDecay },
      { of: (all: State) => all.bias, rate: head, weightDecay: 0 },
      // What is not trained has no say in the clipping.
    ].filter(({ rate }) => rate !== 0);
    const optimizer = new AdamW(
      groups.map(({ of, ...group }) => ({ values: of(state), ...group })),
      { steps, clip, warmup, decay },
    );
    return { step: (gradients) => optimizer.step(groups.map(({ of }) => of(gradients))) };
  }

  /** Loss and gradients of a batch, which runs in parts where it is large. */
  async #step(
    rows: readonly Row<Feeds>[],
    state: State,
    { smoothing = 0, temperature = 1, dtype }: Pick<FitOptions, "smoothing" | "temperature" | "dtype">,
  ): Promise<{ loss: number; logits: Float32Array; gradients: State }> {
    const labels = this.labels.length;
    const targets = targetsOf(rows, labels, smoothing);
    const divided = (part: Float32Array<ArrayBuffer>): Float32Array<ArrayBuffer> =>
      temperature === 1 ? part : part.map((value) => value / temperature);
    const seen = dtype ? this.#rounded(state, dtype) : state;
    const point = this.#point({ ...seen, weight: divided(seen.weight), bias: divided(seen.bias) });
    const logits = new Float32Array(targets.length);
    const sum = {
      parameters: new Float32Array(state.parameters.length),
      weight: new Float32Array(state.weight.length),
      bias: new Float32Array(state.bias.length),
    };
    let loss = 0;
    for (let at = 0; at < rows.length; at += MOST_ROWS) {
      const some = rows.slice(at, at + MOST_ROWS);
      const made = await this.#machine.step(
        await this.#machine.batch(some),
        point,
        targets.slice(at * labels, (at + some.length) * labels),
      );
      // Each part is a mean over its own rows.
      const share = some.length / rows.length;
      loss += share * made.loss;
      logits.set(made.logits, at * labels);
      const { factors, weight, bias } = made.gradients;
      const gradients = {
        parameters: this.#subject.terms.pullBack(state.parameters, factors),
        weight: divided(weight),
        bias: divided(bias),
      };
      parts(sum).forEach((part, i) => parts(gradients)[i]!.forEach((g, j) => (part[j]! += share * g)));
    }
    return { loss, logits, gradients: sum };
  }

  /** As they would be read from a task file. */
  #rounded({ parameters, weight, bias }: State, { coefficients, head }: TaskDtypes): State {
    const inputs = this.#machine.head?.in ?? 1;
    const labels = weight.length / inputs;
    const matrix =
      weight.length > 0 ? decodeTensor(head, encodeTensor(head, weight, labels, inputs), labels, inputs) : weight;
    return {
      parameters: this.#subject.terms.rounded(parameters, coefficients),
      weight: new Float32Array(matrix),
      bias,
    };
  }

  #point({ parameters, weight, bias }: State): Point {
    return { factors: this.#subject.terms.expand(parameters), weight, bias };
  }

  /**
   * Begins again as a task is, its head too where that has as many labels; what was learned is dropped.
   * @param task of the pack, or a task file made for it
   * @throws TaskError when there is no such task, or it is of another rank or basis
   * @throws FormatError when the file is damaged
   */
  async begin(task: string | Uint8Array<ArrayBuffer>): Promise<void> {
    if (this.#busy) throw new TypeError("begin: this trainer is at work; wait for its end");
    const donor = typeof task === "string" ? await this.#taskOf(task) : this.#read(task);
    this.#state = await this.#from(donor);
  }

  async #taskOf(id: string): Promise<Donor> {
    const { pack } = this.#subject;
    if (!pack.tasks.has(id)) throw new TaskError(`there is no task "${id}" to start from`, { task: id });
    return { id, blob: await pack.load(id) };
  }

  #read(file: Uint8Array<ArrayBuffer>): Donor {
    const { id, basisId, blob } = parseTaskFile(file, "the task to begin with");
    const { pack } = this.#subject;
    if (basisId !== pack.basisId)
      throw new TaskError(`task "${id}" belongs to the basis ${basisId}, this pack has ${pack.basisId}`, { task: id });
    return { id, blob: parseTask(blob, pack.modules, "the task to begin with", id) };
  }

  async #from(start: "mean" | "random" | "fresh" | Donor, signal?: AbortSignal): Promise<State> {
    const {
      pack,
      terms,
      origin,
      machine: { head },
    } = this.#subject;
    const parameters = new Float32Array(terms.size);
    (await Donors.of(pack, terms, signal)).fill(start, parameters, this.#random);
    // A LoRA begins as the factors that coefficients make, unless the task to start from has factors of its own.
    const made =
      origin !== terms && start !== "fresh" && (typeof start !== "object" || start.blob.terms.some(({ A }) => A));
    if (made) {
      const coefficients = new Float32Array(origin.size);
      (await Donors.of(pack, origin, signal)).fill(start, coefficients, this.#random);
      for (const [module, { A, B }] of origin.expand(coefficients)) {
        terms.part(parameters, module, "A")?.set(A);
        terms.part(parameters, module, "B")?.set(B);
      }
    }
    const [labels, inputs] = [head ? this.labels.length : 0, head?.in ?? 0];
    const brought = typeof start === "object" && head ? headOf(start.blob, head.module, labels, inputs) : undefined;
    return { parameters, ...(brought ?? newHead(labels, inputs, this.#random)) };
  }

  /** Probabilities [labels] of each text or feed, as the task is now. */
  async predict(
    examples: readonly Pick<Example<Feeds>, "text" | "feeds">[],
    { batch = 16 }: { batch?: number } = {},
  ): Promise<Float32Array[]> {
    const state = this.#learned();
    const results: Float32Array[] = [];
    for (let at = 0; at < examples.length; at += batch) {
      const rows = examples.slice(at, at + batch).map(({ text, feeds }) => ({ text, feeds, label: 0, weight: 1 }));
      const logits = await this.#machine.answer(await this.#machine.batch(rows), this.#point(state));
      rows.forEach((_, i) =>
        results.push(softmax(logits.subarray(i * this.labels.length, (i + 1) * this.labels.length))),
      );
    }
    return results;
  }

  async #judge(
    held: readonly Row<Feeds>[],
    batch: number,
    { temperature, dtype }: FitOptions,
    state: State,
  ): Promise<{ loss: number; accuracy: number }> {
    let [loss, right] = [0, 0];
    for (let at = 0; at < held.length; at += batch) {
      const rows = held.slice(at, at + batch).map((row) => ({ ...row, weight: 1 }));
      const made = await this.#step(rows, state, { temperature, dtype });
      loss += made.loss * rows.length;
      rows.forEach(({ label }, i) => {
        const logits = [...made.logits.subarray(i * this.labels.length, (i + 1) * this.labels.length)];
        if (logits.indexOf(Math.max(...logits)) === label) right++;
      });
    }
    return { loss: loss / held.length, accuracy: right / held.length };
  }

  /** A state to begin from; "auto" takes a few steps from each start and keeps the one whose loss is smaller. */
  async #start(train: readonly Row<Feeds>[], batch: number, options: FitOptions): Promise<State> {
    const { pack, origin } = this.#subject;
    const init = this.#init;
    if (init !== "auto")
      return this.#from(typeof init === "object" ? await this.#taskOf(init.task) : init, options.signal);
    if (pack.tasks.size === 0 || !origin.modules.some(({ shared }) => shared))
      return this.#from("random", options.signal);
    let best: { loss: number; state: State } | undefined;
    for (const start of ["mean", "random"] as const) {
      const state = await this.#from(start, options.signal);
      const trial = copy(state);
      const optimizer = this.#optimizer(trial, TRIAL_STEPS, { ...options, warmup: 0, decay: "none" });
      let loss = Infinity;
      for (let i = 0; i < TRIAL_STEPS; i++) {
        options.signal?.throwIfAborted();
        const rows = Array.from(
          { length: Math.min(batch, train.length) },
          (_, at) => train[(i * batch + at) % train.length]!,
        );
        const made = await this.#step(rows, trial, { temperature: options.temperature });
        loss = made.loss;
        optimizer.step(made.gradients);
      }
      if (loss < (best?.loss ?? Infinity)) best = { loss, state };
    }
    return best?.state ?? this.#from("random", options.signal);
  }

  /**
   * Holds the gradient against the loss itself, in the direction of the gradient and a random one: some providers compute
   * wrong numbers without a word.
   */
  async #test(rows: readonly Row<Feeds>[], state: State, options: FitOptions): Promise<void> {
    const { loss, gradients } = await this.#step(rows, state, options);
    const norm = Math.hypot(...parts(gradients).map((part) => part.reduce((sum, g) => sum + g * g, 0) ** 0.5));
    if (!(norm > 0)) {
      if (Number.isFinite(loss) && norm === 0) return;
      throw stopped(
        `the loss is ${loss} and its gradient ${norm} before the first step: the model or the examples give no numbers`,
      );
    }
    const noise = uniform(7);
    const along = parts(gradients).map((part) => part.map((g) => g / norm));
    const aside = along.map((part) =>
      part.map(
        (d) => d + (0.5 * normal(noise)) / Math.sqrt(state.parameters.length + state.weight.length + state.bias.length),
      ),
    );
    for (const direction of [along, aside]) {
      const slope = parts(gradients).reduce(
        (sum, part, i) => sum + part.reduce((s, g, at) => s + g * direction[i]![at]!, 0),
        0,
      );
      // So far that the loss moves well above the noise of f32, and hardly bends.
      const step = Math.min(0.05, 0.01 / norm);
      const at = async (by: number): Promise<number> => {
        const moved = copy(state);
        parts(moved).forEach((part, i) => direction[i]!.forEach((d, j) => (part[j]! += by * d)));
        return (await this.#step(rows, moved, options)).loss;
      };
      const [up, down] = [((await at(step)) - loss) / step, (loss - (await at(-step))) / step];
      const found = (up + down) / 2;
      // Where nothing is left to learn the gradient is all but zero, and the bend is what is seen.
      const bend = Math.abs(up - down) / 2;
      if (Math.abs(found - slope) <= 0.1 * Math.abs(slope) + bend + (1e-6 * (1 + loss)) / step) continue;
      throw stopped(
        `the loss changes by ${found.toPrecision(3)} where its gradient says ${slope.toPrecision(3)}: this provider computes gradients wrongly. Use another`,
      );
    }
  }

  /**
   * The task as a file of its own: a few kilobytes, for `session.addTask`, `pack.addTask`, or to be sent.
   * @param options `dtype` of coefficients and head, in one or apart, f16 unless given; `metadata` beside the labels, for
   *   instance a licence
   */
  async task(
    options: { id?: string; dtype?: Dtype | TaskDtypes; metadata?: TaskMetadata } = {},
  ): Promise<Uint8Array<ArrayBuffer>> {
    const { parameters } = this.#learned();
    const { terms } = this.#subject;
    const stored = new Float32Array(terms.size);
    terms.fillComponents(stored);
    if (parameters.some((value, i) => i >= terms.ofTasks && value !== stored[i])) {
      throw new TypeError(
        "task: components were trained too, so that the task is of no use beside the pack's; take trainer.pack()",
      );
    }
    return this.#file(options);
  }

  /**
   * A pack of its own, where components were trained: the tasks that there were, solved again for the new components, and the new
   * one behind them. They lose a little by it: `eigenlora verify --against` tells how much.
   * @param options as of `task`
   * @throws TaskError when there is a task of that id
   */
  async pack(
    options: { id?: string; dtype?: Dtype | TaskDtypes; metadata?: TaskMetadata } = {},
  ): Promise<Uint8Array<ArrayBuffer>> {
    const { pack, terms } = this.#subject;
    const { id = "task" } = options;
    if (pack.tasks.has(id))
      throw new TaskError(`there is a task "${id}" already: give the new one another \`id\``, { task: id });
    const learned = parseTaskFile(this.#file(options), "the trained task");
    const { repack } = await import("./repack.ts");
    return repack(pack, (await pack.bases()).bytes, terms, this.#learned().parameters, learned);
  }

  #file({
    id = "task",
    dtype = "f16",
    metadata = {},
  }: {
    id?: string;
    dtype?: Dtype | TaskDtypes;
    metadata?: TaskMetadata;
  }): Uint8Array<ArrayBuffer> {
    const { parameters, weight, bias } = this.#learned();
    const {
      pack,
      terms,
      machine: { head },
    } = this.#subject;
    const learned = { parameters, terms, head: head && { ...head, weight, bias: head.bias ? bias : undefined } };
    const types = typeof dtype === "object" ? dtype : { coefficients: dtype, head: dtype };
    return taskFile(pack, id, learned, types, { labels: [...this.labels], ...metadata });
  }

  #learned(): State {
    if (this.#state) return this.#state;
    throw new TypeError("this trainer has learned nothing yet: call fit first");
  }
}

function stopped(message: string): EigenLoraError {
  return new BackendError(`learn: ${message}`, { backend: "learn" });
}

function whole(name: string, value: number): void {
  if (!Number.isInteger(value) || value < 1)
    throw new RangeError(`fit: ${name} must be a whole number ≥ 1, got ${value}`);
}

function share(name: string, value: number): void {
  if (!(value >= 0 && value < 1)) throw new RangeError(`fit: ${name} must be from 0 to less than 1, got ${value}`);
}

function parts({ parameters, weight, bias }: State): Float32Array<ArrayBuffer>[] {
  return [parameters, weight, bias];
}

function copy({ parameters, weight, bias }: State): State {
  return { parameters: parameters.slice(), weight: weight.slice(), bias: bias.slice() };
}

function assign(to: State, from: State): void {
  parts(to).forEach((part, i) => part.set(parts(from)[i]!));
}

function finite(state: State): boolean {
  return parts(state).every((part) => part.every(Number.isFinite));
}

function softmax(logits: Float32Array): Float32Array {
  const top = Math.max(...logits);
  const exps = logits.map((value) => Math.exp(value - top));
  const sum = exps.reduce((a, b) => a + b, 0);
  return exps.map((value) => value / sum);
}
