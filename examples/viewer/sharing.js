/**
 * Sharing of components: a picture of tasks × modules × factors, and the same in a table of modules.
 */
import { count, element, percent, plain, scrolling, section, shape, table } from "./dom.js";

/**
 * @typedef {import("eigenlora").Pack} Pack
 * @typedef {import("eigenlora").TaskTerm} TaskTerm
 * @typedef {import("eigenlora").Coefficients} Coefficients
 * @typedef {ReadonlyMap<string, readonly TaskTerm[]>} Terms terms of the tasks that are read, by id
 */

/** Colours of groups; the next group begins again. */
const GROUPS = 4;
const LABELS = 150;
const GAP = 3;

/**
 * Counts the rows of a task in one factor of a module.
 * @param {TaskTerm} term
 * @param {"A" | "B"} side
 * @returns {{ coefficients: Coefficients | undefined, own: number, apart: number }} with numbers of rows
 */
export function useOf(term, side) {
  const own = side === "A" ? term.ownA : term.ownBt;
  return { coefficients: term[side], own: own?.rows ?? 0, apart: term.privateRank };
}

/** @param {Pack["modules"][number]} module @param {TaskTerm} term @param {"A" | "B"} side */
export function useInWords(module, term, side) {
  const { coefficients, own, apart } = useOf(term, side);
  const words = [];
  if (coefficients) {
    const { K } = module[side][coefficients.basis];
    const group = module[side].length > 1 ? ` of group ${coefficients.basis + 1}` : "";
    words.push(`coefficients over ${count(K, "component")}${group}`);
  }
  if (own > 0) words.push(`${count(own, "own row")}`);
  if (apart > 0) words.push(count(apart, "private term"));
  return words.join(" and ") || "nothing";
}

/**
 * @param {Pack} pack
 * @param {(task: string, module: number) => void} choose
 */
export function createSharing(pack, choose) {
  const picture = scrolling("Tasks by modules");
  const line = element("p", { class: "caption" });
  const modules = element("div");
  const node = section("What is shared by whom", element("p", { class: "legend" }, ...legend(pack)), picture, line);
  node.append(element("details", {}, element("summary", {}, "Modules, as a table"), modules));
  /** @param {Terms} terms */
  const draw = (terms) => {
    const grid = gridOf(pack);
    const label = `${count(pack.tasks.size, "task")} by ${count(pack.modules.length, "module")}: ${summary(pack, terms)}`;
    const svg = drawGrid(terms, grid, label);
    const at = (/** @type {MouseEvent} */ event) => cellAt(pack, grid, svg, event);
    svg.addEventListener("pointermove", (event) => {
      const cell = at(event);
      if (cell) line.textContent = plain(cellInWords(pack, terms, cell));
    });
    svg.addEventListener("click", (event) => {
      const cell = at(event);
      if (cell) choose(cell.id, cell.module);
    });
    picture.replaceChildren(svg);
    line.textContent = summary(pack, terms);
    modules.replaceChildren(modulesTable(pack, terms));
  };
  return { node, draw, line };
}

/** @param {Pack} pack */
function legend({ modules }) {
  const groups = modules.reduce((most, { A, B }) => Math.max(most, A.length, B.length), 0);
  const shared = Array.from({ length: Math.min(groups, GROUPS) }, (_, g) => {
    return [`group${g}`, groups > 1 ? `components of group ${g + 1}` : "components"];
  });
  const all = [...shared, ["own", "residual rows or terms"], ["unread", "not read yet"]];
  const words = all.map(([name, words]) => element("span", {}, element("i", { class: name }), words));
  return [...words, element("span", {}, "Left half of a module: A, what it reads; right half: B, what it writes.")];
}

/** @typedef {{ width: number, height: number, step: number, modules: number, ids: readonly string[] }} Grid */

/** @param {Pack} pack @returns {Grid} */
function gridOf({ tasks, modules }) {
  const width = Math.min(12, Math.max(3, Math.floor(900 / Math.max(1, 2 * modules.length))));
  return {
    ...{ width, height: tasks.size > 60 ? 6 : 16, step: 2 * width + GAP },
    ...{ modules: modules.length, ids: [...tasks.keys()] },
  };
}

