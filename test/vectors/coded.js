// @ts-nocheck: it writes what no type allows
/** Writes coded sections for the vectors, from SPEC.md, appendix A, alone. Slow: it uses no tables. */

const BITS = { int8: 8, int4: 4, int3: 3 };
const KINDS = ["int8", "int4", "int3"];
const LEVELS = [
  [0, 31897, 32672, 32688, 32704, 32720, 32736, 32752],
  [4, 29879, 32672, 32688, 32704, 32720, 32736, 32752],
  [8, 27029, 32672, 32688, 32704, 32720, 32736, 32752],
  [15, 23060, 32634, 32688, 32704, 32720, 32736, 32752],
  [24, 18047, 31955, 32688, 32704, 32720, 32736, 32752],
  [38, 13182, 29051, 32448, 32704, 32720, 32736, 32752],
  [56, 9338, 23833, 30543, 32399, 32706, 32736, 32752],
  [83, 6559, 18123, 26052, 30279, 32031, 32595, 32736],
  [120, 4582, 13198, 20365, 25637, 29067, 31041, 32046],
  [174, 3204, 9423, 15106, 19997, 23960, 26984, 29157],
  [248, 2247, 6674, 10909, 14843, 18390, 21496, 24136],
];
/** Levels of given frequencies begin at these means. */
const GIVEN_LEVELS = [0, 3, 6, 10, 16, 24, 34, 46, 62, 83, 112, 150, 205, 280, 380];

/** Tables that move faster. */
const QUICK = /^(frequency|literals|length|distance|high|middle|low)/;

/** Records the steps that a reader takes, in its order. */
function recorder() {
  const steps = [];
  /** The state that a step is coded by: of four. */
  const to = { steps, state: 0 };
  const tables = new Map();
  const symbol = (name, level, v) => {
    if (!tables.has(name)) tables.set(name, { sums: [0, ...LEVELS[level].slice(1), 32768], uses: 0 });
    const table = tables.get(name);
    steps.push({ start: table.sums[v], width: table.sums[v + 1] - table.sums[v], of: 15, state: to.state });
    const q = (table.uses < 4 ? 4 : table.uses < 12 ? 5 : table.uses < 40 ? 6 : 7) - (QUICK.test(name) ? 2 : 0);
    for (let i = 1; i <= 7; i++) {
      const aim = i <= v ? 16 * i : 32768 - 16 * (8 - i);
      table.sums[i] += Math.floor((aim - table.sums[i]) / 2 ** q);
    }
    table.uses++;
  };
  const bits = (count, value) => steps.push({ start: value, width: 1, of: count, state: to.state });
  const number = (name, value) => {
    const c = Math.floor(Math.log2(value + 1));
    symbol(name, 7, Math.min(c, 7));
    if (c >= 7) bits(5, c - 7);
    const low = Math.min(c, 16);
    bits(c - low, Math.floor((value + 1 - 2 ** c) / 2 ** low));
    bits(low, (value + 1) % 2 ** low);
  };
  /** A symbol of given frequencies: from −15 to 15, or undefined for any other. */
  const given = (level, value) => {
    let start = 0;
    for (const one of GIVEN_ORDER) {
      const width = to.frequencies[level][one === undefined ? 16 : Math.abs(one)];
      if (one === value) steps.push({ start, width, of: 11, state: to.state });
      start += width;
    }
  };
  /** Gives frequencies, [level][0 to 15, all others], and begins the other states. */
  const give = (frequencies) => {
    if (to.frequencies) return;
    to.frequencies = frequencies;
    for (const level of frequencies) {
      let left = 2048;
      for (let a = 0; a < 16 && left > 0; a++) {
        number("frequency", level[a]);
        left -= (a > 0 ? 2 : 1) * level[a];
      }
    }
    steps.push({ begins: true });
  };
  return Object.assign(to, { symbol, bits, number, given, give });
}

const GIVEN_ORDER = [0, ...Array.from({ length: 30 }, (_, i) => (i % 2 ? -1 : 1) * ((i >> 1) + 1)), undefined];

