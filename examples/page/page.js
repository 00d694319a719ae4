/**
 * The page's state and events: which sentence, which task, which provider, and the calls to the worker when one of
 * them changes. Drawing is in views.js, computing in worker.js.
 */
import { startWorker } from "./client.js";
import { pickByKeys } from "./keys.js";
import { linkTo, nameIn, taskOf } from "./link.js";
import { keepOffline } from "./offline.js";
import { setUpTeaching } from "./teach.js";
import {
  addCard,
  byId,
  drawCard,
  drawFailure,
  drawLabels,
  drawMemory,
  drawNoAnswer,
  drawPicture,
  drawProgress,
  drawResident,
  drawSwitch,
  drawUnusable,
  logCost,
  nameOf,
  percent,
  removeCard,
  size,
  time,
} from "./views.js";

/** Tasks per call for the overview: few, so that a key pressed meanwhile is answered soon. */
const ROWS = 5;

/** @type {HTMLTextAreaElement} */
const sentence = byId("sentence");
/** @type {HTMLInputElement} */
const strength = byId("strength");
/** @type {HTMLButtonElement} */
const example = byId("example");

const worker = startWorker("worker.js", { progress: drawProgress, opened: showTasks, step: (step) => drawStep(step) });

/** @type {import("./views.js").Facts} */
let facts;
/** @type {Map<string, import("./worker.js").Task>} */
let tasks = new Map();
/** Tasks read from the pack, and their coefficients. @type {Map<string, import("./worker.js").Coefficients>} */
const resident = new Map();
/** Answer of each card, with its sentence. @type {Map<string, { text: string, label: string | undefined }>} */
const answered = new Map();
/** Tasks that could not be read, so that they are not tried again by themselves. @type {Set<string>} */
const unreadable = new Set();
/** Debian's labels of a sentence, by task. @type {{ text: string, labels: Record<string, string> }} */
let truth = { text: "", labels: {} };
let active = "";
/** The task that the visitor picked while the model was still loading. */
let picked = "";
let started = false;
let teaching = false;
/** True while the address carries a task that is not open yet: until it is, only the address has it. */
let carrying = false;

main().catch(fail);

async function main() {
  if (typeof WebAssembly === "undefined") throw Object.assign(new Error("WebAssembly is undefined"), { tag: "wasm" });
  const response = await fetch("facts.json");
  if (!response.ok) throw new Error(`facts.json: the server answered ${response.status}`);
  facts = await response.json();
  truth = facts.first;
  offerWebGpu().catch(fail);
  const carried = taskOf(location.hash);
  carrying = carried !== undefined;
  await start("wasm", carried ? undefined : nameIn(location.hash));
  if (carried) await openTask(carried).finally(() => (carrying = false));
  byId("offline").textContent = await keepOffline();
}

/** Names and sizes, which are known long before the model. @param {import("./worker.js").Task[]} opened */
function showTasks(opened) {
  tasks = new Map(opened.map((task) => [task.id, task]));
  const rows = Math.max(...opened.map(({ labels }) => labels.length));
  document.documentElement.style.setProperty("--label-rows", String(rows));
  const mean = opened.reduce((sum, { bytes }) => sum + bytes, 0) / tasks.size;
  byId("promise").textContent = `${tasks.size} tasks of ${size(Math.round(mean))} each`;
  opened.forEach(addCard);
}

async function offerWebGpu() {
  const { adapter, reason } = await worker.call("webgpu");
  /** @type {HTMLInputElement} */ (document.querySelector('[value="webgpu"]')).disabled = !adapter;
  byId("providers").title = adapter ? `WebGPU: ${adapter}` : `WebGPU: ${reason}`;
  byId("provider-note").textContent = adapter ? `WebGPU is available (${adapter}).` : `WebGPU is off: ${reason}.`;
}

/**
 * @param {import("./worker.js").Provider} provider
 * @param {string} [task]
 */
