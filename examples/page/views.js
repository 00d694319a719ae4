/**
 * Draws the state of page.js into the document. No state, no events, no computing except units of measure.
 */

/**
 * @typedef {import("./worker.js").Coefficients} Coefficients
 * @typedef {import("./worker.js").Task} Task
 * @typedef {object} Facts
 * @property {number} model bytes
 * @property {number} pack bytes
 * @property {number} adapters bytes of all their files
 * @property {{ text: string, labels: Record<string, string> }} first the sentence that the page begins with, and what
 *   Debian says of it
 * @property {Record<string, [text: string, label: string][]>} examples by task
 */

/**
 * @template {HTMLElement} [E=HTMLElement]
 * @param {string} id
 */
export const byId = (id) => /** @type {E} */ (document.getElementById(id));

/** @param {number} bytes */
export function size(bytes) {
  if (bytes < 1e3) return `${bytes} B`;
  if (bytes < 1e6) return `${(bytes / 1e3).toFixed(bytes < 1e5 ? 1 : 0)} kB`;
  if (bytes < 1e9) return `${(bytes / 1e6).toFixed(bytes < 1e8 ? 1 : 0)} MB`;
  return `${(bytes / 1e9).toFixed(1)} GB`;
}

/** Browsers round their clocks to 0.1 ms. @param {number} milliseconds */
export function time(milliseconds) {
  if (milliseconds < 0.1) return "< 0.1 ms";
  if (milliseconds < 1e3) return `${milliseconds.toFixed(milliseconds < 20 ? 1 : 0)} ms`;
  return `${(milliseconds / 1e3).toFixed(1)} s`;
}

/** @param {number} share */
export const percent = (share) => `${Math.round(100 * share)} %`;

/**
 * "debtags-role" is "role" of the family "debtags"; "sections-0" is a name.
 * @param {string} id
 * @returns {[family: string, name: string]}
 */
export function nameOf(id) {
  const [, family, name] = /^([^-]+)-([a-z].*)$/.exec(id) ?? ["", "", id];
  return [family, name];
}

/** @param {string} tag @param {string} [className] @param {string} [text] */
export function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

/**
 * The labels of a task with their probabilities, in the order of the task so that nothing jumps while one types.
 * @param {readonly string[]} labels
 * @param {readonly number[] | undefined} probabilities undefined: not known yet
 */
export function drawLabels(labels, probabilities) {
  const list = byId("labels");
  const shown = Array.from(list.children, (row) => row.firstChild?.textContent);
  if (shown.join("\n") !== labels.join("\n")) list.replaceChildren(...labels.map(labelRow));
  const top = probabilities ? Math.max(...probabilities) : NaN;
  labels.forEach((_, i) => {
    const row = /** @type {HTMLElement} */ (list.children[i]);
    row.classList.toggle("top", probabilities?.[i] === top);
    row.style.setProperty("--share", String(probabilities?.[i] ?? 0));
    const value = /** @type {HTMLElement} */ (row.lastChild);
    value.textContent = probabilities ? percent(probabilities[i]) : "";
  });
}

/** @param {string} label */
function labelRow(label) {
  const row = element("li");
  row.append(element("span", "name", label), element("span", "bar"), element("span", "value"));
  return row;
}

/**
 * Adds the card of a task, a radio button.
 * @param {Task} task
 */
export function addCard({ id, bytes, own }) {
  const card = element("label", "card");
  card.dataset["task"] = id;
  const radio = document.createElement("input");
  Object.assign(radio, { type: "radio", name: "task", value: id });
  const [family, name] = own ? ["yours", id] : nameOf(id);
  const head = element("span", "head");
  head.append(element("span", "number"), element("span", "family", family));
  head.append(element("span", "bytes", size(bytes)), element("i", "share"));
  const said = element("span", "said");
  said.append(element("b"), element("i", "mark"));
  card.append(radio, head, element("span", "name", name), document.createElement("canvas"), said);
  byId("cards").append(card);
}

/** @param {string} id */
export function removeCard(id) {
  card(id).remove();
}

/** @param {string} id */
const card = (id) => /** @type {HTMLElement} */ (document.querySelector(`.card[data-task="${CSS.escape(id)}"]`));

/**
 * @param {string} id
 * @param {string} label
 * @param {number} probability
 * @param {string} [truth] the right label, where it is known
 */
