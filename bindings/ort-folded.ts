/**
 * Mode "folded": weights change inside the model, which onnxruntime takes only when it loads one: each switch makes a session.
 */
import { createBackend } from "../src/backends/select.ts";
import type { View } from "../src/base/host.ts";
import { onnxHost } from "../src/onnx/host.ts";
import type { ModelFile } from "../src/onnx/read.ts";
import { createRuntime } from "../src/runtime/create.ts";
import type { Runtime } from "../src/runtime/runtime.ts";
import { copySelection } from "../src/runtime/selection.ts";
import { Workbench } from "../src/runtime/workbench.ts";
import { type FoldedLayout, fillFolded } from "../src/session/fold.ts";
import { TaskEvaluator } from "../src/session/values.ts";
import type { Ort } from "./ort.ts";
import { type Carrier, createSession, type Parts, toFeeds } from "./ort-carrier.ts";

/**
 * @param file stays open: weights are folded from it
 * @throws BackendError when onnxruntime refuses the model
 */
export async function foldedCarrier<O extends Ort>(
  parts: Parts<O>,
  file: ModelFile,
  layout: FoldedLayout,
): Promise<Carrier<O>> {
  const { ort, pack, plan, detached } = parts;
  const { inputs } = parts.grafted;
  const evaluator = await headEvaluator(parts);
  const host = onnxHost(file);
  // The file is in memory anyway: no second copy of its weights.
  const runtime = await createRuntime(pack, {
    ...{ base: host, webgpu: false, policy: "reload", anyBase: true },
    ...{ names: plan.names, ignore: headParameters(parts) },
  });
  const files = detached.files.reduce((sum, { data }) => sum + data.byteLength, detached.bytes.length);
  const make: Carrier<O>["make"] = async (selection, how) => {
    const values = await evaluator.evaluate(selection, how);
    await runtime.switchTask(selection, switchOptions(how));
    const changed = runtime.changes();
    const folded = await fillFolded(layout, (name): View | Promise<View> => changed.get(name) ?? host.read(name));
    const session = await createSession(parts, { ...detached, files: [...detached.files, folded] });
    return { session, task: copySelection(selection), ...toFeeds(ort, inputs, [values]) };
  };
  const dispose = async (): Promise<void> => {
    await runtime.close();
    await file.close();
  };
  try {
    return {
      evaluator,
      first: await make(null, {}),
      probe: { result: "not needed: the weights themselves change" },
      bytesWritten: layout.byteLength,
      make,
      memory() {
        const { total, coefficients } = runtime.memory();
        return { expansion: total - coefficients, pristine: files, folded: 0 };
      },
      dispose,
    };
  } catch (error) {
    await dispose();
    throw error;
  }
}

/** Values of heads alone, which come as inputs. */
export async function headEvaluator<O extends Ort>({ pack, plan, grafted }: Parts<O>): Promise<TaskEvaluator> {
  const { backend } = await createBackend({ backend: "js" });
  return new TaskEvaluator(pack, plan.base, grafted.inputs, new Workbench(backend, pack.modules, new Uint8Array(0)));
}

/** Parameters that a runtime leaves out: those that are ignored, and those that come as inputs. */
export function headParameters<O extends Ort>({ plan: { base } }: Parts<O>): string[] {
  return [...base.ignored, ...[...base.heads.keys()].flatMap((head) => [`${head}.weight`, `${head}.bias`])];
}

export function switchOptions(
  how: Parameters<Carrier<Ort>["make"]>[1],
): NonNullable<Parameters<Runtime["switchTask"]>[1]> {
  return { ...(how.signal && { signal: how.signal }), ...(how.head !== undefined && { head: how.head }) };
}