async function start(provider, task) {
  setBusy(true);
  drawProgress({ what: "starting" });
  const begun = await worker.call("start", provider, task);
  if (active === "") {
    const { requests, bytes } = begun.reads;
    byId("cold").textContent = `Cold start: ${requests} requests and ${size(bytes)} of a pack of ${size(facts.pack)}`;
  }
  active = begun.task;
  strength.value = "1";
  keep([[active, begun.coefficients]], begun.memory);
  showTask();
  const name = provider === "wasm" ? "WASM" : "WebGPU";
  logCost(`start on ${name}`, { ...begun.reads, milliseconds: begun.milliseconds });
  const folded = "a switch writes the task into the weights, which never leave the GPU";
  byId("mode").textContent = `Runs on ${name}, mode ${begun.mode}: ${begun.mode === "folded" ? folded : begun.reason}.`;
  drawSwitch(begun.switched);
  drawProgress(undefined);
  setBusy(false);
  const wanted = picked;
  picked = "";
  if (wanted !== "" && wanted !== active) return switchTo(wanted);
  await ask();
  await loadRest();
}

/** @param {boolean} busy */
function setBusy(busy) {
  started = !busy;
  showBusy();
  strength.disabled = example.disabled = busy;
  /** @type {HTMLButtonElement} */ (byId("forget")).disabled = busy;
  setTeachable();
}

let loading = false;

/** Reads the tasks that were not read yet, so that all of them answer. One that is damaged does not stop the others. */
async function loadRest() {
  const ids = [...tasks.keys()].filter((id) => !resident.has(id) && !unreadable.has(id));
  if (loading || !started || ids.length === 0) return;
  loading = true;
  showBusy();
  try {
    const report = await worker.call("load", ids);
    keep(report.coefficients, report.memory);
    for (const { id, why } of report.unreadable) {
      unreadable.add(id);
      drawUnusable(id, why);
    }
    logCost(`${ids.length} tasks ahead`, report);
    await ask();
  } finally {
    loading = false;
    showBusy();
  }
}

function setTeachable() {
  /** @type {HTMLButtonElement} */ (byId("teach-button")).disabled = !started;
  /** @type {HTMLInputElement} */ (byId("task-file")).disabled = !started || teaching;
}

/**
 * @param {Iterable<readonly [string, import("./worker.js").Coefficients]>} read
 * @param {import("./worker.js").MemoryReport} memory
 */
function keep(read, memory) {
  for (const [id, coefficients] of read) {
    if (!resident.has(id)) drawResident(id, coefficients);
    resident.set(id, coefficients);
  }
  const shipped = [...tasks.values()].filter(({ own }) => !own);
  drawMemory(facts, memory, shipped.length, shipped.filter(({ id }) => resident.has(id)).length);
}

/** The chosen card is that of the active task, whatever was clicked meanwhile. */
function checkCard() {
  radioOf(active).checked = true;
}

/**
 * @param {string} id
 * @returns {HTMLInputElement}
 */
function radioOf(id) {
  return /** @type {HTMLInputElement} */ (document.querySelector(`#cards [value="${CSS.escape(id)}"]`));
}

/** @param {string} id */
function labelsOf(id) {
  return /** @type {import("./worker.js").Task} */ (tasks.get(id)).labels;
}

function showTask() {
  const { own, bytes } = /** @type {import("./worker.js").Task} */ (tasks.get(active));
  [byId("active-family").textContent, byId("active-name").textContent] = own ? ["yours", active] : nameOf(active);
  byId("own").hidden = !own;
  byId("download").textContent = `Download it, ${size(bytes)}`;
  checkCard();
  drawPicture(/** @type {import("./worker.js").Coefficients} */ (resident.get(active)));
  byId("strength-value").textContent = percent(Number(strength.value));
  if (own) showLink(active).catch(fail);
  else showAddress(`#${encodeURIComponent(active)}`);
}

/** Browsers refuse a page that writes its address often. @param {string} address */
function showAddress(address) {
  if (!carrying && location.hash !== new URL(address, location.href).hash) history.replaceState(null, "", address);
}

/**
 * The address carries a task that was taught here, if it is small enough: it survives a reload, and friends can have
 * it.
 * @param {string} id
 */
async function showLink(id) {
  const link = linkTo(id, await worker.call("file", id));
  if (id !== active) return;
  byId("link").hidden = link === undefined || !navigator.clipboard;
  showAddress(link ?? `#${encodeURIComponent(id)}`);
}

/** The latest request; calls during a switch only replace it. */
let wish = { task: "", strength: 1 };
/** The switches to it. @type {Promise<void> | undefined} */
let switching;

/**
 * @param {string} task
 * @param {number} [amount]
 */
async function switchTo(task, amount = 1) {
  wish = { task, strength: amount };
  if (!started) picked = task;
  if (switching || !started) return switching;
  switching = switchToWish();
  showBusy();
  try {
    await switching;
  } finally {
    switching = undefined;
    showBusy();
  }
  await ask();
  // Those that the server did not give before.
  await loadRest();
}

