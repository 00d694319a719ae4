/**
 * Modes "core" and "factors": one loaded model, whose extra inputs carry the active task.
 */

import type { Selection } from "../core/selection.ts";
import { createUnfolding, type SessionRuntime } from "../core/session-runtime.ts";
import type { Active, Carrier, CarrierParts } from "./carrier.ts";
import type { Engine, LoadedModel } from "./engine.ts";
import type { PreparedModel } from "./prepare.ts";
import { probeParity } from "./probe.ts";
import type { rowCheck } from "./rows.ts";
import { type InputValues, TaskEvaluator, toFeeds } from "./values.ts";

/**
 * @param bases of the pack
 * @throws BackendError when the engine refuses the model, or the probe finds that it computes something else
 */
export async function inputCarrier(parts: CarrierParts, bases: Uint8Array): Promise<Carrier> {
  const { engine, prepared } = parts;
  const { view, mode, base, modules } = prepared;
  const expands = mode === "factors" || base.weights.size > 0 || modules.some((module) => !module.components);
  const runtime = await createUnfolding(view, mode as "core" | "factors", expands ? bases : undefined, base);
  let model: LoadedModel | undefined;
  try {
    const evaluator = new TaskEvaluator(prepared, runtime);
    model = await engine.load(parts.detached, parts.load);
    // Runs fail once the device is lost, where the engine tells which one it has.
    await engine.gpu?.device().catch(() => undefined);
    const none = (await evaluator.read(null)).inputs;
    const probe = await probeParity(parts, model, none);
    return {
      ...carry(engine, prepared.inputs, model, runtime, evaluator, none),
      probe,
      checkRows: rowChecker(parts, model, evaluator),
    };
  } catch (error) {
    if (model) await engine.release(model);
    await runtime.close();
    throw error;
  }
}

// What stays is made by functions that know the little they need: a closure above would keep the prepared model, and its components.

function carry(
  engine: Engine,
  inputs: PreparedModel["inputs"],
  model: LoadedModel,
  runtime: SessionRuntime,
  evaluator: TaskEvaluator,
  none: InputValues,
): Omit<Carrier, "probe"> {
  const spare = new SpareTerms(inputs, none);
  const active = (task: Selection, values: InputValues): Active => {
    return { model, task, ...toFeeds(engine, inputs, [values]), retire: () => spare.put(values) };
  };
  return {
    evaluator,
    first: active(null, none),
    bytesWritten: 0,
    async make(tasks, signal) {
      return active(tasks.selection, (await evaluator.evaluate(tasks, signal, spare.take())).inputs);
    },
    memory() {
      const { scratch, pristine } = runtime.memory();
      return { scratch: scratch + spare.bytes, pristine, active: 0 };
    },
    close: () => runtime.close(),
  };
}

/** Cores and factors of a past selection, which the next one is written over: garbage of switches would have to be collected. */
class SpareTerms {
  readonly #names: readonly string[];
  #values: InputValues | undefined;
  /** The most that this has been: tasks differ in rank. */
  bytes: number;

  constructor(inputs: PreparedModel["inputs"], first: InputValues) {
    const terms = inputs.filter(({ kind }) => kind === "core" || kind === "A" || kind === "B");
    this.#names = terms.map(({ name }) => name);
    this.bytes = this.#bytesOf(first);
  }

  put(values: InputValues): void {
    this.#values = new Map(this.#names.map((name) => [name, values.get(name)!]));
    this.bytes = Math.max(this.bytes, this.#bytesOf(values));
  }

  take(): InputValues | undefined {
    const values = this.#values;
    this.#values = undefined;
    return values;
  }

  #bytesOf(values: InputValues): number {
    return this.#names.reduce((sum, name) => sum + values.get(name)!.data.byteLength, 0);
  }
}

function rowChecker(
  { engine, idle, probe, prepared }: CarrierParts,
  model: LoadedModel,
  evaluator: TaskEvaluator,
): NonNullable<Carrier["checkRows"]> {
  const { inputs, feedsOfRows, outputNames, sharesRanges, modules } = prepared;
  // Feeds of the caller's own mean that the model does not run on made-up ones.
  const made = typeof probe === "object" ? () => undefined : feedsOfRows;
  const forms = new Map(modules.flatMap(({ name, form }) => (form ? [[name, form.kind] as const] : [])));
  let check: ReturnType<typeof rowCheck> | undefined;
  return async (own, rows) => {
    // Apps that run one task at a time do without.
    const { rowCheck } = await import("./rows.ts");
    check ??= rowCheck({
      ...{ engine, model, inputs, outputNames, idle, made, forms, sharesRanges },
      // Made again: all sessions would keep it, and few check.
      base: (await evaluator.read(null)).inputs,
    });
    return check(own, rows);
  };
}
