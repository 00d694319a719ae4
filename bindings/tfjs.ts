/**
 * Models of TF.js as bases. Weights are given new tensors; on WebGPU matrices are folded in place, in TF.js's own buffers.
 */
import { described } from "../src/arguments.ts";
import type { DeviceBuffer } from "../src/backends/backend.ts";
import { viewValues, type WeightHost } from "../src/core/base.ts";
import { frameworkHost, type Weight, type WeightPlace } from "./framework-host.ts";
import { type Entry, entriesOf, newEntry, type Tfjs, type TfjsModel, type TfTensor } from "./tfjs-model.ts";

export type { TfGraphModel, Tfjs, TfjsModel, TfLayersModel, TfTensor, TfVariable } from "./tfjs-model.ts";

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
 * @param model a LayersModel, a GraphModel, or variables by name. A head of another shape is a variable of its own: in a map, read
 *   the entry anew for each run
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
  const more = model instanceof Map ? (name: string) => weightOf(tf, gpu, newEntry(tf, model, name)) : undefined;
  return frameworkHost(weights, { free: (tensor) => tensor.dispose(), more });
}

/** Kernels of convolutions are [...window, in, out] here and [out, in, ...window] in checkpoints; those of one point are matrices. */
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
    // What is recorded goes to the device when the buffer is asked for.
    settle() {
      // Clones and reshaped tensors have the same buffer: they keep it.
      if (gpu.refCount(tensor().dataId) === 1) return;
      const values = new Float32Array(shape.reduce((a, b) => a * b, 1));
      put(tf.tensor(values, shape as never));
    },
  };
}

/** What TF.js has recorded goes to the device, before anything that is submitted after it. */
function submit(gpu: Webgpu): void {
  if (!gpu.commandEncoder) return;
  gpu.endComputePassEncoder();
  gpu.submitQueue();
}
