// @ts-nocheck: it reads what no type describes
/**
 * A second reader of coded sections, written from the text of SPEC.md, appendix A: slow, with bigints, and without a line of the
 * product's.
 */
const LEVELS = [
  [0, [31897, 32672, 32688, 32704, 32720, 32736, 32752]],
  [4, [29879, 32672, 32688, 32704, 32720, 32736, 32752]],
  [8, [27029, 32672, 32688, 32704, 32720, 32736, 32752]],
  [15, [23060, 32634, 32688, 32704, 32720, 32736, 32752]],
  [24, [18047, 31955, 32688, 32704, 32720, 32736, 32752]],
  [38, [13182, 29051, 32448, 32704, 32720, 32736, 32752]],
  [56, [9338, 23833, 30543, 32399, 32706, 32736, 32752]],
  [83, [6559, 18123, 26052, 30279, 32031, 32595, 32736]],
  [120, [4582, 13198, 20365, 25637, 29067, 31041, 32046]],
  [174, [3204, 9423, 15106, 19997, 23960, 26984, 29157]],
  [248, [2247, 6674, 10909, 14843, 18390, 21496, 24136]],
];

/** Levels of given frequencies begin at these means. */
const GIVEN = [0, 3, 6, 10, 16, 24, 34, 46, 62, 83, 112, 150, 205, 280, 380];

