/**
 * Likeness of tasks: inner products of their ΔW over all modules, from the factors alone. Heads and other overrides,
 * and magnitudes of DoRA, are no part of ΔW and are left out.
 */
import { taskAdapter } from "eigenlora/build";
import { count, element, pacer, percent, plain, scrolling, section, shape, size, table, workButton } from "./dom.js";
import { packFacts } from "./facts.js";

/**
 * @typedef {import("eigenlora").Pack} Pack
 * @typedef {import("eigenlora").Term} Term
 * @typedef {import("eigenlora/build").Adapter} Adapter
 * @typedef {import("./open.js").Opened} Opened
 */

/** Tasks that are compared with each other at most; the work grows with their square. */
const MOST_COMPARED = 64;
/** Pairs that the table lists. */
const PAIRS = 30;

/** ⟨ΔW, ΔW'⟩ of two terms of one module, Σ (A·A'ᵀ) ∘ (Bt·Bt'ᵀ). @param {Term} one @param {Term} other */
export function innerProduct(one, other) {
  const [width, out] = [one.A.length / one.rank, one.Bt.length / one.rank];
  let sum = 0;
  for (let i = 0; i < one.rank; i++)
    for (let j = 0; j < other.rank; j++)
      sum += dot(one.A, i * width, other.A, j * width, width) * dot(one.Bt, i * out, other.Bt, j * out, out);
  return sum;
}

/** @param {Float32Array} a @param {number} i @param {Float32Array} b @param {number} j @param {number} length */
function dot(a, i, b, j, length) {
  let sum = 0;
  for (let k = 0; k < length; k++) sum += a[i + k] * b[j + k];
  return sum;
}

/**
 * Inner products of all pairs of adapters.
 * @param {readonly Adapter[]} adapters
 * @param {(done: number, of: number) => void} onModule
 * @returns {Promise<Float64Array>} [n, n]
 */
async function innerProducts(adapters, onModule) {
  const n = adapters.length;
  const products = new Float64Array(n * n);
  const names = [...new Set(adapters.flatMap(({ modules }) => [...modules.keys()]))];
  const turn = pacer();
  for (const [m, name] of names.entries()) {
    /** @type {[index: number, term: Term][]} */
    const terms = [];
    for (const [i, { modules }] of adapters.entries()) {
      const module = modules.get(name);
      if (module) terms.push([i, await module.read()]);
      await turn();
    }
    for (const [at, [i, one]] of terms.entries()) {
      for (const [j, other] of terms.slice(at)) {
        if (one.A.length * other.rank !== other.A.length * one.rank) continue;
        products[i * n + j] += innerProduct(one, other);
      }
      await turn();
    }
    onModule(m + 1, names.length);
  }
  for (let i = 0; i < n; i++) for (let j = 0; j < i; j++) products[i * n + j] = products[j * n + i];
  return products;
}

/** @param {Float64Array} products [n, n] @param {number} n @param {number} i @param {number} j */
function cosine(products, n, i, j) {
  const norms = Math.sqrt(products[i * n + i] * products[j * n + j]);
  return norms > 0 ? products[i * n + j] / norms : 0;
}

/**
 * Opens the tasks of a pack as adapters, does the work, and closes them.
 * @template T
 * @param {readonly { source: Pack | Adapter, id: string }[]} wanted
 * @param {(adapters: Adapter[]) => Promise<T>} work
 */
async function withAdapters(wanted, work) {
  /** @type {Adapter[]} */
  const opened = [];
  try {
    const adapters = [];
    for (const { source, id } of wanted) {
      if ("byteLength" in source) adapters.push(source);
      else {
        const adapter = await taskAdapter(source, id);
        opened.push(adapter);
        adapters.push(adapter);
      }
    }
    return await work(adapters);
  } finally {
    for (const adapter of opened) await adapter.close();
  }
}

/**
 * @param {Pack} pack
 * @param {() => void} onRead called when something has been read
 */
export function likenessSection(pack, onRead) {
  const shown = element("div");
  const bytes = [...pack.tasks.values()].reduce((sum, one) => sum + one.bytes, pack.directory.bases.length);
  const work = workButton(`Compare the tasks (reads up to ${size(bytes)})`, async (say) => {
    const ids = [...pack.tasks.keys()].slice(0, MOST_COMPARED);
    const wanted = ids.map((id) => ({ source: pack, id }));
    const products = await withAdapters(wanted, (adapters) =>
      innerProducts(adapters, (done, of) => say(`${done} of ${count(of, "module")}`)),
    );
    onRead();
    shown.replaceChildren(...likenessOf(ids, products));
    return ids.length < pack.tasks.size ? `The first ${MOST_COMPARED} tasks are compared.` : "";
  });
  const about =
    "Cosines of the tasks' ΔW: 1 means the same direction, 0 nothing in common. Heads and other overrides are not in it.";
  return section("How alike tasks are", element("p", {}, about), work, shown);
}

