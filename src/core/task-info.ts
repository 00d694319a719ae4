/**
 * The tasks of an open pack: what callers are told of one, and what the pack holds.
 */
import type { Section, TaskBlob, TaskMetadata } from "../format/format.ts";
import type { SharedWork } from "../source.ts";

/** A task of the pack. */
export interface TaskInfo {
  readonly id: string;
  /** Size of its blob in the file. */
  readonly bytes: number;
  /** Size of the adapter it was made of, 0 when unknown. */
  readonly adapterBytes: number;
  readonly metadata: TaskMetadata;
  /**
   * What the task changes beside its terms, as "role name" (SPEC.md, section 4.3), for instance "saved classifier.weight".
   * Undefined in packs that do not say.
   */
  readonly brings: readonly string[] | undefined;
  /**
   * The hash of the task, "sha256-…": what `revoked` takes. The same in a pack and in a task file. Undefined in packs without hashes, and for
   * tasks that were added where the platform has no SHA-256.
   */
  readonly integrity: string | undefined;
  /** Whether a switch to it needs no request, at the time of asking. */
  readonly resident: boolean;
}

/** A task as its pack holds it. */
export interface TaskSlot {
  id: string;
  bytes: number;
  adapterBytes: number;
  metadata: TaskMetadata;
  brings?: readonly string[] | undefined;
  /** Undefined for tasks added at run time, which are always resident. */
  section?: Section;
  /** Of tasks added at run time: the blob as its file has it. */
  stored?: Uint8Array;
  integrity: string | undefined;
  blob?: TaskBlob | undefined;
  loading?: SharedWork<TaskBlob> | undefined;
}

export function infoOf(slot: TaskSlot): TaskInfo {
  const { id, bytes, adapterBytes, metadata, brings, integrity } = slot;
  return {
    ...{ id, bytes, adapterBytes, metadata, brings, integrity },
    get resident() {
      return slot.blob !== undefined;
    },
  };
}