/** @param {Uint8Array} bytes @param {Uint8Array} [before] as `decodeSection` takes it @returns {Uint8Array} */
export function readCoded(bytes, before = new Uint8Array()) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (view.getUint32(0, true) !== 0x33444f43) throw new Error("no COD3");
  const becomes = view.getUint32(4, true);
  if (becomes > 16 * bytes.length + 4096) throw new Error(`${becomes} bytes are too many for ${bytes.length}`);
  const out = new Uint8Array(becomes);
  /** Whether a position is inside, since changed streams are read too. */
  const fits = (end) => {
    if (!(end <= out.length)) throw new Error(`${end} bytes do not fit into ${out.length}`);
    return end;
  };
  let at = 8;
  const word = () => {
    at += 2;
    return BigInt(view.getUint16(at - 2, true));
  };
  const state = () => {
    const found = (word() << 16n) | word();
    if (found < 65536n) throw new Error(`a state begins as ${found}`);
    return found;
  };
  let x = state();
  /** The states that wait: of three lanes, or of all else while one of these is read. */
  const waits = [];
  const swap = (lane) => {
    if (lane > 0) [x, waits[lane - 1]] = [waits[lane - 1], x];
  };
  const renew = () => {
    if (x < 65536n) x = (x << 16n) | word();
  };
  const bits = (count) => {
    const value = Number(x % (1n << BigInt(count)));
    x >>= BigInt(count);
    renew();
    return value;
  };
  /** A table; quick ones move faster. */
  const begin = (level, quick = false) => ({ sums: [0, ...LEVELS[level][1], 32768], quick, uses: 0 });
  const symbol = (table) => {
    const s = Number(x % 32768n);
    let v = 0;
    while (table.sums[v + 1] <= s) v++;
    x = BigInt(table.sums[v + 1] - table.sums[v]) * (x / 32768n) + BigInt(s - table.sums[v]);
    renew();
    const q = (table.uses < 4 ? 4 : table.uses < 12 ? 5 : table.uses < 40 ? 6 : 7) - (table.quick ? 2 : 0);
    for (let i = 1; i <= 7; i++) {
      const aim = i <= v ? 16 * i : 32768 - 16 * (8 - i);
      table.sums[i] += Math.floor((aim - table.sums[i]) / 2 ** q);
    }
    table.uses++;
    return v;
  };
  const number = (table) => {
    let c = symbol(table);
    if (c === 7) c = Math.min(30, 7 + bits(5));
    const l = Math.min(c, 16);
    const h = bits(c - l);
    const g = bits(l);
    return 2 ** c + h * 2 ** l + g - 1;
  };
  const integers = Array.from({ length: 66 }, (_, i) => begin(i % 11));
  const [more, scale, fine, shape] = Array.from({ length: 4 }, () => begin(7));
  const tables = (count) => Array.from({ length: count }, () => begin(7, true));
  const [literals, length, distance] = tables(3);
  const [highs, middles, lows] = [tables(8), tables(8), tables(64)];

  /** Given frequencies by level: how many of 2^11 numbers stand for 0, for 1 and −1 each, … and for what is none of these. */
  let given;
  const give = () => {
    const table = begin(7, true);
    given = GIVEN.map(() => {
      const counts = [];
      let left = 2048;
      while (counts.length < 16 && left > 0) {
        const count = number(table);
        left -= counts.length > 0 ? 2 * count : count;
        if (left < 0) throw new Error("frequencies of more than 2048");
        counts.push(count);
      }
      return { counts, left };
    });
    for (let lane = 1; lane < 4; lane++) waits.push(state());
  };
  /** A symbol, or undefined for any that has none. */
  const givenSymbol = ({ counts, left }) => {
    const order = counts.flatMap((count, a) =>
      a > 0
        ? [
            { a, count },
            { a: -a, count },
          ]
        : [{ a, count }],
    );
    let s = Number(x % 2048n);
    for (const { a, count } of [...order, { a: undefined, count: left }]) {
      if (s < count) {
        x = BigInt(count) * (x / 2048n) + BigInt(s);
        renew();
        return a;
      }
      s -= count;
    }
    throw new Error("no symbol");
  };
  const slowness = (i, slow) => 2 ** (i < 7 ? 3 : i < 15 ? 4 : slow);

  const integer = (e) => {
    let k = 0;
    while (Math.floor(e / 2 ** k) > 256) k++;
    const level = LEVELS.findLastIndex(([from]) => from <= Math.floor(e / 2 ** k));
    let a = symbol(integers[11 * k + level]);
    if (a === 7) a = 7 + number(more);
    const magnitude = a * 2 ** k + bits(k);
    return magnitude > 0 && bits(1) === 1 ? -magnitude : magnitude;
  };

  let end = 0;
  while (end < out.length) {
    const stop = fits(end + number(length));
    let back = 0;
    while (end < stop) {
      const literal = fits(end + number(literals));
      while (end < literal) {
        const high = symbol(highs[end > 0 ? out[end - 1] >> 5 : 0]);
        const middle = symbol(middles[high]);
        out[end++] = 32 * high + 4 * middle + (symbol(lows[8 * high + middle]) % 4);
      }
      if (end === stop) break;
      const count = 4 + number(length);
      back = number(distance) || back;
      fits(end + count);
      for (let n = 0; n < count; n++, end++) out[end] = back > end ? before.at(end - back) : out[end - back];
    }
    if (end === out.length) break;
    const size = [8, 4, 3][bits(2)];
    const [rows, width, count] = [number(shape), number(shape), number(shape)];
    const step = bits(1) === 1 ? 16 : 4;
    const start = end;
    fits(start + rows * width * (size / 8) + (count - 1) * step);
    fits(start + 2 * rows * count);
    const fours = rows * width > 4096 || bits(1) === 1;
    if (fours && !given) give();
    // A mutant may name more rows than memory has: values come as rows are read.
    const uppers = [];
    const means = [];
    const places = [];
    const stride = Math.ceil((width * size) / 8);
    const bytesOf = 4 * Math.ceil((2 * rows) / 4) + 4 * Math.ceil((rows * stride) / 4);
    for (let n = 0; n < count; n++) {
      const tensor = start + n * Math.ceil(bytesOf / step) * step;
      let [above, last] = [fours ? 1024 : 64, 0x3c];
      for (let row = 0; row < rows; row++) {
        const u = number(scale);
        const d = u % 2 === 0 ? u / 2 : -(u + 1) / 2;
        last = ((uppers[row] || last) + d) & 255;
        uppers[row] = last;
        out[tensor + 2 * row + 1] = last;
        out[tensor + 2 * row] = symbol(fine) === 0 ? 0 : bits(8);
        let mean = means[row] ?? above;
        const write = (i, value) => {
          if (Math.abs(value) >= 2 ** (size - 1)) throw new Error(`${value} in ${size} bits`);
          const first = 8 * (tensor + 4 * Math.ceil((2 * rows) / 4) + row * stride) + i * size;
          for (let b = 0; b < size; b++) if ((value >> b) & 1) out[(first + b) >> 3] |= 1 << ((first + b) & 7);
        };
        for (let i = 0; !fours && i < width; i++) {
          const c = places[row * width + i];
          const value = integer(c === undefined ? mean : Math.floor((mean + c) / 2));
          write(i, value);
          const seen = 64 * Math.abs(value);
          places[row * width + i] = c === undefined ? Math.floor((mean + seen) / 2) : c + Math.floor((seen - c) / 8);
          mean += Math.floor((seen - mean) / slowness(i, 5));
        }
        for (let i = 0; fours && i < width; i += 4) {
          let k = 0;
          while (Math.floor(mean / 2 ** (4 + k)) > 512) k++;
          const level = GIVEN.findLastIndex((from) => from <= Math.floor(mean / 2 ** (4 + k)));
          const symbols = [];
          for (let lane = 0; lane < Math.min(4, width - i); lane++) {
            swap(lane);
            symbols.push(givenSymbol(given[level]));
            swap(lane);
          }
          let sum = 0;
          for (const [lane, found] of symbols.entries()) {
            swap(lane);
            const a = found === undefined ? 16 + number(more) : Math.abs(found);
            const magnitude = a * 2 ** k + bits(k);
            const negative = found ? found < 0 : magnitude > 0 && bits(1) === 1;
            write(i + lane, negative ? -magnitude : magnitude);
            sum += magnitude;
            swap(lane);
          }
          mean += Math.floor((1024 * sum - symbols.length * mean) / slowness(i, 6));
        }
        means[row] = above = mean;
      }
      end = tensor + bytesOf;
    }
  }
  if (x !== 65536n || waits.some((state) => state !== 65536n) || at !== bytes.length)
    throw new Error(`ends with ${x} at ${at} of ${bytes.length}`);
  return out;
}
