/**
 * Progress of long work: one record for `onProgress` of the library and for the lines of the command line.
 */

/** Progress of a piece of work. Of one stage `done` never goes back, and `total` stays once it is known. */
export interface WorkProgress {
  /** Name of the work, such as "packing". */
  readonly stage: string;
  /** Rises to `total`. */
  readonly done: number;
  /** Is 0 as long as it is unknown. */
  readonly total: number;
  /**
   * Unit of `done` and `total`, in the plural, such as "steps"; "bytes"; or "%" of work whose parts cannot be counted
   * beforehand: `total` is 100.
   */
  readonly unit: string;
  /** The task or file that is worked on, which changes within a stage. */
  readonly detail?: string | undefined;
}

/** Receives the progress of work. */
export type OnWork = (progress: WorkProgress) => void;

/** The share of what is left that a round of a search takes: nobody knows how many rounds there will be. */
export const ROUND = 0.35;

/**
 * Progress of work in percent. Its parts may have parts of their own, each of them a share of what is left: so it never
 * goes back, even where nobody knows how many parts there will be.
 */
export class Meter {
  readonly #tell: (share: number) => void;
  #done = 0;

  /** @param tell is given the share that is done, from 0 to 1 */
  constructor(tell: (share: number) => void) {
    this.#tell = tell;
  }

  /** Reports a stage whenever a tenth of a percent more of it is done. */
  static of(stage: string, onProgress: OnWork | undefined): Meter {
    let told = -1;
    return new Meter((share) => {
      const done = Math.floor(1000 * share + 1e-6) / 10;
      if (done <= told) return;
      told = done;
      onProgress?.({ stage, done, total: 100, unit: "%" });
    });
  }

  /** @param share of all, from 0 to 1 */
  reach(share: number): void {
    this.#done = Math.max(this.#done, share);
    this.#tell(this.#done);
  }

  /** The next part. @param share of what is left */
  part(share: number): Meter {
    const from = this.#done;
    const size = share * (1 - from);
    return new Meter((done) => this.reach(from + size * done));
  }
}