export function drawCard(id, label, probability, truth) {
  const mark = truth === undefined ? "" : truth === label ? "✓" : "✗";
  fillCard(id, { label, share: percent(probability), probability, mark });
}

/** @param {string} id of a task that was not asked */
export function drawNoAnswer(id) {
  fillCard(id, {});
}

/**
 * @param {string} id
 * @param {{ label?: string, share?: string, probability?: number, mark?: string }} content
 */
function fillCard(id, { label = "", share = "", probability = 0, mark = "" }) {
  const said = /** @type {HTMLElement} */ (card(id).querySelector(".said"));
  said.style.setProperty("--share", String(probability));
  said.children[0].textContent = label;
  said.children[1].textContent = mark;
  const shown = /** @type {HTMLElement} */ (card(id).querySelector(".share"));
  shown.textContent = share;
}

/**
 * @param {string} id of a task that cannot be used
 * @param {string} why
 */
export function drawUnusable(id, why) {
  fillCard(id, { label: "cannot be used" });
  card(id).title = why;
}

/**
 * Marks a task as read from the pack and draws the coefficients of its last matrix.
 * @param {string} id
 * @param {Coefficients} coefficients
 */
export function drawResident(id, { width, height, values, rank }) {
  card(id).classList.add("resident");
  const canvas = /** @type {HTMLCanvasElement} */ (card(id).querySelector("canvas"));
  drawValues(canvas, width, rank, values.subarray(width * (height - rank)));
}

/** The whole task: a column per row of its matrices, a row per component. @param {Coefficients} coefficients */
export function drawPicture({ values, width, height }) {
  const turned = new Float32Array(values.length);
  for (let r = 0; r < height; r++) for (let k = 0; k < width; k++) turned[k * height + r] = values[r * width + k];
  drawValues(byId("picture"), height, width, turned);
  const count = values.length.toLocaleString("en");
  byId("picture-caption").textContent = values.length
    ? `The whole task: ${count} coefficients`
    : "No picture of this task";
}

/**
 * A pixel per value: positive ones in the accent colour, negative ones in ink.
 * @param {HTMLCanvasElement} canvas
 * @param {number} width
 * @param {number} height
 * @param {Float32Array} values [height, width]
 */
function drawValues(canvas, width, height, values) {
  canvas.width = width;
  canvas.height = height;
  if (values.length === 0) return;
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  const style = getComputedStyle(document.documentElement);
  const [accent, ink] = ["--accent", "--ink"].map((name) => rgb(style.getPropertyValue(name)));
  const image = context.createImageData(width, height);
  // Few large values would leave the rest blank; three times the root mean square is full colour.
  const full = 3 * Math.sqrt(values.reduce((sum, v) => sum + v * v, 0) / values.length);
  values.forEach((value, i) => {
    const alpha = Math.min(1, Math.sqrt(Math.abs(value) / full));
    image.data.set([...(value > 0 ? accent : ink), 255 * alpha], 4 * i);
  });
  context.putImageData(image, 0, 0);
}

/** @param {{ milliseconds: number, bytes: number }} report */
export function drawSwitch({ milliseconds, bytes }) {
  byId("switch-time").textContent = time(milliseconds);
  byId("switch-bytes").textContent = size(bytes);
}

/** @param {string} hex "#rrggbb" */
const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.trim().slice(at, at + 2), 16));

/** @typedef {{ what: string, bytes: number, parts?: [owner: string, bytes: number][] }} Weight */

/**
 * Bars on one scale each: with the model, and what the tasks alone add.
 * @param {Facts} facts
 * @param {import("./worker.js").MemoryReport} memory
 * @param {number} tasks of the pack's file
 * @param {number} resident of these
 */
export function drawMemory({ model, adapters }, memory, tasks, resident) {
  const used = ownersOf(memory);
  byId("weights").replaceChildren(
    bars("Tasks alone", [
      { what: `this page, ${resident < tasks ? `${resident} of` : "all"} ${tasks}`, bytes: memory.total, parts: used },
      { what: `${tasks} adapters`, bytes: adapters },
    ]),
    bars("With the model", [
      { what: "this page", bytes: model + memory.total, parts: [["model", model], ...used] },
      { what: `${tasks} adapters, one model`, bytes: model + adapters },
      { what: `${tasks} models`, bytes: tasks * model },
    ]),
  );
  drawLegend([["model", model], ...used]);
}

