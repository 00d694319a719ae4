/**
 * Mode "folded" without a device: weights change inside the model, which an engine takes only when it loads one. Each switch loads a model.
 */

import type { View } from "../core/base.ts";
import type { LoadedTasks } from "../core/selection.ts";
import { createFolding } from "../core/session-runtime.ts";
import { onnxHost } from "../onnx/host.ts";
import type { ModelFile } from "../onnx/read.ts";
import { fillWeightFile, type WeightFile } from "../onnx/replaceable.ts";
import type { Active, Carrier, CarrierParts } from "./carrier.ts";
import { inputNamesOf, TaskEvaluator, toFeeds } from "./values.ts";

/**
 * @param file stays open: weights are folded from it
 * @throws BackendError when the engine refuses the model
 */
export async function foldedCarrier(
  { engine, prepared, detached, load }: CarrierParts,
  file: ModelFile,
  weights: WeightFile,
): Promise<Carrier> {
  const { pack, view, inputs, names, keep, base } = prepared;
  const host = onnxHost(file, weights.pieces);
  const runtime = await createFolding(pack, view, base.ignored, inputNamesOf(base), {
    // The file is in memory anyway: no second copy of its weights.
    ...{ base: host, webgpu: false, policy: "reload", names, ...(keep && { modules: keep }) },
  });
  const evaluator = new TaskEvaluator(prepared, runtime);
  const pristine = detached.files.reduce((sum, { data }) => sum + data.byteLength, detached.bytes.length);
  const make = async (tasks: LoadedTasks, signal?: AbortSignal): Promise<Active> => {
    const values = await evaluator.evaluate(tasks, signal);
    const changed = await runtime.fold(tasks, signal);
    const content = await fillWeightFile(weights, (name): View | Promise<View> => changed.get(name) ?? host.read(name));
    // Tasks that bring heads alone change no weight.
    const files = content.data.byteLength > 0 ? [...detached.files, content] : detached.files;
    const model = await engine.load({ ...detached, files }, load);
    return { model, task: tasks.selection, ...toFeeds(engine, inputs, [values.inputs]) };
  };
  const close = async (): Promise<void> => {
    await runtime.close();
    await file.close();
  };
  try {
    return {
      evaluator,
      first: await make(await runtime.load(null)),
      probe: { result: "not needed: the weights themselves change" },
      bytesWritten: weights.byteLength,
      make,
      memory() {
        const held = runtime.memory();
        return { scratch: held.scratch + held.pristine, pristine, active: 0 };
      },
      close,
    };
  } catch (error) {
    await close();
    throw error;
  }
}
