/**
 * Decodes coded sections (SPEC.md, appendix A): the twin of `src/format/coded.ts`, which defines the order of what is coded. A module of
 * its own, for `src/format/coded-wasm.ts`, and for SIMD only, since a table is one vector. It works in pieces, so that the caller can
 * give others a turn. A section that breaks a rule ends in a trap; `fault` and `place` then tell the error and its position. What was
 * decoded becomes floats here too (`floats`).
 *
 * Memory: FIRST and LEVELS, which the caller writes once; TABLES and COLUMNS; from STORED on the stored bytes, the bytes that copies may
 * come from, the section, and a word for each row of a run.
 */
import { decodeIntegers, f16ToF32, rowBytes, scaleBytes } from "./convert";

/** First tables of `src/format/coded.ts`, nine i32 each. */
// @ts-ignore: decorator
@inline const FIRST: usize = 0;
/** `LEVEL_OF` of `src/format/coded.ts`, bytes. */
// @ts-ignore: decorator
@inline const LEVELS: usize = 5632;
/**
 * Tables of 32 bytes each: how often it was used (u8), from byte 14 on the nine sums (u16). The last, 2^15, is negative as an i16 and
 * never moves.
 */
// @ts-ignore: decorator
@inline const TABLES: usize = 6144;
/** Means of the numbers of a tensor (i16); −1 where there is none yet. */
// @ts-ignore: decorator
@inline const COLUMNS: usize = 12288;
// @ts-ignore: decorator
@inline const MOST_COLUMNS: u32 = 4096;
// @ts-ignore: decorator
@inline const STORED: usize = 20480;

/** Indices of the tables, in the order of `src/format/coded.ts`. */
// @ts-ignore: decorator
@inline const MORE: usize = 66;
// @ts-ignore: decorator
@inline const SCALE: usize = 67;
// @ts-ignore: decorator
@inline const FINE: usize = 68;
// @ts-ignore: decorator
@inline const SHAPE: usize = 69;
// @ts-ignore: decorator
@inline const LITERALS: usize = 70;
// @ts-ignore: decorator
@inline const LENGTH: usize = 71;
// @ts-ignore: decorator
@inline const DISTANCE: usize = 72;
// @ts-ignore: decorator
@inline const HIGH: usize = 73;
// @ts-ignore: decorator
@inline const MIDDLE: usize = 81;
// @ts-ignore: decorator
@inline const LOW: usize = 89;
// @ts-ignore: decorator
@inline const COUNT: usize = 153;

/** Reason why a section is wrong, in the order of `FAULTS` in `coded.ts`; 0 while it is valid. */
export let fault: u32 = 0;
/** Byte of the section at which it is wrong. */
export let place: u32 = 0;

let state: u32 = 0;
/** State of second rows; 0 until the first of them begins. */
let other: u32 = 0;
/** The next word, and the end of the words. */
let words: usize = 0;
let stop: usize = 0;

/** Begin and end of the section, and its next byte. */
let section: usize = 0;
let end: usize = 0;
let at: usize = 0;

/** The next step. */
let phase: u32 = 0;
// @ts-ignore: decorator
@inline const BYTES: u32 = 0;
// @ts-ignore: decorator
@inline const LITERAL_HEAD: u32 = 1;
// @ts-ignore: decorator
@inline const LITERAL: u32 = 2;
// @ts-ignore: decorator
@inline const COPY: u32 = 3;
// @ts-ignore: decorator
@inline const ROW: u32 = 4;
// @ts-ignore: decorator
@inline const INTEGER: u32 = 5;
// @ts-ignore: decorator
@inline const RUN: u32 = 6;
// @ts-ignore: decorator
@inline const END: u32 = 7;

/** State of bytes: their end, how many more are literal or copied, and the distance of the last copy. */
let until: usize = 0;
let left: usize = 0;
let distance: usize = 0;

/** State of a run: its shape, bytes from one tensor to the next, tensors that follow this one, and whether each number is remembered. */
let kind: u32 = 0;
let rows: u32 = 0;
let width: u32 = 0;
let stride: usize = 0;
let more: u32 = 0;
let remember: bool = false;
/** The words of its rows: the mean (i16) and the upper byte of the scale. */
let known: usize = 0;

