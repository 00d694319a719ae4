/**
 * The base model as the runtime sees it: who lists its weights, hands them out and, where they live in the user's memory, takes the folded
 * ones; and which of them an adapted module is. Knows nothing of packs. Why a weight is not found is said in `mismatch.ts`.
 */

import { nearest } from "../arguments.ts";
import type { DeviceBuffer } from "../backends/backend.ts";
import type { Layout, PackModule } from "../format/format.ts";
import type { ReadOptions, SourceInput } from "../source.ts";
import { decodePart, decodeTensor, type FloatDtype, rowBytes } from "../tensor/dtypes.ts";

/** A tensor as it lies in memory: little-endian, row-major, `shape` elements of `dtype` from `byteOffset` of `data`. */
export interface View {
  readonly dtype: FloatDtype;
  readonly shape: readonly number[];
  readonly data: Uint8Array | DeviceBuffer;
  readonly byteOffset: number;
}

/** A view of the CPU's memory. */
export type CpuView = View & { readonly data: Uint8Array };

/** A parameter of the base model. */
export interface Parameter {
  /** The checkpoint's name: "encoder.layer.0.attention.self.query.weight". */
  readonly name: string;
  readonly shape: readonly number[];
  readonly dtype: FloatDtype;
  /** Layout of the stored weight. Default: the layout of the checkpoint that the adapters were trained on. */
  readonly layout?: Layout;
}

/** Changes to a host that take effect together. */
export interface Transaction {
  /**
   * New value of a parameter, or null to remove one that a task had added. `view` is valid during the call only: copy it.
   */
  write(name: string, view: View | null): void | Promise<void>;
  /** Makes all writes visible to readers before it resolves. */
  commit(): void | Promise<void>;
  /**
   * Gives readers what was there before `begin`. Parameters that a host shows by `view` may stay as they are, since the runtime writes
   * those again. When it fails, nothing is read until another switch has succeeded.
   */
  rollback(): void | Promise<void>;
}

/**
 * Holds the weights of a base model. Adapted weights whose `view` is a buffer of a device are folded into in place, and `write` is
 * not called for them; the transaction's `commit` says when they are whole. All other values go through `read` and `write`, in the
 * CPU's memory.
 */
export interface WeightHost {
  list(): Iterable<Parameter>;
  /** The parameter's bytes, in `into` when given. Called before the parameter is first written, so what it returns is pristine. */
  read(name: string, into?: Uint8Array, options?: ReadOptions): Promise<View>;
  /** The parameter as it is now, where it lies in memory; undefined where it can only be read and written. */
  view?(name: string): View | undefined;
  /**
   * Called before weights are folded in place. What the model has recorded and will only run later must not compute with the new
   * weights: hand it to the device first, or move the weights and leave it the old ones. `view` is asked again afterwards; what
   * it shows then is overwritten as a whole.
   * @param names of the weights that are folded in place next
   */
  flush?(names: readonly string[]): void | Promise<void>;
  /**
   * Absent: the host cannot be written. The runtime then keeps the folded weights; take them from `runtime.weight`.
   * @param names of all parameters that will change; what speaks against it is best said here, before anything has changed
   * @param alone those of them whose new values are meant for no other parameter that may lie in the same memory
   */
  begin?(names: Iterable<string>, alone?: Iterable<string>): Transaction;
  close?(): Promise<void>;
}

/** A weight in the user's memory. Typed arrays are taken as they are; the runtime folds into them in place. */
export interface Tensor {
  readonly dtype: FloatDtype;
  readonly shape: readonly number[];
  readonly data: Float32Array | Uint16Array | Uint8Array;
  readonly layout?: Layout;
}

/** A weight on the WebGPU device that is given as `webgpu: { device }`. The runtime folds into the buffer in place. */
export interface DeviceTensor {
  readonly dtype: FloatDtype;
  readonly shape: readonly number[];
  /** Needs the usage STORAGE | COPY_SRC | COPY_DST. */
  readonly buffer: DeviceBuffer;
  /** First byte of the weight. Default: 0. */
  readonly byteOffset?: number;
  readonly layout?: Layout;
}

/** Whatever can serve as the base model: a host, tensors by parameter name, or a safetensors file. */
export type BaseInput = WeightHost | Map<string, Tensor | DeviceTensor> | SourceInput;

/** True if data lies on a device. */
export function onDevice(data: View["data"] | undefined): data is DeviceBuffer {
  return data !== undefined && !ArrayBuffer.isView(data);
}

/** Bytes of a parameter. */
export function byteLengthOf({ dtype, shape }: Pick<Parameter, "dtype" | "shape">): number {
  return shape.reduce((a, b) => a * b, rowBytes(dtype, 1));
}

/** The values of a view, f32. @param out Default: new memory */
export function viewValues({ dtype, shape, data, byteOffset }: CpuView, out?: Float32Array): Float32Array {
  const count = shape.reduce((a, b) => a * b, 1);
  const bytes = data.subarray(byteOffset);
  if (dtype === "f32") return decodeTensor(dtype, bytes, 1, count, out);
  const values = out ?? new Float32Array(count);
  // Halves need not end at a multiple of 4, as a tensor does.
  decodePart(dtype, bytes, 1, count, [0, 1, 0, count], values);
  return values;
}

