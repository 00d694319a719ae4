/**
 * Values that the backward nodes need are kept from the forward run on, or made again where they are needed. What is made again waits
 * for the gradient that needs it: runtimes order nodes by what these read alone, and would make those of all layers first.
 */
import { makeNode, PREFIX } from "../onnx/nodes.ts";
import type { GraphProto, NodeProto } from "../onnx/onnx_pb.ts";
import type { Emitter, Moment } from "./emit.ts";
import { type Kept, valuesToKeep } from "./keep.ts";
import type { ProbedPath } from "./probed-path.ts";

/**
 * @param path forward nodes
 * @param main the model's graph; gets shapes of its values, and constants of definitions
 * @param emit has written the backward nodes; their inputs are changed
 * @returns the nodes with those in front of them that make values again
 */
export function recompute(path: ProbedPath, main: GraphProto, emit: Emitter): NodeProto[] {
  const backward = [...emit.nodes];
  const constants = new Set(main.initializer.map(({ name }) => name));
  const real = new Set([
    ...main.node.flatMap(({ output }) => output),
    ...main.input.map(({ name }) => name),
    ...constants,
  ]);
  const makers = new Map(path.graph.producers);
  for (const node of emit.shapes) {
    const [shape] = node.output as [string];
    if (real.has(node.input[0]!)) {
      main.node.push(node);
      real.add(shape);
    } else makers.set(shape, node);
  }
  const own = new Set(backward.flatMap(({ output }) => output));
  const read = backward.flatMap(({ input }) => input).filter((value) => value !== "" && !own.has(value));
  const needed = new Set<string>();
  // What depends on nothing that is trained is made again without being counted, of what is.
  const pending = [...read];
  const seen = new Set<string>();
  for (const value of pending) {
    if (seen.has(value)) continue;
    seen.add(value);
    if (path.active.has(value)) needed.add(value);
    else if (!real.has(value)) pending.push(...(makers.get(value)?.input ?? []));
  }
  const isReal = (value: string): boolean => real.has(value);
  const again = new Again(
    path,
    makers,
    isReal,
    valuesToKeep({ ...path, isReal }, needed),
    emit.beside(`${PREFIX}/late`),
  );
  const nodes = backward.flatMap((node) => {
    const moment = emit.moments.get(node);
    node.input = node.input.map((value) => (own.has(value) || value === "" ? value : again.value(value, moment)));
    return [...again.take(), node];
  });
  for (const value of again.constants) {
    if (!constants.has(value)) main.initializer.push(path.graph.initializers.get(value)!);
  }
  return nodes;
}

/** Makes values of the forward run once more. */
class Again {
  /** Weights and other constants that were read. */
  readonly constants = new Set<string>();
  readonly #path: ProbedPath;
  readonly #makers: ReadonlyMap<string, NodeProto>;
  readonly #isReal: (value: string) => boolean;
  readonly #kept: Kept;
  readonly #emit: Emitter;
  readonly #done = new Map<string, string>();
  #nodes: NodeProto[] = [];
  /** Nodes of the emitter that are taken over. */
  #taken = 0;

  constructor(
    path: ProbedPath,
    makers: ReadonlyMap<string, NodeProto>,
    isReal: (value: string) => boolean,
    kept: Kept,
    emit: Emitter,
  ) {
    this.#path = path;
    this.#makers = makers;
    this.#isReal = isReal;
    this.#kept = kept;
    this.#emit = emit;
  }

  /** The nodes since the last call. */
  take(): NodeProto[] {
    const nodes = this.#nodes;
    this.#nodes = [];
    return nodes;
  }

  /** A value as it is there in the branch, not before a moment. */
  value(wanted: string, moment: Moment | undefined): string {
    // A loop rather than recursion: models are thousands of nodes deep.
    const pending = [wanted];
    while (pending.length > 0) {
      const value = pending.at(-1)!;
      const node = this.#captured(value) || this.#done.has(value) ? undefined : this.#makers.get(value);
      const missing = node?.input.filter((one) => one !== "" && !this.#captured(one) && !this.#done.has(one)) ?? [];
      if (missing.length > 0) {
        pending.push(...missing);
        continue;
      }
      if (node) this.#make(node, moment);
      pending.pop();
    }
    return this.#done.get(wanted) ?? this.#late(wanted, moment);
  }

  /** Whether a value comes from outside. */
  #captured(value: string): boolean {
    if (!this.#makers.has(value)) return true;
    return this.#isReal(value) && (!this.#path.active.has(value) || this.#kept.stays(value));
  }

  #make(node: NodeProto, moment: Moment | undefined): void {
    const again = (value: string): string => `${PREFIX}/again/${value}`;
    const inputs = node.input.map((value) =>
      value === "" ? "" : (this.#done.get(value) ?? this.#late(value, moment)),
    );
    const outputs = node.output.map((value) => (value === "" ? "" : again(value)));
    const copy = makeNode(node.opType, again(node.output[0]!), inputs, outputs, {}, node.domain);
    copy.attribute = node.attribute;
    this.#nodes.push(copy);
    for (const value of node.output) if (value !== "") this.#done.set(value, again(value));
  }

  /** A value that is there already, as one that is not before a moment. Reshape gives out the memory that it is given. */
  #late(value: string, moment: Moment | undefined): string {
    if (this.#path.graph.initializers.has(value)) this.constants.add(value);
    if (moment === undefined || !this.#path.active.has(value) || !this.#makers.has(value)) return value;
    const rank = this.#path.shapes.dims(value).length;
    if (rank === 0) return value;
    const emit = this.#emit;
    const zeros = emit.late(Array<number>(rank).fill(0), moment.value, moment.axis);
    const late = emit.op("Reshape", [value, zeros]);
    for (; this.#taken < emit.nodes.length; this.#taken++) this.#nodes.push(emit.nodes[this.#taken]!);
    return late;
  }
}