/** State of a tensor: its begin, its row, the begin of that row's integers, and the next one of them. */
let start: usize = 0;
let row: u32 = 0;
let values: usize = 0;
let next: u32 = 0;
/** Whether the row below it is decoded with this row, in turns. */
let paired: bool = false;
/** Mean magnitude of the row, in 1/64, and of the one below it in a pair; upper byte of the scale before. */
let mean: i32 = 0;
let below: i32 = 0;
let likely: u32 = 0;

function refuse(why: u32, byte: usize): void {
  // Pairs of rows read on where words have ended.
  const early = words > stop;
  fault = early ? 1 : why;
  place = early ? 0 : <u32>(byte - section);
  unreachable();
}

// @ts-ignore: decorator
@inline
function sound(condition: bool, why: u32, byte: usize): void {
  if (!condition) refuse(why, byte);
}

function word(): u32 {
  sound(words < stop, 1, section);
  const found = <u32>load<u16>(words);
  words += 2;
  return found;
}

// @ts-ignore: decorator
@inline
function take(next: u32): void {
  state = next < 0x10000 ? (next << 16) | word() : next;
}

function bits(count: u32): u32 {
  const found = state & ((1 << count) - 1);
  take(state >>> count);
  return found;
}

/**
 * The symbol that a state decodes by a table, above the state behind it, which may be below 2^16. Moves the table. Lanes are the sums S₁ to
 * S₈; those above the slot are those that a used table moves upwards. Tables of bytes are `quick`.
 */
// @ts-ignore: decorator
@inline
function pick(x: u32, address: usize, quick: i32): u64 {
  const sums = v128.load(address, 16);
  const slot = x & 0x7fff;
  const above = i16x8.gt_s(sums, i16x8.splat(<i16>slot));
  const found = <u32>(7 - popcnt(i16x8.bitmask(above)));
  const sum = address + (found << 1);
  const first = <u32>load<u16>(sum, 14);
  const next = (<u32>load<u16>(sum, 16) - first) * (x >>> 15) + slot - first;
  const aims = i16x8.add(i16x8(16, 32, 48, 64, 80, 96, 112, -32768), v128.and(above, i16x8.splat(32640)));
  const step = i16x8.sub(aims, sums);
  const used = <i32>load<u8>(address);
  // A table that is used often moves by a constant.
  if (used < 40) {
    store<u8>(address, used + 1);
    v128.store(address, i16x8.add(sums, i16x8.shr_s(step, 4 + i32(used > 3) + i32(used > 11) - quick)), 16);
  } else v128.store(address, i16x8.add(sums, i16x8.shr_s(step, 7 - quick)), 16);
  return (<u64>found << 32) | <u64>next;
}

/** Decodes a symbol. */
function symbol(table: usize): u32 {
  const picked = pick(state, TABLES + (table << 5), table < LITERALS ? 0 : 2);
  take(<u32>picked);
  return <u32>(picked >> 32);
}

/** Decodes a number below 2^31 − 1. */
function number(table: usize): u32 {
  let count = symbol(table);
  if (count == 7) count = min<u32>(30, bits(5) + 7);
  const low = min<u32>(count, 16);
  const high = bits(count - low);
  return ((1 << count) | (high << low) | bits(low)) - 1;
}

/** Reads how many bytes follow that belong to no tensor. */
function beginBytes(): void {
  const count = number(LENGTH);
  sound(count <= <u32>(end - at), 3, at);
  until = at + count;
  distance = 0;
  phase = count ? LITERAL_HEAD : RUN;
}

function beginLiterals(): void {
  left = number(LITERALS);
  sound(left <= until - at, 4, at);
  phase = LITERAL;
}

/** Reads at most `most` literal bytes. */
function literals(most: usize): void {
  const to = at + min(left, most);
  left -= to - at;
  for (; at < to; at++) {
    const last = at > section ? <usize>load<u8>(at - 1) : 0;
    const high = symbol(HIGH + (last >> 5));
    const middle = symbol(MIDDLE + high);
    store<u8>(at, (high << 5) | (middle << 2) | (symbol(LOW + 8 * high + middle) & 3));
  }
  if (left) return;
  if (at == until) {
    phase = RUN;
    return;
  }
  left = number(LENGTH) + 4;
  const far = number(DISTANCE);
  if (far) distance = far;
  sound(distance > 0 && distance <= at - stop && left <= until - at, 5, at);
  phase = COPY;
}

/** Copies at most `most` bytes. */
function copy(most: usize): void {
  const to = at + min(left, most);
  left -= to - at;
  for (; at < to; at++) store<u8>(at, load<u8>(at - distance));
  if (!left) phase = at < until ? LITERAL_HEAD : RUN;
}

