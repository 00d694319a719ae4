/**
 * Mode "folded": weights change inside the model, which an engine takes only when it loads one: each switch loads a model.
 */

import type { View } from "../core/base.ts";
import { createRuntime } from "../core/create.ts";
import { onnxHost } from "../onnx/host.ts";
import type { ModelFile } from "../onnx/read.ts";
import { type Carrier, type CarrierParts, toFeeds } from "./carrier.ts";
import { type FoldedLayout, fillFolded } from "./fold.ts";
import type { PreparedModel } from "./prepare.ts";
import { TaskEvaluator } from "./values.ts";

/**
 * @param file stays open: weights are folded from it
 * @throws BackendError when the engine refuses the model
 */
export async function foldedCarrier(
  { engine, prepared, detached, load }: CarrierParts,
  file: ModelFile,
  layout: FoldedLayout,
): Promise<Carrier> {
  const { inputs } = prepared;
  const evaluator = new TaskEvaluator(prepared, undefined);
  const host = onnxHost(file, layout.pieces);
  // The file is in memory anyway: no second copy of its weights.
  const runtime = await createRuntime(prepared.pack, {
    ...{ base: host, webgpu: false, policy: "reload", anyBase: true },
    ...{ names: prepared.names, ignore: parametersLeftOut(prepared), ...(prepared.keep && { modules: prepared.keep }) },
  });
  const pristine = detached.files.reduce((sum, { data }) => sum + data.byteLength, detached.bytes.length);
  const make: Carrier["make"] = async (selection, tasks, options) => {
    const values = await evaluator.evaluate(tasks, options.signal);
    await runtime.switchTask(selection, options);
    const changed = runtime.changes();
    const folded = await fillFolded(layout, (name): View | Promise<View> => changed.get(name) ?? host.read(name));
    const model = await engine.load({ ...detached, files: [...detached.files, folded] }, load);
    return { model, task: selection, ...toFeeds(engine, inputs, [values]) };
  };
  const close = async (): Promise<void> => {
    await runtime.close();
    await file.close();
  };
  try {
    return {
      evaluator,
      first: await make(null, [], {}),
      probe: { result: "not needed: the weights themselves change" },
      bytesWritten: layout.byteLength,
      make,
      memory() {
        const { total, coefficients } = runtime.memory();
        return { scratch: total - coefficients, pristine, active: 0 };
      },
      close,
    };
  } catch (error) {
    await close();
    throw error;
  }
}

/** Parameters that a runtime leaves out: those that are ignored, and those that come as inputs. */
export function parametersLeftOut({ base }: PreparedModel): string[] {
  const heads = [...base.heads.keys()].flatMap((head) => [`${head}.weight`, `${head}.bias`]);
  return [...base.ignored, ...heads, ...base.biases.keys()];
}