export function sameShape(a: readonly number[], b: readonly number[]): boolean {
  return a.length === b.length && a.every((v, i) => v === b[i]);
}

/** Segments that are dropped at most, so that a long name makes no more than a few others. */
const MOST_DROPPED = 64;

/** Why there is no one name. */
export interface NotFound {
  readonly ambiguous: boolean;
  /** Names that are equally good, or look alike. */
  candidates(): string[];
}

/**
 * Finds, for names of an adapter, the parameters of a base model they mean: by the longest common suffix of whole dotted
 * segments that is the whole of one of the two names. "bert.encoder.layer.0.query.weight" finds
 * "encoder.layer.0.query.weight", and the other way round; "layer.1.query" never finds "layer.0.query".
 */
export class NameMatcher {
  readonly #exact = new Set<string>();
  /** Base names by each of their proper suffixes. */
  readonly #bySuffix = new Map<string, string[]>();

  constructor(baseNames: Iterable<string>) {
    for (const name of baseNames) {
      this.#exact.add(name);
      for (const suffix of suffixesOf(name)) {
        const names = this.#bySuffix.get(suffix);
        if (names) names.push(name);
        else this.#bySuffix.set(suffix, [name]);
      }
    }
  }

  /** The base's name; or the candidates, when there are several equally good ones or none. */
  find(name: string): { name: string } | NotFound {
    if (this.#exact.has(name)) return { name };
    const longer = this.#bySuffix.get(name) ?? [];
    if (longer.length === 1) return { name: longer[0]! };
    if (longer.length > 1) return { ambiguous: true, candidates: () => longer };
    for (const suffix of suffixesOf(name)) {
      // A bare "weight" or "bias" says nothing about which module it belongs to.
      if (suffix.includes(".") && this.#exact.has(suffix)) return { name: suffix };
    }
    // Computed when asked for: they take a step for each pair of letters of each name.
    return { ambiguous: false, candidates: () => nearest(name, this.#exact) };
  }
}

/** A name without its first segment, without its first two, and so on. */
function* suffixesOf(name: string): Generator<string, void> {
  let at = name.indexOf(".");
  for (let dropped = 0; at >= 0 && dropped < MOST_DROPPED; dropped++) {
    yield name.slice(at + 1);
    at = name.indexOf(".", at + 1);
  }
}

/** Fields of a module that identify its weight in the base. */
export type ModuleToFind = Pick<PackModule, "name" | "out" | "in" | "layout"> & Partial<Pick<PackModule, "kernel">>;

/** A weight of the base that a module adapts. */
export interface Located extends Parameter {
  /** Stored as [in, out]. */
  readonly transposed: boolean;
  readonly byteLength: number;
}

/** The parameters of a host, found by an adapter's names. */
export class WeightResolver {
  readonly parameters: ReadonlyMap<string, Parameter>;
  names: NameMatcher;
  /** Names of weights by module name, before anything else. */
  readonly byHand: ReadonlyMap<string, string> | undefined;

  constructor(host: WeightHost | undefined, byHand?: ReadonlyMap<string, string>) {
    this.byHand = byHand;
    const parameters = new Map<string, Parameter>();
    for (const parameter of host?.list() ?? []) parameters.set(parameter.name, parameter);
    this.parameters = parameters;
    this.names = new NameMatcher(parameters.keys());
  }

  /** The base's name of a parameter, in the layer that its module is mapped to, if it is; or the candidates. */
  find(name: string): ReturnType<NameMatcher["find"]> {
    const at = name.lastIndexOf(".");
    const weight = this.byHand?.get(name.slice(0, at));
    const leaf = name.slice(at + 1);
    const mapped = weight && this.names.find(leaf === "weight" ? weight : weight.replace(/[^.]*$/, leaf));
    return mapped && "name" in mapped ? mapped : this.names.find(name);
  }

  /** A module's weight; undefined where it is missing, ambiguous or of another shape. */
  weight(module: ModuleToFind): Located | undefined {
    const found = this.names.find(this.byHand?.get(module.name) ?? `${module.name}.weight`);
    const parameter = "name" in found && this.parameters.get(found.name);
    return parameter ? asWeight(module, parameter) : undefined;
  }
}

/** A parameter as the weight of a module; undefined where it has another shape. */
export function asWeight(module: ModuleToFind, parameter: Parameter): Located | undefined {
  const { shape, layout = module.layout } = parameter;
  const transposed = layout === "in-out" || layout === "embedding";
  const window = shape.slice(2);
  if (module.kernel?.length === window.length && !sameShape(module.kernel, window)) return undefined;
  const matrix = [shape[0] ?? 0, shape.slice(1).reduce((a, b) => a * b, 1)];
  if (!sameShape(transposed ? [module.in, module.out] : [module.out, module.in], matrix)) return undefined;
  return { ...parameter, transposed, byteLength: byteLengthOf(parameter) };
}
