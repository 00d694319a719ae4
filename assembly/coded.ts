/**
 * Decodes coded sections (SPEC.md, appendix A): the twin of `src/format/coded.ts`, which defines the order of what is
 * coded. A module of its own, for `src/format/coded-wasm.ts`, and for SIMD only, since a table is one vector. It works
 * in pieces, so that the caller can give others a turn. A section that breaks a rule ends in a trap; `fault` and
 * `place` then tell the error and its position. What was decoded becomes floats here too (`floats`).
 *
 * Memory: FIRST, LEVELS and GIVEN_LEVEL_OF, which the caller writes once; TABLES, PLACES, GIVEN, LANES and SYMBOLS;
 * from STORED on the stored bytes, the bytes that copies may come from, the section, and a word for each row of a run.
 */
import { decodeIntegers, f16ToF32, rowBytes, scaleBytes } from "./convert";

/** First tables of `src/format/coded.ts`, nine i32 each. */
@inline const FIRST: usize = 0;
/** `LEVEL_OF` and `GIVEN_LEVEL_OF` of `src/format/coded.ts`, bytes. */
@inline const LEVELS: usize = 5632;
@inline const GIVEN_LEVEL_OF: usize = 5904;
/**
 * Tables of 32 bytes each: how often it was used (u8), from byte 14 on the nine sums (u16). The last, 2^15, is negative
 * as an i16 and never moves.
 */
@inline const TABLES: usize = 6432;
/** Means of what was seen at each place of a tensor (i16); −1 where there is none yet. */
@inline const PLACES: usize = 12288;
@inline const MOST_PLACES: u64 = 4096;
/**
 * Given frequencies, [levels, 2^11] words: in the highest five bits the symbol, in the lowest twelve its frequency,
 * between them the distance to the first number that stands for it.
 */
@inline const GIVEN: usize = 20480;
@inline const GIVEN_LEVELS: usize = 15;
@inline const MOST_GIVEN: u32 = 15;
@inline const MOST_GIVEN_MEAN: i32 = 512;
/** States of the second to fourth lane while they are not in registers, and symbols of four lanes. */
@inline const LANES: usize = 143360;
@inline const SYMBOLS: usize = 143376;
@inline const STORED: usize = 143392;

/** Indices of the tables, in the order of `src/format/coded.ts`. */
@inline const MORE: usize = 66;
@inline const SCALE: usize = 67;
@inline const FINE: usize = 68;
@inline const SHAPE: usize = 69;
@inline const FREQUENCY: usize = 70;
@inline const LITERALS: usize = 71;
@inline const LENGTH: usize = 72;
@inline const DISTANCE: usize = 73;
@inline const HIGH: usize = 74;
@inline const MIDDLE: usize = 82;
@inline const LOW: usize = 90;
@inline const COUNT: usize = 154;

/** Reason why a section is wrong, a `FAULT` of `coded.ts`; 0 while it is valid. */
export let fault: u32 = 0;
/** Byte of the section at which it is wrong. */
export let place: u32 = 0;

let state: u32 = 0;
/** True if the section has given its frequencies. */
let begun: bool = false;
/** The next word, and the end of the words. */
let words: usize = 0;
let stop: usize = 0;

/** Begin and end of the section, and its next byte. */
let section: usize = 0;
let end: usize = 0;
let at: usize = 0;

/** The next step. */
let phase: u32 = 0;
@inline const BYTES: u32 = 0;
@inline const LITERAL_HEAD: u32 = 1;
@inline const LITERAL: u32 = 2;
@inline const COPY: u32 = 3;
@inline const ROW: u32 = 4;
@inline const INTEGER: u32 = 5;
@inline const RUN: u32 = 6;
@inline const END: u32 = 7;

/** State of bytes: their end, how many more are literal or copied, and the distance of the last copy. */
let until: usize = 0;
let left: usize = 0;
let distance: usize = 0;

/**
 * State of a run: its shape, bytes from one tensor to the next, tensors that follow this one, and whether given
 * frequencies code it.
 */
