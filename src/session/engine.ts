/**
 * A runtime of ONNX models, as sessions and trainers use one. All code in `src/` runs models through this interface;
 * only a binding knows the runtime. To add a runtime, implement `Engine` in one file and hand it to
 * `createSession`: `bindings/ort-engine.ts` and `test/support/plain-engine.ts` are two of them. `Queue` orders its runs
 * and switches.
 */
import type { DeviceBuffer, DeviceHandle } from "../backends/backend.ts";
import type { Feed } from "../onnx/feeds.ts";
import type { DetachedModel } from "../onnx/write.ts";
import { Changes } from "../pace.ts";

/** A value that goes into a model or comes out of it. Structural: the runtime's own tensors fit. */
export interface EngineTensor {
  /** "float32", "int64", "bool", … */
  readonly type: string;
  readonly dims: readonly number[];
  /** Row-major, where the value is in the CPU's memory. */
  readonly data: unknown;
  /** The data, wherever the value is. */
  getData?(): Promise<unknown>;
  dispose?(): void;
}

/** Values by the name of the model's input or output. */
export type Tensors = Readonly<Record<string, EngineTensor>>;

/** A model that a runtime has loaded. */
export interface LoadedModel {
  readonly inputNames: readonly string[];
  readonly outputNames: readonly string[];
}

/** The use that a model is loaded for. */
export interface LoadOptions {
  /**
   * "serve": as the user configured the runtime. "train": the same, for runs of changing lengths that hold much memory.
   * "inspect": for one run of a tiny input; unoptimised and on the CPU, since that is sooner done. Default: "serve".
   */
  readonly purpose?: "serve" | "train" | "inspect" | undefined;
  /** Names of nodes whose results must have the precision of f32, which a GPU does not promise. */
  readonly exactNodes?: readonly string[] | undefined;
}

/** The device that a runtime computes on, where weights can be placed. */
export interface EngineGpu {
  /**
   * Call it once a model is loaded.
   * @returns the device, and whether the runtime ignores the one that it was given
   * @throws BackendError when the runtime does not tell its device
   */
  device(): Promise<{ readonly device: DeviceHandle; readonly ignored: boolean }>;
  /** A tensor whose data are a buffer of that device. */
  tensor(buffer: DeviceBuffer, dtype: "f32" | "f16", dims: readonly number[]): EngineTensor;
  /** Does `work` when no run is under way, and lets none begin meanwhile. */
  exclusive<T>(work: () => Promise<T>): Promise<T>;
}

/** A runtime with its configuration. */
export interface Engine<Model extends LoadedModel = LoadedModel> {
  /** Name for messages: "onnxruntime". */
  readonly name: string;
  /** Name of the device that it computes on, for messages. */
  readonly provider: string;
  /**
   * @param model the graph, and the files that it points into
   * @throws BackendError when the runtime refuses the model
   */
  load(model: DetachedModel, options?: LoadOptions): Promise<Model>;
  /**
   * Runs a model. Calls may overlap; the engine puts them in order where its runtime cannot overlap them.
   * @param fetches names of the outputs that are wanted, or what else the runtime takes in their place
   * @param options of the runtime, for this run
   */
  run(model: Model, feeds: Tensors, fetches: unknown, options?: object): Promise<Tensors>;
  /** @param type Default: by the array's class; Uint8Array is "bool", Uint16Array "float16" */
  tensor(data: Feed["data"], dims: readonly number[], type?: string): EngineTensor;
  /** Frees a model, after the runs that were asked for. */
  release(model: Model): Promise<void>;
  /** True if it reads the files of a `DetachedModel`'s `folder` by itself. Default: false. */
  readonly readsFiles?: boolean | undefined;
  /**
   * Operators by which it multiplies by integers, so that components can stay as small as their pack stores them.
   * Default: none.
   */
  readonly integers?: readonly ("MatMulNBits" | "DequantizeLinear")[] | undefined;
  /** Bytes that WebAssembly leaves it for a model's weights, where it runs there. Default: no limit is known. */
  readonly room?: number | undefined;
  /** Set where models run on a WebGPU device. */
  readonly gpu?: EngineGpu | undefined;
}

/** Feeds as tensors. */
export function toTensors(engine: Engine, feeds: ReadonlyMap<string, Feed>): Tensors {
  return Object.fromEntries([...feeds].map(([name, { data, dims }]) => [name, engine.tensor(data, dims)]));
}

/** The values of a tensor, wherever it is. */
export async function dataOf(tensor: EngineTensor): Promise<unknown> {
  return tensor.getData ? tensor.getData() : tensor.data;
}

/** Calls and changes. Each call sees the changes asked for before it and none that is asked for later. */
export class Queue extends Changes {
  readonly #calls = new Set<Promise<unknown>>();

  /** Does `work` after the changes asked for before, whether or not they succeed. Later changes may overlap it. */
  call<Result>(work: () => Promise<Result>): Promise<Result> {
    const call = this.changed.then(work);
    this.#track(call);
    return call;
  }

  /**
   * Does `work` after the changes asked for before. Calls asked for before may still be under way.
   * @param after called once those have ended, when `work` has succeeded
   */
  override change<Result>(work: () => Promise<Result>, after?: (result: Result) => unknown): Promise<Result> {
    const calls = [...this.#calls];
    const change = super.change(work);
    if (after) this.#track(Promise.all([change, ...calls]).then(([result]) => after(result)));
    return change;
  }

  /** Does `work` after the calls and changes asked for before, and before those asked for later. */
  alone<Result>(work: () => Promise<Result>): Promise<Result> {
    const calls = [...this.#calls];
    return this.change(async () => {
      await Promise.all(calls);
      // Code that awaits one of the calls goes on before anything changes, however many microtasks that takes.
      await new Promise((resolve) => setTimeout(resolve));
      return work();
    });
  }

  /** Resolves when nothing is under way any more. */
  async end(): Promise<void> {
    do {
      await this.changed;
      await Promise.all(this.#calls);
    } while (this.#calls.size > 0);
  }

  #track(work: Promise<unknown>): void {
    const settled: Promise<unknown> = work.catch(() => undefined).then(() => this.#calls.delete(settled));
    this.#calls.add(settled);
  }
}
