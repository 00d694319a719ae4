/**
 * What a switch did and what memory is held: one shape for the runtime and for sessions of model runtimes.
 */
import type { Owner } from "../backends/backend.ts";
import type { Selection } from "./selection.ts";

/** What every switch says of itself. */
export interface SwitchReport {
  /** What is active now. */
  readonly task: Selection;
  /** Read from the pack for this switch. */
  readonly bytesRead: number;
  readonly requests: number;
  /** `read` until all bytes are there, `compute` from then on. */
  readonly milliseconds: { readonly read: number; readonly compute: number; readonly total: number };
}

/** Resident bytes by owner. */
export interface MemoryReport extends Readonly<Record<Owner, number>> {
  /** Held by the backend beyond what is in use. */
  readonly reserved: number;
  readonly total: number;
}

/** The bytes by owner, and their sum. */
export function memoryReport(bytes: Record<Owner | "reserved", number>): MemoryReport {
  return { ...bytes, total: Object.values(bytes).reduce((a, b) => a + b, 0) };
}