/** Reads the shape of the tensors that follow. */
function beginRun(): void {
  const type = bits(2);
  sound(type < 3, 6, at);
  kind = type == 0 ? 8 : type == 1 ? 4 : 3;
  rows = number(SHAPE);
  width = number(SHAPE);
  const count = number(SHAPE);
  const step: u64 = bits(1) ? 16 : 4;
  // The product of numbers below 2^31 fits 64 bits.
  const packed = (<u64>rows * ((<u64>width * kind + 7) >> 3) + 3) & ~3;
  const needed = ((<u64>rows * 2 + 3) & ~3) + packed;
  const room = <u64>(end - at);
  sound(count > 0 && rows > 0 && needed <= room, 7, at);
  const between = (needed + step - 1) & (0 - step);
  const whole = (<u64>count - 1) * between + needed;
  sound(whole <= room, 7, at);
  known = (end + 3) & ~3;
  const pages = <i32>((known + (<usize>rows << 2) + 0xffff) >> 16) - memory.size();
  if (pages > 0 && memory.grow(pages) < 0) unreachable();
  for (let i: u32 = 0; i < rows; i++) store<u32>(known + (<usize>i << 2), 0xffff);
  remember = <u64>rows * width <= MOST_COLUMNS;
  if (remember) memory.fill(COLUMNS, 0xff, <usize>(rows * width) << 1);
  stride = <usize>between;
  more = count - 1;
  start = at;
  at += <usize>whole;
  beginTensor();
}

function beginTensor(): void {
  row = 0;
  values = start + ((<usize>rows * 2 + 3) & ~3);
  mean = 64;
  likely = 0x3c;
  phase = ROW;
}

/** Begins a row, or a pair of rows where there are too many integers to remember them. */
function beginRow(): void {
  const before = mean;
  mean = head(row, before);
  paired = !remember && row + 1 < rows;
  if (paired) {
    below = head(row + 1, before);
    if (!other) {
      other = word() << 16;
      other |= word();
      sound(other >= 0x10000, 2, section);
    }
  }
  next = 0;
  phase = INTEGER;
}

/** Reads a row's scale. Returns its mean, or where it has none yet the one that the rows before have reached. */
function head(row: u32, before: i32): i32 {
  const memory = known + (<usize>row << 2);
  const scale = start + (<usize>row << 1);
  const known8 = <u32>load<u8>(memory, 2);
  if (known8) likely = known8;
  const folded = number(SCALE);
  likely = (likely + (folded & 1 ? 0 - ((folded + 1) >> 1) : folded >> 1)) & 255;
  store<u8>(scale, likely, 1);
  store<u8>(memory, likely, 2);
  if (symbol(FINE)) store<u8>(scale, bits(8));
  const own = <i32>load<i16>(memory);
  return own < 0 ? before : own;
}

/** Decodes an integer's magnitude. `expected`: the expected magnitude, in 1/64; `byte`: its destination. */
function magnitude(expected: u32, most: u32, byte: usize): u32 {
  let shift: u32 = 0;
  while (expected >> shift > 256) shift++;
  let found = symbol(shift * 11 + load<u8>(LEVELS + (expected >> shift)));
  if (found == 7) found += number(MORE);
  // Checked before a shift drops the highest bits.
  sound(found <= most, 8, byte);
  if (shift) {
    found = (found << shift) | bits(shift);
    sound(found <= most, 8, byte);
  }
  return found;
}

// @ts-ignore: decorator
@inline
function slowness(i: u32): i32 {
  return i < 7 ? 3 : i < 15 ? 4 : 5;
}

