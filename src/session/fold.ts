/**
 * Mode "folded": every parameter that tasks change gets a tensor of its own. Either all of them lie in one file, so that a
 * switch is a new content of that file and a new session on it; or each is an input, so that a switch writes the buffers that
 * a run is given.
 */

import type { View } from "../base/host.ts";
import { BaseMismatchError, FormatError } from "../errors.ts";
import { MOST_PASSED } from "../onnx/claims.ts";
import { FLOAT, FLOAT16, origin } from "../onnx/linear.ts";
import { attribute, type OnnxModel, type Use } from "../onnx/model.ts";
import type { OnnxParameter } from "../onnx/modules.ts";
import { makeNode, NodeEdits, PREFIX } from "../onnx/nodes.ts";
import type { GraphProto, NodeProto } from "../onnx/onnx_pb.ts";
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
  const wiring = new Wiring(model);
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
    model.graph.proto.initializer.push(tensor);
    wiring.connect(parameter, name);
  }
  wiring.finish();
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
  const wiring = new Wiring(model);
  const inputs = parameters.map((parameter): FoldedInput => {
    const { name, shape, initializer } = parameter;
    const input = `${PREFIX}/folded/${name}`;
    const cast =
      parameter.dtype !== "f32" &&
      [parameter, ...parameter.copies].every((stored) =>
        stored.uses.every((use) => castsFirst(model, use.graph, use.node.input[use.input]!, stored.initializer)),
      );
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
    wiring.connect(parameter, input, cast);
    return { name, input, dtype, shape };
  });
  wiring.finish();
  return inputs;
}

/** Whether the first node behind an initializer, on the way to a value, is a Cast to f32. */
function castsFirst(model: OnnxModel, graph: GraphProto, value: string, from: string, passed = 0): boolean {
  if (value === from) return false;
  const made = makerOf(model, graph, value, passed);
  if (made.node.input[0] !== from) return castsFirst(model, made.graph, made.node.input[0]!, from, passed + 1);
  return made.node.opType === "Cast" && Number(attribute(made.node, "to")?.i) === FLOAT;
}

/** The node between an initializer and its use that makes a value. @throws FormatError where names lead astray */
function makerOf(model: OnnxModel, graph: GraphProto, value: string, passed: number): Pick<Use, "node" | "graph"> {
  const made = passed > MOST_PASSED ? undefined : origin(model, graph, value);
  if (made) return made;
  const message = `there is no telling what "${value}" is made of: damaged, export the model again`;
  throw new FormatError(message, { file: model.name, part: "graph" });
}

/** Gives the uses of parameters another value. */
class Wiring {
  readonly #model: OnnxModel;
  readonly #edits = new NodeEdits();
  /** Values that have been made, by graph: nested graphs may name theirs alike. */
  readonly #made = new Map<GraphProto, Set<string>>();
  readonly #turned: NodeProto[] = [];

  constructor(model: OnnxModel) {
    this.#model = model;
  }

  /**
   * @param to the value that the parameter has from now on, as its initializer lies; copies that lie the other way round get it turned
   * @param cast whether it has been cast already
   */
  connect(parameter: OnnxParameter, to: string, cast = false): void {
    for (const { initializer, layout, uses } of [parameter, ...parameter.copies]) {
      const own = layout === parameter.layout ? to : this.#turn(to);
      for (const { node, input, graph } of uses) {
        node.input[input] = this.#copyChain(graph, node.input[input]!, initializer, own, cast);
      }
    }
  }

  #turn(value: string): string {
    const name = `${value}/turned`;
    if (this.#isNew(this.#model.graph.proto, name)) {
      this.#turned.push(makeNode("Transpose", name, [value], name, { perm: [1, 0] }));
    }
    return name;
  }

  /** The nodes between an initializer and its use once more, for another value: equal weights are merged on export. */
  #copyChain(graph: GraphProto, value: string, from: string, to: string, cast: boolean, passed = 0): string {
    if (value === from) return to;
    const { node, graph: home } = makerOf(this.#model, graph, value, passed);
    if (cast && node.input[0] === from) return to;
    const name = `${to}/${value}`;
    if (!this.#isNew(home, name)) return name;
    const before = this.#copyChain(home, node.input[0]!, from, to, cast, passed + 1);
    const { opType, attribute, domain, input } = node;
    const copy = { opType, domain, attribute, name, input: [before, ...input.slice(1)], output: [name] };
    this.#edits.insert(home, node, [create(NodeProtoSchema, copy)]);
    return name;
  }

  #isNew(graph: GraphProto, name: string): boolean {
    const made = this.#made.get(graph) ?? new Set();
    this.#made.set(graph, made);
    return !made.has(name) && made.add(name).has(name);
  }

  finish(): void {
    this.#edits.apply();
    this.#model.graph.proto.node.unshift(...this.#turned);
  }
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
