/**
 * The form in which a visitor teaches a task: labels with examples, a curve of the loss, task files. page.js does the
 * rest.
 */
import { byId, drawLoss, lessonOf, nameOf, percent, size, time } from "./views.js";

/**
 * @typedef {import("./client.js").WorkerFailure} WorkerFailure
 * @typedef {import("./worker.js").Step} Step
 * @typedef {NonNullable<Awaited<ReturnType<import("./worker.js").Calls["open"]>>>} Added
 * @typedef {{ milliseconds: number, requests: number, bytes: number }} Cost
 */

/** Most bytes of a file that is opened: a task takes a few thousand. */
const MOST_BYTES = 16e6;

/** Initial content of the form. */
const LESSONS = [
  [
    "astronomy",
    [
      "desktop planetarium that shows the night sky",
      "control telescopes and mounts from the command line",
      "stacks photographs of deep sky objects",
      "predicts when satellites pass overhead",
      "star catalogue with a million entries",
      "library to read images of observatories",
      "calculates the phases of the moon",
      "simulator of planets and their orbits",
    ],
  ],
  [
    "chemistry",
    [
      "draws molecules and reaction schemes",
      "molecular dynamics of proteins in water",
      "converts between file formats of molecules",
      "viewer for crystal structures",
      "periodic table of the elements",
      "computes the spectra of small molecules",
      "library for quantum chemistry",
      "titration curves and the acidity of solutions",
    ],
  ],
];

/** @type {HTMLFormElement} */
const form = byId("teach");
/** @type {HTMLFieldSetElement} */
const lessons = byId("lessons");
/** @type {HTMLButtonElement} */
const button = byId("teach-button");
/** @type {HTMLInputElement} */
const file = byId("task-file");
/** @type {HTMLInputElement} */
const name = byId("task-name");

/**
 * @param {import("./client.js").Caller<import("./worker.js").Calls>} worker
 * @param {object} page
 * @param {() => import("./worker.js").Task[]} page.tasks
 * @param {(busy: boolean) => void} page.onBusy
 * @param {(added: Added, what: string, cost?: Cost) => Promise<void>} page.onAdded
 * @returns {{ drawStep(step: Step): void, openTask(file: File): Promise<void> }} `drawStep` takes the steps that the
 *   worker reports
 */
export function setUpTeaching(worker, { tasks, onBusy, onAdded }) {
  /** @type {number[]} */
  let losses = [];
  let busy = false;

  for (const [label, texts] of LESSONS) addLesson(String(label), [...texts].join("\n"));

  // One that was taught before may be taught again.
  const nameProblem = () =>
    nameProblemOf(
      name.value.trim(),
      tasks().filter(({ own }) => !own),
    );

  name.addEventListener("input", () => {
    if (busy) return;
    const problem = nameProblem();
    name.setAttribute("aria-invalid", String(problem !== ""));
    note(problem, true);
  });

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (busy) return void worker.call("stop");
    const [labels, examples] = written();
    const problem = nameProblem() || lessonProblem(labels, examples);
    if (problem) return note(problem, true);
    name.setAttribute("aria-invalid", "false");
    busy = lessons.disabled = file.disabled = true;
    button.textContent = "Stop";
    onBusy(true);
    drawLoss((losses = []), 1);
    byId("teach-step").textContent = "The loss will fall here, step by step";
    note("Getting ready");
    try {
      const taught = await worker.call("teach", name.value.trim(), labels, examples);
      if (!taught) return note("Stopped before the first step: nothing was learned");
      const { task, step, steps, milliseconds } = taught;
      await onAdded(taught, `taught ${task.id}`, taught);
      const whole = step === steps ? `Learned in ${time(milliseconds)}` : `Stopped after ${step} of ${steps} steps`;
      note(`${whole}: ${task.id} is a task of ${size(task.bytes)}. Type a sentence above to try it.`);
    } catch (error) {
      note(/** @type {Error} */ (error).message, true);
    } finally {
      busy = lessons.disabled = file.disabled = false;
      button.textContent = "Teach";
      onBusy(false);
    }
  });

  byId("add-label").addEventListener("click", () => addLesson("", "").querySelector("input")?.focus());

  lessons.addEventListener("click", ({ target }) => {
    const removed = /** @type {HTMLElement} */ (target).closest(".remove")?.closest(".lesson");
    if (!removed) return;
    removed.remove();
    byId("add-label").focus();
  });

  /** @param {File} chosen */
  async function openTask(chosen) {
    const id = chosen.name.replace(/\.eigentask$/, "");
    try {
      const tooLarge = `A task takes a few kilobytes, and this file ${size(chosen.size)}.`;
      const problem = chosen.size > MOST_BYTES ? tooLarge : nameProblemOf(id, tasks());
      if (problem) return note(`${chosen.name} was not opened. ${problem}`, true);
      const added = await worker.call("open", id, chosen);
      await onAdded(added, `opened ${added.task.id}`);
      note(`${added.task.id} is open. Type a sentence above to try it.`);
    } catch (error) {
      const { message, tag = "" } = /** @type {WorkerFailure} */ (error);
      note(`${chosen.name} was not opened. ${OPENING.get(tag) ?? ""}`, true, message);
    }
  }

  file.addEventListener("change", async () => {
    const chosen = file.files?.item(0);
    if (chosen) await openTask(chosen);
    // So that the same file can be chosen again.
    file.value = "";
  });

  /** @param {Step} step */
  function drawStep({ step, steps, loss }) {
    losses.push(loss);
    drawLoss(losses, steps);
    byId("teach-step").textContent = `Step ${step} of ${steps}, loss ${loss.toFixed(3)}`;
    // Screen readers need not hear every step.
    if (step % Math.ceil(steps / 4) === 0) note(`${percent(step / steps)} done`);
  }

  return { drawStep, openTask };
}

