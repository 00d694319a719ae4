/**
 * Ways to store adapters that are compared, ours and others'. Another configuration is another line here.
 *
 * @typedef {import("eigenlora").Dtype} Dtype
 * @typedef {import("eigenlora/build").BuildOptions} BuildOptions
 * @typedef {{ kind: "pack", options: BuildOptions, ratio?: number }} Packed a pack of
 *   all adapters; with a ratio, as many components as fit into the bytes of the f32 adapters ÷ ratio. Entropy-coded with
 *   a step; without components it then equals every adapter by itself, cut by its own SVD
 * @typedef {{ kind: "auto", ratio: number }} Auto the best pack in the bytes of the f32 adapters ÷ ratio, by ΔW error
 * @typedef {{ kind: "auto", within: Each | Peer }} Within the best pack that is no larger than what another way stores, by ΔW error
 * @typedef {{ kind: "each", rank?: number, type: Dtype, head: Dtype }} Each every adapter by itself, cut to a rank by its own SVD
 * @typedef {{ kind: "heads", type: Dtype }} Heads heads without adapters
 * @typedef {{ kind: "lorashare" | "vlora", k: number, packed?: boolean }} Peer packed: its components in 4 bits
 * @typedef {Packed | Auto | Within | Each | Heads | Peer} Way
 */

/**
 * A pack; more options are any of `buildPack`.
 * @param {Omit<BuildOptions, "dtype"> & { k?: number, ratio?: number, type?: Dtype, head?: Dtype }} options
 * @returns {Packed}
 */
function pack({ mode = "column", gauge = "as-trained", k, ratio, type = "f16", head = type, ...more }) {
  const select = /** @type {BuildOptions["select"]} */ (k === undefined ? more.select : { kind: "k", k });
  const options = {
    mode,
    gauge,
    ...more,
    ...(select ? { select } : {}),
    dtype: { basis: type, coefficients: type, head },
  };
  return { kind: "pack", options, ...(ratio ? { ratio } : {}) };
}

/** Options with shorter names in tables. */
const SHORT = new Map([["privateTerms", "private"]]);

/** @param {Way} way @returns {string} what it is called, and its key */
export function nameOf(way) {
  if (way.kind === "heads") return `heads alone, ${way.type}`;
  if (way.kind === "each") {
    const what = way.rank === undefined ? "LoRA" : `cut to rank ${way.rank}`;
    return `${what}, ${typesOf({ basis: way.type, coefficients: way.type, head: way.head })}`;
  }
  if (way.kind === "auto" && "within" in way) return `auto, within the bytes of ${nameOf(way.within)}`;
  if (way.kind === "auto") return `auto, ${way.ratio} times fewer bytes, by ΔW error`;
  if (way.kind !== "pack") return `${way.kind} K ${way.k}${way.packed ? ", NF4" : ""}`;
  if (way.options.step !== undefined) return nameOfCoded(way.options);
  const { mode, gauge, select, dtype, ...more } = way.options;
  const rest = Object.entries(more).map(
    ([name, value]) => `${SHORT.get(name) ?? name} ${typeof value === "object" ? JSON.stringify(value) : value}`,
  );
  return [
    [
      ...(gauge === "balanced" ? ["balanced"] : []),
      mode,
      ...(select ? [select.kind === "k" ? `K ${select.k}` : JSON.stringify(select)] : []),
    ].join(" "),
    ...rest,
    typesOf(dtype),
    ...(way.ratio ? [`${way.ratio} times fewer bytes`] : []),
  ].join(", ");
}

/** @param {BuildOptions} options */
function nameOfCoded({ select, rank, privateTerms, step }) {
  const k = select?.kind === "k" ? select.k : NaN;
  const parts = [
    k === 0 ? SVD_CODED : `${CODED} K ${k}`,
    ...(rank ? [`rank ${rank}`] : []),
    ...(k > 0 && privateTerms ? [`private ${privateTerms}`] : []),
    `step ${step}`,
  ];
  return parts.join(", ");
}

/** @param {BuildOptions["dtype"]} types */
function typesOf(types) {
  const { basis, coefficients, head } = /** @type {import("eigenlora/build").Dtypes} */ (types);
  return [
    basis,
    ...(coefficients === basis ? [] : [`coefficients ${coefficients}`]),
    ...(head === basis ? [] : [`heads ${head}`]),
  ].join(", ");
}

/** Start of the names of coded packs: those that share components, and those that share nothing. */
export const CODED = "coded";
export const SVD_CODED = "SVD-cut, coded";

/** Step of heads in all coded packs: about three bits a number. Heads are the same bytes in both, so they do not decide. */
const HEAD_STEP = 0.5;
/** Most steps of a series; its bytes reach their limit before the finest one. */
const MOST_STEPS = 40;

/**
 * Series of coded packs, their steps from coarse to fine.
 * @param {number} coarsest step
 * @param {number} octave so many steps halve it
 * @param {readonly { k: number, rank?: number, privateTerms?: number }[]} shapes
 * @returns {Packed[][]}
 */
export function codedSeries(coarsest, octave, shapes) {
  const steps = Array.from({ length: MOST_STEPS }, (_, i) => Number((coarsest * 2 ** (-i / octave)).toPrecision(3)));
  return shapes.map(({ k, ...shape }) =>
    steps.map((step) => ({
      kind: "pack",
      options: { gauge: "balanced", select: { kind: "k", k }, ...shape, step, headStep: HEAD_STEP },
    })),
  );
}

