/**
 * Parameters that a model has in other pieces than the checkpoint: found in the packed layer that holds them, or put together from
 * the layers that they have been divided into. Loaded where a name is not found as it is.
 */
import type { OnnxModel } from "../onnx/model.ts";
import type { OnnxParameter } from "../onnx/modules.ts";
import { dividedNames, joinParts, packedNames, partOfPacked } from "../onnx/packed.ts";

/** What is found, and the names by which it was: that of the pack, and the model's in its place. */
export interface Piece {
  readonly parameter: OnnxParameter;
  /** The model's name, as if it had the parameter by itself. */
  readonly name: string;
}

/** @param find a parameter of the model by a name of the pack's, with its copies */
export async function findPiece(
  model: OnnxModel,
  module: string,
  suffix: "weight" | "bias",
  find: (name: string) => Promise<OnnxParameter | undefined>,
): Promise<Piece | undefined> {
  for (const place of packedNames(module)) {
    const whole = await find(`${place.name}.${suffix}`);
    if (!whole) continue;
    const end = `${place.whole}.${suffix}`;
    if (!whole.name.endsWith(end)) continue;
    const name = `${whole.name.slice(0, -end.length)}${place.part}.${suffix}`;
    // Copies are of the whole: a part has none of its own.
    const parameter = partOfPacked(model, whole, name, place);
    if (parameter) return { parameter, name };
  }
  for (const names of suffix === "weight" ? dividedNames(module) : []) {
    const found = await Promise.all(names.map((name) => find(`${name}.weight`)));
    const parts = found.filter((part) => part !== undefined);
    if (parts.length < names.length) continue;
    // As the model calls the first part, with the layer's own last segment.
    const [last, first] = [module.slice(module.lastIndexOf(".") + 1), parts[0]!.name.split(".")];
    const name = [...first.slice(0, -2), last, "weight"].join(".");
    const parameter = joinParts(name, parts);
    if (parameter) return { parameter, name };
  }
  return undefined;
}

/** The part of a weight that was named by hand, and holds others too. */
export function partByHand(model: OnnxModel, module: string, whole: OnnxParameter): OnnxParameter | undefined {
  for (const place of packedNames(module)) {
    const parameter = partOfPacked(model, whole, `${whole.name}/${place.part}`, place);
    if (parameter) return parameter;
  }
  return undefined;
}