/**
 * Words of steps: each passes through its state, from the last to the first.
 * @param last the states behind the last steps, 2^16 in a valid section
 * @param low which state begins below 2^16, from which a reader that accepts it reads the same
 */
function wordsOf(steps, last = [], low = undefined) {
  const states = [0, 1, 2, 3].map((i) => last[i] ?? 65536n);
  const words = [];
  const lowest = steps.findIndex(({ state }) => state === low);
  const put = (state) => {
    words.push(Number(states[state] & 0xffffn));
    states[state] >>= 16n;
  };
  for (let i = steps.length - 1; i >= 0; i--) {
    const { start, width, of, state, begins } = steps[i];
    if (begins) {
      for (const state of [3, 3, 2, 2, 1, 1]) put(state);
      continue;
    }
    if (i === lowest) put(state);
    const total = 1n << BigInt(of);
    const f = BigInt(width);
    while (states[state] >= (f << 32n) / total) put(state);
    states[state] = (states[state] / f) * total + (states[state] % f) + BigInt(start);
  }
  put(0);
  put(0);
  return words.reverse();
}

/**
 * Codes a section.
 * @param tensors of it in order, `{ at, type, rows, width }`; those of floats are stored as bytes
 * @param step each begins at a multiple of it
 * @param before bytes before the section: for bases and blobs the basis description
 * @param how see `wordsOf`; `alike`: whether tensors of few integers have given frequencies too; `first`: the first
 *   integer of a tensor, in the place of its own
 */
export function coded(
  section,
  tensors,
  step,
  before = new Uint8Array(),
  { last, low, alike = false, frequencies = everySymbol(), first } = {},
) {
  const to = recorder();
  const all = Uint8Array.of(...before, ...section);
  const copyTo = (at, end) => longestCopy(all, before.length + at, before.length + end);
  let at = 0;
  const plain = (end) => {
    to.number("length", end - at);
    let distance = 0;
    while (at < end) {
      let next = at;
      while (next < end && copyTo(next, end).length < 4) next++;
      to.number("literals", next - at);
      for (; at < next; at++) byte(to, section[at - 1] ?? 0, section[at]);
      if (at === end) break;
      const copy = copyTo(at, end);
      to.number("length", copy.length - 4);
      to.number("distance", copy.distance === distance ? 0 : copy.distance);
      distance = copy.distance;
      at += copy.length;
    }
  };
  for (const { at: start, type, rows, width } of tensors) {
    if (!(type in BITS) || rows === 0) continue;
    plain(start);
    to.bits(2, KINDS.indexOf(type));
    for (const n of [rows, width, 1]) to.number("shape", n);
    to.bits(1, step === 16 ? 1 : 0);
    if (rows * width <= 4096) to.bits(1, alike ? 1 : 0);
    const fours = alike || rows * width > 4096;
    if (fours) to.give(frequencies);
    at = integers(to, section, start, BITS[type], rows, width, fours, first);
  }
  if (at < section.length) plain(section.length);
  return sectionOf(section.length, to.steps, last, low);
}

/** Codes the steps that `tell` records, as a section that claims `size` bytes; for sections that no writer writes. */
export function told(size, tell, last, low) {
  const to = recorder();
  tell(to);
  return sectionOf(size, to.steps, last, low);
}

function sectionOf(size, steps, last, low) {
  const words = wordsOf(steps, last, low);
  const bytes = new Uint8Array(8 + 2 * words.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, 0x33444f43, true);
  view.setUint32(4, size, true);
  words.forEach((word, i) => view.setUint16(8 + 2 * i, word, true));
  return bytes;
}

/** Writes a byte in 3, 3 and 2 bits. */
export function byte(to, last, value) {
  const [high, middle] = [value >> 5, (value >> 2) & 7];
  to.symbol(`high ${last >> 5}`, 7, high);
  to.symbol(`middle ${high}`, 7, middle);
  to.symbol(`low ${8 * high + middle}`, 7, value & 3);
}

/** Finds the longest copy for a place before `end`, by searching everything in front of it. */
function longestCopy(all, place, end) {
  let best = { length: 0, distance: 0 };
  for (let from = place - 1; from >= 0; from--) {
    let length = 0;
    while (place + length < end && all[from + length] === all[place + length]) length++;
    if (length > best.length) best = { length, distance: place - from };
  }
  return best;
}

