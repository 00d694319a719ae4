/**
 * Modes "core" and "factors": one loaded model, whose extra inputs carry the active task.
 */
import { createBackend } from "../backends/select.ts";
import type { Selection } from "../core/selection.ts";
import { Workbench } from "../core/workbench.ts";
import { type Active, type Carrier, type CarrierParts, toFeeds } from "./carrier.ts";
import { probeParity } from "./probe.ts";
import type { rowCheck } from "./rows.ts";
import { TaskEvaluator, type TaskValues } from "./values.ts";

/**
 * @param bases of the pack
 * @throws BackendError when the engine refuses the model, or the probe finds that it computes something else
 */
export async function unfoldedCarrier(parts: CarrierParts, bases: Uint8Array): Promise<Carrier> {
  const { view, mode, base, modules } = parts.prepared;
  // The core is made of coefficients alone; everything else expands from the bases.
  const expands = mode === "factors" || base.weights.size > 0 || modules.some((module) => !module.components);
  const { backend } = await createBackend(expands ? { webgpu: false } : { backend: "js" });
  try {
    const bench = new Workbench(backend, view.modules, expands ? bases : new Uint8Array(0));
    return await onModel(parts, new TaskEvaluator(parts.prepared, bench), bench);
  } catch (error) {
    backend.close();
    throw error;
  }
}

// What stays is made here, by closures that know the little they need: not the prepared model, which holds the components.
async function onModel(
  parts: CarrierParts,
  evaluator: TaskEvaluator,
  { backend, staging }: Workbench,
): Promise<Carrier> {
  const { engine, idle } = parts;
  const { inputs, feedsOfRows, outputNames, sharesRanges } = parts.prepared;
  const model = await engine.load(parts.detached, parts.load);
  try {
    // Runs fail once the device is lost, where the engine tells which one it has.
    await engine.gpu?.device().catch(() => undefined);
    const none = await evaluator.read(null);
    // Whoever brings feeds says that the model does not run on made-up ones.
    const made = typeof parts.probe === "object" ? () => undefined : feedsOfRows;
    const forms = new Map(parts.prepared.modules.flatMap(({ name, form }) => (form ? [[name, form] as const] : [])));
    let rowsAreApart: ReturnType<typeof rowCheck> | undefined;
    // Cores and factors of a selection that was: the next one's are written there. What a switch allocates, a collection has to find later.
    const terms = inputs.filter(({ kind }) => kind === "core" || kind === "A" || kind === "B").map(({ name }) => name);
    /** The most that this has been: tasks differ in rank. */
    let room = bytesOf(none.inputs, terms);
    let spare: TaskValues["inputs"] | undefined;
    const active = (task: Selection, values: TaskValues): Active => {
      const retire = (): void => {
        spare = new Map(terms.map((name) => [name, values.inputs.get(name)!]));
        room = Math.max(room, bytesOf(spare, terms));
      };
      return { model, task, ...toFeeds(engine, inputs, [values]), retire };
    };
    return {
      evaluator,
      first: active(null, none),
      probe: await probeParity(parts, model, none.inputs),
      bytesWritten: 0,
      async make(selection, tasks, { signal }) {
        const old = spare;
        spare = undefined;
        return active(selection, await evaluator.evaluate(tasks, signal, old));
      },
      async checkRows(own, rows) {
        // Apps that run one task at a time do without.
        const { rowCheck } = await import("./rows.ts");
        rowsAreApart ??= rowCheck({
          ...{ engine, model, inputs, outputNames, idle, made, forms, sharesRanges },
          // Made again: all sessions would keep it, and few check.
          base: (await evaluator.read(null)).inputs,
        });
        return rowsAreApart(own, rows);
      },
      memory() {
        const held = Object.values(backend.memory()).reduce((a, b) => a + b, 0);
        return { scratch: held + staging.values.byteLength + room, pristine: 0, active: 0 };
      },
      close: async () => backend.close(),
    };
  } catch (error) {
    await engine.release(model);
    throw error;
  }
}

function bytesOf(values: TaskValues["inputs"], names: readonly string[]): number {
  return names.reduce((sum, name) => sum + values.get(name)!.data.byteLength, 0);
}
