/**
 * Entropy coding of what a pack stores (SPEC.md, appendix A): bases and task blobs, where it takes fewer bytes.
 */

import type { Pack } from "../core/pack.ts";
import type { Extractor } from "../extract/extractor.ts";
import { letGo } from "../extract/garbage.ts";
import { isCoded } from "../format/coded.ts";
import { encodeSection } from "../format/encode-coded.ts";
import { decode } from "../format/fields.ts";
import type { PackModule, TensorRef } from "../format/format.ts";
import type { TaskToWrite } from "../format/layout.ts";
import { basesTensors, parseTask, taskTensors } from "../format/task.ts";

/** A longer header, as one with numbers of rows, is a task's own. In bytes. */
const MOST_HEADER = 16_384;

/** How often the bytes of a blob are written to arrays that are of no use once it is coded. */
const PASSING = 6;

/** The basis that sections are coded for. */
interface Basis {
  readonly modules: readonly PackModule[];
  /** As stored. */
  readonly description: Uint8Array;
}

/** The bases as they are stored; undefined where coding saves nothing. */
export function codedBases(bases: Uint8Array, { modules, description }: Basis): Uint8Array | undefined {
  return encodeSection(bases, refsOf(basesTensors(modules)), 16, description);
}

/** A task whose blob is coded, where that takes fewer bytes. */
export function codedTask(task: TaskToWrite, { modules, description }: Basis): TaskToWrite {
  const { entry, blob } = task;
  const coded = encodeSection(blob, tensorsOf(task, modules), 4, description);
  letGo(PASSING * blob.length);
  return { entry, blob: coded ?? blob };
}

/** The same by an extractor, which may have threads. @param task its blob is given away */
export async function codedBy(
  extractor: Extractor,
  task: TaskToWrite,
  { modules, description }: Basis,
): Promise<TaskToWrite> {
  const { entry, blob } = task;
  return { entry, blob: await extractor.ask("code", blob, { tensors: tensorsOf(task, modules), before: description }) };
}

/** Tensors of a task's blob. */
function tensorsOf({ entry, blob }: TaskToWrite, modules: readonly PackModule[]): TensorRef[] {
  const { terms, parameters } = parseTask(blob, modules, entry.id, entry);
  return refsOf(taskTensors(terms, parameters, modules));
}

/** The header of a task's blob, for the others to copy from the basis description; undefined where it is too long for that. */
export function headerOf({ blob }: TaskToWrite): unknown {
  const length = new DataView(blob.buffer, blob.byteOffset).getUint32(4, true);
  return length > MOST_HEADER
    ? undefined
    : decode(blob.subarray(8, 8 + length), "the new pack", "task", "header").value;
}

/** Whether a pack's sections are coded, as those will be that are added to it. */
export function isCodedPack({ directory }: Pick<Pack, "directory">): boolean {
  return directory.sections.some(({ coded }) => coded);
}

/** A task as the pack stores it: coded where the pack is. */
export function storedTask(pack: Pick<Pack, "directory" | "modules">, task: TaskToWrite): TaskToWrite {
  if (!isCodedPack(pack) || isCoded(task.blob)) return task;
  return codedTask(task, { modules: pack.modules, description: pack.directory.basisBytes });
}

function refsOf(tensors: Iterable<readonly [string, TensorRef | undefined, ...unknown[]]>): TensorRef[] {
  return [...tensors].flatMap(([, tensor]) => tensor ?? []);
}
