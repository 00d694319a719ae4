/**
 * Measures one way of storing some adapters: bytes, ΔW error and, where asked, the tasks' answers. Errors are computed from the file read
 * back, for ours and for others' alike.
 */
import { openPack } from "eigenlora";
import { buildPack, searchPack, taskAdapter } from "eigenlora/build";
import { mean, sum } from "simple-statistics";
import { deltaError, relative } from "../../../dist/src/extract/error.js";
import { balance } from "../../../dist/src/extract/gauge.js";
import { decodeTensor, tensorBytes } from "../../../dist/src/tensor/dtypes.js";
import { encodeTensor } from "../../../dist/src/tensor/encode.js";
import { bytesOfAdapter } from "../../lib/adapters.js";
import { nameOf } from "./ways.js";

/**
 * @typedef {import("./suite.js").Suite} Suite
 * @typedef {import("./ways.js").Way} Way
 * @typedef {import("./peers.js").Peers} Peers
 * @typedef {import("eigenlora").Dtype} Dtype
 * @typedef {import("eigenlora/build").Adapter} Adapter
 * @typedef {import("eigenlora/build").AdapterModule} AdapterModule
 * @typedef {object} Row
 * @property {string} suite
 * @property {number} n adapters
 * @property {string} way
 * @property {number} bytes of all tasks with their heads; ours and peers' are whole files
 * @property {number} [error] mean ‖ΔW − ΔW'‖ / ‖ΔW‖ over modules and tasks
 * @property {number[]} [errors] the same of each task, in the order of ids, of ways by themselves
 * @property {number[]} [sizes] bytes of each task, of ways by themselves
 * @property {number[]} [accuracy] of each task
 * @property {number[]} [same] share of a task's rows with the label that PEFT predicts
 * @property {number} [divergence] mean KL(adapter ‖ pack) on training texts, in nats
 * @property {string} [found] which way a search has found
 * @property {string} [peer] version
 * @property {number} seconds
 * @typedef {Pick<Row, "bytes" | "error" | "errors" | "sizes" | "peer" | "found"> & { chunks: Uint8Array[], strength?: number }} Stored
 *   strength: of the task when it is asked
 */

/** Options that put foreign adapters into a session: ΔW loses only the last bits of f32. @param {Dtype} head */
const lossless = (head) => ({
  select: /** @type {const} */ ({ kind: "energy", share: 1 }),
  dtype: { basis: /** @type {const} */ ("f32"), coefficients: /** @type {const} */ ("f32"), head },
});

/** @param {{ suite: string, n: number, way: string }} cell */
export const keyOf = ({ suite, n, way }) => [suite, n, way].join(", ");

/**
 * @param {Suite} suite
 * @param {number} n
 * @param {Way} way
 * @param {boolean} asks
 * @param {Peers} peers
 * @param {number} [most] bytes that a search must keep to
 * @returns {Promise<Row>}
 */
export async function measure(suite, n, way, asks, peers, most) {
  const started = performance.now();
  const adapters = suite.take(n);
  const found = await store(adapters, way, peers, asks, most);
  const { chunks, strength = 1, ...figures } = found;
  /** @type {import("./suite.js").Answers[]} */
  const answers = [];
  if (asks) {
    await suite.withSession(chunks, async (session) => {
      for (const { id } of adapters) answers.push(await suite.ask(session, id, { [id]: strength }));
    });
  }
  const rows = asks ? await Promise.all(adapters.map(({ id }) => suite.rowsOf(id))) : [];
  const share = (/** @type {"right" | "same"} */ what) => answers.map((one, i) => rounded(one[what] / rows[i]));
  return {
    suite: suite.name,
    n,
    way: nameOf(way),
    ...figures,
    ...(asks ? { accuracy: share("right"), same: share("same") } : {}),
    seconds: rounded((performance.now() - started) / 1000),
  };
}

/**
 * @param {Adapter[]} adapters
 * @param {Way} way
 * @param {Peers} peers
 * @param {boolean} asks
 * @param {number} [most]
 * @returns {Promise<Stored>}
 */
async function store(adapters, way, peers, asks, most) {
  if (way.kind === "auto") return search(adapters, way, most);
  if (way.kind === "pack") {
    const { chunks, report } = await build(adapters, way);
    return { bytes: report.bytes, error: rounded(mean(await packErrors(adapters, chunks))), chunks };
  }
  if (way.kind === "heads" || way.kind === "each") return storeEach(adapters, way, asks);
  return peers.compress(adapters, way, async (bytes, back) => {
    const errors = await Promise.all(adapters.map((adapter, i) => errorOf(adapter, back[i])));
    // vlora-dev saves no heads: ours stand in for them, in the smallest format.
    const heads = way.kind === "vlora" ? sum(adapters.map((adapter) => headBytes(adapter, "int4"))) : 0;
    const members = back.map((one, i) => ({ ...one, saved: adapters[i].saved }));
    const chunks = asks ? (await buildPack(members, lossless(way.kind === "vlora" ? "int4" : "f32"))).chunks : [];
    return { bytes: bytes + heads, error: rounded(mean(errors)), peer: peers.versions[way.kind], chunks };
  });
}

/**
 * The best pack within some bytes.
 * @param {Adapter[]} adapters
 * @param {import("./ways.js").Auto | import("./ways.js").Within} way
 * @param {number} [most]
 * @returns {Promise<Stored>}
 */
