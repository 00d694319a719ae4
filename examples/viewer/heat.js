/**
 * Heat maps: components of a module, and coefficients and residual rows of a task, or the factors of an adapter.
 */
import { readTensor } from "eigenlora";
import { element, plain, section, select, short, size, workButton } from "./dom.js";
import { useInWords } from "./sharing.js";

/** @typedef {import("eigenlora").Pack} Pack @typedef {import("eigenlora").TaskBlob} TaskBlob */

/** Columns and rows of a picture; more values than that share a pixel. */
const MOST_COLUMNS = 512;
const MOST_PIXEL_ROWS = 128;
/** Bytes of components that are read without being asked for. */
const READ_AT_ONCE = 1e6;

const POSITIVE = [217, 72, 15];
const NEGATIVE = [37, 99, 200];

/**
 * A picture of numbers: orange above 0, blue below, the paler the closer to 0.
 * @param {string} title
 * @param {Float32Array} values [rows, columns]
 * @param {number} rows
 * @param {number} columns
 */
export function heatMap(title, values, rows, columns) {
  if (values.length === 0) return element("figure", {}, element("figcaption", {}, `${title}: none`));
  const [across, down] = [Math.ceil(columns / MOST_COLUMNS), Math.ceil(rows / MOST_PIXEL_ROWS)];
  const [width, height] = [Math.ceil(columns / across), Math.ceil(rows / down)];
  const largest = new Float32Array(width * height);
  let [least, most, squares] = [0, 0, 0];
  for (let r = 0; r < rows; r++) {
    for (let c = 0; c < columns; c++) {
      const value = values[r * columns + c];
      const at = Math.floor(r / down) * width + Math.floor(c / across);
      if (Math.abs(value) > Math.abs(largest[at])) largest[at] = value;
      least = Math.min(least, value);
      most = Math.max(most, value);
      squares += value * value;
    }
  }
  const pixel = across * down > 1 ? `; a pixel shows the largest of ${across * down} values` : "";
  const rms = Math.sqrt(squares / Math.max(1, values.length));
  const caption = `${title}: ${rows} × ${columns}, from ${short(least)} to ${short(most)}, root mean square ${short(rms)}${pixel}`;
  const canvas = element("canvas", { role: "img", "aria-label": plain(caption) });
  Object.assign(canvas, { width, height });
  canvas.style.height = `${height * Math.max(2, Math.min(14, Math.round(96 / height)))}px`;
  paint(canvas, largest, Math.max(-least, most));
  return element("figure", {}, canvas, element("figcaption", {}, caption));
}

/** @param {HTMLCanvasElement} canvas @param {Float32Array} values @param {number} scale value of the full colour */
function paint(canvas, values, scale) {
  const image = new ImageData(canvas.width, canvas.height);
  for (const [i, value] of values.entries()) {
    const colour = value < 0 ? NEGATIVE : POSITIVE;
    image.data.set([...colour, scale > 0 ? Math.round((255 * Math.abs(value)) / scale) : 0], 4 * i);
  }
  canvas.getContext("2d")?.putImageData(image, 0, 0);
}

/**
 * Heat maps of a module of a pack, for a task.
 * @param {Pack} pack
 * @param {() => void} onRead called when something has been read
 * @param {(id: string, blob: TaskBlob) => void} onTask called with each task that was read
 */
