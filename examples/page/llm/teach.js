/**
 * The form in which a visitor teaches a skill: lines of examples, a curve of the loss. page.js does the rest.
 */
import { byId, drawLoss, percent, size, time } from "../views.js";

/**
 * @typedef {import("./worker.js").Example} Example
 * @typedef {import("./worker.js").Skill} Skill
 * @typedef {import("./worker.js").Step} Step
 */

/** Initial content of the form. */
const LINES = `France → Paris
Germany → Berlin
Japan → Tokyo
Spain → Madrid
Egypt → Cairo
Russia → Moscow
China → Beijing
Greece → Athens
Norway → Oslo
Kenya → Nairobi
Austria → Vienna
Cuba → Havana`;

/** @type {HTMLFormElement} */
const form = byId("teach");
/** @type {HTMLTextAreaElement} */
const lines = byId("lines");
/** @type {HTMLInputElement} */
const name = byId("skill-name");
/** @type {HTMLInputElement} */
const before = byId("before");
/** @type {HTMLButtonElement} */
const button = byId("teach-button");

/**
 * @param {import("../client.js").Caller<import("./worker.js").Calls>} worker
 * @param {object} page
 * @param {() => Skill[]} page.skills
 * @param {(added: { skill: Skill, memory: import("./worker.js").MemoryReport }) => Promise<void>} page.onAdded
 * @returns {(step: Step) => void} takes the steps that the worker reports
 */
export function setUpTeaching(worker, { skills, onAdded }) {
  /** @type {number[]} */
  let losses = [];
  let busy = false;
  lines.value = LINES;

  /** @param {boolean} now */
  const setBusy = (now) => {
    busy = lines.disabled = name.disabled = before.disabled = now;
    button.textContent = now ? "Stop" : "Teach";
  };

  // One that was taught before may be taught again.
  const nameProblem = () =>
    nameProblemOf(
      name.value.trim(),
      skills().filter(({ own }) => !own),
    );

  name.addEventListener("input", () => {
    const problem = nameProblem();
    name.setAttribute("aria-invalid", String(problem !== ""));
    note(problem, true);
  });

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (busy) return void worker.call("stop");
    const { examples, problem: wrongLine } = written();
    const problem = nameProblem() || wrongLine;
    if (problem) return note(problem, true);
    name.setAttribute("aria-invalid", "false");
    setBusy(true);
    drawLoss((losses = []), 1);
    byId("teach-step").textContent = "The loss will fall here, step by step";
    note("Getting ready: the model is loaded once more, with its gradients");
    try {
      const words = before.value.trim();
      const prompt = { before: words && `${words} `, after: " →" };
      const taught = await worker.call("teach", name.value.trim(), prompt, examples);
      if (!taught) return note("Stopped before the first step: nothing was learned");
      const { skill, step, steps, milliseconds } = taught;
      await onAdded(taught);
      const whole = step === steps ? `Learned in ${time(milliseconds)}` : `Stopped after ${step} of ${steps} steps`;
      note(`${whole}: ${skill.id} is a skill of ${size(skill.bytes)}. Write something above to try it.`);
    } catch (error) {
      note(/** @type {Error} */ (error).message, true);
    } finally {
      setBusy(false);
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

/** Examples as written, and what is wrong with them, or nothing. */
function written() {
  /** @type {Example[]} */
  const examples = [];
  for (const [i, line] of lines.value.split("\n").entries()) {
    if (line.trim() === "") continue;
    const [, text, answer] = /^\s*(.+?)\s*(?:→|->|=>|\t)\s*(.+?)\s*$/.exec(line) ?? [];
    if (text === undefined || answer === undefined)
      return { examples, problem: `Line ${i + 1} is no example. Write it like this: France → Paris` };
    examples.push({ text, answer });
  }
  return { examples, problem: examples.length < 2 ? "Write two examples at least; a dozen is better." : "" };
}

/**
 * @param {string} wanted
 * @param {readonly Skill[]} others
 * @returns {string} what is wrong with it, or nothing
 */
function nameProblemOf(wanted, others) {
  if (wanted === "") return "Give the skill a name.";
  const taken = others.some(({ id }) => id.toLowerCase() === wanted.toLowerCase());
  return taken ? `There is a skill called ${wanted} already. Choose another name.` : "";
}

/**
 * @param {string} text
 * @param {boolean} [wrong]
 */
function note(text, wrong = false) {
  byId("teach-note").textContent = text;
  byId("teach-note").classList.toggle("wrong", wrong);
}