/** @param {Terms} terms @param {Grid} grid @param {string} label */
function drawGrid(terms, { width, height, step, modules, ids }, label) {
  const [wide, high] = [LABELS + modules * step, ids.length * (height + 1)];
  const svg = shape("svg", { width: wide, height: high, viewBox: `0 0 ${wide} ${high}`, role: "img" });
  svg.setAttribute("aria-label", label);
  /** @type {Map<string, string>} */
  const paths = new Map();
  const add = (/** @type {string} */ name, /** @type {number[]} */ ...[x, y, w, h]) =>
    paths.set(name, `${paths.get(name) ?? ""}M${x} ${y}h${w}v${h}h${-w}z`);
  for (const [row, id] of ids.entries()) {
    const y = row * (height + 1);
    const read = terms.get(id);
    if (!read) add("unread", LABELS, y, modules * step - GAP, height);
    for (const term of read ?? []) {
      for (const side of /** @type {const} */ (["A", "B"])) {
        const x = LABELS + term.module * step + (side === "A" ? 0 : width);
        const { coefficients, own, apart } = useOf(term, side);
        if (coefficients) add(`group${coefficients.basis % GROUPS}`, x, y, width - 1, height);
        const stripe = coefficients ? Math.ceil(height / 3) : height;
        if (own + apart > 0) add("own", x, y + height - stripe, width - 1, stripe);
      }
    }
    if (height < 12) continue;
    const name = shape("text", { x: 0, y: y + 12 });
    name.textContent = plain(id.length > 22 ? `${id.slice(0, 21)}…` : id);
    svg.append(name);
  }
  for (const [name, d] of paths) svg.append(shape("path", { class: name, d }));
  return svg;
}

/** @param {Pack} pack @param {Grid} grid @param {SVGElement} svg @param {MouseEvent} event */
function cellAt({ modules }, { ids, step, height, width }, svg, { clientX, clientY }) {
  const box = svg.getBoundingClientRect();
  const [x, y] = [clientX - box.left - LABELS, clientY - box.top];
  const [module, id] = [Math.floor(x / step), ids[Math.floor(y / (height + 1))]];
  if (x < 0 || module >= modules.length || id === undefined) return undefined;
  return { id, module, side: /** @type {"A" | "B"} */ (x % step < width ? "A" : "B") };
}

/** @param {Pack} pack @param {Terms} terms @param {NonNullable<ReturnType<typeof cellAt>>} cell */
function cellInWords({ modules }, terms, { id, module, side }) {
  const read = terms.get(id);
  const term = read?.find((one) => one.module === module);
  const words = term ? useInWords(modules[module], term, side) : read ? "left as it is" : "not read yet";
  return `${id}, ${side} of ${modules[module].name}: ${words}`;
}

/** @param {Pack} pack @param {Terms} terms */
function summary({ tasks }, terms) {
  const sharing = [...terms.values()].filter((all) => all.some(({ A, B }) => A || B)).length;
  const read = terms.size < tasks.size ? `${terms.size} of ${count(tasks.size, "task")} read; ` : "";
  if (terms.size === 0) return "no task is read yet";
  if (sharing === 0) return `${read}no task takes shared components`;
  return `${read}${sharing === 1 ? "1 task takes" : `${sharing} tasks take`} shared components`;
}

/** @param {Pack} pack @param {Terms} terms */
function modulesTable({ modules }, terms) {
  /** @type {TaskTerm[][]} */
  const termsOf = modules.map(() => []);
  for (const all of terms.values()) for (const term of all) termsOf[term.module].push(term);
  const rows = modules.map((module, i) => {
    const own = termsOf[i];
    const takers = (/** @type {"A" | "B"} */ side) => own.filter((term) => term[side]).length;
    const components = (/** @type {"A" | "B"} */ side) => module[side].map(({ K }) => K).join(" + ");
    const kept = (/** @type {"A" | "B"} */ side) => module[side].map(({ explained }) => percent(explained)).join(", ");
    const apart = own.filter((term) => term.ownA || term.ownBt || term.privateRank > 0).length;
    return [
      ...[module.name, `${module.out} × ${module.in}`, components("A"), components("B"), kept("A"), kept("B")],
      ...[takers("A"), takers("B"), apart],
    ];
  });
  const head = ["module", "out × in", "components of A", "of B", "A keeps", "B keeps"];
  return table(
    "Modules, and how many of the tasks that were read take which components",
    [...head, "share A", "share B", "residual rows"],
    rows,
  );
}
