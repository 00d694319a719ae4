/**
 * A pipeline of transformers.js with a pack: the order of its calls and switches, and the label names in its configuration. Part of `eigenlora/transformers`, without an entry of its own.
 */

import type { PackView } from "../src/core/part.ts";
import type { Selection } from "../src/core/selection.ts";
import { bringsOf, parseBrought } from "../src/format/format.ts";
import { Queue } from "../src/queue.ts";
import { isIgnored } from "../src/session/match.ts";
import type { PipelineModel } from "./transformers-model.ts";

/** What `pipeline()` of transformers.js gives, as far as it is needed here. */
export interface TransformersPipeline {
  readonly model: PipelineModel;
  readonly tokenizer?: unknown;
}

/** Names of packs by the models that have them. */
const packs = new WeakMap<object, string>();

// Functions of their own make what stays while a pack is attached: a closure keeps all that the function around it has given to
// any closure, and that must not be a model's bytes.

/** A pipeline whose calls wait for a pack's switches. Every one needs a `free`. */
export class HeldPipeline {
  /** Calls of the pipeline, and switches. */
  readonly queue: Queue = new Queue();
  readonly labels: ConfigLabels;
  readonly #model: PipelineModel;
  readonly #held: readonly Held<object>[];

  /** @throws TypeError when the pipeline's model has a pack */
  constructor(pipe: TransformersPipeline, pack: string) {
    const { model } = pipe;
    const other = packs.get(model);
    if (other !== undefined) {
      const message = `attachPack: the pipeline has the pack ${other}; close that first, or put all adapters into one pack`;
      throw new TypeError(message);
    }
    packs.set(model, pack);
    this.#model = model;
    this.labels = new ConfigLabels(model.config);
    const enter: Queue["call"] = (work) => this.queue.call(work);
    const inner = hold(model, ["_call", "forward", "generate"], enter);
    this.#held = [hold<object>(pipe, ["_call"], enter, { model: inner.inside }), inner];
  }

  /** Gives the pipeline and its model their methods back. */
  free(): void {
    for (const { free } of this.#held) free();
    packs.delete(this.#model);
  }
}

// Replaces methods of an object by ones that wait first. Knows neither what they wait for nor the object's class.

/** An object whose methods are held. */
interface Held<Target extends object> {
  /**
   * The same object with its methods as they were. Held methods have it as `this`: a call's inner calls were let through with it,
   * and would wait for themselves otherwise.
   */
  readonly inside: Target;
  /** Puts the methods back. */
  free(): void;
}

type Method = (this: unknown, ...args: unknown[]) => unknown;
type Members = Record<PropertyKey, unknown>;

/**
 * Replaces methods in place, so that all code that has the object has the held methods.
 * @param methods names; unknown ones are passed over. A function that is called itself goes through its method `_call`, as callable
 *   objects of transformers.js do
 * @param enter calls what it is given, now or later
 * @param others what `inside` has in place of some of the object's other properties
 */
export function hold<Target extends object>(
  target: Target,
  methods: readonly string[],
  enter: <Result>(work: () => Promise<Result>) => Promise<Result>,
  others: Readonly<Members> = {},
): Held<Target> {
  const members = target as Members;
  const originals = new Map<PropertyKey, unknown>(Object.entries(others));
  const inside = new Proxy(target, {
    get: (object, key, receiver) => (originals.has(key) ? originals.get(key) : Reflect.get(object, key, receiver)),
    apply: (_target, _this, args: unknown[]) => (originals.get("_call") as Method).apply(inside, args),
  });
  const undo = methods.map((name) => {
    const original = members[name];
    if (typeof original !== "function") return () => undefined;
    originals.set(name, original);
    const own = Object.getOwnPropertyDescriptor(target, name) !== undefined;
    const held = (...args: unknown[]): Promise<unknown> => enter(async () => (original as Method).apply(inside, args));
    members[name] = held;
    return () => {
      // Another wrapper may lie around ours.
      if (members[name] !== held) return;
      if (own) members[name] = original;
      else delete members[name];
    };
  });
  return { inside, free: () => undo.forEach((put) => put()) };
}

// The class names that answers have while a task is active, and where transformers.js reads them. Part of `eigenlora/transformers`,
// without an entry of its own.

/** Names in the order of the head's rows; "numbered" for a head whose task has no names; "base" for the base's own. */
type Labels = readonly string[] | "numbered" | "base";

/**
 * The names for a selection.
 * @param head whose head a blend uses; without it, heads were blended, which takes equal labels
 * @param ignore parameters of the tasks, or modules, that the model was made without
 * @throws as `Pack.load`, for tasks whose pack does not say what they bring
 */
export async function labelsOf(
  pack: PackView,
  selection: Selection,
  head: string | undefined,
  ignore: readonly string[] = [],
): Promise<Labels> {
  const { tasks } = pack;
  const active = typeof selection === "object" ? Object.keys(selection ?? {}) : [selection];
  let labels: Labels = "base";
  for (const id of head === undefined ? active : [head]) {
    const task = tasks.get(id);
    // The switch refuses it, in better words.
    if (!task) continue;
    const brings = task.brings ?? bringsOf(await pack.load(id), pack.modules);
    const saved = brings.map(parseBrought).filter(({ role }) => role === "saved");
    if (saved.some(({ name }) => !isIgnored(name, ignore))) return task.metadata.labels ?? "numbered";
    // Adapters without a head of their own were trained on the base's; its classes may mean something else to them.
    if (saved.length === 0 && labels === "base") labels = task.metadata.labels ?? "base";
  }
  return labels;
}

/** The label names in a model's configuration. */
class ConfigLabels {
  readonly #config: Record<string, unknown>;
  readonly #own: Readonly<Record<string, unknown>>;

  constructor(config: object) {
    this.#config = config as Record<string, unknown>;
    const { id2label, label2id, num_labels } = this.#config;
    this.#own = { id2label, label2id, num_labels };
  }

  set(labels: Labels): void {
    const named = (names: readonly string[]): object => ({
      id2label: Object.fromEntries(names.entries()),
      label2id: Object.fromEntries(names.map((name, id) => [name, id])),
      num_labels: names.length,
    });
    // transformers.js says LABEL_0, LABEL_1, … where there are no names.
    const numbered = { id2label: undefined, label2id: undefined, num_labels: undefined };
    Object.assign(this.#config, labels === "base" ? this.#own : labels === "numbered" ? numbered : named(labels));
  }
}