export function createHeatMaps(pack, onRead, onTask) {
  const tasks = select(
    "Task ",
    [...pack.tasks.keys()].map((id) => [id, id]),
  );
  const modules = select(
    "Module ",
    pack.modules.map(({ name }, i) => [String(i), name]),
  );
  const about = element("div", {}, "Choose a task: it is read then.");
  const figures = element("div", { class: "figures" });
  const node = section("Components and coefficients", element("p", { class: "choices" }, tasks.label, modules.label));
  node.append(about, figures);
  /** @type {Uint8Array | undefined} */
  let bases;
  const readBases = async () => {
    bases ??= (await pack.bases()).bytes;
    onRead();
  };
  let turn = 0;
  const draw = async () => {
    const mine = ++turn;
    const [id, index] = [tasks.select.value, Number(modules.select.value)];
    if (!pack.modules[index]) return;
    try {
      const hasComponents = pack.modules[index].A.length + pack.modules[index].B.length > 0;
      if (hasComponents && !bases && pack.directory.bases.length <= READ_AT_ONCE) await readBases();
      const blob = pack.tasks.has(id) ? await pack.load(id) : undefined;
      onRead();
      if (blob) onTask(id, blob);
      if (mine !== turn) return;
      about.replaceChildren(...wordsOf(pack, index, blob));
      figures.replaceChildren(...componentMaps(pack, index, bases), ...taskMaps(index, blob));
      if (!hasComponents || bases) return;
      const text = `Read the components (${size(pack.directory.bases.length)})`;
      figures.prepend(
        workButton(text, () =>
          readBases()
            .then(() => draw())
            .then(() => undefined),
        ),
      );
    } catch (error) {
      if (mine === turn)
        figures.replaceChildren(element("p", { class: "wrong" }, /** @type {Error} */ (error).message));
    }
  };
  modules.select.addEventListener("change", draw);
  return {
    node,
    draw,
    tasks: tasks.select,
    /** @param {string} id @param {number} [module] */
    choose(id, module) {
      tasks.select.value = id;
      if (module !== undefined) modules.select.value = String(module);
      return draw();
    },
  };
}

/** @param {Pack} pack @param {number} index @param {TaskBlob | undefined} blob */
function wordsOf({ modules }, index, blob) {
  const term = blob?.terms.find(({ module }) => module === index);
  if (!blob) return [element("p", {}, "The pack has no task yet.")];
  if (!term) return [element("p", {}, "The task leaves this module as it is.")];
  const sides = /** @type {const} */ (["A", "B"]).map((side) => `${side}: ${useInWords(modules[index], term, side)}`);
  const dora = term.magnitude ? ", magnitudes (DoRA)" : "";
  return [element("p", {}, `Rank ${term.rank + term.privateRank}; ${sides.join("; ")}${dora}.`)];
}

/** @param {Pack} pack @param {number} index @param {Uint8Array | undefined} bases */
function componentMaps({ modules }, index, bases) {
  if (!bases) return [];
  return /** @type {const} */ (["A", "B"]).flatMap((side) =>
    modules[index][side].map(({ tensor, mean, kind }, g, all) => {
      const what = [all.length > 1 ? ` of group ${g + 1}` : "", mean ? ", the mean last" : "", `, ${tensor.dtype}`];
      const title = `Components of ${side}${what.join("")}${kind === "flat" ? ", whole factors" : ""}`;
      return heatMap(title, readTensor(bases, tensor), tensor.rows, tensor.width);
    }),
  );
}

/** @param {number} index @param {TaskBlob | undefined} blob */
function taskMaps(index, blob) {
  const term = blob?.terms.find(({ module }) => module === index);
  if (!blob || !term) return [];
  /** @type {[string, import("eigenlora").TensorRef | undefined][]} */
  const tensors = [
    ["Coefficients of A", term.A?.tensor],
    ["Coefficients of B", term.B?.tensor],
    ["Residual rows of A", term.ownA],
    ["Residual rows of B", term.ownBt],
    ["Residual terms, A", term.privateA],
    ["Residual terms, B", term.privateBt],
    ["Magnitudes (DoRA)", term.magnitude],
  ];
  return tensors.flatMap(([title, tensor]) =>
    tensor ? [heatMap(`${title}, ${tensor.dtype}`, readTensor(blob.bytes, tensor), tensor.rows, tensor.width)] : [],
  );
}

/** Heat maps of the factors of an adapter. @param {import("eigenlora/build").Adapter} adapter */
export function createFactorMaps({ modules }) {
  const names = [...modules.keys()];
  const choice = select(
    "Module ",
    names.map((name) => [name, name]),
  );
  const figures = element("div", { class: "figures" });
  const draw = async () => {
    const module = modules.get(choice.select.value);
    if (!module) return;
    try {
      const { rank, A, Bt } = await module.read();
      figures.replaceChildren(heatMap("A", A, rank, module.in), heatMap("B, transposed", Bt, rank, module.out));
    } catch (error) {
      figures.replaceChildren(element("p", { class: "wrong" }, /** @type {Error} */ (error).message));
    }
  };
  choice.select.addEventListener("change", draw);
  return { node: section("Factors", element("p", { class: "choices" }, choice.label), figures), draw };
}
