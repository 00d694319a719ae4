/**
 * Bytes against behaviour of entropy-coded packs: those that share components, compared with those that share nothing, which are adapters
 * cut by their own SVD with the same coder, steps, heads and directory. The difference is the gain of sharing alone.
 *
 * Bytes and ΔW errors are measured for whole series of packs. These two, never test rows, choose which packs are asked: some steps of the
 * packs that share nothing, and of ours the pack with the least ΔW error within the bytes of each.
 */
import { openPack } from "eigenlora";
import { packOf } from "../../lib/adapters.js";
import { measure } from "./measure.js";
import { CODED, codedSeries, nameOf, SVD_CODED } from "./ways.js";

/**
 * @typedef {import("./measure.js").Row} Row
 * @typedef {import("./ways.js").Packed} Packed
 * @typedef {import("./ways.js").Way} Way
 * @typedef {object} Curve
 * @property {string} suite
 * @property {number} n adapters
 * @property {number} most bytes
 * @property {Packed[][]} series each from few bytes to many
 * @property {readonly number[]} [asked] steps of what shares nothing. Default: all
 * @property {boolean} judges whether packs are judged on training texts
 * @property {boolean} answers whether tasks are asked. Otherwise ΔW errors are all
 * @typedef {{ theirs: Row, ours: Row | undefined, judged: Row | undefined }} Pair within the bytes of `theirs`: what loses least of ΔW,
 *   and of those that were judged what answers training texts most like the adapters
 */

/** @type {Way} */
const LORA = { kind: "each", type: "f32", head: "f32" };
const SVD = { k: 0, privateTerms: 16 };

/** Components of each number, ranks and private terms. @param {readonly number[]} ks @param {readonly number[]} ranks */
const shapes = (ks, ranks) => ks.flatMap((k) => ranks.map((rank) => ({ k, rank })));

const MINILM = {
  judges: true,
  answers: true,
  most: 300_000,
  series: [
    ...codedSeries(0.08, 2, [SVD]),
    ...codedSeries(0.0668, 3, [...shapes([16, 32, 48], [2, 4]), { k: 24, rank: 3, privateTerms: 2 }]),
    // Steps between those, and coarser ones, of the shape that is best most often.
    ...codedSeries(0.0945, 3, shapes([8, 16, 32, 48], [2])),
  ],
};

/** @type {readonly Curve[]} */
export const CURVES = [
  { suite: "own-seed", n: 20, ...MINILM },
  { suite: "hub", n: 53, ...MINILM },
  { suite: "shared-seed", n: 20, ...MINILM },
  {
    ...{ suite: "smollm2", n: 20, most: 1_600_000, judges: false, answers: true },
    series: [
      ...codedSeries(0.08, 2, [SVD]),
      ...[0.0668, 0.0945].flatMap((step) => codedSeries(step, 3, shapes([16, 48], [3]))),
    ],
    asked: [0.0566, 0.0283, 0.0141],
  },
  {
    ...{ suite: "sd15", n: 7, most: 3_000_000, judges: false, answers: false },
    series: [
      ...codedSeries(0.08, 2, [SVD]),
      ...codedSeries(0.0668, 3, shapes([4, 8, 16, 24], [4])),
      ...codedSeries(0.0945, 3, shapes([16, 24], [4])),
    ],
  },
];

/**
 * @typedef {object} Measuring
 * @property {import("./suite.js").Suite} suite
 * @property {import("../../lib/rows.js").Rows<Row, { suite: string, n: number, way: string }>} rows
 * @property {(row: Row) => Promise<void>} keep
 * @property {() => boolean} due whether time is up
 * @property {import("./peers.js").Peers} peers
 * @property {boolean} again bytes are measured again: the format of coded packs has changed
 */

/**
 * Bytes and ΔW errors of all series, and of the adapters as they are.
 * @param {Curve} curve
 * @param {Measuring} measuring
 */
export async function measureSizes({ n, most, series }, { suite, rows, keep, due, peers, again }) {
  const cell = (/** @type {Way} */ way) => ({ suite: suite.name, n, way: nameOf(way) });
  if (!rows.get(cell(LORA)) && !due()) {
    const row = await measure(suite, n, LORA, false, peers);
    const accuracy = await suite.reference();
    await keep({ ...row, ...(accuracy ? { accuracy, same: accuracy.map(() => 1) } : {}) });
  }
  for (const ways of series) {
    let before = Infinity;
    for (const way of ways) {
      if (due()) return;
      const known = rows.get(cell(way));
      if (!known || again) await keep(renewed(await measure(suite, n, way, false, peers), known));
      const { bytes, error = 0 } = /** @type {Row} */ (rows.get(cell(way)));
      if (bytes > most || isExhausted(before, error)) break;
      before = error;
    }
  }
}