/** Decodes at most `most` integers of a row that has no pair. */
function integers(most: u32): void {
  const largest: u32 = (1 << (kind - 1)) - 1;
  const mask: u32 = 2 * largest + 1;
  const last = width - next > most ? next + most : width;
  let column = COLUMNS + ((<usize>row * width + next) << 1);
  let byte = values + ((<usize>next * kind) >> 3);
  let filled = (next * kind) & 7;
  let packed = filled ? <u32>load<u8>(byte) : 0;
  for (let i = next; i < last; ) {
    const seen = remember ? <i32>load<i16>(column) : -1;
    const found = magnitude(seen < 0 ? mean : (mean + seen) >> 1, largest, byte);
    const value = found && bits(1) ? 0 - found : found;
    packed |= (value & mask) << filled;
    for (filled += kind; filled >= 8; filled -= 8, packed >>= 8) store<u8>(byte++, packed);
    const now = <i32>(found << 6);
    if (remember) {
      store<i16>(column, seen < 0 ? (mean + now) >> 1 : seen + ((now - seen) >> 3));
      column += 2;
    }
    mean += (now - mean) >> slowness(i);
    i++;
    if (found || mean > 3) continue;
    const zeros = skipZeros(i, last, column);
    if (!zeros) continue;
    // The section was filled with zeros.
    if (filled) store<u8>(byte, packed);
    i += zeros;
    column += <usize>zeros << 1;
    byte = values + ((<usize>i * kind) >> 3);
    filled = (i * kind) & 7;
    packed = filled ? <u32>load<u8>(byte) : 0;
  }
  if (filled) store<u8>(byte, packed);
  next = last;
  if (next == width) endRow();
}

/** Begins what follows a row, or a pair of them. */
function endRow(): void {
  const bytes = (<usize>width * kind + 7) >> 3;
  store<i16>(known + (<usize>row << 2), mean);
  row++;
  values += bytes;
  if (paired) {
    mean = below;
    store<i16>(known + (<usize>row << 2), mean);
    row++;
    values += bytes;
  }
  if (row < rows) phase = ROW;
  else if (more) {
    more--;
    start += stride;
    beginTensor();
  } else phase = at < end ? BYTES : END;
}

/**
 * Decodes at most `most` integers of each of two rows, in turns: while one state waits for its table, the other goes on. States are in
 * registers, since there are millions of integers. No branch decides on the next word, which no processor could predict: whether there
 * was one is asked behind a turn. Both halves are written out, since a function gives back one value, and here each half has five.
 */
function pairs(most: u32): void {
  const largest: u32 = (1 << (kind - 1)) - 1;
  const mask: u32 = 2 * largest + 1;
  const last = width - next > most ? next + most : width;
  const apart = (<usize>width * kind + 7) >> 3;
  let byte = values + ((<usize>next * kind) >> 3);
  let filled = (next * kind) & 7;
  let packed = filled ? <u32>load<u8>(byte) : 0;
  let packedBelow = filled ? <u32>load<u8>(byte + apart) : 0;
  let x = state;
  let y = other;
  let w = words;
  let r = mean;
  let q = below;
  for (let i = next; i < last; ) {
    let found: u32;
    if (r > 256) {
      state = x;
      words = w;
      found = magnitude(r, largest, byte);
      x = state;
      w = words;
    } else {
      const picked = pick(x, TABLES + (<usize>load<u8>(LEVELS + r) << 5), 0);
      x = <u32>picked;
      found = <u32>(picked >> 32);
      const few = x < 0x10000;
      x = select<u32>((x << 16) | <u32>load<u16>(w), x, few);
      w += <usize>few << 1;
      if (found == 7) {
        state = x;
        words = w;
        found += number(MORE);
        x = state;
        w = words;
      }
      if (found > largest) {
        words = w;
        refuse(8, byte);
      }
    }
    let signed = u32(found != 0);
    let minus = 0 - (x & signed);
    packed |= (((found ^ minus) - minus) & mask) << filled;
    x >>>= signed;
    let few = x < 0x10000;
    x = select<u32>((x << 16) | <u32>load<u16>(w), x, few);
    w += <usize>few << 1;
    const slow = slowness(i);
    r += (<i32>(found << 6) - r) >> slow;
    let any = found;

    if (q > 256) {
      state = y;
      words = w;
      found = magnitude(q, largest, byte + apart);
      y = state;
      w = words;
    } else {
      const picked = pick(y, TABLES + (<usize>load<u8>(LEVELS + q) << 5), 0);
      y = <u32>picked;
      found = <u32>(picked >> 32);
      const few = y < 0x10000;
      y = select<u32>((y << 16) | <u32>load<u16>(w), y, few);
      w += <usize>few << 1;
      if (found == 7) {
        state = y;
        words = w;
        found += number(MORE);
        y = state;
        w = words;
      }
      if (found > largest) {
        words = w;
        refuse(8, byte + apart);
      }
    }
    signed = u32(found != 0);
    minus = 0 - (y & signed);
    packedBelow |= (((found ^ minus) - minus) & mask) << filled;
    y >>>= signed;
    few = y < 0x10000;
    y = select<u32>((y << 16) | <u32>load<u16>(w), y, few);
    w += <usize>few << 1;
    q += (<i32>(found << 6) - q) >> slow;
    any |= found;

    if (w > stop) {
      words = w;
      refuse(1, section);
    }
    for (filled += kind; filled >= 8; filled -= 8, packed >>= 8, packedBelow >>= 8, byte++) {
      store<u8>(byte, packed);
      store<u8>(byte + apart, packedBelow);
    }
    i++;
    if (any || max(r, q) > 3) continue;
    state = x;
    other = y;
    words = w;
    const zeros = skipZeroPairs(last - i);
    x = state;
    y = other;
    w = words;
    if (!zeros) continue;
    // Each zero takes one from means as small as these.
    r = max(r - zeros, 0);
    q = max(q - zeros, 0);
    if (filled) {
      store<u8>(byte, packed);
      store<u8>(byte + apart, packedBelow);
    }
    i += zeros;
    byte = values + ((<usize>i * kind) >> 3);
    filled = (i * kind) & 7;
    packed = filled ? <u32>load<u8>(byte) : 0;
    packedBelow = filled ? <u32>load<u8>(byte + apart) : 0;
  }
  if (filled) {
    store<u8>(byte, packed);
    store<u8>(byte + apart, packedBelow);
  }
  state = x;
  other = y;
  words = w;
  mean = r;
  below = q;
  next = last;
  if (next == width) endRow();
}

