/**
 * Decodes coded sections (SPEC.md, appendix A): the twin of `src/format/coded.ts`, which defines the order of what is coded. A module of
 * its own, for `src/format/coded-wasm.ts`, and for SIMD only, since a table is one vector. It works in pieces, so that the caller can
 * give others a turn. A section that breaks a rule ends in a trap; `fault` and `place` then tell the error and its position.
 *
 * Memory: FIRST and LEVELS, which the caller writes once; TABLES and COLUMNS; from STORED on the stored bytes, the bytes that copies may
 * come from, the section, and a word for each row of a run.
 */

/** First tables of `coded-tables.ts`, nine i32 each. */
// @ts-ignore: decorator
@inline const FIRST: usize = 0;
/** `LEVEL_OF` of `coded-tables.ts`, bytes. */
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

/** Indices of the tables, in the order of `coded-tables.ts`. */
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
/** Mean magnitude of the row, in 1/64; upper byte of the scale before. */
let mean: i32 = 0;
let likely: u32 = 0;

function refuse(why: u32, byte: usize): void {
  fault = why;
  place = <u32>(byte - section);
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

/** Decodes a symbol. Lanes are the sums S₁ to S₈. Those above the slot are those that a used table moves upwards. */
function symbol(table: usize): u32 {
  const address = TABLES + (table << 5);
  const sums = v128.load(address, 16);
  const slot = state & 0x7fff;
  const above = i16x8.gt_s(sums, i16x8.splat(<i16>slot));
  const value = <u32>(7 - popcnt(i16x8.bitmask(above)));
  const sum = address + (value << 1);
  const first = <u32>load<u16>(sum, 14);
  take((<u32>load<u16>(sum, 16) - first) * (state >>> 15) + slot - first);
  const used = <i32>load<u8>(address);
  const slow = 4 + i32(used > 3) + i32(used > 11) + i32(used > 39) - (table < LITERALS ? 0 : 2);
  store<u8>(address, used + i32(used < 40));
  const aims = i16x8.add(i16x8(16, 32, 48, 64, 80, 96, 112, -32768), v128.and(above, i16x8.splat(32640)));
  v128.store(address, i16x8.add(sums, i16x8.shr_s(i16x8.sub(aims, sums), slow)), 16);
  return value;
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
  memory.fill(COLUMNS, 0xff, MOST_COLUMNS * 2);
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

/** Reads a row's scale. */
function beginRow(): void {
  const memory = known + (<usize>row << 2);
  const scale = start + (<usize>row << 1);
  const known8 = <u32>load<u8>(memory, 2);
  if (known8) likely = known8;
  const folded = number(SCALE);
  likely = (likely + (folded & 1 ? 0 - ((folded + 1) >> 1) : folded >> 1)) & 255;
  store<u8>(scale, likely, 1);
  store<u8>(memory, likely, 2);
  if (symbol(FINE)) store<u8>(scale, bits(8));
  // The mean that the row before has reached, where this row has none yet.
  const before = <i32>load<i16>(memory);
  if (before >= 0) mean = before;
  next = 0;
  phase = INTEGER;
}

/** Decodes an integer's magnitude. `expected`: the expected magnitude, in 1/64; `byte`: its destination. */
// @ts-ignore: decorator
@inline
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

/**
 * Decodes at most `most` integers of a row. Equals `magnitude` and a bit for the sign, with the coder's state in registers: there are millions
 * of integers.
 */
function integers(most: u32): void {
  const largest: u32 = (1 << (kind - 1)) - 1;
  const mask: u32 = 2 * largest + 1;
  const last = width - next > most ? next + most : width;
  const ends = stop;
  let column = COLUMNS + ((<usize>row * width + next) << 1);
  let byte = values + ((<usize>next * kind) >> 3);
  let filled = (next * kind) & 7;
  let packed = filled ? <u32>load<u8>(byte) : 0;
  let x = state;
  let w = words;
  let r = mean;
  for (let i = next; i < last; ) {
    const seen = remember ? <i32>load<i16>(column) : -1;
    const expected = seen < 0 ? r : (r + seen) >> 1;
    let found: u32;
    if (expected > 256) {
      state = x;
      words = w;
      found = magnitude(expected, largest, byte);
      x = state;
      w = words;
    } else {
      const address = TABLES + (<usize>load<u8>(LEVELS + expected) << 5);
      const sums = v128.load(address, 16);
      const slot = x & 0x7fff;
      const above = i16x8.gt_s(sums, i16x8.splat(<i16>slot));
      found = <u32>(7 - popcnt(i16x8.bitmask(above)));
      const sum = address + (found << 1);
      const begin = <u32>load<u16>(sum, 14);
      x = (<u32>load<u16>(sum, 16) - begin) * (x >>> 15) + slot - begin;
      if (x < 0x10000) {
        sound(w < ends, 1, section);
        x = (x << 16) | <u32>load<u16>(w);
        w += 2;
      }
      const aims = i16x8.add(i16x8(16, 32, 48, 64, 80, 96, 112, -32768), v128.and(above, i16x8.splat(32640)));
      const step = i16x8.sub(aims, sums);
      const used = <i32>load<u8>(address);
      if (used < 40) {
        store<u8>(address, used + 1);
        v128.store(address, i16x8.add(sums, i16x8.shr_s(step, 4 + i32(used > 3) + i32(used > 11))), 16);
      } else v128.store(address, i16x8.add(sums, i16x8.shr_s(step, 7)), 16);
      if (found == 7) {
        state = x;
        words = w;
        found += number(MORE);
        x = state;
        w = words;
      }
      sound(found <= largest, 8, byte);
    }
    // No branch decides on the sign, since no processor could predict it. Zero has none.
    const signed = u32(found != 0);
    const minus = 0 - (x & signed);
    const value = (found ^ minus) - minus;
    x >>>= signed;
    if (x < 0x10000) {
      sound(w < ends, 1, section);
      x = (x << 16) | <u32>load<u16>(w);
      w += 2;
    }
    packed |= (value & mask) << filled;
    for (filled += kind; filled >= 8; filled -= 8, packed >>= 8) store<u8>(byte++, packed);
    const now = <i32>(found << 6);
    if (remember) {
      store<i16>(column, seen < 0 ? (r + now) >> 1 : seen + ((now - seen) >> 3));
      column += 2;
    }
    r += (now - r) >> slowness(i);
    i++;
    if (found || r > 3) continue;
    state = x;
    words = w;
    mean = r;
    const zeros = skipZeros(i, last, column);
    x = state;
    w = words;
    r = mean;
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
  state = x;
  words = w;
  mean = r;
  next = last;
  if (next < width) return;
  store<i16>(known + (<usize>row << 2), mean);
  values += (<usize>width * kind + 7) >> 3;
  if (++row < rows) phase = ROW;
  else if (more) {
    more--;
    start += stride;
    beginTensor();
  } else phase = at < end ? BYTES : END;
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
      integers(budget);
      budget -= <i32>(phase == INTEGER ? next - from : width - from) + 1;
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
      sound(words == stop && state == 0x10000, 9, section);
      return true;
    } else if (at < end) beginRun();
    else phase = END;
  }
  return false;
}