/** Ways whose accuracy is measured for all adapters: each mode, and other packages. @param {number} n adapters @returns {Way[]} */
export function frontier(n) {
  return [
    pack({ k: 32, type: "int4" }),
    pack({ gauge: "balanced", rank: 3, ratio: ratiosOf(n)[1], type: "int3" }),
    ...[2, 3].map((rank) => pack({ gauge: "balanced", rank, ratio: ratiosOf(n)[1], type: "int3", head: "int4" })),
    pack({ gauge: "balanced", rank: 4, privateTerms: 1, k: 24, type: "int4" }),
    pack({ k: 32, type: "f16" }),
    pack({ mode: "flat", gauge: "balanced", k: n - 1, type: "int4" }),
    { kind: "vlora", k: 16 },
  ];
}

/**
 * Ways whose accuracy is measured for fewer adapters too: the paper's, small packs, and its nearest relative. @param {number} n adapters
 * @returns {Way[]}
 */
export function small(n) {
  /** @type {Way[]} */
  const ways = [
    pack({ k: 16, type: "f32" }),
    ...[32, 48].map((k) => pack({ gauge: "balanced", rank: 4, k, type: "int3", head: "int4" })),
    pack({ gauge: "balanced", rank: 4, k: Math.min(32, 3 * n), type: "int4" }),
    pack({ gauge: "balanced", rank: 4, ratio: ratiosOf(n)[1], type: "int3", head: "int4" }),
    { kind: "lorashare", k: 16 },
  ];
  return ways.filter((way) => fits(way, n));
}

/** Ways of each adapter by itself: their results do not depend on the others, so they are measured once, for all. @returns {Way[]} */
export function byThemselves() {
  return [
    { kind: "each", type: "f32", head: "f32" },
    { kind: "heads", type: "f16" },
    cut(1, "f32"),
    cut(2, "int4"),
    cut(2, "int3"),
    cut(4, "int4"),
  ];
}

/** @param {number | undefined} rank @param {Dtype} type @returns {Each} */
function cut(rank, type) {
  return { kind: "each", ...(rank === undefined ? {} : { rank }), type, head: headOf(type) };
}

/** Heads are not shared, so their bytes soon dominate. @param {Dtype} type @returns {Dtype} */
function headOf(type) {
  return type === "int3" ? "int4" : type;
}

/** @param {number} n adapters @returns {Peer[]} */
function peers(n) {
  const flat = [...new Set([4, 8, 16].map((k) => Math.min(k, n - 1)))];
  return [
    ...[8, 16, 32].map((k) => /** @type {Peer} */ ({ kind: "lorashare", k })),
    ...flat.flatMap((k) => [
      /** @type {Peer} */ ({ kind: "vlora", k }),
      /** @type {Peer} */ ({ kind: "vlora", k, packed: true }),
    ]),
  ];
}

const TYPES = /** @type {const} */ (["f32", "f16", "int8", "int4", "int3"]);
const SMALL = /** @type {const} */ (["int4", "int3"]);
const GAUGES = /** @type {const} */ (["as-trained", "balanced"]);

/** Ways that are compared by bytes and ΔW error only: every mode, gauge and number format. @param {number} n adapters @returns {Way[]} */
export function grid(n) {
  const ways = [
    ...peers(n),
    ...TYPES.map((type) => cut(undefined, type)),
    ...TYPES.flatMap((type) => [1, 2, 4].map((rank) => cut(rank, type))),
    ...GAUGES.flatMap((gauge) =>
      TYPES.flatMap((type) => [16, 32, 48].map((k) => pack({ gauge, k, type, head: headOf(type) }))),
    ),
    ...SMALL.flatMap((type) =>
      [16, 32, 48, 64].map((k) => pack({ gauge: "balanced", rank: 4, k, type, head: headOf(type) })),
    ),
    ...[8, 24].map((k) => pack({ gauge: "balanced", rank: 4, privateTerms: 1, k, type: "int4" })),
    ...GAUGES.flatMap((gauge) =>
      TYPES.map((type) => pack({ mode: "flat", gauge, k: n - 1, type, head: headOf(type) })),
    ),
  ];
  return ways.filter((way) => fits(way, n));
}

/** Results of a search of all of these. @param {number} n adapters @returns {Auto[]} */
export function found(n) {
  return ratiosOf(n).map((ratio) => ({ kind: "auto", ratio }));
}

/** Others' ways, and results of a search within their bytes. @returns {Within[]} */
export function within() {
  /** @type {(Each | Peer)[]} */
  const others = [
    { kind: "lorashare", k: 32 },
    { kind: "vlora", k: 4, packed: true },
    ...[1, 2, 4].map((rank) => cut(rank, "int4")),
    cut(undefined, "int8"),
  ];
  return others.map((other) => ({ kind: "auto", within: other }));
}

/** Ratios to ask for: an easy one, and a hard one. @param {number} n adapters */
function ratiosOf(n) {
  return n > 20 ? [20, 60] : n > 10 ? [20, 35] : [10, 20];
}

/** Whether n adapters of rank 8 have enough components. @param {Way} way @param {number} n */
function fits(way, n) {
  if (way.kind !== "pack" || way.options.select?.kind !== "k") return true;
  const { mode, rank = 8, select } = way.options;
  return select.k < (mode === "flat" ? n : rank * n);
}