async function switchToWish() {
  try {
    for (let done; done !== wish; ) {
      const goal = (done = wish);
      const report = await worker.call("switchTask", goal.task, goal.strength).catch((error) => {
        if (goal === wish) throw error;
        fail(error);
      });
      if (!report) continue;
      // Another strength of the same task moves the bars; another task has its own labels.
      if (active !== goal.task) drawLabels(labelsOf(goal.task), undefined);
      active = goal.task;
      strength.value = String(goal.strength);
      byId("failure").hidden = true;
      keep([[active, report.coefficients]], report.memory);
      showTask();
      drawSwitch(report);
      logCost(goal.strength === 1 ? active : `${active} at ${percent(goal.strength)}`, report);
    }
  } catch (error) {
    checkCard();
    throw error;
  }
}

let asking = false;
let askAgain = false;

/** Makes screen readers, and the test, wait. */
function showBusy() {
  document
    .querySelector("main")
    ?.setAttribute("aria-busy", String(!started || switching !== undefined || asking || loading));
}

/** Updates answer and cards for the sentence and the task; starts over when one of them changes meanwhile. */
async function ask() {
  askAgain = true;
  if (asking || !started) return;
  asking = true;
  showBusy();
  try {
    while (askAgain && started) {
      askAgain = false;
      await askOnce(sentence.value.trim());
    }
  } finally {
    asking = false;
    showBusy();
  }
}

/** @param {string} text */
async function askOnce(text) {
  const task = active;
  const labels = labelsOf(task);
  if (text === "") return drawNoSentence(labels);
  const answer = await worker.call("classify", text);
  if (task !== active) return;
  drawLabels(labels, answer.probabilities);
  byId("run-time").textContent = time(answer.milliseconds);
  announce(task, labels, answer.probabilities);
  const stale = [...resident.keys()].filter((id) => answered.get(id)?.text !== text);
  let [spent, how] = [0, ""];
  for (let at = 0; at < stale.length && started && !askAgain; at += ROWS) {
    const { rows, batch, milliseconds } = await worker.call("classifyAll", text, stale.slice(at, at + ROWS));
    for (const { id, probabilities, unusable } of rows) {
      const best = probabilities.indexOf(Math.max(...probabilities));
      if (unusable === undefined) drawCard(id, labelsOf(id)[best], probabilities[best], truthOf(text)[id]);
      else drawUnusable(id, unusable);
      answered.set(id, { text, label: labelsOf(id)[best] });
    }
    spent += milliseconds;
    how = batch ? "one task per row of a batch" : "one task after the other";
  }
  if (askAgain || stale.length < 2) return;
  const agreed = Object.entries(truthOf(text)).filter(([id, label]) => answered.get(id)?.label === label).length;
  const known = Object.keys(truthOf(text)).length;
  const judged = known > 1 ? `; Debian agrees with ${agreed} of ${known}` : "";
  byId("tasks-note").textContent = `${stale.length} answers in ${time(spent)}, ${how}${judged}`;
}

/**
 * Nothing is asked, so nothing is answered.
 * @param {readonly string[]} labels of the active task
 */
function drawNoSentence(labels) {
  const hint = "Write a few words about a program, and all tasks answer.";
  drawLabels(labels, undefined);
  answered.clear();
  for (const id of resident.keys()) drawNoAnswer(id);
  byId("run-time").textContent = "–";
  byId("tasks-note").textContent = "";
  byId("truth").textContent = hint;
  say(hint);
}

/**
 * Returns Debian's labels, by task; none for sentences that visitors write.
 * @param {string} text
 * @returns {Record<string, string>}
 */
function truthOf(text) {
  return text === truth.text ? truth.labels : {};
}

function showTruth() {
  const labels = Object.values(truthOf(sentence.value.trim()));
  byId("truth").textContent = labels.length ? `Debian says: ${labels.join(", ")}` : "";
}

/** @type {ReturnType<typeof setTimeout> | undefined} */
let announcing;

/** Announces a text to screen readers, once the typing pauses. @param {string} text */
function say(text) {
  clearTimeout(announcing);
  announcing = setTimeout(() => void (byId("status").textContent = text), 400);
}

/**
 * @param {string} task
 * @param {readonly string[]} labels
 * @param {readonly number[]} probabilities
 */
