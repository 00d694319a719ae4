/**
 * Draws the state of page.js into the document. No state, no events, no computing except units of measure.
 */
import { bars, byId, drawLegend, element, ownersOf, size, time } from "../views.js";

/**
 * @typedef {import("./worker.js").Skill} Skill
 * @typedef {import("./build.js").Facts} Facts
 */

/** Lines of the log; older ones fall off its end. */
const MESSAGES = 8;

/**
 * Adds the card of a skill, a radio button.
 * @param {Skill} skill
 */
export function addCard({ id, what, bytes, own }) {
  const card = element("label", "card resident");
  card.dataset["task"] = id;
  card.title = what;
  const radio = document.createElement("input");
  Object.assign(radio, { type: "radio", name: "task", value: id });
  const head = element("span", "head");
  head.append(element("span", "number"), element("span", "family", own ? "yours" : ""));
  head.append(element("span", "bytes", size(bytes)));
  const said = element("span", "said");
  said.append(element("b"));
  card.append(radio, head, element("span", "name", id), said);
  byId("cards").append(card);
}

/** @param {string} id */
export const cardOf = (id) =>
  /** @type {HTMLElement} */ (document.querySelector(`.card[data-task="${CSS.escape(id)}"]`));

/**
 * Draws the answer of a skill so far.
 * @param {string} id
 * @param {string} text
 */
export function drawSaid(id, text) {
  const said = /** @type {HTMLElement} */ (cardOf(id).querySelector(".said b"));
  said.textContent = text;
}

/**
 * @param {string} id of a skill that cannot be used
 * @param {string} why
 */
export function drawUnusable(id, why) {
  drawSaid(id, "cannot be used");
  cardOf(id).title = why;
}

/** @param {Skill} skill the active one */
export function drawSkill({ id, what, bytes, own }) {
  byId("active-name").textContent = id;
  byId("active-what").textContent = own ? "yours" : what;
  byId("own").hidden = !own;
  byId("download").textContent = `Download it, ${size(bytes)}`;
  /** @type {HTMLInputElement} */ (cardOf(id).querySelector("input")).checked = true;
}

/**
 * @param {Skill | undefined} skill undefined: nothing was asked
 * @param {string} text that the visitor wrote
 */
export function drawPrompt(skill, text) {
  byId("prompt").textContent = skill ? `The model reads: ${skill.prompt.before}${text}${skill.prompt.after}` : "";
}

/**
 * @param {string} text so far
 * @param {boolean} writing whether more may come
 */
export function drawReply(text, writing) {
  byId("reply").textContent = text;
  byId("reply").classList.toggle("writing", writing);
}

/** @param {number} milliseconds */
export function drawSwitch(milliseconds) {
  byId("switch-time").textContent = time(milliseconds);
}

/**
 * @typedef {{ switch?: number, first: number, milliseconds: number, steps: number }} Cost times in milliseconds; no
 *   switch where the skill was active before
 */

/** @param {Cost | undefined} cost undefined: not known yet */
export function drawCost(cost) {
  // The first token has a figure of its own: it reads the whole prompt.
  const pace = cost && cost.steps > 1 ? (((cost.steps - 1) * 1e3) / (cost.milliseconds - cost.first)).toFixed(1) : "–";
  if (cost?.switch !== undefined) drawSwitch(cost.switch);
  byId("first-time").textContent = cost && cost.first >= 0 ? time(cost.first) : "–";
  byId("pace").textContent = pace;
}

/**
 * Newest first.
 * @param {string} message
 * @param {{ switch?: number, first: number, milliseconds: number }} cost in milliseconds
 */
export function logMessage(message, cost) {
  const row = document.createElement("tr");
  const shown = (/** @type {number | undefined} */ value) => (value !== undefined && value >= 0 ? time(value) : "–");
  const texts = [message, shown(cost.switch), shown(cost.first), shown(cost.milliseconds)];
  row.append(...texts.map((text) => element("td", "", text)));
  const log = byId("log");
  log.prepend(row);
  while (log.children.length > MESSAGES) log.lastElementChild?.remove();
}

/**
 * Bars on one scale each: memory of the skills alone, their files, and memory with the model. Models and adapters count
 * by the bytes of their files.
 * @param {Facts} facts
 * @param {import("./worker.js").MemoryReport} memory
 * @param {number} count skills of the pack's file
 */
export function drawMemory({ model, pack, adapters }, memory, count) {
  const used = ownersOf(memory);
  byId("weights").replaceChildren(
    bars("Skills alone, in memory", [
      { what: `this page, all ${count}`, bytes: memory.total, parts: used },
      { what: `${count} adapters`, bytes: adapters },
    ]),
    bars("Skills alone, as files", [
      { what: "one pack", bytes: pack, parts: [["components", pack]] },
      { what: `${count} adapters`, bytes: adapters },
    ]),
    bars("With the model, in memory", [
      { what: "this page", bytes: model + memory.total, parts: [["model", model], ...used] },
      { what: `one model, ${count} adapters`, bytes: model + adapters },
      { what: `${count} models`, bytes: count * model },
    ]),
  );
  drawLegend([["model", model], ...used]);
}
