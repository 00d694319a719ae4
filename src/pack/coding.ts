/**
 * Entropy coding of what a pack stores (SPEC.md, section 5.1): bases and task blobs, where it takes fewer bytes.
 */
import { encodeSection } from "../format/encode-coded.ts";
import type { PackModule, TensorRef } from "../format/format.ts";
import type { TaskToWrite } from "../format/layout.ts";
import { basesTensors, parseTask, taskTensors } from "../format/task.ts";
import type { Pack } from "./pack.ts";

/** The bases as they are stored; undefined where coding saves nothing. */
export function codedBases(bases: Uint8Array, modules: readonly PackModule[]): Uint8Array | undefined {
  return encodeSection(bases, refsOf(basesTensors(modules)), 16);
}

/** A task whose blob is coded, where that takes fewer bytes. */
export function codedTask({ entry, blob }: TaskToWrite, modules: readonly PackModule[]): TaskToWrite {
  const { terms, parameters } = parseTask(blob, modules, entry.id, entry);
  return { entry, blob: encodeSection(blob, refsOf(taskTensors(terms, parameters, modules)), 4) ?? blob };
}

/** Whether a pack's sections are coded, as those will be that are added to it. */
export function isCodedPack({ directory }: Pick<Pack, "directory">): boolean {
  return directory.sections.some(({ coded }) => coded);
}

function refsOf(tensors: Iterable<readonly [string, TensorRef | undefined, ...unknown[]]>): TensorRef[] {
  return [...tensors].flatMap(([, tensor]) => tensor ?? []);
}