function announce(task, labels, probabilities) {
  const best = probabilities.indexOf(Math.max(...probabilities));
  say(`${task} says ${labels[best]}, ${percent(probabilities[best])}`);
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
  [
    "wasm",
    [
      "This browser has no WebAssembly",
      "A setting or a lockdown mode may block it; allow it here, or try another browser.",
    ],
  ],
  ["worker", ["The worker did not start", "Open the page over HTTP with a recent browser: it needs module workers."]],
  ["source", ["The pack cannot be read", "Check that the server is there, then reload the page."]],
  ["format", ["The pack is damaged", "Build the page again, then reload it."]],
  ["base", ["Pack and model do not belong together", "Build the page again: it packs for the model it ships."]],
  ["task", ["This task cannot be used", "Choose another one; this one's adapter must be packed again."]],
  ["backend", ["The model cannot run here", "Reload the page to go back to WASM, or try another browser."]],
]);

sentence.addEventListener("input", () => {
  showTruth();
  ask().catch(fail);
});
sentence.addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  if (active) radioOf(active).focus();
});

byId("cards").addEventListener("change", (event) => {
  switchTo(/** @type {HTMLInputElement} */ (event.target).value).catch(fail);
});

strength.addEventListener("input", () => {
  switchTo(active, Number(strength.value)).catch(fail);
});

pickByKeys({
  cards: byId("cards"),
  everywhere: byId("keys"),
  ids: () => [...tasks.keys()],
  active: () => active,
  namesOf: (id) => [nameOf(id)[1], id],
  pick: (id) => void switchTo(id).catch(fail),
});

// A link that is pasted into the address of an open page.
addEventListener("hashchange", () => {
  const carried = taskOf(location.hash);
  if (carried) return void openTask(carried).catch(fail);
  const id = nameIn(location.hash);
  if (tasks.has(id) && id !== active) switchTo(id).catch(fail);
});

const { drawStep, openTask } = setUpTeaching(worker, {
  tasks: () => [...tasks.values()],
  onBusy(busy) {
    teaching = busy;
    setTeachable();
  },
  async onAdded({ task, coefficients, memory }, what, cost) {
    if (resident.delete(task.id)) removeCard(task.id);
    answered.delete(task.id);
    tasks.delete(task.id);
    tasks.set(task.id, task);
    addCard(task);
    active = task.id;
    drawLabels(task.labels, undefined);
    strength.value = "1";
    keep(coefficients, memory);
    showTask();
    if (cost) logCost(what, cost);
    await ask();
  },
});

byId("link").addEventListener("click", async () => {
  await navigator.clipboard.writeText(location.href).then(() => say("The link is copied."), fail);
});

byId("download").addEventListener("click", async () => {
  try {
    const url = URL.createObjectURL(new Blob([await worker.call("file", active)]));
    Object.assign(document.createElement("a"), { href: url, download: `${active}.eigentask` }).click();
    URL.revokeObjectURL(url);
  } catch (error) {
    fail(error);
  }
});

byId("forget").addEventListener("click", async () => {
  const [id, next] = [active, [...resident.keys()].find((one) => one !== active) ?? ""];
  try {
    await switchTo(next);
    await worker.call("forget", id);
    for (const of of [tasks, resident, answered]) of.delete(id);
    removeCard(id);
    radioOf(active).focus();
  } catch (error) {
    fail(error);
  }
});

let shown = 0;

example.addEventListener("click", () => {
  const lines = facts.examples[active] ?? [];
  const line = lines[shown++ % lines.length];
  if (!line) return;
  sentence.value = line[0];
  truth = { text: line[0], labels: { [active]: line[1] } };
  // Its marks are of this task alone.
  answered.clear();
  showTruth();
  ask().catch(fail);
});

byId("providers").addEventListener("change", (event) => {
  changeProvider(/** @type {HTMLInputElement} */ (event.target)).catch(fail);
});

/**
 * Goes back to WASM if WebGPU fails, and shows its error.
 * @param {HTMLInputElement} radio
 */
async function changeProvider({ value }) {
  try {
    await start(value === "webgpu" ? "webgpu" : "wasm", active);
  } catch (error) {
    if (value === "wasm") throw error;
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
  redraw();
});
dark.addEventListener("change", redraw);

/** Pictures are pixels in the colours of the theme. */
function redraw() {
  for (const [id, coefficients] of resident) drawResident(id, coefficients);
  const coefficients = resident.get(active);
  if (coefficients) drawPicture(coefficients);
}