/** @param {readonly string[]} ids @param {Float64Array} products */
function likenessOf(ids, products) {
  const n = ids.length;
  const pairs = ids.flatMap((one, i) =>
    ids.slice(i + 1).map((other, at) => ({ one, other, value: cosine(products, n, i, i + 1 + at) })),
  );
  pairs.sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
  const rows = pairs.slice(0, PAIRS).map(({ one, other, value }) => [one, other, value.toFixed(3)]);
  const cell = n > 40 ? 8 : 16;
  const svg = shape("svg", { width: n * cell, height: n * cell, viewBox: `0 0 ${n * cell} ${n * cell}`, role: "img" });
  svg.setAttribute("aria-label", `Cosines of ${count(n, "task")} with each other; the table lists the largest`);
  const line = element("p", { class: "caption" }, "Point at a square: it names the two tasks.");
  for (let i = 0; i < n; i++) {
    for (let j = 0; j < n; j++) {
      const value = cosine(products, n, i, j);
      const at = { x: j * cell, y: i * cell, width: cell - 1, height: cell - 1 };
      svg.append(shape("rect", { ...at, class: value < 0 ? "minus" : "plus", "fill-opacity": Math.abs(value) }));
    }
  }
  svg.addEventListener("pointermove", ({ clientX, clientY }) => {
    const box = svg.getBoundingClientRect();
    const [j, i] = [Math.floor((clientX - box.left) / cell), Math.floor((clientY - box.top) / cell)];
    if (i < 0 || j < 0 || i >= n || j >= n) return;
    line.textContent = plain(`${ids[i]}, ${ids[j]}: ${cosine(products, n, i, j).toFixed(3)}`);
  });
  const nodes = [scrolling("Cosines of tasks", svg), line];
  return rows.length === 0 ? nodes : [...nodes, table("The most alike pairs", ["task", "and", "cosine"], rows)];
}

/** Names of two files, distinct where both have the same. @param {...Opened} files */
function namesOf(...files) {
  const names = files.map(({ given }) => given.name);
  return names[0] === names[1] ? names.map((name, i) => `${name} (${i === 0 ? "first" : "second"})`) : names;
}

/**
 * Lists the facts in which two packs differ.
 * @param {Pack} one
 * @param {Pack} other
 * @param {readonly string[]} names
 */
function differences(one, other, names) {
  const said = new Map(packFacts(other));
  const rows = packFacts(one).flatMap(([name, value]) =>
    said.get(name) === value ? [] : [[name, value, said.get(name) ?? ""]],
  );
  if (rows.length === 0) return element("p", {}, "Both say the same of themselves.");
  return table("What differs", ["", ...names], rows);
}

/**
 * The tasks of an opened file, as far as they have numbers.
 * @param {Opened} opened
 * @returns {{ source: Pack | Adapter, ids: ReadonlyMap<string, number> } | undefined} with bytes
 */
function tasksOf(opened) {
  if (opened.kind === "pack") {
    return { source: opened.pack, ids: new Map(Array.from(opened.pack.tasks, ([id, { bytes }]) => [id, bytes])) };
  }
  const { kind } = opened;
  return kind === "adapter"
    ? { source: opened.adapter, ids: new Map([[opened.adapter.id, opened.adapter.byteLength]]) }
    : undefined;
}

/**
 * Tasks of two files with the same id, side by side. Undefined where one is a task file, which has no numbers without
 * its pack. A pack is measured against an adapter, and the second pack against the first.
 * @param {readonly [Opened, Opened]} files
 * @param {() => void} onRead called when something has been read
 */
export function comparisonSection(files, onRead) {
  const [first, second] = files[0].kind === "pack" && files[1].kind === "adapter" ? [files[1], files[0]] : files;
  const names = namesOf(first, second);
  const [one, other] = [tasksOf(first), tasksOf(second)];
  if (!one || !other) return undefined;
  const both = [...one.ids.keys()].filter((id) => other.ids.has(id));
  const shown = element("div");
  /** @param {ReadonlyMap<string, { cosine: number, difference: number }>} measured */
  const draw = (measured) => {
    const rows = [...new Set([...one.ids.keys(), ...other.ids.keys()])].map((id) => {
      const found = measured.get(id);
      const bytes = [one.ids.get(id), other.ids.get(id)].map((n) => (n === undefined ? "not there" : size(n)));
      return [id, ...bytes, found ? found.cosine.toFixed(4) : "", found ? percent(found.difference) : ""];
    });
    const head = ["task", ...names.map((name) => `bytes in ${name}`), "cosine of ΔW", `ΔW error against ${names[0]}`];
    shown.replaceChildren(table("Tasks of both files", head, rows));
  };
  draw(new Map());
  const work = workButton(`Compare the numbers of ${count(both.length, "task")}`, async (say) => {
    /** @type {Map<string, { cosine: number, difference: number }>} */
    const measured = new Map();
    for (const [i, id] of both.entries()) {
      const wanted = [one.source, other.source].map((source) => ({ source, id }));
      const products = await withAdapters(wanted, (adapters) => innerProducts(adapters, () => {}));
      const [aa, ab, , bb] = products;
      const difference = aa > 0 ? Math.sqrt(Math.max(0, aa - 2 * ab + bb) / aa) : 0;
      measured.set(id, { cosine: cosine(products, 2, 0, 1), difference });
      say(`${i + 1} of ${count(both.length, "task")}`);
    }
    onRead();
    draw(measured);
    return "";
  });
  const title = element("h2", {}, "Both files");
  const facts = first.kind === "pack" && second.kind === "pack" ? [differences(first.pack, second.pack, names)] : [];
  return element("section", {}, title, ...facts, ...(both.length > 0 ? [work] : []), shown);
}
