/**
 * A base model whose tensors lie in the user's memory or on a device, and are written in place; and the adapted weights
 * of any base: found, held against the pack's fingerprints, and copied.
 */

import { at, type Backend, type Block, type DeviceBuffer, type Slice } from "../backends/backend.ts";
import { BaseMismatchError, described, nearest } from "../errors.ts";
import type { PackModule } from "../format/format.ts";
import type { ReadOptions } from "../source.ts";
import type { FloatDtype } from "../tensor/dtypes.ts";
import {
  byteLengthOf,
  type CpuView,
  type DeviceTensor,
  onDevice,
  sameShape,
  type Tensor,
  type View,
  type WeightHost,
} from "./base.ts";
import type { KernelSession } from "./kernel-session.ts";
import { checkFingerprint, refuseShared, SAME_FLOAT, WeightResolver, weightAt } from "./mismatch.ts";
import { placeOf, type RuntimeContext, readWeight, type WeightBinding } from "./weights.ts";

type Tensors = Map<string, Tensor | DeviceTensor>;

/**
 * Added parameters become new entries of the map.
 * @param backend reads and writes tensors on its device. They can be listed without it
 * @throws TypeError for a number format that there is not
 * @throws BaseMismatchError when a tensor's data is not as long as its shape says, for instance because it was
 *   transferred
 */
export function memoryHost(tensors: Tensors, backend?: Backend): WeightHost {
  checkSizes(tensors);
  const view = (name: string): View => {
    const tensor = tensors.get(name);
    if (!tensor) throw new RangeError(`the base has no tensor "${name}"`);
    return viewOf(tensor);
  };
  /** The caller's tensors that entries of another shape or number format stand for. */
  const originals: Tensors = new Map();
  /** Buffers of such entries, by name. */
  const made = new Map<Block, string>();
  const freeUnused = (): void => {
    for (const [block, name] of made) {
      const tensor = tensors.get(name);
      if (tensor && "buffer" in tensor && tensor.buffer === block.device) continue;
      made.delete(block);
      backend!.free(block);
    }
  };
  /**
   * Writes in place where the value has the type and shape of the tensor, or of the caller's own, else as a new entry.
   */
  const write = (name: string, value: View | null, undo: (() => void)[]): void => {
    const old = tensors.get(name);
    undo.push(() => (old ? tensors.set(name, old) : tensors.delete(name)));
    if (!value) return void tensors.delete(name);
    const { dtype, shape } = value;
    const data = value.data as Uint8Array;
    const original = originals.get(name) ?? old;
    // One that was transferred away is of no use any more.
    const fitting = [old, original].find(
      (one) =>
        one?.dtype === dtype &&
        sameShape(one.shape, shape) &&
        ("buffer" in one || one.data.byteLength === byteLengthOf(one)),
    );
    if (fitting) {
      const place = viewOf(fitting);
      if (onDevice(place.data)) backend!.upload(sliceOf(backend!, place), data);
      else place.data.set(data);
      tensors.set(name, fitting);
      return;
    }
    if (original) originals.set(name, original);
    const block = original && "buffer" in original ? backend!.allocate(data.length, "active") : undefined;
    if (block) {
      made.set(block, name);
      backend!.upload({ block, byteOffset: 0 }, data);
    }
    const place = block ? { buffer: block.device! } : { data: data.slice() };
    tensors.set(name, { dtype, shape: [...shape], ...place, ...(old?.layout && { layout: old.layout }) });
  };
  return {
    *list() {
      for (const [name, { dtype, shape, layout }] of tensors) yield { name, dtype, shape, ...(layout && { layout }) };
    },
    async read(name, into) {
      const found = view(name);
      if (onDevice(found.data)) return copyView(backend!, found);
      if (!into) return found;
      into.set(found.data);
      return { ...found, data: into };
    },
    view,
    begin(names = [], alone = []) {
      // The one way a write in place can fail is an array that was transferred away: find it before the first write.
      checkSizes(tensors);
      refuseSharedMemory(tensors, names, new Set(alone));
      const undo: (() => void)[] = [];
      return {
        write: (name, value) => write(name, value, undo),
        commit: freeUnused,
        // The runtime itself writes again what was written in place.
        rollback() {
          for (const step of undo.reverse()) step();
          freeUnused();
        },
      };
    },
  };
}

/** The place of a view on a device, as the backend sees it. */
function sliceOf(backend: Backend, { data, byteOffset }: View): Slice {
  return { block: backend.adopt!(data as DeviceBuffer), byteOffset };
}

/** A copy in the CPU's memory. */
export async function copyView(backend: Backend, view: View): Promise<CpuView> {
  const { data, byteOffset } = view;
  const bytes = byteLengthOf(view);
  const copy = onDevice(data)
    ? await backend.read!(sliceOf(backend, view), bytes)
    : data.slice(byteOffset, byteOffset + bytes);
  return { ...view, data: copy, byteOffset: 0 };
}

export const FLOATS: readonly FloatDtype[] = ["f32", "f16", "bf16"];

/** Names of the same types in torch, onnxruntime and safetensors. */
const ELSEWHERE = new Map<unknown, FloatDtype>([
  ["float32", "f32"],
  ["float", "f32"],
  ["float16", "f16"],
  ["half", "f16"],
  ["bfloat16", "bf16"],
]);

function unknownDtype(name: string, dtype: unknown): TypeError {
  const [near] = nearest(String(dtype).toLowerCase(), FLOATS);
  const meant = ELSEWHERE.get(dtype) ?? near;
  const advice = meant === undefined ? "" : `; did you mean "${meant}"?`;
  return new TypeError(
    `base tensor "${name}": unknown dtype ${described(dtype)}, expected ${FLOATS.slice(0, -1).join(", ")} or ${FLOATS.at(-1)}${advice}`,
  );
}

