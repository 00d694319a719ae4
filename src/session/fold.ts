/**
 * Mode "folded": every parameter that tasks change gets a tensor of its own. Either all of them lie in one file, so that a
 * switch is a new content of that file and a new session on it; or each is an input, so that a switch writes the buffers that
 * a run is given.
 */

import type { View } from "../base/host.ts";
import { BaseMismatchError } from "../errors.ts";
import { FLOAT, FLOAT16, origin } from "../onnx/linear.ts";
import { attribute, type OnnxModel } from "../onnx/model.ts";
import type { OnnxParameter } from "../onnx/modules.ts";
import { PREFIX } from "../onnx/nodes.ts";
import type { GraphProto } from "../onnx/onnx_pb.ts";
import { create, NodeProtoSchema, TensorProtoSchema, ValueInfoProtoSchema } from "../onnx/protobuf.ts";
import { type DataFile, point } from "../onnx/write.ts";

export const FOLDED_FILE = "eigenlora-folded";

/** Where each changing parameter lies in the file. */
export interface FoldedLayout {
  readonly byteLength: number;
  readonly places: ReadonlyMap<string, FoldedPlace>;
}

interface FoldedPlace {
  readonly offset: number;
  readonly byteLength: number;
  readonly shape: readonly number[];
}

/** Changes `model.proto`: the parameters' tensors point into the file. */
export function layoutFolded(model: OnnxModel, parameters: readonly OnnxParameter[]): FoldedLayout {
  const places = new Map<string, FoldedPlace>();
  const main = model.graph.proto;
  let end = 0;
  for (const parameter of parameters) {
    const old = model.graph.initializers.get(parameter.initializer)!;
    const byteLength = parameter.shape.reduce((a, b) => a * b, parameter.dtype === "f32" ? 4 : 2);
    const offset = Math.ceil(end / 64) * 64;
    end = offset + byteLength;
    places.set(parameter.name, { offset, byteLength, shape: parameter.shape });
    const name = `${PREFIX}/folded/${parameter.name}`;
    const tensor = create(TensorProtoSchema, { name, dims: old.dims, dataType: old.dataType });
    point(tensor, FOLDED_FILE, offset, byteLength);
    main.initializer.push(tensor);
    for (const { node, input, graph } of parameter.uses) {
      node.input[input] = copyChain(model, graph, node.input[input]!, parameter.initializer, name);
    }
  }
  return { byteLength: end, places };
}

/** A parameter that comes as an input. */
export interface FoldedInput {
  /** Of the parameter. */
  readonly name: string;
  /** Of the input. */
  readonly input: string;
  /** `f32` too where the model stores f16 or bf16 and computes in f32: no run casts it then, and nothing is rounded twice. */
  readonly dtype: "f32" | "f16";
  readonly shape: readonly number[];
}

/**
 * Changes `model.proto`: the parameters are inputs.
 * @throws BaseMismatchError for a bf16 parameter that the model uses as such
 */
export function feedFolded(model: OnnxModel, parameters: readonly OnnxParameter[]): FoldedInput[] {
  return parameters.map((parameter) => {
    const { name, shape, initializer, uses } = parameter;
    const input = `${PREFIX}/folded/${name}`;
    const cast =
      parameter.dtype !== "f32" &&
      uses.every((use) => castsFirst(model, use.graph, use.node.input[use.input]!, initializer));
    const dtype = parameter.dtype === "f32" || cast ? "f32" : "f16";
    if (dtype === "f16" && parameter.dtype !== "f16") {
      throw new BaseMismatchError(
        `"${name}" is ${parameter.dtype}, which cannot be an input; use mode "core" or "factors"`,
        { module: name },
      );
    }
    const { dims } = model.graph.initializers.get(initializer)!;
    const shapeProto = { dim: dims.map((d) => ({ value: { case: "dimValue" as const, value: d } })) };
    const type = {
      value: { case: "tensorType" as const, value: { elemType: dtype === "f32" ? FLOAT : FLOAT16, shape: shapeProto } },
    };
    model.graph.proto.input.push(create(ValueInfoProtoSchema, { name: input, type }));
    for (const use of uses) {
      use.node.input[use.input] = copyChain(model, use.graph, use.node.input[use.input]!, initializer, input, cast);
    }
    return { name, input, dtype, shape };
  });
}

/** Whether the first node behind an initializer, on the way to a value, is a Cast to f32. */
function castsFirst(model: OnnxModel, graph: GraphProto, value: string, from: string): boolean {
  const made = value === from ? undefined : origin(model, graph, value);
  if (!made) return false;
  if (made.node.input[0] !== from) return castsFirst(model, made.graph, made.node.input[0]!, from);
  return made.node.opType === "Cast" && Number(attribute(made.node, "to")?.i) === FLOAT;
}

/**
 * The nodes between an initializer and its use once more, for another value: equal weights are merged on export.
 * @param cast whether the other value has been cast already
 */
function copyChain(model: OnnxModel, graph: GraphProto, value: string, from: string, to: string, cast = false): string {
  if (value === from) return to;
  const { node, graph: home } = origin(model, graph, value)!;
  if (cast && node.input[0] === from) return to;
  const name = `${to}/${value}`;
  if (home.node.some((made) => made.name === name)) return name;
  const before = copyChain(model, home, node.input[0]!, from, to, cast);
  const { opType, attribute, domain, input } = node;
  const copy = create(NodeProtoSchema, {
    opType,
    domain,
    attribute,
    name,
    input: [before, ...input.slice(1)],
    output: [name],
  });
  home.node.splice(home.node.indexOf(node) + 1, 0, copy);
  return name;
}

/**
 * The content of the file.
 * @param value of a parameter as the task has it
 * @throws BaseMismatchError when it has another shape than the model's
 */
export async function fillFolded(
  { byteLength, places }: FoldedLayout,
  value: (name: string) => View | Promise<View>,
): Promise<DataFile> {
  const data = new Uint8Array(byteLength);
  for (const [name, place] of places) {
    const view = await value(name);
    if (view.shape.join() !== place.shape.join()) {
      const message = `a task brings "${name}" of [${view.shape.join(", ")}], the model's needs [${place.shape.join(", ")}]`;
      throw new BaseMismatchError(message, { module: name, expected: place.shape, found: view.shape });
    }
    data.set((view.data as Uint8Array).subarray(view.byteOffset, view.byteOffset + place.byteLength), place.offset);
  }
  return { path: FOLDED_FILE, data };
}
