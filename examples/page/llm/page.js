/**
 * The state and events of the page with a language model: which words, which skill, which provider, and the calls to
 * the worker when one of them changes. Drawing is in views.js, computing in worker.js.
 */
import { startWorker } from "../client.js";
import { pickByKeys } from "../keys.js";
import { nameIn } from "../link.js";
import { keepOffline } from "../offline.js";
import { byId, drawFailure, drawProgress, size, time } from "../views.js";
import { setUpTeaching } from "./teach.js";
import {
  addCard,
  cardOf,
  drawCost,
  drawMemory,
  drawPrompt,
  drawReply,
  drawSaid,
  drawSkill,
  drawSwitch,
  drawUnusable,
  logMessage,
} from "./views.js";

/** @typedef {import("./worker.js").Skill} Skill */

/** Most bytes of a file that is opened: a skill takes some hundred thousand. */
const MOST_BYTES = 16e6;

/** @type {HTMLTextAreaElement} */
const sentence = byId("sentence");
/** @type {HTMLInputElement} */
const file = byId("task-file");
const buttons = /** @type {HTMLButtonElement[]} */ (["ask", "ask-all", "example"].map((id) => byId(id)));

/** @type {import("../client.js").Caller<import("./worker.js").Calls>} */
const worker = startWorker("worker.js", {
  progress: drawProgress,
  opened: showSkills,
  text: drawText,
  step: (step) => drawStep(step),
});

/** @type {import("./build.js").Facts} */
let facts;
/** @type {Map<string, Skill>} */
const skills = new Map();
/** Skills that could not be read. @type {Set<string>} */
const unreadable = new Set();
let active = "";
let started = false;
/** Number of the newest request. What older ones bring is not shown. */
let request = 0;
/** Requests that the page waits for. */
let waiting = 0;

work(main);

async function main() {
  if (typeof WebAssembly === "undefined") throw Object.assign(new Error("WebAssembly is undefined"), { tag: "wasm" });
  const response = await fetch("facts.json");
  if (!response.ok) throw new Error(`facts.json: the server answered ${response.status}`);
  facts = await response.json();
  const [first, words] = facts.first;
  // One that was taught here is gone after a reload.
  const asked = nameIn(location.hash);
  const wanted = Object.hasOwn(facts.skills, asked) ? asked : first;
  sentence.value = wanted === first ? words : (facts.skills[wanted].examples[0]?.[0] ?? words);
  byId("model-name").textContent = facts.name;
  offerWebGpu().catch(fail);
  await start("wasm", wanted);
  void keepOffline().then((how) => void (byId("offline").textContent = how));
}

/**
 * Does what the visitor asked for, shows failures, and makes screen readers, and the test, wait.
 * @param {() => Promise<unknown>} what
 */
async function work(what) {
  const busy = () => document.querySelector("main")?.setAttribute("aria-busy", String(waiting > 0));
  waiting++;
  busy();
  try {
    await what();
  } catch (error) {
    fail(error);
  } finally {
    waiting--;
    busy();
  }
}

/** Names and sizes, which are known long before the model. @param {Skill[]} opened */
function showSkills(opened) {
  for (const one of opened) {
    skills.set(one.id, one);
    addCard(one);
  }
  const mean = opened.reduce((sum, one) => sum + one.bytes, 0) / skills.size;
  byId("promise").textContent = `${skills.size} skills of ${size(Math.round(mean))} each`;
}

async function offerWebGpu() {
  const { adapter, reason } = await worker.call("webgpu");
  /** @type {HTMLInputElement} */ (document.querySelector('[value="webgpu"]')).disabled = !adapter;
  byId("provider-note").textContent = adapter ? `WebGPU is available (${adapter}).` : `WebGPU is off: ${reason}.`;
}

/**
 * @param {import("./worker.js").Provider} provider
 * @param {string} [skill]
 */
async function start(provider, skill) {
  setStarted(false);
  drawProgress({ what: "starting" });
  const begun = await worker.call("start", provider, skill);
  if (byId("cold").textContent?.trim() === "") {
    const { requests, bytes } = begun.reads;
    byId("cold").textContent = `Cold start: ${requests} requests and ${size(bytes)} of a pack of ${size(facts.pack)}`;
  }
  // Another one may have been picked while the model was loading.
  if (active === "") active = begun.skill;
  drawSwitch(begun.switched);
  const name = provider === "wasm" ? "WASM" : "WebGPU";
  byId("mode").textContent =
    `Runs on ${name}, mode ${begun.mode}: ${begun.reason}. Ready in ${time(begun.milliseconds)}.`;
  drawProgress(undefined);
  setStarted(true);
  showSkill();
  await Promise.all([ask(), loadRest()]);
}

