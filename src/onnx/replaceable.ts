/**
 * Makes parameters of a model replaceable: each gets a tensor of its own. Either all of these lie in one file, whose
 * content is exchanged when the model is loaded again; or each is an input, whose buffer is written. Changes the graph;
 * reads no weight.
 */

import { BaseMismatchError, FormatError } from "../errors.ts";
import { elementsOf } from "../tensor/dtypes.ts";
import { FLOAT, FLOAT16, origin } from "./linear.ts";
import { intOf, type OnnxModel, type Use } from "./model.ts";
import { MOST_PASSED, type OnnxParameter, outputAxis, partSize, pieceShape } from "./modules.ts";
import { makeNode, makeSplit, makeValue, NodeEdits, PREFIX } from "./nodes.ts";
import { create, type GraphProto, type NodeProto } from "./protobuf.ts";
import { point } from "./tensors.ts";

const FILE = "eigenlora-folded";

/** A file of all parameters that change, and where each lies in it. */
export interface WeightFile {
  /** The model's name of the file. */
  readonly path: string;
  readonly byteLength: number;
  readonly places: ReadonlyMap<string, FilePlace>;
  /** Parameters that the model has in other pieces: their values are copied into the memory of others. */
  readonly pieces: readonly OnnxParameter[];
}

interface FilePlace {
  readonly offset: number;
  readonly byteLength: number;
  readonly shape: readonly number[];
  readonly width: number;
}

/**
 * Points the parameters' tensors into a file.
 * @throws BaseMismatchError where tasks change a packed parameter and a part of it
 */
export function replaceByFile(model: OnnxModel, parameters: readonly OnnxParameter[]): WeightFile {
  refuseOverlaps(parameters);
  const places = new Map<string, FilePlace>();
  const wiring = wiringOf(model);
  let end = 0;
  for (const parameter of parameters.flatMap((one) => one.joined ?? (one.slice ? wholeOf(one) : one))) {
    if (places.has(parameter.name)) continue;
    const old = model.graph.initializers.get(parameter.initializer)!;
    const width = parameter.dtype === "f32" ? 4 : 2;
    const byteLength = width * elementsOf(parameter.shape);
    const offset = Math.ceil(end / 64) * 64;
    end = offset + byteLength;
    places.set(parameter.name, { offset, byteLength, shape: parameter.shape, width });
    const name = `${PREFIX}/folded/${parameter.name}`;
    const tensor = create("TensorProto", { name, dims: old.dims, dataType: old.dataType });
    point(tensor, FILE, offset, byteLength);
    model.graph.proto.initializer.push(tensor);
    wiring.connect(parameter, name);
  }
  wiring.finish();
  return { path: FILE, byteLength: end, places, pieces: parameters.filter(isPiece).map(withoutGraph) };
}

function isPiece({ slice, joined }: OnnxParameter): boolean {
  return slice !== undefined || joined !== undefined;
}

function withoutGraph(parameter: OnnxParameter): OnnxParameter {
  const joined = parameter.joined?.map(withoutGraph);
  return { ...parameter, uses: [], candidates: [], copies: [], ...(joined && { joined }) };
}

function wholeOf({ slice, ...whole }: OnnxParameter): OnnxParameter {
  return { ...whole, name: slice!.of };
}

function refuseOverlaps(parameters: readonly OnnxParameter[]): void {
  const whole = new Set(parameters.filter((parameter) => !isPiece(parameter)).map(({ name }) => name));
  for (const { name, slice, joined = [] } of parameters) {
    const other = [...joined.map((part) => part.name), slice?.of ?? ""].find((name) => whole.has(name));
    if (other === undefined) continue;
    const message = `tasks change "${name}" and "${other}", which are one weight in this file; use mode "core" or "factors"`;
    throw new BaseMismatchError(message, { module: name });
  }
}

export interface WeightInput {
  readonly name: string;
  readonly input: string;
  /**
   * `f32` too where the model stores f16 or bf16 and computes in f32: no run casts it then, and nothing is rounded
   * twice.
   */
  readonly dtype: "f32" | "f16";
  readonly shape: readonly number[];
  /** The parameter where the model has it in other pieces. */
  readonly piece?: OnnxParameter;
}

/** Makes the parameters inputs. @throws BaseMismatchError for a bf16 parameter that the model uses as such */
export function replaceByInputs(model: OnnxModel, parameters: readonly OnnxParameter[]): WeightInput[] {
  refuseOverlaps(parameters);
  const wiring = wiringOf(model);
  const inputs = withSiblings(parameters).map((parameter): WeightInput => {
    const { name } = parameter;
    const shape = pieceShape(parameter);
    const input = `${PREFIX}/folded/${name}`;
    const cast =
      parameter.dtype !== "f32" &&
      [parameter, ...parameter.copies, ...(parameter.joined ?? [])].every(
        (stored) =>
          ("joined" in stored && stored.joined) ||
          stored.uses.every((use) => castsFirst(model, use, stored.initializer)),
      );
    const dtype = parameter.dtype === "f32" || cast ? "f32" : "f16";
    if (dtype === "f16" && parameter.dtype !== "f16") {
      throw new BaseMismatchError(
        `"${name}" is ${parameter.dtype}, which cannot be an input; use mode "core" or "factors"`,
        { module: name },
      );
    }
    model.graph.proto.input.push(makeValue(input, dtype === "f32" ? FLOAT : FLOAT16, shape));
    wiring.connect(parameter, input, cast);
    return { name, input, dtype, shape, ...(isPiece(parameter) && { piece: withoutGraph(parameter) }) };
  });
  wiring.finish();
  return inputs;
}

