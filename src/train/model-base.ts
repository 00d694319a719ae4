/**
 * The model that a pack is made with as its base: apps recognise it by fingerprints of its weights.
 */
import type { Adapter } from "../adapters/adapter.ts";
import { sharedModules } from "../adapters/modules.ts";
import type { WeightHost } from "../core/base.ts";
import { renamedHost } from "../core/renamed.ts";
import { BaseMismatchError } from "../errors.ts";
import { onnxHost } from "../onnx/host.ts";
import { type ModelInput, readWhole } from "../onnx/whole.ts";
import { readFingerprints } from "../pack/encode.ts";

/**
 * The weights of a model; undefined where they are not all in it in floats, under the names that the adapters have for them.
 * @param names of weights, by module name
 * @throws FormatError, SourceError where it cannot be read; AdapterError for adapters that do not agree about a module
 */
export async function modelBase(
  model: ModelInput,
  adapters: readonly Adapter[],
  names: ReadonlyMap<string, string> = new Map(),
): Promise<WeightHost | undefined> {
  const shapes = [...sharedModules(adapters).values()].map(({ shape }) => shape);
  const whole = onnxHost(await readWhole(model, { weightsApart: true }));
  try {
    const host = names.size > 0 ? renamedHost(whole, names) : whole;
    await readFingerprints(host, shapes);
    return host;
  } catch (error) {
    await whole.close!();
    if (error instanceof BaseMismatchError) return undefined;
    throw error;
  }
}
