/**
 * The tables of coded sections (SPEC.md, appendix A): frequencies that move towards what they are used for.
 */

/** Bits of a frequency, and of a word. */
export const FREQUENCY_BITS = 15;
export const WORD_BITS = 16;
/** Symbols of a table; the last of an integer's says that more follows. */
export const SYMBOLS = 8;
export const ESCAPE: number = SYMBOLS - 1;
/** No frequency falls below about this. */
const LEAST = 16;
/** How far a table moves by how often it was used before, this often at least: the share is a power of 2. */
const STEPS: Uint8Array = Uint8Array.from({ length: 41 }, (_, used) =>
  used < 4 ? 4 : used < 12 ? 5 : used < 40 ? 6 : 7,
);

/** What is above the likeliest symbol when all others have their least frequency. */
const RAISED = (1 << FREQUENCY_BITS) - SYMBOLS * LEAST;

/**
 * First tables, by the level of a mean magnitude (`LEVELS`): 2^15 times the probability that a value of a normal distribution with
 * such a mean magnitude, rounded, is at most 0, 1, … 6.
 */
const FIRST: readonly (readonly number[])[] = [
  [31897, 32672, 32688, 32704, 32720, 32736, 32752],
  [29879, 32672, 32688, 32704, 32720, 32736, 32752],
  [27029, 32672, 32688, 32704, 32720, 32736, 32752],
  [23060, 32634, 32688, 32704, 32720, 32736, 32752],
  [18047, 31955, 32688, 32704, 32720, 32736, 32752],
  [13182, 29051, 32448, 32704, 32720, 32736, 32752],
  [9338, 23833, 30543, 32399, 32706, 32736, 32752],
  [6559, 18123, 26052, 30279, 32031, 32595, 32736],
  [4582, 13198, 20365, 25637, 29067, 31041, 32046],
  [3204, 9423, 15106, 19997, 23960, 26984, 29157],
  [2247, 6674, 10909, 14843, 18390, 21496, 24136],
];
/** From which mean magnitude on a level begins, in 1/64. */
const LEVELS: readonly number[] = [4, 8, 15, 24, 38, 56, 83, 120, 174, 248];
/** Means above this, in 1/64, have the lowest bits of their integers stored as they are. */
export const MOST_MEAN = 256;
export const MEAN_UNIT = 64;
export const LEVEL_OF: Uint8Array = Uint8Array.from(
  { length: MOST_MEAN + 1 },
  (_, mean) => LEVELS.filter((begin) => begin <= mean).length,
);

/** Tables: of integers by level and bits left out, one for each other kind of number, and those of bytes. */
const SHIFTS = 6;
export const TABLES_OF_A_SHIFT: number = FIRST.length;
const INTEGERS = SHIFTS * FIRST.length;
export const MORE: number = INTEGERS;
export const SCALE: number = INTEGERS + 1;
export const FINE: number = INTEGERS + 2;
export const SHAPE: number = INTEGERS + 3;
export const LITERALS: number = INTEGERS + 4;
export const LENGTH: number = INTEGERS + 5;
export const DISTANCE: number = INTEGERS + 6;
/** From here on tables move four times as far, since what they are used for is not known before. */
const QUICK = LITERALS;
/** A byte is coded in 3, 3 and 2 bits: after the byte before, by what is known of it. */
export const HIGH: number = DISTANCE + 1;
export const MIDDLE: number = HIGH + 8;
export const LOW: number = MIDDLE + 8;
const TABLES = LOW + 64;
/** Where no mean is known. */
const UNKNOWN_LEVEL = 7;

/** Tables of cumulative frequencies that move towards what they are used for. */
export class Tables {
  /** [tables, 9]: of each, the sum of the frequencies of all symbols below the i-th. */
  readonly sums: Int32Array = new Int32Array(TABLES * (SYMBOLS + 1));
  readonly #used = new Uint8Array(TABLES);

  constructor() {
    for (let table = 0; table < TABLES; table++) {
      const first = FIRST[table < INTEGERS ? table % FIRST.length : UNKNOWN_LEVEL]!;
      this.sums.set([0, ...first, 1 << FREQUENCY_BITS], table * (SYMBOLS + 1));
    }
  }

  copy(): Tables {
    const copy = new Tables();
    copy.sums.set(this.sums);
    copy.#used.set(this.#used);
    return copy;
  }

  /** Makes `symbol` likelier. */
  use(table: number, symbol: number): void {
    const { sums } = this;
    const used = this.#used[table]!;
    const slow = STEPS[used]! - (table < QUICK ? 0 : 2);
    if (used < STEPS.length - 1) this.#used[table] = used + 1;
    const at = table * (SYMBOLS + 1);
    for (let i = 1; i < SYMBOLS; i++) {
      const sum = sums[at + i]!;
      sums[at + i] = sum + (((i > symbol ? RAISED : 0) + i * LEAST - sum) >> slow);
    }
  }
}