/** Reads the skills that were not read yet, so that no switch waits for the server. */
async function loadRest() {
  const { memory, unreadable: bad } = await worker.call("load", [...skills.keys()]);
  for (const { id, why } of bad) {
    unreadable.add(id);
    drawUnusable(id, why);
  }
  showMemory(memory);
}

/** @param {boolean} now */
function setStarted(now) {
  started = now;
  for (const button of buttons) button.disabled = !now;
  file.disabled = !now;
  /** @type {HTMLButtonElement} */ (byId("teach-button")).disabled = !now;
}

/** @param {import("./worker.js").MemoryReport} memory */
function showMemory(memory) {
  drawMemory(facts, memory, [...skills.values()].filter(({ own }) => !own).length);
}

function skillNow() {
  return /** @type {Skill} */ (skills.get(active));
}

function showSkill() {
  drawSkill(skillNow());
  const address = `#${encodeURIComponent(active)}`;
  if (location.hash !== address) history.replaceState(null, "", address);
}

/** Forgets what was answered to other words. @returns the words, and the number of the request */
async function begin() {
  const mine = ++request;
  await worker.call("wish", mine);
  byId("failure").hidden = true;
  const text = sentence.value.trim();
  byId("ask-empty").hidden = text !== "";
  return { mine, text };
}

/** The active skill answers. */
async function ask() {
  const { mine, text } = await begin();
  const skill = skillNow();
  drawPrompt(text ? skill : undefined, text);
  drawCost(undefined);
  drawReply("", text !== "");
  if (!text) return say("Write a word first.");
  const answer = await worker.call("answer", mine, skill.id, text).catch((error) => {
    if (mine === request) drawReply("", false);
    throw error;
  });
  if (mine !== request || answer.stopped) return;
  drawReply(answer.text, false);
  drawSaid(skill.id, answer.text);
  drawCost(answer);
  showMemory(answer.memory);
  logMessage(`${skill.id}: ${text} → ${answer.text}`, answer);
  say(`${skill.id} answers ${answer.text}`);
}

/** All skills answer, one a row of a batch. */
async function askAll() {
  const { mine, text } = await begin();
  if (!text) return say("Write a word first.");
  const ids = [...skills.keys()].filter((id) => !unreadable.has(id));
  for (const id of ids) drawSaid(id, "");
  byId("tasks-note").textContent = `${ids.length} skills answer`;
  const all = await worker.call("answerAll", mine, ids, text);
  if (mine !== request || all.stopped) return;
  ids.forEach((id, row) => drawSaid(id, all.texts[row]));
  const how = all.batch ? "a skill per row of a batch" : "one skill after the other";
  const note = `${ids.length} answers, ${all.tokens} tokens in ${time(all.milliseconds)}: ${how}`;
  byId("tasks-note").textContent = note;
  logMessage(`all ${ids.length}: ${text}`, all);
  say(note);
}

/**
 * Draws the answer so far.
 * @param {{ request: number, texts: [id: string, text: string][] }} report
 */
function drawText({ request: of, texts }) {
  if (of !== request) return;
  for (const [id, text] of texts) drawSaid(id, text);
  if (texts.length === 1 && texts[0][0] === active) drawReply(texts[0][1], true);
}

/** @param {string} text for screen readers */
function say(text) {
  byId("status").textContent = text;
}

/** @param {unknown} error */
function fail(error) {
  const { message, tag } = /** @type {Error & { tag?: string }} */ (error);
  drawProgress(undefined);
  const [title, advice] = FAILURES.get(tag ?? "") ?? ["This did not work", "Reload the page, or build it again."];
  drawFailure(title, advice, message);
}

/** Title and advice of each tag of an error. @type {Map<string, [title: string, advice: string]>} */
const FAILURES = new Map([
  ["wasm", ["This browser has no WebAssembly", "Allow it here, or try another browser."]],
  ["worker", ["The worker did not start", "Open the page over HTTP with a recent browser: it needs module workers."]],
  ["source", ["The pack cannot be read", "Check that the server is there, then reload the page."]],
  ["format", ["The pack is damaged", "Build the page again, then reload it."]],
  ["base", ["Pack and model do not belong together", "Build the page again with a pack for its model."]],
  ["task", ["This skill cannot be used", "Choose another one; this one's adapter must be packed again."]],
  ["backend", ["The model cannot run here", "Reload the page to go back to WASM, or try another browser."]],
]);

sentence.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.isComposing) return;
  event.preventDefault();
  if (started) work(ask);
});
byId("ask").addEventListener("click", () => work(ask));
byId("ask-all").addEventListener("click", () => work(askAll));

