/**
 * Modes "core" and "factors": one loaded model, whose extra inputs carry the active task.
 */

import type { Selection } from "../core/selection.ts";
import { createUnfolding, type SessionRuntime } from "../core/session-runtime.ts";
import type { Active, Carrier, CarrierParts } from "./carrier.ts";
import type { Placer } from "./device.ts";
import type { Engine, LoadedModel } from "./engine.ts";
import type { PreparedModel } from "./prepare.ts";
import { probeParity } from "./probe.ts";
import { type InputValues, isTerm, TaskEvaluator, toFeeds } from "./values.ts";

/**
 * @param bases of the pack
 * @throws BackendError when the engine refuses the model, or the probe finds that it computes something else
 */
export async function inputCarrier(parts: CarrierParts, bases: Uint8Array): Promise<Carrier> {
  const { engine, prepared } = parts;
  const { view, mode, base, modules } = prepared;
  const expands = base.weights.size > 0 || modules.some((module) => module.expands);
  const runtime = await createUnfolding(view, mode as "core" | "factors", expands ? bases : undefined, base);
  let model: LoadedModel | undefined;
  try {
    const evaluator = new TaskEvaluator(prepared, runtime);
    model = await engine.load(parts.detached, parts.load);
    // Not every engine tells which device it has. Where one does, runs fail once it is lost.
    const device = (await engine.gpu?.device().catch(() => undefined))?.device;
    const { Placer } = device ? await import("./device.ts") : {};
    const placer = Placer && new Placer(engine, engine.gpu!, device!, prepared.inputs);
    const none = (await evaluator.read(null)).inputs;
    const probe = await probeParity(parts, model, none);
    return {
      ...carry(engine, prepared.inputs, model, runtime, evaluator, none, placer),
      probe,
      rows: rowsOf(parts, model),
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
  placer: Placer | undefined,
): Omit<Carrier, "probe"> {
  const terms = inputs.filter(isTerm).map(({ name }) => name);
  const bytesOf = (values: InputValues): number =>
    terms.reduce((sum, name) => sum + values.get(name)!.data.buffer.byteLength, 0);
  // Cores and factors of a past selection, which the next one is written over: garbage of switches would have to be collected.
  let spare: InputValues | undefined;
  // The most that these have been: tasks differ in rank.
  let room = bytesOf(none);
  const active = (task: Selection, values: InputValues): Active => {
    const keep = (): void => {
      spare = new Map(terms.map((name) => [name, values.get(name)!]));
      room = Math.max(room, bytesOf(spare));
    };
    if (!placer) return { model, task, ...toFeeds(engine, inputs, [values]), retire: keep };
    const placed = placer.place(values);
    // They are on the device: the next selection may write over them at once.
    keep();
    return { model, task, ...placed };
  };
  return {
    evaluator,
    first: active(null, none),
    bytesWritten: 0,
    async make(tasks, signal) {
      const old = spare;
      spare = undefined;
      return active(tasks.selection, (await evaluator.evaluate(tasks, signal, old)).inputs);
    },
    memory() {
      const { scratch, pristine } = runtime.memory();
      return { scratch: scratch + room, pristine, active: placer?.byteLength ?? 0 };
    },
    async close() {
      placer?.close();
      await runtime.close();
    },
  };
}

function rowsOf({ engine, idle, probe, prepared }: CarrierParts, model: LoadedModel): NonNullable<Carrier["rows"]> {
  const { inputs, feedsOfRows, outputNames, sharesRanges, modules } = prepared;
  return {
    ...{ engine, model, inputs, outputNames, idle, sharesRanges },
    // Feeds of the caller's own mean that the model does not run on made-up ones.
    made: typeof probe === "object" ? () => undefined : feedsOfRows,
    forms: new Map(modules.flatMap(({ name, form }) => (form ? [[name, form.kind] as const] : []))),
  };
}
