/**
 * Modes "core" and "factors": one session, whose extra inputs carry the active task.
 */
import { createBackend } from "../src/backends/select.ts";
import { copySelection } from "../src/runtime/selection.ts";
import { Workbench } from "../src/runtime/workbench.ts";
import { type ProbeReport, probeParity, probeRows } from "../src/session/probe.ts";
import { type InputValue, TaskEvaluator } from "../src/session/values.ts";
import { inTurn, type Ort, onWebgpu, type Session } from "./ort.ts";
import { type Carrier, createSession, type Parts, probeRun, providersOf, toFeeds } from "./ort-carrier.ts";

/**
 * @param bases of the pack
 * @throws BackendError when onnxruntime refuses the model, or the probe finds the provider wrong
 */
export async function unfoldedCarrier<O extends Ort>(parts: Parts<O>, bases: Uint8Array): Promise<Carrier<O>> {
  const { ort, pack, plan, options, feeds, outputs } = parts;
  const { inputs } = parts.grafted;
  // The core is made of coefficients alone; everything else expands from the bases.
  const expands =
    plan.mode === "factors" || plan.base.weights.size > 0 || plan.graft.modules.some((m) => !m.components);
  const { backend } = await createBackend(expands ? { webgpu: false } : { backend: "js" });
  const bench = new Workbench(backend, pack.modules, expands ? bases : new Uint8Array(0));
  const evaluator = new TaskEvaluator(pack, plan.base, inputs, bench);
  let session: Session<O> | undefined;
  try {
    const made = (session = await createSession(parts, parts.detached));
    const none = await evaluator.evaluate(null, {});
    const alive = onWebgpu(options.session) ? await watch(ort, options.session) : undefined;
    const own = typeof options.probe === "object" ? undefined : feeds;
    return {
      evaluator,
      first: { session: made, task: null, ...toFeeds(ort, inputs, [none]) },
      probe: await runProbe(parts, made, none.inputs),
      bytesWritten: 0,
      ...(alive && { alive }),
      async make(selection, how) {
        const values = await evaluator.evaluate(selection, how);
        return { session: made, task: copySelection(selection), ...toFeeds(ort, inputs, [values]) };
      },
      checkRows: async () => own && probeRows(probeRun(parts, made), own, none.inputs, inputs, outputs[0]!),
      memory() {
        const held = Object.values(backend.memory()).reduce((a, b) => a + b, 0);
        return { expansion: held + bench.staging.values.byteLength, pristine: 0, folded: 0 };
      },
      dispose: async () => backend.close(),
    };
  } catch (error) {
    backend.close();
    if (session) await inTurn(ort, () => session!.release());
    throw error;
  }
}

/** Fails runs on a device that is lost, where onnxruntime tells which one it has. */
async function watch<O extends Ort>(ort: O, session: Parts<O>["options"]["session"]): Promise<Carrier<O>["alive"]> {
  const { deviceOf, whileAlive } = await import("./ort-device.ts");
  const used = await deviceOf(ort, session).catch(() => undefined);
  return used && whileAlive(used.device);
}

async function runProbe<O extends Ort>(
  parts: Parts<O>,
  session: Session<O>,
  base: ReadonlyMap<string, InputValue>,
): Promise<ProbeReport> {
  const { plan, grafted, options, outputs, feeds } = parts;
  if (options.probe === false) return { result: "skipped: asked not to" };
  const given = typeof options.probe === "object" ? options.probe : undefined;
  const run = probeRun(parts, session, given);
  const { modules } = plan.graft;
  return probeParity(
    run,
    given ? new Map() : feeds,
    base,
    grafted.inputs,
    modules,
    grafted.probe,
    outputs,
    providersOf(options),
  );
}