let kind: u32 = 0;
let rows: u32 = 0;
let width: u32 = 0;
let stride: usize = 0;
let more: u32 = 0;
let given: bool = false;
/**
 * The words of its rows: in the lowest byte that of the scale before, above it the mean and 1; 0 where there is none
 * yet.
 */
let known: usize = 0;

/** State of a tensor: its begin, its row, the begin of that row's integers, and the next one of them. */
let start: usize = 0;
let row: u32 = 0;
let values: usize = 0;
let next: u32 = 0;
/**
 * Mean magnitude of the row, in 1/64, or 1/1024 where frequencies are given; and the upper byte of the scale before.
 */
let mean: i32 = 0;
let likely: u32 = 0;

function refuse(why: u32, byte: usize): void {
  fault = why;
  place = <u32>(byte - section);
  unreachable();
}

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
 * The symbol that a state decodes by a table, above the state behind it, which may be below 2^16. Moves the table.
 * Lanes are the sums S₁ to S₈; those above the slot are those that a used table moves upwards. `quick`: 2 for tables
 * that move faster.
 */
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
  const picked = pick(state, TABLES + (table << 5), table < FREQUENCY ? 0 : 2);
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
  memory.fill(known, 0, <usize>rows << 2);
  given = <u64>rows * width > MOST_PLACES || bits(1) != 0;
  if (given) {
    if (!begun) give();
  } else memory.fill(PLACES, 0xff, <usize>(rows * width) << 1);
  stride = <usize>between;
  more = count - 1;
  start = at;
  at += <usize>whole;
  beginTensor();
}

function beginTensor(): void {
  row = 0;
  values = start + ((<usize>rows * 2 + 3) & ~3);
  mean = given ? 1024 : 64;
  likely = 0x3c;
  phase = ROW;
}

/** Reads the frequencies of all levels, and begins the states of the other lanes. */
function give(): void {
  for (let level: usize = 0; level < GIVEN_LEVELS; level++) {
    let to = GIVEN + (level << 13);
    let left: u32 = 2048;
    for (let i: u32 = 0; i <= MOST_GIVEN && left; i++) {
      const frequency = number(FREQUENCY);
      const all: u32 = i ? 2 * frequency : frequency;
      sound(frequency <= left && all <= left, 10, at);
      left -= all;
      to = stands(to, i, frequency);
      if (i) to = stands(to, 0 - i, frequency);
    }
    stands(to, 0 - MOST_GIVEN - 1, left);
  }
  for (let lane: usize = 0; lane < 3; lane++) {
    const first = word() << 16;
    store<u32>(LANES + (lane << 2), first | word());
    sound(first > 0, 2, section);
  }
  begun = true;
}

/** Lets a symbol stand for the next numbers of a level. @returns what is behind them */
function stands(to: usize, symbol: u32, frequency: u32): usize {
  for (let i: u32 = 0; i < frequency; i++, to += 4) store<u32>(to, (symbol << 27) | (i << 12) | frequency);
  return to;
}

/**
 * Begins a row: reads its scale. Its mean is what the row of the tensor before has reached, or else the row before it.
 */
