/**
 * Jobs of one kernel on their way to one dispatch. A switch expands every module's factors from a few buffers: one by one
 * that would be hundreds of small dispatches. Jobs are put together as long as they share their buffers, fit one binding
 * each, and write apart from one another; else what is waiting goes first, so that the order of calls is kept.
 */
import { DTYPES, type Dtype, rowBytes, scaleBytes } from "../tensor/dtypes.ts";
import type { Slice } from "./backend.ts";
import type { Blocks } from "./webgpu-blocks.ts";
import type { Recorder } from "./webgpu-recorder.ts";

/** A job of kernels/components.wgsl: `count` rows of numbers and a tensor [rows, width] make `out`. */
export interface BatchJob {
  readonly entry: "expand" | "project";
  readonly dtype: Dtype;
  readonly count: number;
  readonly rows: number;
  readonly width: number;
  readonly out: Range;
  /** Coefficients of expand, x of project. */
  readonly numbers: Range;
  readonly basis: Range;
  readonly add?: boolean | undefined;
  readonly workgroups: number;
}

/** Bytes of a slice, and what they are called in errors. */
export interface Range {
  readonly name: string;
  readonly slice: Slice;
  readonly byteLength: number;
}

const ROLES = ["out", "numbers", "basis"] as const;

export class Batch {
  readonly #recorder: Recorder;
  readonly #blocks: Blocks;
  #jobs: BatchJob[] = [];
  /** What the jobs cover of each buffer. */
  #covered: Record<(typeof ROLES)[number], Range> | undefined;

  constructor(recorder: Recorder, blocks: Blocks) {
    this.#recorder = recorder;
    this.#blocks = blocks;
  }

  /** @throws BackendError when a kernel cannot see one of the job's tensors */
  add(job: BatchJob): void {
    for (const role of ROLES) this.#blocks.checkVisible(job[role].name, job[role].slice, job[role].byteLength);
    if (!this.#widen(job)) {
      this.flush();
      this.#covered = { out: job.out, numbers: job.numbers, basis: job.basis };
    }
    this.#jobs.push(job);
  }

  /** Makes room for a job, if it can go with those that are waiting. */
  #widen(job: BatchJob): boolean {
    const covered = this.#covered;
    const first = this.#jobs[0];
    if (!covered || !first || first.entry !== job.entry || first.dtype !== job.dtype) return false;
    if (ROLES.some((role) => covered[role].slice.block !== job[role].slice.block)) return false;
    // Inputs that lie beside the result are copied when bound, as they are then; results go up, so that none meets another.
    const { block, byteOffset } = job.out.slice;
    if (block === job.numbers.slice.block || block === job.basis.slice.block || byteOffset < end(covered.out))
      return false;
    const { bindingBytes, alignment } = this.#blocks.limits;
    const wider = {
      out: union(covered.out, job.out),
      numbers: union(covered.numbers, job.numbers),
      basis: union(covered.basis, job.basis),
    };
    if (ROLES.some((role) => wider[role].byteLength + alignment > bindingBytes)) return false;
    this.#covered = wider;
    return true;
  }

  /** Records what is waiting. */
  flush(): void {
    const jobs = this.#jobs;
    const covered = this.#covered;
    if (!covered) return;
    this.#jobs = [];
    this.#covered = undefined;
    const bound = ROLES.map((role) => {
      const { name, slice, byteLength } = covered[role];
      const { binding, at } = this.#blocks.bind(
        name,
        slice,
        byteLength,
        role === "out" ? undefined : covered.out.slice,
      );
      return { binding, blockStart: at - slice.byteOffset };
    });
    let workgroups = 0;
    const words: number[] = [];
    for (const { dtype, count, rows, width, add, ...job } of jobs) {
      workgroups += job.workgroups;
      const starts = ROLES.map((role, i) => bound[i]!.blockStart + job[role].slice.byteOffset);
      const packed = starts[2]! + scaleBytes(dtype, rows);
      words.push(
        workgroups,
        count,
        rows,
        width,
        ...starts.map((byte) => byte / 4),
        packed,
        rowBytes(dtype, width),
        add ? 1 : 0,
      );
    }
    const { entry, dtype } = jobs[0]!;
    const format = DTYPES.indexOf(dtype);
    this.#recorder.dispatch({
      shader: "components",
      entry,
      format,
      bindings: bound.map((b) => b.binding),
      job: words,
      count: workgroups,
    });
  }
}

function end({ slice, byteLength }: Range): number {
  return slice.byteOffset + byteLength;
}

function union(a: Range, b: Range): Range {
  if (a.byteLength === 0) return b;
  if (b.byteLength === 0) return a;
  const byteOffset = Math.min(a.slice.byteOffset, b.slice.byteOffset);
  return {
    name: a.name,
    slice: { block: a.slice.block, byteOffset },
    byteLength: Math.max(end(a), end(b)) - byteOffset,
  };
}