const slowness = (i, slow) => 2 ** (i < 7 ? 3 : i < 15 ? 4 : slow);

/** Records the i-th integer of a row without knowledge of its place. @returns the mean behind it */
export function integer(to, mean, i, value) {
  const magnitude = Math.abs(value);
  let k = 0;
  while (Math.floor(mean / 2 ** k) > 256) k++;
  const level = LEVELS.findLastIndex(([from]) => from <= Math.floor(mean / 2 ** k));
  const a = Math.floor(magnitude / 2 ** k);
  to.symbol(`integers ${11 * k + level}`, level, Math.min(a, 7));
  if (a >= 7) to.number("more", a - 7);
  to.bits(k, magnitude % 2 ** k);
  if (magnitude > 0) to.bits(1, value < 0 ? 1 : 0);
  return mean + Math.floor((64 * magnitude - mean) / slowness(i, 5));
}

/** Records up to four integers of a row by given frequencies. @returns the mean behind them */
function four(to, mean, i, values) {
  let k = 0;
  while (Math.floor(mean / 2 ** (4 + k)) > 512) k++;
  const level = GIVEN_LEVELS.findLastIndex((from) => from <= Math.floor(mean / 2 ** (4 + k)));
  const highs = values.map((value) => Math.floor(Math.abs(value) / 2 ** k));
  for (const [state, high] of highs.entries()) {
    to.state = state;
    to.given(level, high > 15 ? undefined : values[state] < 0 && high > 0 ? -high : high);
  }
  for (const [state, high] of highs.entries()) {
    to.state = state;
    const magnitude = Math.abs(values[state]);
    if (high > 15) to.number("more", high - 16);
    to.bits(k, magnitude % 2 ** k);
    if (magnitude > 0 && (high === 0 || high > 15)) to.bits(1, values[state] < 0 ? 1 : 0);
  }
  to.state = 0;
  const sum = values.reduce((all, value) => all + Math.abs(value), 0);
  return mean + Math.floor((1024 * sum - values.length * mean) / slowness(i, 6));
}

/** Frequencies that suit no level well, but every symbol. */
export function everySymbol() {
  return GIVEN_LEVELS.map((_, level) => {
    const falling = Array.from({ length: 15 }, (_, i) => 1 + Math.floor((90 + level) * 0.7 ** i));
    const others = 40 + level;
    return [2048 - others - 2 * falling.reduce((a, b) => a + b), ...falling, others];
  });
}

/** The integer at a place of a packed row. */
function integerAt(section, start, size, i) {
  let field = 0;
  for (let b = 0; b < size; b++) {
    const bit = 8 * start + i * size + b;
    field |= ((section[bit >> 3] >> (bit & 7)) & 1) << b;
  }
  return field >= 2 ** (size - 1) ? field - 2 ** size : field;
}

/** Records the rows of one tensor, each a scale and integers. Returns its end. */
function integers(to, section, start, size, rows, width, fours, first) {
  const values = start + 4 * Math.ceil((2 * rows) / 4);
  const stride = Math.ceil((width * size) / 8);
  let [upper, mean] = [0x3c, fours ? 1024 : 64];
  for (let row = 0; row < rows; row++) {
    const [low, high] = [section[start + 2 * row], section[start + 2 * row + 1]];
    const d = high - upper;
    to.number("scale", d < 0 ? -2 * d - 1 : 2 * d);
    upper = high;
    to.symbol("fine", 7, low === 0 ? 0 : 1);
    if (low !== 0) to.bits(8, low);
    const all = Array.from({ length: width }, (_, i) => integerAt(section, values + row * stride, size, i));
    if (fours && row === 0 && first !== undefined) all[0] = first;
    if (fours) for (let i = 0; i < width; i += 4) mean = four(to, mean, i, all.slice(i, i + 4));
    else for (const [i, value] of all.entries()) mean = integer(to, mean, i, value);
  }
  return values + 4 * Math.ceil((rows * stride) / 4);
}
