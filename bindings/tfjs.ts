/**
 * Models of TF.js as bases. Weights are given new tensors; on WebGPU matrices are folded in place, in TF.js's own
 * buffers.
 */

import type { DeviceBuffer } from "../src/backends/backend.ts";
import { sameShape, viewValues, type WeightHost } from "../src/core/base.ts";
import { described } from "../src/errors.ts";
import type { Layout } from "../src/format/format.ts";
import { elementsOf } from "../src/tensor/dtypes.ts";
import { type Called, calledByAdapters, frameworkHost, type Weight, type WeightPlace } from "./framework-host.ts";

/** The WebGPU backend of TF.js, as far as it is used here. */
interface Webgpu {
  readonly tensorMap: { get(dataId: object): { resource: DeviceBuffer; values: unknown } };
  readonly commandEncoder: object | null;
  uploadToGPU(dataId: object): void;
  refCount(dataId: object): number;
  endComputePassEncoder(): void;
  submitQueue(): void;
}

/**
 * The weights of a model of TF.js, as a base for `createRuntime`. A weight goes by its name in the model, with dots:
 * "dense_1/kernel" is "dense_1.weight". `[...host.list()]` has all names.
 * @param tf the module `@tensorflow/tfjs` or `@tensorflow/tfjs-core`, with the backend that the model runs on
 * @param model a LayersModel, a GraphModel, or variables by name. A head of another shape is a variable of its own: in
 *   a map, read the entry anew for each run
 * @throws TypeError when one of them is none of these
 * @example
 * const runtime = await createRuntime(pack, { base: tfjsHost(tf, layersModel) });
 * await runtime.switchTask("sst2");
 */
export function tfjsHost(tf: Tfjs, model: TfjsModel): WeightHost {
  if (typeof tf?.variable !== "function" || typeof tf.getBackend !== "function") {
    throw new TypeError(`tfjsHost: expected the module @tensorflow/tfjs, got ${described(tf)}`);
  }
  const gpu = tf.getBackend() === "webgpu" ? (tf.backend() as Webgpu) : undefined;
  const weights = new Map<string, Weight<TfTensor>>();
  for (const [name, entry] of entriesOf(tf, model)) weights.set(name, weightOf(tf, gpu, entry));
  return frameworkHost(weights, (tensor) => tensor.dispose());
}

/**
 * Kernels of convolutions are [...window, in, out] here and [out, in, ...window] in checkpoints; those of one point are
 * matrices.
 */
function weightOf(tf: Tfjs, gpu: Webgpu | undefined, entry: Entry): Weight<TfTensor> {
  const { layout, shape: stored, tensor, put } = entry;
  const window = layout === "in-out" ? stored.slice(0, -2) : [];
  const turned = window.some((size) => size > 1);
  const axes = stored.map((_, axis) => axis);
  const shape = turned ? [...stored.slice(-2).reverse(), ...window] : stored.slice(window.length);
  return {
    dtype: "f32",
    shape,
    layout: turned ? "conv" : layout,
    async read() {
      const now = turned
        ? tf.transpose(tensor() as never, [...axes.slice(-2).reverse(), ...axes.slice(0, -2)])
        : tensor();
      try {
        return new Uint8Array(Float32Array.from(await now.data()).buffer);
      } finally {
        if (turned) now.dispose();
      }
    },
    make(view) {
      const made = tf.tensor(viewValues(view), (turned ? view.shape : [...window, ...view.shape]) as never);
      if (!turned) return made;
      const back = tf.transpose(made as never, [...axes.slice(2), 1, 0]);
      made.dispose();
      return back;
    },
    put,
    place: gpu && !turned && shape.length === 2 ? placeOf(tf, gpu, entry) : undefined,
  };
}

function placeOf(tf: Tfjs, gpu: Webgpu, { shape, tensor, put }: Entry): WeightPlace {
  return {
    buffer() {
      const { dataId } = tensor();
      gpu.uploadToGPU(dataId);
      submit(gpu);
      const data = gpu.tensorMap.get(dataId);
      // TF.js keeps what it has read, but this changes without its knowledge.
      Object.defineProperty(data, "values", { get: () => null, set() {}, configurable: true });
      return data.resource;
    },
    // Recorded work goes to the device when the buffer is asked for.
    flush() {
      // Clones and reshaped tensors have the same buffer: they keep it.
      if (gpu.refCount(tensor().dataId) === 1) return;
      const values = new Float32Array(elementsOf(shape));
      put(tf.tensor(values, shape as never));
    },
  };
}

/** Sends work that TF.js has recorded to the device, before anything that is submitted after it. */
function submit(gpu: Webgpu): void {
  if (!gpu.commandEncoder) return;
  gpu.endComputePassEncoder();
  gpu.submitQueue();
}

// Where TF.js has the weights of its kinds of models, and what adapters call them. The module is the caller's own
// import; types are structural, so that TF.js is not needed to compile against this package.

/** A tensor of TF.js, as far as hosts need it. */
export interface TfTensor {
  readonly shape: number[];
  readonly dtype: string;
  readonly dataId: object;
  data(): Promise<ArrayLike<number>>;
  dispose(): void;
}

/** A variable of TF.js, likewise. */
export interface TfVariable extends TfTensor {
  readonly trainable: boolean;
  assign(value: never): void;
}