async function search(adapters, way, most) {
  const max = "ratio" in way ? budget(adapters, way.ratio) : (most ?? NaN);
  const goal = /** @type {const} */ ({ kind: "bytes", max });
  const { chunks, report } = await searchPack(adapters, { goal });
  const same = report.tried.filter(({ bytes, error }) => bytes === report.bytes && error === report.error.mean);
  return {
    bytes: report.bytes,
    error: rounded(mean(await packErrors(adapters, chunks))),
    found: same[0]?.name ?? "",
    chunks,
  };
}

/**
 * Every adapter by itself, or its head alone.
 * @param {Adapter[]} adapters
 * @param {import("./ways.js").Each | import("./ways.js").Heads} way
 * @param {boolean} asks
 * @returns {Promise<Stored>}
 */
async function storeEach(adapters, way, asks) {
  const stored = await Promise.all(
    adapters.map((adapter) => (way.kind === "heads" ? { adapter, bytes: 0 } : storeOne(adapter, way))),
  );
  const head = way.kind === "heads" ? way.type : way.head;
  const sizes = stored.map(({ adapter, bytes }) => bytes + headBytes(adapter, head));
  const errors = await Promise.all(
    stored.map(({ adapter }, i) => (way.kind === "heads" ? 1 : errorOf(adapters[i], adapter))),
  );
  const members = stored.map(({ adapter }) => adapter);
  return {
    bytes: sum(sizes),
    error: rounded(mean(errors)),
    errors: errors.map(rounded),
    sizes,
    chunks: asks ? (await buildPack(members, lossless(head))).chunks : [],
    ...(way.kind === "heads" ? { strength: 0 } : {}),
  };
}

/** @param {Adapter[]} adapters @param {import("./ways.js").Packed} way */
function build(adapters, { options, ratio }) {
  return ratio === undefined
    ? buildPack(adapters, options)
    : searchPack(adapters, { goal: { kind: "bytes", max: budget(adapters, ratio) }, ways: [options] });
}

/** Bytes at a ratio to the adapters in f32. @param {Adapter[]} adapters @param {number} ratio */
const budget = (adapters, ratio) => Math.floor(sum(adapters.map(bytesOfAdapter)) / ratio);

/** Mean error of each task, read from the pack. @param {readonly Adapter[]} adapters @param {Uint8Array[]} chunks */
async function packErrors(adapters, chunks) {
  const pack = await openPack(new Blob(/** @type {BlobPart[]} */ (chunks)));
  const errors = await Promise.all(
    adapters.map(async (adapter) => {
      const stored = await taskAdapter(pack, adapter.id);
      const error = await errorOf(adapter, stored);
      await stored.close();
      return error;
    }),
  );
  await pack.close();
  return errors;
}

/** Mean over modules. @param {Adapter} exact @param {Adapter} stored */
async function errorOf(exact, stored) {
  const errors = [];
  for (const [name, module] of exact.modules) {
    const other = stored.modules.get(name);
    if (!other) {
      // Too little of the module is kept to be worth a byte.
      errors.push(1);
      continue;
    }
    const { difference, norm } = deltaError(
      toPair(module.rank, await module.read()),
      toPair(other.rank, await other.read()),
    );
    errors.push(relative(difference, norm));
  }
  return mean(errors);
}

/**
 * An adapter stored by itself, a scale for each row; cut to its largest singular values where a rank is given.
 * @param {Adapter} adapter
 * @param {import("./ways.js").Each} way
 * @returns {Promise<{ adapter: Adapter, bytes: number }>} bytes of the factors: numbers and scales, no names or headers
 */
export async function storeOne(adapter, { rank, type }) {
  let bytes = 0;
  /** @type {Map<string, AdapterModule>} */
  const modules = new Map();
  for (const [name, module] of adapter.modules) {
    const given = toPair(module.rank, await module.read());
    const pair = rank === undefined ? given : balance(given, module.out, module.in);
    const kept = Math.min(rank ?? Infinity, pair.rank);
    /** @param {Float64Array} side @param {number} width */
    const stored = (side, width) => {
      const encoded = encodeTensor(type, side.subarray(0, kept * width), kept, width);
      bytes += encoded.length;
      return decodeTensor(type, encoded, kept, width);
    };
    const term = { rank: kept, A: stored(pair.A, module.in), Bt: stored(pair.Bt, module.out) };
    modules.set(name, { ...module, rank: kept, read: async () => term });
  }
  return { adapter: { ...adapter, modules }, bytes };
}

/** Bytes of a head; its bias is f16 where the weights are integers, as in a pack. @param {Adapter} adapter @param {Dtype} type */
function headBytes({ saved }, type) {
  const vector = type.startsWith("int") ? "f16" : type;
  return sum(
    saved.map(({ shape: [rows, width] }) =>
      width === undefined ? tensorBytes(vector, 1, rows) : tensorBytes(type, rows, width),
    ),
  );
}

/** @param {number} rank @param {Pick<import("eigenlora").Term, "A" | "Bt">} factors */
const toPair = (rank, { A, Bt }) => ({ rank, A: Float64Array.from(A), Bt: Float64Array.from(Bt) });

/** @param {number} value */
const rounded = (value) => Math.round(value * 1e4) / 1e4;