/**
 * Who holds how many bytes.
 * @param {import("./worker.js").MemoryReport} memory
 */
export function ownersOf({ basis, coefficients, active, scratch, pristine }) {
  /** @type {[owner: string, bytes: number][]} */
  const owners = [
    ["components", basis],
    ["coefficients", coefficients],
    ["active task", active],
    ["expansion", scratch],
    ["pristine weights", pristine],
  ];
  return owners.filter(([, bytes]) => bytes > 0);
}

/** @param {readonly [owner: string, bytes: number][]} owners */
export function drawLegend(owners) {
  byId("legend").replaceChildren(
    ...owners.map(([owner, bytes]) => {
      const item = element("li");
      const key = element("i");
      key.dataset["owner"] = owner;
      item.append(key, element("span", "", owner), element("b", "", size(bytes)));
      return item;
    }),
  );
}

/** @param {string} title @param {Weight[]} weights */
export function bars(title, weights) {
  const group = element("div", "bars");
  const longest = Math.max(...weights.map(({ bytes }) => bytes));
  group.append(
    element("h3", "", title),
    ...weights.map(({ what, bytes, parts }) => {
      const row = element("p", parts ? "ours" : "");
      const track = element("span", "track");
      for (const [owner, part] of parts ?? [["", bytes]]) {
        const piece = element("i");
        piece.dataset["owner"] = String(owner);
        piece.style.width = `${(100 * Number(part)) / longest}%`;
        track.append(piece);
      }
      row.append(element("span", "what", what), track, element("b", "", size(bytes)));
      return row;
    }),
  );
  return group;
}

/**
 * Newest first; older ones fall off the end.
 * @param {string} what
 * @param {{ milliseconds: number, requests: number, bytes: number }} cost
 */
export function logCost(what, { milliseconds, requests, bytes }) {
  const row = document.createElement("tr");
  row.append(...[what, time(milliseconds), String(requests), size(bytes)].map((text) => element("td", "", text)));
  const log = byId("log");
  log.prepend(row);
  while (log.children.length > 6) log.lastElementChild?.remove();
}

let lessonsMade = 0;

/**
 * A label and its examples, to be written.
 * @param {string} label
 * @param {string} examples one a line
 */
export function lessonOf(label, examples) {
  const number = ++lessonsMade;
  const lesson = element("div", "lesson");
  const input = Object.assign(document.createElement("input"), {
    type: "text",
    value: label,
    maxLength: 30,
    required: true,
    autocomplete: "off",
    placeholder: "label",
  });
  input.setAttribute("aria-label", `Label ${number}`);
  const remove = Object.assign(element("button", "remove", "×"), { type: "button" });
  remove.setAttribute("aria-label", `Remove label ${number}`);
  const lines = Object.assign(document.createElement("textarea"), {
    value: examples,
    rows: 8,
    spellcheck: false,
    placeholder: "examples, one a line",
  });
  lines.setAttribute("aria-label", `Examples of label ${number}, one a line`);
  lesson.append(input, remove, lines);
  return lesson;
}

/**
 * @param {readonly number[]} losses of the steps taken
 * @param {number} steps in all
 */
export function drawLoss(losses, steps) {
  const top = Math.max(...losses) || 1;
  const points = losses.map((loss, i) => `${((i + 1) / steps) * 100},${100 - (loss / top) * 96}`);
  const picture = byId("loss");
  picture.querySelector("polyline")?.setAttribute("points", points.join(" "));
  const fell =
    losses.length > 1 ? `: ${losses[0].toFixed(2)} at first, now ${losses[losses.length - 1].toFixed(2)}` : "";
  picture.setAttribute("aria-label", `The loss, step by step${fell}`);
}

/** @param {import("./client.js").Progress | undefined} progress undefined: done */
export function drawProgress(progress) {
  const line = byId("progress");
  line.classList.toggle("done", !progress);
  if (!progress) return;
  const { what, done, total } = progress;
  line.style.setProperty("--share", String(done && total ? done / total : 1));
  const text = /** @type {HTMLElement} */ (line.lastElementChild);
  text.textContent = done && total ? `${what}, ${size(done)} of ${size(total)}` : what;
}

/** @param {string} title @param {string} advice @param {string} detail */
export function drawFailure(title, advice, detail) {
  const box = byId("failure");
  box.hidden = false;
  box.replaceChildren(element("b", "", title), element("p", "", advice), element("code", "", detail));
}
