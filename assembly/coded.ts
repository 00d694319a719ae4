/**
 * The decoder of coded sections (SPEC.md, section 5.1): the twin of `src/format/coded.ts`, which says what is coded in which order. A
 * module of its own, for `src/format/coded-wasm.ts`, and for SIMD alone: a table is one vector. Whatever is not as it must be is a trap, and the JavaScript
 * decoder then says what it is.
 *
 * Memory: what the caller writes once, FIRST and LEVELS; TABLES and COLUMNS; from STORED on the stored bytes, the bytes that copies may be
 * of, the section, and a word for each row of a run.
 */

/** First tables of `coded-tables.ts`, nine i32 each. */
// @ts-ignore: decorator
@inline const FIRST: usize = 0;
/** `LEVEL_OF` of `coded-tables.ts`, bytes. */
// @ts-ignore: decorator
@inline const LEVELS: usize = 5632;
/** Of each, 32 bytes: how often it was used (u8), from byte 14 on the nine sums (u16). The last, 2^15, is negative as an i16 and never moves. */
// @ts-ignore: decorator
@inline const TABLES: usize = 6144;
/** Means of the numbers of a tensor (i16); −1 where there is none yet. */
// @ts-ignore: decorator
@inline const COLUMNS: usize = 12288;
// @ts-ignore: decorator
@inline const MOST_COLUMNS: u32 = 4096;
// @ts-ignore: decorator
@inline const STORED: usize = 20480;

/** The tables, by the order of `coded-tables.ts`. */
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

let state: u32 = 0;
/** The next word, and where there are no more. */
let words: usize = 0;
let stop: usize = 0;

// @ts-ignore: decorator
@inline
function sound(condition: bool): void {
  if (!condition) unreachable();
}