/** @throws TypeError for a dtype that there is not; BaseMismatchError for data that is not as long as its shape says */
function checkSizes(tensors: Tensors): void {
  for (const [name, tensor] of tensors) {
    const { dtype, shape } = tensor;
    if (!FLOATS.includes(dtype)) throw unknownDtype(name, dtype);
    const bytes = byteLengthOf(tensor);
    const found = "buffer" in tensor ? tensor.buffer.size - (tensor.byteOffset ?? 0) : tensor.data.byteLength;
    if ("buffer" in tensor ? found >= bytes : found === bytes) continue;
    throw new BaseMismatchError(
      `base tensor "${name}": ${dtype} [${shape.join(", ")}] needs ${bytes} bytes, its data has ${found}`,
      { module: name, expected: bytes, found },
    );
  }
}

/**
 * @param alone of the parameters that change
 * @throws BaseMismatchError when one that changes shares its memory, as tied weights do, with another that changes, or
 *   that is to stay
 */
function refuseSharedMemory(tensors: Tensors, names: Iterable<string>, alone: ReadonlySet<string>): void {
  const taken = new Map<object, { readonly name: string; readonly start: number; readonly end: number }[]>();
  const changing = new Set(names);
  // Those that stay come last: each is held against those that change.
  const staying = alone.size > 0 ? [...tensors.keys()].filter((name) => !changing.has(name)) : [];
  for (const name of [...changing, ...staying]) {
    const tensor = tensors.get(name);
    if (!tensor) continue;
    const { data, byteOffset } = viewOf(tensor);
    const [memory, start] = onDevice(data) ? [data, byteOffset] : [data.buffer, data.byteOffset];
    const end = start + byteLengthOf(tensor);
    const stays = !changing.has(name);
    const others = taken.get(memory) ?? [];
    const other = others.find(
      (one) => one.start < end && start < one.end && (stays ? alone.has(one.name) : changing.has(one.name)),
    );
    if (other) {
      const which = stays ? `"${other.name}" alone is` : "both are";
      const message = `the base's "${other.name}" and "${name}" share their memory, and ${which} to be changed: give each its own`;
      throw new BaseMismatchError(message, { module: name });
    }
    others.push({ name, start, end });
    taken.set(memory, others);
  }
}

function viewOf(tensor: Tensor | DeviceTensor): View {
  const { dtype, shape } = tensor;
  if ("buffer" in tensor) return { dtype, shape, data: tensor.buffer, byteOffset: tensor.byteOffset ?? 0 };
  const { buffer, byteOffset, byteLength } = tensor.data;
  return { dtype, shape, data: new Uint8Array(buffer, byteOffset, byteLength), byteOffset: 0 };
}

// Adapted weights of a base.

/**
 * Finds the weights of modules.
 * @param byHand names of weights by module name, before anything else
 * @throws BaseMismatchError when a module is missing, ambiguous or of another shape, or two match one weight
 */
export function bindWeights(
  host: WeightHost,
  modules: readonly PackModule[],
  byHand: ReadonlyMap<string, string> | undefined,
): Pick<RuntimeContext, "bindings" | "resolver"> {
  const resolver = new WeightResolver(host, byHand);
  const bindings = modules.map((module): WeightBinding => {
    return { module, weight: resolver.locate(module), pristine: undefined, active: undefined };
  });
  refuseShared(
    modules,
    bindings.map(({ weight }) => weight.name),
  );
  return { resolver, bindings };
}

/**
 * Reads the adapted weights, checks that they are the right model's and makes the copies that stay.
 * @param keep which copies: none when nothing is folded; `active` where the host has the weight in the CPU's memory
 * @throws BaseMismatchError when a fingerprint differs
 */
export async function loadWeights(
  bindings: readonly WeightBinding[],
  host: WeightHost,
  kernels: KernelSession,
  bases: Uint8Array,
  keep: { pristine: boolean; active: boolean },
  options: ReadOptions & { anyBase?: boolean | undefined },
): Promise<void> {
  for (const binding of bindings) {
    const { byteLength } = binding.weight;
    const check = !options.anyBase && binding.module.fingerprint !== undefined;
    if (!check && !keep.pristine && !keep.active) continue;
    const { backend } = kernels;
    // Allocated first: memory that grows would detach the view that is read into.
    if (keep.pristine) binding.pristine = kernels.allocate(byteLength, "pristine");
    const placed = placeOf(host, binding, kernels);
    binding.active = placed ?? (keep.active ? at(kernels.allocate(byteLength, "active")) : undefined);
    let bytes: Uint8Array | undefined;
    if (placed) {
      if (binding.pristine) backend.copy(placed, at(binding.pristine), byteLength);
      if (check) bytes = await backend.read!(placed, byteLength);
    } else {
      const into = binding.pristine && backend.view?.(at(binding.pristine), byteLength);
      bytes = await readWeight(host, binding, into, options);
      // A host need not read into what it is offered.
      if (binding.pristine && bytes.buffer !== into?.buffer) backend.upload(at(binding.pristine), bytes);
      if (binding.active) backend.upload(binding.active, bytes);
    }
    // Packs that were made without a base have no fingerprints.
    if (!check) continue;
    const { module, weight } = binding;
    const values = weightAt(bytes!, weight.dtype, module.out, module.in, weight.transposed);
    checkFingerprint(module, weight.name, values, bases, SAME_FLOAT);
  }
}