/** Whether finer steps gain nothing: the error comes from too few components. @param {number} before @param {number} error */
const isExhausted = (before, error) => error < 0.95 && error > 0.99 * before;

/** Results that hold for a pack with the same numbers in other bytes. @param {Row} fresh @param {Row} [known] @returns {Row} */
function renewed(fresh, known) {
  return known && known.error === fresh.error ? { ...known, bytes: fresh.bytes } : fresh;
}

/** @param {Curve} curve @param {readonly Row[]} rows @returns {Set<Row>} */
function worthJudging(curve, rows) {
  const { svd, shared } = ownRows(curve, rows);
  const found = svd.flatMap((theirs) => {
    const fitting = shared.filter(({ row }) => row.bytes <= theirs.row.bytes);
    const kinds = new Set(fitting.map(({ kind }) => kind));
    const best = [...kinds].map((kind) => leastError(fitting.filter((one) => one.kind === kind).map(({ row }) => row)));
    return best.length > 0 ? [theirs.row, ...best] : [];
  });
  return new Set(found.filter((row) => row !== undefined));
}

/**
 * Answers of tasks in the chosen packs, by ΔW error and then by training texts.
 * @param {Curve} curve
 * @param {Measuring} measuring
 */
export async function askCurve(curve, measuring) {
  if (curve.answers) await askChosen(curve, measuring);
  if (!curve.judges || measuring.due()) return;
  await judgeCurve(curve, measuring);
  await askChosen(curve, measuring);
}

/** @param {Curve} curve @param {Measuring} measuring */
async function askChosen(curve, { suite, rows, keep, due, peers }) {
  for (const pair of pairsOf(curve, rows.all())) {
    for (const row of new Set([pair.theirs, pair.ours, pair.judged])) {
      if (row === undefined || rows.get(row)?.accuracy) continue;
      if (due()) return;
      const way = /** @type {Packed} */ (waysOf(curve).get(row.way));
      await keep({ ...row, ...(await measure(suite, curve.n, way, true, peers)) });
    }
  }
}

/**
 * Divergences on training texts of the packs that may be worth asking: for each number of components the one with the least ΔW error.
 * @param {Curve} curve
 * @param {Measuring} measuring
 */
async function judgeCurve(curve, { suite, rows, keep, due }) {
  const adapters = suite.take(curve.n);
  const judge = await suite.judge(adapters);
  for (const row of worthJudging(curve, rows.all())) {
    if (due()) break;
    if (row.divergence === undefined) await keep({ ...row, divergence: await divergenceOf(row) });
  }
  await judge.close();

  /** @param {Row} row */
  async function divergenceOf({ way }) {
    const { options } = /** @type {Packed} */ (waysOf(curve).get(way));
    const pack = await openPack(await packOf(adapters, options));
    const found = await judge.judge(pack);
    await pack.close();
    return Number(found.toPrecision(4));
  }
}

/**
 * Measurements at each place of the curve.
 * @param {Curve} curve
 * @param {readonly Row[]} rows of any suite
 * @returns {Pair[]} fewest bytes first
 */
export function pairsOf(curve, rows) {
  const { svd, shared } = ownRows(curve, rows);
  return svd.map(({ row: theirs }) => {
    const fitting = shared.map(({ row }) => row).filter(({ bytes }) => bytes <= theirs.bytes);
    return { theirs, ours: leastError(fitting), judged: least(fitting, ({ divergence = NaN }) => divergence) };
  });
}

/**
 * Rows of a curve: those that share nothing, at the steps that are asked, and those that share components, with their numbers of
 * components and of private terms.
 * @param {Curve} curve
 * @param {readonly Row[]} rows
 */
function ownRows(curve, rows) {
  const ways = waysOf(curve);
  const own = rows.flatMap((row) => {
    const options = row.suite === curve.suite && row.n === curve.n ? ways.get(row.way)?.options : undefined;
    return options && row.bytes <= curve.most
      ? [{ row, options, kind: JSON.stringify([options.select, options.privateTerms]) }]
      : [];
  });
  const svd = own.filter(
    ({ row, options }) => row.way.startsWith(SVD_CODED) && (curve.asked?.includes(Number(options.step)) ?? true),
  );
  return {
    svd: svd.sort((a, b) => a.row.bytes - b.row.bytes),
    shared: own.filter(({ row }) => row.way.startsWith(`${CODED} `)),
  };
}

/** @param {Curve} curve @returns {Map<string, Packed>} by name */
const waysOf = ({ series }) => new Map(series.flat().map((way) => [nameOf(way), way]));

/** @param {readonly Row[]} rows */
const leastError = (rows) => least(rows, ({ error = NaN }) => error);

/** @param {readonly Row[]} rows @param {(row: Row) => number} of NaN for rows that do not count @returns {Row | undefined} */
const least = (rows, of) => rows.filter((row) => !Number.isNaN(of(row))).sort((a, b) => of(a) - of(b))[0];
