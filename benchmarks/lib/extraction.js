/** Extraction of one module's components and numpy's SVD of the same stacks, in turns. */
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { sum } from "simple-statistics";
import { columnMeans, extractModule, principalComponents } from "../../dist/src/extract/components.js";
import { centred } from "../../dist/src/extract/linalg.js";
import { createWasmProducts } from "../../dist/src/extract/wasm-products.js";
import { folderOf, stacksOf, withAdapters } from "./adapters.js";
import { clocked } from "./process.js";
import { adaptersOf, SETTINGS } from "./settings.js";

/**
 * @typedef {{ modules: number, stack: import("../../dist/src/extract/components.js").ModuleStack }} Case `modules`: so
 *   many are of this shape
 * @typedef {{ ms: number, cpu: number, lost?: number[] }} Times milliseconds
 * @typedef {import("./peers.js").Running} Numpy
 * @typedef {keyof typeof STACKS} StacksName
 */

const products = await createWasmProducts();

/** @param {import("./adapters.js").SuiteName} name */
const suite = (name) => ({ k: 32, cases: () => withAdapters([folderOf(name)], (adapters) => casesOf(adapters)) });

/** Sources of stacks. */
export const STACKS = {
  // One module of each shape stands for all of them.
  sdxl: {
    k: SETTINGS.sdxl.components,
    cases() {
      const { groups } = SETTINGS.sdxl;
      /** @type {import("./settings.js").Group[]} */
      const single = groups.map(([, out, inputs]) => [1, out, inputs]);
      return casesOf(
        adaptersOf("sdxl", single),
        groups.map(([count]) => count),
      );
    },
  },
  "own-seed": suite("own-seed"),
  "shared-seed": suite("shared-seed"),
  hub: suite("hub"),
};

/**
 * @param {readonly import("eigenlora/build").Adapter[]} adapters
 * @param {readonly number[]} [counts]
 * @returns {Promise<Case[]>}
 */
const casesOf = async (adapters, counts) =>
  (await stacksOf(adapters)).map((stack, i) => ({ modules: counts?.[i] ?? 1, stack }));

/** The two stacks of a module. @param {Case} one */
function sidesOf({ stack: { out, in: inputs, members } }) {
  const rows = sum(members.map(({ rank }) => rank));
  return [
    { name: /** @type {const} */ ("A"), rows, width: inputs },
    { name: /** @type {const} */ ("Bt"), rows, width: out },
  ].map((side) => {
    const values = new Float32Array(side.rows * side.width);
    let at = 0;
    for (const member of members) {
      values.set(member[side.name], at);
      at += member[side.name].length;
    }
    return { ...side, values };
  });
}

/** @param {ReturnType<typeof sidesOf>} sides @param {number} k @returns {Promise<Times>} */
async function components(sides, k) {
  const stacks = sides.map((side) => ({ ...side, x: new Float64Array(side.values) }));
  const { ms, cpu, result } = await clocked(() =>
    stacks.map(({ x, rows, width }) => {
      const centre = centred(x, rows, width, columnMeans(x, rows, width));
      return { centre, rows, width, ...principalComponents(centre, rows, width, new Float64Array(rows), k, products) };
    }),
  );
  const lost = result.map(
    ({ centre, rows, width, vectors, total }) =>
      1 -
      products.multiplyTransposed(centre, vectors, rows, k, width).reduce((sum, value) => sum + value * value, 0) /
        total,
  );
  return { ms, cpu, lost };
}

/**
 * Times of each way, round by round.
 * @param {Case} module
 * @param {{ k: number, rounds: number, scratch: string, one: Numpy | undefined, free: Numpy | undefined }} how
 */
export async function measureModule(module, { k, rounds, scratch, one, free }) {
  const sides = sidesOf(module);
  const file = join(scratch, "stacks");
  await writeFile(file, Buffer.concat(sides.map(({ values }) => new Uint8Array(values.buffer))));
  const question = { file, stacks: sides.map(({ rows, width }) => [rows, width]), k };
  /** @type {import("../../dist/src/extract/components.js").ExtractOptions} */
  const options = {
    gauge: "as-trained",
    centering: "keep",
    select: { kind: "k", k },
    basisDtype: "f16",
    coefficientDtype: "f16",
    products,
  };
  /** @type {Record<string, Times[]>} */
  const times = {};
  /** @param {string} way @param {Times} time */
  const keep = (way, time) => (times[way] ??= []).push(time);
  /** @param {Numpy} numpy @param {string} dtype @returns {Promise<Times>} */
  const ask = async (numpy, dtype) => {
    const { wall, cpu, lost } = await numpy.ask({ ...question, dtype });
    return { ms: 1000 * wall, cpu: 1000 * cpu, lost };
  };
  for (let round = 0; round < rounds; round++) {
    keep("components", await components(sides, k));
    keep("extraction", await clocked(() => extractModule(module.stack, options)));
    for (const dtype of ["float64", "float32"]) {
      if (one) keep(`numpy ${dtype}`, await ask(one, dtype));
      // Its threads wait for each other on a shared machine, and a round may take a minute.
      if (free && round === 0) keep(`numpy ${dtype}, free`, await ask(free, dtype));
    }
  }
  return times;
}