/** The module `@tensorflow/tfjs`, `@tensorflow/tfjs-core` or another with the same interface. */
export interface Tfjs {
  getBackend(): string;
  backend(): object;
  tensor(values: Float32Array, shape: never): TfTensor;
  transpose(tensor: never, axes: number[]): TfTensor;
  variable(value: never, trainable?: boolean): TfVariable;
}

/** A model of layers, as `loadLayersModel` and `sequential` return it. */
export interface TfLayersModel {
  readonly weights: readonly { readonly originalName: string; readonly name: string; read(): TfTensor }[];
}

/** A converted graph, as `loadGraphModel` returns it. */
export interface TfGraphModel {
  readonly weights: { readonly [name: string]: TfTensor[] };
}

/** Holder of the weights: a model, or variables by name. */
export type TfjsModel = TfLayersModel | TfGraphModel | Map<string, TfVariable>;

interface Entry {
  readonly layout: Layout | undefined;
  /** Shape that the model was made with. */
  readonly shape: readonly number[];
  tensor(): TfTensor;
  put(value: TfTensor): void;
}

/** A model's weights of type float32, by the names that adapters use. @throws TypeError when it is no model */
function entriesOf(tf: Tfjs, model: TfjsModel): Map<string, Entry> {
  const entries = new Map<string, Entry>();
  const add = (called: Called, own: string, entry: Pick<Entry, "tensor" | "put">): void => {
    const { dtype, shape } = entry.tensor();
    // The second of two equal names is replaced by the model's own.
    if (dtype === "float32") entries.set(entries.has(called.name) ? own : called.name, { ...entry, ...called, shape });
  };
  if (model instanceof Map) {
    for (const [name, variable] of model) {
      const entry = variableEntry(tf, variable, (now) => model.set(name, now));
      add(calledByAdapters(name), name, entry);
    }
  } else if (Array.isArray(model?.weights)) {
    for (const weight of model.weights as { originalName: string; name: string; val: TfVariable }[]) {
      const entry = variableEntry(tf, weight.val, (now) => (weight.val = now));
      add(calledByAdapters(weight.originalName), weight.name, entry);
    }
  } else if (isGraphModel(model)) {
    const { executor } = model;
    for (const name of Object.keys(executor.weightMap))
      add(calledInGraph(name, executor.graph.nodes[name]), name, graphEntry(executor, name));
  } else throw new TypeError(`tfjsHost: expected a LayersModel, a GraphModel or a Map, got ${described(model)}`);
  return entries;
}

function isGraphModel(model: unknown): model is { readonly executor: Executor } {
  return typeof (model as { executor?: Executor } | null)?.executor?.weightMap === "object";
}

/** A variable has the values of its own shape; for others there is another in its place. */
function variableEntry(tf: Tfjs, own: TfVariable, show: (now: TfVariable) => void): Pick<Entry, "tensor" | "put"> {
  let now = own;
  return {
    tensor: () => now,
    put(value) {
      if (now !== own) now.dispose();
      const fits = sameShape(value.shape, own.shape);
      if (fits) own.assign(value as never);
      now = fits ? own : tf.variable(value as never, own.trainable);
      value.dispose();
      show(now);
    },
  };
}

// The weights of a GraphModel: constants of a graph that has forgotten its layers, but not the names and operators that
// come of them.

interface Node {
  readonly name: string;
  readonly op: string;
  readonly inputNames: readonly string[];
  readonly children: readonly Node[];
  readonly attrParams: { readonly transposeB?: { readonly value: unknown } };
}

/** The executor of a GraphModel, with its tensors by the names of nodes. */
interface Executor {
  weightMap: Record<string, TfTensor[]>;
  readonly graph: { readonly nodes: Readonly<Record<string, Node | undefined>> };
}

function graphEntry(executor: Executor, name: string): Pick<Entry, "tensor" | "put"> {
  const list = executor.weightMap[name]!;
  return {
    tensor: () => list[0]!,
    put(value) {
      list[0]!.dispose();
      list[0] = value;
      // It frees tensors after a run, except those that it has seen here.
      executor.weightMap = { ...executor.weightMap };
    },
  };
}

/** Operators that read a weight, with what they make of it, and what follows the layer's name in their own names. */
const MATMUL = /^(_Fused)?MatMul$/;
const CONV = /^(_Fused)?Conv[123]D$/;
const GATHER = /^(Resource)?Gather/;
const OPERATOR =
  /(?:\/(?:MatMul|Tensordot|Conv\dD|ExpandDims|BiasAdd|(?:Resource)?Gather|embedding_lookup|ReadVariableOp)(?:_\w+)?)+$/;

/** A converted graph keeps the names of operators. What reads a weight says what it is. */
function calledInGraph(path: string, node: Node | undefined): Called {
  let [at, reader] = [node, node?.children[0]];
  while (reader?.op === "Identity") [at, reader] = [reader, reader.children[0]];
  const input = reader?.inputNames.indexOf(at!.name);
  const { op = "", attrParams } = reader ?? {};
  const product = MATMUL.test(op) || CONV.test(op);
  const turned = attrParams?.transposeB?.value === true;
  const layer = path.replace(OPERATOR, "");
  if (product && input === 1) return { ...calledByAdapters(`${layer}/kernel`), ...(turned && { layout: "out-in" }) };
  if ((product && input === 2) || (op === "BiasAdd" && input === 1)) return calledByAdapters(`${layer}/bias`);
  if (GATHER.test(op) && input === 0) return calledByAdapters(`${layer}/embeddings`);
  return calledByAdapters(path);
}