let shown = 0;

byId("example").addEventListener("click", () => {
  const examples = facts.skills[active]?.examples ?? [];
  const example = examples[shown++ % examples.length];
  if (!example) return;
  sentence.value = example[0];
  work(ask);
});

/** @param {string} id */
function pick(id) {
  active = id;
  showSkill();
  if (started) work(ask);
}

byId("cards").addEventListener("change", ({ target }) => pick(/** @type {HTMLInputElement} */ (target).value));

// A link that is pasted into the address of an open page.
addEventListener("hashchange", () => {
  const id = nameIn(location.hash);
  if (skills.has(id) && id !== active) pick(id);
});

pickByKeys({
  cards: byId("cards"),
  everywhere: byId("keys"),
  ids: () => [...skills.keys()],
  active: () => active,
  namesOf: (id) => [id.toLowerCase()],
  pick,
});

/**
 * Shows a skill that was taught or opened, and lets it answer.
 * @param {{ skill: Skill, memory: import("./worker.js").MemoryReport }} added
 */
async function onAdded({ skill, memory }) {
  if (skills.delete(skill.id)) cardOf(skill.id).remove();
  skills.set(skill.id, skill);
  addCard(skill);
  active = skill.id;
  showSkill();
  showMemory(memory);
  await ask();
}

const drawStep = setUpTeaching(worker, {
  skills: () => [...skills.values()],
  async onAdded(added) {
    await work(() => onAdded(added));
  },
});

file.addEventListener("change", () => {
  const chosen = file.files?.item(0);
  if (chosen) work(() => openFile(chosen));
});

/** @param {File} chosen */
async function openFile(chosen) {
  const id = chosen.name.replace(/\.eigentask$/, "");
  const problem = skills.has(id)
    ? `There is a skill called ${id} already. Rename the file.`
    : chosen.size > MOST_BYTES && `A skill takes some hundred kilobytes, and this file ${size(chosen.size)}.`;
  // So that the same file can be chosen again.
  file.value = "";
  if (problem) return note(`${chosen.name} was not opened. ${problem}`, true);
  try {
    await onAdded(await worker.call("open", id, chosen));
    note(`${id} is open. Write something above to try it.`);
  } catch (error) {
    const { message, tag = "" } = /** @type {import("../client.js").WorkerFailure} */ (error);
    note(`${chosen.name} was not opened. ${OPENING.get(tag) ?? message}`, true);
  }
}

/** Faults of a file, by the tag of the error. */
const OPENING = new Map([
  ["format", "It is not a skill, or it was damaged on its way. Get it again."],
  ["task", "It was made for another pack. Make it for this page."],
  ["base", "It was made for another model. Make it for this page."],
]);

/** @param {string} text @param {boolean} [wrong] */
function note(text, wrong = false) {
  byId("open-note").textContent = text;
  byId("open-note").classList.toggle("wrong", wrong);
}

byId("download").addEventListener("click", () =>
  work(async () => {
    const url = URL.createObjectURL(new Blob([await worker.call("file", active)]));
    Object.assign(document.createElement("a"), { href: url, download: `${active}.eigentask` }).click();
    URL.revokeObjectURL(url);
  }),
);

byId("forget").addEventListener("click", () =>
  work(async () => {
    const id = active;
    active = [...skills.keys()].find((one) => one !== id && !unreadable.has(one)) ?? "";
    showSkill();
    await ask();
    showMemory(await worker.call("forget", id));
    skills.delete(id);
    cardOf(id).remove();
    cardOf(active).querySelector("input")?.focus();
  }),
);

byId("providers").addEventListener("change", ({ target }) => {
  const { value } = /** @type {HTMLInputElement} */ (target);
  work(() => changeProvider(value === "webgpu" ? "webgpu" : "wasm"));
});

/**
 * Goes back to WASM if WebGPU fails, and shows its error.
 * @param {import("./worker.js").Provider} provider
 */
async function changeProvider(provider) {
  try {
    await start(provider, active);
  } catch (error) {
    if (provider === "wasm") throw error;
    /** @type {HTMLInputElement} */ (document.querySelector('#providers [value="wasm"]')).checked = true;
    byId("provider-note").textContent = `WebGPU failed here: ${/** @type {Error} */ (error).message}`;
    await start("wasm", active);
  }
}

const dark = matchMedia("(prefers-color-scheme: dark)");
byId("theme").addEventListener("click", () => {
  const { dataset } = document.documentElement;
  const now = dataset["theme"] ?? (dark.matches ? "dark" : "light");
  dataset["theme"] = now === "dark" ? "light" : "dark";
});
