/**
 * The adapted weights of a base model: found, held against the pack's fingerprints, and the copies of them that stay.
 */
import { at, type Block, type Slice } from "../backends/backend.ts";
import { BaseMismatchError } from "../errors.ts";
import type { PackModule } from "../format/format.ts";
import type { ReadOptions } from "../source.ts";
import { onDevice, type WeightHost } from "./host.ts";
import type { Located, Locator } from "./locate.ts";
import type { Workbench } from "./workbench.ts";

/** An adapted weight of the base. */
export interface Slot {
  readonly module: PackModule;
  readonly weight: Located;
  /** The weight as loaded, with policy "copy". */
  pristine: Block | undefined;
  /** The weight as the active task has it: where the host has it on the device, or where it cannot be written. */
  active: Slice | undefined;
}

/** @throws BaseMismatchError when a module is missing, ambiguous or of another shape, or two match one weight */
export async function findSlots(modules: readonly PackModule[], locator: Locator): Promise<Slot[]> {
  let weights = modules.flatMap((module) => locator.weight(module) ?? []);
  const names = new Set(weights.map(({ name }) => name));
  if (names.size < modules.length) weights = await (await import("./mismatch.ts")).locateModules(locator, modules);
  return modules.map((module, i) => ({ module, weight: weights[i]!, pristine: undefined, active: undefined }));
}

/**
 * Reads the adapted weights, checks that they are the right model's and makes the copies that stay.
 * @param keep which copies: none when nothing is folded; `active` where the host has the weight in the CPU's memory
 * @throws BaseMismatchError when a fingerprint differs
 */
export async function loadSlots(
  slots: readonly Slot[],
  host: WeightHost,
  bench: Workbench,
  bases: Uint8Array,
  keep: { pristine: boolean; active: boolean },
  options: ReadOptions & { anyBase?: boolean | undefined },
): Promise<void> {
  for (const slot of slots) {
    const { byteLength } = slot.weight;
    const check = !options.anyBase && slot.module.fingerprint !== undefined;
    if (!check && !keep.pristine && !keep.active) continue;
    const { backend } = bench;
    // Before the read: memory that grows would detach the view that is read into.
    if (keep.pristine) slot.pristine = bench.allocate(byteLength, "pristine");
    const placed = placeOf(host, slot, bench);
    slot.active = placed ?? (keep.active ? at(bench.allocate(byteLength, "active")) : undefined);
    let bytes: Uint8Array | undefined;
    if (placed) {
      if (slot.pristine) backend.copy(placed, at(slot.pristine), byteLength);
      if (check) bytes = await backend.read!(placed, byteLength);
    } else {
      const into = slot.pristine && backend.view?.(at(slot.pristine), byteLength);
      bytes = await readWeight(host, slot, into, options);
      // A host need not read into what it is offered.
      if (slot.pristine && bytes.buffer !== into?.buffer) backend.upload(at(slot.pristine), bytes);
      if (slot.active) backend.upload(slot.active, bytes);
    }
    if (!check) continue;
    // Packs that were made without a base have no fingerprints.
    const { checkFingerprint, SAME_FLOAT, weightAt } = await import("./fingerprint.ts");
    const { name, dtype, transposed } = slot.weight;
    const values = weightAt(bytes!, dtype, slot.module.out, slot.module.in, transposed);
    checkFingerprint(slot.module, name, values, bases, SAME_FLOAT);
  }
}

/** The weight in the host's own memory on the backend's device, where it lies there. */
export function placeOf(host: WeightHost, { weight }: Slot, { backend }: Workbench): Slice | undefined {
  const view = host.view?.(weight.name);
  return view && onDevice(view.data) ? { block: backend.adopt!(view.data), byteOffset: view.byteOffset } : undefined;
}

/** @throws BaseMismatchError when the host gives fewer bytes than the weight has */
export async function readWeight(
  host: WeightHost,
  { module, weight }: Slot,
  into: Uint8Array | undefined,
  { signal }: ReadOptions,
): Promise<Uint8Array> {
  const view = await host.read(weight.name, into, { signal });
  const bytes = (view.data as Uint8Array).subarray(view.byteOffset, view.byteOffset + weight.byteLength);
  if (bytes.length === weight.byteLength) return bytes;
  throw new BaseMismatchError(
    `the base gave ${bytes.length} bytes for "${weight.name}", which has ${weight.byteLength}`,
    {
      module: module.name,
      expected: weight.byteLength,
      found: bytes.length,
    },
  );
}