function word(): u32 {
  sound(words < stop);
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

/** Lanes are the sums S₁ to S₈. Those above the slot are those that a used table moves upwards. */
function symbol(table: usize): u32 {
  const address = TABLES + (table << 5);
  const sums = v128.load(address, 16);
  const slot = state & 0x7fff;
  const above = i16x8.gt_s(sums, i16x8.splat(<i16>slot));
  const value = <u32>(7 - popcnt(i16x8.bitmask(above)));
  const at = address + (value << 1);
  const start = <u32>load<u16>(at, 14);
  take((<u32>load<u16>(at, 16) - start) * (state >>> 15) + slot - start);
  const used = <i32>load<u8>(address);
  const slow = 4 + i32(used > 3) + i32(used > 11) + i32(used > 39) - (table < LITERALS ? 0 : 2);
  store<u8>(address, used + i32(used < 40));
  const aims = i16x8.add(i16x8(16, 32, 48, 64, 80, 96, 112, -32768), v128.and(above, i16x8.splat(32640)));
  v128.store(address, i16x8.add(sums, i16x8.shr_s(i16x8.sub(aims, sums), slow)), 16);
  return value;
}

/** A number below 2^31 − 1. */
function number(table: usize): u32 {
  let count = symbol(table);
  if (count == 7) count = min<u32>(30, bits(5) + 7);
  const low = min<u32>(count, 16);
  const high = bits(count - low);
  return ((1 << count) | (high << low) | bits(low)) - 1;
}

/** Bytes as they are, and copies of earlier ones. Returns where they end. `first`: where copies may begin. */
function bytes(first: usize, section: usize, start: usize, size: usize): usize {
  const end = start + number(LENGTH);
  sound(end <= size);
  let at = start;
  let distance: u32 = 0;
  while (at < end) {
    const next = at + number(LITERALS);
    sound(next <= end);
    for (; at < next; at++) {
      const last = at > section ? <usize>load<u8>(at - 1) : 0;
      const high = symbol(HIGH + (last >> 5));
      const middle = symbol(MIDDLE + high);
      store<u8>(at, (high << 5) | (middle << 2) | (symbol(LOW + 8 * high + middle) & 3));
    }
    if (at == end) break;
    const length = number(LENGTH) + 4;
    const far = number(DISTANCE);
    if (far) distance = far;
    sound(distance > 0 && distance <= <u32>(at - first) && length <= <u32>(end - at));
    for (const until = at + length; at < until; at++) store<u8>(at, load<u8>(at - distance));
  }
  return end;
}

/** An integer's magnitude; one above the largest for all that are too large. `mean`: what is expected of it, in 1/64. */
// @ts-ignore: decorator
@inline
function magnitude(mean: u32, most: u32): u32 {
  let shift: u32 = 0;
  while (mean >> shift > 256) shift++;
  let found = symbol(shift * 11 + load<u8>(LEVELS + (mean >> shift)));
  if (found == 7) found = min<u32>(most, number(MORE) + 7);
  return min<u32>(most, shift ? (found << shift) | bits(shift) : found);
}

/** A tensor. `kind`: bits of an integer. `known`: a word for each row, its mean (i16) and the upper byte of its scale. */
function tensor(start: usize, kind: u32, rows: u32, width: u32, known: usize, remember: bool): void {
  const most: u32 = 1 << (kind - 1);
  let to = start + ((rows * 2 + 3) & ~3);
  let before: i32 = 64;
  let likely: u32 = 0x3c;
  let column = COLUMNS;
  for (let row: u32 = 0; row < rows; row++, known += 4, start += 2) {
    const known8 = <u32>load<u8>(known, 2);
    if (known8) likely = known8;
    const folded = number(SCALE);
    likely = (likely + (folded & 1 ? 0 - ((folded + 1) >> 1) : folded >> 1)) & 255;
    store<u8>(start, likely, 1);
    store<u8>(known, likely, 2);
    if (symbol(FINE)) store<u8>(start, bits(8));
    let mean = <i32>load<i16>(known);
    if (mean < 0) mean = before;
    let packed: u32 = 0;
    let filled: u32 = 0;
    for (let i: u32 = 0; i < width; i++) {
      const seen = remember ? <i32>load<i16>(column) : -1;
      const found = magnitude(seen < 0 ? mean : (mean + seen) >> 1, most);
      const value = found && bits(1) ? 0 - found : found;
      packed |= (value & (2 * most - 1)) << filled;
      for (filled += kind; filled >= 8; filled -= 8, packed >>= 8) store<u8>(to++, packed);
      const now = <i32>(found << 6);
      if (remember) {
        store<i16>(column, seen < 0 ? (mean + now) >> 1 : seen + ((now - seen) >> 3));
        column += 2;
      }
      mean += (now - mean) >> (i < 7 ? 3 : i < 15 ? 4 : 5);
    }
    if (filled) store<u8>(to++, packed);
    store<i16>(known, mean);
    before = mean;
  }
}

/** Tensors of one shape and type. Returns where they end. */
function run(at: usize, end: usize): usize {
  const type = bits(2);
  sound(type < 3);
  const kind: u32 = type == 0 ? 8 : type == 1 ? 4 : 3;
  const rows = number(SHAPE), width = number(SHAPE), count = number(SHAPE);
  const step: u64 = bits(1) ? 16 : 4;
  // Of numbers below 2^31 no product leaves 64 bits.
  const values = (<u64>rows * ((<u64>width * kind + 7) >> 3) + 3) & ~3;
  const needed = ((<u64>rows * 2 + 3) & ~3) + values;
  const left = <u64>(end - at);
  sound(count > 0 && rows > 0 && needed <= left);
  const stride = (needed + step - 1) & (0 - step);
  const whole = (<u64>count - 1) * stride + needed;
  sound(whole <= left);
  const known = (end + 3) & ~3;
  const pages = <i32>((known + (<usize>rows << 2) + 0xffff) >> 16) - memory.size();
  if (pages > 0) sound(memory.grow(pages) >= 0);
  for (let i: u32 = 0; i < rows; i++) store<u32>(known + (<usize>i << 2), 0xffff);
  const remember = <u64>rows * width <= MOST_COLUMNS;
  memory.fill(COLUMNS, 0xff, MOST_COLUMNS * 2);
  for (let i: u32 = 0; i < count; i++) tensor(at + <usize>i * <usize>stride, kind, rows, width, known, remember);
  return at + <usize>whole;
}

/**
 * Decodes what lies at STORED: `stored` bytes, whose head was checked, and `before` bytes that copies may be of. The section has `size` bytes, behind those, in
 * memory that is there; all three together are below 2^30.
 */
export function decode(stored: usize, before: usize, size: usize): void {
  for (let table: usize = 0; table < COUNT; table++) {
    const address = TABLES + (table << 5);
    store<u8>(address, 0);
    for (let i: usize = 0; i < 9; i++) store<u16>(address + 2 * i, load<u16>(FIRST + 36 * table + 4 * i), 14);
  }
  stop = STORED + stored;
  words = STORED + 8;
  state = word() << 16;
  state |= word();
  sound(state >= 0x10000);
  const section = stop + before;
  const end = section + size;
  memory.fill(section, 0, size);
  for (let at = section; at < end; ) {
    at = bytes(stop, section, at, end);
    if (at < end) at = run(at, end);
  }
  sound(words == stop && state == 0x10000);
}