/** Counts pairs of zeros, as `skipZeros` does: at most `most`. */
function skipZeroPairs(most: i32): i32 {
  if (load<u8>(TABLES) < 40) return 0;
  const aims = i16x8(32656, 32672, 32688, 32704, 32720, 32736, 32752, -32768);
  let sums = v128.load(TABLES, 16);
  let x = state;
  let y = other;
  let count = 0;
  for (; count < most; count++) {
    const zero = <u32>i16x8.extract_lane_u(sums, 0);
    const moved = i16x8.add(sums, i16x8.shr_s(i16x8.sub(aims, sums), 7));
    const zeroBelow = <u32>i16x8.extract_lane_u(moved, 0);
    if ((x & 0x7fff) >= zero || (y & 0x7fff) >= zeroBelow) break;
    x = zero * (x >>> 15) + (x & 0x7fff);
    if (x < 0x10000) x = (x << 16) | word();
    y = zeroBelow * (y >>> 15) + (y & 0x7fff);
    if (y < 0x10000) y = (y << 16) | word();
    sums = i16x8.add(moved, i16x8.shr_s(i16x8.sub(aims, moved), 7));
  }
  v128.store(TABLES, sums, 16);
  state = x;
  other = y;
  return count;
}

/**
 * Counts zeros where nothing else is expected, from integer `i` of a row on. Equals `symbol` of the first table, with the table in a
 * register: symbols that cost almost no bits must cost almost no time.
 */
function skipZeros(i: u32, last: u32, column: usize): u32 {
  if (load<u8>(TABLES) < 40) return 0;
  const aims = i16x8(32656, 32672, 32688, 32704, 32720, 32736, 32752, -32768);
  let sums = v128.load(TABLES, 16);
  let x = state;
  let r = mean;
  const first = i;
  while (i < last) {
    const zero = <u32>i16x8.extract_lane_u(sums, 0);
    const slot = x & 0x7fff;
    if (slot >= zero) break;
    if (remember) {
      const seen = <i32>load<i16>(column);
      if ((r + max(seen, 0)) >> 1 > 3) break;
      store<i16>(column, seen < 0 ? r >> 1 : seen + ((0 - seen) >> 3));
      column += 2;
    }
    x = zero * (x >>> 15) + slot;
    if (x < 0x10000) x = (x << 16) | word();
    sums = i16x8.add(sums, i16x8.shr_s(i16x8.sub(aims, sums), 7));
    if (r) r += (0 - r) >> slowness(i);
    i++;
    if (r || remember) continue;
    // The common case, in as few steps as possible.
    for (; i < last; i++) {
      const zero = <u32>i16x8.extract_lane_u(sums, 0);
      const slot = x & 0x7fff;
      if (slot >= zero) break;
      x = zero * (x >>> 15) + slot;
      if (x < 0x10000) x = (x << 16) | word();
      sums = i16x8.add(sums, i16x8.shr_s(i16x8.sub(aims, sums), 7));
    }
    break;
  }
  v128.store(TABLES, sums, 16);
  state = x;
  mean = r;
  return i - first;
}