function beginRow(): void {
  const memory = load<u32>(known + (<usize>row << 2));
  const scale = start + (<usize>row << 1);
  if (memory & 255) likely = memory & 255;
  const folded = number(SCALE);
  likely = (likely + (folded & 1 ? 0 - ((folded + 1) >> 1) : folded >> 1)) & 255;
  store<u8>(scale, likely, 1);
  if (symbol(FINE)) store<u8>(scale, bits(8));
  if (memory >> 8) mean = (memory >> 8) - 1;
  next = 0;
  phase = INTEGER;
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

@inline
function slowness(i: u32, slow: i32): i32 {
  return i < 7 ? 3 : i < 15 ? 4 : slow;
}

/** Decodes at most `most` integers of a row by tables that move. */
function byOnes(most: u32): void {
  const largest: u32 = (1 << (kind - 1)) - 1;
  const mask: u32 = 2 * largest + 1;
  const last = width - next > most ? next + most : width;
  let place = PLACES + ((<usize>row * width + next) << 1);
  let byte = values + ((<usize>next * kind) >> 3);
  let filled = (next * kind) & 7;
  let packed = filled ? <u32>load<u8>(byte) : 0;
  for (let i = next; i < last; i++) {
    const seen = <i32>load<i16>(place);
    const found = magnitude(seen < 0 ? mean : (mean + seen) >> 1, largest, byte);
    const value = found && bits(1) ? 0 - found : found;
    packed |= (value & mask) << filled;
    for (filled += kind; filled >= 8; filled -= 8, packed >>= 8) store<u8>(byte++, packed);
    const now = <i32>(found << 6);
    store<i16>(place, seen < 0 ? (mean + now) >> 1 : seen + ((now - seen) >> 3));
    place += 2;
    mean += (now - mean) >> slowness(i, 5);
  }
  if (filled) store<u8>(byte, packed);
  next = last;
  if (next == width) endRow();
}

/** Begins what follows a row. */
function endRow(): void {
  store<u32>(known + (<usize>row << 2), (<u32>(mean + 1) << 8) | likely);
  row++;
  values += (<usize>width * kind + 7) >> 3;
  if (row < rows) phase = ROW;
  else if (more) {
    more--;
    start += stride;
    beginTensor();
  } else phase = at < end ? BYTES : END;
}

/** The word of a state's number in a table of given frequencies. */
@inline
function entry(table: usize, x: u32): u32 {
  return load<u32>(table + ((x & 2047) << 2));
}

/** The state behind an entry, which may be below 2^16. */
@inline
function behind(entry: u32, x: u32): u32 {
  return (entry & 0xfff) * (x >>> 11) + ((entry >>> 12) & 2047);
}

@inline
function absolute(symbol: i32): i32 {
  return (symbol ^ (symbol >> 31)) - (symbol >> 31);
}

/**
 * Decodes at most `most` integers of a row by given frequencies, four at a time: while one state waits for its entry,
 * the others go on. States are in registers, since there are millions of integers. No branch decides on the next word,
 * which no processor could predict: whether there was one is asked behind all four. All are written out, since a
 * function gives back one value.
 */
function byFours(most: u32): void {
  const largest: u32 = (1 << (kind - 1)) - 1;
  const mask: i32 = 2 * largest + 1;
  // Larger symbols are refused, or say that more follows.
  const plain = min(largest, MOST_GIVEN);
  const last = min(width, next + (max<u32>(most, 4) & ~3));
  let a = state;
  let b = load<u32>(LANES);
  let c = load<u32>(LANES, 4);
  let d = load<u32>(LANES, 8);
  let w = words;
  let r = mean;
  let i = next;
  while (i < last) {
    if (i + 4 <= last && r >> 4 <= MOST_GIVEN_MEAN) {
      const table = GIVEN + (<usize>load<u8>(GIVEN_LEVEL_OF + (r >> 4)) << 13);
      const ea = entry(table, a);
      const eb = entry(table, b);
      const ec = entry(table, c);
      const ed = entry(table, d);
      const va = <i32>ea >> 27;
      const vb = <i32>eb >> 27;
      const vc = <i32>ec >> 27;
      const vd = <i32>ed >> 27;
      const ma = absolute(va);
      const mb = absolute(vb);
      const mc = absolute(vc);
      const md = absolute(vd);
      // Each may be as large as the most, which has all bits set.
      if (<u32>(ma | mb | mc | md) <= plain) {
        a = behind(ea, a);
        let few = a < 0x10000;
        a = select<u32>((a << 16) | <u32>load<u16>(w), a, few);
        w += <usize>few << 1;
        b = behind(eb, b);
        few = b < 0x10000;
        b = select<u32>((b << 16) | <u32>load<u16>(w), b, few);
        w += <usize>few << 1;
        c = behind(ec, c);
        few = c < 0x10000;
        c = select<u32>((c << 16) | <u32>load<u16>(w), c, few);
        w += <usize>few << 1;
        d = behind(ed, d);
        few = d < 0x10000;
        d = select<u32>((d << 16) | <u32>load<u16>(w), d, few);
        w += <usize>few << 1;
        if (w > stop) {
          words = w;
          refuse(1, section);
        }
        r += (((ma + mb + mc + md) << 10) - (r << 2)) >> slowness(i, 6);
        // Zeros were there.
        const byte = values + ((<usize>i * kind) >> 3);
        const low = (va & mask) | ((vb & mask) << kind);
        const high = (vc & mask) | ((vd & mask) << kind);
        if (kind == 8) store<u32>(byte, low | (high << 16));
        else if (kind == 4) store<u16>(byte, low | (high << 8));
        else store<u16>(byte, load<u16>(byte) | ((low | (high << 6)) << ((i * 3) & 7)));
        i += 4;
        continue;
      }
    }
    state = a;
    store<u32>(LANES, b);
    store<u32>(LANES, c, 4);
    store<u32>(LANES, d, 8);
    words = w;
    mean = r;
    const lanes = min<u32>(4, last - i);
    rare(i, lanes, largest);
    i += lanes;
    a = state;
    b = load<u32>(LANES);
    c = load<u32>(LANES, 4);
    d = load<u32>(LANES, 8);
    w = words;
    r = mean;
  }
  state = a;
  store<u32>(LANES, b);
  store<u32>(LANES, c, 4);
  store<u32>(LANES, d, 8);
  words = w;
  mean = r;
  next = last;
  if (next == width) endRow();
}

/** Decodes four integers where one is large, or the last ones of a row. */
function rare(i: u32, lanes: u32, largest: u32): void {
  let shift: u32 = 0;
  while (mean >> (4 + shift) > MOST_GIVEN_MEAN) shift++;
  const table = GIVEN + (<usize>load<u8>(GIVEN_LEVEL_OF + (mean >> (4 + shift))) << 13);
  for (let lane: u32 = 0; lane < lanes; lane++) {
    enter(lane);
    const found = entry(table, state);
    take(behind(found, state));
    store<i32>(SYMBOLS + (<usize>lane << 2), <i32>found >> 27);
    enter(lane);
  }
  let sum: u32 = 0;
  for (let lane: u32 = 0; lane < lanes; lane++) {
    enter(lane);
    const symbol = load<i32>(SYMBOLS + (<usize>lane << 2));
    const bit = (<usize>i + lane) * kind;
    const byte = values + (bit >> 3);
    let found = <u32>absolute(symbol);
    const other = found > MOST_GIVEN;
    if (other) found += number(MORE);
    sound(found <= largest, 8, byte);
    found = (found << shift) | bits(shift);
    sound(found <= largest, 8, byte);
    sum += found;
    const minus = symbol && !other ? symbol < 0 : found ? bits(1) != 0 : false;
    const field = ((minus ? 0 - found : found) & (2 * largest + 1)) << (<u32>bit & 7);
    store<u8>(byte, <u32>load<u8>(byte) | field);
    if (field > 255) store<u8>(byte, <u32>load<u8>(byte, 1) | (field >> 8), 1);
    enter(lane);
  }
  mean += (<i32>(sum << 10) - <i32>lanes * mean) >> slowness(i, 6);
}

/** Lets a lane's state be the one that is read from, or puts it back: they change places with the first. */
function enter(lane: u32): void {
  if (!lane) return;
  const waits = LANES + (<usize>(lane - 1) << 2);
  const found = load<u32>(waits);
  store<u32>(waits, state);
  state = found;
}

/**
 * Begins to decode at STORED: `stored` bytes, whose head was checked, then `before` bytes that copies may come from,
 * then the section of `size` bytes, which are zeros. The caller has provided the memory; all three together are below
 * 2^30.
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
  begun = false;
  store<u32>(LANES, 0x10000, 12);
  state = word() << 16;
  state |= word();
  sound(state >= 0x10000, 2, section);
}

/** Decodes about `most` more symbols. Returns whether the section is complete. */
export function decode(most: u32): bool {
  for (let budget = <i32>most; budget > 0; ) {
    if (phase == INTEGER) {
      const from = next;
      if (given) byFours(budget);
      else byOnes(budget);
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
      sound(words == stop && state == 0x10000 && (!begun || i32x4.all_true(i32x4.eq(v128.load(LANES), i32x4.splat(0x10000)))), 9, section);
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