/** Adds the other parts of packed parameters: each part is an input, and all together are the weight. */
function withSiblings(parameters: readonly OnnxParameter[]): OnnxParameter[] {
  const known = new Set(parameters.map(({ slice }) => slice && `${slice.index} ${slice.of}`));
  const all = [...parameters];
  for (const parameter of parameters) {
    for (const [index, _] of (parameter.slice?.sizes ?? []).entries()) {
      const slice = { ...parameter.slice!, index };
      const key = `${index} ${slice.of}`;
      if (!known.has(key)) all.push({ ...parameter, name: `${slice.of}/${index}`, slice });
      known.add(key);
    }
  }
  return all;
}

/** True if the first node behind an initializer, on the way to a use, is a Cast to f32. */
function castsFirst(model: OnnxModel, use: Use, from: string): boolean {
  const [first] = chainOf(model, use, from);
  return first?.node.opType === "Cast" && intOf(first.node, "to") === FLOAT;
}

/** Nodes between an initializer and its use, in their order. @throws FormatError where names lead astray */
function chainOf(model: OnnxModel, { node, input, graph }: Use, from: string): Pick<Use, "node" | "graph">[] {
  const chain: Pick<Use, "node" | "graph">[] = [];
  for (let value = node.input[input]!; value !== from; value = chain[0]!.node.input[0]!) {
    const made = chain.length > MOST_PASSED ? undefined : origin(model, chain[0]?.graph ?? graph, value);
    if (!made) {
      const message = `there is no telling what "${value}" is made of: damaged, export the model again`;
      throw new FormatError(message, { file: model.name, part: "graph" });
    }
    chain.unshift(made);
  }
  return chain;
}

/** Connects the uses of parameters to other values, once it is finished. */
function wiringOf(model: OnnxModel) {
  const edits = new NodeEdits();
  /** Values that have been made, by graph: nested graphs may use the same names. */
  const made = new Map<GraphProto, Set<string>>();
  /** Nodes that depend on the new values only. */
  const first: NodeProto[] = [];
  /** Parts of packed parameters that are connected so far. */
  const packed = new Map<string, string[]>();
  return {
    connect,
    finish(): void {
      edits.apply();
      model.graph.proto.node.unshift(...first);
    },
  };

  /** @param to the new value, laid out as the initializer @param cast true if it has been cast already */
  function connect(parameter: OnnxParameter, to: string, cast = false): void {
    const { slice, joined } = parameter;
    const axis = outputAxis(parameter);
    if (joined) {
      const parts = joined.map((_, i) => `${to}/${i}`);
      first.push(makeSplit(model, `${to}/cut`, to, parts, joined.map(partSize), axis));
      for (const [i, part] of joined.entries()) connect(part, parts[i]!, cast);
    } else if (slice) {
      const name = `${PREFIX}/folded/${slice.of}`;
      const parts = packed.get(name) ?? slice.sizes.map(() => "");
      parts[slice.index] = to;
      packed.set(name, parts);
      if (parts.includes("")) return;
      first.push(makeNode("Concat", name, parts, name, { axis }));
      connect(wholeOf(parameter), name, cast);
    } else {
      for (const { initializer, layout, uses } of [parameter, ...parameter.copies]) {
        const own = layout === parameter.layout ? to : turned(to);
        for (const use of uses) use.node.input[use.input] = copyChain(use, initializer, own, cast);
      }
    }
  }

  function turned(value: string): string {
    const name = `${value}/turned`;
    if (isNew(model.graph.proto, name)) first.push(makeNode("Transpose", name, [value], name, { perm: [1, 0] }));
    return name;
  }

  /** Copies the nodes between an initializer and its use for another value: equal weights are merged on export. */
  function copyChain(use: Use, from: string, to: string, cast: boolean): string {
    let value = to;
    for (const { node, graph } of chainOf(model, use, from).slice(cast ? 1 : 0)) {
      const { opType, attribute, domain, input, output } = node;
      const name = `${to}/${output[0]}`;
      const copy = { opType, domain, attribute, name, input: [value, ...input.slice(1)], output: [name] };
      if (isNew(graph, name)) edits.insert(graph, node, [create("NodeProto", copy)]);
      value = name;
    }
    return value;
  }

  function isNew(graph: GraphProto, name: string): boolean {
    const names = made.get(graph) ?? new Set();
    made.set(graph, names);
    return !names.has(name) && names.add(name).has(name);
  }
}