/**
 * Begins to decode at STORED: `stored` bytes, whose head was checked, then `before` bytes that copies may come from, then the section of
 * `size` bytes. The caller has provided the memory; all three together are below 2^30.
 */
export function begin(stored: usize, before: usize, size: usize): void {
  for (let table: usize = 0; table < COUNT; table++) {
    const address = TABLES + (table << 5);
    store<u8>(address, 0);
    for (let i: usize = 0; i < 9; i++) store<u16>(address + 2 * i, load<u16>(FIRST + 36 * table + 4 * i), 14);
  }
  fault = 0;
  stop = STORED + stored;
  words = STORED + 8;
  section = stop + before;
  end = section + size;
  at = section;
  phase = size ? BYTES : END;
  other = 0;
  state = word() << 16;
  state |= word();
  sound(state >= 0x10000, 2, section);
  memory.fill(section, 0, size);
}

/** Decodes about `most` more symbols. Returns whether the section is complete. */
export function decode(most: u32): bool {
  for (let budget = <i32>most; budget > 0; ) {
    if (phase == INTEGER) {
      const from = next;
      if (paired) pairs((budget >> 1) + 1);
      else integers(budget);
      const read = <i32>(phase == INTEGER ? next - from : width - from) + 1;
      budget -= paired ? 2 * read : read;
    } else if (phase == ROW) {
      beginRow();
      budget -= 4;
    } else if (phase == LITERAL) {
      const from = at;
      literals(budget);
      budget -= 4 * <i32>(at - from) + 8;
    } else if (phase == COPY) {
      const from = at;
      copy(<usize>budget << 3);
      budget -= <i32>((at - from) >> 3) + 1;
    } else if (phase == LITERAL_HEAD) {
      beginLiterals();
      budget -= 4;
    } else if (phase == BYTES) {
      beginBytes();
      budget -= 4;
    } else if (phase == END) {
      sound(words == stop && state == 0x10000 && (!other || other == 0x10000), 9, section);
      return true;
    } else if (at < end) {
      beginRun();
      budget -= 64;
    } else phase = END;
  }
  return false;
}

/** Decodes a tensor [rows, width] of integers at STORED to f32 at `to`. @param type as in `layout.ts` */
export function floats(type: i32, rows: u32, width: u32, to: usize): void {
  const stride = rowBytes(type, width);
  let from = STORED + scaleBytes(type, rows);
  for (let row: usize = 0; row < rows; row++, from += stride, to += <usize>width << 2)
    decodeIntegers(type, from, f16ToF32(load<u16>(STORED + 2 * row)), to, width);
}

/** Turns f32 [rows, width] at `from` into [width, rows] at `to`: four rows and columns at a time, then what is left. */
export function turn(rows: u32, width: u32, from: usize, to: usize): void {
  const along = <usize>width << 2;
  const down = <usize>rows << 2;
  const fourRows = rows & ~3;
  const four = width & ~3;
  for (let i: u32 = 0; i < width; i += 4) {
    const whole = i < four;
    for (let row: u32 = 0; row < rows; row += 4) {
      const source = from + <usize>row * along + (<usize>i << 2);
      const target = to + <usize>i * down + (<usize>row << 2);
      if (whole && row < fourRows) {
        const a = v128.load(source);
        const b = v128.load(source + along);
        const c = v128.load(source + 2 * along);
        const d = v128.load(source + 3 * along);
        const ab = v128.shuffle<i32>(a, b, 0, 4, 1, 5);
        const cd = v128.shuffle<i32>(c, d, 0, 4, 1, 5);
        v128.store(target, v128.shuffle<i64>(ab, cd, 0, 2));
        v128.store(target + down, v128.shuffle<i64>(ab, cd, 1, 3));
        const above = v128.shuffle<i32>(a, b, 2, 6, 3, 7);
        const below = v128.shuffle<i32>(c, d, 2, 6, 3, 7);
        v128.store(target + 2 * down, v128.shuffle<i64>(above, below, 0, 2));
        v128.store(target + 3 * down, v128.shuffle<i64>(above, below, 1, 3));
        continue;
      }
      for (let r: usize = 0; r < min<u32>(4, rows - row); r++)
        for (let k: usize = 0; k < min<u32>(4, width - i); k++)
          store<f32>(target + k * down + (r << 2), load<f32>(source + r * along + (k << 2)));
    }
  }
}
