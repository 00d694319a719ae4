/** Tables of coded sections (SPEC.md, appendix A): frequencies that adapt, and those that a section gives where integers are many. */

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
/** A level begins at this mean magnitude, in 1/64. */
const LEVELS: readonly number[] = [4, 8, 15, 24, 38, 56, 83, 120, 174, 248];
/** Means above this, in 1/64, have the lowest bits of their integers stored as they are. */
export const MOST_MEAN = 256;
export const MEAN_UNIT = 64;

/** The same for given frequencies. */
const GIVEN_FROM: readonly number[] = [3, 6, 10, 16, 24, 34, 46, 62, 83, 112, 150, 205, 280, 380];
export const GIVEN_LEVELS: number = GIVEN_FROM.length + 1;
export const MOST_GIVEN_MEAN = 512;
/** Means of rows are finer there, in 1/1024: 2^4 of these are 1/64. */
export const FINER = 4;
/** Bits of a given frequency. */
export const GIVEN_BITS = 11;
/** Symbols of given frequencies: integers from −15 to 15, and one for all others. */
export const MOST_GIVEN = 15;
export const OTHER: number = -MOST_GIVEN - 1;
/** Numbers of a level in `Frequencies`. */
export const GIVEN: number = MOST_GIVEN + 2;
/** Places of a level in the order of its symbols: 0, 1, −1, … 15, −15, one that nothing has, OTHER. */
export const GIVEN_SYMBOLS: number = 2 * MOST_GIVEN + 3;

/** [levels, 17]: of 2^11 integers at a level, how many are 0, how many are 1 and as many −1, and so on to 15; how many are none of these. */
export type Frequencies = Uint16Array<ArrayBuffer>;

/** Place of a symbol of given frequencies in their order. */
export function placeOfGiven(symbol: number): number {
  return symbol > 0 ? 2 * symbol - 1 : -2 * symbol;
}

/** The symbol at a place. */
export function symbolAt(place: number): number {
  return place & 1 ? (place + 1) >> 1 : -(place >> 1);
}

/** [levels, 34]: of each level, the sum of the frequencies of all symbols in front of the i-th. */
export function givenSums(frequencies: Frequencies): Uint16Array<ArrayBuffer> {
  const sums = new Uint16Array(GIVEN_LEVELS * (GIVEN_SYMBOLS + 1));
  for (let level = 0, at = 0; level < GIVEN_LEVELS; level++, at++)
    for (let i = 0; i < GIVEN_SYMBOLS; i++, at++) {
      const [magnitude, other] = [(i + 1) >> 1, i === GIVEN_SYMBOLS - 1];
      const own = magnitude <= MOST_GIVEN || other ? frequencies[level * GIVEN + magnitude]! : 0;
      sums[at + 1] = sums[at]! + own;
    }
  return sums;
}

/** Levels of means in 1/64. */
export const LEVEL_OF: Uint8Array = levelsOf(LEVELS, MOST_MEAN);
export const GIVEN_LEVEL_OF: Uint8Array = levelsOf(GIVEN_FROM, MOST_GIVEN_MEAN);

function levelsOf(begins: readonly number[], most: number): Uint8Array {
  return Uint8Array.from({ length: most + 1 }, (_, mean) => begins.filter((begin) => begin <= mean).length);
}

/** Tables: of integers by level and bits left out, one for each other kind of number, and those of bytes. */
const SHIFTS = 6;
export const TABLES_OF_A_SHIFT: number = FIRST.length;
const INTEGERS = SHIFTS * FIRST.length;
export const MORE: number = INTEGERS;
export const SCALE: number = INTEGERS + 1;
export const FINE: number = INTEGERS + 2;
export const SHAPE: number = INTEGERS + 3;
export const FREQUENCY: number = INTEGERS + 4;
export const LITERALS: number = INTEGERS + 5;
export const LENGTH: number = INTEGERS + 6;
export const DISTANCE: number = INTEGERS + 7;
/** Tables from this one on move four times as far, since their use is not known before. */
const QUICK = FREQUENCY;
/** A byte is coded in 3, 3 and 2 bits: after the byte before, by what is known of it. */
export const HIGH: number = DISTANCE + 1;
export const MIDDLE: number = HIGH + 8;
export const LOW: number = MIDDLE + 8;
const TABLES = LOW + 64;
/** Where no mean is known. */
const UNKNOWN_LEVEL = 7;

/** Where the sums of a table move to by the use of a symbol: [symbol, i]. */
const TARGETS: Int32Array = Int32Array.from({ length: SYMBOLS * SYMBOLS }, (_, at) => {
  const [symbol, i] = [Math.floor(at / SYMBOLS), at % SYMBOLS];
  return (i > symbol ? RAISED : 0) + i * LEAST;
});

/** What all tables begin with. */
const FIRST_SUMS: Int32Array = Int32Array.from({ length: TABLES * (SYMBOLS + 1) }, (_, at) => {
  const [table, i] = [Math.floor(at / (SYMBOLS + 1)), at % (SYMBOLS + 1)];
  const first = FIRST[table < INTEGERS ? table % FIRST.length : UNKNOWN_LEVEL]!;
  return i === 0 ? 0 : (first[i - 1] ?? 1 << FREQUENCY_BITS);
});

/** Tables of cumulative frequencies that move towards what they are used for. */
export class Tables {
  /** [tables, 9]: of each, the sum of the frequencies of all symbols below the i-th. */
  readonly sums: Int32Array = FIRST_SUMS.slice();
  readonly #used = new Uint8Array(TABLES);

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
    const to = symbol * SYMBOLS;
    for (let i = 1; i < SYMBOLS; i++) {
      const sum = sums[at + i]!;
      sums[at + i] = sum + ((TARGETS[to + i]! - sum) >> slow);
    }
  }
}