/** @param {string} label @param {string} examples */
function addLesson(label, examples) {
  const lesson = lessonOf(label, examples);
  lessons.append(lesson);
  return lesson;
}

/** Labels and examples as written. */
function written() {
  const blocks = Array.from(lessons.querySelectorAll(".lesson"), (block) => {
    const label = /** @type {HTMLInputElement} */ (block.querySelector("input")).value.trim();
    const lines = /** @type {HTMLTextAreaElement} */ (block.querySelector("textarea")).value.split("\n");
    return { label, texts: lines.map((line) => line.trim()).filter(Boolean) };
  });
  const labels = blocks.map(({ label }) => label);
  const examples = blocks.flatMap(({ label, texts }) => texts.map((text) => ({ text, label })));
  return /** @type {[typeof labels, typeof examples]} */ ([labels, examples]);
}

/** Faults of a task file, by the tag of the error. */
const OPENING = new Map([
  ["format", "It is not a task, or it was damaged on its way. Get it again."],
  ["task", "It was made for another pack, or it has no labels that this page can show. Make it for this page."],
  ["base", "It was made for another model. Make it for this page."],
]);

/**
 * @param {string} name of a task to be
 * @param {readonly import("./worker.js").Task[]} others that there are
 * @returns {string} what is wrong with it, or nothing
 */
function nameProblemOf(name, others) {
  if (name === "") return "Give the task a name.";
  // The cards show the second half of "debtags-game".
  const same = (/** @type {string} */ other) => other.toLowerCase() === name.toLowerCase();
  const taken = others.find(({ id, own }) => same(id) || (!own && same(nameOf(id)[1])));
  return taken ? `There is a task called ${name} already. Choose another name.` : "";
}

/**
 * @param {readonly string[]} labels
 * @param {readonly import("./worker.js").Example[]} examples
 * @returns {string} why nothing can be learned from them, or nothing
 */
function lessonProblem(labels, examples) {
  if (labels.length < 2) return "A task needs two labels or more. Add a label.";
  if (labels.includes("")) return "A label has no name. Give it one, or remove it.";
  const twice = labels.find((label, i) => labels.indexOf(label) < i);
  if (twice !== undefined) return `Two labels are called ${twice}. Give each its own name.`;
  const without = labels.find((label) => examples.every((example) => example.label !== label));
  return without === undefined ? "" : `The label ${without} has no examples. Write a line or more for it.`;
}

/**
 * @param {string} text
 * @param {boolean} [wrong]
 * @param {string} [detail] for those who want to know more
 */
function note(text, wrong = false, detail = "") {
  const line = byId("teach-note");
  line.classList.toggle("wrong", wrong);
  line.replaceChildren(text);
  if (!detail) return;
  const code = document.createElement("code");
  code.textContent = detail;
  line.append(" ", code);
}
