/**
 * The form in which a visitor teaches a task: labels with examples, a curve of the loss, task files. page.js does the rest.
 */
import { byId, drawLoss, lessonOf, percent, size, time } from "./views.js";

/**
 * @typedef {import("./client.js").WorkerFailure} WorkerFailure
 * @typedef {import("./worker.js").Step} Step
 * @typedef {NonNullable<Awaited<ReturnType<import("./worker.js").Calls["open"]>>>} Added
 * @typedef {{ milliseconds: number, requests: number, bytes: number }} Cost
 */

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
 * @param {ReturnType<typeof import("./client.js").startWorker>} worker
 * @param {object} page
 * @param {(busy: boolean) => void} page.onBusy
 * @param {(added: Added, what: string, cost?: Cost) => Promise<void>} page.onAdded
 * @returns {(step: Step) => void} takes the steps that the worker reports
 */
export function setUpTeaching(worker, { onBusy, onAdded }) {
  /** @type {number[]} */
  let losses = [];
  let busy = false;

  for (const [label, texts] of LESSONS) addLesson(String(label), [...texts].join("\n"));

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (busy) return void worker.call("stop");
    busy = lessons.disabled = file.disabled = true;
    button.textContent = "Stop";
    onBusy(true);
    drawLoss((losses = []), 1);
    byId("teach-step").textContent = "The loss will fall here, step by step";
    note("Getting ready");
    try {
      const taught = await worker.call("teach", name.value.trim(), ...written());
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

  file.addEventListener("change", async () => {
    const chosen = file.files?.item(0);
    if (!chosen) return;
    try {
      const bytes = new Uint8Array(await chosen.arrayBuffer());
      const added = await worker.call("open", chosen.name.replace(/\.eigentask$/, ""), bytes);
      await onAdded(added, `opened ${added.task.id}`);
      note(`${added.task.id} is open. Type a sentence above to try it.`);
    } catch (error) {
      note(/** @type {Error} */ (error).message, true);
    } finally {
      // So that the same file can be chosen again.
      file.value = "";
    }
  });

  return ({ step, steps, loss }) => {
    losses.push(loss);
    drawLoss(losses, steps);
    byId("teach-step").textContent = `Step ${step} of ${steps}, loss ${loss.toFixed(3)}`;
    // Screen readers need not hear every step.
    if (step % Math.ceil(steps / 4) === 0) note(`${percent(step / steps)} done`);
  };
}

/** @param {string} label @param {string} examples */
function addLesson(label, examples) {
  const lesson = lessonOf(label, examples);
  lessons.append(lesson);
  return lesson;
}

/** Labels and examples as written. The library says what cannot be learned from. */
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

/** @param {string} text @param {boolean} [wrong] */
function note(text, wrong = false) {
  const line = byId("teach-note");
  line.classList.toggle("wrong", wrong);
  line.textContent = text;
}
